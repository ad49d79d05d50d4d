"""`bench doors` on the host: clients get the engine's tokens, and what is wrong is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtllm_vattn.bench.cases import doors_deterministic, doors_http, doors_updates
from trtllm_vattn.bench.cases.doors_http import judge, parting
from trtllm_vattn.bench.peer.trainer import train
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.logprobs import TokenLogprob
from trtllm_vattn.runtime.request import Completion, TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams

pytest.importorskip("uvicorn")
pytest.importorskip("openai")
server = pytest.importorskip("trtllm_vattn.serve.server")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch again, in each process that is started, takes seconds."""
    monkeypatch.setattr(server, "START", "fork")
    monkeypatch.setattr(doors_updates, "START", "fork")


@pytest.mark.usefixtures("forked_python")
def test_clients_are_killed_at_random_get_the_engines_tokens_and_leave_nothing(tmp_path: Path) -> None:
    report = tmp_path / "doors.json"
    command = ["bench", "doors", "--device", "cpu", "--requests", "40", "--clients", "12", "--prompts", "4"]
    command += ["--client-processes", "2", "--library", "openai", "--context", "12", "--max-output", "5"]
    assert main([*command, "--max-seqs", "4", "--output-json", str(report)]) == 0
    written = json.loads(report.read_text())
    assert list(written["results"]["part_seconds"]) == ["parameters", "http", "clients"]
    summary = written["summary"]
    assert (summary["requests"], summary["leaked"], summary["wrong"], summary["failed"]) == (40, 0, 0, 0)
    assert (summary["hung"], summary["gone_away"] > 0, summary["killed"] > 0) == (0, True, True)
    assert set(written["results"]["clients"]["before"]) >= {"sequences", "mappings", "tasks", "descriptors"}
    assert summary["http_over_engine"] > 0
    assert (summary["http_wrong"], summary["server_us_per_token"] > 0) == (0, True)
    assert summary["grammar_over_plain"] > 0
    assert 0 < summary["grammar_host_ms"] < 1e4
    assert 0 < summary["plain_host_ms"] < 1e4
    assert 0.2 < summary["step_over_before"] < 5


def test_the_server_is_measured_beside_an_emulated_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "doors.json"
    command = ["bench", "doors", "--device", "cpu", "--emulate-step-ms", "3", "--prompts", "6", "--max-seqs", "4"]
    command += ["--context", "12", "--max-output", "9", "--rounds", "1", "--output-json", str(report)]
    assert main([*command, "--measure", "http"]) == 0
    written = json.loads(report.read_text())
    summary, seconds = written["summary"], written["results"]["http"]
    # Two rounds of four lanes at most, whose launches are over one after the other.
    assert all(min(seconds[name]) >= 0.003 * 9 * 6 / 4 for name in ("engine_s", "http_s", "whole_s"))
    assert summary["http_wrong"] == 0
    assert {"http_over_engine", "server_us_per_token", "engine_host_over_alone"} < summary.keys()
    assert main([*command, "--measure", "parameters"]) == 2
    assert "a device is emulated on the host" in capsys.readouterr().err


def test_steps_of_every_batch_size_are_timed_although_prompts_go_in_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "doors.json"
    # A sequence of so many tokens ends before the last prompt is in, where each has a pass of its own.
    monkeypatch.setattr(doors_deterministic, "STEPS", 2)
    command = ["bench", "doors", "--device", "cpu", "--measure", "deterministic", "--batches", "2", "--max-seqs", "6"]
    command += ["--prompts", "6", "--context", "8", "--max-output", "3", "--output-json", str(report)]
    assert main([*command, "--batch-sizes", "1,6"]) == 0
    summary = json.loads(report.read_text())["summary"]
    assert (summary["different"], summary["deterministic_batches"], summary["deterministic_requests"] > 1) == (
        0,
        2,
        True,
    )
    assert min(summary[f"deterministic_step_over_plain_{size}"] for size in (1, 6)) > 0
    assert (summary["different_first_token"], summary["product_rows_different"] >= 0) == (0, True)


def test_which_part_of_a_deterministic_engine_differs_is_told() -> None:
    submitted: list[int] = []
    told: list[int] = []
    wrong = {4: 0, 5: 2}
    """The token that is another than alone, by request; the first two are those alone."""

    def submit(prompt: list[int], params: SamplingParams) -> int:
        submitted.append(len(submitted))
        return submitted[-1]

    def run() -> list[TokenEvent]:
        new = submitted[len(told) :]
        told.extend(new)
        logprobs = {True: TokenLogprob(7, -0.5), False: TokenLogprob(7, -1.0)}
        return [
            TokenEvent(each, 7, index=index, logprob=logprobs[wrong.get(each) == index])
            for each in new
            for index in range(3)
        ]

    engine: Any = SimpleNamespace(submit=submit, run=run, step=lambda: [])
    recording: Any = SimpleNamespace(say=lambda text: None)
    args = argparse.Namespace(seed=0, max_output=3)
    requests, different = doors_deterministic._compare(engine, [[1], [2]], args, 3, recording)
    assert requests == len(submitted) - 2 > 4
    assert different == {0: 1, 2: 1}


def test_rows_of_products_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False))
    calls: list[int] = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        out = torch.ones(len(x), 3)
        if len(calls) == doors_deterministic.CALLS + 5:
            out[3, 1] = 2
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert doors_deterministic._product_rows_different(model, 6) == 1
    assert calls == [1] * doors_deterministic.CALLS + [6] * doors_deterministic.CALLS, "one weight of each shape"


