"""Commands under torchrun's variables: this process is rank 0, another one rank 1."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import forking
import pytest
from tiny_text import save_checkpoint

from trtllm_vattn.cli.main import main
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.parallel import Ranks

SIZES = ("--device", "cpu", "--max-seq-len", "64", "--max-seqs", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory."""
    return str(save_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def other_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start rank 1 of a command, and make this process rank 0."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = subprocess.Popen(
            [forking.python(), "-m", "trtllm_vattn", *command],
            env={**os.environ, **shared, "RANK": "1", "LOCAL_RANK": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        for name, value in {**shared, "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_rank_0_speaks_for_all_and_names_who_ends(
    checkpoint: str,
    other_rank: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("generate", "--model", checkpoint, *SIZES, "--max-tokens", "9", "the quick", "one two")
    assert main(command) == 0
    alone = capsys.readouterr().out
    other = other_rank(*command)
    ranks = Ranks.of_torchrun(2, "cpu")
    end = ranks.close
    monkeypatch.setattr(Ranks, "of_torchrun", lambda *sizes: ranks)
    monkeypatch.setattr(ranks, "close", lambda: None)
    assert main(command) == 0
    assert capsys.readouterr().out == alone

    submit = Engine.submit

    def submit_and_kill(engine: Engine, *request: Any) -> int:
        other.kill()
        return submit(engine, *request)

    monkeypatch.setattr(ranks, "close", end)
    monkeypatch.setattr(Engine, "submit", submit_and_kill)
    started = monotonic()
    assert main(command) == 2
    assert monotonic() - started < 60
    assert "rank 1 has ended" in capsys.readouterr().err
    assert other.communicate()[0] == ""


def test_commands_of_one_process_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(("bench", "fragmentation")) == 2
    assert "bench fragmentation is of one process, and torchrun started 2" in capsys.readouterr().err
    assert main(("generate", "--device", "cpu", "--model", "any")) == 2
    assert "MASTER_ADDR expected" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        main(("bench", "fragmentation"))
    with pytest.raises(SystemExit):
        main(("generate", "--help"))
    assert capsys.readouterr() == ("", "")
