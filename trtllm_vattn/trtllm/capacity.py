"""How much there is: answers that are true for pages, and a budget that may change while requests run."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm.adapter import Adapter
from trtllm_vattn.trtllm.ballast import Ballast
from trtllm_vattn.trtllm.stats import TrueStats

logger = logging.getLogger(__name__)


class Capacity(Adapter):
    """Ballast, statistics, and the budget."""

    def calculate_max_num_blocks(self, *arguments: Any, **named: Any) -> tuple[int, int]:
        """Blocks of the books: as many as requests can have, or the card can hold; and room for warm-up's dummies."""
        self._vattn_sizing = (arguments, named)
        tokens = self.max_seq_len + self.num_extra_kv_tokens + self._vattn_draft_tokens + 1
        longest = math.ceil(tokens / self.tokens_per_block) + 1
        most = self.max_batch_size * longest
        if torch.cuda.is_available():
            memory = torch.cuda.mem_get_info()[1]
            most = min(most, memory // (self.get_cache_bytes_per_token() * self.tokens_per_block) + 1)
        return most + self.max_batch_size + 2 * longest, 0

    def _vattn_make_ballast(self) -> Ballast:
        return Ballast(self._vattn_take, super().free_resources, self.get_num_free_blocks, self.max_blocks_per_seq)

    def _vattn_take(self, number: int, blocks: int) -> Any:
        tokens = min(blocks * self.tokens_per_block, self.max_seq_len) - self.num_extra_kv_tokens
        made = super().add_dummy_requests([number], [max(1, tokens)])
        return made[0] if made else None

    @property
    def _vattn_dummy_blocks(self) -> int:
        return sum(self._vattn_dummies.values())

    @property
    def _vattn_promised(self) -> int:
        """Blocks that the scheduler has been told there are, free and in use."""
        return int(self._vattn_total - self._vattn_ballast.blocks - self._vattn_dummy_blocks)

    def get_max_resource_count(self) -> int:
        """Blocks that the budget backs."""
        return self._vattn_promised

    def get_kv_cache_stats(self) -> TrueStats:
        """The stock statistics without the blocks that stand for memory we do not have."""
        return TrueStats(super().get_kv_cache_stats(), self._vattn_ballast.blocks)

    # -- the budget ------------------------------------------------------------------------------------------------

    def _vattn_reserved(self) -> int:
        """Blocks that live requests may come to need of those promised, the ones that they have included."""
        more = math.ceil((self.num_extra_kv_tokens + self._vattn_draft_tokens) / self.tokens_per_block) + 1
        needed = sum(self.get_needed_resource_to_completion(live) + more for live in self._vattn_live.values())
        return int(min(needed, self._vattn_promised))

    def _vattn_at_least(self, budget: int) -> int:
        """`budget`, or what live requests' blocks take where that is more."""
        return max(budget, self._vattn_pages.bytes_of(self._vattn_reserved()) if self._vattn_live else 0)

    def _vattn_sync(self) -> None:
        """Have the C++ books show as free what the budget backs. On the executor's thread, between its steps."""
        if not self._vattn_sized or self._vattn_target is None:
            return
        pages = self._vattn_pages
        backed = max(pages.blocks_in(self._vattn_target), self._vattn_reserved())
        wanted = self._vattn_at_least(self._vattn_target)
        self._vattn_ballast.hold(self._vattn_total - backed - self._vattn_dummy_blocks)
        if pages.cache.arena.pool.budget > wanted:
            pages.approach(wanted)

    def vattn_check_budget(self, budget: int) -> None:
        """Raise ConfigError for less than one request of the longest kind needs."""
        pages = self._vattn_pages
        if pages.blocks_in(budget) < self.max_blocks_per_seq:
            raise ConfigError(
                f"a budget of {budget:,} bytes backs {pages.blocks_in(budget):,} blocks of {pages.block_bytes:,} "
                f"bytes, but one request of {self.max_seq_len:,} tokens needs {self.max_blocks_per_seq:,}: raise it to "
                f"{pages.bytes_of(self.max_blocks_per_seq):,}, or lower max_seq_len"
            )

    def vattn_size(self) -> None:
        """Once graphs are captured: set the budget, where none was given the one that TensorRT-LLM itself would take
        now. Until then dummies alone are served, which take no memory. Raises ConfigError for too small a budget."""
        pages = self._vattn_pages
        if self._vattn_target is None:
            most = min(self._vattn_ask(None), self._vattn_total) * pages.block_bytes
            self._vattn_target = min(most, self._vattn_cap or most)
        if getattr(self.mapping, "world_size", 1) > 1:
            # As many blocks on every rank, whatever a block takes there.
            self._vattn_target = pages.bytes_of(self._vattn_ask(pages.blocks_in(self._vattn_target)))
        self.vattn_check_budget(self._vattn_target)
        with self._vattn_lock:
            self._vattn_sized = True
            pages.approach(self._vattn_target)
            self._vattn_sync()

    def vattn_describe(self) -> str:
        """What is served, in a line."""
        cache = self._vattn_pages.cache
        return (
            f"KV cache at fixed addresses: {self.num_pools} pools, the first at "
            f"{cache.arena.reservations[0].base:#x}; {self._vattn_pages.max_requests} requests of "
            f"{cache.shape.max_seq_len} tokens in blocks of {self.tokens_per_block}; a budget of "
            f"{self._vattn_target:,} bytes"
        )

    def _vattn_ask(self, blocks: int | None) -> int:
        """Blocks that the stock class would have now, on the rank that has the fewest; of `blocks`, where given."""
        arguments, named = self._vattn_sizing
        if "synchronize_across_ranks" in named:
            # 1.4 has the manager itself agree afterwards, in its constructor; here nobody does.
            named = {**named, "synchronize_across_ranks": True}
        config = copy.copy(named["kv_cache_config"] if "kv_cache_config" in named else arguments[0])
        if blocks is not None:
            config.max_tokens, config.free_gpu_memory_fraction = blocks * self.tokens_per_block, None
        if "kv_cache_config" in named:
            found = super().calculate_max_num_blocks(*arguments, **{**named, "kv_cache_config": config})
        else:
            found = super().calculate_max_num_blocks(config, *arguments[1:], **named)
        return int(found[0])

    def vattn_set_budget(self, budget: int) -> int:
        """Raise or lower the bytes of physical memory, from any thread; returns the budget then in force.

        What nobody uses goes back at once. The scheduler learns of it when the next request ends, and requests that run
        keep what they may need to their end, so a lowered budget is approached as they end: under a scheduler that
        overcommits (MAX_UTILIZATION), when fewer run.
        Raises ConfigError for less than one request of the longest kind needs.
        """
        self.vattn_check_budget(budget)
        with self._vattn_lock:
            self._vattn_target = budget
            return self._vattn_pages.approach(self._vattn_at_least(budget))

    def vattn_release(self) -> int:
        """Give back all memory that live requests will not need; returns the bytes kept. The budget stays: requests
        that come take it again, or `vattn_resume` does."""
        with self._vattn_lock:
            return self._vattn_pages.approach(self._vattn_at_least(self._vattn_pages.least_bytes))

    def vattn_resume(self) -> int:
        """Be allowed the whole budget again; returns it. Memory is taken as requests need it."""
        with self._vattn_lock:
            target = self._vattn_pages.least_bytes if self._vattn_target is None else self._vattn_target
            return self._vattn_pages.approach(self._vattn_at_least(target))
