"""Bandwidth: what the card can read, and what attention over a cache reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.bench.machine import summarise
from trtllm_vattn.graphs.capture import collector_off


def timed_ms(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `repeats` repetitions: of replays of the captured work by CUDA events, or on the host."""
    if device.type == "cuda":
        return _captured_ms(work, repeats)
    work()
    took = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        took.append(1e3 * (perf_counter() - started))
    return took


def _captured_ms(work: Callable[[], object], repeats: int) -> list[float]:
    return replays_ms(captured(work), repeats)


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `work`, which is called once before."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with collector_off(), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        work()
    return graph


def replays_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` replays, after one that is not timed."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


@torch.inference_mode()
def read_limit(size: int = 4 << 30, repeats: int = 30) -> float:
    """Bytes a second that the current card reads: the best of plain reductions over `size` bytes of memory."""
    data = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
    return max(size / (min(_captured_ms(work, repeats)) / 1e3) for work in (data.sum, data.amax))


@torch.inference_mode()
def attention_bandwidth(attention: Attention, lengths: np.ndarray, repeats: int = 20) -> dict[str, object]:
    """Decode attention alone, every layer once in one graph; lengths int ``[lanes]``.

    Returns bytes of K and V a layer, microseconds a layer, and bytes a second.
    """
    shape, device = attention.cache.shape, attention.cache.device
    on_device = torch.from_numpy(lengths).to(device, torch.int32)
    q = torch.randn(len(lengths), attention.num_heads, shape.head_dim, dtype=shape.dtype, device=device)

    def work() -> None:
        attention.begin_step()
        for layer in range(shape.num_layers):
            attention.decode(layer, q, on_device)

    milliseconds = timed_ms(work, repeats, device)
    layer_bytes = int(lengths.sum()) * shape.layer_token_bytes
    return {
        "layer_bytes": layer_bytes,
        "layer_us": summarise([1e3 * ms / shape.num_layers for ms in milliseconds]),
        "bytes_per_s": summarise([layer_bytes * shape.num_layers / (ms / 1e3) for ms in milliseconds]),
    }


@torch.inference_mode()
def fill_random(attention: Attention, context: int, sequences: int | None = None) -> np.ndarray:
    """Give every slot of an empty cache, or the first `sequences`, one of `context` random tokens; returns the lengths
    of those slots, int64 ``[sequences]``."""
    cache = attention.cache
    shape, device = cache.shape, cache.device
    positions = torch.arange(context, device=device)
    sequences = shape.num_slots if sequences is None else sequences
    for sequence in range(sequences):
        slot = torch.full_like(positions, cache.admit(sequence, context))
        for layer in range(shape.num_layers):
            k, v = torch.randn(2, context, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
            attention.write(layer, k, v, slot, positions)
    return np.array(cache.lengths[:sequences])
