"""`bench xqa`: TensorRT-LLM's kernels over affine tables.

It compares tokens with those of flat attention, teacher-forced, and tokens over affine with those over random tables,
which must be equal. It times attention for a prompt by XQA's kernel and by cuDNN's, decode steps over both kinds of
table in turns, and the host's work on a step's table; and it replays one captured graph while its memory is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from trtllm_vattn.arguments import adder, positive
from trtllm_vattn.bench.cases.xqa_parts import RandomBlocks, prefill_us, replay_remapped, table_host
from trtllm_vattn.bench.harness.case import Recording, vocab_of
from trtllm_vattn.bench.harness.contenders import Contest, device_step_ms, take_turns
from trtllm_vattn.bench.harness.flags import MAX_OUTPUT, TIE_TOLERANCE, add_common, add_steady
from trtllm_vattn.bench.harness.identity import Identity, RequestTokens, compare
from trtllm_vattn.bench.harness.traces import fit, generate_trace
from trtllm_vattn.bench.harness.workload import prompts_of, run_traced
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.blocks import BlockKVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.memory.layout import BLOCK_SIZES
from trtllm_vattn.progress import counting
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.table import tabulate

COLUMNS = "batch table step_ms.p50 step_ms.p99 device_step_ms affine_over_random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench xqa`."""
    add = adder(parser, gpu := add_common(parser))
    parser.add_argument(
        "--attention", default="xqa", choices=["xqa", "xqa-fmha"], help="kernels that are compared with flat attention"
    )
    parser.add_argument("--tokens-per-block", type=positive, default=32, choices=BLOCK_SIZES, help="tokens of a block")
    add("--layers-per-range", "LAYERS", "layers of a block's record (default: as many as make rows of 64 KiB)")
    context, rounds, steps, batches = (2048, 5, 20, "1,8,32,128") if gpu else (64, 1, 4, "2")
    add_steady(parser, "kind of table", context, rounds, steps, batches)
    add("--requests", "REQUESTS", "generated requests whose tokens are compared", 16, 6)
    add("--max-output", "TOKENS", MAX_OUTPUT, 48, 8)
    # Kernels that round differently choose between logits up to 0.41 apart (tests/runtime/rounding_probe.py).
    add("--tie-tolerance", "LOGITS", TIE_TOLERANCE, 0.5, 0.0)
    add("--replays", "REPLAYS", "replays of one graph over replaced memory", 10_000, 40)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 where tokens differ or a replay was wrong."""
    recording = Recording("xqa", args)
    recording.measure({"tokens": identities, "steps": steady_steps, "replays": replays, "prompts": prompts})
    return recording.conclude(tabulate(recording.results.get("steady", []), COLUMNS))


def identities(recording: Recording) -> list[dict[str, Any]]:
    """Tokens over affine tables beside those over flat KV, and those over random tables."""
    identity, by_table = tokens(recording.args, recording.model)
    recording.results.update(identity=vars(identity), by_table=vars(by_table))
    if not identity.identical:
        recording.wrong.append("tokens differ between flat attention and XQA over affine tables")
    if not by_table.identical:
        recording.wrong.append("tokens differ between affine and random tables of the same kernel")
    return [
        {
            "tokens_identical": identity.identical,
            "tokens_compared": identity.tokens,
            **{name: getattr(identity, name) for name in ("ties", "widest_tie", "mismatches", "widest_mismatch")},
            "tables_tokens_identical": by_table.identical,
        }
    ]


def steady_steps(recording: Recording) -> Iterator[dict[str, Any]]:
    """Steps over affine tables beside those over random ones, in turns."""
    for batch in counting(recording.args.batch_sizes, "batch sizes", "batch size"):
        steady(recording, batch)
        rows = recording.results["steady"]
        yield {
            "affine_over_random_step_ratio": max(row["affine_over_random"] for row in rows),
            "critical_path_maps": sum(row["critical_path_maps"] for row in rows),
        }


def steady(recording: Recording, batch: int) -> None:
    """Captured decode steps with affine and with random tables, in turns."""
    args, model = recording.args, recording.model
    most = batch + 2 * args.rounds * (args.steps + 4) + 40
    start = max(1, args.context - most // 2)
    shape = shape_of(model, batch, start + most)
    options = {"attention": "xqa", "buckets": [batch], "chunk": max(2048, start)}
    with Contest(batch, start, most, args.seed) as contest:
        for name in ("affine", "random"):
            if name == "affine":
                cache: KVCache = make_blocks(args, model, batch, start + most)
            else:
                cache = RandomBlocks(shape, args.device, args.tokens_per_block, args.seed)
            contest.add(name, Engine(model, cache, prefix_cache=False, **options))
        take_turns(contest.contenders, args.rounds, args.steps, f"batch {batch}")
        affine, random = contest.contenders
        ratio, by_round = affine.over(random)
        beside = {"context": args.context, "affine_over_random": ratio, "by_round": by_round}
        for each in contest.contenders:
            row = {"table": each.name, "batch": batch, "device_step_ms": device_step_ms(each.engine)}
            recording.add("steady", {**row, **beside, **each.times()})


def replays(recording: Recording) -> Iterator[dict[str, Any]]:
    """One captured graph over memory that every replay changes, and the host's time for tables."""
    args, model = recording.args, recording.model
    heads, longest = model.config.get_text_config().num_attention_heads, args.context + 64
    with make_blocks(args, model, 9, longest) as cache:
        replayed = recording.results["replayed"] = replay_remapped(cache, heads, args.context, args.replays, args.seed)
        granularity = cache.layout.granularity
    if replayed["wrong"]:
        recording.wrong.append(f"{replayed['wrong']} replays over replaced memory were wrong")
    yield {
        "replays": replayed["replays"],
        "remaps": replayed["remaps"],
        "graphs_captured": replayed["graphs_captured"],
        "wrong_replays": replayed["wrong"],
        "replays_of_other_bits": replayed["bits_differ"],
    }
    host = table_host(shape_of(model, 128, longest), granularity, args.tokens_per_block, args.device)
    recording.results["tables"] = host
    yield {
        "table_host_us": host["unchanged_us"]["p50"],
        "table_host_us_p99": host["unchanged_us"]["p99"],
        "table_host_changed_us": host["changed_us"]["p50"],
    }


