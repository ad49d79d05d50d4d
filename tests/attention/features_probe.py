"""What the kernels serve beyond causal attention to a sequence's own slot, against plain float64 attention: windows and
sinks, soft caps, first tokens in another slot and read once for several lanes, rows of eight bits, lengths a head.

Run as ``python features_probe.py DEVICE CASE [PATH]``, the device ``cpu`` (in Triton's interpreter: TRITON_INTERPRET=1)
or a GPU, the path ``hopper`` (TMA) or ``plain``. What nobody may read is NaN, or is not mapped: a load too far ends the
process, or is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from trtllm_vattn.attention.gather import quantised, restored
from trtllm_vattn.attention.kv_write import rotate_and_write_kv, write_kv
from trtllm_vattn.attention.options import FP8, PLAIN, LayerOptions, PrefixTables
from trtllm_vattn.attention.prompt_launch import PromptSettings, PromptWorkspace, attend, plan
from trtllm_vattn.attention.prompts import head_tables
from trtllm_vattn.attention.shares_launch import (
    Extras,
    Features,
    Rows,
    Settings,
    SharedReads,
    Workspace,
    launch,
    launch_prefixes,
    tensor_maps,
)
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.vmm.open import open_driver

KV_HEADS, GROUP, DIM = 2, 3, 64
HEADS = KV_HEADS * GROUP
PROGRAMS = 7
LOUD = 8.0
"""The first number of queries whose scores are lowered by that of the keys."""


class Probe:
    """The kernels over one layer of a cache, all of whose backed memory is NaN at first."""

    def __init__(
        self,
        device: str,
        hopper: bool,
        slots: int,
        longest: int,
        dtype: torch.dtype,
        heads: int = 0,
        group: int = GROUP,
        dim: int = DIM,
    ) -> None:
        self.device, self.worst = torch.device(device), 0.0
        self.group, self.heads, self.dim, self.scale = group, KV_HEADS * group, dim, 0.3 * dim**-0.5
        config = CacheConfig(lookahead=0, layers_per_range=1, own_lengths=bool(heads), heads_per_range=heads or None)
        shape = CacheShape(1, KV_HEADS, dim, dtype, slots, longest)
        self.cache = KVCacheManager(shape, open_driver(device), "1GiB" if device == "cpu" else "4GiB", config=config)
        self.parts = [kv for kv in self.cache.head_groups(0) if isinstance(kv, FlatKV)]
        self.tables = None if not heads else head_tables(self.cache)[0]
        self.features = Features(hopper and not heads and (dtype != torch.float32 or device == "cpu"), hopper)
        self.tile, self.query_dtype = 16, torch.float32 if device == "cpu" else torch.bfloat16
        self.options, self.prefixes = PLAIN, None
        self.quiet = 0.0
        """What every score is lowered by, in all rows that are filled and queries that are asked from then on."""

    def fill(self, slot: int, ranges: Sequence[tuple[int, int]], backed: tuple[int, int]) -> None:
        """Random rows in some ranges of tokens, NaN elsewhere between `backed`."""
        for kv in self.parts:
            for x, lower in ((kv.k, self.quiet), (kv.v, 0.0)):
                raw = x if x.dtype != FP8 else x.view(torch.uint8)
                raw[slot, backed[0] : backed[1]] = torch.nan if x.dtype != FP8 else 0x7F
                for start, stop in ranges:
                    rows = torch.randn(stop - start, *x.shape[2:], device=self.device)
                    if lower:
                        rows[..., 0] = -lower / (LOUD * self.scale)
                    rows = rows.to(x.dtype)
                    raw[slot, start:stop] = rows if x.dtype != FP8 else rows.view(torch.uint8)

    def queries(self, *rows: int) -> torch.Tensor:
        """Random queries, ``[*rows, heads, head_dim]``."""
        q = torch.randn(*rows, self.heads, self.dim, device=self.device)
        if self.quiet:
            q[..., 0] = LOUD
        return q.to(self.query_dtype)

    def truth(self, q: torch.Tensor, slot: int, sees: int, shared: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """A query's output, q ``[heads, head_dim]``, that sees so many tokens; the first ``shared[1]`` in
        ``shared[0]``."""
        options, out = self.options, torch.zeros(self.heads, self.dim, dtype=torch.float64, device=self.device)
        for head in range(KV_HEADS):
            held = sees
            if self.tables is not None:
                held -= int(self.cache.length_deficits[self.cache.group_of(0, head // self.parts[0].k.shape[2]), slot])
            where = [slot] * held
            if self.prefixes is not None and (border := int(self.prefixes.borders[slot])):
                where[:border] = [int(self.prefixes.base_slots[slot])] * min(border, held)
            where[: shared[1]] = [shared[0]] * min(shared[1], held)
            if not where:
                continue
            lowest = 0 if options.window is None else max(0, held - options.window)
            seen = [token for token in range(held) if token >= lowest or token < options.first_tokens]
            k, v = self.rows([where[token] for token in seen], seen, head)
            for each in range(head * self.group, (head + 1) * self.group):
                scores = k @ q[each].double() * self.scale
                if options.softcap is not None:
                    scores = options.softcap * (scores / options.softcap).tanh()
                if options.sink_logits is not None:
                    scores = torch.cat((scores, options.sink_logits[each : each + 1].double()))
                out[each] = scores.softmax(0)[: len(seen)] @ v
        return out

    def rows(self, slots: Sequence[int], tokens: Sequence[int], head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V float64 ``[tokens, head_dim]`` of a KV head at these tokens of these slots."""
        heads = self.parts[0].k.shape[2]
        kv, own = self.parts[head // heads], head % heads
        at, found = (torch.tensor(slots), torch.tensor(tokens)), []
        for x, scale in ((kv.k, self.options.k_scale), (kv.v, self.options.v_scale)):
            scale = scale if scale is None or len(scale) == 1 else scale[head : head + 1]
            found.append(restored(x[at][:, own : own + 1], scale)[:, 0].double())
        return found[0], found[1]

    def note(self, what: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """Raise where the two are not alike."""
        error = float((got.double() - want).norm() / want.norm().clamp(min=1e-9))
        self.worst = max(self.worst, error)
        limit = 1e-4 if self.query_dtype == torch.float32 and self.parts[0].k.dtype != FP8 else 1e-2
        if not error < limit:
            raise SystemExit(f"{what}: error {error}")

    def decode(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        queries: int,
        counts: Sequence[int] | None = None,
        compare: bool = True,
    ) -> torch.Tensor:
        """Launch for lanes, and compare unless told otherwise; with groups in the tables, what these share is read
        first. Returns the output."""
        device, shape = self.device, self.cache.shape
        q = self.queries(len(slots), queries)
        out = torch.full_like(q, torch.nan)
        rows = Rows.of(self.group, queries, self.dim)
        settings = Settings(self.tile, 4, 2, start=1)
        tiles = tensor_maps(self.parts[0], self.tile) if self.features.tma else None
        reads, kv = None, self.parts[0]
        if self.prefixes is not None and bool(self.prefixes.shared.any()):
            reads = SharedReads(device, PROGRAMS, len(self.prefixes.members), queries, self.heads, KV_HEADS, self.dim)
            for buffer in (reads.tops, reads.outs, reads.workspace.tops, reads.workspace.totals, reads.workspace.outs):
                buffer.fill_(torch.nan)
            launch_prefixes(
                q,
                kv,
                self.prefixes,
                reads,
                scale=self.scale,
                options=self.options,
                programs=PROGRAMS,
                settings=settings,
                features=Features(self.features.tma, False),
                tiles=tiles,
            )
            assert not reads.workspace.arrived.any(), "counters are left"
        workspace = Workspace(device, PROGRAMS, shape.num_slots, KV_HEADS, rows, self.dim)
        for buffer in (workspace.tops, workspace.totals, workspace.outs):
            buffer.fill_(torch.nan)
        on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, slots, counts or [0])]
        launch(
            q,
            kv,
            out,
            on_device[0],
            None if counts is None else on_device[2],
            on_device[1],
            scale=self.scale,
            workspace=workspace,
            programs=PROGRAMS,
            settings=settings,
            features=Features(self.features.tma, False),
            tiles=tiles,
            extras=Extras(self.options, self.prefixes, reads, self.tables),
        )
        assert not workspace.arrived.any(), "counters are left"
        for lane, (slot, length) in enumerate(zip(slots, lengths, strict=True) if compare else ()):
            count = (counts or [queries] * len(slots))[lane] if length else 0
            assert out[lane].isfinite().all(), f"lane {lane} is not finite"
            assert not out[lane, count:].any(), f"lane {lane}: queries past {count} are no zeros"
            shared = self.group_of(lane) if reads is not None else (0, 0)
            for query in range(count):
                want = self.truth(q[lane, query], slot, length - count + 1 + query, shared)
                self.note(f"lane {lane} of {length}, query {query} of {count}", out[lane, query], want)
        return out

    def group_of(self, lane: int) -> tuple[int, int]:
        """The slot in which a lane's group reads, and how many tokens."""
        tokens = int(self.prefixes.shared[lane])
        for slot, _, first, count in self.prefixes.groups.tolist():
            if lane in self.prefixes.members[first : first + count].tolist():
                return slot, tokens
        return 0, 0

    def prompts(self, chunks: Sequence[tuple[int, int, int]], compare: bool = True) -> torch.Tensor:
        """Launch for chunks of (rows, length, slot), and compare unless told otherwise; returns the output."""
        rows = sum(count for count, _, _ in chunks)
        q = self.queries(rows)
        out = torch.full_like(q, torch.nan)
        firsts = [sum(count for count, _, _ in chunks[:i]) for i in range(len(chunks))]
        numbers = [[first, *chunk] for first, chunk in zip(firsts, chunks, strict=True)]
        descriptors = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        settings = PromptSettings(16, 16, 4, 2) if self.device.type == "cpu" else PromptSettings(64, 64, 4, 2)
        workspace = PromptWorkspace(self.device, 132, self.dim)
        planned = plan(
            descriptors, rows, 0, self.heads, KV_HEADS, settings, PROGRAMS, workspace.most_parts, self.options
        )
        tiles = tensor_maps(self.parts[0], settings.block_n) if self.features.tma else None
        extras = Extras(self.options, self.prefixes, heads=self.tables)
        attend(q, self.parts[0], out, planned, workspace, self.scale, tiles, extras)
        assert not workspace.arrived.any(), "counters are left"
        for first, count, length, slot in numbers if compare else ():
            for row in range(count):
                want = self.truth(q[first + row], slot, length - count + 1 + row)
                self.note(f"row {row} of {count} up to {length} in slot {slot}", out[first + row], want)
        return out

    def done(self, what: str) -> None:
        print(f"done {what}: {self.worst:.1e}", flush=True)
        self.cache.close()


