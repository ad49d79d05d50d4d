"""A stand-in of KVCacheManagerV2, as far as quotas go: where its quota comes from, and how its hook is called."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm._torch.pyexecutor.resource_manager import BaseResourceManager, KvCacheConfig, LlmRequest
from tensorrt_llm.version import MINOR

BYTES_PER_TOKEN = 100


@dataclass
class CacheTierConfig:
    quota: int


@dataclass
class KVCacheManagerConfig:
    tokens_per_block: int
    cache_tiers: list[CacheTierConfig]
    vocab_size: int | None = None
    layers: list[Any] = field(default_factory=list)


class Storage:
    """V2's implementation: resized between steps, when every sequence is suspended, or not at all."""

    def __init__(self, config: KVCacheManagerConfig) -> None:
        self._quotas = [tier.quota for tier in copy.deepcopy(config.cache_tiers)]
        self.active: set[int] = set()
        self.refuses = False

    def resize(self, cache_level: int, quota: int, best_efforts: bool = False) -> bool:
        assert not self.active, "all KV caches must be suspended"
        if self.refuses:
            return False
        self._quotas[cache_level] = quota
        return True

    def get_quota(self, cache_level: int) -> int:
        return self._quotas[cache_level]


class KVCacheManagerV2(BaseResourceManager):
    rounds_up = 0
    """Bytes by which a quota is more than asked for, where ranks agree on tokens."""

    def __init__(
        self,
        kv_cache_config: KvCacheConfig,
        kv_cache_type: Any,
        *,
        mapping: Any,
        tokens_per_block: int = 16,
        vocab_size: int | None = None,
        is_draft: bool = False,
        is_estimating_kv_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        self.mapping, self.is_draft, self.is_estimating_kv_cache = mapping, is_draft, is_estimating_kv_cache
        quotas = [kv_cache_config.max_gpu_total_bytes] if kv_cache_config.max_gpu_total_bytes else []
        if kv_cache_config.max_tokens is not None:
            quotas.append(kv_cache_config.max_tokens * BYTES_PER_TOKEN)
        assert quotas, "Quota not set. Check kv_cache_config.max_tokens or kv_cache_config.max_gpu_total_bytes"
        tiers = [CacheTierConfig(min(quotas) + type(self).rounds_up), CacheTierConfig(7)]
        if MINOR < 4:
            config = self._build_cache_config(
                kv_cache_config, tokens_per_block=tokens_per_block, vocab_size=vocab_size, cache_tiers=tiers
            )
        else:
            base = self._build_base_config(kv_cache_config, tokens_per_block=tokens_per_block, cache_tiers=tiers)
            config = self._build_cache_config(base)
        self.impl = Storage(config)
        self.kv_cache_map: dict[int, Any] = {}

    if MINOR < 4:

        def _build_cache_config(
            self, kv_cache_config: KvCacheConfig, *, tokens_per_block: int, vocab_size: Any, cache_tiers: Any
        ) -> KVCacheManagerConfig:
            return KVCacheManagerConfig(tokens_per_block, cache_tiers, vocab_size)

    else:

        def _build_base_config(
            self, kv_cache_config: KvCacheConfig, *, tokens_per_block: int, cache_tiers: Any
        ) -> KVCacheManagerConfig:
            return KVCacheManagerConfig(tokens_per_block, cache_tiers)

        def _build_cache_config(self, config: KVCacheManagerConfig) -> KVCacheManagerConfig:
            return config

    def is_request_active(self, request_id: int) -> bool:
        return request_id in self.impl.active

    def get_max_resource_count(self) -> int:
        return 1

    def get_needed_resource_to_completion(self, request: LlmRequest) -> int:
        return 0

    def shutdown(self) -> None:
        self.impl.active.clear()
