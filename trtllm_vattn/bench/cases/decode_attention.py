"""The part of `bench attention` that looks at decode over flat KV alone: this project's kernel, which splits work into
equal shares, beside cuDNN's, on even and uneven batches, with one query a lane and with four; and how good the choice
between the two is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from trtllm_vattn.attention import trust, vllm_prompts
from trtllm_vattn.attention.base import Attention, Span
from trtllm_vattn.attention.picked import PickedAttention
from trtllm_vattn.attention.select import available
from trtllm_vattn.attention.shares import SharesAttention
from trtllm_vattn.attention.shares_launch import MANY_LANES
from trtllm_vattn.bench.harness.timing import Kernels, fill_flat, layers_us, read_limit, refusal, summarise, timed_ms
from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import VattnError
from trtllm_vattn.graphs.capture import captured, replays_ms
from trtllm_vattn.progress import counting

OWN = ("shares", "shares-plain")
FA3 = vllm_prompts.VllmPrompts.name
LAYERS = 8
"""One range of the default layout for Llama-3-8B's heads."""
QUERIES = (1, 4)
UNEVEN = {
    "64 uneven": [200] * 58 + [8000] * 6,
    "256 uneven": [200] * 230 + [8000] * 26,
    "16 of 32768/i": [32768 // i for i in range(1, 17)],
}
EVEN = {
    f"{lanes} x {tokens}": [tokens] * lanes
    for lanes, tokens in ((1, 2048), (1, 32768), (8, 2048), (8, 8192), (32, 8192), (128, 2048))
}
OWN_EVEN = ("8 x 8192", "32 x 8192", "128 x 2048")
"""Even batches large enough that reading is what takes the time."""
ON_HOST = {"8 uneven": [5] * 7 + [60], "4 x 40": [40] * 4}
PICK_LANES = (1, 4, 8, 16, 32, 64, 128, 256)
PICK_LONGEST = 8192
COLUMNS = "point system queries layer_us.p50 layer_bytes"


def decode_points(how: Kernels, picks: int, seed: int) -> dict[str, Any]:
    """Microseconds a layer of every point, system and count of queries; `picks` random batches of the choice.

    Returns ``points``, those that are ``refused`` with the reason, on a GPU with cuDNN ``picks``, ``read_limit``, bytes
    a second, and ``missing``, why vLLM's kernel is not beside them.
    """
    gpu = how.on_gpu
    points = {**UNEVEN, **EVEN} if gpu else ON_HOST
    result: dict[str, Any] = {"read_limit": read_limit() if gpu else None, "points": [], "picks": [], "refused": {}}
    missing: dict[str, str] = {}
    why = trust.why_not(FA3, how.shape(LAYERS, 1, 64), how.heads[0])
    if why != "yes":
        missing[FA3] = why
    result["missing"] = missing
    systems = ["shares", "cudnn"] if gpu and available()["cudnn"] == "yes" else ["shares"]
    for name, lengths in counting(points.items(), "decode", "point"):
        try:
            result["points"] += _point(name, np.array(lengths), systems, how, missing)
        except (RuntimeError, VattnError) as error:
            result["refused"][name] = refusal(error)
        gc.collect()
    if len(systems) > 1 and not result["refused"]:
        result["picks"] = _picks(how, picks, seed)
    return result


def summary(result: dict[str, Any]) -> dict[str, float]:
    """Of `decode_points`, as far as it was measured: shares of the read limit, and ratios of times."""
    rows, limit = result["points"], result["read_limit"]
    if not rows or result["refused"]:
        return {}
    us = {(row["point"], row["system"], row["queries"]): row["layer_us"]["p50"] for row in rows}
    out: dict[str, float] = {}

    def own_us(name: str) -> float:
        return float(min(us[name, system, 1] for system in OWN if (name, system, 1) in us))

    if limit:
        for name in ("64 uneven", "256 uneven"):
            of_point = [r for r in rows if (r["point"], r["queries"]) == (name, 1) and r["system"] in OWN]
            reached = max(row["layer_bytes"] / (row["layer_us"]["p50"] / 1e6) for row in of_point)
            out[f"{name.split()[1]}_{name.split()[0]}_of_read_limit"] = reached / limit
    if ("32 x 8192", "cudnn", 1) in us:
        out["own_even_over_cudnn"] = max(own_us(name) / us[name, "cudnn", 1] for name in OWN_EVEN)
    if over := {name: own_us(name) / us[name, FA3, 1] for name in (*UNEVEN, *EVEN) if (name, FA3, 1) in us}:
        out["own_over_vllm_fa3_64_uneven"] = over["64 uneven"]
        out["own_over_vllm_fa3_worst"] = max(over.values())
    few, many = QUERIES
    large = [name for name in (*OWN_EVEN, *UNEVEN, *ON_HOST) if (name, "shares", many) in us]
    out[f"queries_{many}_over_{few}"] = max(us[name, "shares", many] / us[name, "shares", few] for name in large)
    if result["picks"]:
        out["picked_over_best"] = fmean(row["picked_us"] / min(row["us"].values()) for row in result["picks"])
    return out


def _filled(lengths: np.ndarray, how: Kernels) -> KVCache:
    """A flat cache whose slots hold that many random tokens."""
    shape = how.shape(LAYERS, len(lengths), int(lengths.max()))
    cache = make_cache("vattn", shape, how.device, layers_per_range=LAYERS, lookahead=0)
    fill_flat(cache, lengths)
    return cache


@torch.inference_mode()
def _point(
    name: str, lengths: np.ndarray, systems: list[str], how: Kernels, missing: dict[str, str]
) -> list[dict[str, Any]]:
    rows = []
    with _filled(lengths, how) as cache:
        kernels = _kernels(cache, systems, how.heads[0])
        on_device = torch.from_numpy(lengths).to(cache.device, torch.int32)

        def row(system: str, queries: int, work: Callable[[int], object]) -> dict[str, Any]:
            took = summarise(layers_us(work, LAYERS, how.repeats, cache.device))
            nbytes = int(lengths.sum()) * cache.shape.layer_token_bytes
            return {"point": name, "system": system, "queries": queries, "layer_us": took, "layer_bytes": nbytes}

        for system, kernel in kernels.items():
            for queries in QUERIES if isinstance(kernel, SharesAttention) else (1,):
                q = torch.randn(len(lengths), queries, *how.heads[::2], dtype=how.dtype, device=cache.device)

                def work(layer: int, kernel: Attention = kernel, q: torch.Tensor = q) -> None:
                    if isinstance(kernel, SharesAttention):
                        kernel.decode_queries(layer, q, None, on_device)
                    else:
                        kernel.decode(layer, q[:, 0], on_device)

                rows.append(row(system, queries, work))
        if FA3 not in missing:
            try:
                rows.append(row(FA3, 1, _by_fa3(cache, lengths, how.heads)))
            except (RuntimeError, VattnError) as error:
                missing[f"{FA3}, {name}"] = refusal(error)
        del kernels
    return rows


def _by_fa3(cache: KVCache, lengths: np.ndarray, heads: list[int]) -> Callable[[int], None]:
    """One query a lane by vLLM's FlashAttention-3, each the last token of its sequence."""
    kernel = vllm_prompts.VllmPrompts(cache, heads[0], heads[2] ** -0.5)
    planned = kernel.plan([Span(slot, length - 1, length) for slot, length in enumerate(lengths.tolist())])
    q = torch.randn(len(lengths), heads[0], heads[2], dtype=cache.shape.dtype, device=cache.device)
    out = torch.empty_like(q)
    return lambda layer: kernel.attend(layer, q, out, planned)


def _kernels(cache: KVCache, systems: list[str], num_heads: int) -> dict[str, Attention]:
    kernels: dict[str, Attention] = {"shares": SharesAttention(cache, num_heads)}
    if cache.device.type == "cuda" and cache.shape.num_slots > MANY_LANES:
        kernels["shares-plain"] = SharesAttention(cache, num_heads, plain=True)
    if "cudnn" in systems:
        from trtllm_vattn.attention.cudnn import CudnnAttention

        kernels["cudnn"] = CudnnAttention(cache, num_heads)
    return kernels


@torch.inference_mode()
def _picks(how: Kernels, count: int, seed: int) -> list[dict[str, Any]]:
    """Random batches under both kernels and under the one that is picked for them, which was learned from others."""
    rng = np.random.default_rng(seed)
    free, _ = torch.cuda.mem_get_info()
    token_bytes = how.shape(LAYERS, 1, 1).token_bytes
    longest = min(PICK_LONGEST, int(free * 0.6) // (max(PICK_LANES) * token_bytes))
    rows = []
    with _filled(np.full(max(PICK_LANES), longest), how) as cache:
        attention = PickedAttention(cache, how.heads[0], kernels=_kernels(cache, ["cudnn"], how.heads[0]))
        for lanes in PICK_LANES:
            attention.learn(np.full(lanes, longest), lambda work: 1e3 * median(timed_ms(work, 5, cache.device)))
            q = torch.randn(lanes, *how.heads[::2], dtype=how.dtype, device=how.device)
            on_device = torch.ones(lanes, dtype=torch.int32, device=how.device)
            graphs = {}
            for name, kernel in attention.kernels.items():

                def work(kernel: Attention = kernel, q: torch.Tensor = q, n: torch.Tensor = on_device) -> None:
                    for layer in range(LAYERS):
                        kernel.decode(layer, q, n)

                graphs[name] = captured(work)
            for _ in range(-(-count // len(PICK_LANES))):
                kind, lengths = random_lengths(rng, lanes, longest)
                on_device.copy_(torch.from_numpy(lengths))
                us = {name: 1e3 * median(replays_ms(graph, 5)) / LAYERS for name, graph in graphs.items()}
                picked = attention.pick(lengths)
                rows.append(
                    {"lanes": lanes, "kind": kind, "tokens": int(lengths.sum()), "longest": int(lengths.max())}
                    | {"us": us, "picked": picked, "picked_us": us[picked]}
                )
        del attention, graphs
    return rows


def random_lengths(rng: np.random.Generator, lanes: int, longest: int) -> tuple[str, np.ndarray]:
    """Lengths int64 ``[lanes]`` and their kind: even, of two sizes, of 1/i, uniform, log-normal, one long among short
    ones, or half of the lanes idle."""
    kind = str(rng.choice(["even", "two sizes", "1/i", "uniform", "log-normal", "one long", "half idle"]))
    most = int(rng.integers(longest // 32, longest, endpoint=True))
    few = int(rng.integers(1, longest // 8, endpoint=True))
    lane = np.arange(lanes)
    if kind == "even":
        lengths = np.full(lanes, most)
    elif kind == "two sizes":
        lengths = np.where(rng.random(lanes) < rng.random() / 2, most, few)
    elif kind == "1/i":
        lengths = most // (lane + 1)
    elif kind == "uniform":
        lengths = rng.integers(1, most, lanes, endpoint=True)
    elif kind == "log-normal":
        lengths = rng.lognormal(rng.uniform(4, 8), 1.0, lanes).astype(np.int64)
    elif kind == "one long":
        lengths = np.where(lane == 0, most, few)
    else:
        lengths = np.where((rng.random(lanes) < 0.5) | (lane == 0), most, 0)
    return kind, lengths.clip(0 if kind == "half idle" else 1, longest).astype(np.int64)
