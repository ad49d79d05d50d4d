"""Arrivals and metrics of serving, by vLLM's definitions; and `bench serve` at rates, in real and in virtual time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_vattn.bench.harness import serving
from trtllm_vattn.bench.harness.serving import (
    SUBMITTED_AT_ONCE,
    Load,
    Served,
    arrival_times,
    check_goodput,
    over_time,
    report,
    serve,
)
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model

HOST = ["bench", "serve", "--device", "cpu", "--model", "tiny-llama", "--caches", "vattn", "--rounds", "1"]


def test_arrivals_are_gamma_and_end_at_the_rate() -> None:
    assert arrival_times(4, math.inf, 1.0, 0) == [0.0] * 4
    assert arrival_times(4, 2.0, math.inf, 0) == [0.5, 1.0, 1.5, 2.0]
    for burstiness in (0.3, 1.0, 5.0):
        times = np.array(arrival_times(20_000, 8.0, burstiness, 1))
        assert times[-1] == pytest.approx(20_000 / 8)
        gaps = np.diff(times)
        assert (gaps >= 0).all()
        # A gamma distribution of shape B and scale 1/(R*B) has mean 1/R and deviation 1/(R*sqrt(B)).
        assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
        assert gaps.std() == pytest.approx(1 / (8 * math.sqrt(burstiness)), rel=0.05)
        assert times.tolist() == arrival_times(20_000, 8.0, burstiness, 1)
        assert times.tolist() != arrival_times(20_000, 8.0, burstiness, 2)


def test_metrics_are_those_of_vllm() -> None:
    load = Load([[1] * 10, [1] * 20, [1] * 30, [1] * 40], [3, 1, 5, 2], [0.0, 1.0, 1.5, 2.0])
    served = Served([[0.5, 0.6, 0.9], [1.25], [], [2.4, 2.6]], [False, False, True, False], 4.0)
    found = report(load, served, {"ttft": 450.0, "tpot": 210.0})
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (70, 6)
    assert found["request_throughput"] == 3 / 4
    assert found["output_throughput"] == 6 / 4
    assert found["total_token_throughput"] == 76 / 4
    # Of 500, 250 and 400 ms to the first token; the one of a single token has no TPOT, which counts as 0 for goodput.
    assert found["request_goodput"] == 2 / 4
    assert found["median_ttft_ms"] == pytest.approx(400)
    assert found["mean_ttft_ms"] == pytest.approx(1150 / 3)
    assert found["p99_ttft_ms"] == pytest.approx(np.percentile([500, 250, 400], 99))
    assert (found["mean_tpot_ms"], found["tpot_ms"]["count"]) == (pytest.approx(200), 2)
    assert found["median_itl_ms"] == pytest.approx(200)
    assert found["p90_itl_ms"] == pytest.approx(np.percentile([100, 300, 200], 90))
    assert found["mean_e2el_ms"] == pytest.approx((900 + 250 + 600) / 3)
    assert report(load, served)["request_goodput"] is None
    latencies = ("ttft", "tpot", "itl", "e2el")
    assert {f"{what}_{name}_ms" for what in ("mean", "median", "p90", "p99") for name in latencies} <= found.keys()


def test_nothing_served_has_no_latency() -> None:
    found = report(Load([[1]], [2], [0.0]), Served([[]], [True], 1.0), {"e2el": 5.0})
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 1, 0.0)
    assert (found["mean_ttft_ms"], found["ttft_ms"]) == (0.0, {"count": 0})


def test_a_run_over_time_has_all_its_tokens_and_requests() -> None:
    load = Load([[1], [1]], [3, 2], [0.0, 2.0])
    served = Served([[0.5, 1.5, 2.5], [3.0, 3.9]], [False, False], 4.0)
    found = over_time(load, served)
    width = found["time_s"][1] - found["time_s"][0]
    assert sum(found["output_tokens_per_s"]) * width == pytest.approx(5)
    under_way = dict(zip(np.round(found["time_s"], 2).tolist(), found["concurrent_requests"], strict=True))
    assert (under_way[1.02], under_way[2.22], under_way[2.62], under_way[3.98]) == (1, 2, 1, 0)
    long = over_time(Load([[1]], [1], [0.0]), Served([[7000.0]], [False], 7000.0))
    assert len(long["time_s"]) <= 401


def test_goodput_names_each_latency_once() -> None:
    assert check_goodput([("ttft", 500.0), ("tpot", 50.0)]) == {"ttft": 500.0, "tpot": 50.0}
    with pytest.raises(ConfigError, match="--goodput has ttft, ttft; give each of them once"):
        check_goodput([("ttft", 1.0), ("ttft", 2.0)])


def engine() -> Engine:
    model = load_model("tiny-llama", "cpu", torch.float32)
    return Engine(model, make_cache("vattn", shape_of(model, 2, 64), "cpu", 4 << 20))


def test_the_first_requests_run_while_the_others_are_submitted() -> None:
    model = load_model("tiny-llama", "cpu", torch.float32)
    count = 2 * SUBMITTED_AT_ONCE + 1
    cache = make_cache("vattn", shape_of(model, 4, 32), "cpu")
    with Engine(model, cache, compile=False, capture=False) as engine:
        seen = []
        submit = engine.submit

        def noted(*arguments: Any) -> int:
            seen.append(engine.totals.launches)
            return submit(*arguments)

        engine.submit = noted  # type: ignore[method-assign]
        served = serve(engine, Load([[1, 2]] * count, [1] * count, [0.0] * count))
    assert [len(times) for times in served.times] == [1] * count
    assert seen[SUBMITTED_AT_ONCE - 1] == 0 < seen[SUBMITTED_AT_ONCE] < seen[-1]


def test_time_begins_behind_the_look_through_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    heap, clock = serving.quiet_heap, serving.Clock
    monkeypatch.setattr(serving, "quiet_heap", lambda: (order.append("heap"), heap())[1])
    monkeypatch.setattr(serving, "Clock", lambda virtual: (order.append("clock"), clock(virtual))[1])
    with engine() as one:
        assert [len(times) for times in serve(one, Load([[1, 2]], [2], [0.0])).times] == [2]
    assert order == ["heap", "clock"]


def test_virtual_time_skips_what_real_time_sleeps() -> None:
    load = Load([[1, 2], [3], [4]], [3, 2, 2], [0.0, 0.6, 30.0])
    with engine() as one:
        started = perf_counter()
        served = serve(one, load, virtual=True)
        took = perf_counter() - started
    assert took < 10 < 30 < served.seconds < 30 + took
    assert [len(seen) for seen in served.times] == [3, 2, 2]
    assert all(due < seen[0] < due + took for due, seen in zip(load.arrivals, served.times, strict=True))
    short = Load(load.prompts[:2], load.outputs[:2], load.arrivals[:2])
    with engine() as one:
        started = perf_counter()
        served = serve(one, short)
        assert perf_counter() - started >= served.seconds >= 0.6
    assert served.times[1][0] > 0.6


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "serve.json"
    assert main([*HOST, *arguments, "--output-json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_requests_come_at_a_rate_with_goodput_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "serve.png"
    command = ["--requests", "5", "--request-rate", "2", "--burstiness", "0.5", "--virtual-time"]
    found = run(tmp_path, *command, "--goodput", "ttft:1e6", "e2el:1e6", "--plot", str(plot))
    (row,) = found["results"]["runs"]
    assert found["results"]["span_s"] < 2.5 <= row["duration"]
    assert row["request_goodput"] == row["request_throughput"] > 0
    assert row["seconds"] == row["duration"]
    assert sum(row["over_time"]["output_tokens_per_s"]) > 0
    assert plot.stat().st_size > 10_000
    assert "request_goodput" in capsys.readouterr().out


def test_all_at_once_is_an_infinite_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = (["--at-once"], ["--request-rate", "inf"])
    spans = [run(tmp_path, "--requests", "3", *way)["results"]["span_s"] for way in ways]
    assert spans == [0.0, 0.0]
    assert (
        json.loads((tmp_path / "serve.json").read_text(), parse_constant=pytest.fail)["config"]["request_rate"] == "inf"
    )
    assert main([*HOST, "--at-once", "--request-rate", "3"]) == 2
    assert "--at-once is --request-rate inf, and that is 3.0; give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request-rate", "0"], "argument --request-rate: it is '0'; give a number above 0"),
        (["--goodput", "itl:5"], "argument --goodput: it is 'itl:5'; give ttft, tpot, e2el and ms, as ttft:500"),
        (["--goodput", "ttft"], "argument --goodput: it is ''; give a number above 0"),
    ],
)
def test_wrong_rates_and_objectives_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*HOST, *arguments])
    assert message in capsys.readouterr().err


def test_several_traces_are_for_a_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n20,3\n")
    twice = ["--trace", str(trace), "--trace", str(trace)]
    assert main([*HOST, *twice]) == 2
    assert "2 traces and 1 numbers of requests; without --peer give one of each" in capsys.readouterr().err
    assert main([*HOST, *twice, "--requests", "1,2,3", "--peer", "vllm"]) == 2
    assert "--requests has 3 numbers for 2 traces; give one, or one for each" in capsys.readouterr().err
    assert main([*HOST, "--virtual-time", "--peer", "vllm"]) == 2
    assert "--virtual-time skips time, which a peer cannot" in capsys.readouterr().err
