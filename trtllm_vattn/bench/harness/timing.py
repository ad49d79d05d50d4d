"""Times of calls on a device, its clock rate meanwhile, and bytes a second that attention over a cache reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.options import FP8
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.graphs.capture import captured, replays_ms

P = ParamSpec("P")
T = TypeVar("T")

SPIN_CYCLES = 100_000
"""About 0.05 ms: long beside an event, short beside a step."""


class Timer:
    """Times calls, each without what was submitted before: on a GPU from event to event, on the host by its clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._milliseconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same, timed."""

        def by_clock(*arguments: P.args, **options: P.kwargs) -> T:
            started = perf_counter()
            done = call(*arguments, **options)
            self._milliseconds.append(1e3 * (perf_counter() - started))
            return done

        def by_events(*arguments: P.args, **options: P.kwargs) -> T:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            done = call(*arguments, **options)
            end.record()
            self._events.append((start, end))
            return done

        return by_clock if self.device.type == "cpu" else by_events

    def take(self) -> list[float]:
        """Milliseconds of the calls since the last time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = self._milliseconds + [start.elapsed_time(end) for start, end in self._events]
        self._milliseconds, self._events = [], []
        return taken


class Clock:
    """How fast a GPU's multiprocessors run right before calls, which is slower at its limit of power; nothing on the
    host."""

    def __init__(self, device: torch.device) -> None:
        self._spins = Timer(device)

    def before(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same, behind a kernel that spins for a number of cycles."""
        if self._spins.device.type == "cpu":
            return call
        spin = self._spins.timed(lambda: torch.cuda._sleep(SPIN_CYCLES))  # type: ignore[no-untyped-call]

        def behind(*arguments: P.args, **options: P.kwargs) -> T:
            spin()
            return call(*arguments, **options)

        return behind

    def take(self) -> list[float]:
        """Megahertz at the calls since the last time."""
        return [SPIN_CYCLES / (1e3 * ms) for ms in self._spins.take()]


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """Count, mean, standard deviation, extremes and percentiles; all but the count are missing without samples."""
    if not len(samples):
        return {"count": 0}
    values = np.asarray(samples, np.float64)
    p50, p90, p99, p999 = np.percentile(values, [50, 90, 99, 99.9])
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "p99.9": float(p999),
        "max": float(values.max()),
    }


def timed_ms(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `repeats` repetitions: of replays of the captured work by CUDA events, or on the host."""
    if device.type == "cuda":
        return replays_ms(captured(work), repeats)
    work()
    took = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        took.append(1e3 * (perf_counter() - started))
    return took


@torch.inference_mode()
def read_limit(size: int = 4 << 30, repeats: int = 30) -> float:
    """Bytes a second that the current card reads: the best of plain reductions over `size` bytes of memory."""
    data = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
    return max(size / (min(replays_ms(captured(work), repeats)) / 1e3) for work in (data.sum, data.amax))


@dataclass(frozen=True)
class Kernels:
    """Of what shape kernels are timed, on which device, how often: query heads, KV heads and their size."""

    device: str
    heads: list[int]
    dtype: torch.dtype
    repeats: int

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def shape(self, layers: int, lanes: int, longest: int, dtype: torch.dtype | None = None) -> CacheShape:
        """Of a cache of so many sequences."""
        return CacheShape(layers, self.heads[1], self.heads[2], dtype or self.dtype, lanes, longest)


def layers_us(work: Callable[[int], object], layers: int, repeats: int, device: torch.device) -> list[float]:
    """Microseconds a layer of repetitions of what is done for every layer in turn, captured as one on a GPU."""

    def all_layers() -> None:
        for layer in range(layers):
            work(layer)

    return [1e3 * ms / layers for ms in timed_ms(all_layers, repeats, device)]


@torch.inference_mode()
def attention_bandwidth(attention: Attention, lengths: np.ndarray, repeats: int = 20) -> dict[str, object]:
    """Decode attention alone, every layer once in one graph; lengths int ``[lanes]``.

    Returns bytes of K and V a layer, microseconds a layer, and bytes a second.
    """
    shape, device = attention.cache.shape, attention.cache.device
    on_device = torch.from_numpy(lengths).to(device, torch.int32)
    q = torch.randn(len(lengths), attention.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
    took = layers_us(lambda layer: attention.decode(layer, q, on_device), shape.num_layers, repeats, device)
    layer_bytes = int(lengths.sum()) * shape.layer_token_bytes
    rates = [layer_bytes / (1e-6 * us) for us in took]
    return {"layer_bytes": layer_bytes, "layer_us": summarise(took), "bytes_per_s": summarise(rates)}


@torch.inference_mode()
def fill_random(attention: Attention, lengths: np.ndarray) -> None:
    """Give an empty cache a sequence of random tokens of each of these lengths, numbered from 0."""
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
def fill_flat(cache: KVCache, lengths: np.ndarray) -> None:
    """As `fill_random`, of a cache of flat tensors, without a backend; each layer has other tokens."""
    for sequence, length in enumerate(lengths.tolist()):
        slot = cache.admit(sequence, length)
        for layer in range(cache.shape.num_layers):
            for kv in cache.head_groups(layer):
                assert isinstance(kv, FlatKV)
                for rows in (kv.k[slot, :length], kv.v[slot, :length]):
                    # A lane whose logits are no numbers would become idle.
                    if rows.dtype == FP8:
                        rows.view(torch.uint8).random_(0, 0x40)
                    else:
                        rows.normal_()


def refusal(error: Exception) -> str:
    """Why something could not be measured, in a line."""
    return str(error).strip().splitlines()[0][:200]