def prompts(recording: Recording) -> list[dict[str, Any]]:
    """Attention for a prompt, by kernel."""
    args, model = recording.args, recording.model
    with make_blocks(args, model, 1, args.context) as cache:
        found = prefill_us(cache, model.config.get_text_config().num_attention_heads, args.context, repeats=5)
    recording.results["prefill"] = found
    return [{f"prefill_us_a_layer_{name}": value["p50"] for name, value in found.items()}]


def make_blocks(args: argparse.Namespace, model: Any, num_slots: int, max_seq_len: int) -> BlockKVCache:
    """A cache in the block layout with room for all."""
    made = make_cache(
        "blocks",
        shape_of(model, num_slots, max_seq_len),
        args.device,
        layers_per_range=args.layers_per_range,
        tokens_per_block=args.tokens_per_block,
    )
    assert isinstance(made, BlockKVCache)
    return made


def tokens(args: argparse.Namespace, model: Any) -> tuple[Identity, Identity]:
    """Compare tokens of flat attention with those over affine tables, and of XQA over random with those over affine
    tables; all but the first are teacher-forced with the first's."""
    longest = 2 * args.context
    requests = fit(generate_trace(args.requests, args.seed), longest, args.max_output)
    given = prompts_of(requests, vocab_of(model), args.seed)
    outputs = [request.output_tokens for request in requests]
    forcing = args.tie_tolerance > 0
    slots = min(8, args.requests)
    shape = shape_of(model, slots, longest)

    def served(cache: KVCache, attention: str, forced: RequestTokens | None = None) -> RequestTokens:
        with Engine(model, cache, prefix_cache=False, attention=attention, record_margins=forcing) as engine:
            return run_traced(engine, given, outputs, forced, f"{attention}, {type(cache).__name__}").tokens

    flat = served(make_cache("vattn", shape, args.device), "auto")
    forced = flat if forcing else None
    affine = served(make_blocks(args, model, slots, longest), "xqa", forced)
    random = served(RandomBlocks(shape, args.device, args.tokens_per_block, args.seed), "xqa", forced)
    asked = affine
    if args.attention != "xqa":
        asked = served(make_blocks(args, model, slots, longest), args.attention, forced)
    return compare(flat, asked, args.tie_tolerance), compare(affine, random, 0.0)
