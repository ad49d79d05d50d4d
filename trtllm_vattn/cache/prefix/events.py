"""What routers are told about the blocks that a prefix tree holds, in the words of vLLM's KV events.

Field names and their meaning are those of vLLM 0.26 (vllm/distributed/kv_events.py); `as_dict` gives what msgspec would
encode there, with the event's name under ``type``. A router that reads vLLM's events can read these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MEDIUM_GPU = "GPU"


@dataclass(frozen=True)
class KVCacheEvent:
    """One change of what can be reused."""

    def as_dict(self) -> dict[str, Any]:
        """The event's name under ``type``, then its fields."""
        return {"type": type(self).__name__, **{each.name: getattr(self, each.name) for each in fields(self)}}


@dataclass(frozen=True)
class BlockStored(KVCacheEvent):
    """Blocks that can be reused from now on, one behind the other.

    Attributes
    ----------
    block_hashes : list of int
        64 bits each; a block's hash covers all tokens before it and what else its KV depends on.
    parent_block_hash : int or None
        Of the block before the first; None at the beginning of a sequence.
    token_ids : list of int
        ``block_size`` for each block.
    extra_keys : list of tuple or None
        One for each block: what its hash covers beside tokens, where that is anything.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = MEDIUM_GPU
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None


@dataclass(frozen=True)
class BlockRemoved(KVCacheEvent):
    """Blocks that cannot be reused any more."""

    block_hashes: list[int]
    medium: str | None = MEDIUM_GPU


@dataclass(frozen=True)
class AllBlocksCleared(KVCacheEvent):
    """No block can be reused."""
