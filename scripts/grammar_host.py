"""Where the host's time goes in steps whose requests all have grammars: python scripts/grammar_host.py [cuda:0] [model]"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from statistics import median
from time import perf_counter, thread_time

import numpy as np
import torch

from trtllm_vattn.bench.cases.doors import Trace, asked_for, tokenizer_of
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.runtime import grammar, lane_processors
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.decode import DecodeBatch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.grammar import GrammarCompiler
from trtllm_vattn.runtime.lane_processors import LaneProcessors
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.pipeline import Pipeline
from trtllm_vattn.runtime.scheduler import Scheduler

device = sys.argv[1] if len(sys.argv) > 1 else "cuda:0"
name = sys.argv[2] if len(sys.argv) > 2 else "llama-3-8b"
gpu = device != "cpu"
LANES, STEPS = (128, 24) if gpu else (int(os.environ.get("LANES", "128")), 24)
began = perf_counter()


def say(text: str) -> None:
    print(f"{perf_counter() - began:6.1f} s: {text}", flush=True)


def components(vocab: int) -> None:
    """llguidance alone, by threads."""
    from llguidance import LLExecutor

    words = -(-vocab // 32)
    params = asked_for(Trace([[1]], 96))["grammar"]
    compiler = GrammarCompiler(tokenizer_of(vocab), vocab, [])
    started = perf_counter()
    first = compiler.grammar(params)
    say(f"{os.cpu_count()} cpus; compiled in {perf_counter() - started:.3f} s")
    kept = torch.full((LANES, words), -1, dtype=torch.int32, pin_memory=gpu).numpy()
    for threads in (1, 4, 8, 16, 32, 56) if gpu else (1, 2):
        executor = LLExecutor(threads)
        matchers = [first.anew()._matcher for _ in range(LANES)]
        random = np.random.default_rng(0)
        took = defaultdict(list)
        cpu = []
        for step in range(STEPS):
            pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
            t0 = perf_counter()
            executor.unsafe_compute_mask_ptr(pairs, kept.ctypes.data, words * 4, LANES)
            t1 = perf_counter()
            took["mask, kept buffer"].append(t1 - t0)
            before = thread_time()
            t0 = perf_counter()
            fresh = np.full((LANES, words), -1, np.int32)
            t1 = perf_counter()
            executor.unsafe_compute_mask_ptr(pairs, fresh.ctypes.data, words * 4, LANES)
            t2 = perf_counter()
            cpu.append(thread_time() - before)
            took["full"].append(t1 - t0)
            took["mask again, fresh buffer"].append(t2 - t1)
            t0 = perf_counter()
            changed = {row: mask for row, mask in enumerate(fresh) if not np.array_equal(mask, kept[row] ^ 1)}
            t1 = perf_counter()
            stacked = np.stack([*changed.values()])
            t2 = perf_counter()
            if gpu:
                torch.from_numpy(stacked).pin_memory().to(device, non_blocking=True)
            t3 = perf_counter()
            took["compare"].append(t1 - t0)
            took["stack"].append(t2 - t1)
            took["upload"].append(t3 - t2)
            tokens = []
            wide = 0
            for row in kept:
                allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab])
                wide += len(allowed) > 1000
                tokens.append(int(allowed[random.integers(len(allowed))]))
            t0 = perf_counter()
            if step % 2 or not hasattr(executor, "consume_token_par"):
                for matcher, token in zip(matchers, tokens, strict=True):
                    matcher.consume_token(token)
                took["consume"].append(perf_counter() - t0)
            else:
                executor.consume_token_par([*zip(matchers, tokens, strict=True)])
                took["consume in parallel"].append(perf_counter() - t0)
            took["lanes with wide masks"].append(wide * 1e-3)
        text = ", ".join(f"{what} {1e3 * median(each):.3f} ({1e3 * max(each):.2f})" for what, each in took.items())
        say(f"{threads} threads, ms, median (most): {text}")


times: dict[str, float] = defaultdict(float)
counts: dict[str, int] = defaultdict(int)


def watch(owner: object, attribute: str) -> None:
    real = getattr(owner, attribute, None)
    if real is None:
        return
    label = f"{getattr(owner, '__name__', owner).split('.')[-1]}.{attribute}"

    def timed(*given: object, **named: object) -> object:
        started = perf_counter()
        try:
            return real(*given, **named)
        finally:
            times[label] += perf_counter() - started
            counts[label] += 1

    setattr(owner, attribute, timed)


def engine_steps() -> None:
    model = load_model(name, device, torch.bfloat16 if gpu else torch.float32)
    vocab = model.config.vocab_size
    cache = make_cache("vattn", shape_of(model, LANES, 1024), device, "40GiB" if gpu else "1GiB")
    engine = Engine(model, cache, prefix_cache=False, tokenizer=tokenizer_of(vocab))
    say("an engine is captured")
    random = np.random.default_rng(0)
    output = 64 if gpu else 12
    prompts = [random.integers(0, vocab, 128 if gpu else 4).tolist() for _ in range(LANES)]
    trace = Trace(prompts, output)
    for owner, attributes in (
        (Engine, ("_read", "_commit_tokens", "_commit")),
        (Pipeline, ("start", "commit", "_launch")),
        (Scheduler, ("plan",)),
        (DecodeBatch, ("choose", "_put_masks", "launch", "send", "_fetch_chosen", "choice", "launched")),
        (LaneProcessors, ("new_masks", "begin_masks", "put_masks", "send")),
        (lane_processors, ("fill_masks", "upload")),
        (grammar, ("_compute",)),
        (grammar.MaskJob, ("start", "settle")),
    ):
        for attribute in attributes:
            watch(owner, attribute)
    params = asked_for(trace)
    for what in ("plain", "grammar", "plain", "grammar"):
        asked = trace.plain if what == "plain" else params["grammar"]
        while engine.capture_wanted():
            pass
        records: list[tuple[float, dict[str, float], dict[str, int]]] = []

        def observe(record: object) -> None:
            if record.lanes == LANES and not record.prefilled:  # type: ignore[attr-defined]
                records.append((record.wall_s, dict(times), dict(counts)))  # type: ignore[attr-defined]
                waits.append(record.wait_s)  # type: ignore[attr-defined]
            times.clear()
            counts.clear()

        waits: list[float] = []
        engine.observer = observe
        for prompt in prompts:
            engine.submit(prompt, asked)
        wide = [event for event in engine.run() if event.token is not None and event.token >= 256]
        records = records[5:]
        engine.observer = None
        if not records:
            say(f"{what}: no steps of {LANES} lanes")
            continue
        names = sorted({key for _, each, _ in records for key in each})
        say(
            f"{what}: step {1e3 * median(r[0] for r in records):.2f} ms, waits {1e3 * median(waits):.2f}, {len(wide)} words"
        )
        for key in names:
            several = median(each.get(key, 0.0) for _, each, _ in records)
            calls = median(count.get(key, 0) for _, _, count in records)
            most = max(each.get(key, 0.0) for _, each, _ in records)
            print(f"      {key}: {1e3 * several:.3f} ms ({1e3 * most:.2f}), {calls} calls", flush=True)
    engine.close()


components(128256)
engine_steps()
say("done")
