"""Decode by equal shares: the kernel in Triton's interpreter and on the card, and the reference, against float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from probing import probe, probe_on_card
from ties import agree, by_request

from trtllm_vattn.attention.base import MOST_QUERIES
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.attention.shares import HEAD_SIZES, SharesAttention
from trtllm_vattn.attention.shares_launch import Rows, Settings, fits_tma, programs_at_once, settings_for
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import load_model
from trtllm_vattn.runtime.request import TokenEvent
from trtllm_vattn.runtime.sampling import SamplingParams

PROBE = Path(__file__).with_name("shares_probe.py")


@pytest.mark.parametrize("case", ["shapes", "shares", "queries", "far", "nan"])
def test_the_kernel_is_right_in_the_interpreter(case: str) -> None:
    probe(PROBE, "cpu", case, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["hopper", "plain"])
@pytest.mark.parametrize("case", ["shapes", "shares", "queries", "far", "nan", "graph"])
def test_the_kernel_is_right_on_the_card(case: str, path: str) -> None:
    probe_on_card(PROBE, case, path)


@pytest.fixture
def backend() -> SharesAttention:
    shape = CacheShape(2, 2, 64, torch.float32, 4, 96)
    cache = make_cache("vattn", shape, "cpu")
    for lane, length in enumerate((40, 7, 0, 96)):
        cache.admit(lane, max(1, length))
        kv = cache.layer(1)
        kv.k[lane, :length].normal_()
        kv.v[lane, :length].normal_()
    attention = make_attention("shares", cache, 6)
    assert isinstance(attention, SharesAttention)
    yield attention
    cache.close()


def attended(attention: SharesAttention, q: torch.Tensor, slot: int, length: int) -> torch.Tensor:
    """One query of a lane, ``[num_heads, head_dim]``, in float64."""
    kv = attention.cache.layer(1)
    group = q.shape[0] // kv.k.shape[2]
    k, v = (x[slot, :length].double().repeat_interleave(group, dim=1) for x in (kv.k, kv.v))
    weights = (torch.einsum("hd,thd->ht", q.double(), k) * attention.scale).softmax(-1)
    return torch.einsum("ht,thd->hd", weights, v)


def test_queries_of_a_lane_see_the_tokens_up_to_their_own(backend: SharesAttention) -> None:
    lengths, counts, slots = [96, 40, 7, 40, 0], [3, 0, 4, 1, 2], [3, 0, 1, 0, 2]
    q = torch.randn(4, 4, 6, 64)
    out = torch.full_like(q, torch.nan)
    given = [torch.tensor(x[:4], dtype=torch.int32) for x in (counts, lengths, slots)]
    assert backend.decode_queries(1, q, *given, out=out) is out
    for lane in range(4):
        for query in range(4):
            want = torch.zeros(6, 64, dtype=torch.float64)
            if query < counts[lane]:
                sees = lengths[lane] - counts[lane] + 1 + query
                want = attended(backend, q[lane, query], slots[lane], sees)
            torch.testing.assert_close(out[lane, query].double(), want, rtol=1e-5, atol=1e-5)


def test_a_lane_is_its_slot_and_has_all_its_queries_where_nothing_else_is_said(backend: SharesAttention) -> None:
    q = torch.randn(4, 2, 6, 64)
    got = backend.decode_queries(1, q, None, torch.tensor([40, 7, 0, 96], dtype=torch.int32))
    assert not got[2].any()
    for lane, length in ((0, 40), (1, 7), (3, 96)):
        for query in (0, 1):
            want = attended(backend, q[lane, query], lane, length - 1 + query)
            torch.testing.assert_close(got[lane, query].double(), want, rtol=1e-5, atol=1e-5)


def test_more_queries_or_lanes_than_there_may_be_are_refused(backend: SharesAttention) -> None:
    lengths = torch.ones(4, dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"4 lanes of 9 queries; there may be 4 lanes, .* of 1 to 8 queries"):
        backend.decode_queries(1, torch.randn(4, MOST_QUERIES + 1, 6, 64), None, lengths)
    with pytest.raises(ConfigError, match="5 lanes of 1 queries"):
        backend.decode_queries(1, torch.randn(5, 1, 6, 64), None, torch.ones(5, dtype=torch.int32))


def test_queries_of_another_dtype_are_refused(backend: SharesAttention) -> None:
    with pytest.raises(ConfigError, match=r"queries are torch.float16, the cache is torch.float32; convert"):
        backend.decode(1, torch.randn(4, 6, 64).half(), torch.ones(4, dtype=torch.int32))


def test_blocks_are_refused() -> None:
    with (
        make_cache("paged", CacheShape(1, 1, 64, torch.float32, 1, 32), "cpu") as cache,
        pytest.raises(ConfigError, match="flat K and V, not the blocks of a PagedCache; use the vattn cache"),
    ):
        make_attention("shares", cache, 1)


@pytest.mark.parametrize("lanes", [8, 256])
@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])
def test_settings_fit_into_shared_memory(shared: int, lanes: int) -> None:
    for head_dim in HEAD_SIZES:
        for itemsize in (2, 4):
            for rows in (16, 32, 64):
                if rows * head_dim > 64 * 128:
                    continue
                settings = settings_for(shared, head_dim, itemsize, rows, lanes, few=lanes == 8)
                dims = 1 << (head_dim - 1).bit_length()
                tiles = (settings.stages - 1) * 2 * settings.tile * dims * itemsize
                if itemsize == 4:
                    tiles += rows * dims * itemsize
                assert tiles < (shared if settings.warps == 8 or itemsize == 4 else shared // 2)
                assert settings.tile >= 16
                assert settings.stages >= 2


def test_settings_are_those_that_were_measured() -> None:
    def on_h200(lanes: int) -> Settings:
        return settings_for(228 << 10, 128, 2, 16, lanes, few=lanes * 8 <= 132)

    assert on_h200(8) == Settings(tile=128, warps=4, stages=2, start=2)
    assert on_h200(64) == Settings(tile=128, warps=4, stages=2, start=1)
    assert on_h200(256) == Settings(tile=64, warps=4, stages=3, start=3)


def test_as_many_programs_are_launched_as_a_multiprocessor_holds() -> None:
    def kernel(registers: int, shared: int, warps: int = 4) -> SimpleNamespace:
        return SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(num_warps=warps, shared=shared))

    h200 = 228 << 10
    assert programs_at_once(kernel(217, 73752), h200) == 2
    assert programs_at_once(kernel(161, 71712), h200) == 3
    assert programs_at_once(kernel(169, 71712), h200) == 2, "169 registers are taken as 176"
    assert programs_at_once(kernel(100, 115 << 10), h200) == 1, "by shared memory"
    assert programs_at_once(kernel(255, 1024, 16), h200) == 1, "one at least"


def test_rows_hold_every_query_of_a_head() -> None:
    for head_dim in HEAD_SIZES:
        for group in (1, 3, 7, 12, 16, 71, 128):
            for queries in range(1, MOST_QUERIES + 1):
                rows = Rows.of(group, queries, head_dim)
                assert rows.real == group * queries <= rows.rows * rows.blocks
                assert (rows.blocks - 1) * rows.rows < rows.real
                assert 16 <= rows.rows <= (32 if head_dim > 128 else 64)


def test_what_a_tensor_map_can_hold_is_known() -> None:
    def flat(heads: int, dim: int, step: int) -> FlatKV:
        k = torch.empty(4 * 8 * step + 8, dtype=torch.bfloat16).as_strided((4, 8, heads, dim), (8 * step, step, dim, 1))
        return FlatKV(k, k)

    assert fits_tma(flat(2, 64, 128))
    assert not fits_tma(flat(2, 4, 8)), "heads of 8 bytes"
    kv = flat(2, 64, 128)
    assert not fits_tma(FlatKV(kv.k, kv.v.as_strided(kv.v.shape, kv.v.stride(), 1))), "an address of 2 bytes"


def generated(attention: str, capture: bool, name: str, device: str, dtype: torch.dtype) -> list[list[TokenEvent]]:
    """Tokens of some prompts, more than there are lanes, by prompt."""
    model = load_model(name, device, dtype)
    prompts = [np.random.default_rng(n).integers(0, model.config.vocab_size, n).tolist() for n in (3, 40, 1, 16, 75)]
    cache = make_cache("vattn", shape_of(model, 3, 128), device)
    with Engine(model, cache, attention=attention, capture=capture, compile=False, record_margins=True) as engine:
        numbers = [engine.submit(prompt, SamplingParams(max_tokens=10)) for prompt in prompts]
        events = list(engine.run())
        engine.cache.check_integrity()
        if capture:
            engine.decode.audit().raise_if_foreign()
    return by_request(events, numbers)


@pytest.mark.parametrize("capture", [False, True])
def test_an_engine_on_the_host_decodes_by_the_reference(capture: bool) -> None:
    runs = [generated(name, capture, "tiny-llama", "cpu", torch.float32) for name in ("shares", "torch")]
    of_shares, of_torch = ([[event.token for event in each] for each in run] for run in runs)
    assert of_shares == of_torch
    assert [len(tokens) for tokens in of_shares] == [10] * 5


@pytest.mark.gpu
def test_captured_and_eager_steps_agree_and_the_graphs_hold_nothing_foreign() -> None:
    if available()["shares"] != "yes":
        pytest.skip(available()["shares"])
    agree(*(generated("shares", capture, "llama-3.2-1b", "cuda:0", torch.bfloat16) for capture in (False, True)))
