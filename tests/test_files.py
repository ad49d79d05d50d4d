"""A file is there whole, or as it was before."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason, write_json, write_whole


def full(partial: Path) -> None:
    """Write some of it, as on a disk that gets full."""
    partial.write_text("some")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    with pytest.raises(ConfigError, match=r"cannot write the numbers to .*/a/b.json: No space left on device"):
        write_whole(path, "the numbers", full)
    assert list(path.parent.iterdir()) == []
    write_json(path, "the numbers", {"a": 1})
    with pytest.raises(ConfigError):
        write_whole(path, "the numbers", full)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "the numbers", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in path.parent.iterdir()] == ["b.json"]
    with pytest.raises(ConfigError, match="cannot write the numbers"):
        write_json(path / "c", "the numbers", {})


def test_links_stay_and_pipes_are_written_to(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    link.symlink_to(file)
    write_json(link, "the numbers", 1)
    assert link.is_symlink()
    assert file.read_text() == "1\n"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, "the numbers", 2)
    assert os.read(reading, 10) == b"2\n"
    os.close(reading)
    assert pipe.is_fifo()


def test_the_longest_names_and_permissions_stay(tmp_path: Path) -> None:
    for name in ("a" * 250 + ".json", "\N{SNOWMAN}" * 83 + ".json", "b"):
        path = tmp_path / name
        write_json(path, "the numbers", 1)
        path.chmod(0o640)
        write_json(path, "the numbers", 2)
        assert path.read_text() == "2\n"
        assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ConfigError, match=r"cannot write the numbers to .*: File name too long"):
        write_json(tmp_path / ("a" * 256), "the numbers", 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(ConfigError, match=r"cannot write the numbers to .*: Too many levels of symbolic links"):
        write_json(link, "the numbers", 1)
    assert link.is_symlink()


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(number: int) -> None:
        for _ in range(20):
            write_json(path, "the numbers", [number] * 5000)

    threads = [Thread(target=write, args=(number,)) for number in range(4)]
    with noting() as failures:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert failures == []
    assert len(set(json.loads(path.read_text()))) == 1
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def noting() -> Iterator[list[object]]:
    """What threads raise."""
    failures: list[object] = []
    before, threading.excepthook = threading.excepthook, lambda raised: failures.append(raised.exc_value)
    try:
        yield failures
    finally:
        threading.excepthook = before


def test_a_reason_does_not_repeat_the_name() -> None:
    assert reason(FileNotFoundError(errno.ENOENT, "No such file or directory", "/there")) == "No such file or directory"
    assert reason(OSError("nothing is like it")) == "nothing is like it"
    assert reason(ValueError("it is 3")) == "it is 3"
