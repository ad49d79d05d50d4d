"""`trtllm-vattn calibrate`: measures, in two minutes at most, the numbers of this machine that the planner's formulas
need, and keeps them as JSON (planner/README.md).

Driver calls come in bursts of fresh handles, as prompts make them; attention, products of weights and steps are those
of an engine over `--model`. On the host driver it takes seconds, with a tiny model.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trtllm_vattn.arguments import output
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.cases.driver_calls import busy_device, one_by_one
from trtllm_vattn.bench.cases.ledger import LedgerDriver
from trtllm_vattn.bench.harness.case import engine_for, give_back, model_of, vocab_of
from trtllm_vattn.bench.harness.contenders import cancel_all, fill, observed, steps_and_tokens
from trtllm_vattn.bench.harness.flags import add_attention, add_device, add_model, dtype_of
from trtllm_vattn.bench.harness.timing import attention_bandwidth, fill_random, read_limit, timed_ms
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.calibrated import card_of
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.machine import gpu, versions
from trtllm_vattn.memory.layout import default_layers_per_range
from trtllm_vattn.planner import Calibration, ModelShape
from trtllm_vattn.planner.calibration import QUANTITIES, Curve, folder, named, save
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import planned_shape
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.table import table
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.tensors import tensor_at

MULTIPLES = (1, 8, 32, 128)
"""Of the granularity: sizes of handles."""
HANDLES, BURST_BYTES = 64, 8 << 30
"""Of a burst, at most."""
ROW = 128
"""Bytes of a random read that finds the TLB's reach: so few that misses, not transfers, bound them."""
UNKNOWN_FLOPS = 1e15
"""Operations a second of a prompt's attention where passes do not tell: so many that it does not count."""
ROW_BYTES = (32 << 10, 64 << 10, 128 << 10)
"""Of a token, by which attention's rate is measured, besides the shortest and the longest row."""
TELLING = 0.15
"""Of a step: what longer sequences add to it at least, where that says how fast they are read."""
SPARE = 4 << 30
"""Bytes of the device that the search for the TLB's reach leaves."""


def cache_shape_of(shape: ModelShape, dtype: torch.dtype, num_slots: int, max_seq_len: int) -> CacheShape:
    """The shape of a cache for a model that is planned."""
    return CacheShape(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype, num_slots, max_seq_len)


class Measured:
    """Numbers as they are measured, each with its source; progress goes to stderr with seconds from the start."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.estimated: set[str] = set()
        self._began = perf_counter()

    def say(self, text: str) -> None:
        print(f"[{perf_counter() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def put(self, name: str, value: Any, source: str, estimated: bool = False) -> None:
        """A number or a curve. What comes out as nothing, or less, by the noise of a difference, is kept just above."""
        least = 1e-3
        if QUANTITIES[name][0]:
            value = [(float(x), max(least, float(y))) for x, y in value]
        else:
            value = max(least, float(value))
        self.values[name], self.sources[name] = value, source
        if estimated:
            self.estimated.add(name)

    def calibration(self, device: str, granularity: int, model: str) -> Calibration:
        """All of them, of this machine."""
        found = None if device == "cpu" else gpu(torch.device(device).index or 0)
        about = {
            "gpu": found,
            "driver": (found or {}).get("driver", "host"),
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": model,
        }
        numbers = {name: self.values[name] for name, (is_curve, _) in QUANTITIES.items() if not is_curve}
        curves = {name: Curve(tuple(self.values[name])) for name, (is_curve, _) in QUANTITIES.items() if is_curve}
        return Calibration(
            card_of(device), granularity, about, numbers, curves, self.sources, frozenset(self.estimated)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `calibrate`."""
    gpu_there = add_device(parser)
    # Its sequences are longer than the positions of Llama 3.0.
    add_model(parser, default="llama-3.1-8b" if gpu_there else "tiny-llama")
    add_attention(parser)
    text = "write the numbers there (default: where this machine's plans look for them)"
    parser.add_argument("--output", type=output, metavar="FILE", help=text)
    parser.set_defaults(seed=0)


