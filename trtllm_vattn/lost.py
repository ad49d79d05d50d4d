"""The end of a process whose device is lost (`errors.is_device_lost`): a device-side assert, an illegal address.

From then on every call on the device fails, also those that torch makes when a tensor is freed: the destructor of a
pinned or a used tensor throws, and C++ ends the process with SIGABRT in place of its own exit code (PyTorch 2.11). So
whatever holds such tensors is never freed, and the process ends without the interpreter's last collection.

Imports neither torch nor a driver.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from typing import NoReturn

from trtllm_vattn.errors import is_device_lost


def is_lost_behind(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from or while it was handled, says that the device is lost."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if is_device_lost(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def never_free(*holders: object) -> None:
    """Keep objects, and all that they hold, until the process has ended, the interpreter's last collection included."""
    for holder in holders:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))


def end_process(code: int) -> NoReturn:
    """End the process with an exit code: what was registered for its end is called and output is flushed, but nothing
    is freed. For whoever has closed what can be closed, and found the device lost."""
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)
