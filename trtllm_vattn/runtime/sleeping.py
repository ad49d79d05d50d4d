"""Sleep: an engine's memory back to the driver and here again, beneath graphs that stay (as vLLM's sleep mode).

Keys and values lie at fixed addresses already. Weights do where that is asked for: parameters become tensors over one
reservation, before anything captures their addresses, and its extents come and go beneath them. What stays on the
device are graphs, their buffers and the context; `SleepingReport` has it in bytes.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError, DriverError, EngineAsleep, KVCacheOutOfMemory
from trtllm_vattn.memory.host_pool import HostPool, Span
from trtllm_vattn.runtime.compiled import LinearSlice
from trtllm_vattn.values import choice, described, shown
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.open import open_driver
from trtllm_vattn.vmm.owners import Extent, Mapping, Reservation, RollbackFailed
from trtllm_vattn.vmm.tensors import copy_bytes, current_stream, finish, tensor_at
from trtllm_vattn.vmm.uninterrupted import finalize, uninterrupted

logger = logging.getLogger(__name__)

ALIGNMENT = 512
"""Bytes that a parameter's address is a multiple of, as torch's allocator has it."""
LARGEST_EXTENT = 256 << 20
KV, WEIGHTS = "kv_cache", "weights"
TAGS = (WEIGHTS, KV)
ATTEMPTS = 3
"""How often putting a mapping back is tried."""


@dataclass(frozen=True)
class SleepingReport:
    """Bytes on the device now, and in host memory.

    `kv_bytes` and `weights_bytes` are those of memory that `sleep` gives back: of weights, where they can sleep.
    `torch_bytes` is what torch's allocator holds: graphs' buffers, weights that cannot sleep, inputs. `other_bytes` is
    the rest of what is taken on the device: its contexts, loaded code, captured graphs, and other processes. Both are
    0 on the host. `host_bytes` hold what was kept, of `host_pinned_bytes`.
    """

    kv_bytes: int
    weights_bytes: int
    torch_bytes: int
    other_bytes: int
    host_bytes: int
    host_pinned_bytes: int


class WeightsMemory:
    """The addresses of a model's parameters, and the memory beneath them.

    Parameters
    ----------
    size : int
        Bytes.

    Raises
    ------
    DriverError, AddressSpaceExhausted
        Nothing is left behind.
    """

    def __init__(self, driver: Driver, size: int) -> None:
        self.driver, granularity = driver, driver.granularity()
        self.size = -(-size // granularity) * granularity
        self.reservation = Reservation(driver, self.size)
        self.host = HostPool(driver, self.size + 8 * granularity)
        self._mappings: list[Mapping] = []
        """By address. Where a failed call could not leave them as they were, some are missing, or unmapped with their
        bytes in their extents."""
        self._stuck: list[Extent] = []
        self._left: list[Mapping] = []
        """What could not be taken back, perhaps not accessible, in the way of what is mapped there again."""
        self._spans: list[Span] | None = None
        self._closing = threading.Lock()
        self.is_mapped = False

    @property
    def held_bytes(self) -> int:
        extents = [mapping.extent for mapping in (*self._mappings, *self._left)] + self._stuck
        return sum({extent.serial: extent.size for extent in extents}.values())

    def map_to(self, end: int) -> None:
        """Have the first `end` bytes mapped. Raises KVCacheOutOfMemory or DriverError with nothing changed but what was
        mapped before it."""
        self._close_left()
        at, number, granularity = 0, 0, self.driver.granularity()
        while at < end:
            size = min(LARGEST_EXTENT // granularity * granularity or granularity, self.size - at)
            there = self._mappings[number] if number < len(self._mappings) else None
            if there is None or there.offset != at:
                self._mappings.insert(number, self._map_new(at, size))
            elif not there.is_open:
                self._mappings[number] = self._map(at, there.extent)
            at, number = at + size, number + 1
        self.is_mapped = at >= self.size

    def _map_new(self, at: int, size: int) -> Mapping:
        extent = self._create(size)
        try:
            return self._map(at, extent)
        except BaseException:
            if not extent.mappings:
                self._close_extents([extent])
            raise

    def _map(self, at: int, extent: Extent) -> Mapping:
        try:
            (made,) = self.reservation.map(at, [extent])
        except RollbackFailed as error:
            self._left += error.left
            raise
        return made

    def _close_left(self) -> None:
        """Try again to unmap what could not be taken back. Raises DriverError."""
        while self._left:
            self._left[-1].close()
            extent = self._left.pop().extent
            if all(mapping.extent is not extent for mapping in self._mappings):
                self._close_extents([extent])

    def _create(self, size: int) -> Extent:
        try:
            return Extent(self.driver, size)
        except DriverError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
            raise KVCacheOutOfMemory(
                f"the device has no {size:,} bytes for weights, which take {self.size:,} in all; free memory of it"
            ) from error

    def release(self, keep: bool) -> None:
        """Give the memory back, with its bytes in host memory where they are to be kept. Raises HostMemoryFull or
        DriverError; all is in place then, or where the driver refuses even that, `restore` has it so."""
        stream = current_stream(self.driver.device)
        finish(self.driver.device)
        spans = self.host.acquire(self.size) if keep else None
        try:
            for address, at, size in self._parts(spans or []):
                self.driver.copy_to_host(at, address, size, stream)
            self.driver.record(stream).wait()
            self._unmap_all()
        except BaseException:
            finish(self.driver.device)
            self.host.release(spans or [])
            raise
        extents = [mapping.extent for mapping in self._mappings]
        self._mappings, self.is_mapped, self._spans = [], False, spans
        self._close_extents(extents)

    def restore(self) -> int:
        """Map memory again, with the bytes that were kept; returns how many. Raises KVCacheOutOfMemory or DriverError;
        nothing is mapped then but what was before, and calling again tries again."""
        stream = current_stream(self.driver.device)
        before = {mapping.extent.serial for mapping in self._mappings}
        try:
            self.map_to(self.size)
            for address, at, size in self._parts(self._spans or []):
                self.driver.copy_to_device(address, at, size, stream)
            self.driver.record(stream).wait()
        except BaseException:
            finish(self.driver.device)
            self.is_mapped = False
            for mapping in [each for each in self._mappings if each.extent.serial not in before]:
                self._unmap(mapping)
                if not mapping.is_open:
                    self._mappings.remove(mapping)
                    self._close_extents([mapping.extent])
            raise
        self.host.release(self._spans or [])
        copied, self._spans = 0 if self._spans is None else self.size, None
        return copied

    def _parts(self, spans: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
        """Copies: device address, host address, bytes."""
        done = 0
        for at, size in spans:
            part = min(size, self.size - done)
            if part:
                yield self.reservation.base + done, at, part
            done += part

    def _unmap_all(self) -> None:
        try:
            for mapping in self._mappings:
                mapping.close()
        except DriverError:
            for _ in range(ATTEMPTS):
                try:
                    self.map_to(self.size)
                    break
                except DriverError as error:
                    # Its bytes are in its extent, and it is mapped again by `restore`.
                    self.is_mapped = False
                    logger.warning("weights' memory is not mapped again: %s", error)
            raise

    def _unmap(self, mapping: Mapping) -> None:
        try:
            mapping.close()
        except DriverError as error:
            logger.warning("weights' memory of %d bytes stays mapped: %s", mapping.size, error)

    def _close_extents(self, extents: Sequence[Extent]) -> None:
        """What the driver does not release is tried again by `close`."""
        for extent in extents:
            try:
                extent.close()
            except DriverError as error:
                logger.warning("weights' memory of %d bytes is not released: %s", extent.size, error)
                self._stuck.append(extent)

    def close(self) -> None:
        """Give everything back. Idempotent; where it raised, calling it again goes on. From any thread: when the last
        tensor over it goes, the helper thread of finalizers calls this, whoever else is closing it."""
        with self._closing:
            self._close_left()
            while self._mappings:
                self._mappings[-1].close()
                self._stuck.append(self._mappings.pop().extent)
            self.is_mapped = False
            while self._stuck:
                self._stuck[-1].close()
                self._stuck.pop()
            self.host.close()
            self.reservation.close()


class _Owner:
    """Held by the tensors over a `WeightsMemory`: with the last of them it is given back."""

    def __init__(self, memory: WeightsMemory) -> None:
        weakref.finalize(self, finalize, memory.close).atexit = False


def storages_of(model: nn.Module) -> list[list[torch.Tensor]]:
    """A model's parameters, those of merged projections too, by the storage that they are views of."""
    found: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        parameters = [each for each in module._parameters.values() if each is not None]
        if isinstance(module, LinearSlice):
            parameters += list(module.whole.parameters())
        for parameter in parameters:
            views = found.setdefault(parameter.untyped_storage().data_ptr(), [])
            if all(parameter is not view for view in views):
                views.append(parameter)
    return [views for pointer, views in found.items() if pointer]


