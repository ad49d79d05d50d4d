"""A peer's process and what is asked of it, over a fake vLLM with the recorded surface of 0.26."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_vattn.bench.cases import serve_peer
from trtllm_vattn.bench.harness import case
from trtllm_vattn.bench.harness.peer import PEERS, Peer, check_tokens, fit_together, visible, write_config
from trtllm_vattn.bench.harness.serving import Load, Served
from trtllm_vattn.bench.harness.traces import Request
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import VattnError
from trtllm_vattn.runtime.models import load_model

HERE = Path(__file__).resolve().parent
FAKE = HERE / "fake_vllm"
RECORDED: dict[str, list[str]] = json.loads((HERE.parent / "data" / "vllm_interface.json").read_text())
LOAD = Load([[1, 2, 3], [4], [5, 6]], [2, 1, 3], [0.0, 0.0, 0.05])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_config(load_model("tiny-llama", "cpu", torch.float32), made)
    return made


@contextmanager
def started(folder: Path, kind: str = "offline") -> Iterator[Peer]:
    with Peer("vllm", path=str(FAKE)) as peer:
        peer.ask("start", kind=kind, folder=str(folder), kv_bytes=4 << 20, max_model_len=256, seed=0)
        yield peer


def test_the_fake_has_no_more_than_vllm_has() -> None:
    """Parameters and fields that the fake takes are the recorded ones, so that what runs over it may run over vLLM."""
    sys.path.insert(0, str(FAKE))
    try:
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.outputs import CompletionOutput, RequestOutput
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
    finally:
        sys.path.remove(str(FAKE))
    engine = vllm.LLMEngine
    own: dict[str, Callable[..., Any]] = {
        "LLM": vllm.LLM,
        "LLMEngine.add_request": engine.add_request,
        "LLMEngine.step": engine.step,
        "LLMEngine.has_unfinished_requests": engine.has_unfinished_requests,
        "AsyncLLM.from_engine_args": AsyncLLM.from_engine_args,
        "AsyncLLM.generate": AsyncLLM.generate,
        "AsyncLLM.shutdown": AsyncLLM.shutdown,
        "AsyncEngineArgs": AsyncEngineArgs,
        "SamplingParams": SamplingParams,
        "RequestOutput": RequestOutput,
        "CompletionOutput": CompletionOutput,
    }
    for name, made in own.items():
        taken = set(inspect.signature(made).parameters) - {"self", "kwargs"}
        assert taken <= set(RECORDED[name]), name
    for name, members in (("RequestOutputKind", RequestOutputKind), ("UsageContext", UsageContext)):
        assert set(members.__members__) <= set(RECORDED[name])


def test_what_the_worker_gives_vllm_is_recorded() -> None:
    sys.path.insert(0, str(PEERS["vllm"].parent))
    try:
        import vllm_worker
    finally:
        sys.path.remove(str(PEERS["vllm"].parent))
    command = {"folder": "x", "kv_bytes": 1, "max_model_len": 2, "seed": 3}
    given = vllm_worker.engine_arguments(command)
    assert given["kv_cache_memory_bytes"] == 1
    assert set(given) <= set(RECORDED["AsyncEngineArgs"])
    # What LLM does not name goes to the same arguments.
    assert "**" in RECORDED["LLM"]
    calls = [
        (node.func.id, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(ast.parse(PEERS["vllm"].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    (sampling,) = [keywords for name, keywords in calls if name == "SamplingParams"]
    assert sampling <= set(RECORDED["SamplingParams"])


@pytest.mark.parametrize("kind", ["offline", "server"])
def test_a_peer_serves_requests_as_they_arrive(kind: str, folder: Path) -> None:
    with started(folder, kind) as peer:
        first, second = peer.serve(LOAD), peer.serve(LOAD)
    for served in (first, second):
        check_tokens("vllm", LOAD, served.times)
        assert all(seen == sorted(seen) for seen in served.times)
        assert served.times[2][0] > LOAD.arrivals[2]
        assert served.times[0][0] < LOAD.arrivals[2]
        assert max(map(max, served.times)) <= served.seconds


def test_a_peer_says_what_it_made_of_its_defaults(folder: Path) -> None:
    with Peer("vllm", path=str(FAKE)) as peer:
        assert peer.versions["python"].split(".")[0] == "3"
        asked = {"folder": str(folder), "kv_bytes": 4 << 20, "max_model_len": 256, "seed": 0}
        made = peer.ask("start", kind="offline", **asked)
        token = 2 * 2 * 2 * 32 * 4
        assert made["settings"]["num_gpu_blocks"] * made["settings"]["block_size"] * token == 4 << 20
        assert made["settings"]["max_num_batched_tokens"] == 16384
        assert made["settings"]["enable_chunked_prefill"] is None
    with started(folder, "server") as peer:
        with pytest.raises(VattnError, match="'decode' is nothing that Server does"):
            peer.ask("decode", batch=1)
        assert peer.serve(LOAD).seconds > 0


def test_a_peer_decodes_steps_of_whole_batches(folder: Path) -> None:
    with started(folder) as peer:
        found = peer.ask("decode", batch=5, context=100, steps=12, vocab=512)
    assert 10 <= len(found["step_ms"]) <= 20
    assert min(found["step_ms"]) >= 1.0


def test_a_peer_that_is_not_there_is_refused_at_the_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", "serve", "--device", "cpu", "--model", "tiny-llama", "--peer", "vllm"]
    monkeypatch.setattr(case, "model_of", lambda args: pytest.fail("nothing is loaded before"))
    assert main([*command, "--peer-path", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"vllm is not installed for {sys.executable}; install it, or say where by --peer-python" in said
    assert said.count("\n") == 1
    assert main([*command, "--peer-python", str(tmp_path / "nothing")]) == 2
    assert "nothing does not run: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("refuses", "vllm, asked to start: ValueError: Free memory on device cuda:0 is less than desired"),
        ("dies", "vllm, asked to serve: it ended without an answer; it printed: .*CUDA error: out of luck"),
    ],
)
def test_a_peers_fault_is_told_with_its_log(
    fault: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", fault)
    with pytest.raises(VattnError, match=f"(?s){message}"), started(folder) as peer:
        peer.serve(LOAD)


def test_another_number_of_tokens_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "short")
    with started(folder) as peer:
        times = peer.serve(LOAD).times
    with pytest.raises(
        VattnError, match=r"vllm gave 2 of 3 requests another number of tokens .*; request 0 has 1 of 2"
    ):
        check_tokens("vllm", LOAD, times)


def test_a_peer_ends_with_all_that_it_started(folder: Path) -> None:
    with started(folder) as peer:
        group = peer._process.pid
        os.killpg(group, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    peer.close()


def test_two_engines_lie_on_a_device_where_they_fit() -> None:
    gib = 1 << 30
    assert fit_together(140 * gib, 15 * gib, 40 * gib, 8 * gib)
    assert not fit_together(140 * gib, 15 * gib, 48 * gib, 8 * gib)
    assert not fit_together(80 * gib, 15 * gib, 40 * gib, 8 * gib)


def test_both_serve_the_same_requests_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads: dict[str, list[Load]] = {"vattn": [], "vllm": []}
    starts: list[str] = []
    for engine in (serve_peer.Ours, serve_peer.Theirs):

        def watched(self: Any, load: Load, own: Callable[..., Any] = engine.serve) -> Any:
            loads[self.name].append(load)
            return own(self, load)

        monkeypatch.setattr(engine, "serve", watched)
    asked = Peer.ask

    def counted(self: Peer, do: str, **command: Any) -> Any:
        if do == "start":
            starts.append(command["kind"])
        return asked(self, do, **command)

    monkeypatch.setattr(Peer, "ask", counted)
    monkeypatch.setattr(serve_peer, "WARM_UP", (17,))
    lengths, azure, result = tmp_path / "lengths.csv", tmp_path / "azure.csv", tmp_path / "serve_vllm.json"
    lengths.write_text("num_prefill_tokens,num_decode_tokens\n" + "20,3\n30,9\n" * 3)
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2024-05-10 00:00:01,40,2\n" * 4)
    command = ["bench", "serve", "--device", "cpu", "--model", "tiny-llama", "--peer", "vllm", "--rounds", "2"]
    command += ["--max-seq-len", "64", "--max-seqs", "2"]
    command += ["--peer-path", str(FAKE), "--trace", str(azure), "--trace", str(lengths), "--requests", "4,6"]
    command += ["--goodput", "ttft:1e6", "--output-json", str(result), "--plot", str(tmp_path / "serve.png")]
    command += ["--peer-log", str(tmp_path / "peer.log")]
    assert main(command) == 0
    shown, found = capsys.readouterr().out, json.loads(result.read_text())
    rows = found["results"]["runs"]
    assert [(row["engine"], row["trace"], row["kind"], row["round"]) for row in rows] == [
        (engine, trace, kind, number)
        for kind, number in (("offline", 0), ("offline", 1), ("server", 0))
        for trace in ("azure", "sharegpt")
        for engine in ("vattn", "vllm")
    ]
    # The same ids, lengths and times for both, and no ids twice.
    timed = {name: [load for load in each if len(load.prompts) in (4, 6)] for name, each in loads.items()}
    assert timed["vattn"] == timed["vllm"]
    assert len({str(load.prompts[0]) for load in timed["vattn"]}) == len(timed["vattn"]) == 6
    for row in rows:
        assert row["completed"] == {"azure": 4, "sharegpt": 6}[row["trace"]]
        assert row["request_goodput"] == row["request_throughput"]
    theirs = [row["request_throughput"] for row in rows if (row["trace"], row["kind"]) == ("azure", "offline")][1::2]
    summary = found["summary"]
    assert summary["request_rate_azure"] == pytest.approx(0.8 * sum(theirs) / 2, abs=0.01)
    ratio = [ours["output_throughput"] / other["output_throughput"] for ours, other in (rows[2:4], rows[6:8])]
    assert summary["output_over_vllm_sharegpt"] == pytest.approx(sum(ratio) / 2)
    assert summary["output_over_vllm_sharegpt_spread"] == [min(ratio), max(ratio)]
    assert {"total_over_vllm_azure", "ttft_p99_over_vllm_azure", "itl_p99_over_vllm_sharegpt"} <= summary.keys()
    assert summary["peer"].startswith("vllm ")
    assert found["results"]["settings"]["vllm"]["offline"]["max_num_batched_tokens"] == 16384
    assert found["results"]["settings"]["vllm"]["server"]["max_num_batched_tokens"] == 8192
    assert found["results"]["versions"]["vattn"]["torch"]
    assert starts == ["offline", "server"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    assert lines[0] == ["trace", "requests a second", "figure", "vattn", "vllm", "vattn / vllm"]
    mean_ratio = summary["output_over_vllm_sharegpt"]
    (beside,) = [line for line in lines if line[:3] == ["sharegpt", "at once", "output tokens a second"]]
    assert beside[5] == f"{mean_ratio:.3f} ({min(ratio):.3f} to {max(ratio):.3f})"
    assert beside[4] == f"{(rows[3]['output_throughput'] + rows[7]['output_throughput']) / 2:,.1f}"
    assert "what vLLM prints at import goes to stdout" in (tmp_path / "peer.log").read_text()
    assert (tmp_path / "serve.png").stat().st_size > 10_000
    # What saturates the peer is known from then on.
    again = tmp_path / "paced.json"
    command[command.index(str(result))] = str(again)
    assert main([*command, "--peer-saturated", str(result)]) == 0
    kept = json.loads(again.read_text())
    assert [(row["engine"], row["kind"]) for row in kept["results"]["runs"]] == [
        ("vattn", "server"),
        ("vllm", "server"),
    ] * 2
    assert kept["summary"]["request_rate_azure"] == summary["request_rate_azure"]
    assert "total_over_vllm_azure" not in kept["summary"]
    unknown = [each if each != str(azure) else str(lengths) for each in command]
    assert main([*unknown, "--peer-saturated", str(result)]) == 2
    assert "does not say what saturates vllm of sharegpt-2" in capsys.readouterr().err


def test_a_peer_sees_the_device_that_we_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible("cpu") == {}
    assert visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert visible("cuda:0") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "GPU-abc"}


class Stub:
    """An engine that writes down what is asked of it."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self._told = name, told

    def start(self, kind: str) -> None:
        self._told.append(f"{self.name} starts")

    def serve(self, load: Load) -> Served:
        self._told.append(f"{self.name} serves {len(load.prompts)}")
        return Served([[1.0] * tokens for tokens in load.outputs], [False] * len(load.outputs), 1.0)

    def stop(self) -> None:
        self._told.append(f"{self.name} stops")