def test_a_batch_size_that_no_step_had_is_told() -> None:
    engine: Any = SimpleNamespace(
        cache=SimpleNamespace(shape=SimpleNamespace(max_seq_len=64)),
        scheduler=SimpleNamespace(chunk=8),
        submit=lambda prompt, params: 0,
        run=lambda: engine.observer(SimpleNamespace(lanes=5, prefilled=0, wall_s=1.0)) or [],
    )
    with pytest.raises(ConfigError, match="no step had 6 sequences, but 5 at most, of 9 tokens and 36 more; raise"):
        doors_deterministic._step_ms(engine, [[0] * 9], 6)


def one_set(connection: Connection, model: str, device: str, seed: int) -> None:
    """A trainer that sends the second set whatever is asked for."""

    class Asked:
        send = staticmethod(connection.send)

        def recv(self) -> Any:
            got = connection.recv()
            return 1 if isinstance(got, int) else got

    train(Asked(), model, device, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the process of clients ended early"),
        ([{"place": 0, "tokens": []}], "the process of clients ended early"),
        ([{"place": 0, "error": "refused"}, {"seconds": 1.0}], r"clients failed: \['refused'\]"),
    ],
)
def test_clients_that_fail_or_end_early_are_told(
    lines: list[dict[str, Any]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors_http, "_start", lambda job: None)
    monkeypatch.setattr(doors_http, "_lines", lambda process: iter(lines))
    served: Any = SimpleNamespace(where={}, engine_cpu_s=lambda: 0.0)
    engine: Any = SimpleNamespace(observer=None)
    with pytest.raises(ConfigError, match=said):
        doors_http.through_server(engine, served, {"requests": []})


@pytest.mark.parametrize(("trainer", "exit_code"), [(train, 0), (one_set, 1)])
def test_updates_while_requests_stream_and_the_other_weights_tokens_are_told(
    trainer: Callable[..., None], exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "doors.json"
    monkeypatch.setattr(doors_updates, "train", trainer)
    command = ["bench", "doors", "--device", "cpu", "--measure", "updates", "--updates", "3", "--max-seqs", "3"]
    command += ["--context", "5", "--max-output", "12", "--max-seq-len", "32", "--output-json", str(report)]
    assert main(command) == exit_code
    summary = json.loads(report.read_text())["summary"]
    assert (summary["updates"], summary["recaptured"], summary["versions_stamped"]) == (3, 0, 4)
    assert (summary["mixed_tokens"] > 0) == bool(exit_code)
    mixed = json.loads(report.read_text())["results"]["updates"]["mixed"]
    assert len(mixed) == summary["mixed_tokens"]
    if exit_code:
        # The second set is there in both looks: nothing else explains the tokens of the first.
        assert {each["version"] % 2 for each in mixed} == {0}
        assert all(each["distance"] == each["by_other_weights"] > 1e-3 for each in mixed)
        return
    # Tokens whose stamps are swapped are told.
    assert 0.1 < summary["mixed_swapped"] < 1
    assert summary["mixed_largest_distance"] <= max(1e-3, summary["mixed_rounding"]) < 0.01


def test_mixed_tokens_are_those_that_no_rounding_explains() -> None:
    streamed = [doors_updates.Streamed([1, 2], [3, 4, 5], [0, 0, 1]), doors_updates.Streamed([1], [6, 7], [2, 3])]
    own, other = [[0.0, 0.1, 4.0], [0.4, 5.0]], [[3.0, 0.2, 0.0], [6.0, 0.5]]
    looks = [doors_updates.Look(own, {0: [0.2, 0.0, 9.0]}), doors_updates.Look(other, {1: [1.0, 0.2]})]
    figures, mixed = doors_updates.judged(streamed, looks, 0.25)
    assert figures == {
        "mixed_tokens": 1,
        "mixed_ties": 1,
        "mixed_largest_distance": 0.4,
        "mixed_rounding": pytest.approx(0.3),
        "mixed_swapped": 4 / 5,
    }
    where = {"request": 1, "prompt": 1, "position": 0, "version": 2, "version_before": None}
    assert mixed == [{**where, "distance": 0.4, "again": None, "by_other_weights": 6.0}]
    # What rounding was seen to do is no mixture.
    looks[1].again[1][1] = 0.05
    assert doors_updates.judged(streamed, looks, 0.25)[0]["mixed_tokens"] == 0


@pytest.mark.parametrize(
    ("tokens", "more", "said"),
    [
        ([4, 5, 6], {}, "right"),
        ([4, 5], {"left": True}, "right"),
        ([4, 5], {}, "wrong"),
        ([4, 7, 6], {}, "tie"),
        ([9, 5], {"left": True}, "wrong"),
        ([], {"error": "x"}, "failed"),
    ],
)
def test_outputs_are_judged(tokens: list[int], more: dict[str, object], said: str) -> None:
    gaps = (1.0, 0.1, 1.0)
    logprobs = [TokenLogprob(4 + n, -1.0, ((4 + n, -1.0), (0, -1.0 - gap))) for n, gap in enumerate(gaps)]
    wanted = Completion(0, 1, [4, 5, 6], "length", logprobs=logprobs)
    assert judge({"tokens": tokens, **more}, wanted, 0.25) == said
    apart = {5: None, 7: 0.1, 9: 1.0}.get(next((token for token in tokens if token > 6), 5))
    assert parting(tokens, wanted) == (None if apart is None else pytest.approx(apart))
