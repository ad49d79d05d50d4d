"""The audit: which addresses did a captured graph bake in, and whose are they?

Every address that can be seen must lie in a reservation of the cache, in the graphs' memory pool, or in a static
buffer. Anything else is a finding: memory that somebody may free beneath the graph. What cannot be seen is listed.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import CaptureError
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.graphs.nodes import Node, Opaque, Word

RESERVATION, POOL, STATIC = "reservation", "pool", "static"


@dataclass(frozen=True)
class Region:
    """`size` bytes from `base` that a graph may hold addresses of; `kind` is one of the three above."""

    kind: str
    base: int
    size: int


@dataclass(frozen=True)
class Allocation:
    """What the driver says of an address: the allocation it lies in."""

    base: int
    size: int
    where: str


SMALLEST_UPPER = 1 << 12
"""Large allocations lie at low addresses, where eight bytes that are two small numbers point too. From here on the
upper four bytes are too large for that."""


UNTIDY = {
    "index_elementwise_kernel": 0,
    "scatter_gather_elementwise_kernel": 0,
    "reduce_kernel": 0,
    "native18elementwise_kernel": 0,
    "CatArrayBatchedCopy": 16,
}
"""Kernels of PyTorch, by a part of their names, that are given more room than they use: for the strides of 25
dimensions (OffsetCalculator.cuh), or for addresses, sizes and strides of many tensors that are joined (Shape.cu). It is
filled as far as there are dimensions or tensors; the rest is what lay on the stack. With each the bytes at the start of
its first two parameters that are always filled: of those that join, where the result goes and two of the tensors."""


@dataclass(frozen=True)
class Finding:
    """A word that points into memory of nobody we know; `node` counts within its `graph`.

    `certain` where it is the start of an allocation or too large for two numbers side by side, and all of the parameter
    means something; what is not may be a constant of the kernel's that only looks like an address.
    """

    node: int
    kind: str
    name: str
    parameter: int
    offset: int
    address: int
    allocation: Allocation
    certain: bool
    graph: str = "graph"


_OF_KERNELS = (
    "addresses that a kernel reads from memory (arrays of pointers) are not among its parameters",
    "an address that is not a multiple of 8 bytes into its parameter is not looked for",
    "a foreign address below 16 TiB that is not where an allocation begins passes for a number",
    "PyTorch's kernels that join or stride have parameters with unused parts; foreign addresses there are lookalikes",
)


@dataclass(frozen=True)
class AuditReport:
    """What graphs hold, which `graphs` names.

    `nodes` counts them by kind, `addresses` those seen by the kind of their region; `numbers` the words that are no
    address the driver knows. `findings` are foreign addresses, `lookalikes` words that may be. `opaque` lists what
    could not be read, by its graph's node and that node's name; `unseen` says it in sentences.
    """

    graphs: tuple[str, ...]
    nodes: dict[str, int]
    addresses: dict[str, int]
    numbers: int
    findings: tuple[Finding, ...]
    lookalikes: tuple[Finding, ...]
    opaque: tuple[tuple[int, str, Opaque], ...]

    @classmethod
    def joined(cls, reports: Iterable[AuditReport]) -> AuditReport:
        """One report of several graphs."""
        each = list(reports)
        return cls(
            tuple(name for report in each for name in report.graphs),
            dict(sum((Counter(report.nodes) for report in each), Counter())),
            dict(sum((Counter(report.addresses) for report in each), Counter())),
            sum(report.numbers for report in each),
            tuple(finding for report in each for finding in report.findings),
            tuple(finding for report in each for finding in report.lookalikes),
            tuple(part for report in each for part in report.opaque),
        )

    @property
    def unseen(self) -> tuple[str, ...]:
        """What an audit cannot see, and how often that was so."""
        reasons = Counter(part.why for _, _, part in self.opaque)
        sentences = [f"{count} times: {why}" for why, count in reasons.items()]
        return tuple(sentences + (list(_OF_KERNELS) if self.nodes.get("kernel") else []))

    def raise_if_foreign(self) -> None:
        """Raise CaptureError naming the first finding."""
        if self.findings:
            first = self.findings[0]
            where = first.allocation
            raise CaptureError(
                f"the {first.graph} holds {first.address:#x}, {first.offset} bytes into parameter {first.parameter} of "
                f"{first.kind} {first.name!r} (node {first.node}): {where.where} memory of {where.size:,} bytes at "
                f"{where.base:#x} that is neither the cache's, nor the graphs' pool's, nor declared static "
                f"({len(self.findings)} such in all); pass the tensor as static and keep it, or make it inside the step"
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts, findings, different look-alikes, and sentences."""
        return {
            "graphs": list(self.graphs),
            "nodes": self.nodes,
            "addresses": self.addresses,
            "numbers": self.numbers,
            "findings": [asdict(finding) for finding in self.findings],
            "lookalikes": len(self.lookalikes),
            "lookalike_values": sorted({finding.address for finding in self.lookalikes}),
            "opaque_parameters": len(self.opaque),
            "unseen": list(self.unseen),
        }


Probe = Callable[[int], Allocation | None]


