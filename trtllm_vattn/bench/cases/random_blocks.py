"""TensorRT-LLM's own layout of a paged pool, with blocks in random order: what affine tables are compared with."""

from __future__ import annotations

import torch

from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.paged import PagedCache


class RandomBlocks(PagedCache):
    """One allocation ``[block][layer][K,V][head][token][dim]``, as the block layout has it; tables are random.

    Parameters
    ----------
    seed : int
        Of the order in which blocks are handed out.
    """

    def __init__(self, shape: CacheShape, device: torch.device | str, block_size: int, seed: int = 0) -> None:
        super().__init__(shape, device, block_size)
        self.shuffle_free_memory(seed)

    def _make_pools(self, size: tuple[int, int, int, int]) -> list[list[torch.Tensor]]:
        layers, factor = self.shape.num_layers, self.shape.kv_factor
        whole = torch.zeros((size[0], layers, factor, *size[1:]), dtype=self.shape.dtype, device=self.device)
        return [[whole[:, layer, field] for field in range(factor)] for layer in range(layers)]
