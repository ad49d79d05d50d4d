"""A stand-in for `cuda.bindings.driver`, with graphs whose kernels keep their parameters in real memory."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_SUPPORTED = 801


class CUmemorytype(enum.IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2
    CU_MEMORYTYPE_ARRAY = 3
    CU_MEMORYTYPE_UNIFIED = 4


OK = CUresult.CUDA_SUCCESS


@dataclass
class Kernel:
    """A kernel node: its parameters as bytes, or None where the driver has no value; `by_library` has no CUfunction."""

    name: str
    parameters: list[bytes | None]
    by_library: bool = False
    hidden: bool = False
    packed: bool = False
    kind: str = "KERNEL"
    keep: list[Any] = field(default_factory=list)

    def params(self) -> SimpleNamespace:
        buffers = [None if p is None else ctypes.create_string_buffer(p, len(p)) for p in self.parameters]
        addresses = [0 if buffer is None else ctypes.addressof(buffer) for buffer in buffers]
        table = (ctypes.c_void_p * max(1, len(buffers)))(*addresses)
        extra = 0
        if self.packed:
            whole = b"".join((p or b"").ljust(-(-len(p or b"") // 8) * 8, b"\0") for p in self.parameters)
            buffer, size = ctypes.create_string_buffer(whole, len(whole)), ctypes.c_size_t(len(whole))
            pairs = (ctypes.c_void_p * 5)(2, ctypes.addressof(size), 1, ctypes.addressof(buffer), 0)
            self.keep += [buffer, size, pairs]
            extra = ctypes.addressof(pairs)
        self.keep += [buffers, table]
        handle = Handle(self)
        return SimpleNamespace(
            func=Handle(None) if self.by_library else handle,
            kern=handle,
            kernelParams=0 if self.hidden or self.packed else ctypes.addressof(table),
            extra=extra,
        )


class Handle:
    def __init__(self, kernel: Kernel | None) -> None:
        self.kernel = kernel

    def __int__(self) -> int:
        return 0 if self.kernel is None else 1


@dataclass
class Other:
    """Any other node."""

    kind: str
    payload: Any = None

    def __int__(self) -> int:
        return id(self)


class FakeCuda:
    """Graphs are lists of nodes; `allocations` are what the driver knows: base to (size, memory type)."""

    CUresult = CUresult
    CUmemorytype = CUmemorytype
    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE="type",
        CU_POINTER_ATTRIBUTE_RANGE_START_ADDR="base",
        CU_POINTER_ATTRIBUTE_RANGE_SIZE="size",
    )

    def __init__(self, allocations: dict[int, tuple[int, CUmemorytype]] | None = None) -> None:
        self.allocations = allocations or {}
        self.refuse: str | None = None

    def cuGraphGetNodes(self, graph: list[Any], count: int) -> tuple[Any, ...]:
        if self.refuse == "nodes":
            return CUresult.CUDA_ERROR_NOT_SUPPORTED, None, 0
        return OK, graph[:count], len(graph)

    def cuGraphNodeGetType(self, node: Any) -> tuple[Any, ...]:
        return OK, SimpleNamespace(name=f"CU_GRAPH_NODE_TYPE_{node.kind}")

    def cuGraphKernelNodeGetParams(self, node: Kernel) -> tuple[Any, ...]:
        return OK, node.params()

    def cuFuncGetName(self, handle: Handle) -> tuple[Any, ...]:
        assert handle.kernel is not None
        return OK, handle.kernel.name.encode()

    cuKernelGetName = cuFuncGetName

    def cuFuncGetParamInfo(self, handle: Handle, index: int) -> tuple[Any, ...]:
        assert handle.kernel is not None
        parameters = handle.kernel.parameters
        if self.refuse == "places":
            return CUresult.CUDA_ERROR_NOT_SUPPORTED, 0, 0
        if index >= len(parameters):
            return CUresult.CUDA_ERROR_INVALID_VALUE, 0, 0
        offset = 0
        for parameter in parameters[:index]:
            offset += -(-len(parameter or b"12345678") // 8) * 8
        return OK, offset, len(parameters[index] or b"12345678")

    cuKernelGetParamInfo = cuFuncGetParamInfo

    def cuGraphMemcpyNodeGetParams(self, node: Other) -> tuple[Any, ...]:
        return OK, node.payload

    cuGraphMemsetNodeGetParams = cuGraphMemcpyNodeGetParams
    cuGraphChildGraphNodeGetGraph = cuGraphMemcpyNodeGetParams

    def cuPointerGetAttribute(self, attribute: str, address: int) -> tuple[Any, ...]:
        for base, (size, kind) in self.allocations.items():
            if base <= address < base + size:
                return OK, {"type": kind, "base": base, "size": size}[attribute]
        return CUresult.CUDA_ERROR_INVALID_VALUE, None
