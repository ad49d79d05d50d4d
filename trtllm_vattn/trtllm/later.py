"""What only later versions of `KVCacheManager` have; each part is mixed in where the installed class has it."""

from __future__ import annotations

from typing import Any

from trtllm_vattn.trtllm.adapter import Adapter
from trtllm_vattn.trtllm.features import UnsupportedFeature


class BlockBudget(Adapter):
    """Since 1.4 a request that can never fit is refused when it comes, but only the stock class itself answers whether
    it fits; its estimate, a block for every token, is true for ours too."""

    def kv_block_budget_applies(self) -> bool:
        """Whether the estimate is made: for attention's K and V, which is what we keep."""
        return str(getattr(self.kv_cache_type, "name", self.kv_cache_type)).rpartition(".")[2] == "SELF"

    def get_request_kv_block_budget(self, request: Any) -> tuple[int, int] | None:
        """Blocks that a request needs to its end, and those that the budget backs."""
        found = super().get_request_kv_block_budget(request)
        if found is None or self._vattn_target is None:
            return found  # type: ignore[no-any-return]
        return found[0], min(self._vattn_total, self._vattn_pages.blocks_in(self._vattn_target))


class PoolIndices(Adapter):
    """Since 1.3 KV connectors and transfers ask where in the C++ pool a block is."""

    def get_memory_pool_block_indices(self, block_ids: list[int], *, window_size: int) -> None:
        """Refused: our blocks are not in that pool."""
        raise UnsupportedFeature(
            "places in the C++ pool are not supported by the fixed-address KV cache; run without trtllm-vattn"
        )


LATER: dict[type, str] = {
    BlockBudget: "get_request_kv_block_budget",
    PoolIndices: "get_memory_pool_block_indices",
}
"""Parts, and the method whose presence asks for each."""
