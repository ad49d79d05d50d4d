"""Stand-ins of the resource managers."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from tensorrt_llm.bindings import CacheType as CacheTypeCpp
from tensorrt_llm.bindings import DataType, KVCacheManagerCpp, LlmRequestState
from tensorrt_llm.bindings import PoolConfiguration as PoolConfigurationCpp
from tensorrt_llm.version import MINOR
from tensorrt_llm.watched import Watched

ResourceManagerType = enum.Enum(
    "ResourceManagerType", "KV_CACHE_MANAGER DRAFT_KV_CACHE_MANAGER CROSS_KV_CACHE_MANAGER SEQ_SLOT_MANAGER"
)


@dataclass
class KvCacheConfig:
    """The fields that managers read; `model_fields_set` names those that a user has set, as pydantic's does."""

    max_tokens: int | None = None
    free_gpu_memory_fraction: float | None = None
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    host_cache_size: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    event_buffer_max_size: int = 0
    max_gpu_total_bytes: int = 0
    max_util_for_resume: float = 1.0
    model_fields_set: set[str] = field(default_factory=set)


@dataclass
class Mapping:
    world_size: int = 1
    cp_size: int = 1
    pp_size: int = 1
    enable_attention_dp: bool = False


class LlmRequest(Watched):
    """A request as schedulers and managers see it; without tokens it has some that no other one has."""

    lora_task_id: int | None = None
    cache_salt_id: int | None = None
    py_multimodal_data: Any = None
    py_return_context_logits = False

    def __init__(self, number: int, prompt_len: int, max_new_tokens: int, tokens: list[int] | None = None) -> None:
        self.py_request_id, self.prompt_len, self.max_new_tokens = number, prompt_len, max_new_tokens
        self.has_content = tokens is not None
        self.tokens = list(tokens) if tokens is not None else [number * 100_000 + i for i in range(prompt_len)]
        self.orig_prompt_len = prompt_len
        self.context_current_position = self.prepopulated_prompt_len = 0
        self.context_chunk_size = prompt_len
        self.is_dummy = False
        self.state = LlmRequestState.CONTEXT_INIT
        self.py_rewind_len = self.py_num_accepted_draft_tokens = 0
        self.py_beam_width = 1
        self.draft_tokens = 0
        self.generated = 0

    @property
    def is_first_context_chunk(self) -> bool:
        return self.context_current_position == (self.prepopulated_prompt_len if MINOR >= 3 else 0)

    @is_first_context_chunk.setter
    def is_first_context_chunk(self, value: bool) -> None:
        """False says that the prompt is through, True that the request begins again, as one that was paused does."""
        self.context_current_position = 0 if value else self.prompt_len
        if value:
            self.prepopulated_prompt_len, self.context_chunk_size = 0, self.prompt_len

    @property
    def context_remaining_length(self) -> int:
        return self.prompt_len - self.context_current_position

    def get_tokens(self, beam: int) -> list[int]:
        return self.tokens

    def get_num_tokens(self, beam: int) -> int:
        return len(self.tokens)

    def move_to_next_context_chunk(self) -> None:
        self.context_current_position += self.context_chunk_size
        self.context_chunk_size = 0


if MINOR >= 3:

    def _set_prepopulated_prompt_len(request: LlmRequest, length: int, tokens_per_block: int) -> None:
        """As the C++ one: moves the window of the chunk, which ends with a block unless it is the last."""
        assert length < request.prompt_len
        request.prepopulated_prompt_len = length
        if length > 0:
            chunk = request.context_chunk_size
            if length + chunk < request.prompt_len:
                chunk = (length + chunk) // tokens_per_block * tokens_per_block - length
            request.context_current_position = length
            request.context_chunk_size = min(chunk, request.prompt_len - length)

    LlmRequest.set_prepopulated_prompt_len = _set_prepopulated_prompt_len


class ScheduledRequests(Watched):
    def __init__(self, context: list[LlmRequest], generation: list[LlmRequest]) -> None:
        self.context_requests, self.generation_requests = context, generation

    def reset_context_requests(self, requests: list[LlmRequest] | None = None) -> None:
        self.context_requests = list(self.context_requests if requests is None else requests)

    def all_requests(self) -> list[LlmRequest]:
        return self.context_requests + self.generation_requests


SETTLED = (LlmRequestState.GENERATION_COMPLETE, LlmRequestState.CONTEXT_INIT)
"""Ended, or paused with its blocks freed while its last step was in flight."""


