"""A random life of a cache that quantises and compacts, against a model that knows which positions each head holds; and
what is left of evicted tokens, which nobody reads."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtllm_vattn.attention.gather import quantised
from trtllm_vattn.attention.options import FP8, LayerOptions
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.compression import compact
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import HostMemoryFull, KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver

LAYERS, HEADS, DIM, SLOTS, LONGEST, PAGE = 2, 2, 16, 3, 90, 4096
Held = list[list[list[int]]]
"""By layer and head: the position of each token that is held."""


def rows_of(author: int, layer: int, positions: range) -> torch.Tensor:
    """K and V float32 ``[2, tokens, heads, head_dim]`` of an author's tokens."""
    at = torch.arange(positions.start, positions.stop).view(1, -1, 1, 1)
    part, head, d = (torch.arange(size) for size in (2, HEADS, DIM))
    number = 131 * author + 17 * at + 5 * layer + 3 * head[:, None] + 7 * part.view(2, 1, 1, 1) + d
    return 0.37 * number.remainder(251) - 40


class CompressedMachine(RuleBasedStateMachine):
    """`model` has each sequence's author and what each head holds of it."""

    @initialize(
        dtype=st.sampled_from([torch.float32, FP8]),
        heads=st.sampled_from([1, None]),
        layers=st.sampled_from([1, 2]),
        pages=st.integers(24, 60),
    )
    def start(self, dtype: torch.dtype, heads: int | None, layers: int, pages: int) -> None:
        self.host = HostDriver()
        shape = CacheShape(LAYERS, HEADS, DIM, dtype, SLOTS, LONGEST)
        config = CacheConfig(
            own_lengths=True,
            heads_per_range=heads,
            layers_per_range=layers,
            extent_classes=1,
            lookahead=0,
            host_memory=1 << 16,
        )
        self.cache = KVCacheManager(shape, self.host, pages * PAGE, config=config)
        self.attention = TorchAttention(self.cache, HEADS)
        self.scales = (torch.tensor([0.5, 2.0]), torch.tensor([0.25])) if dtype == FP8 else (None, None)
        self.attention.set_options([LayerOptions(k_scale=self.scales[0], v_scale=self.scales[1])] * LAYERS)
        self.row = DIM * 2 * dtype.itemsize
        """Bytes of a token of one head in one layer."""
        self.model: dict[int, tuple[int, Held]] = {}
        self.count = 0

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    def write(self, sequence: int, positions: range) -> None:
        """Through the backend, which turns numbers to eight bits."""
        slots = torch.full((len(positions),), self.cache.slot_of(sequence))
        author, held = self.model[sequence]
        for layer in range(LAYERS):
            k, v = rows_of(author, layer, positions)
            self.attention.write(layer, k, v, slots, torch.tensor(positions))
        for heads in held:
            for there in heads:
                there += positions

    def group_of(self, layer: int, head: int) -> int:
        parts = len(self.cache.head_groups(layer))
        return self.cache.group_of(layer, head * parts // HEADS)

    def mapped(self, sequence: int) -> tuple[int, bool]:
        """Bytes that are mapped for a sequence, and whether others hold some of them."""
        groups = self.cache.arena.slots[self.cache.slot_of(sequence)].groups
        extents = [m.extent for group in groups for stripe in group.stripes for m in stripe]
        return sum(extent.size for extent in extents), any(extent.mappings > 1 for extent in extents)

    @rule(tokens=st.integers(1, LONGEST + 1))
    def admit(self, tokens: int) -> None:
        sequence = self.count
        with contextlib.suppress(KVCacheOutOfMemory, NoFreeSlot, SequenceTooLong):
            self.cache.admit(sequence, tokens)
            self.count += 1
            self.model[sequence] = sequence, [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
            self.write(sequence, range(tokens))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=st.integers(1, 20))
    def extend(self, data: st.DataObject, more: int) -> None:
        sequence = self.some(data)
        length = int(self.cache.lengths[self.cache.slot_of(sequence)])
        with contextlib.suppress(KVCacheOutOfMemory, SequenceTooLong):
            self.cache.extend(sequence, more)
            self.write(sequence, range(length, length + more))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        """Each head keeps places of its own; bytes are those of a simple model: a range has as many whole pages as its
        longest head's tokens take."""
        sequence = self.some(data)
        _, held = self.model[sequence]
        kept = [
            [sorted(data.draw(st.sets(st.sampled_from(range(len(there))), min_size=1))) for there in heads]
            for heads in held
        ]
        before, shared = self.mapped(sequence)
        try:
            done = compact(self.cache, sequence, [[torch.tensor(each) for each in row] for row in kept])
        except KVCacheOutOfMemory:
            # What others hold, too, has to become its own first.
            assert shared
            return
        longest: dict[int, int] = {}
        members: dict[int, int] = {}
        evicted = 0
        for layer in range(LAYERS):
            for head in range(HEADS):
                group = self.group_of(layer, head)
                longest[group] = max(longest.get(group, 0), len(kept[layer][head]))
                members[group] = members.get(group, 0) + 1
                evicted += len(held[layer][head]) - len(kept[layer][head])
        assert done.evicted_bytes == evicted * self.row
        ranges = {group: len(each.ranges) for group, each in enumerate(self.cache.arena.slots[0].groups)}
        after = sum(
            ranges[group] * -(-most * members[group] // ranges[group] * self.row // PAGE) * PAGE
            for group, most in longest.items()
        )
        assert self.mapped(sequence)[0] == after
        assert shared or done.returned_bytes == before - after
        places = [[row.tolist() for part in parts for row in part] for parts in done.places]
        for layer, rows in enumerate(places):
            for head, row in enumerate(rows):
                assert set(kept[layer][head]) <= set(row)
                assert len(row) == longest[self.group_of(layer, head)]
                held[layer][head] = [held[layer][head][place] for place in row]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = self.some(data)
        with contextlib.suppress(KVCacheOutOfMemory, NoFreeSlot):
            self.cache.fork(sequence, self.count, int(self.cache.lengths[self.cache.slot_of(sequence)]))
            author, held = self.model[sequence]
            self.model[self.count] = author, [[list(there) for there in heads] for heads in held]
            self.count += 1

    @precondition(lambda self: self.model and self.cache.free_slots())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        self.cache.move(self.some(data), data.draw(st.sampled_from(self.cache.free_slots())))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def suspend_and_resume(self, data: st.DataObject) -> None:
        sequence = self.some(data)
        with contextlib.suppress(HostMemoryFull):
            self.cache.suspend(sequence)
            try:
                self.cache.resume(sequence)
            except KVCacheOutOfMemory:
                self.cache.release(sequence)
                del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = self.some(data)
        self.cache.release(sequence)
        del self.model[sequence]

    @rule()
    def map_ahead(self) -> None:
        self.cache.map_ahead()

    @invariant()
    def each_head_holds_what_was_written(self) -> None:
        for sequence, (author, held) in self.model.items():
            slot = self.cache.slot_of(sequence)
            for layer, heads in enumerate(held):
                written = rows_of(author, layer, range(LONGEST + 20))
                wanted = [
                    quantised(each, self.cache.shape.dtype, scale)
                    for each, scale in zip(written, self.scales, strict=True)
                ]
                parts = [kv for kv in self.cache.head_groups(layer) if isinstance(kv, FlatKV)]
                for head, there in enumerate(heads):
                    assert self.cache.lengths_of(self.group_of(layer, head))[slot] == len(there)
                    part, within = divmod(head, HEADS // len(parts))
                    for stored, want in zip((parts[part].k, parts[part].v), wanted, strict=True):
                        found = stored[slot, : len(there), within]
                        assert torch.equal(found.float(), want[there, head].float()), (sequence, layer, head)

    @invariant()
    def the_books_agree(self) -> None:
        self.cache.check_integrity()
        held = sum(len(there) for _, each in self.model.values() for heads in each for there in heads)
        assert self.cache.stats().live_bytes == held * self.row

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert (self.host.live_mappings, self.host.live_handles, self.host.live_reservations) == (0, 0, 0)


TestCompressedMachine = CompressedMachine.TestCase
TestCompressedMachine.settings = settings(max_examples=12, stateful_step_count=16, deadline=None)


DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name != "cpu" and available()["shares"] != "yes":
        pytest.skip(available()["shares"])
    return name


def test_nothing_of_an_evicted_token_is_read_again(device: str) -> None:
    """Evicted tokens are NaN, which would show in any sum: in the sequence's own next steps, behind a suspension, and
    in those of sequences that take its pages."""
    dtype, dim = (torch.float32, 64) if device == "cpu" else (torch.bfloat16, 64)
    shape = CacheShape(1, 2, dim, dtype, 3, 80 if device == "cpu" else 12_000)
    tokens = shape.max_seq_len - 20
    config = CacheConfig(own_lengths=True, heads_per_range=1, extent_classes=1, lookahead=0, host_memory="64MiB")
    driver = open_driver(device)
    page = driver.granularity()
    # The dummy slot's, one whole sequence's, and a page a head for a small one beside it.
    budget = page * 2 * (2 + -(-shape.max_seq_len * shape.token_bytes // 2 // page))
    generator = torch.Generator(device).manual_seed(0)
    with KVCacheManager(shape, driver, budget, config=config) as cache, torch.inference_mode():
        attention = make_attention("shares", cache, 4)
        q = torch.randn(shape.num_slots, 4, dim, generator=generator, device=device).to(dtype)

        def write(sequence: int, positions: range, number: float) -> None:
            at = torch.tensor(positions, device=device)
            k = torch.full((len(positions), 2, dim), number, device=device, dtype=dtype)
            attention.write(0, k, k, torch.full_like(at, cache.slot_of(sequence)), at)

        def expect(sequence: int, number: float) -> None:
            """A sequence's lane gets what all its values are."""
            found = attended(sequence)
            assert torch.allclose(found, torch.full_like(found, number), rtol=1e-2), f"sequence {sequence}"

        def attended(sequence: int) -> torch.Tensor:
            slot = cache.slot_of(sequence)
            lengths = torch.zeros(shape.num_slots, dtype=torch.int32, device=device)
            lengths[slot] = int(cache.lengths[slot])
            attention.begin_step()
            return attention.decode(0, q, lengths)[slot].float()

        cache.admit(0, tokens)
        write(0, range(tokens), float("nan"))
        for position in (3, tokens // 2, tokens - 1):
            write(0, range(position, position + 1), 2.0)
        assert attended(0).isnan().all()
        extents = _extents(cache, 0)
        compact(cache, 0, [[torch.tensor([3, tokens // 2, tokens - 1], device=device)] * 2])
        expect(0, 2.0)
        cache.extend(0, 2)
        write(0, range(tokens, tokens + 2), 2.0)
        cache.suspend(0)
        cache.resume(0)
        expect(0, 2.0)
        # Pages that went back, beside it; then its own slot and pages.
        for sequence, before, long in ((1, 0, 60), (2, 1, 22)):
            cache.admit(sequence, 1)
            write(sequence, range(1), 5.0)
            for position in range(1, long):
                cache.extend(sequence, 1)
                write(sequence, range(position, position + 1), 5.0)
                if position % 10 == 0:
                    expect(sequence, 5.0)
            assert extents & _extents(cache, sequence), "it has none of the first one's pages, which proves nothing"
            cache.release(before)


def _extents(cache: KVCacheManager, sequence: int) -> set[int]:
    groups = cache.arena.slots[cache.slot_of(sequence)].groups
    return {mapping.extent.serial for group in groups for stripe in group.stripes for mapping in stripe}
