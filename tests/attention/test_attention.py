"""Every backend over every layout against plain float64 attention."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from trtllm_vattn.attention.base import Attention, PackedPrefill, PrefillChunk, Span, rotated
from trtllm_vattn.attention.cudnn_plan import prefer_cudnn
from trtllm_vattn.attention.select import available, make_attention
from trtllm_vattn.cache.base import CacheShape, FlatKV, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError

SLOTS, MAX = 8, 1104
CACHES = ["contiguous", "paged", "vattn-1", "vattn-3", "blocks-1", "blocks-3"]
READ_BY = {"xqa-fmha": "blocks", "shares": ("contiguous", "vattn")}
"""What the names of caches begin with that a backend reads; others read all."""
BACKENDS = [("torch", "cpu"), ("torch", "cuda:0"), ("cudnn", "cuda:0")]
BACKENDS += [(name, device) for name in ("xqa", "xqa-fmha", "shares") for device in ("cpu", "cuda:0")]
CASES = [
    pytest.param((name, device, kind), id=f"{name}-{device}-{kind}", marks=[pytest.mark.gpu] if device != "cpu" else [])
    for name, device in BACKENDS
    for kind in CACHES
    if kind.startswith(READ_BY.get(name, ""))
]
KINDS = (torch.int64, torch.int32, torch.int32)
LENGTHS = [0, 1, 15, 16, 17, 100, 1000, 0]


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    scale: float,
    slots: list[int] | None = None,
) -> torch.Tensor:
    """q ``[rows, heads, dim]``, k and v ``[slots, tokens, kv_heads, dim]``; float64. Row i is of slot i, or of
    `slots[i]`."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    wide: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for row, length in enumerate(lengths):
        if length:
            slot = slots[row] if slots else row
            if slot not in wide:
                wide[slot] = k[slot].double(), v[slot].double()
            keys, values = (each[:length] for each in wide[slot])
            # Query heads in groups, each of one KV head.
            queries = q[row].double().unflatten(0, (k.shape[2], -1))
            weights = (torch.einsum("kgd,tkd->kgt", queries, keys) * scale).softmax(-1)
            out[row] = torch.einsum("kgt,tkd->kgd", weights, values).flatten(0, 1)
    return out


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.isfinite(got).all()
    error = (got.cpu().double() - want).norm() / want.norm()
    assert error < (1e-5 if got.dtype == torch.float32 else 1e-2), float(error)


Case = tuple[KVCache, Attention, torch.Tensor, torch.Tensor]


@pytest.fixture(params=CASES)
def build(request: pytest.FixtureRequest) -> Callable[..., Case]:
    """Builds a cache with known K and V in every slot, everything past each length poisoned with NaN."""
    name, device, which = request.param
    if device != "cpu" and available()[name] != "yes":
        pytest.skip(available()[name])
    made: list[KVCache] = []

    def make(heads: int, kv_heads: int, lengths: list[int], dim: int = 64) -> Case:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        shape = CacheShape(3, kv_heads, dim, dtype, SLOTS, MAX)
        kind, _, g = which.partition("-")
        cache = make_cache(kind, shape, device, layers_per_range=int(g) if g else None)
        made.append(cache)
        attention = make_attention(name, cache, heads)
        generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
        k, v = torch.randn(2, SLOTS, MAX, kv_heads, dim, generator=generator).to(dtype)
        for lane in range(SLOTS):
            assert cache.admit(lane, MAX) == lane
        for layer in range(3):
            kv = cache.layer(layer)
            if isinstance(kv, FlatKV):
                kv.k[:SLOTS].fill_(torch.nan)
                kv.v[:SLOTS].fill_(torch.nan)
            else:
                # Guard-mapped tails: the rest of a sequence's last block, and all blocks behind it.
                blocks = kv.table[:SLOTS].flatten().long()
                kv.k[blocks], kv.v[blocks] = torch.nan, torch.nan
        for lane, length in enumerate(lengths):
            if length:
                where = (torch.full((length,), lane, device=device), torch.arange(length, device=device))
                attention.write(1, k[lane, :length].to(device), v[lane, :length].to(device), *where)
        return cache, attention, k, v

    yield make
    for cache in made:
        cache.close()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
def test_decode(build: Callable[..., Case], heads: int, kv_heads: int) -> None:
    cache, attention, k, v = build(heads, kv_heads, LENGTHS)
    q = torch.randn(SLOTS, heads, 64).to(k.dtype)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=cache.device)
    got = attention.decode(1, q.to(cache.device), lengths)
    close(got, expected(q, k, v, LENGTHS, attention.scale))
    assert not got[0].any()


