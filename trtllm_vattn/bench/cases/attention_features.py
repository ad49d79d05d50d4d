"""The part of `bench attention` that looks at what the shares kernel serves beyond full attention to a sequence's own
slot: a prefix that lanes share read once, beside each lane reading its own; first tokens in another slot; rows of eight
bits beside those of sixteen; a window beside the whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trtllm_vattn.attention.options import FP8, PREFIXES, LayerOptions, PrefixTables
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.bench.harness.timing import summarise, timed_ms
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.table import tabulate

LAYERS = 8
ON_GPU = {"shared": (16, 16_000, 128), "rows": (64, 8192), "window": 1024}
"""Lanes, tokens that they share, and tokens of each; lanes and tokens of each; tokens of the window."""
ON_HOST = {"shared": (4, 60, 4), "rows": (4, 40), "window": 16}


@torch.inference_mode()
def feature_points(device: str, heads: list[int], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Microseconds a layer of each point: ``points``; and those that are ``refused`` with the reason."""
    sizes: Any = ON_GPU if torch.device(device).type == "cuda" else ON_HOST
    result: dict[str, Any] = {"points": [], "refused": {}}
    for what, call in (("shared", _shared), ("rows", _rows)):
        try:
            result["points"] += call(sizes, device, heads, dtype, repeats)
        except (RuntimeError, VattnError) as error:
            result["refused"][what] = str(error).strip().splitlines()[0][:200]
        gc.collect()
    return result


@contextmanager
def _attention(
    device: str, heads: list[int], dtype: torch.dtype, lanes: int, longest: int
) -> Iterator[SharesAttention]:
    """The kernel over a cache whose slots hold `longest` random tokens each."""
    shape = CacheShape(LAYERS, heads[1], heads[2], dtype, lanes, longest)
    with make_cache("vattn", shape, device, layers_per_range=LAYERS, lookahead=0) as cache:
        for slot in range(lanes):
            cache.admit(slot, longest)
            for layer in range(LAYERS):
                kv = cache.layer(layer)
                assert isinstance(kv, FlatKV)
                for x in (kv.k, kv.v):
                    if dtype == FP8:
                        x[slot, :longest].view(torch.uint8).random_(0, 0x40)
                    else:
                        x[slot, :longest].normal_()
        yield SharesAttention(cache, heads[0])


def _timed(
    attention: SharesAttention, point: str, lanes: int, longest: int, queries: torch.dtype, repeats: int
) -> dict[str, Any]:
    device = attention.cache.device
    q = torch.randn(lanes, attention.num_heads, attention.cache.shape.head_dim, device=device).to(queries)
    lengths = torch.full((lanes,), longest, dtype=torch.int32, device=device)

    def work() -> None:
        for layer in range(LAYERS):
            attention.decode(layer, q, lengths)

    return {"point": point, "layer_us": summarise([1e3 * ms / LAYERS for ms in timed_ms(work, repeats, device)])}


def _shared(sizes: Any, device: str, heads: list[int], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    lanes, shared, own = sizes["shared"]
    longest = shared + own
    with _attention(device, heads, dtype, lanes, longest) as attention:
        rows = [_timed(attention, "one lane", 1, longest, dtype, repeats)]
        rows.append(_timed(attention, "lanes apart", lanes, longest, dtype, repeats))
        tables = PrefixTables.empty(lanes, lanes, attention.cache.device)
        attention.set_prefixes(tables)
        attention.use(attention.name + PREFIXES)
        tables.set_prefixes([(slot, 0, shared) for slot in range(1, lanes)])
        rows.append(_timed(attention, "prefix in one slot", lanes, longest, dtype, repeats))
        tables.set_groups([(0, shared, range(lanes))])
        rows.append(_timed(attention, "prefix read once", lanes, longest, dtype, repeats))
    return rows


def _rows(sizes: Any, device: str, heads: list[int], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    lanes, longest = sizes["rows"]
    with _attention(device, heads, dtype, lanes, longest) as attention:
        rows = [_timed(attention, "16 bits", lanes, longest, dtype, repeats)]
        attention.set_options([LayerOptions(sizes["window"])] * LAYERS)
        rows.append(_timed(attention, "window", lanes, longest, dtype, repeats))
        alone = _timed(attention, "window alone", lanes, sizes["window"], dtype, repeats)
        rows.append(alone)
    with _attention(device, heads, FP8, lanes, longest) as attention:
        scale = torch.ones(1, device=attention.cache.device)
        attention.set_options([LayerOptions(k_scale=scale, v_scale=scale)] * LAYERS)
        rows.append(_timed(attention, "8 bits", lanes, longest, dtype, repeats))
    return rows


RATIOS = {
    "shared_prefix_over_apart": ("prefix read once", "lanes apart"),
    "shared_prefix_over_one_lane": ("prefix read once", "one lane"),
    "prefix_elsewhere_over_own": ("prefix in one slot", "lanes apart"),
    "fp8_over_bf16_rows": ("8 bits", "16 bits"),
    "window_over_full": ("window", "16 bits"),
    "window_over_so_short_sequences": ("window", "window alone"),
}


def summary(result: dict[str, Any]) -> dict[str, float]:
    """Ratios of the points' times, as far as they were measured."""
    us = {row["point"]: row["layer_us"]["p50"] for row in result["points"]}
    return {name: us[a] / us[b] for name, (a, b) in RATIOS.items() if a in us and b in us}


def show(result: dict[str, Any]) -> str:
    """The points as a table, and what was refused."""
    columns: dict[str, str | Callable[[Any], str]] = {"decode": "point", "us a layer": "layer_us.p50:.1f"}
    return "\n".join([tabulate(result["points"], columns), *(f"{k}: {v}" for k, v in result["refused"].items())])