@pytest.mark.parametrize("together", [True, False])
def test_engines_that_do_not_fit_together_are_made_for_their_turns(together: bool) -> None:
    told: list[str] = []
    args = argparse.Namespace(burstiness=1.0, seed=0, max_seq_len=64, goodput=None, peer="b", output_json=None)
    kept = case.Recording("serve", args)
    turns = serve_peer.Turns([Stub("a", told), Stub("b", told)], kept, 512, together)
    for number in range(2):
        turns.take([((name, [Request(0.0, 5, 2)] * 3), math.inf) for name in ("x", "y")], number, "offline")
    warm_up = len(serve_peer.WARM_UP) * 3
    turn = {each: [f"{each} starts", f"{each} serves {warm_up}", f"{each} serves 3"] for each in "ab"}
    rows = [(row["engine"], row["trace"], row["round"]) for row in turns.rows]
    if together:
        # Trace by trace; warm once; a start of what has started does nothing.
        again = [told for each in "ab" for told in (f"{each} starts", f"{each} serves 3")]
        assert told == [*turn["a"], *turn["b"], *again * 3]
        assert rows == [(engine, trace, number) for number in range(2) for trace in "xy" for engine in "ab"]
    else:
        one = [told for each in "ab" for told in (*turn[each], f"{each} serves 3", f"{each} stops")]
        assert told == one * 2
        assert rows == [(engine, trace, number) for number in range(2) for engine in "ab" for trace in "xy"]


