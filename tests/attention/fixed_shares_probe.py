"""Decode by fixed shares: the bits of a lane alone, and in random batches.

Run as ``python fixed_shares_probe.py DEVICE CASE [PATH]``, as shares_probe.py is. Over pages mapped exactly to each
length, behind which rows are NaN, every sequence is attended to alone. Then others run beside it, in other lanes, by
other numbers of programs: its bits must be those, and right. Equal shares, which hang on the other lanes, must fail the
same look. Case ``launches`` launches the kernel; ``captured``, on a GPU, replays a captured launch of the backend, 100
times with 128 lanes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import torch

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.shares import FixedSharesAttention
from trtllm_vattn.attention.shares_launch import Features, Pieces, Rows, Settings, Workspace, launch, tensor_maps
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.graphs.capture import captured

BATCHES = 20
LAYER = 1
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Watched:
    """A cache of sequences of these lengths, one a slot, and a query of each."""

    def __init__(self, device: str, shape: CacheShape, group: int, lengths: Sequence[int]) -> None:
        self.shape, self.lengths, self.device = shape, list(lengths), device
        self.heads = group * shape.num_kv_heads
        self.cache = make_cache("vattn", shape, device, lookahead=0)
        for slot, length in enumerate(lengths):
            assert self.cache.admit(slot, length) == slot
        kv = self.cache.layer(LAYER)
        assert isinstance(kv, FlatKV)
        self.kv = kv
        for slot, length in enumerate(lengths):
            for x in (kv.k, kv.v):
                x[slot, : int(self.cache.frontiers[slot])] = torch.nan
                x[slot, :length] = torch.randn(length, *x.shape[2:], device=device).to(x.dtype)
        self.q = torch.randn(len(lengths), self.heads, shape.head_dim, device=device).to(shape.dtype)

    def lanes(self, slots: Sequence[int | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, lengths and slots of lanes, of which None are idle."""
        there = [0 if slot is None else slot for slot in slots]
        lengths = [0 if slot is None else self.lengths[slot] for slot in slots]
        on_device = torch.tensor(there, device=self.device)
        return self.q[on_device], torch.tensor(lengths, dtype=torch.int32, device=self.device), on_device

    def wanted(self, slot: int) -> torch.Tensor:
        """Plain attention in float64, ``[heads, head_dim]``."""
        group = self.heads // self.shape.num_kv_heads
        k, v = (x[slot, : self.lengths[slot]].double().repeat_interleave(group, dim=1) for x in (self.kv.k, self.kv.v))
        weights = (torch.einsum("hd,thd->ht", self.q[slot].double(), k) * self.shape.head_dim**-0.5).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, v)


