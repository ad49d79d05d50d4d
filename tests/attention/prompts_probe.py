"""The kernel for prompts over flat KV against plain float64 attention.

Run as ``python prompts_probe.py DEVICE CASE [PATH]``, the device ``cpu`` (in Triton's interpreter: TRITON_INTERPRET=1)
or a GPU, the path ``hopper`` (TMA) or ``plain``. Everything past each length is NaN, and where the cache's memory is
mapped page by page, unmapped further on: a load too far ends the process.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence

import torch

from trtllm_vattn.attention.prompt_launch import PromptSettings, PromptWorkspace, attend, plan, prompt_settings
from trtllm_vattn.attention.shares_launch import tensor_maps
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache

Chunk = tuple[int, int, int]
"""Rows, the sequence's length after them, and its slot."""


class Checked:
    """The kernel over one cache of random K and V, with its output checked."""

    def __init__(
        self, shape: CacheShape, heads: int, device: str, lengths: Sequence[int], tma: bool, layers_per_range: int = 1
    ) -> None:
        self.shape, self.heads, self.device, self.tma = shape, heads, device, tma
        self.cache = make_cache("vattn", shape, device, layers_per_range=layers_per_range, lookahead=0)
        for slot, length in enumerate(lengths):
            assert self.cache.admit(slot, max(1, length)) == slot
        kv = self.cache.layer(shape.num_layers - 1)
        assert isinstance(kv, FlatKV)
        self.kv = kv
        for slot, length in enumerate(lengths):
            backed = int(self.cache.frontiers[slot])
            for x in (kv.k, kv.v):
                x[slot, :backed] = torch.nan
                x[slot, :length] = torch.randn(length, *x.shape[2:], device=device).to(x.dtype)
        self.workspace = PromptWorkspace(torch.device(device), 6 if device == "cpu" else 132, shape.head_dim)
        self.worst = 0.0

    def ask(
        self, chunks: Sequence[Chunk], settings: PromptSettings, programs: int, gap: int = 0, behind: int = 0
    ) -> int:
        """Launch for chunks, `gap` rows of nobody before them and `behind` behind, and compare; returns the pieces of a
        KV head."""
        shape, device = self.shape, self.device
        rows = gap + sum(chunk[0] for chunk in chunks) + behind
        q = torch.randn(rows, self.heads, shape.head_dim).to(device, shape.dtype)
        out = torch.full_like(q, torch.nan)
        numbers, at = [], gap
        for count, length, slot in chunks:
            numbers.append([at, count, length, slot])
            at += count
        descriptors = torch.tensor(numbers, dtype=torch.int32, device=device)
        for buffer in (self.workspace.tops, self.workspace.totals, self.workspace.outs):
            buffer.fill_(torch.nan)
        most_parts = self.workspace.most_parts
        planned = plan(descriptors, rows, gap, self.heads, shape.num_kv_heads, settings, programs, most_parts)
        tiles = tensor_maps(self.kv, settings.block_n) if self.tma else None
        attend(q, self.kv, out, planned, self.workspace, 0.3 * shape.head_dim**-0.5, tiles)
        assert out[:gap].isnan().all(), "rows before the chunks were touched"
        assert not out[at:].any(), "rows behind the chunks are no zeros"
        for first, count, length, slot in numbers:
            self.compare(q[first : first + count], out[first : first + count], length, slot)
        assert not self.workspace.arrived.any(), "counters are left"
        return int(planned.header[0])

    def compare(self, q: torch.Tensor, out: torch.Tensor, length: int, slot: int) -> None:
        """Raise where the output of a chunk is not that of plain attention."""
        group, rows = self.heads // self.shape.num_kv_heads, len(q)
        if not rows:
            return
        k, v = (x[slot, :length].double().repeat_interleave(group, dim=1) for x in (self.kv.k, self.kv.v))
        scores = torch.einsum("rhd,thd->hrt", q.double(), k) * 0.3 * self.shape.head_dim**-0.5
        ahead = torch.ones(rows, length, device=q.device, dtype=torch.bool).triu(length - rows + 1)
        want = torch.einsum("hrt,thd->rhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)
        error = float(((out.double() - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).max())
        self.worst = max(self.worst, error)
        if not error < (1e-4 if q.dtype == torch.float32 else 1e-2):
            raise SystemExit(f"{rows} rows up to {length} of slot {slot}: error {error}")


GROUPS = {64: (1, 4, 71), 96: (3, 4), 128: (4, 7, 16), 192: (4, 12), 256: (1, 4)}
"""Query heads a KV head, by head size."""


def shapes(device: str, tma: bool) -> None:
    """Head sizes, query heads a KV head, dtypes, layers a range."""
    lengths = [33, 1, 16, 100, 200, 7]
    chunks = [(20, 33, 0), (1, 1, 1), (16, 16, 2), (3, 100, 3), (0, 5, 5), (40, 200, 4)]
    for dim, groups in GROUPS.items():
        for group in groups:
            kinds = [torch.float32, torch.float16] if group == 4 else [torch.bfloat16]
            if device == "cpu":
                kinds = [torch.float16 if (dim, group) == (64, 4) else torch.float32]
            for dtype in kinds:
                kv_heads = 2 if group < 7 else 1
                shape = CacheShape(2, kv_heads, dim, dtype, len(lengths), 320)
                used = tma and dtype != torch.float32
                checked = Checked(shape, group * kv_heads, device, lengths, used, layers_per_range=group % 2 + 1)
                settings = (
                    PromptSettings(32, 32, 4, 2)
                    if device == "cpu"
                    else prompt_settings(dim, dtype.itemsize, 228 << 10 if tma else 100 << 10, 999, 132, tma)
                )
                checked.ask(chunks, settings, 7, gap=group % 3, behind=3)
                print(f"done {dim} x {group} {dtype}: {checked.worst:.1e}", flush=True)
                checked.cache.close()


def splits(device: str, tma: bool) -> None:
    """Few rows over many keys, which are divided, beside short chunks, by various settings and counts of programs."""
    big = device != "cpu"
    longest = 5000 if big else 300
    every = (
        [(64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (16, 16, 4, 2)]
        if big
        else [(16, 16, 4, 2)]
    )
    dtype = torch.bfloat16 if big else torch.float32
    shape = CacheShape(2, 2, 64, dtype, 3, longest)
    checked = Checked(shape, 8, device, [longest, 40, longest // 3], tma, 2)
    for numbers in every:
        for programs in (132, 264, 5) if big else (16, 3):
            settings = PromptSettings(*numbers)
            pieces = checked.ask([(9, longest, 0), (0, 0, 0), (17, 40, 1), (5, longest // 3, 2)], settings, programs)
            tiles = sum(-(-rows * 4 // settings.block_m) for rows in (9, 17, 5))
            assert pieces > tiles or programs < 16, "nothing was divided"
            checked.ask([(longest // 3, longest // 3, 2)], settings, programs, gap=1)
        print(f"done {settings}: {checked.worst:.1e}", flush=True)
    checked.cache.close()


def life(device: str, tma: bool) -> None:
    """Random chunks of random sequences."""
    chooser = random.Random(3)
    big = device != "cpu"
    longest, slots = (3000, 9) if big else (120, 5)
    shape = CacheShape(2, 2, 128 if big else 64, torch.bfloat16 if big else torch.float32, slots, longest)
    lengths = [chooser.randint(1, longest) for _ in range(slots)]
    checked = Checked(shape, 8, device, lengths, tma)
    for _ in range(60 if big else 6):
        order = chooser.sample(range(slots), chooser.randint(1, slots))
        chunks = [(chooser.randint(0, min(lengths[slot], longest // 4)), lengths[slot], slot) for slot in order]
        settings = PromptSettings(*(chooser.choice([(128, 128, 8, 2), (64, 64, 4, 3)]) if big else (32, 16, 4, 2)))
        programs = chooser.choice((1, 5, 40, 132))
        checked.ask(chunks, settings, programs, chooser.randint(0, 3), chooser.randint(0, 3))
    print(f"done random chunks: {checked.worst:.1e}", flush=True)
    checked.cache.close()


def far(device: str, tma: bool) -> None:
    """Slots more than 2**31 elements from the first, of which the first ones have no memory at all."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = CacheShape(2, 8, 128, dtype, 6, 1 << 20)
    checked = Checked(shape, 8, device, [1, 1, 1, 1, 70, 33], tma)
    assert checked.kv.k.stride(0) * 4 > 1 << 31
    for slot in range(4):
        checked.cache.release(slot)
    arena = checked.cache.arena  # type: ignore[attr-defined]
    arena.reclaim(arena.parked_bytes)
    assert not any(arena.slots[slot].mapped for slot in range(4))
    checked.ask([(30, 70, 4), (33, 33, 5)], PromptSettings(32, 32, 4, 2), 11)
    print(f"done far slots: {checked.worst:.1e}", flush=True)
    checked.cache.close()


def plans(device: str, tma: bool) -> None:
    """Random plans: the pieces of every tile hold all its keys once, and the longest pieces come first."""
    chooser = random.Random(5)
    for _ in range(30 if device == "cpu" else 200):
        group, kv_heads, block_m, block_n = chooser.choice([(4, 8, 128, 128), (7, 1, 64, 64), (1, 2, 128, 64)])
        chunks = []
        for slot in range(chooser.randint(1, 16)):
            rows = chooser.choice((0, 1, chooser.randint(1, 300)))
            chunks.append((rows, rows + chooser.choice((0, 5, chooser.randint(0, 100_000))), slot))
        numbers, at = [], chooser.randint(0, 40)
        keep = at
        for rows, length, slot in chunks:
            numbers.append([at, rows, length, slot])
            at += rows
        given = torch.tensor(numbers, dtype=torch.int32, device=device)
        settings = PromptSettings(block_m, block_n, 4, 2)
        heads, programs = group * kv_heads, chooser.choice((1, 60, 132, 264))
        planned = plan(given, at + 3, keep, heads, kv_heads, settings, programs, 396)
        count, behind = planned.header.tolist()
        assert behind == max([keep, *(first + rows for first, rows, _, _ in numbers if rows)])
        pieces = planned.pieces[:count].tolist()
        sizes = [last - first for *_, first, last, _, _, _ in (piece[:10] for piece in pieces)]
        found: dict[tuple[int, ...], list[list[int]]] = {}
        for piece in pieces:
            found.setdefault(tuple(piece[:5]), []).append(piece[5:10])
        want = {(*one, tile) for one in map(tuple, numbers) for tile in range(-(-one[1] * group // block_m))}
        assert set(found) == want
        for (_, rows, length, _, tile), parts in found.items():
            seen = length - rows + min(rows, -(-(tile + 1) * block_m // group))
            parts.sort()
            assert [first for first, *_ in parts] == [0, *(last for _, last, *_ in parts[:-1])]
            assert parts[-1][1] == -(-seen // block_n)
            assert all(last > first for first, last, *_ in parts)
            assert [(splits, own) for _, _, splits, _, own in parts] == [(len(parts), i) for i in range(len(parts))]
        places = [piece[8] + piece[9] for piece in pieces if piece[7] > 1]
        assert sorted(places) == list(range(len(places)))
        assert len(places) * kv_heads <= 396
        assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(sizes)), sizes
    print("done random plans", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    device, case, *path = sys.argv[1:]
    with torch.inference_mode():
        {"shapes": shapes, "splits": splits, "life": life, "far": far, "plans": plans}[case](device, path == ["hopper"])
    print("all cases passed", flush=True)
