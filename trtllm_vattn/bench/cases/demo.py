"""`trtllm-vattn demo`: what a cache at fixed addresses is, shown in a minute on any machine.

Addresses of every layer's K and V that stay while a sequence grows and its memory is replaced, moved and given to
another sequence; physical memory that follows the tokens of the sequences; tokens that are the same captured, eager and
by transformers alone. Times are not shown here: on the host Python replays a graph, and only a GPU's graphs gain
(`bench graph`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.bench.harness.case import captured_anew, captured_graphs, conclude, vocab_of
from trtllm_vattn.bench.harness.flags import add_device, add_model, add_results
from trtllm_vattn.bench.harness.traces import generate_trace
from trtllm_vattn.bench.harness.workload import prompt_ids
from trtllm_vattn.bench.publish.plots import plot_demo
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import table, tabulate
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.tensors import tensor_at
from trtllm_vattn.vmm.wrappers import CountingDriver

SLOTS, MAX_SEQ_LEN, CHUNK = 4, 256, 64
REQUESTS, MAX_OUTPUT = 14, 24
LOOKAHEAD = 8
"""Tokens mapped past a sequence's length, whatever this machine's times ask for."""
ROWS = 16
"""Most rows of the table of memory."""
BAR = 40
"""Characters of the longest bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    add_device(parser)
    add_model(parser, default="tiny-llama")
    add_results(parser, plots=True)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 1 where an address did not stay, a byte was lost, or tokens differ."""
    if args.device == "cpu":
        # Operations of a small model are over before a second thread has begun.
        torch.set_num_threads(1)
    # In float32 and by one library's plain kernels, so that equal tokens are to be had from all.
    model, plain = (load_model(args.model, args.device, torch.float32, args.seed).eval() for _ in range(2))
    for each in (model, plain):
        # Random weights end a text anywhere.
        each.config.eos_token_id = each.generation_config.eos_token_id = None
    with _engine(model, args.device) as captured, _engine(model, args.device, capture=False) as eager:
        addresses = show_addresses(captured, plain, args.seed)
        tokens = compare_tokens(captured, eager, plain, args.seed)
        memory = follow_memory(captured, args.seed)
    summary = {
        "addresses_stayed": all(event["stayed"] for event in addresses["events"]),
        "graphs_captured": addresses["graphs_captured"],
        "graphs_captured_again": addresses["graphs_captured_again"],
        "mapped_over_tokens_bytes": memory["mapped_over_live"],
        "reserved_over_tokens_bytes": memory["reserved_over_live"],
        "tokens_identical": all(row["identical"] for row in tokens) and addresses["tokens_identical"],
    }
    results = {"addresses": addresses, "memory": memory, "tokens": tokens}
    conclude("demo", args, results, summary, _shown(addresses, memory, tokens), plot_demo)
    stayed = summary["addresses_stayed"] and not summary["graphs_captured_again"]
    return int(not (stayed and summary["tokens_identical"]))


def _engine(model: PreTrainedModel, device: str, capture: bool = True) -> Engine:
    shape = shape_of(model, SLOTS, MAX_SEQ_LEN)
    driver = CountingDriver(open_driver(device))
    # Room for every slot at its longest; what is not needed is not taken.
    budget = 2 * (SLOTS + 1) * (MAX_SEQ_LEN * shape.token_bytes + 2 * driver.granularity())
    cache = KVCacheManager(shape, driver, budget, lookahead=LOOKAHEAD)
    options: dict[str, Any] = {"attention": "torch", "buckets": [SLOTS], "chunk": CHUNK, "compile": False}
    return Engine(model, cache, prefix_cache=False, capture=capture, **options)


# -- addresses ---------------------------------------------------------------------------------------------------------


def show_addresses(engine: Engine, plain: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Where each layer's K and V lie before and after what happens to memory.

    After each event the addresses are read again, and the memory at the first addresses is read without the cache's
    tensors: it has to hold the bytes of the sequence.
    """
    cache: Any = engine.cache
    at_start = _addresses(cache)
    graphs = captured_graphs(engine)
    events: list[dict[str, Any]] = []
    before = _calls(cache)

    def happened(what: str, slot: int, expected: torch.Tensor) -> None:
        now, calls = _addresses(cache), _calls(cache)
        read = _read(cache, [layer[slot] for layer in at_start])
        events.append(
            {
                "event": what,
                "stayed": now == at_start and torch.equal(read, expected),
                "layers": [one == other for one, other in zip(now, at_start, strict=True)],
                "maps": calls["map"] - before["map"],
                "unmaps": calls["unmap"] - before["unmap"],
                "mapped_bytes": cache.stats().mapped_bytes,
            }
        )
        before.update(calls)

    random = np.random.default_rng(seed)
    vocab = vocab_of(engine.model)
    first, second = (random.integers(0, vocab, length).tolist() for length in (20, 60))
    wanted = SamplingParams(max_tokens=100)
    request = engine.submit(first, wanted)
    got: list[int] = []

    def decode(tokens: int) -> None:
        while len(got) < tokens and engine.busy:
            got.extend(event.token for event in engine.step() if event.token is not None)

    decode(2)
    slot = cache.slot_of(request)
    rows = _rows(cache, slot)
    before = _calls(cache)
    decode(50)
    happened("the sequence grew", slot, rows)
    cache.replace(request)
    happened("its memory was replaced", slot, rows)
    decode(100)
    identical = got == _own(plain, first, 100)
    # A second sequence in the first one's slot, over what the graphs were captured with.
    request = engine.submit(second, SamplingParams(max_tokens=30))
    got.clear()
    decode(2)
    taken = cache.slot_of(request)
    rows = _rows(cache, taken)
    happened("another sequence came", taken, rows)
    decode(30)
    identical = identical and got == _own(plain, second, 30)
    # Moved by the cache alone, for nothing runs.
    source = cache.admit("moved", 100)
    target = next(each for each in range(SLOTS) if each != source)
    for k, v in _tensors(cache):
        k[source, :100].normal_()
        v[source, :100].normal_()
    rows = _rows(cache, source)
    before = _calls(cache)
    cache.move("moved", target)
    happened(f"moved from slot {source} to {target}", target, rows)
    cache.release("moved")
    return {
        "layers": [{"k": slots[slot][0], "v": slots[slot][1]} for slots in at_start],
        "slot": slot,
        "events": events,
        "graphs_captured": len(graphs),
        "graphs_captured_again": captured_anew(engine, graphs),
        "tokens_identical": identical,
    }