def test_decode_of_the_first_lanes_alone(build: Callable[..., Case]) -> None:
    cache, attention, k, v = build(8, 2, LENGTHS)
    q = torch.randn(5, 8, 64).to(k.dtype)
    lengths = torch.tensor(LENGTHS[:5], dtype=torch.int32, device=cache.device)
    close(attention.decode(1, q.to(cache.device), lengths), expected(q, k, v, LENGTHS[:5], attention.scale))


def test_decode_of_lanes_over_other_slots(build: Callable[..., Case]) -> None:
    cache, attention, k, v = build(8, 2, LENGTHS)
    slots = [6, 0, 5, 2, 1]
    lengths = [LENGTHS[slot] for slot in slots]
    q = torch.randn(5, 8, 64).to(k.dtype)
    got = attention.decode(
        1,
        q.to(cache.device),
        torch.tensor(lengths, dtype=torch.int32, device=cache.device),
        torch.tensor(slots, device=cache.device),
    )
    close(got, expected(q, k, v, lengths, attention.scale, slots))


@pytest.mark.parametrize(
    ("start", "count", "padded"),
    [(0, 1, 16), (0, 100, 128), (0, 128, 128), (37, 64, 64), (900, 99, 128), (16, 1, 16)],
)
def test_prefill_chunks(build: Callable[..., Case], start: int, count: int, padded: int) -> None:
    length = start + count
    cache, attention, k, v = build(8, 2, [0, 0, length])
    q = torch.randn(padded, 8, 64).to(k.dtype)
    got = attention.prefill(
        1,
        q.to(cache.device),
        PrefillChunk(
            padded,
            torch.tensor([2], device=cache.device),
            torch.tensor([count], dtype=torch.int32, device=cache.device),
            torch.tensor([length], dtype=torch.int32, device=cache.device),
            length,
        ),
    )
    assert torch.isfinite(got).all()
    visible = list(range(start + 1, length + 1))
    close(got[:count], expected(q[:count], k, v, visible, attention.scale, [2] * count))


@pytest.mark.parametrize("bad", [None, 2, 5, 1, 6, 3])
def test_chunks_of_several_prompts_packed(build: Callable[..., Case], bad: int | None) -> None:
    # The last one's keys end where nothing is mapped behind, or what is there is no number. Where a prompt's own K and
    # V are NaN, or infinite, the others have what they have without it.
    spans = [Span(2, 0, 100), Span(5, 37, 101), Span(1, 0, 1), Span(6, 900, 999), Span(3, 0, 17)]
    lengths = [0] * SLOTS
    for span in spans:
        lengths[span.slot] = span.end
    cache, attention, k, v = build(8, 2, lengths)
    counts = [span.end - span.start for span in spans]
    padded = sum(counts) + 7
    q = torch.randn(padded, 8, 64).to(k.dtype)
    if bad is not None:
        where = torch.full((lengths[bad],), bad), torch.arange(lengths[bad])
        numbers = torch.full((lengths[bad], 2, 64), torch.nan, dtype=k.dtype, device=cache.device)
        numbers[::2] = torch.inf
        attention.write(1, numbers, numbers, *(each.to(cache.device) for each in where))

    def on_device(values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=cache.device)

    chunks = [
        PrefillChunk(
            count,
            *(on_device([n], kind) for n, kind in zip((span.slot, count, span.end), KINDS, strict=True)),
            span.end,
        )
        for span, count in zip(spans, counts, strict=True)
    ]
    got = attention.prefill_packed(1, q.to(cache.device), PackedPrefill(chunks, spans))
    slots = [span.slot for span in spans for _ in range(span.start, span.end)]
    visible = [position + 1 for span in spans for position in range(span.start, span.end)]
    want = expected(q[: sum(counts)], k, v, visible, attention.scale, slots)
    good = torch.tensor([slot != bad for slot in slots])
    close(got[: sum(counts)].cpu()[good], want[good])
    assert torch.isfinite(got[sum(counts) :]).all()