class Regions:
    """Looks an address up among regions that do not overlap."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = sorted(regions, key=lambda region: region.base)
        self._bases = [region.base for region in self._regions]

    def find(self, address: int) -> Region | None:
        """The region that an address lies in; its end does not."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index >= 0 and address < self._regions[index].base + self._regions[index].size:
            return self._regions[index]
        return None


def audit(
    nodes: Sequence[Node],
    regions: Iterable[Region],
    probe: Probe,
    blocks: Collection[int] = frozenset(),
    name: str = "graph",
) -> AuditReport:
    """Classify every address in a graph's nodes.

    Parameters
    ----------
    probe : callable
        What the driver knows of an address; None if nothing.
    blocks : collection of int
        Where allocations inside the driver's begin, as a caching allocator knows them.
    name : str
        What to call the graph.
    """
    known = Regions(regions)
    seen: Counter[str] = Counter()
    findings: list[Finding] = []
    numbers = 0
    for index, node in enumerate(nodes):
        for word in node.words:
            region = known.find(word.value)
            if not word.value:
                continue
            if region is not None:
                seen[region.kind] += 1
            elif (allocation := probe(word.value)) is None:
                numbers += 1
            else:
                starts = word.value == allocation.base or word.value in blocks
                certain = starts or word.value >> 32 >= SMALLEST_UPPER
                certain &= _filled(node, word)
                findings.append(_finding(index, node, word, allocation, certain, name))
    opaque = tuple((index, node.name, part) for index, node in enumerate(nodes) for part in node.opaque)
    return AuditReport(
        graphs=(name,),
        nodes=dict(Counter(node.kind for node in nodes)),
        addresses=dict(seen),
        numbers=numbers,
        findings=tuple(finding for finding in findings if finding.certain),
        lookalikes=tuple(finding for finding in findings if not finding.certain),
        opaque=opaque,
    )


def _filled(node: Node, word: Word) -> bool:
    """Whether a word of a parameter was given a value for sure."""
    for untidy, filled in UNTIDY.items():
        if untidy in node.name:
            return word.parameter < 2 and word.offset < filled
    return True


def _finding(index: int, node: Node, word: Word, allocation: Allocation, certain: bool, graph: str) -> Finding:
    return Finding(index, node.kind, node.name, word.parameter, word.offset, word.value, allocation, certain, graph)


def audit_host(graph: HostGraph, regions: Iterable[Region], name: str = "graph") -> AuditReport:
    """The same for a `HostGraph`: what its operations made themselves counts as the pool's."""
    known = Regions(regions)
    made = {tensor.untyped_storage().data_ptr() for record in graph.records for _, tensor in record.results}
    seen: Counter[str] = Counter()
    findings = []
    for index, record in enumerate(graph.records):
        for place, storage in enumerate(record.storages()):
            address = storage.data_ptr()
            region = known.find(address)
            if region is not None:
                seen[region.kind] += 1
            elif address in made:
                seen[POOL] += 1
            elif address:
                node = Node("operation", str(record.operation))
                allocation = Allocation(address, storage.nbytes(), "host")
                findings.append(_finding(index, node, Word(place, 0, address), allocation, True, name))
    return AuditReport((name,), {"operation": len(graph)}, dict(seen), 0, tuple(findings), (), ())


def cuda_probe(cuda: Any) -> Probe:
    """What the CUDA driver knows of an address; `cuda` is `cuda.bindings.driver`."""
    attribute = cuda.CUpointer_attribute

    def ask(what: Any, address: int) -> Any:
        code, value = cuda.cuPointerGetAttribute(what, address)
        return value if code == cuda.CUresult.CUDA_SUCCESS else None

    def probe(address: int) -> Allocation | None:
        kind = ask(attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        if kind is None:
            return None
        base = ask(attribute.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address)
        size = ask(attribute.CU_POINTER_ATTRIBUTE_RANGE_SIZE, address)
        where = "host" if int(kind) == int(cuda.CUmemorytype.CU_MEMORYTYPE_HOST) else "device"
        return Allocation(int(base or address), int(size or 0), where)

    return probe


def pool_regions(pool: Any) -> list[Region]:
    """The segments of a torch memory pool, by the handle that its graphs were captured with."""
    return [
        Region(POOL, segment["address"], segment["total_size"])
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if tuple(segment["segment_pool_id"]) == tuple(pool)
    ]


def torch_blocks() -> set[int]:
    """Where the tensors begin that torch's caching allocator has handed out."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return {block["address"] for segment in segments for block in segment["blocks"] if block["state"] != "inactive"}


def attention_regions(attention: Attention, static: Iterable[torch.Tensor]) -> list[Region]:
    """What a step over a cache may hold addresses of: the cache, which is a reservation where it is ours; what its
    attention backend keeps; and the tensors declared static."""
    kind = RESERVATION if isinstance(attention.cache, KVCacheManager) else STATIC
    regions = tensor_regions(kind, attention.cache.storages())
    known = {region.base for region in regions}
    others = tensor_regions(STATIC, [*static, *attention.storages()])
    return [*regions, *(region for region in others if region.base not in known)]


def tensor_regions(kind: str, tensors: Iterable[torch.Tensor]) -> list[Region]:
    """The storages of tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return [Region(kind, base, size) for base, size in storages.items() if base and size]
