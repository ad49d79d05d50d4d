"""Windows, sinks, rows of eight bits, first tokens in another slot, lengths a head: the kernels (features_probe.py) and
the reference on the host, against float64; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from probing import probe, probe_on_card

from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk, Span
from trtllm_vattn.attention.options import FP8, PREFIXES, Feature, LayerOptions, PrefixTables
from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.reference import TorchAttention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import CacheShape
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.vmm.open import open_driver

PROBE = Path(__file__).with_name("features_probe.py")
CASES = ["windows", "prefixes", "softcaps", "fp8", "heads"]
HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_right_in_the_interpreter(case: str) -> None:
    probe(PROBE, "cpu", case, interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["hopper", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_right_on_the_card(case: str, path: str) -> None:
    probe_on_card(PROBE, case, path, eight_bits=case == "fp8")


def made(dtype: torch.dtype = torch.float32, **config: object) -> KVCacheManager:
    """A cache of 4 slots of 64 tokens, all random numbers, and NaN behind their lengths and before their edges."""
    shape = CacheShape(1, KV_HEADS, DIM, dtype, 4, 64)
    cache = KVCacheManager(shape, open_driver("cpu"), "1MiB", config=CacheConfig(lookahead=0, **config))
    for slot, length in enumerate(LENGTHS):
        cache.admit(slot, length)
        for kv in cache.head_groups(0):
            for x in (kv.k, kv.v):
                x[slot, :length] = torch.randn(length, *x.shape[2:]).to(dtype)
    return cache


LENGTHS = (40, 33, 50, 9)


def truth(
    attention: Attention, q: torch.Tensor, keys: Sequence[tuple[int, int]], logits: torch.Tensor | None = None
) -> torch.Tensor:
    """q ``[num_heads, head_dim]`` over keys (slot, token), in float64."""
    kv, options, out = attention.cache.layer(0), attention.options[0], []
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        k, v = (torch.stack([x[slot, token, own] for slot, token in keys]).double() for x in (kv.k, kv.v))
        if options.k_scale is not None and options.v_scale is not None:
            k, v = k * options.k_scale[own % len(options.k_scale)], v * options.v_scale[own % len(options.v_scale)]
        scores = k @ q[head].double() * attention.scale
        if logits is not None:
            scores = torch.cat((scores, logits[head : head + 1].double()))
        out.append(scores.softmax(0)[: len(keys)] @ v)
    return torch.stack(out)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def chunk(rows: int, length: int, slot: int) -> PackedPrefill:
    one = PrefillChunk(rows, torch.tensor([slot]), int32(rows), int32(length), length)
    return PackedPrefill([one], [Span(slot, length - rows, length)])


def close(got: torch.Tensor, want: torch.Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), want, rtol=within, atol=within)


@pytest.mark.parametrize("name", ["torch", "shares", "picked"])
def test_a_window_its_first_tokens_and_sink_logits_are_exact(name: str) -> None:
    with made() as cache:
        attention = PickedAttention(cache, HEADS) if name == "picked" else make_attention(name, cache, HEADS)
        logits = torch.randn(HEADS)
        attention.set_options([LayerOptions(7, 3, logits)])

        def keys(slot: int, sees: int) -> list[tuple[int, int]]:
            return [(slot, token) for token in range(sees) if token < 3 or token >= sees - 7]

        cache.layer(0).k[0, 3:25], cache.layer(0).v[0, 3:25] = torch.nan, torch.nan
        q = torch.randn(4, HEADS, DIM)
        got = attention.decode(0, q, int32(40, 33, 0, 9))
        for lane, length in ((0, 40), (1, 33), (3, 9)):
            close(got[lane], truth(attention, q[lane], keys(lane, length), logits))
        got = attention.attend_mixed(0, q, int32(), torch.tensor([], dtype=torch.int64), chunk(4, 36, 0))
        for row in range(4):
            close(got[row], truth(attention, q[row], keys(0, 33 + row), logits))


@pytest.mark.parametrize("name", ["torch", "shares", "picked"])
def test_first_tokens_are_read_where_the_tables_say(name: str) -> None:
    with made() as cache:
        cache.release(1)
        assert cache.admit("holder", 33, prefix=(0, 20)) == 1
        kv = cache.layer(0)
        kv.k[1, 20:33], kv.v[1, 20:33] = torch.randn(2, 13, KV_HEADS, DIM)
        attention = PickedAttention(cache, HEADS) if name == "picked" else make_attention(name, cache, HEADS)
        assert len(attention.variants) == (2 if name == "picked" else 1)
        tables = PrefixTables.empty(4, 4, cache.device)
        attention.set_prefixes(tables)
        tables.set_prefixes([(1, 0, 20)])
        assert attention.pick(cache.lengths, prefixes=True).endswith(PREFIXES)
        q = torch.randn(4, HEADS, DIM)
        at_1 = [(0 if token < 20 else 1, token) for token in range(33)]
        mixed = attention.attend_mixed(0, q, int32(33), torch.tensor([1]), chunk(3, 33, 1))
        close(mixed[0], truth(attention, q[0], at_1))
        for row in (1, 2, 3):
            close(mixed[row], truth(attention, q[row], at_1[: 30 + row]))
        # Lanes 0 and 1 read 15 tokens of slot 2 together, whatever their own slots say.
        tables.set_groups([(2, 15, [1, 0])])
        attention.use(attention.pick(cache.lengths, prefixes=True))
        got = attention.decode(0, q, int32(33, 40, 9, 50), torch.tensor([1, 0, 3, 2]))
        shared = [(2, token) for token in range(15)]
        close(got[0], truth(attention, q[0], [*shared, *at_1[15:]]))
        close(got[1], truth(attention, q[1], [*shared, *((0, token) for token in range(15, 40))]))
        close(got[2], truth(attention, q[2], [(3, token) for token in range(9)]))
        close(got[3], truth(attention, q[3], [(2, token) for token in range(50)]))
        held = {tensor.data_ptr() for tensor in attention.storages()}
        assert {tensor.data_ptr() for tensor in tables.storages()} <= held, "a captured step may touch them"


@pytest.mark.parametrize("name", ["torch", "shares"])
def test_rows_of_eight_bits_are_written_and_read_by_their_scales(name: str) -> None:
    with made(FP8) as cache:
        attention = make_attention(name, cache, HEADS)
        attention.set_options([LayerOptions(k_scale=torch.tensor([0.5, 2.0]), v_scale=torch.tensor([0.25]))])
        k, v = torch.randn(2, 2, KV_HEADS, DIM).bfloat16()
        k[0, 0, 0] = 1e4
        attention.write(0, k, v, torch.tensor([0, 3]), torch.tensor([39, 8]))
        kv = cache.layer(0)
        assert kv.k[0, 39, 0, 0].item() == 448, "the largest number, not infinity or NaN"
        close(kv.k[3, 8].float() * torch.tensor([[0.5], [2.0]]), k[1].double(), 0.13)
        close(kv.v[3, 8].float() * 0.25, v[1].double(), 0.13)
        q = torch.randn(4, HEADS, DIM).bfloat16()
        got = attention.decode(0, q, int32(*LENGTHS))
        assert got.dtype == torch.bfloat16
        for lane in (1, 2, 3):
            close(got[lane], truth(attention, q[lane], [(lane, token) for token in range(LENGTHS[lane])]), 2e-2)


@pytest.mark.parametrize("name", ["torch", "shares"])
def test_heads_of_uneven_lengths_are_written_and_read_by_these(name: str) -> None:
    with made(own_lengths=True, heads_per_range=1) as cache:
        cache.set_length(0, 1, 11)
        attention, parts = make_attention(name, cache, HEADS), cache.head_groups(0)
        for x in (parts[1].k, parts[1].v):
            x[0, 11:40] = torch.nan
        k, v = torch.randn(2, 1, KV_HEADS, DIM)
        attention.write(0, k, v, torch.tensor([0]), torch.tensor([39]))
        assert torch.equal(parts[0].k[0, 39], k[0, :1])
        assert torch.equal(parts[1].v[0, 10], v[0, 1:])
        q = torch.randn(4, HEADS, DIM)
        got = attention.decode(0, q, int32(40, 0, 50, 0))
        for lane, held in ((0, (40, 11)), (2, (50, 50))):
            for head in range(HEADS):
                kv, tokens = parts[head // 2], held[head // 2]
                scores = kv.k[lane, :tokens, 0].double() @ q[lane, head].double() * attention.scale
                close(got[lane, head], scores.softmax(0) @ kv.v[lane, :tokens, 0].double())
        assert not got[[1, 3]].any()


def test_options_that_make_no_sense_are_refused() -> None:
    with made() as cache:
        attention = make_attention("torch", cache, HEADS)
        for options, message in (
            ([], "0 options for 1 layers; give one a layer"),
            ([LayerOptions(0)], "layer 0 has a window of 0 tokens"),
            ([LayerOptions(None, 4)], "keeps 4 first tokens visible with window None; give a number from 0 on, beside"),
            (
                [LayerOptions(sink_logits=torch.zeros(3))],
                r"sink_logits of layer 0 is torch.float32 \[3\]; give .* \[4\]",
            ),
            ([LayerOptions(k_scale=torch.ones(1))], "has a k_scale, and its cache is torch.float32; scales are for"),
        ):
            with pytest.raises(ConfigError, match=message):
                attention.set_options(options)
        with pytest.raises(ConfigError, match=r"a softmax scale of -0.5; give a positive number"):
            make_attention("torch", cache, HEADS, -0.5)
        tables = PrefixTables.empty(4, 4, cache.device)
        for groups in ([(0, 5, [0, 1]), (0, 5, [1, 2])], [(0, 5, [0]), (0, 5, [1]), (0, 5, [2])]):
            with pytest.raises(ConfigError, match="there may be 2 groups of 4 lanes in all, each lane in one of them"):
                tables.set_groups(groups)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_no_positive_numbers_are_refused(value: float) -> None:
    with made(FP8) as cache, pytest.raises(ConfigError, match=r"v_scale of layer 0 is .*; scales are positive numbers"):
        make_attention("torch", cache, HEADS).set_options([LayerOptions(v_scale=torch.tensor([1.0, value]))])


def test_what_a_backend_cannot_do_is_refused_by_name() -> None:
    with made(own_lengths=True) as cache:
        attention = make_attention("shares", cache, HEADS)
        with pytest.raises(ConfigError, match="windows are served over a cache of one length"):
            attention.set_options([LayerOptions(5)])
        with pytest.raises(ConfigError, match="prefixes in other slots are served over a cache of one length"):
            attention.set_prefixes(PrefixTables.empty(4, 4, cache.device))
    with made() as cache, pytest.raises(ConfigError, match="deterministic attention takes no prefixes"):
        PickedAttention(cache, HEADS, deterministic=True).set_prefixes(PrefixTables.empty(4, 4, cache.device))

    class Plain(TorchAttention):
        name: ClassVar[str] = "plain"
        features: ClassVar[frozenset[Feature]] = frozenset()

    with made() as cache:
        for call, what in (
            (lambda: Plain(cache, HEADS).set_options([LayerOptions(5, 1)]), "a window, first tokens that stay visible"),
            (lambda: Plain(cache, HEADS).set_prefixes(PrefixTables.empty(4, 4, cache.device)), "tokens that lie in"),
        ):
            with pytest.raises(ConfigError, match=f"the plain backend cannot serve {what}.*; use the shares backend"):
                call()
    with made(FP8) as cache, pytest.raises(ConfigError, match="the plain backend cannot serve fp8 rows"):
        Plain(cache, HEADS)
