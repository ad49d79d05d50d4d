"""Prompts over flat KV: the kernel in Triton's interpreter and on a GPU, and the reference, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probing import probe, probe_on_card

from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.prompt_launch import MOST_BLOCK_M, prompt_settings
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.attention.shares import HEAD_SIZES
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError

PROBE = Path(__file__).with_name("prompts_probe.py")


@pytest.mark.parametrize("case", ["shapes", "splits", "life", "far", "plans"])
def test_the_kernel_is_right_in_the_interpreter(case: str) -> None:
    probe(PROBE, "cpu", case, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["hopper", "plain"])
@pytest.mark.parametrize("case", ["shapes", "splits", "life", "far", "plans"])
def test_the_kernel_is_right_on_the_card(case: str, path: str) -> None:
    probe_on_card(PROBE, case, path)


LENGTHS = (40, 7, 96, 1)


@pytest.fixture(scope="module", params=["shares", "picked"])
def attention(request: pytest.FixtureRequest) -> Attention:
    cache = make_cache("vattn", CacheShape(2, 2, 64, torch.float32, 4, 96), "cpu")
    for slot, length in enumerate(LENGTHS):
        cache.admit(slot, length)
        for x in (cache.layer(1).k, cache.layer(1).v):
            x[slot, : int(cache.frontiers[slot])] = torch.nan
            x[slot, :length].normal_()
    made = PickedAttention(cache, 6) if request.param == "picked" else make_attention(request.param, cache, 6)
    yield made
    cache.close()


def attended(attention: Attention, q: torch.Tensor, slot: int, length: int) -> torch.Tensor:
    """Queries ``[rows, num_heads, head_dim]``, the last at position ``length - 1``, in float64."""
    kv = attention.cache.layer(1)
    k, v = (x[slot, :length].double().repeat_interleave(3, dim=1) for x in (kv.k, kv.v))
    scores = torch.einsum("rhd,thd->hrt", q.double(), k) * attention.scale
    ahead = torch.ones(len(q), length, dtype=torch.bool).triu(length - len(q) + 1)
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def chunk_of(rows: int, query_len: int, length: int, slot: int) -> PrefillChunk:
    numbers = (torch.tensor([n], dtype=torch.int32) for n in (query_len, length))
    return PrefillChunk(rows, torch.tensor([slot]), *numbers, length)


@pytest.mark.parametrize("spans", [True, False])
def test_chunks_are_attended_to_however_they_are_told(attention: Attention, spans: bool) -> None:
    told = [(9, 40, 0), (7, 7, 1), (30, 96, 2)]
    packed = PackedPrefill(
        [chunk_of(rows, rows, length, slot) for rows, length, slot in told],
        [Span(slot, length - rows, length) for rows, length, slot in told] if spans else (),
    )
    q = torch.randn(50, 6, 64)
    attention.begin_step()
    out = attention.prefill_packed(1, q, packed)
    row = 0
    for rows, length, slot in told:
        near(out[row : row + rows], attended(attention, q[row : row + rows], slot, length))
        row += rows
    assert not out[row:].any()


def test_padding_in_a_chunk_is_finite(attention: Attention) -> None:
    q = torch.randn(16, 6, 64)
    attention.begin_step()
    out = attention.prefill(1, q, chunk_of(16, 5, 40, 0))
    near(out[:5], attended(attention, q[:5], 0, 40))
    assert out.isfinite().all()
    attention.begin_step()
    padded = attention.prefill_packed(1, q, PackedPrefill([chunk_of(8, 5, 40, 0), chunk_of(8, 7, 7, 1)]))
    near(padded[8:15], attended(attention, q[8:15], 1, 7))
    assert padded.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_mixed_pass_is_its_lanes_and_its_chunks(attention: Attention, data: st.DataObject) -> None:
    """Chunks told by descriptors alone, of which some are unused, begin among the rows of the lanes or behind them."""
    order = data.draw(st.permutations(range(4)))
    lanes = data.draw(st.integers(0, 3))
    idle = data.draw(st.integers(0, 2)) if lanes < 3 else 0
    lane_lengths = [data.draw(st.integers(0, LENGTHS[slot])) for slot in order[:lanes]] + [0] * idle
    lane_slots = [*order[:lanes], *[attention.cache.dummy_slot] * idle]
    begin = lanes + data.draw(st.integers(0, idle))
    descriptors, row = [], begin
    for slot in order[lanes:]:
        length = data.draw(st.integers(1, LENGTHS[slot]))
        rows = data.draw(st.integers(0, length))
        descriptors.append([row, rows, length, slot])
        row += rows
    total = max(row, len(lane_slots)) + data.draw(st.integers(0, 3))
    if not total:
        return
    q = torch.randn(total, 6, 64)
    packed = PackedPrefill((), (), torch.tensor(descriptors, dtype=torch.int32))
    attention.begin_step()
    out = attention.attend_mixed(
        1,
        q,
        torch.tensor(lane_lengths, dtype=torch.int32),
        torch.tensor(lane_slots, dtype=torch.int64),
        packed,
    )
    assert out.isfinite().all()
    for lane in range(lanes):
        if lane_lengths[lane]:
            near(out[lane : lane + 1], attended(attention, q[lane : lane + 1], order[lane], lane_lengths[lane]))
        else:
            assert not out[lane].any()
    for first, rows, length, slot in descriptors:
        near(out[first : first + rows], attended(attention, q[first : first + rows], slot, length))
    assert not out[max(row, len(lane_slots)) :].any()


def test_the_default_of_a_mixed_pass_is_the_same(attention: Attention) -> None:
    q, lengths, slots = torch.randn(20, 6, 64), torch.tensor([40, 0], dtype=torch.int32), torch.tensor([0, 4])
    packed = PackedPrefill([chunk_of(18, 18, 96, 2)], [Span(2, 78, 96)])
    torch_backend = make_attention("torch", attention.cache, 6)
    outputs = []
    for backend in (attention, torch_backend):
        backend.begin_step()
        outputs.append(backend.attend_mixed(1, q, lengths, slots, packed))
    torch.testing.assert_close(*outputs)
    assert attention.captures_prompts
    assert not torch_backend.captures_prompts


def test_blocks_are_refused() -> None:
    with (
        make_cache("paged", CacheShape(1, 1, 64, torch.float32, 1, 32), "cpu") as cache,
        pytest.raises(ConfigError, match="the picked backend reads flat K and V, not the blocks of a PagedCache"),
    ):
        PickedAttention(cache, 1)


@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])
def test_settings_fit_into_shared_memory(shared: int) -> None:
    for head_dim in HEAD_SIZES:
        for itemsize in (2, 4):
            for tiles in (1, 1000):
                for hopper in (False, True) if shared == 228 << 10 else (False,):
                    chosen = prompt_settings(head_dim, itemsize, shared, tiles, 132, hopper)
                    dims = 1 << (head_dim - 1).bit_length()
                    held = (chosen.block_m + 2 * chosen.stages * chosen.block_n) * dims * itemsize
                    assert held * chosen.resident < shared
                    assert chosen.block_n >= 16
                    assert 16 <= chosen.block_m <= MOST_BLOCK_M