def move_weights(model: nn.Module, driver: Driver) -> WeightsMemory:
    """Have a model's parameters lie in memory that can be given back; the same objects, tied and merged as before.

    A storage is moved at a time, so that little memory is needed besides. Raises KVCacheOutOfMemory or DriverError.
    """
    groups = storages_of(model)
    sizes = [-(-views[0].untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT for views in groups]
    memory = WeightsMemory(driver, sum(sizes) or 1)
    flat = tensor_at(memory.reservation.base, memory.size, driver.device, owner=_Owner(memory))
    at, moved = 0, 0
    with torch.inference_mode(False), torch.no_grad():
        for views, size in zip(groups, sizes, strict=True):
            nbytes, source = views[0].untyped_storage().nbytes(), views[0].untyped_storage().data_ptr()
            memory.map_to(at + size)
            copy_bytes(driver.device, memory.reservation.base + at, source, nbytes)
            finish(driver.device)
            for view in views:
                start = at // view.itemsize + view.storage_offset()
                view.data = flat.view(view.dtype).as_strided(view.shape, view.stride(), start)
            at, moved = at + size, moved + size
            if moved > LARGEST_EXTENT and torch.device(driver.device).type == "cuda":
                torch.cuda.empty_cache()
                moved = 0
        memory.map_to(memory.size)
    return memory


class Sleeping:
    """What of an engine sleeps, and what it takes to sleep and wake.

    Parameters
    ----------
    sleepable_weights : bool
        Move the model's parameters to memory that can be given back.
    """

    def __init__(self, cache: KVCache, model: PreTrainedModel, sleepable_weights: bool) -> None:
        self.cache, self._model = cache, model
        self.weights: WeightsMemory | None = None
        if sleepable_weights:
            if next(iter(model.parameters()), None) is None:
                raise ConfigError(
                    f"{type(model).__name__} has no weights that could sleep; leave sleepable_weights out"
                )
            self.weights = move_weights(model, open_driver(str(cache.device)))

    @property
    def is_asleep(self) -> bool:
        return self.cache.is_asleep or not self.has_weights

    @property
    def has_weights(self) -> bool:
        """Whether the weights' memory is there."""
        return self.weights is None or self.weights.is_mapped

    def require_awake(self) -> None:
        """Raise EngineAsleep where memory is missing."""
        if self.is_asleep:
            missing = [tag for tag, there in ((WEIGHTS, self.has_weights), (KV, not self.cache.is_asleep)) if not there]
            raise EngineAsleep(f"the engine sleeps, without {' and '.join(missing)}; call wake() first")

    def require_cache(self) -> None:
        """Raise EngineAsleep where keys and values have no memory."""
        if self.cache.is_asleep:
            raise EngineAsleep("keys and values sleep; call wake() first, or wake(['kv_cache'])")

    def require_weights(self) -> None:
        """Raise EngineAsleep where the weights have no memory."""
        if not self.has_weights:
            raise EngineAsleep("the weights sleep; call wake() first, or wake(['weights'])")

    def check(self, kv: str, weights: str) -> None:
        """Raise ConfigError for words that `sleep` does not know, or what cannot sleep here."""
        choice("kv", kv, "keep", "drop")
        choice("weights", weights, "keep", "host", "drop")
        if not self.cache.remaps:
            raise ConfigError(f"a {type(self.cache).__name__} has its memory for life; sleep needs the vattn cache")
        if weights != "keep" and self.weights is None:
            raise ConfigError("these weights cannot sleep; build the engine with sleepable_weights=True")

    @staticmethod
    def check_tags(tags: Sequence[str] | None) -> frozenset[str]:
        """What to wake. Raises ConfigError for another tag."""
        if tags is not None and not isinstance(tags, str | Sequence):
            raise ConfigError(f"tags are {described(tags)}; give a list of {', '.join(TAGS)}, or None for both")
        wanted = TAGS if tags is None else (tags,) if isinstance(tags, str) else tuple(tags)
        if unknown := [tag for tag in wanted if tag not in TAGS]:
            raise ConfigError(f"there is no tag {shown(unknown[0])}; choose of {', '.join(TAGS)}")
        return frozenset(wanted)

    def sleep(self, kv: str, weights: str) -> None:
        """Give the memory back; all of it, or nothing where it raises."""
        self.cache.sleep(keep=kv == "keep")
        if weights == "keep" or self.weights is None:
            return
        try:
            uninterrupted(self.weights.release, weights == "host")
        except BaseException:
            self.cache.wake()
            raise

    def wake(self, tags: frozenset[str]) -> None:
        """Have it again."""
        if WEIGHTS in tags and self.weights is not None and not self.weights.is_mapped:
            uninterrupted(self.weights.restore)
        if KV in tags and self.cache.is_asleep:
            self.cache.wake()

    def report(self) -> SleepingReport:
        """What is where now."""
        kv, weights = self.cache.held_bytes, 0 if self.weights is None else self.weights.held_bytes
        used, pinned = self.cache.host_bytes
        if self.weights is not None:
            used, pinned = used + self.weights.host.used_bytes, pinned + self.weights.host.held_bytes
        torch_bytes = other = 0
        if self.cache.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.cache.device)
            torch_bytes = torch.cuda.memory_reserved(self.cache.device)
            other = total - free - torch_bytes - kv - weights
        return SleepingReport(kv, weights, torch_bytes, other, used, pinned)

    def close(self) -> None:
        """Give the weights' memory back: the model has no parameters any more. Idempotent."""
        if self.weights is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            for views in storages_of(self._model):
                for view in views:
                    view.data = torch.empty(0, dtype=view.dtype, device=view.device)
        finish(str(self.cache.device))
        uninterrupted(self.weights.close)
