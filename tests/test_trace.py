"""A trace is loadable whatever becomes of its process or its disk, and costs those who note events nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.trace import Trace, read_trace


def test_events_of_all_kinds_are_one_json_array(tmp_path: Path) -> None:
    with Trace(tmp_path / "new" / "trace.json") as trace:
        trace.span("a span", 2.0, 2.5, {"why": {1}}, "kind")
        trace.span("of a track", 2.0, 2.25, track="steps")
        trace.begin("request", 7, {"tokens": 3})
        trace.mark("request", 7, "prompt tokens")
        trace.end("request", 7)
        for running in (1, 1, 2):
            trace.counter("requests", {"running": running})
        thread = threading.Thread(target=trace.instant, args=("elsewhere",), name="another")
        thread.start()
        thread.join()
    found = json.loads(trace.path.read_text())
    assert found == read_trace(trace.path)
    by_name = {event["name"]: event for event in found if event["ph"] != "M"}
    tracks = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    span = by_name["a span"]
    assert (span["ph"], span["ts"], span["dur"], span["cat"]) == ("X", 2e6, 5e5, "kind")
    assert span["args"] == {"why": "{1}"}
    assert tracks[span["tid"]] == threading.current_thread().name
    assert tracks[by_name["of a track"]["tid"]] == "steps"
    assert [event["ph"] for event in found if event.get("id") == 7] == ["b", "n", "e"]
    assert [event["args"]["running"] for event in found if event["ph"] == "C"] == [1, 2]
    assert by_name["elsewhere"]["tid"] not in (0, span["tid"])
    assert by_name["trace ends"]["args"] == {"dropped": 0}
    trace.instant("too late")
    assert trace.dropped == 1
    trace.close()


def test_what_cannot_be_written_is_refused_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the trace /dev/full: No space left"):
        Trace("/dev/full")
    with pytest.raises(ConfigError, match=r"cannot write the trace /dev/full"):
        # Before the model is looked for, let alone loaded.
        Engine.from_pretrained("no/such-model", device="cpu", trace="/dev/full")
    with pytest.raises(ConfigError, match="Is a directory"):
        Trace(tmp_path)
    with pytest.raises(ConfigError, match="give a file's path"):
        Trace.of(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{}", "[\n{\n{}\n]"])
def test_what_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is no trace|line 2"):
        read_trace(tmp_path / "x.json")


def test_a_trace_that_cannot_begin_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trace, "_write", full)
    with pytest.raises(ConfigError, match=r"cannot write the trace .*: No space left on device"):
        Trace(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


FILLING = """
import resource, signal, sys
from trtllm_vattn.trace import Trace, read_trace
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
trace = Trace(sys.argv[1])
while trace.error is None:
    trace.instant("an event", {"of": "some length"})
trace.close()
print(trace.error, trace.dropped > 0, len(read_trace(trace.path)))
"""


def test_a_full_disk_ends_the_trace_behind_a_whole_event(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    ran = subprocess.run([sys.executable, "-c", FILLING, path], capture_output=True, text=True, check=True, timeout=60)
    said, dropped, events = ran.stdout.rsplit(maxsplit=2)
    assert said.endswith("File too large; it ends here, and loads")
    assert (dropped, int(events) > 50) == ("True", True)
    assert "it ends here" in ran.stderr  # the warning
    assert path.read_text().endswith("},\n")


KILLED = """
import sys, time
from pathlib import Path
from trtllm_vattn.trace import Trace
trace = Trace(sys.argv[1])
trace.instant("before")
while '"before"' not in Path(sys.argv[1]).read_text():
    time.sleep(0.01)
print("written", flush=True)
while True:
    trace.instant("while it is killed", {"at": time.perf_counter()})
    time.sleep(1e-5)
"""


def test_a_killed_process_leaves_a_trace_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    names = [event["name"] for event in read_trace(path)]
    assert names[:4] == ["process_name", "trace begins", "thread_name", "before"]
    path.write_text(path.read_text() + '{"name":"torn')
    assert [event["name"] for event in read_trace(path)] == names


def test_a_forked_child_leaves_its_parents_trace_alone(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        if (child := os.fork()) == 0:
            trace.instant("of the child")
            trace.close()
            os._exit(trace.dropped)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        trace.instant("of the parent")
    names = [event["name"] for event in read_trace(trace.path)]
    assert "of the parent" in names
    assert "of the child" not in names


def test_a_disk_that_does_not_answer_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = threading.Event()
    trace = Trace(tmp_path / "trace.json")
    write = trace._write
    monkeypatch.setattr(trace, "_write", lambda text: (free.wait(20), write(text)))
    monkeypatch.setattr("trtllm_vattn.trace.MOST_WAITING", 500)
    for _ in range(2000):
        trace.instant("an event")
    assert trace.dropped >= 1300
    free.set()
    with caplog.at_level(logging.WARNING):
        trace.close()
    assert not caplog.records
    assert read_trace(trace.path)[-1]["args"] == {"dropped": trace.dropped}
