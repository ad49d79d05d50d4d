"""What of the C++ side the Python side sees: enumerators, and a block manager that keeps books and touches nothing."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
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


class KVCacheManagerCpp(Watched):
    """Accounts blocks by sequence; raises where there is none, as the C++ one does."""

    pool_bytes_allocated = 0

    def __init__(self, **named: Any) -> None:
        (self._blocks, _secondary), *others = named["blocks_per_window"].values()
        if others or named["kv_connector_manager"] is not None:
            raise RuntimeError("this stand-in has one window and no connector")
        self._reuse = named["enable_block_reuse"]
        self._tokens_per_block = named["tokens_per_block"]
        self._heads, self._head_dim = named["num_kv_heads_per_layer"], named["size_per_head"]
        self.max_blocks_per_seq = -(-named["max_sequence_length"] // self._tokens_per_block)
        self.num_pools, self.max_num_blocks, self.cross_kv = 1, self._blocks, False
        self._free = list(range(self._blocks))
        self._tokens: dict[int, int] = {}
        self._ids: dict[int, list[int]] = {}

    def allocate_pools(self, use_uvm: bool) -> None:
        each = 2 * self._tokens_per_block * self._head_dim * sum(self._heads) * 2
        type(self).pool_bytes_allocated = self._blocks * each

    def release_pools(self) -> None:
        type(self).pool_bytes_allocated = 0

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

    def add_sequence(self, number: int, tokens: int, beam_width: int, request: Any) -> None:
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
        return KvCacheStats(self._blocks, free, self._blocks - free, self._tokens_per_block)

    def sync_transfer_manager_with_buffer_manager(self) -> None: ...

    def refresh_blocks(self) -> None: ...

    def store_context_blocks(self, request: Any) -> None: ...
