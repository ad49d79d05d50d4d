"""`bench reuse`: an engine with and without prefix cache, over requests whose prompts share what they begin with, and
over others that share nothing; and what each way to a hit takes, by the prefix's length.

Requests are an agent's turns, or a trace with block hashes (Mooncake's). So many run at once, the next one comes when
one has ended. Their outputs are the trace's own (forced), so that the next turn's prompt is what the engine stored.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from trtllm_vattn.arguments import positive, size
from trtllm_vattn.bench.cases import reuse_ways
from trtllm_vattn.bench.harness.case import conclude, model_of, vocab_of
from trtllm_vattn.bench.harness.flags import (
    BUDGET,
    MAX_SEQ_LEN,
    MAX_SEQS,
    REQUESTS,
    add_attention,
    add_common,
    add_plot,
    add_rounds,
    add_trace,
)
from trtllm_vattn.bench.harness.timing import summarise
from trtllm_vattn.bench.harness.traces import load_trace
from trtllm_vattn.bench.harness.turns import TokenRequest, agent_turns, from_trace
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

COLUMNS = {
    "requests": "workload",
    "reuse": "reuse",
    "round": "round",
    "seconds": "seconds:,.1f",
    "tokens/s": "throughput:,.0f",
    "TTFT p50 ms": "median_ttft_ms:,.1f",
    "hit rate": "hit_rate:.3f",
}
SPREAD = 0x9E3779B1
"""Odd: numbers of tokens, which no vocabulary has so many of, are spread over it by this."""
HIT = 0.5
"""Of a prompt, what is reused where TTFT counts as that of a hit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench reuse`."""
    gpu, add = add_common(parser), parser.add_argument
    add_attention(parser)
    add_trace(parser, help="requests with block hashes: Mooncake's (default: an agent's turns alone)")
    add("--requests", type=positive, default=600 if gpu else 24, metavar="REQUESTS", help=REQUESTS)
    text = "lengths and blocks of the trace are so many times shorter"
    add("--divide-by", type=positive, default=8, metavar="TIMES", help=text)
    add("--budget", type=size, default="40GiB" if gpu else "2MiB", metavar="BYTES", help=BUDGET)
    add("--max-seqs", type=positive, default=32 if gpu else 4, metavar="SEQUENCES", help=MAX_SEQS)
    add("--kept-seqs", type=positive, default=256 if gpu else 24, metavar="SEQUENCES", help="slots beside those")
    add("--max-seq-len", type=positive, default=20480 if gpu else 512, metavar="TOKENS", help=MAX_SEQ_LEN)
    add("--steps", type=positive, default=200 if gpu else 20, metavar="STEPS", help="steady decode steps, measured")
    add_rounds(parser, 3 if gpu else 1, "engine")
    add_plot(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    model = model_of(args)
    short = args.device == "cpu"
    sizes = {"system_tokens": 64, "median_input": 20, "median_output": 6} if short else {}
    agents = agent_turns(args.requests, args.seed, at_once=args.max_seqs, longest=args.max_seq_len * 3 // 4, **sizes)
    workloads = {"agents": agents, "unlike": unlike(agents, args.seed)}
    if args.trace is not None:
        workloads["trace"] = from_trace(load_trace(args.trace, args.requests), args.divide_by)
    rows: list[dict[str, Any]] = []
    for name, requests in workloads.items():
        fitting = [fitted(request, args.max_seq_len) for request in requests]
        for turn in range(args.rounds):
            rows += [
                {"workload": name, "reuse": reuse, "round": turn, **replay(model, args, fitting, reuse)}
                for reuse in ((True, False) if turn % 2 == 0 else (False, True))
            ]
    ways = ways_by_length(model, args)
    summary: dict[str, Any] = {**steady_state(model, args), **reuse_ways.summary(ways)}
    for name in workloads:
        speed = {
            reuse: float(
                np.mean([row["throughput"] for row in rows if (row["workload"], row["reuse"]) == (name, reuse)])
            )
            for reuse in (True, False)
        }
        ratio = speed[True] / speed[False]
        summary.setdefault("throughput_over_no_reuse", ratio)
        summary[f"throughput_over_no_reuse_{name}"] = ratio
        hits = [row["hit_rate"] for row in rows if row["workload"] == name and row["reuse"]]
        summary[f"hit_rate_{name}"] = float(np.mean(hits))
    shown = f"{tabulate(rows, COLUMNS)}\n{reuse_ways.show(ways)}"
    return conclude("reuse", args, {"runs": rows, "ways": ways}, summary, shown, reuse_ways.plot_ways)


def unlike(requests: Sequence[TokenRequest], seed: int) -> list[TokenRequest]:
    """Requests as long as these, no two of which begin alike: reuse costs something and gives nothing."""
    random = np.random.default_rng(seed)
    return [TokenRequest(random.integers(1, 1 << 40, len(each.prompt)), each.output) for each in requests]


def ways_by_length(model: PreTrainedModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each way to a hit takes, by the prefix's length (reuse_ways.py)."""
    short = args.device == "cpu"
    lengths, steps, repeats = reuse_ways.lengths_up_to(args.max_seq_len), 64, 3
    if short:
        lengths, steps, repeats = lengths[-1:], 5, 1
    with engine_of(model, args, True) as engine:
        return reuse_ways.measure_ways(engine, vocab_of(model), lengths, steps, repeats, args.seed)


def fitted(request: TokenRequest, longest: int) -> TokenRequest:
    """A request cut to what a slot holds."""
    output = request.output[: max(1, longest // 4)]
    return TokenRequest(request.prompt[: longest - len(output)], output)


def token_ids(numbers: np.ndarray, vocab: int) -> list[int]:
    """Numbers of tokens as ids of a vocabulary."""
    ids: list[int] = ((numbers.astype(np.uint64) * np.uint64(SPREAD) >> np.uint64(7)) % np.uint64(vocab)).tolist()
    return ids


def engine_of(model: PreTrainedModel, args: argparse.Namespace, reuse: bool) -> Engine:
    slots = args.max_seqs + (args.kept_seqs if reuse else 0)
    cache = make_cache("vattn", shape_of(model, slots, args.max_seq_len), args.device, args.budget)
    return Engine(model, cache, attention=args.attention, max_running=args.max_seqs, prefix_cache=reuse)


def replay(
    model: PreTrainedModel, args: argparse.Namespace, requests: Sequence[TokenRequest], reuse: bool
) -> dict[str, Any]:
    """All requests, so many at once; tokens a second are those of prompts and outputs."""
    vocab = vocab_of(model)
    asked = [(token_ids(each.prompt, vocab), token_ids(each.output, vocab)) for each in requests]
    came: dict[int, float] = {}
    ttft: list[float] = []
    failed = 0
    with engine_of(model, args, reuse) as engine:
        started, at = perf_counter(), 0
        with tqdm(total=len(asked), desc=f"reuse {reuse}", unit="request", disable=None) as bar:
            while at < len(asked) or engine.busy:
                while at < len(asked) and len(engine.scheduler.requests) < args.max_seqs:
                    prompt, output = asked[at]
                    params = SamplingParams(len(output), ignore_eos=True)
                    came[engine.submit(prompt, params, forced=output)] = perf_counter()
                    at += 1
                for event in engine.step():
                    if event.token is not None and event.index == 0:
                        ttft.append(1e3 * (perf_counter() - came[event.request]))
                    failed += event.finish_reason == "error"
                    bar.update(event.finish_reason is not None)
        seconds = perf_counter() - started
        stats = engine.prefix_stats() if reuse else {"hit_rate": 0.0}
        critical = engine.cache.stats().critical_path_maps
    gc.collect()
    if failed:
        raise ConfigError(f"{failed} of {len(asked)} requests failed; raise --budget")
    tokens = sum(len(prompt) + len(output) for prompt, output in asked)
    return {
        "seconds": seconds,
        "throughput": tokens / seconds,
        "median_ttft_ms": float(np.median(ttft)),
        "ttft_ms": summarise(ttft),
        "critical_path_maps": critical,
        **stats,
    }


def steady_state(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, float]:
    """Steps of all sequences, begun by hits, beside what is kept: `driver_calls_per_steady_step` are mappings that a
    step had to make for itself. And the time to the first token of a hit, alone, by that of a step, alone."""
    vocab, random = vocab_of(model), np.random.default_rng(args.seed)
    half = args.max_seq_len // 2
    with engine_of(model, args, True) as engine:
        prompt = random.integers(0, vocab, half).tolist()
        engine.generate([prompt], SamplingParams(2, ignore_eos=True))
        wanted = SamplingParams(args.steps + 8, ignore_eos=True)
        prompts = [[*prompt, *random.integers(0, vocab, 8).tolist()] for _ in range(args.max_seqs)]
        numbers = [engine.submit(each, wanted) for each in prompts]
        while any(not engine.scheduler.requests[number].chosen for number in numbers):
            engine.step()
        before = engine.cache.stats().critical_path_maps
        for _ in range(args.steps):
            engine.step()
        calls = (engine.cache.stats().critical_path_maps - before) / args.steps
        for number in numbers:
            if number in engine.scheduler.requests:
                engine.abort(number)
        first, steps = [], []
        for _ in range(12):
            turn = [*prompt, *random.integers(0, vocab, 1).tolist()]
            started = perf_counter()
            engine.submit(turn, SamplingParams(40, ignore_eos=True))
            times = []
            while engine.busy:
                times += [perf_counter()] * len(engine.step())
                times[-1:] = [perf_counter()] if times else []
            first.append(1e3 * (times[0] - started))
            steps.append(1e3 * float(np.median(np.diff(times))))
        hits = engine.prefix_stats()["hit_rate"]
    if hits < HIT:
        raise ConfigError(f"only {hits:.0%} of these prompts' tokens were reused; raise --budget or --kept-seqs")
    return {
        "driver_calls_per_steady_step": calls,
        "ttft_hit_ms": float(np.median(first)),
        "step_ms": float(np.median(steps)),
        "ttft_hit_over_step": float(np.median(first) / np.median(steps)),
    }