def get_draft_token_length(request: LlmRequest) -> int:
    return request.draft_tokens


class BaseResourceManager(ABC):
    @abstractmethod
    def get_max_resource_count(self) -> int: ...

    @abstractmethod
    def get_needed_resource_to_completion(self, request: LlmRequest) -> int: ...


@dataclass
class PoolConfiguration:
    """Of one pool, on the Python side."""

    window_size: int
    head_dim: int
    dtype: Any


class _Manager1_2(Watched, BaseResourceManager):
    """The Python shell over the C++ manager; `stock_blocks` is what the card's free memory would give,
    `other_ranks_blocks` what other ranks say of theirs."""

    stock_blocks = 40
    other_ranks_blocks = 1 << 30

    def __init__(
        self,
        kv_cache_config: KvCacheConfig,
        kv_cache_type: CacheTypeCpp,
        *,
        num_layers: int,
        num_kv_heads: int | list[int],
        head_dim: int,
        tokens_per_block: int,
        max_seq_len: int,
        max_batch_size: int,
        mapping: Mapping,
        dtype: DataType = DataType.HALF,
        spec_config: Any = None,
        layer_mask: Any = None,
        max_num_tokens: int = 8192,
        model_config: Any = None,
        max_beam_width: int = 1,
        is_draft: bool = False,
        kv_connector_manager: Any = None,
        enable_indexer_k_cache: bool = False,
        indexer_k_cache_quant_block_size: int = 128,
        indexer_k_cache_index_head_dim: int = 0,
        is_estimating_kv_cache: bool = False,
        execution_stream: Any = None,
        **kwargs: Any,
    ) -> None:
        self.mapping, self.dtype, self.kv_cache_type = mapping, dtype, kv_cache_type
        self.pp_layers, self.num_layers, self.num_local_layers = list(range(num_layers)), num_layers, num_layers
        self.layer_offsets = {layer: layer for layer in range(num_layers)}
        heads = [num_kv_heads] * num_layers if isinstance(num_kv_heads, int) else list(num_kv_heads)
        self.num_kv_heads, self.num_kv_heads_per_layer, self.head_dim = num_kv_heads, heads, head_dim
        self.tokens_per_block, self.max_seq_len, self.max_batch_size = tokens_per_block, max_seq_len, max_batch_size
        self.kv_factor = 1 if kv_cache_type is CacheTypeCpp.SELFKONLY else 2
        self.num_extra_kv_tokens = getattr(spec_config, "extra_kv_tokens", 0)
        self._take_draft_lengths(spec_config)
        self.max_attention_window_vec = self._windows(max_seq_len)
        self.is_draft, self.kv_connector_manager = is_draft, kv_connector_manager
        if is_estimating_kv_cache:
            self.blocks_in_primary_pool, self.blocks_in_secondary_pool = (
                kv_cache_config.max_tokens // tokens_per_block,
                0,
            )
        else:
            self.blocks_in_primary_pool, self.blocks_in_secondary_pool = self.calculate_max_num_blocks(
                kv_cache_config=kv_cache_config,
                head_dim=head_dim,
                tokens_per_block=tokens_per_block,
                mapping=mapping,
                dtype=dtype,
                kv_factor=self.kv_factor,
                **self._more_for_sizing(),
            )
        self.impl = KVCacheManagerCpp(
            **self._more_for_cpp(kwargs),
            max_attention_window_vec=self.max_attention_window_vec,
            num_kv_heads_per_layer=heads,
            size_per_head=head_dim,
            tokens_per_block=tokens_per_block,
            blocks_per_window={max_seq_len: (self.blocks_in_primary_pool, self.blocks_in_secondary_pool)},
            max_num_sequences=max_batch_size,
            max_beam_width=max_beam_width,
            max_sequence_length=max_seq_len,
            enable_block_reuse=kv_cache_config.enable_block_reuse,
            kv_connector_manager=kv_connector_manager,
            dtype=dtype,
        )
        self.impl.allocate_pools(False)
        self.kv_cache_pool_pointers = self.impl.get_block_pool_pointers()
        self.kv_cache_pool_mapping = self.impl.get_layer_to_pool_mapping()
        self.num_pools, self.max_blocks_per_seq = self.impl.num_pools, self.impl.max_blocks_per_seq
        self.enable_block_reuse = kv_cache_config.enable_block_reuse
        self.enable_partial_reuse = kv_cache_config.enable_partial_reuse
        self.host_kv_cache_block_offsets = torch.empty(
            (self.num_pools, max_batch_size * max_beam_width, 2, self.max_blocks_per_seq), dtype=torch.int32
        )

        self.event_buffer_max_size = kv_cache_config.event_buffer_max_size
        if self.event_buffer_max_size:
            raise RuntimeError("this stand-in has no event manager")

    def reset_reuse_state(self) -> None: ...

    def flush_iteration_events(self) -> None: ...

    def get_latest_events(self, timeout_ms: float | None = 0) -> list[Any]:
        return []

    def _take_draft_lengths(self, spec_config: Any) -> None:
        self.max_total_draft_tokens = spec_config.max_total_draft_tokens if spec_config else 0

    def _windows(self, max_seq_len: int) -> list[int]:
        return [max_seq_len]

    def _more_for_cpp(self, more: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _more_for_sizing(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> None:
        self.impl.release_pools()

    def calculate_max_num_blocks(
        self, kv_cache_config: Any, head_dim: int, tokens_per_block: int, mapping: Any, dtype: Any, kv_factor: int = 2
    ) -> tuple[int, int]:
        blocks = type(self).stock_blocks
        if kv_cache_config.max_tokens is not None:
            blocks = kv_cache_config.max_tokens // tokens_per_block
            if kv_cache_config.free_gpu_memory_fraction is not None:
                blocks = min(blocks, type(self).stock_blocks)
        if mapping.world_size > 1:
            blocks = min(blocks, type(self).other_ranks_blocks)
        return blocks, 0

    def get_cache_bytes_per_token(self) -> int:
        return self.kv_factor * sum(self.num_kv_heads_per_layer) * self.head_dim * 4

    def get_max_resource_count(self) -> int:
        return self.impl.max_num_blocks

    def _grow(self, number: int, tokens: int) -> None:
        for _ in range(tokens):
            self.impl.add_token(number)

    def get_needed_resource_to_completion(self, request: LlmRequest) -> int:
        return -(-(request.orig_prompt_len + request.max_new_tokens) // self.tokens_per_block)

    def prepare_resources(self, scheduled_batch: ScheduledRequests) -> None:
        self.impl.sync_transfer_manager_with_buffer_manager()
        for request in scheduled_batch.context_requests:
            if request.is_first_context_chunk:
                self.impl.add_sequence(request.py_request_id, request.prompt_len, 1, request)
                self._grow(request.py_request_id, self.num_extra_kv_tokens + get_draft_token_length(request))
        for request in scheduled_batch.generation_requests:
            self._grow(request.py_request_id, 1 + get_draft_token_length(request))
        self.impl.refresh_blocks()

    def add_dummy_requests(
        self,
        request_ids: list[int],
        token_nums: list[int] | None = None,
        is_gen: bool = False,
        prepare_resource: bool = True,
        max_num_draft_tokens: int = 0,
        use_mrope: bool = False,
        max_beam_width: int = 1,
        num_extra_decoding_steps: int = 0,
        draft_kv_cache_manager: Any = None,
    ) -> list[LlmRequest] | None:
        if self.get_num_free_blocks() < 1:
            return None
        made = []
        for i, number in enumerate(request_ids):
            tokens = token_nums[i] if token_nums is not None else 1 + max_num_draft_tokens
            request = LlmRequest(number, tokens - 1 if is_gen else tokens, 1)
            request.is_dummy = True
            if prepare_resource:
                self.impl.add_sequence(number, tokens, 1, request)
                extra = self.num_extra_kv_tokens + num_extra_decoding_steps + (max_num_draft_tokens if is_gen else 0)
                self._grow(number, extra)
            made.append(request)
        return made

    def update_resources(
        self, scheduled_batch: ScheduledRequests, attn_metadata: Any = None, kv_cache_dtype_byte_size: Any = None
    ) -> None:
        for request in scheduled_batch.generation_requests:
            if request.state not in SETTLED and request.py_rewind_len > 0:
                self.rewind_kv_cache(request, request.py_rewind_len)
        for request in scheduled_batch.context_requests:
            self.impl.store_context_blocks(request)

    def rewind_kv_cache(self, request: LlmRequest, rewind_len: int) -> None:
        self.impl.rewind_kv_cache(request.py_request_id, rewind_len)

    def free_resources(self, request: LlmRequest, pin_on_release: bool = False) -> None:
        self.impl.remove_sequence(request.py_request_id, request, pin_on_release)

    def store_blocks_for_reuse(self, request: LlmRequest, pin_blocks: bool = False) -> None: ...

    def pin_blocks(self, request_id: int) -> None: ...

    def get_last_block_id(self, request_id: int) -> int:
        return 0

    def get_unique_primary_pool(self) -> torch.Tensor:
        return torch.empty(0)

    def get_cache_indices(self, request: LlmRequest, window_size: int | None = None) -> list[int]:
        return self.impl.get_cache_block_ids(request.py_request_id, self.max_seq_len)[0]

    def get_batch_cache_indices(self, request_ids: list[int], layer_idx: int | None = None) -> list[list[int]]:
        return [each[0] for each in self.impl.get_batch_cache_block_ids(request_ids, self.max_seq_len)]

    def get_num_free_blocks(self) -> int:
        return self.impl.get_kv_cache_stats().free_num_blocks

    def get_num_available_tokens(self, max_num_draft_tokens: int = 0, **kwargs: Any) -> int:
        return self.get_num_free_blocks() * self.tokens_per_block - self.num_extra_kv_tokens - max_num_draft_tokens

    def get_buffers(self, layer_idx: int, kv_layout: str = "NHD") -> torch.Tensor:
        raise RuntimeError("the stock pool is not to be touched")

    def check_invalid_values_in_kv_cache(self, fill_with_zero: bool = False) -> bool:
        raise RuntimeError("the stock pool is not to be touched")

    def get_kv_cache_stats(self) -> Any:
        return self.impl.get_kv_cache_stats()

    def copy_batch_block_offsets(
        self, dst_tensor: torch.Tensor, request_ids: list[int], beam_width: int, num_context: int, num_seqs: int
    ) -> None:
        raise RuntimeError("the stock tables are not to be used")


class _Manager1_3(_Manager1_2):
    """Reserves the most draft tokens at every step and rewinds the rest; begins sequences in batches; pools may have
    head sizes of their own."""

    def __init__(
        self,
        kv_cache_config: KvCacheConfig,
        kv_cache_type: CacheTypeCpp,
        *,
        num_layers: int,
        num_kv_heads: int | list[int],
        head_dim: int,
        tokens_per_block: int,
        max_seq_len: int,
        max_batch_size: int,
        mapping: Mapping,
        dtype: DataType = DataType.HALF,
        spec_config: Any = None,
        layer_mask: Any = None,
        max_num_tokens: int = 8192,
        model_config: Any = None,
        max_beam_width: int = 1,
        is_draft: bool = False,
        kv_connector_manager: Any = None,
        enable_indexer_k_cache: bool = False,
        indexer_k_cache_quant_block_size: int = 128,
        indexer_k_cache_index_head_dim: int = 0,
        indexer_k_cache_use_fp4: bool = False,
        is_estimating_kv_cache: bool = False,
        execution_stream: Any = None,
        linear_attention_metadata: Any = None,
        pool_configurations: list[PoolConfiguration] | None = None,
        **kwargs: Any,
    ) -> None:
        if layer_mask is not None:
            assert sum(layer_mask) == num_layers
        self.pool_configurations = list(pool_configurations or [])
        super().__init__(
            kv_cache_config,
            kv_cache_type,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            tokens_per_block=tokens_per_block,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            mapping=mapping,
            dtype=dtype,
            spec_config=spec_config,
            is_draft=is_draft,
            is_estimating_kv_cache=is_estimating_kv_cache,
        )

    def _take_draft_lengths(self, spec_config: Any) -> None:
        self.max_total_draft_tokens = self._kv_reserve_draft_tokens = (
            spec_config.tokens_per_gen_step - 1 if spec_config else 0
        )

    def _more_for_cpp(self, more: dict[str, Any]) -> dict[str, Any]:
        pools = [
            PoolConfigurationCpp(window_size=each.window_size, size_per_head=each.head_dim, dtype=each.dtype)
            for each in self.pool_configurations
        ]
        return {"pool_configurations": pools}

    def _begin(self, requests: list[tuple[LlmRequest, int]]) -> None:
        if requests:
            self.impl.add_sequence_batch(
                [(request.py_request_id, tokens, request.py_beam_width) for request, tokens in requests],
                [request for request, _ in requests],
            )

    def _begins(self, request: LlmRequest) -> bool:
        return request.is_first_context_chunk

    def prepare_resources(self, scheduled_batch: ScheduledRequests) -> None:
        self.impl.sync_transfer_manager_with_buffer_manager()
        beginning = [request for request in scheduled_batch.context_requests if self._begins(request)]
        self._begin([(request, request.prompt_len) for request in beginning])
        for request in beginning:
            self._grow(request.py_request_id, self.num_extra_kv_tokens + get_draft_token_length(request))
        for request in scheduled_batch.generation_requests:
            self._grow(request.py_request_id, 1 + max(get_draft_token_length(request), self._kv_reserve_draft_tokens))
        self.impl.refresh_blocks()
        scheduled_batch.reset_context_requests()

    def update_resources(
        self, scheduled_batch: ScheduledRequests, attn_metadata: Any = None, kv_cache_dtype_byte_size: Any = None
    ) -> None:
        for request in scheduled_batch.generation_requests:
            if request.state in SETTLED:
                continue
            if request.py_rewind_len > 0:
                self.rewind_kv_cache(request, request.py_rewind_len)
            drafted = request.py_rewind_len + request.py_num_accepted_draft_tokens
            if self._kv_reserve_draft_tokens > drafted:
                self.rewind_kv_cache(request, self._kv_reserve_draft_tokens - drafted)
        for request in scheduled_batch.context_requests:
            self.impl.store_context_blocks(request)

    def add_dummy_requests(
        self,
        request_ids: list[int],
        token_nums: list[int] | None = None,
        is_gen: bool = False,
        prepare_resource: bool = True,
        max_num_draft_tokens: int = 0,
        kv_reserve_draft_tokens: int | None = None,
        use_mrope: bool = False,
        max_beam_width: int = 1,
        encoder_output_lens: list[int] | None = None,
        num_extra_decoding_steps: int = 0,
        draft_kv_cache_manager: Any = None,
    ) -> list[LlmRequest] | None:
        if self.get_num_free_blocks() < 1:
            return None
        lengths = token_nums or [1 + max_num_draft_tokens] * len(request_ids)
        made = [LlmRequest(number, tokens, 1) for number, tokens in zip(request_ids, lengths, strict=True)]
        reserved = max_num_draft_tokens if kv_reserve_draft_tokens is None else kv_reserve_draft_tokens
        if prepare_resource:
            self._begin(list(zip(made, lengths, strict=True)))
        for request, tokens in zip(made, lengths, strict=True):
            request.is_dummy = True
            self._grow(
                request.py_request_id, self.num_extra_kv_tokens + num_extra_decoding_steps if prepare_resource else 0
            )
            if is_gen:
                request.state, request.prompt_len = LlmRequestState.GENERATION_IN_PROGRESS, tokens - 1
                self._grow(request.py_request_id, reserved if prepare_resource else 0)
        return made

    def probe_prefix_match_length(
        self, input_tokens: list[int], lora_task_id: int | None = None, cache_salt: str | None = None
    ) -> int:
        raise RuntimeError("the stock prefix tree is not to be asked")

    def get_num_tokens(self, request: LlmRequest) -> int:
        return self.impl.get_token_count(request.py_request_id)

    def get_batch_cache_indices(
        self,
        request_ids: list[int],
        layer_idx: int | None = None,
        window_size: int | None = None,
        beam_width: int | None = 1,
        num_blocks_per_seq: Any = None,
    ) -> list[list[int]]:
        found = [each[0] for each in self.impl.get_batch_cache_block_ids(request_ids, self.max_seq_len)]
        if num_blocks_per_seq is None:
            return found
        return [ids[:count] for ids, count in zip(found, num_blocks_per_seq, strict=True)]

    def get_batch_cache_indices_flat(
        self, request_ids: list[int], num_blocks: list[int], layer_idx: int | None = None
    ) -> torch.Tensor:
        found = self.get_batch_cache_indices(request_ids, layer_idx=layer_idx, num_blocks_per_seq=num_blocks)
        return torch.tensor([each for ids in found for each in ids], dtype=torch.int32)

    def get_memory_pool_block_indices(self, block_ids: list[int], *, window_size: int) -> list[int]:
        raise RuntimeError("the stock pool is not to be touched")

    def get_num_available_tokens(self, token_num_upper_bound: int, max_num_draft_tokens: int = 0, **kwargs: Any) -> int:
        free = self.get_num_free_blocks() * self.tokens_per_block
        return min(token_num_upper_bound, free - self.num_extra_kv_tokens - max_num_draft_tokens)


class _Manager1_4(_Manager1_3):
    """Answers whether a request can ever fit, itself alone; knows its dummies; ranks agree on blocks afterwards."""

    def __init__(
        self,
        kv_cache_config: KvCacheConfig,
        kv_cache_type: CacheTypeCpp,
        *,
        num_layers: int,
        num_kv_heads: int | list[int],
        head_dim: int,
        tokens_per_block: int,
        max_seq_len: int,
        max_batch_size: int,
        mapping: Mapping,
        dtype: DataType = DataType.HALF,
        spec_config: Any = None,
        layer_mask: Any = None,
        max_num_tokens: int = 8192,
        model_config: Any = None,
        max_beam_width: int = 1,
        is_draft: bool = False,
        kv_connector_manager: Any = None,
        enable_indexer_k_cache: bool = False,
        indexer_k_cache_quant_block_size: int = 128,
        indexer_k_cache_index_head_dim: int = 0,
        indexer_k_cache_use_fp4: bool = False,
        indexer_k_cache_layer_mask: list[bool] | None = None,
        is_estimating_kv_cache: bool = False,
        execution_stream: Any = None,
        linear_attention_metadata: Any = None,
        pool_configurations: list[PoolConfiguration] | None = None,
        enable_chunked_prefill: bool = False,
        **kwargs: Any,
    ) -> None:
        self._preprepared_dummy_request_ids: set[int] = set()
        self.is_estimating_kv_cache = is_estimating_kv_cache
        super().__init__(
            kv_cache_config,
            kv_cache_type,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            tokens_per_block=tokens_per_block,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            mapping=mapping,
            dtype=dtype,
            spec_config=spec_config,
            layer_mask=layer_mask,
            is_draft=is_draft,
            is_estimating_kv_cache=is_estimating_kv_cache,
            pool_configurations=pool_configurations,
        )

    def _windows(self, max_seq_len: int) -> list[int]:
        return [max_seq_len] * self.num_local_layers

    def _more_for_sizing(self) -> dict[str, Any]:
        return {"synchronize_across_ranks": False}

    def calculate_max_num_blocks(
        self,
        kv_cache_config: Any,
        head_dim: int,
        tokens_per_block: int,
        mapping: Any,
        dtype: Any,
        kv_factor: int = 2,
        synchronize_across_ranks: bool = True,
    ) -> tuple[int, int]:
        alone = mapping if synchronize_across_ranks else Mapping()
        return super().calculate_max_num_blocks(kv_cache_config, head_dim, tokens_per_block, alone, dtype, kv_factor)

    def kv_block_budget_applies(self) -> bool:
        return type(self) is KVCacheManager

    def get_request_kv_block_budget(self, request: LlmRequest) -> tuple[int, int] | None:
        if not self.kv_block_budget_applies():
            return None
        tokens = request.orig_prompt_len + request.max_new_tokens + self._kv_reserve_draft_tokens
        return -(-tokens // self.tokens_per_block), self.blocks_in_primary_pool

    def _begins(self, request: LlmRequest) -> bool:
        return request.is_first_context_chunk and request.py_request_id not in self._preprepared_dummy_request_ids

    def add_dummy_requests(
        self,
        request_ids: list[int],
        token_nums: list[int] | None = None,
        is_gen: bool = False,
        prepare_resource: bool = True,
        max_num_draft_tokens: int = 0,
        kv_reserve_draft_tokens: int | None = None,
        use_mrope: bool = False,
        max_beam_width: int = 1,
        encoder_output_lens: list[int] | None = None,
        draft_kv_cache_manager: Any = None,
        capture_sampling_params: Any = None,
    ) -> list[LlmRequest] | None:
        made = super().add_dummy_requests(
            request_ids, token_nums, is_gen, prepare_resource, max_num_draft_tokens, kv_reserve_draft_tokens
        )
        if made is not None and prepare_resource:
            self._preprepared_dummy_request_ids.update(request_ids)
        return made

    def free_resources(self, request: LlmRequest, pin_on_release: bool = False) -> None:
        super().free_resources(request, pin_on_release)
        self._preprepared_dummy_request_ids.discard(request.py_request_id)


KVCacheManager = {2: _Manager1_2, 3: _Manager1_3, 4: _Manager1_4}.get(MINOR, _Manager1_4)
KVCacheManager.__name__ = KVCacheManager.__qualname__ = "KVCacheManager"
