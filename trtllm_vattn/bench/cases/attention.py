"""`bench attention`: one library's attention over flat KV and over block tables.

Decode and chunked prefill, sequences of equal and of very unequal length, slots of 128K tokens whose strides pass 2³³
bytes; torch's own kernels on a cache's tensors against the same kernels on a tensor that torch allocated; and the whole
captured step of an uneven batch.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from trtllm_vattn.arguments import HEADS, heads, numbers, positive
from trtllm_vattn.attention.base import Attention, PrefillChunk
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.cases import attention_features, decode_attention, prompt_attention, uneven_step
from trtllm_vattn.bench.harness.bandwidth import attention_bandwidth
from trtllm_vattn.bench.harness.flags import (
    add_attention,
    add_device,
    add_model,
    add_parts,
    add_results,
    dtype_of,
    points,
)
from trtllm_vattn.bench.harness.recording import Part, Recording
from trtllm_vattn.bench.harness.timing import summarise, timed_ms
from trtllm_vattn.bench.publish.plots import plot_attention
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.cache.paged import PagedCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.table import table

LAYERS = 8
"""One range of the default layout for Llama-3-8B's heads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench attention`."""
    gpu, add = add_device(parser), parser.add_argument
    add_attention(parser)
    add("--blocks", type=numbers, default="1,16,64,128", metavar="TOKENS,...", help="tokens of a block of block tables")
    add("--heads", type=heads, default="32,8,128" if gpu else "4,2,16", metavar="Q,KV,SIZE", help=HEADS)
    text = "sequences x tokens of each, several with commas"
    usual = "1x32768,8x8192,32x8192,128x2048,3x131072" if gpu else "1x256,4x64"
    add("--points", type=points, default=usual, metavar="SEQUENCESxTOKENS,...", help=text)
    text = "sequences of an uneven batch: nine of ten short, one of ten long"
    add("--uneven", type=positive, default=64 if gpu else 8, metavar="SEQUENCES", help=text)
    text = "tokens of its long ones; the short ones have 200, or 5 beside long ones of no more than 1,000"
    add("--long", type=positive, default=8000 if gpu else 200, metavar="TOKENS", help=text)
    add(
        "--chunk", type=positive, default=2048 if gpu else 32, metavar="TOKENS", help="prompt tokens that go in at once"
    )
    add("--repeats", type=positive, default=20, metavar="TIMES", help="times that each kernel is timed")
    text = "times that the choice between kernels is judged, by a random batch each, on a GPU"
    add("--picks", type=positive, default=200, metavar="TIMES", help=text)
    add_model(parser, default="llama-3.1-8b" if gpu else "tiny-llama")
    add_parts(parser, PARTS)
    add_results(parser, plots=True)


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
    return recording.conclude("\n".join(filter(None, shown)), plot)


def _points(args: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """Each point's name and lengths; the uneven batch is the last."""
    long = np.arange(args.uneven) % 10 == 9
    uneven = np.where(long, args.long, 200 if args.long > 1000 else 5)
    return [*((f"{n} x {tokens}", np.full(n, tokens)) for n, tokens in args.points), (f"{args.uneven} uneven", uneven)]


def _all_points(recording: Recording) -> list[dict[str, Any]]:
    args = recording.args
    systems = ("flat", *(f"blocks of {size}" for size in args.blocks))
    points = tqdm(_points(args), desc="points", disable=None)
    return [
        {"point": name, "system": system, **_point(args, system, lengths)}
        for name, lengths in points
        for system in systems
    ]


def _shape(args: argparse.Namespace, lengths: np.ndarray) -> CacheShape:
    _, kv_heads, head_dim = args.heads
    longest = int(lengths.max())
    return CacheShape(LAYERS, kv_heads, head_dim, dtype_of(args.device), len(lengths), longest)


def _point(args: argparse.Namespace, system: str, lengths: np.ndarray) -> dict[str, Any]:
    """Decode over all sequences, and one chunk of the longest's prefill; or the reason why it cannot be measured."""
    shape = _shape(args, lengths)
    try:
        with _make(system, shape, args.device, lengths) as cache:
            attention = make_attention(args.attention, cache, args.heads[0])
            fill(attention, lengths)
            measured = attention_bandwidth(attention, cache.lengths, args.repeats)
            stride = cache.layer(0).k.stride(0) * shape.dtype.itemsize
            return {
                **measured,
                "prefill_us": summarise(_prefill_us(attention, args)),
                "largest_offset_bytes": stride * cache.layer(0).k.shape[0],
            }
    except (RuntimeError, VattnError) as error:
        return {"refused": str(error).strip().splitlines()[0][:200]}
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
def fill(attention: Attention, lengths: np.ndarray) -> None:
    """Give every slot of an empty cache a sequence of random tokens."""
    cache = attention.cache
    shape, device = cache.shape, cache.device
    for sequence, length in enumerate(lengths.tolist()):
        slot = cache.admit(sequence, length)
        for start in range(0, length, 8192):
            positions = torch.arange(start, min(start + 8192, length), device=device)
            kv = torch.randn(2, len(positions), shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
            for layer in range(shape.num_layers):
                attention.write(layer, kv[0], kv[1], torch.full_like(positions, slot), positions)


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
        rows.append({"point": point, "kernel": "torch", "refused": str(error).strip().splitlines()[0][:200]})
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


def _show(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "refused" in row:
            lines.append([row["point"], row["system"], "-", "-", "-", row["refused"][:60]])
            continue
        layer = row["layer_us"]
        rate = row["bytes_per_s"]["p50"] / 1e9
        prefill = f"{row['prefill_us']['p50']:.1f}"
        lines.append([row["point"], row["system"], f"{layer['p50']:.1f}", f"{rate:,.0f}", prefill, ""])
    return table(["sequences x tokens", "system", "decode us", "GB/s", "prefill chunk us", "refused"], lines)


@dataclass(frozen=True)
class AttentionPart:
    """One of the benchmark's parts: how it is measured, which figures of it are quoted, and its table."""

    measure: Callable[[Recording], Any]
    summary: Callable[[Any], dict[str, Any]]
    show: Callable[[Any], str]


def _decode(recording: Recording) -> dict[str, Any]:
    args = recording.args
    dtype = dtype_of(args.device)
    return decode_attention.decode_points(args.device, args.heads, dtype, args.repeats, args.picks, args.seed)


def _prompts(recording: Recording) -> dict[str, Any]:
    args = recording.args
    return prompt_attention.prompt_points(args.device, args.heads, dtype_of(args.device), args.repeats)


def _step(recording: Recording) -> list[dict[str, Any]]:
    _, uneven = _points(recording.args)[-1]
    return uneven_step.step_points(recording, uneven.tolist(), recording.args.repeats)


def _features(recording: Recording) -> dict[str, Any]:
    args = recording.args
    return attention_features.feature_points(args.device, args.heads, dtype_of(args.device), args.repeats)


def _same(recording: Recording) -> list[dict[str, Any]]:
    args = recording.args
    return [row for name, lengths in _points(args)[:-1] for row in _same_kernels(args, name, lengths)]


PARTS = {
    "decode": AttentionPart(_decode, decode_attention.summary, decode_attention.show),
    "prompts": AttentionPart(_prompts, prompt_attention.summary, prompt_attention.show),
    "step": AttentionPart(_step, uneven_step.summary, uneven_step.show),
    "features": AttentionPart(_features, attention_features.summary, attention_features.show),
    "same_kernels": AttentionPart(_same, _over_torch, lambda rows: ""),
    "points": AttentionPart(_all_points, _over_blocks, _show),
}
