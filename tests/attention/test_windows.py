"""Attention over caches that keep windows gives what attention with a mask over all tokens gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trtllm_vattn.attention.base import Attention, PackedPrefill
from trtllm_vattn.attention.options import FP8, LayerOptions, PrefixTables
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.attention.windows import WindowedAttention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.contiguous import ContiguousCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.prefill import packed_prefill

HEADS, DIM, SLOTS, LONGEST, ROWS = 4, 16, 4, 96, 64
SHAPE = CacheShape(3, 2, DIM, torch.float32, SLOTS, LONGEST, windows=(8, None, 1))


class Pair:
    """A cache with windows beside one that keeps all tokens and masks them, given the same steps."""

    def __init__(self, name: str, shape: CacheShape = SHAPE, sinks: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.caches = [make_cache(kind, each, "cpu") for kind, each in (("vattn", shape), ("contiguous", _full(shape)))]
        options = [
            LayerOptions(window, sink_logits=torch.randn(HEADS, generator=generator) if sinks else None)
            for window in shape.windows
        ]
        self.ours = make_attention(name, self.caches[0], HEADS, options=options, most_rows=ROWS)
        self.masked = make_attention("torch", self.caches[1], HEADS, options=options)
        self.shape, self.random = shape, np.random.default_rng(1)
        self.lengths = np.zeros(SLOTS, np.int64)
        for cache in self.caches:
            for slot in range(SLOTS):
                cache.admit(slot, 1)

    def step(
        self, decoding: list[int], chunks: list[tuple[int, int]], captured: bool = False, padding: int = 0
    ) -> None:
        """One token each of slots, and chunks of so many tokens of other slots; all layers agree."""
        rows = [(slot, int(self.lengths[slot])) for slot in decoding]
        first, numbers = len(rows), []
        for slot, tokens in chunks:
            start = int(self.lengths[slot])
            numbers.append((tokens, start + tokens, len(rows) + tokens - 1, slot, len(rows)))
            rows += [(slot, start + token) for token in range(tokens)]
            self.lengths[slot] += tokens
        self.lengths[decoding] += 1
        rows += [(SLOTS, 0)] * padding
        for cache in self.caches:
            cache.prepare_step(self.lengths)
        slots, positions = torch.tensor(rows, dtype=torch.int64).T.contiguous()
        counts = torch.tensor([self.lengths[slot] for slot in decoding], dtype=torch.int32)
        packed = self.packed(numbers, padding, captured)
        q, k, v = (
            torch.from_numpy(self.random.standard_normal((len(rows), heads, DIM), np.float32))
            for heads in (HEADS, 2, 2)
        )
        turns = [torch.from_numpy(self.random.standard_normal((len(rows), DIM), np.float32)) for _ in range(2)]
        real = len(rows) - padding
        for attention in (self.ours, self.masked):
            attention.begin_step()
            if packed is not None:
                attention.begin_prompts(packed)
        for layer in range(self.shape.num_layers):
            found = []
            for attention in (self.ours, self.masked):
                turned = attention.rotate_and_write(layer, q, k, v, *turns, slots, positions)
                found.append(self.attend(attention, layer, turned, counts, slots[:first], packed))
            close = torch.allclose(found[0][:real], found[1][:real], atol=2e-5, rtol=1e-4)
            assert close, (layer, decoding, chunks)
            assert bool(found[0].isfinite().all())

    def packed(self, numbers: list[tuple[int, ...]], padding: int, captured: bool) -> PackedPrefill | None:
        if not numbers:
            return None
        columns = torch.tensor(numbers, dtype=torch.int64).T
        parts = [(count + (padding if len(numbers) == 1 else 0), end) for count, end, *_ in numbers]
        made = packed_prefill(columns, parts)
        return replace(made, chunks=()) if captured else made

    def attend(
        self,
        attention: Attention,
        layer: int,
        q: torch.Tensor,
        counts: torch.Tensor,
        slots: torch.Tensor,
        packed: PackedPrefill | None,
    ) -> torch.Tensor:
        if packed is None:
            return attention.decode(layer, q, counts, slots)
        if attention is self.masked:
            descriptors = packed.descriptors
            assert descriptors is not None
            out = torch.zeros_like(q)
            if len(counts):
                out[: len(counts)] = attention.decode(layer, q[: len(counts)], counts, slots)
            return attention.attend_chunks(layer, q, out, descriptors)  # type: ignore[attr-defined]
        if len(counts):
            return attention.attend_mixed(layer, q, counts, slots, packed)
        return attention.prefill_packed(layer, q, packed)

    def close(self) -> None:
        for cache in self.caches:
            cache.close()


def _full(shape: CacheShape) -> CacheShape:
    return replace(shape, windows=())


@pytest.mark.parametrize("name", ["torch", "shares"])
def test_windows_are_attended_to_as_with_a_mask(name: str) -> None:
    pair = Pair(name)
    pair.step([], [(0, 5)])
    pair.step([], [(1, 20), (2, 3)], padding=7)
    for _ in range(10):
        pair.step([0, 1, 2], [])
    # Chunks longer and shorter than the window, behind others of their sequences, and beside decoding ones.
    pair.step([0, 2], [(3, 1), (1, 6)], padding=3)
    pair.step([2], [(0, 30)], padding=1)
    pair.step([], [(3, 17)], padding=15)
    for _ in range(9):
        pair.step([0, 1, 2, 3], [])
    pair.step([1], [(0, 2), (2, 9), (3, 12)])
    pair.close()


def test_a_captured_pass_reads_its_chunks_on_the_device() -> None:
    pair = Pair("shares")
    for captured in (False, True):
        pair.step([], [(0, 20), (1, 3), (2, 11)], captured)
        pair.step([1, 0], [(3, 9), (2, 2)], captured, padding=5)
    pair.close()


def test_rows_of_eight_bits_are_copied_as_they_are() -> None:
    shape = replace(SHAPE, dtype=FP8)
    scale = torch.tensor([0.02, 0.01])
    options = [LayerOptions(window, k_scale=scale, v_scale=scale) for window in shape.windows]
    pair = Pair("torch", shape, sinks=False)
    for attention in (pair.ours, pair.masked):
        attention.set_options(options)
    pair.step([], [(0, 20), (1, 3)])
    for _ in range(9):
        pair.step([0, 1], [(2, 7)] if pair.lengths[2] < 50 else [])
    pair.close()


def test_no_other_sequence_sees_what_left_a_window() -> None:
    """A slot's next sequence reads nothing of the one before, whatever lies in its rows."""
    pair = Pair("torch")
    pair.step([], [(0, 40)])
    kept = pair.caches[0]
    kept.release(0)
    for layer in (0, 2):
        kept.layer(layer).k[0] = kept.layer(layer).v[0] = torch.nan
    pair.caches[1].release(0)
    for cache in pair.caches:
        assert cache.admit(0, 1) == 0
    pair.lengths[0] = 0
    pair.step([], [(0, 3)])
    for _ in range(12):
        pair.step([0], [])
    pair.close()


