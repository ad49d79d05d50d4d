"""The attention kernels at the edges of what they are given: lengths around a tile's, windows shorter than one, odd
numbers of query heads, scores far below zero or of minus infinity, NaN, prefixes of no, one or all tokens, scales of
eight-bit rows, and strides beyond 2**31 elements. Run as ``python edges_probe.py DEVICE CASE [PATH]``, as
features_probe.py."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from features_probe import DIM, GROUP, Probe

from trtllm_vattn.attention import latents
from trtllm_vattn.attention.kv_write import rotate_and_write_kv, write_kv
from trtllm_vattn.attention.options import FP8, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompt_launch import PromptSettings, PromptWorkspace, attend, plan
from trtllm_vattn.attention.shares_launch import (
    Features,
    Rows,
    Settings,
    SharedReads,
    Workspace,
    launch,
    launch_prefixes,
)
from trtllm_vattn.cache.base import FlatKV
from trtllm_vattn.cache.compression import mass

TILE = 16


def made(device: str, hopper: bool, lengths: Sequence[int], longest: int = 0, **more: object) -> Probe:
    """A probe whose slots hold so many tokens."""
    dtype = more.pop("dtype", torch.float32 if device == "cpu" else torch.bfloat16)
    probe = Probe(device, hopper, len(lengths), longest or max(64, *lengths), dtype, **more)
    refill(probe, lengths)
    return probe


def refill(probe: Probe, lengths: Sequence[int], admit: bool = True) -> None:
    for slot, length in enumerate(lengths):
        if admit:
            probe.cache.admit(slot, max(1, length))
        probe.fill(slot, [(0, length)], (0, int(probe.cache.frontiers[slot])))


def lengths_around_tiles(device: str, hopper: bool) -> None:
    """No token, one; one fewer than one or two tiles, as many, one more; groups of 1 to 16 query heads, odd too."""
    lengths = [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1]
    for group, queries in ((1, 8), (5, 3), (16, 2)):
        probe = made(device, hopper, lengths, group=group)
        slots = list(range(len(lengths)))
        probe.decode(slots, lengths, queries, [min(length, queries) for length in lengths])
        probe.prompts([(min(length, 1 + group), length, slot) for slot, length in enumerate(lengths) if length])
        probe.done(f"{group} query heads a KV head")
    for group in (7, 9, 11, 13, 15):
        probe = made(device, hopper, [TILE + 1, 0, 3], group=group)
        probe.decode([0, 1, 2], [TILE + 1, 0, 3], 1)
        probe.prompts([(group // 4, TILE + 1, 0), (2, 3, 2)])
        probe.done(f"{group} query heads a KV head")


def windows_of_few_tokens(device: str, hopper: bool) -> None:
    """Windows of one token, shorter than a tile, as long, and longer; first tokens up to more than the sequence has."""
    lengths = [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5]
    for window, first in ((1, 0), (TILE - 1, TILE + 1), (TILE, 1), (3, 100)):
        probe = made(device, hopper, lengths)
        probe.options = LayerOptions(window, first, torch.randn(probe.heads, device=device) if first else None)
        slots, most = list(range(len(lengths))), 8 if window > 1 else 1
        probe.decode(slots, lengths, most, [min(length, most) for length in lengths])
        probe.prompts([(min(length, 20), length, slot) for slot, length in enumerate(lengths)])
        probe.done(f"window {window}, {first} first tokens")


def quiet(device: str, hopper: bool) -> None:
    """Scores far below zero, in rows that meet tiles of which they see nothing before those that they see."""
    lengths = [70, 33, 100]
    wide = torch.float32 if device == "cpu" else torch.bfloat16
    for dtype, lower, options in ((torch.float16, 40.0, LayerOptions(9, 20)), (wide, 300.0, LayerOptions())):
        probe = Probe(device, hopper, len(lengths), 128, dtype)
        probe.query_dtype, probe.quiet, probe.options = dtype, lower, options
        refill(probe, lengths)
        probe.decode([2, 0, 1], [100, 70, 33], 8, [8, 7, 8])
        probe.prompts([(20, 100, 2), (33, 70, 0), (1, 33, 1)])
        probe.done(f"scores lowered by {lower} of {dtype}, window {options.window}")
    quiet_latents(device, wide)
    quiet_mass(device, wide)


def quiet_latents(device: str, dtype: torch.dtype) -> None:
    """Pieces of a sequence of which some queries see nothing."""
    row, tokens, heads, queries = 32, latents.TILE * 4 + 3, 3, 8
    rows = torch.randn(1, 256, 1, row, device=device)
    q = torch.randn(1, queries, heads, row, device=device)
    rows[..., 0], q[..., 0] = 8.0, -300.0 / 8.0
    rows, q = rows.to(dtype), q.to(dtype)
    for pieces in (1, 4):
        out = torch.full_like(q, torch.nan)
        workspace = latents.LatentWorkspace(torch.device(device), 32, row)
        length = torch.tensor([tokens], dtype=torch.int32, device=device)
        latents.launch_lanes(q, rows, out, length, None, None, scale=1.0, pieces=pieces, workspace=workspace)
        for query in range(queries):
            seen = rows[0, : tokens - queries + 1 + query, 0].double()
            near(f"latents in {pieces} pieces", out[0, query], (q[0, query].double() @ seen.T).softmax(-1) @ seen)
    print("done scores lowered over latents", flush=True)


def quiet_mass(device: str, dtype: torch.dtype) -> None:
    """Pieces of keys of which the first queries see nothing."""
    held, count = mass.MOST_TILE * (mass.PIECES + 1), 2 * mass.MOST_TILE
    queries = torch.randn(count, 1, 2, 32, device=device)
    keys = torch.randn(held, 1, 32, device=device)
    queries[..., 0], keys[..., 0] = 8.0, -300.0 / 8.0
    queries, keys = queries.to(dtype), keys.to(dtype)
    got = mass.by_kernel(queries, keys, 1.0, None, 0, None)
    near("attention that tokens have", got, mass.maps(queries.double(), keys.double(), 1.0).double().sum(dim=(1, 2)))
    print("done scores lowered for the attention that tokens have", flush=True)


def near(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise where the two are not alike."""
    error = float((got.double() - want).norm() / want.norm())
    if not error < (1e-4 if got.dtype == torch.float32 else 1e-2):
        raise SystemExit(f"{what}: error {error}")


