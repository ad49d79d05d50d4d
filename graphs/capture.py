"""Capture of a step into a graph: a CUDA graph, or on the host a `HostGraph`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch

from trtllm_vattn.errors import CaptureError
from trtllm_vattn.graphs.host_graph import HostGraph

Outputs = tuple[torch.Tensor, ...]
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch goes on asking them about its pinned host memory, so they are never freed."""


@contextmanager
def collector_off() -> Iterator[None]:
    """Disable garbage collection: a collection that frees an older graph during a capture would end the capture."""
    was_on = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work` alone, to time it; `work` is called once before, behind what the current stream still has
    to do."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
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


class GraphCapture:
    """Captures steps whose graphs share one memory pool.

    Parameters
    ----------
    static : sequence of Tensor
        Every tensor that a step may read or write and does not make itself; only the host checks this.
    pool : object or None
        The pool of another `GraphCapture`, if graphs of the two never run at the same time.

    Attributes
    ----------
    pools : list
        Handles of the pools that graphs were captured into; the last one serves the next capture. Empty on the host.
    """

    def __init__(self, device: torch.device, static: Sequence[torch.Tensor], pool: Any = None) -> None:
        self._device, self._static = device, static
        self.pools: list[Any] = []
        if device.type == "cuda":
            self.pools.append(pool or torch.cuda.graph_pool_handle())
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, step: Callable[[], Outputs], lanes: int) -> tuple[Any, Outputs]:
        """Run `step` once to warm up (on a GPU) and once to capture it; returns the graph and the step's outputs.

        Raises CaptureError, naming the `lanes`, if a graph cannot hold what the step does.
        """
        if self._device.type == "cuda":
            return self._capture_cuda(step, lanes)
        outputs: list[Outputs] = []
        graph = HostGraph.capture(lambda: outputs.append(step()), self._static)
        return graph, outputs[0]

    def _capture_cuda(self, step: Callable[[], Outputs], lanes: int) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        around = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            return graph, self._capture_into(graph, step, lanes)
        except BaseException:
            # An interrupt may come after a capture has begun and before torch notes it; the same holds for a stream.
            with torch.cuda.stream(self._stream):
                if torch.cuda.is_current_stream_capturing():
                    with suppress(RuntimeError):
                        graph.capture_end()
                    self._leave_pool(graph)
            torch.cuda.set_stream(around)
            raise

    def _capture_into(self, graph: torch.cuda.CUDAGraph, step: Callable[[], Outputs], lanes: int) -> Outputs:
        stream = self._stream
        # Libraries plan, allocate workspaces and load kernels at their first call, which a graph cannot hold.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize(self._device)
        # torch may drop the cuBLAS workspaces of the warm-up; those made during the capture belong to the pool.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # "thread_local": other threads may call the driver meanwhile. The outer stream context restores the
            # current stream after a failed capture, which torch does not.
            with (
                collector_off(),
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=self.pools[-1], stream=stream, capture_error_mode="thread_local"),
            ):
                outputs = step()
            graph.instantiate()
        except RuntimeError as error:
            self._leave_pool(graph)
            reason = str(error).partition("\n")[0]  # without CUDA's advice on debugging
            raise CaptureError(
                f"the step for {lanes} lanes cannot be captured: {reason}; it may not read the device from the "
                "host, allocate outside torch, or change streams"
            ) from error
        return outputs

    def _leave_pool(self, failed: torch.cuda.CUDAGraph) -> None:
        """Use another pool from now on: torch counts a failed capture as running and gives its pool to no other."""
        _failed.append(failed)
        with suppress(RuntimeError):  # torch may have ended it itself
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self.pools[-1])
        self.pools.append(torch.cuda.graph_pool_handle())