def test_what_windows_do_not_serve_is_refused_by_name() -> None:
    cache = ContiguousCache(SHAPE, "cpu")
    made = make_attention("torch", cache, HEADS)
    assert isinstance(made, WindowedAttention)
    assert "2 of 3 layers keep a window" in made.describe()
    for options, why in (
        (LayerOptions(9), "layer 0 attends to a window of 9 tokens, the cache keeps 8"),
        (LayerOptions(8, first_tokens=2), "first tokens that stay visible"),
    ):
        with pytest.raises(ConfigError, match=why):
            made.set_options([options] * 3)
    with pytest.raises(ConfigError, match="the windowed backend cannot serve tokens that lie in another slot"):
        made.set_prefixes(PrefixTables.empty(SLOTS, SLOTS, cache.device))
    with pytest.raises(ConfigError, match="backend alone cannot serve a cache that keeps windows"):
        type(made.inner)(cache, HEADS)
    many = make_attention("shares", cache, HEADS, most_rows=ROWS)
    many.most_chunks = 1
    packed = PackedPrefill((), (), torch.zeros(2, 4, dtype=torch.int32))
    many.begin_step()
    many.begin_prompts(packed)
    rows = torch.zeros(2, 2, DIM)
    many.write(0, rows, rows, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="a captured pass of 2 chunks over windows; 1 at most"):
        many.prefill_packed(0, torch.zeros(2, HEADS, DIM), packed)
    with pytest.raises(ConfigError, match="a pass of 65 rows over windows of a backend made for 64"):
        many.write(0, *[torch.zeros(65, 2, DIM)] * 2, *[torch.zeros(65, dtype=torch.int64)] * 2)
    cache.close()