def infinite(device: str, hopper: bool) -> None:
    """A score of minus infinity takes its token out; a sink logit of minus infinity is none; NaN in one sequence, or in
    a query, is in that one's output alone."""
    lengths = [40, 20, 33]
    probe = made(device, hopper, lengths)
    probe.queries = lambda *rows, old=probe.queries: old(*rows).abs()  # type: ignore[method-assign]
    for kv in probe.parts:
        kv.k[0, [3, 17, 39]], kv.k[2, 32] = -torch.inf, -torch.inf
    probe.decode([0, 2, 1], [40, 33, 20], 1)
    probe.prompts([(3, 40, 0), (17, 20, 1)])
    probe.options = LayerOptions(sink_logits=torch.full((probe.heads,), -torch.inf, device=device))
    probe.decode([0, 2, 1], [40, 33, 20], 2)
    probe.options = LayerOptions()
    for kv in probe.parts:
        kv.v[1, 5] = torch.nan
    lanes = probe.decode([0, 2, 1, 1], [40, 33, 20, 0], 2, compare=False)
    assert lanes[:2].isfinite().all(), "NaN of one sequence is in others"
    assert lanes[2].isnan().all(), "NaN of a sequence does not show"
    assert not lanes[3].any(), "a lane of no tokens is no zeros"
    rows = probe.prompts([(3, 40, 0), (17, 20, 1), (2, 33, 2)], compare=False)
    assert rows[:3].isfinite().all(), "NaN of one prompt is in others"
    assert rows[20:].isfinite().all(), "NaN of one prompt is in others"
    assert rows[3:20].isnan().any(), "NaN of a prompt does not show"
    probe.prefixes = PrefixTables.empty(3, 3, probe.device)
    probe.prefixes.set_groups([(0, 20, [0, 1])])
    usual = probe.queries

    def one_nan(*rows: int) -> torch.Tensor:
        q = usual(*rows)
        q[1] = torch.nan
        return q

    probe.queries = one_nan  # type: ignore[method-assign]
    lanes = probe.decode([0, 2, 2], [40, 33, 33], 1, compare=False)
    assert lanes[1].isnan().all(), "NaN of a query does not show"
    assert lanes[[0, 2]].isfinite().all(), "NaN of a query is in others of its group"
    probe.done("minus infinity and NaN")


