"""The kernel of decode by equal shares against plain float64 attention.

Run as ``python shares_probe.py DEVICE CASE [PATH]``, the device ``cpu`` (in Triton's interpreter: TRITON_INTERPRET=1)
or a GPU, the path ``hopper`` (TMA and dependent launches) or ``plain``. Everything past each length is NaN, and where
the cache's memory is mapped page by page, unmapped further on: a load too far ends the process.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import torch

from trtllm_vattn.attention.shares_launch import (
    Features,
    Rows,
    Settings,
    Workspace,
    launch,
    settings_for,
    tensor_maps,
)
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache


class Checked:
    """The kernel over one cache of random K and V, with its output checked."""

    def __init__(
        self,
        shape: CacheShape,
        heads: int,
        device: str,
        lengths: Sequence[int],
        features: Features,
        settings: Settings | None = None,
        layers_per_range: int = 1,
        programs: int = 7,
    ) -> None:
        self.shape, self.heads, self.device, self.features = shape, heads, device, features
        self.cache = make_cache("vattn", shape, device, layers_per_range=layers_per_range, lookahead=0)
        for slot, length in enumerate(lengths):
            assert self.cache.admit(slot, max(1, length)) == slot
        kv = self.cache.layer(shape.num_layers - 1)
        assert isinstance(kv, FlatKV)
        self.kv, self.lengths = kv, list(lengths)
        for slot, length in enumerate(lengths):
            backed = int(self.cache.frontiers[slot])
            for x in (kv.k, kv.v):
                x[slot, :backed] = torch.nan
                x[slot, :length] = torch.randn(length, *x.shape[2:], device=device).to(x.dtype)
        self.programs = programs
        self.settings = settings
        self.worst = 0.0

    def ask(
        self,
        queries: int,
        counts: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Launch for some lanes, and compare; lengths are those of the slots where not given."""
        lanes = range(self.shape.num_slots) if slots is None else slots
        lengths = [self.lengths[slot] for slot in lanes] if lengths is None else lengths
        shape, device = self.shape, self.device
        q = torch.randn(len(lanes), queries, self.heads, shape.head_dim).to(device, shape.dtype)
        out = torch.full_like(q, torch.nan)
        rows = Rows.of(self.heads // shape.num_kv_heads, queries, shape.head_dim)
        settings = self.settings or settings_for(
            100 << 10, shape.head_dim, shape.dtype.itemsize, rows.rows, 64 + len(lanes), False
        )
        workspace = Workspace(q.device, self.programs, len(lanes), shape.num_kv_heads, rows, shape.head_dim)
        for buffer in (workspace.tops, workspace.totals, workspace.outs):
            buffer.fill_(torch.nan)
        launch(
            q,
            self.kv,
            out,
            torch.tensor(lengths, dtype=torch.int32, device=device),
            None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device),
            None if slots is None else torch.tensor(slots, device=device),
            scale=0.3 * shape.head_dim**-0.5,
            workspace=workspace,
            programs=self.programs,
            settings=settings,
            features=self.features,
            tiles=tensor_maps(self.kv, settings.tile) if self.features.tma else None,
        )
        self.compare(q, out, lanes, lengths, counts or [queries] * len(lanes))
        assert not workspace.arrived.any(), "counters are left"

    def compare(
        self, q: torch.Tensor, out: torch.Tensor, slots: Sequence[int], lengths: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Raise where an output is not that of plain attention; lanes and queries that are not there have zeros."""
        group = self.heads // self.shape.num_kv_heads
        tolerance = 1e-4 if q.dtype == torch.float32 else 1e-2
        for lane, (slot, length, count) in enumerate(zip(slots, lengths, counts, strict=True)):
            real = count if length else 0
            if out[lane, real:].any() or not out[lane].isfinite().all():
                raise SystemExit(f"lane {lane} of {length} tokens: queries past {real} are no zeros, or NaN")
            k, v = (x[slot, :length].double().repeat_interleave(group, dim=1) for x in (self.kv.k, self.kv.v))
            for query in range(real):
                sees = length - count + 1 + query
                scores = torch.einsum("hd,thd->ht", q[lane, query].double(), k[:sees])
                weights = (scores * 0.3 * self.shape.head_dim**-0.5).softmax(-1)
                want = torch.einsum("ht,thd->hd", weights, v[:sees])
                error = float((out[lane, query].double() - want).norm() / want.norm())
                self.worst = max(self.worst, error)
                if not error < tolerance:
                    raise SystemExit(f"lane {lane}, query {query} of {count}, {length} tokens: error {error}")


GROUPS = {64: (1, 4, 71), 96: (3, 4), 128: (4, 7, 16), 192: (4, 12), 256: (1, 4)}
"""Query heads a KV head, by head size."""


def shapes(device: str, features: Features) -> None:
    """Head sizes, query heads a KV head, dtypes, layers a range."""
    lengths = [0, 1, 15, 17, 100, 200, 0]
    for dim, groups in GROUPS.items():
        for group in groups:
            kinds = [torch.float32, torch.float16] if group == 4 else [torch.bfloat16]
            if device == "cpu":
                kinds = [torch.float16 if (dim, group) == (64, 4) else torch.float32]
            for dtype in kinds:
                kv_heads = 2 if group < 7 else 1
                shape = CacheShape(2, kv_heads, dim, dtype, len(lengths), 320)
                used = features if dtype != torch.float32 else Features(False, features.pdl)
                checked = Checked(shape, group * kv_heads, device, lengths, used, layers_per_range=group % 2 + 1)
                checked.ask(1, slots=[6, 0, 5, 2, 1, 4])
                print(f"done {dim} x {group} {dtype}: {checked.worst:.1e}", flush=True)
                checked.cache.close()


def shares(device: str, features: Features) -> None:
    """Sequences that many programs share, and programs that share many sequences, by various settings."""
    chooser = random.Random(0)
    big = device != "cpu"
    longest = 5000 if big else 200
    settings = ((16, 0, 1, 5), (16, 2, 1, 31), (32, 1, 3, 20), (16, 3, 1, 1), (64, 2, 2, 264))
    for tile, start, fewest, programs in settings if big else settings[:4]:
        lengths = [chooser.choice((0, chooser.randint(1, 40), chooser.randint(1, longest))) for _ in range(5)]
        shape = CacheShape(2, 2, 64, torch.bfloat16 if big else torch.float32, 5, longest)
        checked = Checked(shape, 8, device, lengths, features, Settings(tile, 4, 3, start, fewest), 2, programs)
        checked.ask(1)
        checked.ask(2, counts=[min(2, n) for n in lengths])
        checked.ask(1, slots=[4, 3, 2, 1, 0])
        print(f"done tiles of {tile} on {programs}: {checked.worst:.1e}", flush=True)
        checked.cache.close()


def not_a_number(device: str, features: Features) -> None:
    """A lane whose tokens are NaN has NaN, not the zeros of a lane without tokens; other lanes do not notice."""
    shape = CacheShape(1, 2, 64, torch.float32 if device == "cpu" else torch.bfloat16, 3, 320)
    checked = Checked(shape, 4, device, [200, 0, 150], features)
    for x in (checked.kv.k, checked.kv.v):
        x[0, :200] = torch.nan
    compared: list[torch.Tensor] = []

    def compare(q: torch.Tensor, out: torch.Tensor, *rest: object) -> None:
        compared.append(out)

    checked.compare = compare  # type: ignore[method-assign]
    checked.ask(1)
    (out,) = compared
    if not (out[0].isnan().all() and (out[1] == 0).all() and out[2].isfinite().all()):
        raise SystemExit(f"NaN, nothing and numbers gave {[lane.flatten()[:2].tolist() for lane in out]}")


def queries(device: str, features: Features) -> None:
    """0 to 8 queries a lane, fewer than there is room for."""
    lengths = [0, 1, 8, 64, 65, 71, 200]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for group in (1, 12) if device == "cpu" else (1, 4, 12):
        shape = CacheShape(2, 2, 64, dtype, len(lengths), 320)
        checked = Checked(shape, group * 2, device, lengths, features, programs=11)
        for most in (3, 8):
            checked.ask(most, counts=[min(n, (lane * 3 + most) % (most + 1)) for lane, n in enumerate(lengths)])
            checked.ask(most, counts=[min(n, most) for n in lengths])
        print(f"done queries, {group} heads a KV head: {checked.worst:.1e}", flush=True)
        checked.cache.close()


def far(device: str, features: Features) -> None:
    """Slots more than 2**31 elements from the first, of which the first ones have no memory at all."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = CacheShape(2, 8, 128, dtype, 6, 1 << 20)
    lengths = [1, 1, 1, 1, 70, 33]
    checked = Checked(shape, 8, device, lengths, features)
    assert checked.kv.k.stride(0) * 4 > 1 << 31
    for slot in range(4):
        checked.cache.release(slot)
    arena = checked.cache.arena  # type: ignore[attr-defined]
    arena.reclaim(arena.parked_bytes)
    assert not any(arena.slots[slot].mapped for slot in range(4))
    checked.ask(1, slots=[5, 4])
    checked.lengths[:4] = [0] * 4
    checked.ask(1)
    print(f"done far slots: {checked.worst:.1e}", flush=True)
    checked.cache.close()


def graph(device: str, features: Features) -> None:
    """One captured graph of three layers serves random lengths; it is right, and equal lengths give equal bits."""
    from trtllm_vattn.attention.select import make_attention
    from trtllm_vattn.attention.shares import SharesAttention

    chooser = random.Random(1)
    lanes, longest = 24, 3000
    shape = CacheShape(3, 4, 128, torch.bfloat16, lanes, longest)
    checked = Checked(shape, 16, device, [longest] * lanes, features, layers_per_range=3)
    for layer in (0, 1):
        for x in (checked.cache.layer(layer).k, checked.cache.layer(layer).v):
            x[:lanes].normal_()
    attention = make_attention("shares", checked.cache, 16, 0.3 * 128**-0.5)
    assert isinstance(attention, SharesAttention)
    attention._features = features
    for queries in (1, 4, 8):
        q = torch.randn(lanes, queries, 16, 128, device=device, dtype=torch.bfloat16)
        lengths, counts = (torch.full((lanes,), 8, dtype=torch.int32, device=device) for _ in range(2))
        slots = torch.arange(lanes, device=device)
        out = torch.empty_like(q)

        def step(
            backend: SharesAttention = attention,
            q: torch.Tensor = q,
            given: tuple[torch.Tensor, ...] = (counts, lengths, slots, out),
        ) -> None:
            backend.begin_step()
            for layer in range(3):
                backend.decode_queries(layer, q, *given)

        step()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        for _ in range(40):
            now = [chooser.choice((0, chooser.randint(1, 64), chooser.randint(1, longest))) for _ in range(lanes)]
            many = [min(n, chooser.randint(0, queries)) for n in now]
            order = chooser.sample(range(lanes), lanes)
            for tensor, values in ((lengths, now), (counts, many), (slots, order)):
                tensor.copy_(torch.tensor(values))
            bits = []
            for _ in range(3):
                out.fill_(torch.nan)
                captured.replay()
                bits.append(out.clone())
            torch.cuda.synchronize()
            checked.compare(q, out, order, now, many)
            assert all(torch.equal(bits[0], other) for other in bits), "equal lengths gave different bits"
        assert not attention._workspace.arrived.any()
    print(f"done random lengths under one graph: {checked.worst:.1e}", flush=True)
    checked.cache.close()


if __name__ == "__main__":
    torch.manual_seed(0)
    device, case, *path = sys.argv[1:]
    hopper = path == ["hopper"]
    with torch.inference_mode():
        cases = {"shapes": shapes, "shares": shares, "queries": queries, "far": far, "graph": graph}
        {**cases, "nan": not_a_number}[case](device, Features(hopper, hopper))
    print("all cases passed", flush=True)
