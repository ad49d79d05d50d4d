"""`GraphRunner`: a step captured once per batch bucket over static buffers, and replayed: once, k times over as one
graph, or in a loop that the device ends.

All buckets share one memory pool and are captured largest first, so that the smaller ones fit into what the largest
left (as vLLM and TensorRT-LLM do). Graphs of one pool must not run at the same time: replays are one after another.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.errors import CaptureError, ConfigError
from trtllm_vattn.graphs.audit import AuditReport, Region, audit, audit_host, cuda_probe, pool_regions, torch_blocks
from trtllm_vattn.graphs.compose import ComposedGraph, Decision, loop_while, repeat
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.graphs.nodes import GraphReader
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.tensors import current_stream

logger = logging.getLogger(__name__)

Outputs = tuple[torch.Tensor, ...]
_failed: list[torch.cuda.CUDAGraph] = []


def _closed(bucket: int) -> Outputs:
    raise CaptureError("this runner is closed; build another")


def default_buckets(most: int) -> list[int]:
    """Batch sizes worth a graph up to `most`: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond."""
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 64)]
    return [*(size for size in usual if size < most), most]


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage is collected meanwhile. A collection that came upon a graph dropped earlier would end a capture."""
    was_on = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class CaptureReport:
    """What capturing cost, by bucket in seconds, and the bytes of device memory that the graphs' pool took.

    `replay_s` is a bucket's replay over idle lanes: what its size costs, without any sequence to read.
    """

    seconds: dict[int, float]
    replay_s: dict[int, float]
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
    go : Tensor or None
        int32 ``[1]`` among `static`, which a step leaves other than 0 where a loop may go on; None for no loops.
    pool : object or None
        Another runner's `pool`, where the two never run at the same time.
    """

    def __init__(
        self,
        step: Callable[[int], Outputs],
        buckets: Sequence[int],
        static: Iterable[torch.Tensor],
        device: torch.device,
        go: torch.Tensor | None = None,
        pool: Any = None,
    ) -> None:
        if not buckets or min(buckets) < 1 or len(set(buckets)) < len(buckets):
            raise ConfigError(f"buckets are {list(buckets)}; give different positive batch sizes, at least one")
        self.buckets = sorted(buckets)
        self._step, self._device, self._go = step, device, go
        self.static = list(static)
        on_gpu = device.type == "cuda"
        self.pool: Any = pool or (torch.cuda.graph_pool_handle() if on_gpu else None)
        self._pools = [self.pool]
        self._driver = CudaDriver(device.index or 0) if on_gpu else None
        self._decision: Decision | None = None
        self._graphs: dict[int, tuple[Any, Outputs]] = {}
        self._composed: dict[tuple[int, int], ComposedGraph] = {}
        self._closed = False

    # -- capturing -------------------------------------------------------------------------------------------------

    @property
    def captured(self) -> set[int]:
        """Buckets that have a graph."""
        return set(self._graphs)

    def capture(self, buckets: Sequence[int] | None = None) -> CaptureReport:
        """Capture buckets (None: all), largest first. Raises CaptureError where a step cannot be held by a graph."""
        if self._closed:
            raise CaptureError("this runner is closed; build another")
        on_gpu = self._device.type == "cuda"
        capture = self._cuda_capture() if on_gpu else self._host_capture
        if on_gpu:
            # Each capture empties torch's cache; what that gives back is not the pool's.
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device) if on_gpu else 0
        seconds, replays = {}, {}
        for bucket in sorted(buckets or self.buckets, reverse=True):
            started = perf_counter()
            self._graphs[bucket] = capture(bucket)
            seconds[bucket] = perf_counter() - started
            replays[bucket] = self._time_replay(bucket)
        after = torch.cuda.memory_reserved(self._device) if on_gpu else 0
        report = CaptureReport(seconds, replays, after - before)
        logger.info("captured %d graphs in %.2f s, %d bytes", len(seconds), sum(seconds.values()), report.pool_bytes)
        return report

    def _time_replay(self, bucket: int, times: int = 3) -> float:
        shortest = float("inf")
        for _ in range(times):
            started = perf_counter()
            self.replay(bucket)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            shortest = min(shortest, perf_counter() - started)
        return shortest

    def _host_capture(self, bucket: int) -> tuple[HostGraph, Outputs]:
        outputs: list[Outputs] = []
        graph = HostGraph.capture(lambda: outputs.append(self._step(bucket)), self.static)
        return graph, outputs[0]

    def _cuda_capture(self) -> Callable[[int], tuple[torch.cuda.CUDAGraph, Outputs]]:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

        def capture(bucket: int) -> tuple[torch.cuda.CUDAGraph, Outputs]:
            around = torch.cuda.current_stream(self._device)
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            try:
                return captured(bucket, graph)
            except BaseException:
                # An interrupt may come between a capture's beginning and torch's noting it, or the like of a stream.
                with torch.cuda.stream(stream):
                    if torch.cuda.is_current_stream_capturing():
                        with suppress(RuntimeError):
                            graph.capture_end()
                        self._leave_pool(graph)
                torch.cuda.set_stream(around)
                raise

        def captured(bucket: int, graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.CUDAGraph, Outputs]:
            # Libraries plan, allocate workspaces and load kernels at their first call, which no graph can hold.
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._step(bucket)
            torch.cuda.synchronize(self._device)
            # The workspaces that the warm-up made are torch's, which may drop them; captured ones are the pool's.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # Other threads may make driver calls meanwhile: only this one is held to what capture allows. Where a
                # capture fails, torch leaves its stream the current one; the outer context does not.
                with (
                    collector_off(),
                    torch.cuda.stream(stream),
                    torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    outputs = self._step(bucket)
                graph.instantiate()
            except RuntimeError as error:
                self._leave_pool(graph)
                reason = str(error).partition("\n")[0]  # without CUDA's advice on debugging
                raise CaptureError(
                    f"the step for {bucket} lanes cannot be captured: {reason}; it may not read the device from the "
                    "host, allocate outside torch, or change streams"
                ) from error
            return graph, outputs

        return capture

    def _leave_pool(self, failed: torch.cuda.CUDAGraph) -> None:
        """Go on with another pool: torch counts a capture that failed as one under way and gives its pool to no other.

        On the device that can be ended; among its host memory torch goes on asking the graph, so that is kept.
        """
        _failed.append(failed)
        with suppress(RuntimeError):  # where torch did so itself
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        self._pools.append(self.pool)

    # -- replaying -------------------------------------------------------------------------------------------------

    def bucket_for(self, lanes: int) -> int:
        """The smallest bucket that holds so many lanes."""
        for bucket in self.buckets:
            if bucket >= lanes:
                return bucket
        raise ConfigError(f"{lanes} lanes, but the largest bucket is {self.buckets[-1]}; add a larger one")

    def graph(self, bucket: int) -> Any:
        """A bucket's captured graph: a `HostGraph`, or a `torch.cuda.CUDAGraph` that kept its cudaGraph_t."""
        return self._captured(bucket)[0]

    def audit(self, regions: Iterable[Region], what: str = "step", bucket: int | None = None) -> AuditReport:
        """Whose the addresses are that its graphs hold, of a bucket or of all: captured ones, and those composed of
        them. `regions` are theirs besides the pool. Raises CaptureError where there is no graph."""
        captured = sorted(self._graphs) if bucket is None else [bucket]
        graphs = {bucket: self.graph(bucket) for bucket in captured}
        if not graphs:
            raise CaptureError(f"no {what} is captured; capture it before its graphs are looked at")
        if self._driver is None:
            return AuditReport.joined(audit_host(graph, regions, f"{what} of {b}") for b, graph in graphs.items())
        cuda = self._driver.cuda
        known = [*regions, *(region for pool in self._pools for region in pool_regions(pool))]
        blocks = torch_blocks()
        read: list[tuple[str, Any, dict[int, list[Any]]]] = [
            (f"{what} of {bucket}", cuda.CUgraph(graph.raw_cuda_graph()), {}) for bucket, graph in graphs.items()
        ]
        for (bucket, steps), made in self._composed.items():
            if bucket in graphs:
                how = f"{steps} times over" if steps else "in a loop"
                read.append((f"{what} of {bucket}, {how}", made.graph, made.bodies))
        reader, probe = GraphReader(cuda), cuda_probe(cuda)
        return AuditReport.joined(
            audit(reader.read(graph, bodies), known, probe, blocks, name) for name, graph, bodies in read
        )

    def _captured(self, bucket: int) -> tuple[Any, Outputs]:
        if bucket not in self._graphs:
            state = "closed" if self._closed else f"captured for {sorted(self._graphs)}"
            raise CaptureError(f"no graph for {bucket} lanes: the runner is {state}")
        return self._graphs[bucket]

    def replay(self, bucket: int, steps: int = 1) -> Outputs:
        """Launch a bucket's step on the current stream, `steps` times over in one launch.

        Returns its static outputs, those of the last step, valid until the next replay.
        """
        graph, outputs = self._captured(bucket)
        if steps == 1 or self._driver is None:
            for _ in range(steps):
                graph.replay()
        else:
            self._compose(bucket, steps).launch(current_stream(self._device))
        return outputs

    def replay_while(self, bucket: int) -> Outputs:
        """Launch a bucket's step on the current stream, again and again while it leaves `go` other than 0."""
        graph, outputs = self._captured(bucket)
        if self._go is None:
            raise ConfigError("this runner was built without `go`, the tensor by which the device ends a loop")
        if self._driver is None:
            graph.replay()
            while self._go.item():
                graph.replay()
        else:
            self._compose(bucket, 0).launch(current_stream(self._device))
        return outputs

    def _compose(self, bucket: int, steps: int) -> ComposedGraph:
        """A bucket's step `steps` times over, or 0 for a loop; made at its first use."""
        made = self._composed.get((bucket, steps))
        if made is None:
            assert self._driver is not None
            raw = self._graphs[bucket][0].raw_cuda_graph()
            if steps:
                made = repeat(self._driver, raw, steps)
            else:
                assert self._go is not None
                self._decision = self._decision or Decision(self._driver)
                made = loop_while(self._driver, raw, self._go, self._decision)
            self._composed[bucket, steps] = made
        return made

    def close(self) -> None:
        """Drop all graphs and their memory. Idempotent."""
        self._closed = True
        for composed in self._composed.values():
            composed.close()
        self._composed.clear()
        self._graphs.clear()
        self.static.clear()
        # Mostly a method of who holds this runner: neither keeps the other alive.
        self._step = _closed
