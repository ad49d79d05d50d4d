"""Statistics of the C++ manager, without what only stands for missing memory."""

from __future__ import annotations

from typing import Any


class TrueStats:
    """`KvCacheStats` with ballast neither used nor there; everything else is the C++ manager's."""

    def __init__(self, stock: Any, ballast: int) -> None:
        self._stock = stock
        self.free_num_blocks: int = stock.free_num_blocks
        self.max_num_blocks: int = stock.max_num_blocks - ballast
        self.used_num_blocks: int = stock.used_num_blocks - ballast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)
