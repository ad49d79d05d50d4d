"""What does each kernel of a pass take over its floor? Captured passes of several sizes, by the profiler.

An experiment: ``python scripts/experiments/pass_profile.py --help``. Some sequences decode while prompts go in by full
passes, first unwatched, for the time of a pass and what the host does between two, then under torch's profiler. Kernels
are put into groups by their names and by their order: in a layer come the product of q, k and v, that of the output,
those of gate and up, and that of down. A group's floor is the larger of its operations by ``--flops`` and its bytes by
what was measured to be read. Beside them are the same products alone, for what size of pass they are most efficient.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from trtllm_vattn.arguments import adder, amount
from trtllm_vattn.bench.harness.case import Part, Recording, engine_for, vocab_of
from trtllm_vattn.bench.harness.flags import BUDGET, add_attention, add_common
from trtllm_vattn.bench.harness.timing import read_limit, summarise
from trtllm_vattn.cli.parser import run_script
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.request import StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import tabulate

PRODUCTS = {4: ("qkv", "o", "gate and up", "down"), 7: ("q", "k", "v", "o", "gate", "up", "down")}
"""Of a layer, in their order, by how many there are."""
WHOSE = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate and up", "up": "gate and up"}
LAST = "products of the last layer"
"""Most of which are of the rows alone whose logits are asked for."""
NAMES = (
    ("attention of prompts", ("attend_prompts", "plan_prompts", "flash_fwd", "flashattn")),
    ("attention of decode", ("decode_shares", "fmha", "sdpa", "attend_latents", "combine_pieces", "read_prefixes")),
    ("rope and write", ("rotate", "_write")),
    ("copies", ("memcpy", "memset", "catarray")),
    ("norms and activation", ("triton_",)),
)
"""Groups by parts of kernels' names, the first that fits; what is before the first product is ``inputs``, and what is
behind the last one ``tokens``."""
IS_PRODUCT = ("gemm", "nvjet", "xmma", "cublas", "cutlass")
NAMED = 40
"""Kernels whose names are recorded, of those that took the longest in all."""
ALONE_S = 0.25
"""That each product alone runs for, so that the clock is what it is under load."""
COLUMNS = "rows group kernels ms floor_ms over_floor share"


class Kernel(NamedTuple):
    """A piece of the device's work: microseconds, and whose launch it is of."""

    name: str
    start: float
    took: float
    launch: int


