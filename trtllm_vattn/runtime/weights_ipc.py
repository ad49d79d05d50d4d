"""Weights from a process beside the engine's, through memory that both have mapped: CUDA IPC on a GPU, shared memory on
the host.

The trainer packs its tensors into buckets and sends handles of them, as torch.multiprocessing's reductions make them
(`reduce_tensor`; vLLM's, SGLang's and verl's engines take the same ones); nothing is copied but from the bucket into
the model's own memory. Both ends of a `multiprocessing.Pipe`, or of a `multiprocessing.connection.Listener`, do for a
channel. What comes through it is unpickled, so it has to come from somebody who may run code here.

    # the trainer's process
    version = send_weights(connection, model.state_dict())
    # the engine's
    engine.update_weights_from_ipc(receive_weights(connection))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import torch
from torch.multiprocessing import reductions

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.weights import Manifest, NamedTensors

BUCKET_BYTES = 256 << 20
"""Of a bucket that `send_weights` packs; it has two."""
ALIGNED = 256
"""Bytes at a multiple of which each tensor of a bucket begins."""
_REBUILDS = frozenset({reductions.rebuild_cuda_tensor, reductions.rebuild_tensor})

IpcHandle = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]
"""What `torch.multiprocessing.reductions.reduce_tensor` gives for a tensor: what makes it again, and of what."""


class BucketEntry(NamedTuple):
    """A tensor of a bucket: `offset` counts bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class WeightBucket:
    """Tensors in one piece of memory of another process: the handle of a flat uint8 tensor, what it holds, and the GPU
    it is on (`torch.cuda.get_device_properties(...).uuid`; None on the host)."""

    handle: IpcHandle
    entries: tuple[BucketEntry, ...]
    gpu: str | None = None

    def open(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Views of its tensors, by name. Raises ConfigError where it cannot be mapped on this device, or ends before
        its tensors do."""
        flat = opened(self.handle, device, "a bucket", self.gpu)
        if flat.dtype is not torch.uint8 or flat.dim() != 1:
            raise ConfigError(f"a bucket is {tuple(flat.shape)} {flat.dtype}; it is a flat uint8 tensor")
        found: dict[str, torch.Tensor] = {}
        for name, shape, dtype, offset in self.entries:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if offset % dtype.itemsize or offset < 0 or offset + nbytes > len(flat):
                raise ConfigError(f"{name} is said to take {nbytes} bytes at {offset} of a bucket of {len(flat)} bytes")
            if name in found:
                raise ConfigError(f"{name} is given twice in a bucket")
            found[name] = flat[offset : offset + nbytes].view(dtype).view(shape)
        return found


def opened(handle: object, device: torch.device, what: str, gpu: str | None = None) -> torch.Tensor:
    """The tensor of another process that a handle stands for, mapped into this one. Raises ConfigError where it is no
    handle of `reduce_tensor`, its memory is gone, or it lies on another GPU (whose uuid `gpu` names, where known)."""
    if not isinstance(handle, tuple | list) or len(handle) != 2 or handle[0] not in _REBUILDS:
        raise ConfigError(
            f"{what} is {type(handle).__name__}; give what torch.multiprocessing.reductions.reduce_tensor returns"
        )
    rebuild, arguments = handle[0], list(handle[1])
    if rebuild is reductions.rebuild_cuda_tensor:
        if device.type != "cuda":
            raise ConfigError(f"{what} is on a GPU, and this engine on {device}; give a tensor in shared memory")
        own = str(torch.cuda.get_device_properties(device).uuid)
        if gpu not in (None, own):
            raise ConfigError(f"{what} is on GPU {gpu}, this engine's is {own}; CUDA IPC shares memory of one GPU")
        # Its number in the other process may be another one than here (CUDA_VISIBLE_DEVICES).
        arguments[6] = torch.cuda.current_device() if device.index is None else device.index
    try:
        tensor: torch.Tensor = rebuild(*arguments)
    except Exception as error:
        raise ConfigError(f"{what} cannot be mapped here: {error}; is the process that made it alive?") from error
    return tensor


# -- a channel ---------------------------------------------------------------------------------------------------------


class ReceivedWeights:
    """Buckets as they come through a channel; each is released before the next is asked for. `manifest` came first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._told = False
        kind, given = _received(connection)
        if kind != "manifest":
            raise ConfigError(f"a channel began with {kind!r}; use send_weights at its other end")
        self.manifest: Manifest = {name: (torch.Size(shape), dtype) for name, (shape, dtype) in given.items()}

    def __iter__(self) -> Iterator[WeightBucket]:
        self._connection.send(("next", None))
        while True:
            kind, bucket = _received(self._connection)
            if kind == "end":
                return
            yield bucket
            del bucket
            self._connection.send(("next", None))

    def tell(self, outcome: Literal["done", "failed"], what: object) -> None:
        """Have `send_weights` return the version, or raise. Once; nothing where the other end is gone."""
        if not self._told:
            self._told = True
            try:
                self._connection.send((outcome, what))
            except OSError:
                # Who trains has gone; what becomes of the engine does not depend on it.
                return


def _received(connection: Connection) -> tuple[str, Any]:
    try:
        kind, what = connection.recv()
    except (EOFError, OSError) as error:
        raise ConfigError(f"the process that sends weights has gone: {error or 'its channel is closed'}") from error
    return kind, what


def receive_weights(connection: Connection) -> ReceivedWeights:
    """What the `send_weights` at a channel's other end sends; waits for its beginning. Raises ConfigError where that
    has gone."""
    return ReceivedWeights(connection)


def send_weights(
    connection: Connection, named_tensors: Mapping[str, torch.Tensor], bucket_bytes: int = BUCKET_BYTES
) -> int:
    """Give an engine new weights, from the process that has them; returns the engine's new `weights_version`.

    Parameters
    ----------
    connection
        A channel to where `receive_weights` is called.
    named_tensors : mapping of str to Tensor
        As `Engine.update_weights` takes them; all on one device. They may be written to again when this returns.
    bucket_bytes : int
        Of each of two buckets; a larger tensor has a bucket of its own.

    Raises ConfigError where the engine refused them, or has gone.
    """
    tensors = {name: tensor.detach() for name, tensor in named_tensors.items()}
    connection.send(("manifest", {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()}))
    for bucket in _packed(tensors, bucket_bytes):
        _answer(connection)
        connection.send(("bucket", bucket))
    _answer(connection)
    connection.send(("end", None))
    return _answer(connection)


def _answer(connection: Connection) -> int:
    kind, what = _received(connection)
    if kind == "failed":
        raise ConfigError(f"the engine did not take the weights: {what}")
    version: int = what
    return version


def _packed(tensors: Mapping[str, torch.Tensor], most: int) -> Iterator[WeightBucket]:
    """Tensors copied into buckets. Two pieces of memory take turns: when a bucket is asked for, the one before the last
    was released."""
    groups = [*_grouped(tensors, most)]
    size = max((sum(_room(tensors[name]) for name in names) for names in groups), default=0)
    buffers: list[torch.Tensor] = []
    for number, names in enumerate(groups):
        device = tensors[names[0]].device
        if len(buffers) < 2:
            buffers.append(_shared(size, device))
        flat, entries, offset = buffers[number % 2], [], 0
        for name in names:
            each = tensors[name]
            entries.append(BucketEntry(name, tuple(each.shape), each.dtype, offset))
            nbytes = each.numel() * each.itemsize
            flat[offset : offset + nbytes].view(each.dtype).view(each.shape).copy_(each)
            offset += _room(each)
        handle: IpcHandle = reductions.reduce_tensor(flat)  # type: ignore[no-untyped-call]
        yield WeightBucket(handle, tuple(entries), _gpu_of(device))


def _room(tensor: torch.Tensor) -> int:
    """Bytes of a bucket that it takes."""
    return -(-tensor.numel() * tensor.itemsize // ALIGNED) * ALIGNED


def _grouped(tensors: Mapping[str, torch.Tensor], most: int) -> Iterator[list[str]]:
    """Names whose tensors fit a bucket together, in order."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        nbytes = _room(tensor)
        if names and size + nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def _shared(nbytes: int, device: torch.device) -> torch.Tensor:
    flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        flat.share_memory_()  # type: ignore[no-untyped-call]
    return flat


def _gpu_of(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


# -- what an engine is given -------------------------------------------------------------------------------------------

IpcWeights = Mapping[str, IpcHandle] | Iterable[WeightBucket] | ReceivedWeights
"""A handle of each tensor; buckets, all there or one after another; or what comes through a channel."""


def named_tensors(
    weights: IpcWeights, manifest: Manifest | None, device: torch.device
) -> tuple[NamedTensors, Manifest | None]:
    """What `Engine.update_weights` takes, out of what is in another process. Raises ConfigError where that cannot
    be."""
    if isinstance(weights, ReceivedWeights):
        if manifest is not None:
            raise ConfigError("a manifest is given, and the channel begins with its own; leave it out")
        return tensors_of(weights, device), weights.manifest
    if isinstance(weights, Mapping):
        return {name: opened(handle, device, name) for name, handle in weights.items()}, manifest
    if isinstance(weights, list | tuple):
        own = manifest_of(weights)
        if manifest is not None and own != manifest:
            raise ConfigError("the manifest names other tensors than the buckets have; leave it out")
        return tensors_of(weights, device), own
    if manifest is None:
        raise ConfigError("buckets come one after another, so what they will hold has to be known; give a manifest")
    return tensors_of(weights, device), manifest


def tensors_of(buckets: Iterable[WeightBucket], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of buckets, each of which is released, its tensors copied from, before the next is asked for."""
    for bucket in buckets:
        if not isinstance(bucket, WeightBucket):
            raise ConfigError(f"a bucket is {type(bucket).__name__}; give WeightBucket, or a mapping of handles")
        tensors = bucket.open(device)
        del bucket
        while tensors:
            name = next(iter(tensors))
            yield name, tensors.pop(name)
        if device.type == "cuda":
            # The copies are done before the other process writes there again.
            torch.cuda.current_stream(device).synchronize()


def manifest_of(buckets: Iterable[WeightBucket]) -> Manifest:
    """Shape and dtype of each tensor of buckets that are all there. Raises ConfigError for a name that comes twice."""
    found: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for bucket in buckets:
        if not isinstance(bucket, WeightBucket):
            raise ConfigError(f"a bucket is {type(bucket).__name__}; give WeightBucket, or a mapping of handles")
        for name, shape, dtype, _ in bucket.entries:
            if name in found:
                raise ConfigError(f"{name} is given twice")
            found[name] = (torch.Size(shape), dtype)
    return found
