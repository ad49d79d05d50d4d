"""The part of `bench attention` that looks at what the shares kernel serves beyond full attention to a sequence's own
slot: a prefix that lanes share read once, beside each lane reading its own; first tokens in another slot; rows of eight
bits beside those of sixteen; a window beside the whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trtllm_vattn.attention.options import FP8, PREFIXES, LayerOptions, PrefixTables
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.bench.harness.timing import Kernels, fill_flat, layers_us, refusal, summarise
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError

LAYERS = 8
ON_GPU = {"shared": (16, 16_000, 128), "rows": (64, 8192), "window": 1024}
"""Lanes, tokens that they share, and tokens of each; lanes and tokens of each; tokens of the window."""
COLUMNS = "point layer_us.p50"
ON_HOST = {"shared": (4, 60, 4), "rows": (4, 40), "window": 16}


@torch.inference_mode()
def feature_points(kernels: Kernels) -> dict[str, Any]:
    """Microseconds a layer of each point: ``points``; and those that are ``refused`` with the reason."""
    sizes: Any = ON_GPU if kernels.on_gpu else ON_HOST
    result: dict[str, Any] = {"points": [], "refused": {}}
    for what, call in (("shared", _shared), ("rows", _rows)):
        try:
            result["points"] += call(sizes, kernels)
        except (RuntimeError, VattnError) as error:
            result["refused"][what] = refusal(error)
        gc.collect()
    return result


@contextmanager
def _timing(
    kernels: Kernels, lanes: int, longest: int, dtype: torch.dtype | None = None
) -> Iterator[tuple[SharesAttention, Callable[..., dict[str, Any]]]]:
    """The kernel over a cache whose slots hold `longest` random tokens each; and what times a point of it."""
    shape = kernels.shape(LAYERS, lanes, longest, dtype)
    with make_cache("vattn", shape, kernels.device, layers_per_range=LAYERS, lookahead=0) as cache:
        fill_flat(cache, np.full(lanes, longest))
        attention, device = SharesAttention(cache, kernels.heads[0]), cache.device

        def timed(point: str, lanes: int = lanes, tokens: int = longest) -> dict[str, Any]:
            q = torch.randn(lanes, *kernels.heads[::2], device=device).to(kernels.dtype)
            lengths = torch.full((lanes,), tokens, dtype=torch.int32, device=device)
            took = layers_us(lambda layer: attention.decode(layer, q, lengths), LAYERS, kernels.repeats, device)
            return {"point": point, "layer_us": summarise(took)}

        yield attention, timed


def _shared(sizes: Any, kernels: Kernels) -> list[dict[str, Any]]:
    lanes, shared, own = sizes["shared"]
    with _timing(kernels, lanes, shared + own) as (attention, timed):
        rows = [timed("one lane", 1), timed("lanes apart")]
        tables = PrefixTables.empty(lanes, lanes, attention.cache.device)
        attention.set_prefixes(tables)
        attention.use(attention.name + PREFIXES)
        tables.set_prefixes([(slot, 0, shared) for slot in range(1, lanes)])
        rows.append(timed("prefix in one slot"))
        tables.set_groups([(0, shared, range(lanes))])
        rows.append(timed("prefix read once"))
    return rows


def _rows(sizes: Any, kernels: Kernels) -> list[dict[str, Any]]:
    lanes, longest = sizes["rows"]
    with _timing(kernels, lanes, longest) as (attention, timed):
        rows = [timed("16 bits")]
        attention.set_options([LayerOptions(sizes["window"])] * LAYERS)
        rows += [timed("window"), timed("window alone", tokens=sizes["window"])]
    with _timing(kernels, lanes, longest, FP8) as (attention, timed):
        scale = torch.ones(1, device=attention.cache.device)
        attention.set_options([LayerOptions(k_scale=scale, v_scale=scale)] * LAYERS)
        rows.append(timed("8 bits"))
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