@dataclass
class PassShape:
    """What the profiled passes held, on average: rows, decoding lanes, tokens that these read, pairs of a query and a
    key of prompts, and passes."""

    rows: int
    lanes: int
    decode_kv: float
    pairs: float
    passes: int = 0
    records: list[StepRecord] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the experiment."""
    add = adder(parser, add_common(parser))
    add_attention(parser)
    add("--rows", "ROWS,...", "rows of the passes, of the sizes that an engine captures", "2048,4096,8192", "32")
    add("--lanes", "SEQUENCES", "that decode meanwhile", 24, 2)
    add("--context", "TOKENS", "of each of them", 1024, 16)
    add("--prompt", "TOKENS", "of each prompt that goes in", 2165, 40)
    add("--passes", "PASSES", "that are timed, and profiled", 6, 3)
    add("--budget", "BYTES", BUDGET, "64GiB", "8MiB")
    add("--flops", "RATE", "operations a second that the card can do at best", 790e12, type=amount)


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    if args.context > args.prompt:
        raise ConfigError(
            f"--context is {args.context} and --prompt {args.prompt}; a slot holds the longer, the prompt"
        )
    recording = Recording("pass_profile", args, "python scripts/experiments/pass_profile.py")

    def products(recording: Recording) -> Iterator[dict[str, float]]:
        for row in products_alone(recording.model, args.rows, args.device):
            recording.add("products", row)
        yield {f"products_alone_tflops_{rows}": together(recording.results["products"], rows) for rows in args.rows}

    def passes(recording: Recording) -> Iterator[dict[str, float]]:
        limit = read_limit() if args.device != "cpu" else 1e10
        yield {"read_gb_per_s": limit / 1e9}
        with engine_of(recording, args) as engine:
            for rows in args.rows:
                recording.say(f"passes of {rows} rows")
                yield from of_size(recording, args, engine, rows, limit)

    parts: dict[str, Part] = {"passes": passes, "products": products}
    recording.measure(parts)
    return recording.conclude(tabulate(recording.results.get("groups", []), COLUMNS))


def engine_of(recording: Recording, args: argparse.Namespace) -> Engine:
    """An engine that captures passes of all these sizes; slots for the prompts of the largest pass, and twice that."""
    model = recording.model
    gc.collect()
    slots = args.lanes + 3 * (max(args.rows) // args.prompt + 2)
    options = {"attention": args.attention, "max_step_tokens": max(args.rows)}
    return engine_for(model, args.device, slots, 2 * args.prompt + 64 * args.passes, args.budget, **options)


def of_size(
    recording: Recording, args: argparse.Namespace, engine: Engine, rows: int, limit: float
) -> Iterator[dict[str, float]]:
    """Time and profile passes of one size; figures as they are known."""
    unwatched = prompts_in(engine, args, rows)
    full = [record for record in unwatched.records if record.prefilled + record.lanes >= 0.95 * rows]
    # The first of them begins with what was under way.
    wall = summarise([1e3 * record.wall_s for record in full[1:-1]])
    host = summarise([1e3 * (record.wall_s - record.wait_s) for record in full[1:-1]])
    recording.add("passes", {"rows": rows, "full": len(full), "wall_ms": wall, "host_ms": host})
    if "p50" in wall:
        yield {f"pass_ms_{rows}": wall["p50"], f"pass_host_ms_{rows}": host["p50"]}
        yield {f"pass_tokens_per_s_{rows}": 1e3 * rows / wall["p50"]}
    if args.device == "cpu":
        return
    found: list[Kernel] = []
    shape = profiled(lambda: prompts_in(engine, args, rows), found)
    recording.add("kernels", {"rows": rows, "ms_by_name": by_name(found)})
    groups, whole = grouped(found, layers_of(engine), rows)
    floors = floors_ms(engine, shape, limit, args.flops)
    for name, (count, ms) in groups.items():
        floor = floors.get(name, 0.0)
        row = {"rows": rows, "group": name, "kernels": count, "ms": ms, "floor_ms": floor}
        recording.add("groups", {**row, "over_floor": ms / floor if floor else None, "share": ms / whole["ms"]})
    recording.add("profiled", {"rows": rows, **whole, "floor_ms": sum(floors.values())})
    yield {f"profiled_ms_{rows}": whole["ms"], f"gaps_ms_{rows}": whole["gaps_ms"]}
    yield {f"over_floor_{rows}": whole["ms"] / sum(floors.values())}


def layers_of(engine: Engine) -> int:
    """How many layers a pass goes through."""
    return engine.cache.shape.num_layers


def prompts_in(engine: Engine, args: argparse.Namespace, rows: int) -> PassShape:
    """Have prompts go in by passes of so many rows beside the lanes that decode; afterwards nothing is left."""
    random, vocab = np.random.default_rng(rows), vocab_of(engine.model)
    records: list[StepRecord] = []

    def prompt(tokens: int) -> list[int]:
        return random.integers(0, vocab, tokens).tolist()  # type: ignore[no-any-return]

    engine.scheduler.chunk = rows
    more = args.prompt + 48 * args.passes
    lanes = [
        engine.submit(prompt(args.context), SamplingParams(max_tokens=more, ignore_eos=True)) for _ in range(args.lanes)
    ]
    while len(engine.scheduler.decoding) < args.lanes:
        engine.step()
    count = -(-(args.passes + 2) * rows // args.prompt)
    left = {engine.submit(prompt(args.prompt), SamplingParams(max_tokens=1, ignore_eos=True)) for _ in range(count)}
    engine.observer = records.append
    while left:
        left -= {event.request for event in engine.step() if event.finish_reason is not None}
    engine.observer = None
    for number in lanes:
        engine.abort(number)
    while engine.busy:
        engine.step()
    pairs = count * args.prompt * (args.prompt + 1) / 2
    whole = count * args.prompt / (rows - args.lanes)
    return PassShape(rows, args.lanes, args.lanes * (args.context + len(records) / 2), pairs / whole, records=records)


def profiled(work: Callable[[], PassShape], found: list[Kernel]) -> PassShape:
    """Do some work, and note what the device did meanwhile."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        shape = work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found.extend(kernels_of(json.loads(path.read_text())["traceEvents"]))
    return shape


