"""Tenants of a broker that come and go: what is left of them in it, after thousands."""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import struct
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from trtllm_vattn.bench.cases.survival import broker_process, forked
from trtllm_vattn.errors import ConfigError, VattnError
from trtllm_vattn.progress import counting
from trtllm_vattn.tenancy import protocol as say
from trtllm_vattn.tenancy.config import TenantConfig
from trtllm_vattn.tenancy.journal import Sizes, State
from trtllm_vattn.tenancy.tenant import Client, Tenant, open_tenant

KINDS = ("leaves", "is killed", "is kept", "hangs up", "is refused", "says nothing", "says noise", "sets limits")
MEMORY = 1 << 22
EXTENTS = 3
AT_ONCE = 4
WARM = 200
"""Visits before the broker's memory is first looked at."""
KEEP_S = 0.05
MOST_RESIDENT = 8 << 20
"""Bytes by which the broker may have grown: what Python's allocator keeps, and limits of names."""
GONE_S = 60.0
STAYS = 6
"""Looks at the broker, `KEEP_S` apart, in which it has closed no descriptor more."""


def visit(path: Path, number: int, kind: str) -> None:
    """One short life, in a process of its own."""
    rng, name = random.Random(number), f"visit-{number}"
    if kind == "is refused":
        with suppress(ConfigError):
            Tenant(TenantConfig(str(path), name, floor=2 * MEMORY))
    elif kind in ("says nothing", "says noise"):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        raw.connect(str(path))
        if kind == "says noise":
            raw.send(rng.randbytes(rng.randint(1, 5000)))
    elif kind == "sets limits":
        with Client(path) as client:
            client.do(say.SetLimits(name, 0, MEMORY // 2, 1))
            client.standing()
    else:
        driver = open_tenant(TenantConfig(str(path), name, keep_s=KEEP_S if kind == "is kept" else 0.0), "cpu")
        if kind == "is kept":
            driver.tenant.open_journal(Sizes(2, 64, 1, 64)).begin(State())
        handles = [driver.create(driver.granularity()) for _ in range(rng.randint(1, EXTENTS))]
        if kind == "leaves":
            for handle in handles:
                driver.release(handle)
        if kind in ("leaves", "hangs up"):
            driver.tenant.close()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def standing_of(pid: int) -> tuple[int, int]:
    """How many descriptors a process has open, and how many bytes are resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    if resident is None:
        raise VattnError(f"process {pid} has ended")
    return len(os.listdir(f"/proc/{pid}/fd")), 1024 * int(resident[1])


def visits(count: int) -> dict[str, int]:
    """Have so many tenants come and go; by what the broker's process has grown since the first of them."""
    running: deque[int] = deque()
    before = (0, 0)
    sized = argparse.Namespace(device="cpu", memory=MEMORY)
    with tempfile.TemporaryDirectory() as folder, broker_process(sized, Path(folder) / "broker") as path:
        for number in counting(range(count), "visits", "visit"):
            if number == min(WARM, count // 2):
                before = _alone(path, running)
            kind = KINDS[number % len(KINDS)]
            pid, pipe = forked(lambda _: visit(path, number, kind))  # noqa: B023
            os.close(pipe)
            running.append(pid)
            if len(running) == AT_ONCE:
                _wait(running)
        after = _alone(path, running)
    return {"visits": count, "visits_descriptors": after[0] - before[0], "visits_resident_bytes": after[1] - before[1]}


def _wait(running: deque[int]) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(running.popleft(), 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise VattnError("a visit did not go as it should; its error is above")


def _alone(path: Path, running: deque[int]) -> tuple[int, int]:
    """What the broker's process has once nobody is there."""
    while running:
        _wait(running)
    end = time.monotonic() + GONE_S
    with Client(path) as client:
        while (found := client.standing()).tenants or found.lent:
            if time.monotonic() > end:
                raise VattnError(f"{len(found.tenants)} tenants are there, {GONE_S:g} s after their processes ended")
            time.sleep(KEEP_S)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(str(path))
            (broker,) = struct.unpack("i8x", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        # It hangs up on those that are gone one after another: what stays is the least that is seen for a while.
        least, again = standing_of(broker), 0
        while again < STAYS:
            client.standing()
            time.sleep(KEEP_S)
            found_now = standing_of(broker)
            again = again + 1 if found_now[0] >= least[0] else 0
            least = min(least, found_now)
        return least
