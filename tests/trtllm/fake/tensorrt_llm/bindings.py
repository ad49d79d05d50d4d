"""What of the C++ side the Python side sees: enumerators, and a block manager that counts and touches no memory."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from tensorrt_llm.version import MINOR
from tensorrt_llm.watched import Watched

NoFreeBlocks = RuntimeError
DataType = enum.Enum("DataType", "HALF BF16 FLOAT FP8 NVFP4 INT8")
CacheType = enum.Enum("CacheType", "SELF SELFKONLY CROSS")
LlmRequestState = enum.Enum("LlmRequestState", "CONTEXT_INIT GENERATION_IN_PROGRESS GENERATION_COMPLETE")


@dataclass
class KvCacheStats:
    max_num_blocks: int
    free_num_blocks: int
    used_num_blocks: int
    tokens_per_block: int
    allocated_bytes: int = 0
    reused_blocks: int = 0
    missed_blocks: int = 0


@dataclass
class PoolConfiguration:
    """Of one pool, on the C++ side."""

    window_size: int
    size_per_head: int
    dtype: Any


class _Books(Watched):
    """Accounts blocks by sequence; raises where there is none, as the C++ one does."""

    pool_bytes_allocated = 0

    def __init__(self, **named: Any) -> None:
        (self._blocks, _secondary), *others = named["blocks_per_window"].values()
        if others or named["kv_connector_manager"] is not None:
            raise RuntimeError("this stand-in has one window and no connector")
        self._reuse = named["enable_block_reuse"]
        self._tokens_per_block = named["tokens_per_block"]
        self._heads, self._head_dim = named["num_kv_heads_per_layer"], named["size_per_head"]
        self.pool_configurations = named.get("pool_configurations") or []
        if len(named["max_attention_window_vec"]) > len(self._heads):
            raise RuntimeError("more windows than layers")
        self.max_blocks_per_seq = -(-named["max_sequence_length"] // self._tokens_per_block)
        self.num_pools, self.max_num_blocks, self.cross_kv = 1, self._blocks, False
        self._free = list(range(self._blocks))
        self._tokens: dict[int, int] = {}
        self._ids: dict[int, list[int]] = {}

    def allocate_pools(self, use_uvm: bool) -> None:
        # A pool's own configuration goes before the manager's.
        head_dim = self.pool_configurations[0].size_per_head if self.pool_configurations else self._head_dim
        each = 2 * self._tokens_per_block * head_dim * sum(self._heads) * 2
        _Books.pool_bytes_allocated = self._blocks * each

    def release_pools(self) -> None:
        _Books.pool_bytes_allocated = 0

    def get_block_pool_pointers(self) -> torch.Tensor:
        return torch.tensor([[0xDEAD000, 0]], dtype=torch.int64)

    def get_block_scale_pool_pointers(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    def get_layer_to_pool_mapping(self) -> torch.Tensor:
        return torch.tensor([[0, layer] for layer in range(len(self._heads))], dtype=torch.int32)

    def _fit(self, number: int, tokens: int) -> None:
        ids = self._ids[number]
        wanted = -(-tokens // self._tokens_per_block)
        if wanted > self.max_blocks_per_seq:
            raise RuntimeError(f"sequence {number} of {tokens} tokens is too long")
        while len(ids) < wanted:
            if not self._free:
                raise NoFreeBlocks(f"no free block for sequence {number}")
            ids.append(self._free.pop())
        while len(ids) > wanted:
            self._free.append(ids.pop())
        self._tokens[number] = tokens

    def _begin(self, number: int, tokens: int) -> None:
        if self._reuse:
            raise RuntimeError("this stand-in shares no blocks; reuse must be off")
        if number in self._ids:
            raise RuntimeError(f"sequence {number} is there already")
        self._ids[number] = []
        try:
            self._fit(number, tokens)
        except RuntimeError:
            self._free += self._ids.pop(number)
            raise

    def add_token(self, number: int) -> None:
        self._fit(number, self._tokens[number] + 1)

    def rewind_kv_cache(self, number: int, tokens: int) -> None:
        self._fit(number, self._tokens[number] - tokens)

    def remove_sequence(self, number: int, request: Any, pin_on_release: bool) -> None:
        self._free += self._ids.pop(number, [])
        self._tokens.pop(number, None)

    def get_batch_cache_block_ids(self, numbers: list[int], window: int) -> list[list[list[int]]]:
        return [[list(self._ids[number])] for number in numbers]

    def get_cache_block_ids(self, number: int, window: int) -> list[list[int]]:
        return [list(self._ids[number])]

    def get_kv_cache_stats(self) -> KvCacheStats:
        free = len(self._free)
        return KvCacheStats(
            self._blocks, free, self._blocks - free, self._tokens_per_block, _Books.pool_bytes_allocated
        )

    def sync_transfer_manager_with_buffer_manager(self) -> None: ...

    def refresh_blocks(self) -> None: ...

    def store_context_blocks(self, request: Any) -> None: ...


class _Books1_2(_Books):
    def add_sequence(self, number: int, tokens: int, beam_width: int, request: Any) -> None:
        self._begin(number, tokens)


class _Books1_3(_Books):
    """Sequences begin in batches, and their tokens can be asked for."""

    def add_sequence_batch(self, infos: list[tuple[int, int, int]], requests: list[Any]) -> None:
        for number, tokens, _beam_width in infos:
            self._begin(number, tokens)

    def get_token_count(self, number: int) -> int:
        return self._tokens[number]


KVCacheManagerCpp = _Books1_2 if MINOR < 3 else _Books1_3