def kernels_of(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The device's work in a Chrome trace, in order."""
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = [
        Kernel(event["name"].lower(), event["ts"], event["dur"], event.get("args", {}).get("correlation", -1))
        for event in work
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def by_name(kernels: Sequence[Kernel]) -> dict[str, tuple[int, float]]:
    """How often each of the longest kernels ran, and its milliseconds in all."""
    found: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        count, ms = found.get(kernel.name[:120], (0, 0.0))
        found[kernel.name[:120]] = count + 1, ms + kernel.took / 1e3
    return dict(sorted(found.items(), key=lambda each: -each[1][1])[:NAMED])


def is_product(kernel: Kernel) -> bool:
    """Whether it is a matrix product, or a part of one."""
    attention = any(part in kernel.name for name, parts in NAMES[:2] for part in parts)
    return not attention and any(part in kernel.name for part in IS_PRODUCT)


def grouped(
    kernels: Sequence[Kernel], layers: int, rows: int
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Kernels and milliseconds by group, of one of the passes, which are the longest launches of many kernels; and of
    the whole pass, with the gaps between its kernels. Raises ConfigError where no launch is of that many kernels."""
    launches: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        launches[kernel.launch].append(kernel)
    graphs = [each for each in launches.values() if len(each) > 4 * layers]
    if not graphs:
        raise ConfigError(f"no launch has more than {4 * layers} kernels, so none is a captured pass of {rows} rows")
    span = {id(each): each[-1].start + each[-1].took - each[0].start for each in graphs}
    longest = float(np.percentile([*span.values()], 90))
    passes = [each for each in graphs if span[id(each)] > 0.8 * longest]
    counts: dict[str, float] = defaultdict(float)
    times: dict[str, float] = defaultdict(float)
    gaps = 0.0
    for each in passes:
        for kernel, name in zip(each, named(each, layers), strict=True):
            counts[name] += 1 / len(passes)
            times[name] += kernel.took / 1e3 / len(passes)
        until = each[0].start
        for kernel in each:
            gaps += max(0.0, kernel.start - until) / 1e3 / len(passes)
            until = max(until, kernel.start + kernel.took)
    whole = {"passes": len(passes), "ms": sum(span[id(each)] for each in passes) / 1e3 / len(passes), "gaps_ms": gaps}
    order = sorted(times, key=lambda name: -times[name])
    return {name: (counts[name], times[name]) for name in order}, whole


def named(kernels: Sequence[Kernel], layers: int) -> list[str]:
    """The group of each kernel of a pass."""
    products = [at for at, kernel in enumerate(kernels) if is_product(kernel) and "reduce" not in kernel.name]
    of_layer = PRODUCTS.get((len(products) - 1) // layers)
    found: list[str] = []
    number, last = -1, "inputs"
    for at, kernel in enumerate(kernels):
        if is_product(kernel):
            number += "reduce" not in kernel.name
            if number >= len(products) - 1:
                last = "logits"
            elif of_layer is None:
                last = "products"
            elif number >= (layers - 1) * len(of_layer):
                last = LAST
            else:
                name = of_layer[max(0, number) % len(of_layer)]
                last = WHOSE.get(name, name)
            found.append(last)
        elif products and at < products[0] and not any(part in kernel.name for part in NAMES[0][1]):
            found.append("inputs")
        elif products and at > products[-1]:
            found.append("tokens")
        else:
            fits = (name for name, parts in NAMES if any(part in kernel.name for part in parts))
            found.append(next(fits, "others"))
    return found


def floors_ms(engine: Engine, shape: PassShape, limit: float, flops: float) -> dict[str, float]:
    """The least that a pass's groups can take: operations by `flops`, bytes by `limit`, both a second."""
    kv, config = engine.cache.shape, engine.model.config.get_text_config()
    layers, rows, item = kv.num_layers, shape.rows, kv.dtype.itemsize
    hidden, inter, kept = config.hidden_size, config.intermediate_size, kv.num_slots

    def of(operations: float, nbytes: float) -> float:
        return 1e3 * max(operations / flops, nbytes / limit)

    def product(inputs: int, outputs: int, rows: int = rows) -> float:
        return of(2.0 * rows * inputs * outputs, item * (rows * (inputs + outputs) + inputs * outputs))

    heads = engine.attention.num_heads * kv.head_dim
    all_heads = heads + 2 * kv.num_kv_heads * kv.head_dim
    q_and_out = 2.0 * item * rows * heads
    return {
        "qkv": (layers - 1) * product(hidden, all_heads),
        "o": (layers - 1) * product(heads, hidden),
        "gate and up": (layers - 1) * product(hidden, 2 * inter),
        "down": (layers - 1) * product(inter, hidden),
        # Keys and values of all rows, and the rest of the rows that have logits.
        LAST: product(hidden, all_heads - heads)
        + sum(
            product(inputs, outputs, kept)
            for inputs, outputs in ((hidden, heads), (heads, hidden), (hidden, 2 * inter), (inter, hidden))
        ),
        "logits": product(hidden, config.vocab_size, kept),
        "attention of prompts": layers * of(4.0 * heads * shape.pairs, q_and_out),
        "attention of decode": layers * of(0.0, shape.decode_kv * kv.layer_token_bytes),
        "rope and write": layers * of(0.0, 2.0 * item * rows * all_heads),
        # Both norms read what is added, and write the sum and what is normed; the activation reads two and writes one.
        "norms and activation": layers * of(0.0, item * rows * (2 * 3.0 * hidden + 3.0 * inter)),
    }


@torch.inference_mode()
def products_alone(model: Any, sizes: Sequence[int], device: str) -> Iterator[dict[str, Any]]:
    """The products of a layer alone, by the number of rows: operations a second."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {
        "qkv": (config.hidden_size, heads + 2 * kv_heads),
        "o": (heads, config.hidden_size),
        "gate and up": (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
    }
    if device != "cpu":
        torch.backends.cuda.preferred_blas_library("cublaslt")
    for name, (inputs, outputs) in shapes.items():
        weight = torch.randn(outputs, inputs, dtype=model.dtype, device=device)
        for rows in sizes:
            x = torch.randn(rows, inputs, dtype=model.dtype, device=device)
            ms = sustained_ms(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), x.device)  # type: ignore[misc]
            operations = 2.0 * rows * inputs * outputs
            yield {"rows": rows, "product": name, "ms": ms, "tflops": operations / ms / 1e9, "operations": operations}


def sustained_ms(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Milliseconds of a call in a row of calls; of one on the host."""
    work()
    if device.type == "cpu":
        return 1.0
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = 20
    for _ in range(2):
        began.record()
        for _ in range(times):
            work()
        ended.record()
        torch.cuda.synchronize(device)
        each = began.elapsed_time(ended) / times
        times = max(20, int(1e3 * ALONE_S / each))
    return float(each)


def together(rows: Sequence[dict[str, Any]], size: int) -> float:
    """TFLOP/s of all products of a layer one after the other."""
    of = [row for row in rows if row["rows"] == size]
    return float(sum(row["operations"] for row in of) / sum(row["ms"] for row in of) / 1e9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; 2 for what the user can mend, with one line that says what."""
    return run_script("pass_profile.py", str(__doc__), add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