def windows(device: str, hopper: bool) -> None:
    """Windows with and without first tokens and sink logits; what lies behind them is NaN, or unmapped."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = [1, 17, 40, 100, 163]
    for window, first in ((20, 0), (33, 5), (7, 40)):
        probe = Probe(device, hopper, len(lengths), 192, dtype)
        logits = torch.randn(HEADS, device=device) if first else None
        probe.options = LayerOptions(window, first, logits)
        for slot, length in enumerate(lengths):
            probe.cache.admit(slot, length)
            low = max(0, length - 10 + 1 - window)
            seen = [(0, length)] if first >= low else [(0, first), (low, length)]
            probe.fill(slot, seen, (0, int(probe.cache.frontiers[slot])))
            if not first and low:
                probe.cache.arena.raise_lower_edge(slot, low, probe.cache._fence())
                probe.cache.arena.complete_pending_unmaps(wait=True)
        order = [4, 0, 3, 2, 1]
        probe.decode(order, [lengths[slot] for slot in order], 1)
        probe.decode([4, 3, 2, 1], [lengths[slot] for slot in (4, 3, 2, 1)], 3, [3, 1, 0, 2])
        probe.prompts([(10, 163, 4), (1, 1, 0), (7, 100, 3), (10, 17, 1)])
        probe.done(f"window {window}, {first} first tokens")


def prefixes(device: str, hopper: bool) -> None:
    """First tokens in another slot; and read once for several lanes, whose own copies of them are NaN."""
    probe = Probe(device, hopper, 8, 256, torch.float32 if device == "cpu" else torch.bfloat16)
    borders, lengths = {1: 90, 2: 64, 4: 33}, [150, 130, 200, 170, 40, 129, 9]
    for slot, length in enumerate(lengths):
        border = borders.get(slot, 0)
        probe.cache.admit(slot, length, **({"prefix": (0, border)} if border else {}))
        start = 0 if probe.cache.lower_edges is None else int(probe.cache.lower_edges[slot])
        probe.fill(slot, [(border, length)], (start, int(probe.cache.frontiers[slot])))
    probe.prefixes = PrefixTables.empty(8, 8, probe.device)
    probe.prefixes.set_prefixes([(slot, 0, border) for slot, border in borders.items()])
    order = [2, 6, 0, 1, 4]
    probe.decode(order, [lengths[slot] for slot in order], 1)
    probe.decode(order, [lengths[slot] for slot in order], 2, [2, 1, 0, 2, 1])
    probe.prompts([(20, 130, 1), (3, 200, 2), (5, 40, 4), (9, 9, 6), (17, 150, 0)])
    # Lanes 0, 2 and 3 share 64 tokens of slot 0; lanes 4 and 5, in slots 3 and 5, share 101 of slot 3.
    for kv in probe.parts:
        for x in (kv.k, kv.v):
            x[5, :101] = torch.nan
    order = [2, 6, 0, 1, 3, 5, 4]
    for queries, counts in ((1, None), (2, [2, 1, 0, 2, 1, 2, 2])):
        probe.prefixes.set_groups([(0, 64, [0, 2, 3]), (3, 101, [5, 4])])
        probe.decode(order, [lengths[slot] for slot in order], queries, counts)
        # A lane became idle; and there are no groups at all.
        probe.decode(order[:4], [lengths[slot] if slot else 0 for slot in order[:4]], queries)
    probe.done("prefixes")


def softcaps(device: str, hopper: bool) -> None:
    """Soft caps that scores reach: alone, with a window and sink logits, and over what lanes read together."""
    probe = Probe(device, hopper, 4, 128, torch.float32 if device == "cpu" else torch.bfloat16)
    lengths = [60, 1, 100, 33]
    for slot, length in enumerate(lengths):
        probe.cache.admit(slot, length)
        probe.fill(slot, [(0, length)], (0, int(probe.cache.frontiers[slot])))
    logits = torch.randn(HEADS, device=device)
    for options in (LayerOptions(softcap=0.7), LayerOptions(20, sink_logits=logits, softcap=1.5)):
        probe.options = options
        probe.decode([2, 0, 3, 1], [100, 60, 33, 1], 2, [2, 1, 2, 1])
        probe.prompts([(12, 100, 2), (3, 33, 3), (1, 1, 1)])
    probe.options, probe.prefixes = LayerOptions(softcap=0.7), PrefixTables.empty(4, 4, probe.device)
    probe.prefixes.set_groups([(2, 32, [0, 1])])
    probe.decode([2, 0], [100, 60], 1)
    probe.done("soft caps")


def fp8(device: str, hopper: bool) -> None:
    """Rows of eight bits with scales of a tensor and of a head, as the kernels for writing store them."""
    probe = Probe(device, hopper, 4, 128, FP8)
    lengths = [60, 1, 100, 33]
    scales = torch.tensor([0.5, 2.0], device=device), torch.tensor([0.25], device=device)
    for options in (LayerOptions(k_scale=scales[0], v_scale=scales[1]), LayerOptions(window=24, v_scale=scales[0])):
        probe.options = options
        for slot, length in enumerate(lengths):
            if options.window is None:
                probe.cache.admit(slot, length)
            probe.fill(slot, [(0, length)], (0, int(probe.cache.frontiers[slot])))
        tokens = torch.arange(5, device=device)
        k, v = (torch.randn(5, KV_HEADS, DIM, device=device).to(probe.query_dtype) * 100 for _ in range(2))
        k[0, 0, 0], k[1, 0, 0] = 1e4, -1e4
        slots, positions = torch.full_like(tokens, 2), tokens + 70
        given = options.k_scale, options.v_scale
        write_kv(probe.parts[0], k, v, slots, positions, True, None, *given)
        q, cos, sin = torch.randn_like(k).repeat(1, GROUP, 1), torch.ones_like(k[:, 0]), torch.zeros_like(k[:, 0])
        rotate_and_write_kv(probe.parts[0], q, k, v, cos, sin, slots, positions + 5, True, None, *given)
        for x, new, scale in zip((probe.parts[0].k, probe.parts[0].v), (k, v), given, strict=True):
            want = quantised(new, FP8, scale).float()
            for start in (70, 75):
                same = x[2, start : start + 5].float() == want
                if device == "cpu":
                    # Triton's interpreter loses the carry where a number is rounded up to a power of two.
                    same |= want.abs().log2().frac() == 0
                assert same.all(), "stored otherwise than by torch"
        probe.decode([2, 0, 3, 1], [100, 60, 33, 1], 2, [2, 1, 2, 1])
        probe.prompts([(12, 100, 2), (3, 33, 3), (1, 1, 1)])
    probe.done("fp8 rows")


def heads(device: str, hopper: bool) -> None:
    """Heads with memory and lengths of their own: what they keep is written, and read, by these."""
    probe = Probe(device, hopper, 3, 128, torch.float32 if device == "cpu" else torch.bfloat16, heads=1)
    for sequence, length in enumerate((100, 47, 0)):
        probe.cache.admit(sequence, max(1, length))
        probe.fill(sequence, [(0, length)], (0, int(probe.cache.frontiers[sequence])))
    probe.decode([1, 0, 2], [47, 100, 0], 1)
    probe.prompts([(20, 100, 0), (5, 47, 1)])
    probe.cache.set_length(0, 0, 30)
    probe.cache.set_length(1, 1, 3)
    deficits = probe.cache.length_deficits
    for slot, length in ((0, 100), (1, 47)):
        for part, kv in enumerate(probe.parts):
            held = length - int(deficits[part, slot])
            kv.k[slot, held:length], kv.v[slot, held:length] = torch.nan, torch.nan
    k, v = (torch.randn(2, KV_HEADS, DIM, device=device).to(probe.query_dtype) for _ in range(2))
    slots, positions = torch.tensor([0, 1], device=device), torch.tensor([99, 46], device=device)
    for part, kv in enumerate(probe.parts):
        own = slice(part, part + 1)
        write_kv(kv, k[:, own], v[:, own], slots, positions, True, deficits[part])
        for lane, (slot, length) in enumerate(((0, 100), (1, 47))):
            assert torch.equal(kv.k[slot, length - 1 - int(deficits[part, slot])], k[lane, own]), "written elsewhere"
    probe.decode([1, 0, 2], [47, 100, 0], 1)
    probe.decode([0, 1, 2], [100, 47, 0], 2, [2, 2, 0])
    probe.prompts([(10, 100, 0)])
    probe.done("lengths a head")


if __name__ == "__main__":
    torch.manual_seed(0)
    device, case, *path = sys.argv[1:]
    with torch.inference_mode():
        cases = {"windows": windows, "prefixes": prefixes, "softcaps": softcaps, "fp8": fp8, "heads": heads}
        cases[case](device, path == ["hopper"])
    print("all cases passed", flush=True)
