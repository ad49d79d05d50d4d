"""Compile and launch the kernels for prompts: settings, plan, and workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_vattn.attention.options import FP8, PLAIN, LayerOptions
from trtllm_vattn.attention.shares_launch import LOG2_E, NOTHING, Extras, power_of_two
from trtllm_vattn.cache.base import FlatKV

MOST_SPLITS = 32
"""Pieces into which the keys of a tile are divided."""
PARTS_EACH = 3
"""Pieces of divided tiles for each multiprocessor."""
START = 1
"""What a piece costs besides its keys, in blocks of keys."""


@dataclass(frozen=True)
class PromptSettings:
    """How the kernel is compiled and launched.

    A program of `warps` warps attends with a tile of `block_m` rows to `block_n` keys at a time, `stages` such blocks
    in flight; `resident` programs run on a multiprocessor.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    resident: int = 1


HOPPER_SETTINGS = {
    64: PromptSettings(128, 128, 8, 3, 1),
    128: PromptSettings(64, 64, 4, 3, 2),
    256: PromptSettings(128, 64, 8, 2, 1),
}
"""By head size, up to it, of two bytes a number, with 228 KiB of shared memory a multiprocessor. Measured for heads of
128 (tune_prompts.py, H200, 2026-11-29: 81 us a layer for 2,048 tokens, 90 by FlashInfer's FlashAttention-3, 141 by
cuDNN over a gathered copy); at 32,768 keys and more, tiles of 128 x 64 or 128 rows are 5 to 9 % faster. The others are
not."""
HOPPER_FEW = {
    64: PromptSettings(64, 128, 4, 3, 2),
    128: PromptSettings(64, 64, 4, 3, 2),
    256: PromptSettings(64, 64, 4, 2, 1),
}
"""The same where tiles of 128 rows are fewer than the multiprocessors."""


def prompt_settings(
    head_dim: int, itemsize: int, shared_bytes: int, tiles: int, multiprocessors: int, hopper: bool
) -> PromptSettings:
    """Settings for a pass of at most `tiles` tiles of 128 rows in all heads, on a GPU with `shared_bytes` of shared
    memory a multiprocessor. scripts/experiments/tune_prompts.py measures others."""
    if hopper and itemsize == 2 and shared_bytes >= HOPPER_SHARED:
        table = HOPPER_SETTINGS if tiles >= multiprocessors else HOPPER_FEW
        return next(settings for dim, settings in table.items() if head_dim <= dim)
    dims = power_of_two(head_dim)
    block_m, block_n = (128, 64) if dims <= 128 and itemsize == 2 else (64, 32)
    # Queries, and two stages of K and V.
    while block_n > 16 and (block_m + 4 * block_n) * dims * itemsize > shared_bytes - RESERVE:
        block_n //= 2
    while block_m > 16 and (block_m + 4 * block_n) * dims * itemsize > shared_bytes - RESERVE:
        block_m //= 2
    return PromptSettings(block_m, block_n, 8 if block_m == 128 else 4, 2)


HOPPER_SHARED = 228 << 10
RESERVE = 8 << 10
"""Bytes of shared memory that a program needs besides its tiles."""


class PromptWorkspace:
    """Memory in which programs leave partial results, for launches on one stream with any settings."""

    def __init__(self, device: torch.device, multiprocessors: int, head_dim: int) -> None:
        self.most_parts = PARTS_EACH * multiprocessors
        rows = self.most_parts * MOST_BLOCK_M
        self.tops, self.totals = torch.empty(2, rows, dtype=torch.float32, device=device)
        self.outs = torch.empty(rows, power_of_two(head_dim), dtype=torch.float32, device=device)
        self.arrived = torch.zeros(self.most_parts, dtype=torch.int32, device=device)
        """For each divided tile, how many partial results are there; the program that combines them resets it to 0."""

    def storages(self) -> list[torch.Tensor]:
        """All tensors."""
        return [self.tops, self.outs, self.arrived]


MOST_BLOCK_M = 128
FEWEST_TILES = 256
"""For which the plan is compiled; for more, it is compiled for each power of two."""


@dataclass(frozen=True)
class PromptPlan:
    """The list of a step's pieces on the device, which `attend` is given in every layer."""

    header: torch.Tensor
    pieces: torch.Tensor
    settings: PromptSettings
    programs: int


def plan(
    descriptors: torch.Tensor,
    rows: int,
    keep: int,
    heads: int,
    kv_heads: int,
    settings: PromptSettings,
    programs: int,
    most_parts: int,
    options: LayerOptions = PLAIN,
) -> PromptPlan:
    """List the pieces of chunks within `rows` rows, descriptors int32 ``[chunks, 4]``; launches one small kernel.

    Rows of no chunk stay as they are before `keep` and before the last chunk's end, and get zeros behind them. The plan
    is good for all layers with the window of `options`.
    """
    from trtllm_vattn.attention.prompt_kernel import FIELDS, plan_prompts

    group, chunks = heads // kv_heads, len(descriptors)
    tiles = max(FEWEST_TILES, power_of_two(-(-rows * group // settings.block_m) + chunks))
    header = torch.empty(2, dtype=torch.int32, device=descriptors.device)
    pieces = torch.empty(tiles + most_parts, FIELDS.value, dtype=torch.int32, device=descriptors.device)
    plan_prompts[(1,)](
        descriptors.contiguous(),
        header,
        pieces,
        chunks,
        keep,
        programs,
        most_parts,
        START,
        TILES=tiles,
        MOST_SPLITS=MOST_SPLITS,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        WINDOW=options.window or 0,
        FIRST=options.first_tokens,
        num_warps=4,
    )
    return PromptPlan(header, pieces, settings, programs)


def attend(
    q: torch.Tensor,
    kv: FlatKV,
    out: torch.Tensor,
    planned: PromptPlan,
    workspace: PromptWorkspace,
    scale: float,
    tiles: Sequence[Any] | None = None,
    extras: Extras = NOTHING,
) -> Any:
    """Launch the kernel: q and out ``[rows, num_heads, head_dim]``, contiguous; `kv` is the first part of a layer's
    heads where `extras.heads` has them.

    With `tiles`, tensor maps of K and V for `block_n` tokens (`shares_launch.tensor_maps`), it loads by TMA. Returns
    the compiled kernel.
    """
    from trtllm_vattn.attention.prompt_kernel import attend_prompts

    rows, heads, dim = q.shape
    kv_heads = kv.k.shape[2] if extras.heads is None else len(extras.heads.groups)
    of_slot, of_token, of_head, _ = kv.k.stride()
    k_tiles, v_tiles = tiles if tiles is not None else (0, 0)
    settings = planned.settings
    return attend_prompts[(planned.programs,)](
        q,
        k=kv.k.data_ptr(),
        v=kv.v.data_ptr(),
        k_tiles=k_tiles,
        v_tiles=v_tiles,
        out=out,
        header=planned.header,
        pieces=planned.pieces,
        part_tops=workspace.tops,
        part_totals=workspace.totals,
        part_outs=workspace.outs,
        arrived=workspace.arrived,
        of_slot=of_slot,
        of_token=of_token,
        of_head=of_head,
        all_rows=rows,
        scale=scale * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        DIMS=power_of_two(dim),
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        STAGES=settings.stages,
        TMA=tiles is not None,
        FP8=kv.k.dtype == FP8,
        num_warps=settings.warps,
        **extras.arguments(planned.header, kv_heads),
    )