class Launched:
    """Launches of the kernel; `pieces` None are equal shares."""

    def __init__(self, watched: Watched, features: Features, settings: Settings, pieces: Pieces | None) -> None:
        self.watched, self.features, self.settings, self.pieces = watched, features, settings, pieces

    def __call__(self, slots: Sequence[int | None], programs: int) -> torch.Tensor:
        watched, shape = self.watched, self.watched.shape
        q, lengths, on_device = watched.lanes(slots)
        out = torch.full_like(q, torch.nan)
        rows = Rows.of(watched.heads // shape.num_kv_heads, 1, shape.head_dim)
        workspace = Workspace(q.device, programs, len(slots), shape.num_kv_heads, rows, shape.head_dim, self.pieces)
        for buffer in (workspace.tops, workspace.totals, workspace.outs):
            buffer.fill_(torch.nan)
        launch(
            q[:, None],
            watched.kv,
            out[:, None],
            lengths,
            None,
            on_device,
            scale=shape.head_dim**-0.5,
            workspace=workspace,
            programs=programs,
            settings=self.settings,
            features=self.features,
            tiles=tensor_maps(watched.kv, self.settings.tile) if self.features.tma else None,
            pieces=self.pieces,
        )
        assert not workspace.arrived.any(), "counters are left"
        return out


def batch(chooser: random.Random, slots: int) -> list[int | None]:
    """Some of the slots, in any lanes; the others are idle."""
    chosen = chooser.sample(range(slots), chooser.randint(1, slots))
    lanes: list[int | None] = [*chosen, *[None] * (slots - len(chosen))]
    chooser.shuffle(lanes)
    return lanes


def check_bits(out: torch.Tensor, lanes: Sequence[int | None], alone: Sequence[torch.Tensor]) -> int:
    """How many lanes have other bits than alone. Raises where an idle lane has no zeros."""
    different = 0
    for lane, slot in enumerate(lanes):
        if slot is None:
            assert not out[lane].any(), f"lane {lane} is idle and has no zeros"
        else:
            different += not torch.equal(out[lane], alone[slot])
    return different


def look(launched: Launched, programs: Sequence[int], batches: int) -> int:
    """How many lanes of so many random batches have other bits than alone, where all are right."""
    watched, chooser = launched.watched, random.Random(0)
    count = len(watched.lengths)
    alone = [launched([slot, *[None] * (count - 1)], programs[0])[0] for slot in range(count)]
    for slot, out in enumerate(alone):
        want = watched.wanted(slot)
        error = float((out.double() - want).norm() / want.norm())
        if not error < ERROR[out.dtype]:
            raise SystemExit(f"{watched.lengths[slot]} tokens: error {error}")
    different = 0
    for number in range(batches):
        lanes = batch(chooser, count)
        different += check_bits(launched(lanes, programs[number % len(programs)]), lanes, alone)
    return different


def replayed(attention: Attention, watched: Watched, calls: int) -> int:
    """The same of one captured call of a backend, of all its lanes."""
    chooser, count = random.Random(1), len(watched.lengths)
    q, lengths, slots = watched.lanes([None] * count)
    out = torch.empty_like(q)

    def step() -> None:
        attention.begin_step()
        for _ in range(3):
            attention.decode(LAYER, q, lengths, slots, out)

    graph = captured(step)

    def ask(lanes: Sequence[int | None]) -> torch.Tensor:
        for to, values in zip((q, lengths, slots), watched.lanes(lanes), strict=True):
            to.copy_(values)
        out.fill_(torch.nan)
        graph.replay()
        return out.clone()

    alone = [ask([slot, *[None] * (count - 1)])[0] for slot in range(count)]
    batches = [batch(chooser, count) for _ in range(calls)]
    return sum(check_bits(ask(lanes), lanes, alone) for lanes in batches)


def main(device: str, case: str, path: str = "plain") -> None:
    torch.manual_seed(0)
    chooser = random.Random(2)
    features = Features(path == "hopper", path == "hopper")
    if device == "cpu":
        lengths = [15, 40, 70]
        shape = CacheShape(2, 2, 64, torch.float32, len(lengths), 70)
        watched, settings, pieces = Watched(device, shape, 3, lengths), Settings(16, 4, 2, 1, 1), Pieces(32, 3)
        programs = [1, 3, 7]
    else:
        lengths = [1, 511, 512, 513, 1024, 4096, *(chooser.randint(1, 4096) for _ in range(122))]
        shape = CacheShape(2, 8, 128, torch.bfloat16, len(lengths), 4096)
        watched, settings, pieces = Watched(device, shape, 4, lengths), Settings(64, 4, 3, 3), Pieces(512, 8)
        programs = [132, 396, 17]
    if case == "captured":
        attention = FixedSharesAttention(watched.cache, watched.heads)
        attention._features = features
        if different := replayed(attention, watched, 100):
            raise SystemExit(f"captured, {different} lanes of 100 batches have other bits than alone")
    else:
        equal = look(Launched(watched, features, settings, None), programs, 3)
        fixed = look(Launched(watched, features, settings, pieces), programs, BATCHES)
        print(f"lanes with other bits than alone: {fixed} by fixed shares, {equal} by equal ones")
        if fixed or not equal:
            raise SystemExit("fixed shares must have none, and equal shares some")
    watched.cache.close()


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
    print("all cases passed", flush=True)
