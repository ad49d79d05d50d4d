"""What the parts of the adapter share: the attributes of ours, and the stock class that they are mixed into."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from trtllm_vattn.trtllm.ballast import Ballast
from trtllm_vattn.trtllm.config import TrtllmConfig
from trtllm_vattn.trtllm.pages import Pages
from trtllm_vattn.trtllm.tables import RowGatherer
from trtllm_vattn.vmm.base import Driver

# The installed KVCacheManager stands behind the mixins in the final class; which one is not known before.
Stock: Any = object


class Adapter(Stock):  # type: ignore[misc]
    """Attributes of ours, which all begin with ``_vattn``; those of the class are set where it is made."""

    _vattn_settings: TrtllmConfig
    _vattn_module: Any
    """The module that the stock class is in."""
    _vattn_driver: Callable[[], Driver]
    _vattn_pages: Pages
    _vattn_ballast: Ballast
    _vattn_rows: RowGatherer
    _vattn_lock: threading.RLock
    """Held while memory or its books change: budgets are set from other threads than the executor's."""
    _vattn_live: dict[int, Any]
    """Requests that run, by id."""
    _vattn_dummies: dict[int, int]
    """Dummies by id, with the blocks that each had of the C++ books when it was made."""
    _vattn_total: int
    """Blocks of the C++ books."""
    _vattn_token_count: Callable[[int], int] | None
    """Tokens of a request in the C++ books, where this version says; None where it says its blocks alone."""
    _vattn_cap: int
    """Bytes at most, by ``kv_cache_config.max_gpu_total_bytes``; 0 is no limit."""
    _vattn_target: int | None
    """The budget asked for, in bytes; None while TensorRT-LLM has not been asked."""
    _vattn_sized: bool
    """Whether graphs are captured and the budget is in force; until then there are dummies alone."""
    _vattn_sizing: tuple[tuple[Any, ...], dict[str, Any]]
    """What the stock class would have computed its pool's size from."""
    _vattn_closed: bool

    @property
    def _vattn_draft_tokens(self) -> int:
        """Draft tokens that a generation step may need room for. Since 1.3 the books reserve that many at every step,
        however few are drafted, and rewind the rest in `update_resources`."""
        return max(int(self.max_total_draft_tokens), self._vattn_draft_reserve)

    @property
    def _vattn_draft_reserve(self) -> int:
        """Draft tokens that the books take at every step at least; 0 where they take what is drafted."""
        return int(getattr(self, "_kv_reserve_draft_tokens", 0))
