"""`bench attention`: one library's attention over flat KV and over block tables.

Decode and chunked prefill, sequences of equal and of very unequal length, slots of 128K tokens whose strides pass 2³³
bytes; torch's own kernels on a cache's tensors against the same kernels on a tensor that torch allocated; and the whole
captured step of an uneven batch.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trtllm_vattn.arguments import HEADS, adder, heads
from trtllm_vattn.attention.base import Attention, PrefillChunk
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.cases import attention_features, decode_attention, prompt_attention
from trtllm_vattn.bench.harness import flags
from trtllm_vattn.bench.harness.case import Part, Recording, engine_for
from trtllm_vattn.bench.harness.contenders import Contender, Contest, fill, take_turns
from trtllm_vattn.bench.harness.timing import Kernels, attention_bandwidth, fill_random, refusal, summarise, timed_ms
from trtllm_vattn.bench.publish.plots import plot_attention
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.progress import counting
from trtllm_vattn.table import tabulate

LAYERS = 8
"""One range of the default layout for Llama-3-8B's heads."""
STEP_ROUNDS, PICKED = 4, "auto"
COLUMNS = "point system layer_us.p50 bytes_per_s.p50 prefill_us.p50 refused"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench attention`."""
    add = adder(parser, gpu := flags.add_device(parser))
    flags.add_attention(parser)
    add("--blocks", "TOKENS,...", "tokens of a block of block tables", "1,16,64,128")
    add("--heads", "Q,KV,SIZE", HEADS, "32,8,128", "4,2,16", type=heads)
    text = "sequences x tokens of each, several with commas"
    usual = "1x32768,8x8192,32x8192,128x2048,3x131072" if gpu else "1x256,4x64"
    parser.add_argument("--points", type=flags.points, default=usual, metavar="SEQUENCESxTOKENS,...", help=text)
    add("--uneven", "SEQUENCES", "sequences of an uneven batch: nine of ten short, one of ten long", 64, 8)
    parser.set_defaults(long=8000 if gpu else 200)
    add("--chunk", "TOKENS", "prompt tokens that go in at once", 2048, 32)
    add("--repeats", "TIMES", "times that each kernel is timed", 20)
    add("--picks", "TIMES", "times that the choice between kernels is judged, by a random batch each, on a GPU", 200)
    flags.add_model(parser, default="llama-3.1-8b" if gpu else "tiny-llama")
    flags.add_parts(parser, PARTS)
    flags.add_results(parser, plots=True)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    torch.manual_seed(args.seed)
    shown: list[str] = []
    recording = Recording("attention", args)

    def measured(name: str, part: AttentionPart) -> Part:
        def measure(recording: Recording) -> None:
            found = part.measure(recording)
            recording.found(name, found, **part.summary(found))
            shown.append(part.show(found))

        return measure

    recording.measure({name: measured(name, part) for name, part in PARTS.items()}, args.parts)
    plot = plot_attention if "points" in recording.results else None
    return recording.conclude("\n".join(shown), plot)


def _points(args: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """Each point's name and lengths; the uneven batch is the last."""
    long = np.arange(args.uneven) % 10 == 9
    uneven = np.where(long, args.long, 200 if args.long > 1000 else 5)
    return [*((f"{n} x {tokens}", np.full(n, tokens)) for n, tokens in args.points), (f"{args.uneven} uneven", uneven)]


def _all_points(recording: Recording) -> list[dict[str, Any]]:
    args = recording.args
    systems = ("flat", *(f"blocks of {size}" for size in args.blocks))
    points = counting(_points(args), "points", "point")
    return [
        {"point": name, "system": system, **_point(args, system, lengths)}
        for name, lengths in points
        for system in systems
    ]


def _shape(args: argparse.Namespace, lengths: np.ndarray) -> CacheShape:
    _, kv_heads, head_dim = args.heads
    longest = int(lengths.max())
    return CacheShape(LAYERS, kv_heads, head_dim, flags.dtype_of(args.device), len(lengths), longest)


def _point(args: argparse.Namespace, system: str, lengths: np.ndarray) -> dict[str, Any]:
    """Decode over all sequences, and one chunk of the longest's prefill; or the reason why it cannot be measured."""
    shape = _shape(args, lengths)
    try:
        with _make(system, shape, args.device, lengths) as cache:
            attention = make_attention(args.attention, cache, args.heads[0])
            fill_random(attention, lengths)
            measured = attention_bandwidth(attention, cache.lengths, args.repeats)
            stride = cache.layer(0).k.stride(0) * shape.dtype.itemsize
            return {
                **measured,
                "prefill_us": summarise(_prefill_us(attention, args)),
                "largest_offset_bytes": stride * cache.layer(0).k.shape[0],
            }
    except (RuntimeError, VattnError) as error:
        return {"refused": refusal(error)}
    finally:
        gc.collect()


def _make(system: str, shape: CacheShape, device: str, lengths: np.ndarray) -> KVCache:
    if system == "flat":
        return make_cache("vattn", shape, device, budget=None, lookahead=0)
    block = int(system.rsplit(" ", 1)[1])
    blocks = int((-(-lengths // block)).sum())
    cache = PagedCache(shape, device, block, blocks)
    # As a pool looks after hours of service: no two blocks of a sequence are neighbours.
    cache.shuffle_free_memory(0)
    return cache


@torch.inference_mode()
def _prefill_us(attention: Attention, args: argparse.Namespace) -> list[float]:
    """Microseconds a layer of the last chunk of the first longest sequence's prompt."""
    cache = attention.cache
    shape, device = cache.shape, cache.device
    slot = int(cache.lengths.argmax())
    length = int(cache.lengths[slot])
    chunk = min(args.chunk, length)
    q = torch.randn(chunk, args.heads[0], shape.head_dim, dtype=shape.dtype, device=device)
    one = torch.full((1,), slot, dtype=torch.int64, device=device)
    query_len, whole = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (chunk, length))
    last = PrefillChunk(chunk, one, query_len, whole, length)

    def work() -> None:
        attention.begin_step()
        for layer in range(shape.num_layers):
            attention.prefill(layer, q, last)

    return [1e3 * ms / shape.num_layers for ms in timed_ms(work, max(3, args.repeats // 4), device)]


@torch.inference_mode()
def _same_kernels(args: argparse.Namespace, point: str, lengths: np.ndarray) -> list[dict[str, Any]]:
    """torch's own kernels over a cache's slots and over a tensor that torch allocated with that shape and strides, in
    turns."""
    shape = _shape(args, lengths)
    device = torch.device(args.device)
    rows = []
    try:
        with make_cache("vattn", shape, args.device, lookahead=0) as cache:
            for sequence, length in enumerate(lengths.tolist()):
                cache.admit(sequence, length)
            ours = cache.layer(0)
            assert isinstance(ours, FlatKV)
            kv = []
            for view in (ours.k, ours.v):
                view[:-1].normal_()
                theirs = torch.empty_strided(view[:-1].shape, view.stride(), dtype=shape.dtype, device=device)
                theirs.copy_(view[:-1])
                kv.append((view[:-1], theirs))
            q = torch.randn(len(lengths), args.heads[0], 1, shape.head_dim, dtype=shape.dtype, device=device)
            backends = {"flash-attention 2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
            for name, backend in backends.items() if device.type == "cuda" else [("math", SDPBackend.MATH)]:
                times: list[list[float]] = [[], []]
                for _ in range(4):
                    for which in (0, 1):
                        k, v = (pair[which].transpose(1, 2) for pair in kv)
                        with sdpa_kernel(backend):
                            times[which] += timed_ms(
                                lambda k=k, v=v: torch.nn.functional.scaled_dot_product_attention(  # type: ignore[misc]
                                    q, k, v, enable_gqa=True
                                ),
                                args.repeats,
                                device,
                            )
                ratio = median(times[0]) / median(times[1])
                rows.append({"point": point, "kernel": name, "ours_ms": summarise(times[0]), "ratio": ratio})
    except (RuntimeError, VattnError) as error:
        rows.append({"point": point, "kernel": "torch", "refused": refusal(error)})
    return rows


def _over_blocks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    times = {(row["point"], row["system"]): row["layer_us"]["p50"] for row in rows if "layer_us" in row}
    out: dict[str, Any] = {}
    for system in dict.fromkeys(row["system"] for row in rows if row["system"] != "flat"):
        ratios = [times[p, "flat"] / us for (p, s), us in times.items() if s == system and (p, "flat") in times]
        if ratios:
            out[f"flat_over_{system.replace(' ', '_')}"] = [min(ratios), max(ratios)]
    return out


def _over_torch(same: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["ratio"] for row in same if "ratio" in row]
    return {"same_kernel_ours_over_torch": [min(ratios), max(ratios)]} if ratios else {}


@dataclass(frozen=True)
class AttentionPart:
    """One of the benchmark's parts: how it is measured, which figures of it are quoted, and its table's columns."""

    measure: Callable[[Recording], Any]
    summary: Callable[[Any], dict[str, Any]]
    columns: str

    def show(self, found: Any) -> str:
        """Its rows as a table, and what is missing or was refused."""
        result: dict[str, Any] = {"points": found} if isinstance(found, list) else found
        left_out = {**result.get("missing", {}), **result.get("refused", {})}
        return "\n".join([tabulate(result["points"], self.columns), *(f"{k}: {why}" for k, why in left_out.items())])


def _kernels(recording: Recording) -> Kernels:
    args = recording.args
    return Kernels(args.device, args.heads, flags.dtype_of(args.device), args.repeats)


def _decode(recording: Recording) -> dict[str, Any]:
    return decode_attention.decode_points(_kernels(recording), recording.args.picks, recording.args.seed)


def _of_kernels(points: Callable[[Kernels], dict[str, Any]]) -> Callable[[Recording], dict[str, Any]]:
    return lambda recording: points(_kernels(recording))


def _step(recording: Recording) -> list[dict[str, Any]]:
    """A row of each attention: captured steps of the uneven batch, by the kernels that an engine picks, and by one
    library's alone."""
    args, model = recording.args, recording.model
    lengths, steps = _points(args)[-1][1].tolist(), args.repeats
    others = "cudnn" if args.device != "cpu" else "torch"
    random = np.random.default_rng(args.seed)
    # The first ones decode while the last prompts go in, one pass after another.
    tokens = -(-sum(lengths) // 1024) + STEP_ROUNDS * (steps + 8) + len(lengths)
    with Contest(len(lengths), max(lengths), tokens, args.seed) as contest:
        for name in (others, PICKED):
            sizes = (len(lengths), max(lengths) + tokens)
            engine = engine_for(model, args.device, *sizes, attention=name, buckets=[len(lengths)])
            contest.callback(engine.close)
            fill(engine, lengths, tokens, random)
            contest.contenders.append(Contender(name, "captured", engine))
        take_turns(contest.contenders, STEP_ROUNDS, steps, "uneven steps")
        return [
            {
                "attention": each.name,
                "sequences": len(lengths),
                "tokens": each.tokens[-1] * len(lengths),
                "runs_by": each.engine.attention.describe(),
                **each.times(),
            }
            for each in contest.contenders
        ]


def _step_summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The step by what is picked, by the other alone, and the one over the other."""
    ms = {row["attention"]: row["step_ms"]["p50"] for row in rows}
    (other,) = (name for name in ms if name != PICKED)
    name = f"uneven_{rows[0]['sequences']}_step"
    return {f"{name}_ms": ms[PICKED], f"{name}_ms_{other}": ms[other], f"{name}_over_{other}": ms[PICKED] / ms[other]}


def _same(recording: Recording) -> list[dict[str, Any]]:
    args = recording.args
    return [row for name, lengths in _points(args)[:-1] for row in _same_kernels(args, name, lengths)]


PARTS = {
    "decode": AttentionPart(_decode, decode_attention.summary, decode_attention.COLUMNS),
    "prompts": AttentionPart(
        _of_kernels(prompt_attention.prompt_points), prompt_attention.summary, prompt_attention.COLUMNS
    ),
    "step": AttentionPart(_step, _step_summary, "attention sequences tokens step_ms.p50 step_ms.p99"),
    "features": AttentionPart(
        _of_kernels(attention_features.feature_points), attention_features.summary, attention_features.COLUMNS
    ),
    "same_kernels": AttentionPart(_same, _over_torch, "point kernel ratio refused"),
    "points": AttentionPart(_all_points, _over_blocks, COLUMNS),
}
