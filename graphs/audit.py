"""The audit: read the addresses in captured graphs, and say whose memory each of them points to.

An address is accounted for if it lies in a region that an owner named: the cache's reservations or storages, a static
tensor, the graphs' memory pool. Any other address is a finding, for somebody may free that memory while the graph
still uses it. The report also lists what the audit cannot read.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trtllm_vattn.errors import CaptureError
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.graphs.nodes import Node, Opaque, Word
from trtllm_vattn.vmm.regions import POOL, Region


@dataclass(frozen=True)
class Allocation:
    """The allocation that an address lies in, as the driver reports it; `where` is ``device`` or ``host``."""

    base: int
    size: int
    where: str


MIN_UPPER_WORD = 1 << 12
"""Two small int32 numbers side by side look like a low address. A word whose upper four bytes are at least this is
taken for an address."""


PADDED_PARAM_KERNELS = {
    "index_elementwise_kernel": 0,
    "scatter_gather_elementwise_kernel": 0,
    "reduce_kernel": 0,
    "native18elementwise_kernel": 0,
    "CatArrayBatchedCopy": 16,
}
"""PyTorch kernels, by a part of their names, whose parameters are only partly initialised: they have room for the
strides of 25 dimensions (OffsetCalculator.cuh) or for many tensors to concatenate (Shape.cu), and what is unused holds
whatever was on the stack. The value is how many bytes at the start of each of the first two parameters are always
initialised: for concatenation, the result's address and the first two tensors."""


@dataclass(frozen=True)
class Finding:
    """A word that points into memory outside all known regions; `node` is an index in its `graph`.

    It is `certain` to be an address if it is the start of an allocation or too large to be two small numbers, and lies
    in an initialised part of its parameter. Otherwise it may be a constant that only looks like an address.
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


_LIMITS_FOR_KERNELS = (
    "addresses that a kernel reads from memory (arrays of pointers) are not among its parameters",
    "an address that is not a multiple of 8 bytes into its parameter is not looked for",
    "a foreign address below 16 TiB that is not where an allocation begins passes for a number",
    "PyTorch's kernels that join or stride have parameters with unused parts; foreign addresses there are lookalikes",
)


@dataclass(frozen=True)
class AuditReport:
    """What the audited graphs hold.

    Attributes
    ----------
    graphs : tuple of str
        Names of the graphs.
    nodes, addresses : dict
        Nodes by kind, and addresses within known regions by the region's kind.
    numbers : int
        Words that are no address which the driver knows.
    findings, lookalikes : tuple of Finding
        Addresses outside all known regions, and words that may be such addresses.
    opaque : tuple
        What could not be read: the node's index, its name, and the reason.
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
        """Merge the reports of several graphs."""
        each = list(reports)

        def counted(name: str) -> dict[str, int]:
            return dict(sum((Counter(getattr(report, name)) for report in each), Counter[str]()))

        return cls(
            tuple(name for report in each for name in report.graphs),
            counted("nodes"),
            counted("addresses"),
            sum(report.numbers for report in each),
            tuple(finding for report in each for finding in report.findings),
            tuple(finding for report in each for finding in report.lookalikes),
            tuple(part for report in each for part in report.opaque),
        )

    @property
    def unseen(self) -> tuple[str, ...]:
        """What the audit could not see, as sentences with counts."""
        reasons = Counter(part.why for _, _, part in self.opaque)
        sentences = [f"{count} times: {why}" for why, count in reasons.items()]
        return tuple(sentences + (list(_LIMITS_FOR_KERNELS) if self.nodes.get("kernel") else []))

    def raise_if_foreign(self) -> None:
        """Raise CaptureError, naming the first finding, if there is one."""
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
        """The report for JSON; lookalikes are counted, and their different values listed."""
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
    """Looks addresses up in regions that do not overlap; of several with the same base the first one counts."""

    def __init__(self, regions: Iterable[Region]) -> None:
        by_base: dict[int, Region] = {}
        for region in regions:
            by_base.setdefault(region.base, region)
        self._regions = sorted(by_base.values(), key=lambda region: region.base)
        self._bases = [region.base for region in self._regions]

    def find(self, address: int) -> Region | None:
        """The region that an address lies in, from its base to before its end; None if there is none."""
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
        Returns the allocation that an address lies in, or None.
    blocks : collection of int
        Addresses at which a caching allocator has handed out memory inside the driver's allocations.
    name : str
        The graph's name in the report.
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
                certain = starts or word.value >> 32 >= MIN_UPPER_WORD
                certain &= _initialised(node, word)
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


def _initialised(node: Node, word: Word) -> bool:
    """Whether a word lies in a part of its parameter that is always initialised."""
    for kernel, size in PADDED_PARAM_KERNELS.items():
        if kernel in node.name:
            return word.parameter < 2 and word.offset < size
    return True


def _finding(index: int, node: Node, word: Word, allocation: Allocation, certain: bool, graph: str) -> Finding:
    return Finding(index, node.kind, node.name, word.parameter, word.offset, word.value, allocation, certain, graph)


def audit_host(graph: HostGraph, regions: Iterable[Region], name: str = "graph") -> AuditReport:
    """The same for a `HostGraph`; memory that its operations allocated counts as the pool's."""
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
    """Look addresses up in the CUDA driver; `cuda` is `cuda.bindings.driver`."""
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
    """The segments of a torch memory pool; `pool` is the handle that graphs were captured with."""
    return [
        Region(segment["address"], segment["total_size"], POOL)
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if tuple(segment["segment_pool_id"]) == tuple(pool)
    ]


def torch_blocks() -> set[int]:
    """Addresses of the blocks that torch's caching allocator has handed out."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return {block["address"] for segment in segments for block in segment["blocks"] if block["state"] != "inactive"}
