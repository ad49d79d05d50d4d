"""Tensors over addresses: flat bytes through a DLPack capsule, and strided views of them.

A DLPack importer takes the pointer as it is and never asks the driver about it, so a tensor can be made before
anything is mapped, and over any dtype.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.uninterrupted import uninterrupted

T = TypeVar("T")


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_CPU, _CUDA, _UNSIGNED = 1, 2, 1
_alive: dict[int, tuple[_ManagedTensor, object, object]] = {}
"""What each imported capsule needs until its storage dies: the structure, its shape, and the owner."""


# A function of Python could be interrupted in the middle, and what it was to forget would stay.
_delete = _Deleter(_alive.__delitem__)


@atexit.register
def _leave_to_the_system() -> None:
    """What lives until the process ends must not call back into an interpreter that is gone."""
    for managed, _, _ in _alive.values():
        managed.deleter = _Deleter()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(managed))


def tensor_at(address: int, nbytes: int, device: str, owner: object = None) -> torch.Tensor:
    """A flat uint8 tensor over ``[address, address + nbytes)``; nothing need be mapped there.

    Parameters
    ----------
    device : str
        ``cpu`` or ``cuda:N``.
    owner : object
        Kept alive until the tensor's storage dies.
    """
    made: list[torch.Tensor] = []
    if owner is None:
        _import(made, address, nbytes, device, None)
    else:
        # Interrupted between its halves, an import would keep the owner for ever.
        uninterrupted(_import, made, address, nbytes, device, owner)
    return made[0]


def _import(made: list[torch.Tensor], address: int, nbytes: int, device: str, owner: object) -> None:
    """Put the tensor into a list: one that dies with an exception on its way, as what stands in the middle of an
    expression does, calls `_delete` in the middle of it, and Python takes that for an error of its own."""
    where = torch.device(device)
    kind, index = (_CPU, 0) if where.type == "cpu" else (_CUDA, where.index or 0)
    shape = (ctypes.c_int64 * 1)(nbytes)
    managed = _ManagedTensor()
    managed.tensor = _Tensor(
        address,
        _Device(kind, index),
        1,
        _DataType(_UNSIGNED, 8, 1),
        ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
    )
    managed.deleter = _delete
    key = ctypes.addressof(managed)
    _alive[key] = (managed, shape, owner)
    try:
        made.extend(map(torch.utils.dlpack.from_dlpack, (_new_capsule(key, b"dltensor", None),)))
    except Exception:
        del _alive[key]
        raise


def strided(
    flat: torch.Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    offset_bytes: int = 0,
) -> torch.Tensor:
    """A view of flat bytes as `dtype`; strides are in elements, the offset in bytes.

    Raises ConfigError where the offset is not a multiple of the element or the view would leave the bytes.
    """
    if offset_bytes % dtype.itemsize or flat.numel() % dtype.itemsize:
        raise ConfigError(
            f"an offset of {offset_bytes} in {flat.numel()} bytes does not hold whole elements of {dtype.itemsize}"
        )
    end = offset_bytes + (1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))) * dtype.itemsize
    if end > flat.numel():
        raise ConfigError(f"shape {tuple(shape)} with strides {tuple(strides)} ends at byte {end} of {flat.numel()}")
    return flat.view(dtype).as_strided(tuple(shape), tuple(strides), offset_bytes // dtype.itemsize)


def finish(device: str) -> None:
    """Wait until a device has done all that was submitted to it."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def copy_bytes(device: str, to: int, source: int, nbytes: int) -> None:
    """Copy between addresses of a device, on the stream that torch launches on."""
    target, origin = tensor_at(to, nbytes, device), tensor_at(source, nbytes, device)
    target.copy_(origin, non_blocking=True)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host array on a device, without waiting for what the device is doing; `array` may change at once."""
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    # A copy into pinned memory that torch does not use again before the transfer is over.
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that torch launches on in this thread; None on the host."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def on_stream(stream: torch.cuda.Stream | None, call: Callable[..., T], *arguments: Any) -> T:
    """Make a call with torch launching on this stream, in whatever thread."""
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        return call(*arguments)


class SideStream:
    """A stream beside the one that torch launches on. On the host there is none: what is submitted is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def number(self) -> int:
        """As the driver takes it."""
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def follow(self) -> None:
        """What is submitted here from now on waits for what was submitted to torch's current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def timing(self) -> StreamTiming:
        """Times what is submitted from now on."""
        return StreamTiming(self._stream)


class StreamTiming:
    """Times what is submitted to a stream until `end`; where there is none, what the host does meanwhile."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._events: list[torch.cuda.Event] = []
        self._started, self._took = perf_counter(), 0.0
        self._mark()

    def _mark(self) -> None:
        if self._stream is not None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._events.append(event)

    def end(self) -> None:
        """What is timed was submitted."""
        self._mark()
        self._took = perf_counter() - self._started

    def seconds(self) -> float | None:
        """What it took; None while it is not done."""
        if self._stream is None:
            return self._took
        first, last = self._events
        is_done = last.query()  # type: ignore[no-untyped-call]
        return float(first.elapsed_time(last)) / 1e3 if is_done else None


def inference() -> AbstractContextManager[object]:
    """A context in inference mode. Entering or leaving it is one operation for signals; in `torch.inference_mode`,
    which is written in Python, an interrupt may come in between, and the mode stay on."""
    guard: AbstractContextManager[object] = torch._C._InferenceMode(True)
    return guard


def current_stream(device: torch.device | str) -> int:
    """The stream that torch launches on, as the driver takes it; 0 on the host."""
    where = torch.device(device)
    return torch.cuda.current_stream(where).cuda_stream if where.type == "cuda" else 0