def test_queries_and_keys_are_turned_as_they_are_stored(build: Callable[..., Case]) -> None:
    lengths = [0, 3, 0, 100, 0, 0, 0, 0]
    cache, attention, k, v = build(16, 2, [0] * SLOTS)
    slots = torch.tensor([lane for lane, length in enumerate(lengths) for _ in range(length)], device=cache.device)
    positions = torch.cat([torch.arange(length, device=cache.device) for length in lengths if length])
    # Parts of one product, so that tokens are further apart than their own heads.
    product = torch.randn(len(slots), 20, 64).to(cache.device, k.dtype)
    q, new_k, new_v = product.split([16, 2, 2], dim=1)
    cos, sin = torch.randn(2, len(slots), 64).to(cache.device, k.dtype)
    turned = attention.rotate_and_write(1, q, new_k, new_v, cos, sin, slots, positions)
    assert turned.is_contiguous()
    angles = cos.cpu().double(), sin.cpu().double()
    close(turned, rotated(q.cpu().double(), *angles))
    k[:], v[:] = 0, 0
    where = slots.cpu(), positions.cpu()
    k[where], v[where] = rotated(new_k.cpu().double(), *angles).to(k.dtype), new_v.cpu()
    ask = torch.randn(SLOTS, 16, 64).to(k.dtype)
    got = attention.decode(1, ask.to(cache.device), torch.tensor(lengths, dtype=torch.int32, device=cache.device))
    close(got, expected(ask, k, v, lengths, attention.scale))


def test_a_latent_is_written_once_and_read_as_both() -> None:
    shape = CacheShape(2, 1, 32, torch.float32, 2, 40, kv_factor=1)
    with make_cache("vattn", shape, "cpu") as cache:
        attention = make_attention("torch", cache, 4)
        cache.admit("a", 10)
        latent = torch.randn(10, 1, 32)
        attention.write(
            0, latent, torch.full_like(latent, torch.nan), torch.zeros(10, dtype=torch.long), torch.arange(10)
        )
        q = torch.randn(1, 4, 32)
        got = attention.decode(0, q, torch.tensor([10], dtype=torch.int32))
        close(got, expected(q, latent[None], latent[None], [10], attention.scale))
        del attention


class PlannedGraph:
    """What `prefer_cudnn` sees of a planned graph: plans, each of an engine of the frontend or (None) of cuDNN."""

    def __init__(self, *engines: str | None) -> None:
        self.plans, self.selected = engines, 0

    @property
    def selected_engine(self) -> SimpleNamespace | None:
        name = self.plans[self.selected]
        return None if name is None else SimpleNamespace(name=name)

    def select_plan(self, index: int) -> None:
        self.selected = index


def test_decode_runs_on_engines_whose_reads_are_known() -> None:
    for engines, selected in (((None, "sm90"), 0), (("sm90", "sm90 too", None, None), 2)):
        graph = PlannedGraph(*engines)
        prefer_cudnn(graph)
        assert graph.selected == selected
    prefer_cudnn(object())  # an older frontend, which has no engines of its own
    with pytest.raises(ConfigError, match=r"only its engine 'sm90'.*uninstall nvidia-cutlass-dsl"):
        prefer_cudnn(PlannedGraph("sm90"))


def test_an_unknown_backend_is_refused() -> None:
    with make_cache("contiguous", CacheShape(1, 1, 8, torch.float32, 1, 8), "cpu") as cache:
        with pytest.raises(ConfigError, match="no attention backend 'flash'; there are auto, torch, cudnn, xqa"):
            make_attention("flash", cache, 1)
        with pytest.raises(ConfigError, match="needs a GPU"):
            make_attention("cudnn", cache, 1)
        assert make_attention("auto", cache, 1).name == "torch"
    with (
        make_cache("vattn", CacheShape(1, 1, 32, torch.float32, 1, 32), "cpu") as cache,
        pytest.raises(ConfigError, match="K and V in blocks, not a KVCacheManager; use the blocks cache"),
    ):
        make_attention("xqa-fmha", cache, 1)
    with (
        make_cache("contiguous", CacheShape(1, 4, 8, torch.float32, 1, 8), "cpu") as cache,
        pytest.raises(ConfigError, match="6 query heads over 4 kv heads"),
    ):
        make_attention("torch", cache, 6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "says"), [(16, torch.bfloat16, "head_dim is 16"), (64, torch.float16, "not torch.float16")]
)
def test_what_the_context_kernel_was_not_built_for_is_refused(dim: int, dtype: torch.dtype, says: str) -> None:
    if available()["xqa-fmha"] != "yes":
        pytest.skip(available()["xqa-fmha"])
    with (
        make_cache("blocks", CacheShape(1, 1, dim, dtype, 1, 32), "cuda:0", layers_per_range=1) as cache,
        pytest.raises(ConfigError, match=f"{says}.*use xqa"),
    ):
        make_attention("xqa-fmha", cache, 1)