def test_what_was_measured_is_kept_when_the_peer_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "serve_vllm.json"
    command = ["bench", "serve", "--device", "cpu", "--model", "tiny-llama", "--peer", "vllm", "--rounds", "1"]
    command += ["--requests", "3", "--peer-path", str(FAKE), "--output-json", str(result)]
    turn = serve_peer.Turns.take

    def once(self: serve_peer.Turns, wanted: Any, number: int, kind: str) -> None:
        if kind == "server":
            raise VattnError("it fell over")
        turn(self, wanted, number, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_peer.Turns, "take", once)
        patch.setattr(serve_peer, "WARM_UP", (17,))
        assert main(command) == 1
    assert "it fell over" in capsys.readouterr().err
    kept = json.loads(result.read_text())
    assert len(kept["results"]["runs"]) == 2
    assert kept["summary"]["incomplete"] == ["below_saturation"]


def test_a_peer_ends_where_whoever_asked_for_it_was_killed() -> None:
    script = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, {str(PEERS["vllm"])!r}], stdin=subprocess.PIPE, start_new_session=True)
print(worker.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        pid = int(asking.stdout.readline())
        asking.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("program", ["cat", "true"])
def test_what_is_no_interpreter_is_no_peer(program: str) -> None:
    """One that answers nothing, and one that answers something else."""
    with pytest.raises(VattnError, match="vllm, asked to hello"):
        Peer("vllm", python=Path(f"/bin/{program}"))


def test_steps_are_timed_beside_a_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "graph_vllm.json"
    command = ["bench", "graph", "--device", "cpu", "--model", "tiny-llama", "--peer", "vllm", "--peer-path", str(FAKE)]
    sizes = ["--context", "60", "--steps", "6", "--rounds", "2"]
    assert main([*command, *sizes, "--batch-sizes", "2", "--output-json", str(result)]) == 0
    found = json.loads(result.read_text())
    rows, summary = found["results"]["runs"], found["summary"]
    assert [(row["batch"], row["round"], row["engine"]) for row in rows] == [
        (batch, number, engine) for batch in (2,) for number in (0, 1) for engine in ("vattn", "vllm")
    ]
    assert all(row["step_ms"]["count"] >= 4 and abs(row["mean_length"] - 60) <= 6 for row in rows)
    for batch in (2,):
        at = [row["step_ms"]["p50"] for row in rows if row["batch"] == batch]
        ratios = sorted((at[0] / at[1], at[2] / at[3]))
        assert summary[f"step_over_vllm_{batch}"] == pytest.approx(sum(ratios) / 2)
        assert summary[f"step_over_vllm_{batch}_spread"] == ratios
        # The fake's step sleeps for a millisecond.
        assert 1.0 <= summary[f"step_ms_vllm_{batch}"] < 10.0
    assert found["results"]["settings"]["vllm"]["max_num_batched_tokens"] == 16384
    assert "| vllm" in capsys.readouterr().out
    assert main([*command, "--batch-sizes", "none"]) == 2
    assert "--peer times steady decode of --model: give --batch-sizes, and no --engine" in capsys.readouterr().err
