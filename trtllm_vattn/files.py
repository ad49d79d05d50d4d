"""Files that a command writes: there whole, or as they were before."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trtllm_vattn.errors import ConfigError


def reason(error: Exception) -> str:
    """Why a file cannot be read, for a message that names it: without the number and the name that an OSError has."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def write_whole(path: Path, what: str, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, and put it in its place when it is whole, with the permissions of one that was there.
    Its folder is made where it is absent.

    Parameters
    ----------
    what : str
        What the file holds, for the message, as ``the results``.
    write : callable
        Writes to the path that it gets, whose name ends as that of `path`: a file beside the one that `path` leads to;
        or `path` itself, where that is no file but a pipe or a device (``/dev/stdout``), which nothing may replace.

    Raises
    ------
    ConfigError
        It cannot be written (a full disk, say). A file that was there is as it was, and no other is left behind;
        neither is one where `write` raises anything else.
    """
    try:
        if path.exists() and not path.is_file():
            write(path)
            return
        # Not `resolve`, whose error for a link that leads to itself is no OSError.
        place = Path(os.path.realpath(path))
        if place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(place)
        try:
            write(partial)
            if place.exists():
                os.chmod(partial, stat.S_IMODE(place.stat().st_mode))
            os.replace(partial, place)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {what} to {path}: {error.strerror or error}") from error


def _beside(place: Path) -> Path:
    """A name of this thread's alone, in the same folder, of no more bytes than names may have, that ends alike."""
    mine, most = f".{os.getpid()}.{threading.get_native_id()}.partial.", 255
    name = place.name
    while len(os.fsencode(mine + name)) > most:
        name = name[1:]
    return place.with_name(mine + name)


def write_json(path: Path, what: str, content: object) -> None:
    """Write JSON as `write_whole` does."""
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, what, lambda partial: partial.write_text(text))
