"""Events of stored and removed blocks, as TensorRT-LLM's `get_latest_events` gives them.

`KVCacheEventSerializer` (tensorrt_llm/_utils.py) goes by the name of an event's data class and by attributes, so the
classes here have TensorRT-LLM's names and attributes. Blocks' hashes are those of its C++ block keys
(``v1_block_key``), so that a router that computes them itself finds them; those of requests with a ``cache_salt`` given
as text are not, for its number is BLAKE3's.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_vattn.cache.prefix import DEFAULT_PRIORITY
from trtllm_vattn.cache.prefix import events as prefix_events

MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True)
class UniqueToken:
    """A token id; the other one is for prompt tuning, whose requests are not reused."""

    token_id: int
    token_extra_id: int = 0


@dataclass(frozen=True)
class KVCacheStoredBlockData:
    """A block that can be reused from now on. `priority` is the default one, whatever the request asked for."""

    block_hash: int
    tokens: list[UniqueToken]
    lora_id: int | None = None
    cache_level: int = 0
    priority: int = DEFAULT_PRIORITY
    mm_keys: list[Any] = field(default_factory=list)
    cache_salt: str | None = None


@dataclass(frozen=True)
class KVCacheStoredData:
    """Blocks, one behind the other; `parent_hash` is of the block before them, None at the start of a sequence."""

    parent_hash: int | None
    blocks: list[KVCacheStoredBlockData]


@dataclass(frozen=True)
class KVCacheRemovedData:
    """Blocks that cannot be reused any more."""

    block_hashes: list[int]


@dataclass(frozen=True)
class KVCacheCreatedData:
    """The cache is there, of so many blocks on the GPU and in host memory."""

    num_blocks_per_cache_level: list[int]


Data = KVCacheCreatedData | KVCacheStoredData | KVCacheRemovedData


@dataclass(frozen=True)
class KVCacheEvent:
    """One event; ids count up without gaps."""

    event_id: int
    data: Data
    window_size: int
    attention_dp_rank: int | None = None


class EventBuffer:
    """Events until somebody takes them, from any thread; the oldest are dropped where there are too many.

    Parameters
    ----------
    room : int
        Events at most (``event_buffer_max_size``).
    window : int
        The attention window that they name: all tokens of a sequence.
    """

    def __init__(self, room: int, window: int) -> None:
        self._window = window
        self._events: deque[KVCacheEvent] = deque(maxlen=room)
        self._changed = threading.Condition()
        self._next_id = 0
        self._hashes: dict[int, int] = {}
        """TensorRT-LLM's hashes of the blocks that are stored, by the prefix tree's."""

    def create(self, blocks: int) -> None:
        """The cache has so many blocks."""
        self._add([KVCacheCreatedData([blocks, 0])])

    def add(self, events: Iterable[prefix_events.KVCacheEvent]) -> None:
        """Add what a prefix cache tells."""
        self._add([self._translate(event) for event in events])

    def _add(self, found: Sequence[Data]) -> None:
        with self._changed:
            for data in found:
                self._events.append(KVCacheEvent(self._next_id, data, self._window))
                self._next_id += 1
            if found:
                self._changed.notify_all()

    def take(self, timeout_ms: float | None) -> list[KVCacheEvent]:
        """Take all events; waits for one for so many milliseconds at most, None for as long as it takes."""
        with self._changed:
            self._changed.wait_for(lambda: self._events, None if timeout_ms is None else timeout_ms / 1e3)
            found = list(self._events)
            self._events.clear()
        return found

    def _translate(self, event: prefix_events.KVCacheEvent) -> KVCacheStoredData | KVCacheRemovedData:
        if isinstance(event, prefix_events.BlockStored):
            return self._stored(event)
        if isinstance(event, prefix_events.BlockRemoved):
            return KVCacheRemovedData([self._hashes.pop(each) for each in event.block_hashes])
        gone, self._hashes = list(self._hashes.values()), {}
        return KVCacheRemovedData(gone)

    def _stored(self, event: prefix_events.BlockStored) -> KVCacheStoredData:
        size, parent = event.block_size, event.parent_block_hash
        first = before = None if parent is None else self._hashes[parent]
        salt = next((part for part in (event.extra_keys or [None])[0] or () if isinstance(part, str)), None)
        kind, _, text = (salt or "").partition(":")
        blocks = []
        for index, block in enumerate(event.block_hashes):
            tokens = event.token_ids[index * size : (index + 1) * size]
            before = block_key_hash(tokens, before or 0, event.lora_id, _salt_id(kind, text))
            self._hashes[block] = before
            blocks.append(
                KVCacheStoredBlockData(
                    before,
                    [UniqueToken(token) for token in tokens],
                    event.lora_id,
                    cache_salt=text if kind == "str" else None,
                )
            )
        return KVCacheStoredData(first, blocks)


def _salt_id(kind: str, text: str) -> int | None:
    if not kind:
        return None
    return (
        int(text) if kind == "int" else int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    )


def block_key_hash(
    tokens: Sequence[int], parent: int = 0, lora_id: int | None = None, salt_id: int | None = None
) -> int:
    """TensorRT-LLM's hash of a block's key behind its parent's (0: none), as ``v1_block_key`` defines it."""
    seed = (len(tokens) ^ (parent * 0xBF58476D1CE4E5B9)) & MASK_64
    if salt_id is not None and not parent:
        seed = _mix_64(salt_id, seed)
    for token in tokens:
        value = token & MASK_32
        for _ in range(2):
            value = ((value >> 16) ^ value) * 0x45D9F3B & MASK_32
        seed = _combine((value >> 16) ^ value, seed, MASK_32)
    return seed if lora_id is None else _mix_64(lora_id, seed)


def _mix_64(value: int, seed: int) -> int:
    value &= MASK_64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK_64
    return _combine(value ^ (value >> 31), seed, MASK_64)


def _combine(value: int, seed: int, mask: int) -> int:
    """Boost's hash_combine; `mask` is of the value's own width, in which its sum with the constant wraps."""
    return seed ^ (((value + 0x9E3779B9) & mask) + (seed << 6) + (seed >> 2) & MASK_64)
