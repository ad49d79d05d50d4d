"""`bench tiers`: keys and values in host memory. How near to the link's bandwidth do sequences come back, how fast does
an engine wake, and what do twice as many sequences as memory holds get done, beside admission control?

The link is a plain copy of one mapping to pinned memory and back, in the same run. Sequences are suspended and resumed
whole, mapping included. An engine is put to sleep after churn (sequences forked, retained, released), without contents
and with them; its tokens are compared, and its graphs must be the same objects. Without contents it is woken at once,
and after a second: the driver clears what was given back behind the release (R9), and whoever creates memory
before it is done waits for it. A row says where the time of filling went, by driver call. Oversubscribed, all requests
come at once to an engine with twice the slots that memory holds at full length; under admission control it has as many
slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.arguments import adder
from trtllm_vattn.bench.harness.case import Recording, captured_anew, captured_graphs, vocab_of
from trtllm_vattn.bench.harness.flags import MAX_SEQS, add_common
from trtllm_vattn.cache.base import FlatKV
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.host_tier import measure_link
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import KVCacheOutOfMemory, NoFreeSlot
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.tensors import finish
from trtllm_vattn.vmm.wrappers import CountingDriver

SIXTY_GB = 60 * 10**9
HOST_SLACK = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench tiers`."""
    add = adder(parser, gpu := add_common(parser, on_gpu="llama-3.1-8b"))
    add("--link-bytes", "BYTES", "of the plain copy that the link is measured by", "2GiB", "16MiB")
    text = "of the sequence that is suspended and resumed, and of those that fill memory"
    add("--tokens", "TOKENS", text, 16_000, 400)
    add("--wake-bytes", "BYTES", "of KV that an engine wakes with, empty", "60GiB", "16MiB")
    add("--keep-bytes", "BYTES", "of KV that an engine keeps while it sleeps", "8GiB", "8MiB")
    parser.set_defaults(asleep=1.0 if gpu else 0.01)
    add("--max-seqs", "SEQUENCES", f"{MAX_SEQS} under admission control; memory holds these at full length", 32, 3)
    text = "of each request of those that come at once"
    add("--prompt", "TOKENS", f"prompt {text}", 1000, 60)
    add("--output-tokens", "TOKENS", f"output {text}", 600, 60)
    add("--rounds", "TURNS", "turns that each copy and sleep takes", 3)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens changed or anything was captured again."""
    recording = Recording("tiers", args)
    recording.measure({"copies": suspended, "sleep": slept, "crowd": crowded})
    parts = [recording.results.get(name) for name in ("sequences", "sleeps", "crowds")]
    shown = "\n".join(tabulate(rows, " ".join(rows[0])) for rows in parts if rows)
    summary = recording.summary
    wrong = [] if summary.get("tokens_identical", True) else ["tokens differ after waking"]
    wrong += [f"{again} graphs were captured again"] if (again := summary.get("recaptures")) else []
    return recording.conclude(shown, wrong=wrong)


def link_of(recording: Recording) -> tuple[float, float]:
    """Bytes a second to the host and back, measured once."""
    if "link" not in recording.results:
        args = recording.args
        recording.say(f"the link, by {args.link_bytes:,} bytes")
        link_out, link_in = measure_link(open_driver(args.device), args.link_bytes)
        recording.results["link"] = {"out_bytes_s": link_out, "in_bytes_s": link_in}
        recording.sum_up(link_out_gb_s=link_out / 1e9, link_in_gb_s=link_in / 1e9)
    return recording.results["link"]["out_bytes_s"], recording.results["link"]["in_bytes_s"]


def suspended(recording: Recording) -> None:
    """One sequence to host memory and back, several times; memory is pinned before."""
    args, model = recording.args, recording.model
    link_out, link_in = link_of(recording)
    shape = shape_of(model, 2, args.tokens)
    recording.say(f"suspend and resume {args.tokens:,} tokens: {args.tokens * shape.token_bytes:,} bytes")
    with KVCacheManager(shape, open_driver(args.device), config=_host(args.tokens * shape.token_bytes)) as cache:
        cache.set_budget(3 * cache.bytes_of(args.tokens))
        cache.admit("sequence", args.tokens)
        for turn in range(args.rounds + 1):
            finish(args.device)
            began = perf_counter()
            copied = cache.suspend("sequence")
            gone = perf_counter()
            cache.resume("sequence")
            took = {"bytes": copied, "suspend_s": gone - began, "resume_s": perf_counter() - gone}
            # The first turn pins the host's memory.
            if turn:
                recording.add("sequences", took)
    rows = recording.results["sequences"]
    recording.sum_up(
        suspend_over_link=median(row["bytes"] / row["suspend_s"] for row in rows) / link_out,
        resume_over_link=median(row["bytes"] / row["resume_s"] for row in rows) / link_in,
    )


def _host(content_bytes: int) -> CacheConfig:
    """With host memory for so many bytes, rounded up to its blocks."""
    return CacheConfig(host_memory=content_bytes + content_bytes // 8 + HOST_SLACK)


def slept(recording: Recording) -> None:
    """One engine sleeps after churn, with contents and then, with more memory, without; the same prompt before and
    after."""
    args, model = recording.args, recording.model
    _, link_in = link_of(recording)
    slots = max(args.wake_bytes, args.keep_bytes) // (args.tokens * shape_of(model, 1, args.tokens).token_bytes) + 8
    recording.say(f"start the engine that sleeps, of {slots} slots")
    driver = CountingDriver(open_driver(args.device))
    cache = KVCacheManager(shape_of(model, slots, args.tokens), driver, config=_host(args.keep_bytes))
    ways = [("keep", args.keep_bytes, "kept", 0.0), ("drop", args.wake_bytes, "at once", 0.0)]
    ways.append(("drop", args.wake_bytes, "later", args.asleep))
    with Engine(model, cache, buckets=[slots], prefix_cache=False, packed=False) as engine:
        for kv, nbytes, when, asleep_s in ways:
            engine.set_budget(nbytes + cache.bytes_of(1))
            for turn in range(args.rounds):
                recording.say(f"sleep and wake with {nbytes:,} bytes, {when}, turn {turn + 1} of {args.rounds}")
                row = _sleep_once(engine, cache, driver, kv, args.tokens, asleep_s)
                recording.add("sleeps", {"wakes": when, "asleep_s": asleep_s, **row})
                recording.sum_up(**_wakes(recording.results["sleeps"], link_in))


def _wakes(rows: list[dict[str, Any]], link_in: float) -> dict[str, Any]:
    """Figures of sleeps, as far as they were measured."""
    empty = [row for row in rows if row["wakes"] == "later"]
    at_once = [row for row in rows if row["wakes"] == "at once"]
    kept = [row for row in rows if row["kv"] == "keep"]
    found: dict[str, Any] = {
        "recaptures": sum(row["recaptures"] for row in rows),
        "tokens_identical": all(row["tokens_identical"] for row in rows),
    }
    if at_once:
        found["wake_at_once_s"] = median(row["wake_s"] + row["fill_s"] for row in at_once)
    if empty:
        wake_empty_s = median(row["wake_s"] + row["fill_s"] for row in empty)
        # Of an engine whose memory is of that size; smaller ones say nothing about it.
        found["wake_empty_s_60gb"] = wake_empty_s if min(row["bytes"] for row in empty) >= SIXTY_GB else None
        found["wake_empty_s"] = wake_empty_s
    if kept:
        found["wake_kept_over_link"] = median(row["copied_bytes"] / row["wake_s"] for row in kept) / link_in
    return found


def _sleep_once(
    engine: Engine, cache: KVCacheManager, driver: CountingDriver, kv: Any, tokens: int, asleep_s: float
) -> dict[str, Any]:
    prompt, params = [1, 2, 3, 4, 5], SamplingParams(max_tokens=16, ignore_eos=True)
    want = engine.generate([prompt], params)[0].tokens
    captured = captured_graphs(engine)
    _churn(cache, tokens)
    _fill(cache, tokens)
    if kv == "drop":
        _empty(cache)
    marked = _mark(cache, tokens) if kv == "keep" else []
    held = cache.held_bytes
    began = perf_counter()
    engine.sleep(kv=kv)
    sleep_s = perf_counter() - began
    sleep(asleep_s)
    before = cache.transfers.in_bytes
    wake_s = engine.wake()
    intact = all(torch.equal(view, copy) for view, copy in marked)
    calls, seconds = driver.calls.copy(), driver.seconds.copy()
    began = perf_counter()
    _fill(cache, tokens)
    finish(str(cache.device))
    fill_s = perf_counter() - began
    filled = cache.held_bytes
    spent = {f"{name}_s": driver.seconds[name] - seconds[name] for name in ("create", "map", "set_access")}
    created = driver.calls["create"] - calls["create"]
    _empty(cache)
    same = engine.generate([prompt], params)[0].tokens == want
    return {
        "kv": kv,
        "bytes": min(held, filled),
        "copied_bytes": cache.transfers.in_bytes - before,
        "sleep_s": sleep_s,
        "wake_s": wake_s,
        "fill_s": fill_s if kv == "drop" else 0.0,
        "created": created,
        **spent,
        "recaptures": captured_anew(engine, captured),
        "tokens_identical": same and intact,
    }


def _mark(cache: KVCacheManager, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random numbers in one layer's keys of the first and the last filler: where they lie, and what they are."""
    marked = []
    for sequence in (min(cache.sequences, key=str), max(cache.sequences, key=str)):
        views = cache.layer(cache.shape.num_layers - 1)
        assert isinstance(views, FlatKV)
        view = views.k[cache.slot_of(sequence), :tokens]
        view.normal_()
        marked.append((view, view.clone()))
    return marked