def run(args: argparse.Namespace) -> int:
    """Measure, write the file, and print the numbers."""
    measured = Measured()
    found = measure(args, measured)
    path = args.output or folder() / f"{found.card}.json"
    save(found, path)
    rows = []
    for name, (is_curve, text) in QUANTITIES.items():
        value = measured.values[name]
        shown = " ".join(f"{x:.4g}: {y:.4g}" for x, y in value) if is_curve else f"{value:.4g}"
        rows.append([name, shown, text + (" (estimated)" if name in measured.estimated else "")])
    print(table(["number", "value", "what it is"], rows))
    print(f"written to {path}")
    return 0


def measure(args: argparse.Namespace, measured: Measured) -> Calibration:
    """All numbers; an engine is made for some of them, and closed."""
    model_shape = planned_shape(args.model, dtype_of(args.device))
    granularity = measure_machine(args.device, model_shape, args.attention, measured)
    measured.say(f"loading {args.model} and starting an engine")
    model = model_of(args)
    with probe_engine(model, args) as engine:
        measure_engine(engine, model_shape, measured, args.seed)
    del engine, model
    gc.collect()
    measured.say("done")
    return measured.calibration(args.device, granularity, args.model)


def measure_machine(device: str, shape: ModelShape, attention: str, measured: Measured) -> int:
    """What needs no model: driver calls, the host, reads, attention, products. Returns the driver's granularity."""
    driver = open_driver(device)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("driver calls", lambda: _driver_calls(driver, measured)),
        ("the host's part of admissions", lambda: _admissions(shape, measured)),
        ("reads and copies", lambda: _reads(driver, measured)),
        ("attention", lambda: _attention(device, shape, attention, measured)),
        ("products of weights", lambda: _products(device, shape, measured)),
    ]
    for part, work in parts:
        measured.say(part)
        work()
        give_back()
    return driver.granularity()


# -- driver ------------------------------------------------------------------------------------------------------------