def _tensors(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer."""
    return [(kv.k, kv.v) for kv in map(cache.layer, range(cache.shape.num_layers))]


def _addresses(cache: KVCacheManager) -> list[list[tuple[int, int]]]:
    """Of K and V, by layer and slot."""
    return [[(k[slot].data_ptr(), v[slot].data_ptr()) for slot in range(SLOTS)] for k, v in _tensors(cache)]


def _rows(cache: KVCacheManager, slot: int) -> torch.Tensor:
    """A copy of the first token's K and V in every layer, as the cache's own tensors have them."""
    rows = [each[slot, 0] for pair in _tensors(cache) for each in pair]
    return torch.stack(rows).flatten(1).clone().view(torch.uint8)


def _read(cache: KVCacheManager, addresses: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The same bytes, from the addresses."""
    shape = cache.shape
    size = shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    return torch.stack([tensor_at(at, size, str(cache.device)).clone() for pair in addresses for at in pair])


def _calls(cache: KVCacheManager) -> dict[str, int]:
    # What waits for work that is done by now is done, too.
    cache.map_ahead()
    cache.wait_ahead()
    assert isinstance(cache.driver, CountingDriver)
    return {name: cache.driver.calls[name] for name in ("map", "unmap")}


# -- memory ------------------------------------------------------------------------------------------------------------


def follow_memory(engine: Engine, seed: int) -> dict[str, Any]:
    """Tokens and bytes after each step of a queue of requests; all physical memory that is held, before the first and
    after the last, whose memory was then given back."""
    cache: Any = engine.cache
    vocab = vocab_of(engine.model)
    trace = generate_trace(REQUESTS, seed, median_prompt=60)
    requests = [request for request in trace if request.prompt_tokens + MAX_OUTPUT <= MAX_SEQ_LEN]
    budget = cache.stats().budget_bytes
    # What is parked goes back, so that nothing is there but the dummy slot.
    engine.set_budget(cache.layout.least_bytes)
    least = cache.stats().held_bytes
    engine.set_budget(budget)
    # In two halves, so that the sequences come to an end in between.
    steps: list[dict[str, int]] = []
    for half in (requests[: len(requests) // 2], requests[len(requests) // 2 :]):
        for number, request in enumerate(half):
            engine.submit(
                prompt_ids(request, number, vocab, seed).tolist(),
                SamplingParams(max_tokens=min(request.output_tokens, MAX_OUTPUT)),
            )
        while engine.busy:
            engine.step()
            stats = cache.stats()
            steps.append(
                {
                    "sequences": stats.sequences,
                    "tokens": int(cache.lengths.sum()),
                    "live_bytes": stats.live_bytes,
                    "mapped_bytes": stats.mapped_bytes,
                    "held_bytes": stats.held_bytes,
                }
            )
    most = cache.stats().held_bytes
    engine.set_budget(cache.layout.least_bytes)
    cache.wait_ahead()
    live = sum(step["live_bytes"] for step in steps)
    reserved = SLOTS * MAX_SEQ_LEN * cache.shape.token_bytes
    return {
        "steps": steps,
        "reserved_bytes": reserved,
        "token_bytes": cache.shape.token_bytes,
        "mapped_over_live": sum(step["mapped_bytes"] for step in steps) / live,
        "reserved_over_live": reserved * sum(step["sequences"] > 0 for step in steps) / live,
        "held_bytes": {"at the start": least, "after the last": most, "given back": cache.stats().held_bytes},
    }


# -- tokens ------------------------------------------------------------------------------------------------------------


def compare_tokens(captured: Engine, eager: Engine, plain: PreTrainedModel, seed: int) -> list[dict[str, Any]]:
    """Greedy tokens of some prompts by transformers alone, and by both engines."""
    random = np.random.default_rng([seed, 1])
    vocab = vocab_of(plain)
    prompts = [random.integers(0, vocab, length).tolist() for length in (3, 17, 130, 5, 40)]
    own = [_own(plain, prompt, 16) for prompt in prompts]
    rows = [{"by": "transformers' own generate", "tokens": sum(map(len, own)), "identical": True}]
    for name, engine in (("eager", eager), ("captured", captured)):
        done = [each.tokens for each in engine.generate(prompts, SamplingParams(max_tokens=16))]
        where = f"{name}, over the fixed-address cache"
        rows.append({"by": where, "tokens": sum(map(len, done)), "identical": done == own})
    return rows


@torch.inference_mode()
def _own(plain: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """Tokens that transformers alone generates from a prompt, with its own attention and cache."""
    ids = torch.tensor([list(prompt)], device=plain.device)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    whole = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    found: list[int] = whole[0, len(prompt) :].tolist()
    return found


# -- text --------------------------------------------------------------------------------------------------------------


def _shown(addresses: dict[str, Any], memory: dict[str, Any], tokens: list[dict[str, Any]]) -> str:
    events = addresses["events"]
    lines = [
        [str(number), f"{layer['k']:#x}", f"{layer['v']:#x}"]
        + ["same" if event["layers"][number] and event["stayed"] else "CHANGED" for event in events]
        for number, layer in enumerate(addresses["layers"])
    ]
    captured = (
        f"{addresses['graphs_captured']} graphs were captured at the start, {addresses['graphs_captured_again']} again"
    )
    held = ", ".join(f"{name} {nbytes / 1024:,.0f} KiB" for name, nbytes in memory["held_bytes"].items())
    parts = [
        f"1. Addresses of K and V, of slot {addresses['slot']}, and what the memory at them holds",
        table(["layer", "K at", "V at", *(event["event"] for event in events)], lines),
        tabulate(events, {"meanwhile": "event", "mapped": "maps", "taken away": "unmaps", "KiB mapped then": _kib}),
        captured,
        "2. Physical memory beside the tokens of the sequences",
        _memory(memory),
        f"All physical memory held: {held}",
        "3. Tokens",
        tabulate(tokens, {"by": "by", "tokens": "tokens", "the same": lambda row: "yes" if row["identical"] else "NO"}),
    ]
    return "\n\n".join(parts) + "\n"


def _kib(event: dict[str, Any]) -> str:
    return f"{event['mapped_bytes'] / 1024:,.0f}"


def _memory(memory: dict[str, Any]) -> str:
    steps = memory["steps"]
    every = -(-len(steps) // ROWS)
    most = max(memory["reserved_bytes"], *(step["mapped_bytes"] for step in steps))
    rows = []
    for number in range(every - 1, len(steps), every):
        step = steps[number]
        live, mapped = (round(BAR * step[name] / most) for name in ("live_bytes", "mapped_bytes"))
        sizes = (step["live_bytes"], step["mapped_bytes"], memory["reserved_bytes"])
        cells = [*map(str, (number + 1, step["sequences"], step["tokens"])), *(f"{size / 1024:,.0f}" for size in sizes)]
        rows.append([*cells, ("#" * live + "+" * (mapped - live)).ljust(BAR, ".")])
    header = ["step", "sequences", "tokens", "KiB of tokens", "KiB mapped", "KiB of whole slots", "# tokens, + mapped"]
    return table(header, rows)
