"""Read the nodes of a captured CUDA graph and their parameters through the driver.

The driver tells where it keeps a kernel's parameters, and with `cuFuncGetParamInfo` how many there are and their
offsets and sizes. It does not know their types: a parameter may be an address, a number, or a structure that
contains addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_vattn.errors import DriverError

TMA_BYTES, TMA_ALIGNMENT = 128, 64
"""Bytes and alignment of a CUtensorMap, the descriptor of the tensor memory accelerator; it encodes its address."""


@dataclass(frozen=True)
class Word:
    """Eight bytes of a parameter; `offset` bytes from its start, a multiple of 8."""

    parameter: int
    offset: int
    value: int


@dataclass(frozen=True)
class Opaque:
    """A parameter (or with -1 the whole node) that may hold addresses which cannot be read, and why."""

    parameter: int
    size: int
    why: str


@dataclass(frozen=True)
class Node:
    """One node: its `kind` as the driver names it (``kernel``, ``memcpy``, …), and the kernel's `name`."""

    kind: str
    name: str
    words: tuple[Word, ...] = ()
    opaque: tuple[Opaque, ...] = ()


_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_END, _BUFFER = 0, 1


def _packed(extra: int) -> int:
    """The address of the buffer if a launcher packed all parameters into one, else 0. `extra` points to pairs of a name
    and a value (cuLaunchKernel, CU_LAUNCH_PARAM_BUFFER_POINTER)."""
    if not extra:
        return 0
    pairs = ctypes.cast(extra, _POINTERS)
    index = 0
    while (name := pairs[index] or _END) != _END:
        if name == _BUFFER:
            return pairs[index + 1] or 0
        index += 2
    return 0


class GraphReader:
    """Reads graphs through `cuda.bindings.driver`, or an object with the same functions."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def read(self, graph: Any, bodies: Mapping[int, Sequence[Any]] | None = None) -> list[Node]:
        """All nodes of a graph (a CUgraph) and of its child graphs. Raises DriverError.

        `bodies` are the body graphs of conditional nodes, by the node's address: the driver returns them only to the
        call that adds the node.
        """
        return list(self._nodes(graph, bodies or {}))

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, name)(*arguments)
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            raise DriverError(code.name, name, ())
        return values[0] if len(values) == 1 else values

    def _nodes(self, graph: Any, bodies: Mapping[int, Sequence[Any]]) -> Iterator[Node]:
        _, count = self._call("cuGraphGetNodes", graph, 0)
        if not count:
            return
        nodes, count = self._call("cuGraphGetNodes", graph, count)
        for node in nodes[:count]:
            kind = self._call("cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
            if kind == "kernel":
                yield self._kernel(node)
            elif kind == "memcpy":
                yield self._memcpy(node)
            elif kind == "memset":
                destination = int(self._call("cuGraphMemsetNodeGetParams", node).dst)
                yield Node(kind, "", (Word(0, 0, destination),))
            elif kind == "graph":
                yield Node(kind, "")
                yield from self._nodes(self._call("cuGraphChildGraphNodeGetGraph", node), bodies)
            elif kind == "conditional" and int(node) in bodies:
                yield Node(kind, "")
                for body in bodies[int(node)]:
                    yield from self._nodes(body, bodies)
            elif kind in ("empty", "wait_event", "event_record"):
                yield Node(kind, "")
            else:
                yield Node(kind, "", opaque=(Opaque(-1, 0, f"a node of kind {kind}"),))

    def _kernel(self, node: Any) -> Node:
        params = self._call("cuGraphKernelNodeGetParams", node)
        # A lazily loaded library's kernel has a CUkernel and no CUfunction yet.
        if int(params.func):
            name, handle, info = self._call("cuFuncGetName", params.func), params.func, "cuFuncGetParamInfo"
        else:
            name, handle, info = self._call("cuKernelGetName", params.kern), params.kern, "cuKernelGetParamInfo"
        name = name.decode() if isinstance(name, bytes) else str(name)
        table, packed = int(params.kernelParams or 0), _packed(int(params.extra or 0))
        if not table and not packed:
            return Node("kernel", name, opaque=(Opaque(-1, 0, "the driver keeps no parameters of it"),))
        words: list[Word] = []
        opaque: list[Opaque] = []
        for index, (offset, size) in enumerate(self._parameters(handle, info)):
            address = ctypes.cast(table, _POINTERS)[index] if table else packed + offset
            if not address:
                opaque.append(Opaque(index, size, "the driver keeps no value for it"))
                continue
            if size % TMA_BYTES == 0 and offset % TMA_ALIGNMENT == 0:
                opaque.append(Opaque(index, size, "it may hold TMA descriptors, in which addresses are encoded"))
            count = size // 8
            values = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64 * count)).contents if count else ()
            words += [Word(index, 8 * i, value) for i, value in enumerate(values)]
        return Node("kernel", name, tuple(words), tuple(opaque))

    def _parameters(self, handle: Any, info: str) -> Iterator[tuple[int, int]]:
        """Offset and size of each parameter; the driver reports the end by an error."""
        index = 0
        while True:
            code, *values = getattr(self._cuda, info)(handle, index)
            if code == self._cuda.CUresult.CUDA_ERROR_INVALID_VALUE:
                return
            if code != self._cuda.CUresult.CUDA_SUCCESS:
                raise DriverError(code.name, info, (index,))
            yield int(values[0]), int(values[1])
            index += 1

    def _memcpy(self, node: Any) -> Node:
        params = self._call("cuGraphMemcpyNodeGetParams", node)
        types = self._cuda.CUmemorytype
        words: list[Word] = []
        opaque: list[Opaque] = []
        for parameter, end in enumerate(("src", "dst")):
            kind = getattr(params, f"{end}MemoryType")
            if kind == types.CU_MEMORYTYPE_ARRAY:
                opaque.append(Opaque(parameter, 0, "it copies from or to a CUDA array, whose memory the driver hides"))
                continue
            value = getattr(params, f"{end}Host" if kind == types.CU_MEMORYTYPE_HOST else f"{end}Device")
            words.append(Word(parameter, 0, int(value or 0)))
        return Node("memcpy", "", tuple(words), tuple(opaque))
