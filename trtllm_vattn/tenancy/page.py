"""A page of memory that a broker shares with one tenant: what the tenant may hold, and what it says of itself, read and
written between steps without a system call.

Each field is one aligned 64-bit number, written by one side alone. What the tenant writes is believed no further than
its limits go, and what it writes over the broker's fields deceives nobody but itself: the broker reads them never.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from array import array

from trtllm_vattn.errors import ConfigError

SIZE = mmap.PAGESIZE
BUDGET, SHARE, HEARD_NEEDS, CEILING, ASLEEP, BROKER_ENDED = range(6)
"""The broker's: bytes that may be held now, bytes once others gave theirs back, the `NEEDS` that these were worked out
from, bytes that may ever be held, whether the tenant shall sleep, and whether the broker has ended."""
NEEDS, WANTS, IS_ASLEEP = range(32, 35)
"""The tenant's: as `shares.Claim` has them; and whether it sleeps."""


def sealed_memory(name: str, size: int) -> int:
    """A file of shared memory whose size nobody can change: whoever maps it is not ended by another's truncating it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Page:
    """The shared page over a descriptor, which stays the caller's. Raises ConfigError where there is no whole page."""

    def __init__(self, descriptor: int) -> None:
        if os.fstat(descriptor).st_size < SIZE:
            raise ConfigError("a broker's page is shorter than a page; the broker is of another version")
        self._fields: memoryview[int] | array[int] = memoryview(mmap.mmap(descriptor, SIZE)).cast("q")

    def __getitem__(self, field: int) -> int:
        return self._fields[field]

    def __setitem__(self, field: int, value: int) -> None:
        self._fields[field] = value

    def close(self) -> None:
        """Share it no more: whoever looks at it still, as at the end of the interpreter, finds what it said last.
        Idempotent."""
        # Unmapped once nobody in another thread is reading it.
        self._fields = array("q", self._fields)
