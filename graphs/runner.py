"""`GraphRunner`: a step captured once per batch bucket over static buffers, and replayed.

All buckets share one memory pool and are captured largest first, so that the smaller ones fit into what the largest
left (as vLLM and TensorRT-LLM do). Graphs of one pool must not run at the same time: replays are one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.errors import CaptureError, ConfigError
from trtllm_vattn.graphs.host_graph import HostGraph

logger = logging.getLogger(__name__)

Outputs = tuple[torch.Tensor, ...]


def default_buckets(most: int) -> list[int]:
    """Batch sizes worth a graph up to `most`: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond."""
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 64)]
    return [*(size for size in usual if size < most), most]


@dataclass(frozen=True)
class CaptureReport:
    """What capturing cost: seconds a bucket, and bytes of device memory that the graphs' pool took."""

    seconds: dict[int, float]
    pool_bytes: int


class GraphRunner:
    """Captures and replays ``step(bucket)``.

    Parameters
    ----------
    step : callable
        Reads static buffers sliced to the bucket and returns its output tensors; it must always do the same.
    buckets : sequence of int
        Batch sizes, any order.
    static : iterable of Tensor
        Every tensor a step may read or write that it does not make itself.
    """

    def __init__(
        self,
        step: Callable[[int], Outputs],
        buckets: Sequence[int],
        static: Iterable[torch.Tensor],
        device: torch.device,
    ) -> None:
        if not buckets or min(buckets) < 1 or len(set(buckets)) < len(buckets):
            raise ConfigError(f"buckets are {list(buckets)}; give different positive batch sizes, at least one")
        self.buckets = sorted(buckets)
        self._step, self._device = step, device
        self._static = list(static)
        self._graphs: dict[int, tuple[Any, Outputs]] = {}
        self._closed = False

    def capture(self) -> CaptureReport:
        """Capture all buckets, largest first. Raises CaptureError where a step cannot be held by a graph."""
        if self._closed:
            raise CaptureError("this runner is closed; build another")
        on_gpu = self._device.type == "cuda"
        capture = self._cuda_capture() if on_gpu else self._host_capture
        if on_gpu:
            # Each capture empties torch's cache; what that gives back is not the pool's.
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device) if on_gpu else 0
        seconds = {}
        for bucket in reversed(self.buckets):
            started = perf_counter()
            self._graphs[bucket] = capture(bucket)
            seconds[bucket] = perf_counter() - started
        after = torch.cuda.memory_reserved(self._device) if on_gpu else 0
        report = CaptureReport(seconds, after - before)
        logger.info("captured %d graphs in %.2f s, %d bytes", len(seconds), sum(seconds.values()), report.pool_bytes)
        return report

    def _host_capture(self, bucket: int) -> tuple[HostGraph, Outputs]:
        outputs: list[Outputs] = []
        graph = HostGraph.capture(lambda: outputs.append(self._step(bucket)), self._static)
        return graph, outputs[0]

    def _cuda_capture(self) -> Callable[[int], tuple[torch.cuda.CUDAGraph, Outputs]]:
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

        def capture(bucket: int) -> tuple[torch.cuda.CUDAGraph, Outputs]:
            # Libraries plan, allocate workspaces and load kernels at their first call, which no graph can hold.
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(bucket)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may make driver calls meanwhile: only this one is held to what capture allows.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = self._step(bucket)
            except RuntimeError as error:
                raise CaptureError(
                    f"the step for {bucket} lanes cannot be captured: {error}; it may not read the device from the "
                    "host, allocate outside torch, or change streams"
                ) from error
            return graph, outputs

        return capture

    def bucket_for(self, lanes: int) -> int:
        """The smallest bucket that holds so many lanes."""
        for bucket in self.buckets:
            if bucket >= lanes:
                return bucket
        raise ConfigError(f"{lanes} lanes, but the largest bucket is {self.buckets[-1]}; add a larger one")

    def replay(self, bucket: int) -> Outputs:
        """Launch a bucket's graph on the current stream; returns its static outputs, valid until the next replay."""
        if bucket not in self._graphs:
            state = "closed" if self._closed else f"captured for {sorted(self._graphs)}"
            raise CaptureError(f"no graph for {bucket} lanes: the runner is {state}")
        graph, outputs = self._graphs[bucket]
        graph.replay()
        return outputs

    def close(self) -> None:
        """Drop all graphs and their memory. Idempotent."""
        self._closed = True
        self._graphs.clear()
        self._static.clear()
