"""`GraphRunner` captures a step once per batch bucket over static buffers, and replays it: once, k times in one launch,
or in a loop that the device ends.

All buckets share one memory pool. The largest is captured first, so that the smaller ones reuse its memory, as in vLLM
and TensorRT-LLM. Graphs of one pool must not run at the same time: launch them on one stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from trtllm_vattn.errors import CaptureError, ConfigError
from trtllm_vattn.graphs.audit import AuditReport, audit, audit_host, cuda_probe, pool_regions, torch_blocks
from trtllm_vattn.graphs.capture import GraphCapture, Outputs
from trtllm_vattn.graphs.composition import ComposedGraph, WhileConditionKernel, loop_while, repeat
from trtllm_vattn.graphs.nodes import GraphReader
from trtllm_vattn.values import counted
from trtllm_vattn.vmm.cuda import CudaDriver
from trtllm_vattn.vmm.regions import STATIC, Region, tensor_regions
from trtllm_vattn.vmm.tensors import current_stream

logger = logging.getLogger(__name__)


def _closed(bucket: int) -> Outputs:
    raise CaptureError("this runner is closed; build another")


def default_buckets(most: int) -> list[int]:
    """Batch sizes to capture up to `most`: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 to 1,024, and from
    there on the double of that each time that the size has doubled: some hundred sizes for a hundred thousand."""
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1024, 64)]
    size = 1024
    while size < most:
        usual.append(size)
        size += 64 << (size.bit_length() - 11)
    return [*(size for size in usual if size < most), most]


@dataclass(frozen=True)
class CaptureReport:
    """Seconds that each bucket's capture took, and bytes of device memory that the graphs' pool grew by.

    `replay_s` is the shortest of a few replays with all lanes idle, of the buckets that were to be timed.
    """

    seconds: dict[int, float]
    replay_s: dict[int, float]
    pool_bytes: int


class GraphRunner:
    """Captures and replays ``step(bucket)``.

    Parameters
    ----------
    step : callable
        Reads static buffers, sliced to the bucket, and returns its output tensors. Every call must do the same work.
    buckets : sequence of int
        Batch sizes, in any order.
    static : iterable of Tensor
        Every tensor that a step may read or write and does not make itself.
    go : Tensor or None
        int32 ``[1]`` among `static`; a step leaves it other than 0 if a loop may go on. None: no loops.
    pool : object or None
        The `pool` of another runner, if the two never run at the same time.

    Attributes
    ----------
    uncaptured : set of int
        Buckets whose step is run as it is, while they have no graph.
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
        self._capture = GraphCapture(device, self.static, pool)
        self._driver = CudaDriver(device.index or 0) if device.type == "cuda" else None
        self._condition: WhileConditionKernel | None = None
        self._graphs: dict[int, tuple[Any, Outputs]] = {}
        self._composed: dict[tuple[int, int], ComposedGraph] = {}
        self.uncaptured: set[int] = set()
        self._closed = False

    # -- capturing -------------------------------------------------------------------------------------------------

    @property
    def captured(self) -> set[int]:
        """Buckets that have a graph."""
        return set(self._graphs)

    @property
    def pool(self) -> Any:
        """The handle of the memory pool that the next capture uses; None on the host."""
        return self._capture.pools[-1] if self._capture.pools else None

    def capture(self, buckets: Sequence[int] | None = None, timed: Container[int] | None = None) -> CaptureReport:
        """Capture buckets (None: all), largest first, and time replays of those in `timed` (None: all). Raises
        CaptureError if a graph cannot hold what the step does."""
        if self._closed:
            raise CaptureError("this runner is closed; build another")
        if self._driver is not None:
            # Each capture empties torch's cache; what that gives back must not count as the pool's.
            torch.cuda.empty_cache()
        before = self._reserved_bytes()
        seconds, replays = {}, {}
        for bucket in sorted(buckets or self.buckets, reverse=True):
            started = perf_counter()
            self._graphs[bucket] = self._capture.capture(partial(self._step, bucket), bucket)
            seconds[bucket] = perf_counter() - started
            if timed is None or bucket in timed:
                replays[bucket] = self.replay_s(bucket, 3)
        report = CaptureReport(seconds, replays, self._reserved_bytes() - before)
        logger.info(
            "captured %s in %.2f s, %d bytes", counted(len(seconds), "graph"), sum(seconds.values()), report.pool_bytes
        )
        return report

    def _reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._driver is not None else 0

    def replay_s(self, bucket: int, times: int = 5) -> float:
        """Seconds of the shortest of a few replays of a captured bucket; while nothing else runs."""
        shortest = float("inf")
        for _ in range(times):
            started = perf_counter()
            self.replay(bucket)
            if self._driver is not None:
                torch.cuda.synchronize(self._device)
            shortest = min(shortest, perf_counter() - started)
        return shortest

    # -- replaying -------------------------------------------------------------------------------------------------

    def bucket_for(self, lanes: int) -> int:
        """The smallest bucket of at least `lanes` lanes. Raises ConfigError if there is none."""
        for bucket in self.buckets:
            if bucket >= lanes:
                return bucket
        raise ConfigError(f"{lanes} lanes, but the largest bucket is {self.buckets[-1]}; add a larger one")

    def graph(self, bucket: int) -> Any:
        """A bucket's captured graph: a `HostGraph`, or a `torch.cuda.CUDAGraph` that kept its cudaGraph_t."""
        return self._captured(bucket)[0]

    def _captured(self, bucket: int) -> tuple[Any, Outputs]:
        if bucket not in self._graphs:
            state = "closed" if self._closed else f"captured for {sorted(self._graphs)}"
            raise CaptureError(f"no graph for {bucket} lanes: the runner is {state}")
        return self._graphs[bucket]

    def _runs(self, bucket: int) -> bool:
        return bucket in self.uncaptured and bucket not in self._graphs

    def replay(self, bucket: int, steps: int = 1) -> Outputs:
        """Launch a bucket's step on the current stream, `steps` times in one launch.

        Returns the static outputs; they hold the last step's values until the next replay.
        """
        if self._runs(bucket):
            return [self._step(bucket) for _ in range(steps)][-1]
        graph, outputs = self._captured(bucket)
        if steps == 1 or self._driver is None:
            for _ in range(steps):
                graph.replay()
        else:
            self._compose(self._driver, bucket, steps).launch(current_stream(self._device))
        return outputs

    def replay_while(self, bucket: int) -> Outputs:
        """Launch a bucket's step on the current stream, and again as long as it leaves `go` other than 0."""
        if self._go is None:
            raise ConfigError("this runner was built without `go`, the tensor by which the device ends a loop")
        if self._runs(bucket):
            outputs = self._step(bucket)
            while self._go.item():
                outputs = self._step(bucket)
            return outputs
        graph, outputs = self._captured(bucket)
        if self._driver is None:
            graph.replay()
            while self._go.item():
                graph.replay()
        else:
            self._compose(self._driver, bucket, 0).launch(current_stream(self._device))
        return outputs

    def _compose(self, driver: CudaDriver, bucket: int, steps: int) -> ComposedGraph:
        """The graph of `steps` steps, or with 0 of a loop; made at its first use."""
        made = self._composed.get((bucket, steps))
        if made is None:
            raw = self._graphs[bucket][0].raw_cuda_graph()
            if steps:
                made = repeat(driver, raw, steps)
            else:
                assert self._go is not None
                self._condition = self._condition or WhileConditionKernel(driver)
                made = loop_while(driver, raw, self._go, self._condition)
            self._composed[bucket, steps] = made
        return made

    # -- auditing --------------------------------------------------------------------------------------------------

    def audit(self, regions: Iterable[Region] = (), what: str = "step", bucket: int | None = None) -> AuditReport:
        """Classify the addresses in the graphs of a bucket, or of all: captured ones, and those composed of them.

        `regions` are where addresses may lie besides the static tensors and the graphs' pool; `what` names the step in
        the report. Raises CaptureError if nothing is captured.
        """
        captured = sorted(self._graphs) if bucket is None else [bucket]
        graphs = {bucket: self.graph(bucket) for bucket in captured}
        if not graphs:
            raise CaptureError(f"no {what} is captured; capture it before its graphs are looked at")
        known = [*regions, *tensor_regions(STATIC, self.static)]
        if self._driver is None:
            return AuditReport.joined(audit_host(graph, known, f"{what} of {b}") for b, graph in graphs.items())
        cuda = self._driver.cuda
        known += [region for pool in self._capture.pools for region in pool_regions(pool)]
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

    def close(self) -> None:
        """Drop all graphs and their memory. Idempotent."""
        self._closed = True
        for composed in self._composed.values():
            composed.close()
        self._composed.clear()
        self._graphs.clear()
        self.static.clear()
        # Mostly a method of the object that holds this runner: neither keeps the other alive.
        self._step = _closed