def _driver_calls(driver: Driver, measured: Measured) -> None:
    granularity = driver.granularity()
    most = BURST_BYTES if driver.device != "cpu" else 16 << 20
    found: dict[str, list[tuple[float, float]]] = {}
    for multiple in MULTIPLES:
        size = multiple * granularity
        rounds = [burst_us(driver, size, max(1, min(HANDLES, most // size))) for _ in range(3)]
        for call in rounds[0]:
            found.setdefault(call, []).append((size, median(each[call] for each in rounds)))
    for call, points in found.items():
        measured.put(f"{call}_us", points, f"bursts of up to {HANDLES} fresh handles, median of 3")
    with busy_device(driver.device):
        took = one_by_one(driver, granularity, 100)
    slow = sum(float(np.percentile(took[call], 99)) for call in ("create", "map", "set_access"))
    measured.put("page_beside_us", slow, "100 pages beside a device that reads, p99 of each call")


def burst_us(driver: Driver, size: int, count: int) -> dict[str, float]:
    """Microseconds a handle of each call, `count` fresh handles at once: created, mapped, made accessible by one call,
    unmapped by one, released."""
    base = driver.reserve(size * count)
    took: dict[str, float] = {}

    def timed(call: str, work: Callable[[], Any]) -> Any:
        started = perf_counter()
        answer = work()
        took[call] = 1e6 * (perf_counter() - started) / count
        return answer

    handles: list[int] = []
    mapped = 0
    try:
        timed("create", lambda: handles.extend(driver.create(size) for _ in range(count)))

        def map_all() -> None:
            nonlocal mapped
            for number, handle in enumerate(handles):
                driver.map(base + number * size, size, handle)
                mapped += 1

        timed("map", map_all)
        timed("set_access", lambda: driver.set_access(base, size * count))
    finally:
        if mapped:
            timed("unmap", lambda: driver.unmap(base, size * mapped))
        timed("release", lambda: [driver.release(handle) for handle in handles])
        driver.free(base, size * count)
    return took


def _admissions(shape: ModelShape, measured: Measured) -> None:
    """Two kinds of extents for the same prompts: two equations for what a prompt and what a mapping take."""
    prompts, tokens = 32, 2048

    def seconds(classes: int) -> tuple[float, int]:
        cache_shape = cache_shape_of(shape, torch.bfloat16, prompts, 2 * tokens)
        config = CacheConfig(extent_classes=classes)
        with KVCacheManager(cache_shape, LedgerDriver(), 1 << 40, config=config) as cache:
            started = perf_counter()
            for number in range(prompts):
                cache.admit(number, tokens)
            return perf_counter() - started, cache.stats().admission_maps

    few_s, few = min(seconds(CacheConfig.extent_classes) for _ in range(3))
    many_s, many = min(seconds(1) for _ in range(3))
    each = max(0.0, many_s - few_s) / max(1, many - few)
    source = f"{prompts} prompts of {tokens} tokens admitted over a driver that maps nothing, by two sizes of extents"
    measured.put("mapping_us", 1e6 * each, source)
    measured.put("admit_us", 1e6 * (few_s - few * each) / prompts, source)


# -- memory ------------------------------------------------------------------------------------------------------------


def _reads(driver: Driver, measured: Measured) -> None:
    device = torch.device(driver.device)
    if device.type == "cuda":
        limit, size = read_limit(), 4 << 30
    else:
        size = 32 << 20
        data = torch.ones(size // 4)
        limit = size / (min(timed_ms(data.sum, 5, device)) / 1e3)
    measured.put("read_bytes_per_s", limit, "sums over one tensor, the best")
    measured.put("copy_bytes_per_s", _copy_rate(size, device), "one tensor copied, the best; bytes of the copy")
    if device.type != "cuda":
        for name, value in (("tlb_reach_bytes", 1 << 60), ("tlb_walk_ns", 1.0), ("tlb_walk_scattered_ns", 1.0)):
            measured.put(name, value, "not measured on the host", estimated=True)
        return
    torch.cuda.empty_cache()
    _tlb(driver, measured)


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return size / (min(timed_ms(lambda: target.copy_(source), 5, device)) / 1e3)


def _tlb(driver: Driver, measured: Measured) -> None:
    """Random reads over most of the memory: two working sets beyond the reach give reach and time of a miss; pages in
    order of creation give their own time with the same reach."""
    granularity = driver.granularity()
    free = torch.cuda.mem_get_info(torch.device(driver.device))[0] - SPARE
    whole = free // (128 * granularity) * (128 * granularity)
    points = (0.12, 0.8, 1.0)
    ns: dict[str, list[float]] = {}
    for order, size in (("scattered", granularity), ("in order", 128 * granularity)):
        places = np.arange(whole // size)
        if order == "scattered":
            places = np.random.default_rng(0).permutation(places)
        base, handles = driver.reserve(whole), [driver.create(size) for _ in places]
        try:
            for place, handle in zip(places.tolist(), handles, strict=True):
                driver.map(base + place * size, size, handle)
            driver.set_access(base, whole)
            rows = tensor_at(base, whole, driver.device).view(torch.int64).view(-1, ROW // 8)
            ns[order] = [_random_ns(rows[: int(part * len(rows))]) for part in points]
            del rows
        finally:
            driver.unmap(base, whole)
            for handle in handles:
                driver.release(handle)
            driver.free(base, whole)
    known = named("h200")
    small, one, two = ns["scattered"]
    s1, s2 = points[1] * whole, points[2] * whole
    if one < 1.1 * small or two <= one:
        for name in ("tlb_reach_bytes", "tlb_walk_ns", "tlb_walk_scattered_ns"):
            measured.put(name, known[name], "the H200's: this card showed no reach within its memory", estimated=True)
        return
    reach = (two - one) / (two / s1 - one / s2)
    source = f"random reads of {ROW} bytes over {s1 / 1e9:.0f} and {s2 / 1e9:.0f} GB"
    measured.put("tlb_reach_bytes", reach, source)
    measured.put("tlb_walk_scattered_ns", two / (1 - reach / s2), source)
    in_order, hits = ns["in order"][2], ns["in order"][0]
    bound = in_order > 1.1 * hits
    ordered = in_order / (1 - reach / s2) if bound else known["tlb_walk_ns"]
    measured.put("tlb_walk_ns", ordered, source if bound else "the H200's: no misses bound it here", not bound)


def _random_ns(rows: torch.Tensor, count: int = 1 << 23) -> float:
    """Nanoseconds a random row, of all SMs together."""
    index = torch.randint(0, len(rows), (count,), device=rows.device)
    target = torch.empty(count, rows.shape[1], dtype=rows.dtype, device=rows.device)
    took = timed_ms(lambda: torch.index_select(rows, 0, index, out=target), 5, rows.device)
    return 1e6 * min(took) / count


# -- attention and products --------------------------------------------------------------------------------------------


def _attention(device: str, shape: ModelShape, name: str, measured: Measured) -> None:
    on_gpu = device != "cpu"
    sequences, tokens = (64, 2048) if on_gpu else (4, 64)
    layers = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
    layers = [n for n in layers if n in (1, shape.num_layers) or n * shape.layer_token_bytes in ROW_BYTES]
    cache_shape = cache_shape_of(shape, dtype_of(device), sequences, tokens)
    us: dict[int, float] = {}
    for each in layers:
        with make_cache("vattn", cache_shape, device, layers_per_range=each, lookahead=0) as cache:
            attention = make_attention(name, cache, shape.num_heads)
            fill_random(attention, np.full(sequences, tokens))
            lengths = np.array(cache.lengths)
            us[each], nbytes = layer_us(attention, lengths)
            if each == layers[0]:
                one_us, one_bytes = layer_us(attention, lengths[:1])
        gc.collect()
    many_us = us[layers[0]]
    per_byte = max(0.0, many_us - one_us) / max(1, nbytes - one_bytes)
    # At most what leaves something for reading, where a difference is noise.
    launch = min(max(0.0, one_us - one_bytes * per_byte), 0.9 * min(us.values()))
    what = f"decode attention of {sequences} x {tokens} tokens"
    measured.put("attention_us", launch, f"{what}, and of 1 of them")
    measured.put("attention_bytes_per_s", 1e6 * nbytes / (many_us - launch), f"{what}, and of 1 of them")
    factors = [(n * shape.layer_token_bytes, (many_us - launch) / (us[n] - launch)) for n in layers]
    measured.put("attention_row_factor", factors, f"{what}, over that of {layers[0]} layers a row")


def layer_us(attention: Any, lengths: np.ndarray) -> tuple[float, int]:
    """Microseconds of decode attention a layer, and the bytes that it reads."""
    found: dict[str, Any] = attention_bandwidth(attention, lengths, 10)
    return found["layer_us"]["p50"], found["layer_bytes"]


@torch.inference_mode()
def _products(device: str, shape: ModelShape, measured: Measured) -> None:
    """Products with weights that no cache of the device holds, by rows; of many rows for so long that clocks fall."""
    on_gpu = device != "cpu"
    size, width = ((2 << 30), 4096) if on_gpu else (8 << 20, 256)
    dtype = dtype_of(device)
    matrices = size // (width * 4 * width * dtype.itemsize)
    weights = [torch.randn(4 * width, width, dtype=dtype, device=device) for _ in range(max(2, matrices))]
    nbytes = sum(each.numel() * each.itemsize for each in weights)
    points = []
    for rows in (1, 8, 32, 64, 128, 256, 512, 2048) if on_gpu else (1, 8, 32, 64):
        x = torch.randn(rows, width, dtype=dtype, device=device)

        def work(x: torch.Tensor = x) -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        repeats = 20 if rows < 512 else 100
        took = timed_ms(work, repeats if on_gpu else 3, torch.device(device))
        points.append((rows, nbytes / (median(took[len(took) // 2 :]) / 1e3)))
    measured.put("weights_bytes_per_s", points, f"products of x [rows, {width}] and [{width}, {4 * width}], captured")


# -- an engine ---------------------------------------------------------------------------------------------------------


def batches(device: str) -> list[int]:
    """Sequences of the steps that are measured."""
    return [1, 8, 32, 64, 128] if device != "cpu" else [1, 4]


def probe_engine(model: PreTrainedModel, args: argparse.Namespace, max_seq_len: int | None = None) -> Engine:
    """An engine over the fixed-address cache as it comes, for as many sequences as are measured."""
    on_gpu = args.device != "cpu"
    sizes = batches(args.device)
    longest = max_seq_len or (8192 + 512 if on_gpu else 512)
    # Not all are long.
    total = torch.cuda.get_device_properties(args.device).total_memory if on_gpu else 32 << 20
    budget = int(0.45 * total)
    return engine_for(model, args.device, sizes[-1], longest, budget, attention=args.attention, buckets=sizes)


def measure_engine(engine: Engine, shape: ModelShape, measured: Measured, seed: int) -> None:
    """What steps and passes take beside products and attention, and what the host does in a step."""
    on_gpu = engine.cache.device.type == "cuda"
    context = 512 if on_gpu else 24
    sizes = batches(str(engine.cache.device))
    host: dict[int, float] = {}
    short = _steps_at(engine, measured, context, seed, host)
    of_lane = max(0.0, host[sizes[-1]] - host[sizes[0]]) / (sizes[-1] - sizes[0])
    source = f"steps of {sizes[0]} and {sizes[-1]} sequences: all but waiting for tokens"
    measured.put("host_lane_us", of_lane, source)
    measured.put("host_us", host[sizes[0]] - of_lane * sizes[0], source)
    # Some of the budget is left for what they decode.
    most = int(0.8 * engine.cache.budget_bytes / (shape.token_bytes * sizes[-1]))
    longer = max(2 * context, min(5 * context, most))
    batch_factor(shape, measured, short, _steps_at(engine, measured, longer, seed, {}), (context, longer))
    layers = shape.num_layers
    points = [(float(n), _rest_us(measured, shape, n, us, kv) / layers) for n, (us, kv) in short.items()]
    measured.say("prompts")
    _prompts(engine, shape, measured, points, seed)


def _steps_at(
    engine: Engine, measured: Measured, context: int, seed: int, host: dict[int, float]
) -> dict[int, tuple[float, float]]:
    """Microseconds of a step, and the tokens of KV that it reads, by sequences, which begin with prompts of `context`
    tokens; what of it the host does not wait is put to `host`."""
    on_gpu = engine.cache.device.type == "cuda"
    steps, running = 24 if on_gpu else 6, 0
    found = {}
    for batch in batches(str(engine.cache.device)):
        measured.say(f"steps of {batch} sequences of {context} tokens and more")
        fill(engine, [context] * (batch - running), 4000 if on_gpu else 300, np.random.default_rng(seed + batch))
        running = batch
        records, kv = steps_and_tokens(engine, steps)
        host[batch] = 1e6 * median(record.wall_s - record.wait_s for record in records)
        found[batch] = 1e6 * median(record.wall_s for record in records), kv
    cancel_all(engine)
    return found


def batch_factor(
    shape: ModelShape,
    measured: Measured,
    short: dict[int, tuple[float, float]],
    long: dict[int, tuple[float, float]],
    contexts: tuple[int, int],
) -> None:
    """How fast steps of so many sequences read keys and values, by what longer ones of as many take more: products and
    all else are the same. Batches whose reading takes too little of a step to tell are left out."""
    rate, points = measured.values["attention_bytes_per_s"] * _row_factor(measured, shape), []
    for batch, (took, kv) in short.items():
        more_us = long[batch][0] - took
        if more_us > TELLING * took:
            points.append((float(batch), shape.token_bytes * (long[batch][1] - kv) / (1e-6 * more_us) / rate))
    source = "steps of sequences of {} tokens and more beside those of {}".format(*contexts)
    measured.put("attention_batch_factor", points or [(1.0, 1.0)], source, estimated=not points)


def _row_factor(measured: Measured, shape: ModelShape) -> float:
    """Of the rows that an engine's cache has."""
    layers = default_layers_per_range(shape.num_layers, shape.layer_token_bytes)
    return Curve(tuple(measured.values["attention_row_factor"]))(layers * shape.layer_token_bytes)


def _rest_us(measured: Measured, shape: ModelShape, rows: int, took_us: float, kv_tokens: float) -> float:
    """What of a step is neither weights nor attention, by the numbers measured so far."""
    values = measured.values
    inverse = Curve(tuple((x, 1 / y) for x, y in values["weights_bytes_per_s"]))
    weights = 1e6 * shape.weight_bytes * inverse.in_proportion(rows)
    rate = values["attention_bytes_per_s"] * _row_factor(measured, shape)
    rate *= Curve(tuple(values["attention_batch_factor"]))(max(1, rows))
    attention = values["attention_us"] + 1e6 * kv_tokens * shape.layer_token_bytes / rate if kv_tokens else 0.0
    return took_us - weights - shape.num_layers * attention


def _prompts(
    engine: Engine, shape: ModelShape, measured: Measured, points: list[tuple[float, float]], seed: int
) -> None:
    """Passes of prompts: of two sizes, and the last chunk of a long prompt, whose attention alone differs."""
    on_gpu = engine.cache.device.type == "cuda"
    short, long, count = (512, 8192, 12) if on_gpu else (64, 256, 2)
    chunk = min(engine.scheduler.chunk, long // 2)
    vocab = vocab_of(engine.model)
    random = np.random.default_rng(seed)

    def passes_us(tokens: int, repeats: int) -> list[float]:
        """Of each pass of prompts that go in one after another."""
        with observed(engine) as records:
            for _ in range(repeats):
                engine.submit(random.integers(0, vocab, tokens).tolist(), SamplingParams(max_tokens=1, ignore_eos=True))
                while engine.busy:
                    engine.step()
        return [1e6 * record.wall_s for record in records if record.prefilled]

    # The first may have to plan and allocate; clocks fall before the last.
    us = {rows: median(passes_us(rows, 2 + count)[2:]) for rows in (short, chunk)}
    a_prompt = -(-long // engine.scheduler.chunk)
    # The last pass of each long prompt, whose queries meet the most keys.
    last_us, last = median(passes_us(long, 4)[a_prompt - 1 :: a_prompt]), long - (a_prompt - 1) * engine.scheduler.chunk
    layers, more = shape.num_layers, last * (long - last / 2) - chunk * chunk / 2
    measurable = last == chunk and last_us > us[chunk]
    flops = 1e6 * layers * shape.pair_flops * more / (last_us - us[chunk]) if measurable else UNKNOWN_FLOPS
    source = f"passes of {chunk} rows at the beginning and at the end of prompts of {long} tokens"
    measured.put("prompt_attention_flops_per_s", flops, source, estimated=not measurable)
    measured.put("prompt_attention_us", 1.0, "within layer_us of passes with prompts", estimated=True)
    for rows in (short, chunk):
        attention = layers * (1.0 + 1e6 * shape.pair_flops * rows * rows / 2 / flops)
        if rows > points[-1][0]:
            points.append((rows, _rest_us(measured, shape, rows, us[rows] - attention, 0.0) / layers))
    measured.put("layer_us", points, "steps, and passes of prompts, less products and attention, by layers")