def _churn(cache: KVCacheManager, tokens: int) -> None:
    """Sequences come, are forked, kept and left, of many lengths, until memory is full for the first time."""
    lengths = np.random.default_rng(1).integers(tokens // 4, tokens, 4 * cache.shape.num_slots).tolist()
    for number, length in enumerate(lengths):
        try:
            cache.admit(("churn", number), length)
            if number % 3 == 0:
                cache.fork(("churn", number), ("fork", number), length // 2)
                cache.retain(("churn", number))
            elif number % 3 == 1:
                cache.release(("churn", number))
        except (KVCacheOutOfMemory, NoFreeSlot):
            break
    _empty(cache)


def _fill(cache: KVCacheManager, tokens: int) -> None:
    """Sequences of so many tokens until nothing is left."""
    try:
        for number in range(cache.shape.num_slots):
            if ("filler", number) not in cache.sequences:
                cache.admit(("filler", number), tokens)
    except (KVCacheOutOfMemory, NoFreeSlot):
        return


def _empty(cache: KVCacheManager) -> None:
    for sequence in list(cache.sequences):
        cache.release(sequence)


def crowded(recording: Recording) -> None:
    """Twice as many requests as memory holds, all at once: admitted as memory allows at full length, and all that
    find a slot."""
    args, model = recording.args, recording.model
    for name, slots in (("admission", args.max_seqs), ("oversubscribed", 2 * args.max_seqs)):
        recording.say(f"start the engine of {slots} slots: {name}")
        with _engine(args, model, slots) as engine:
            recording.say(f"{2 * args.max_seqs} requests at once: {name}")
            recording.add("crowds", {"engine": name, **_serve(args, engine, vocab_of(model))})
    admission, over = recording.results["crowds"]
    recording.sum_up(
        oversubscribed_over_admission=over["output_throughput"] / admission["output_throughput"],
        oversubscribed_tpot_over_admission=over["p99_tpot_ms"] / admission["p99_tpot_ms"],
        swaps=over["swaps"],
    )


@contextmanager
def _engine(args: argparse.Namespace, model: PreTrainedModel, slots: int) -> Iterator[Engine]:
    longest = args.prompt + args.output_tokens
    shape = shape_of(model, slots, longest)
    cache = KVCacheManager(shape, open_driver(args.device), config=_host(args.max_seqs * longest * shape.token_bytes))
    with Engine(model, cache, prefix_cache=False, packed=False) as engine:
        engine.set_budget(args.max_seqs * cache.bytes_of(longest) + cache.bytes_of(1))
        # Kernels, and the costs of a prompt's token, are known then.
        engine.generate([[1] * args.prompt] * 2, SamplingParams(max_tokens=4, ignore_eos=True))
        yield engine


def _serve(args: argparse.Namespace, engine: Engine, vocab: int) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)
    prompts = [rng.integers(0, vocab, args.prompt).tolist() for _ in range(2 * args.max_seqs)]
    params = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
    began = perf_counter()
    numbers = [engine.submit(prompt, params) for prompt in prompts]
    times: dict[int, list[float]] = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            times[event.request].append(perf_counter())
    wall_s = perf_counter() - began
    tpot = [(each[-1] - each[0]) / (len(each) - 1) for each in times.values() if len(each) > 1]
    done = engine.cache.transfers
    return {
        "requests": len(prompts),
        "output_tokens": sum(map(len, times.values())),
        "output_throughput": sum(map(len, times.values())) / wall_s,
        "median_tpot_ms": 1e3 * median(tpot),
        "p99_tpot_ms": 1e3 * float(np.quantile(tpot, 0.99)),
        "swaps": engine.scheduler.swaps,
        "copied_out_bytes": done.out_bytes,
        "copied_in_bytes": done.in_bytes,
        "token_us": 1e6 * (engine.swap_cost.token_s or 0.0),
    }