def prefix_edges(device: str, hopper: bool) -> None:
    """First tokens elsewhere: none, one, a tile, all but one; read for several lanes: one token, all but their last."""
    lengths = [2 * TILE + 1] * 4
    probe = made(device, hopper, lengths, group=2)
    for border in (0, 1, TILE, 2 * TILE):
        probe.prefixes = PrefixTables.empty(4, 4, probe.device)
        probe.prefixes.set_prefixes([(1, 0, border), (3, 0, border)])
        probe.decode([3, 0, 1], lengths[:3], 1)
        probe.prompts([(1, lengths[1], 1), (TILE, lengths[3], 3), (1, 7, 3)])
    for tokens in (1, TILE - 1, TILE, 2 * TILE - 1):
        probe.prefixes = PrefixTables.empty(4, 4, probe.device)
        probe.prefixes.set_groups([(2, tokens, [0, 3]), (1, tokens, [1])])
        probe.decode([0, 1, 2, 3], lengths, 2, [2, 0, 1, 2])
    # A launch of fewer lanes than the groups have, one of which is idle.
    probe.decode([0, 1], [lengths[0], 0], 1)
    probe.done("prefixes of no, one and all tokens")


def scales(device: str, hopper: bool) -> None:
    """Scales of eight-bit rows from a billionth to a billion, of keys with queries to match; rows of zeros."""
    for size in (1e-9, 1.0, 1e6):
        probe = Probe(device, hopper, 3, 64, FP8)
        probe.options = LayerOptions(
            k_scale=torch.tensor([size], device=device), v_scale=torch.tensor([size, 1 / size], device=device)
        )
        refill(probe, [40, 1, 17])
        probe.scale /= size
        probe.decode([0, 1, 2], [40, 1, 17], 2, [2, 1, 2])
        probe.prompts([(5, 40, 0), (17, 17, 2)])
        for kv in probe.parts:
            kv.k[2].view(torch.uint8)[:17] = 0
        probe.decode([2], [17], 1)
        probe.done(f"scales of {size}")


class Sparse:
    """K and V of few slots at strides beyond 2**31 elements, in a file of which only what is written has memory."""

    def __init__(self, heads: int, dim: int, slots: int = 2, tokens: int = 40) -> None:
        # No two rows lie at the same place.
        steps = 1 << 33, (1 << 27) + 1024, 1 << 30
        last = sum((count - 1) * step for count, step in zip((slots, tokens, heads), steps, strict=True)) + dim
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        os.ftruncate(self.file.fileno(), 4 * last)
        self.memory = mmap.mmap(self.file.fileno(), 4 * last)
        every = torch.frombuffer(self.memory, dtype=torch.float32)
        self.view = every.as_strided((slots, tokens, heads, dim), (*steps, 1))
        self.view[:, : tokens - 1] = torch.randn(slots, tokens - 1, heads, dim)


def far(device: str, hopper: bool) -> None:
    """Slots, tokens and heads that lie more than 2**31 elements apart, read and written by every kernel; on the host
    alone."""
    assert device == "cpu", "a sparse file is memory of the host"
    heads, tokens = 3, 39
    k, v = Sparse(heads, DIM), Sparse(heads, DIM)
    kv = FlatKV(k.view, v.view)
    q = torch.randn(2, 1, heads * GROUP, DIM)
    lengths, slots = torch.tensor([tokens, 21], dtype=torch.int32), torch.tensor([1, 0])
    rows, settings, plain = Rows.of(GROUP, 1, DIM), Settings(TILE, 4, 2, 1), Features(False, False)
    workspace = Workspace(torch.device("cpu"), 5, 2, heads, rows, DIM)

    def want(query: torch.Tensor, slot: int, sees: int) -> torch.Tensor:
        found = []
        for head in range(heads * GROUP):
            scores = k.view[slot, :sees, head // GROUP].double() @ query[head].double() * 0.1
            found.append(scores.softmax(0) @ v.view[slot, :sees, head // GROUP].double())
        return torch.stack(found)

    out = torch.empty_like(q)
    launch(
        q, kv, out, lengths, None, slots, scale=0.1, workspace=workspace, programs=5, settings=settings, features=plain
    )
    for lane in range(2):
        near("decode", out[lane, 0], want(q[lane, 0], int(slots[lane]), int(lengths[lane])))
    tables = PrefixTables.empty(2, 2, torch.device("cpu"))
    tables.set_groups([(1, 30, [0, 1])])
    reads = SharedReads(torch.device("cpu"), 5, 2, 1, heads * GROUP, heads, DIM)
    launch_prefixes(
        q, kv, tables, reads, scale=0.1, options=LayerOptions(), programs=5, settings=settings, features=plain
    )
    for lane in range(2):
        near("prefixes", reads.outs.view(2, heads * GROUP, DIM)[lane], want(q[lane, 0], 1, 30))
    descriptors = torch.tensor([[0, 5, tokens, 1], [5, 3, 3, 0]], dtype=torch.int32)
    rows_of = torch.randn(8, heads * GROUP, DIM)
    out = torch.empty_like(rows_of)
    prompts = PromptSettings(16, 16, 4, 2)
    space = PromptWorkspace(torch.device("cpu"), 6, DIM)
    planned = plan(descriptors, 8, 0, heads * GROUP, heads, prompts, 5, space.most_parts)
    attend(rows_of, kv, out, planned, space, 0.1)
    for first, count, length, slot in descriptors.tolist():
        for row in range(count):
            near("prompts", out[first + row], want(rows_of[first + row], slot, length - count + 1 + row))
    far_writes(kv, tokens)
    far_rest(k.view, tokens)
    print("done far rows", flush=True)


def far_writes(kv: FlatKV, position: int) -> None:
    """The kernels that store rows."""
    from trtllm_vattn.plugins.step_write import write_step

    where = torch.tensor([1]), torch.tensor([position])

    def step(new: torch.Tensor) -> None:
        write_step(kv, new, new, torch.tensor([position + 1]), None, torch.tensor([1]))

    def rotated(new: torch.Tensor) -> None:
        rotate_and_write_kv(kv, new, new, new, torch.ones(1, DIM), torch.zeros(1, DIM), *where)

    writes: tuple[Callable[[torch.Tensor], None], ...] = (lambda new: write_kv(kv, new, new, *where), rotated, step)
    for write in writes:
        new = torch.randn(1, kv.k.shape[2], DIM)
        write(new)
        assert torch.equal(kv.k[1, position], new[0]), "keys were written elsewhere"
        assert torch.equal(kv.v[1, position], new[0]), "values were written elsewhere"


def far_rest(rows: torch.Tensor, tokens: int) -> None:
    """Latents, and the attention that tokens have."""
    q = torch.randn(1, 1, 3, DIM)
    out = torch.empty_like(q)
    workspace = latents.LatentWorkspace(torch.device("cpu"), 32, DIM)
    given = torch.tensor([tokens], dtype=torch.int32), None, torch.tensor([1])
    latents.launch_lanes(q, rows[:, :, 2:], out, *given, scale=0.1, pieces=2, workspace=workspace)
    seen = rows[1, :tokens, 2].double()
    near("latents", out[0, 0], (q[0, 0].double() @ seen.T * 0.1).softmax(-1) @ seen)
    queries, keys = torch.randn(2, rows.shape[2], GROUP, DIM), rows[1, :tokens]
    want = mass.maps(queries.double(), keys.double(), 0.1).double().sum(dim=(1, 2))
    near("attention that tokens have", mass.by_kernel(queries, keys, 0.1, None, 0, None), want)


CASES = {
    "lengths": lengths_around_tiles,
    "windows": windows_of_few_tokens,
    "quiet": quiet,
    "infinite": infinite,
    "prefixes": prefix_edges,
    "scales": scales,
    "far": far,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    device, case, *path = sys.argv[1:]
    with torch.inference_mode():
        CASES[case](device, path == ["hopper"])
    print("all cases passed", flush=True)
