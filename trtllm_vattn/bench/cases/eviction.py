"""Parts of `bench compression`: what evicting tokens by H2O and FastGen gives back, by the size of extents, heads a
range and policy; a step before and behind it; and attention over latents."""

from __future__ import annotations

from collections.abc import Iterator
from math import pi
from statistics import median
from typing import Any

import numpy as np
import torch

from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.bench.harness.case import Recording
from trtllm_vattn.bench.harness.contenders import device_step_ms, empty_lanes, fill_lanes
from trtllm_vattn.bench.harness.timing import fill_flat, timed_ms
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.compression import H2O, CompressionPolicy, FastGen, HeadsView, compact
from trtllm_vattn.cache.compression.mass import attended, maps
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.memory.pool import CLASSES
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.verify.compression import fastgen_sets, h2o_sets, random_view
from trtllm_vattn.vmm.base import Driver
from trtllm_vattn.vmm.host import HostDriver
from trtllm_vattn.vmm.open import open_driver

QUERIES = 64
LATENT, LATENT_LAYERS = 576, 4
"""Numbers of a latent row, as of DeepSeek-V2-Lite and V3, and layers."""
SHARE = 0.1
"""Of the prompt: H2O's heavy hitters, and its recent tokens."""
SPECIAL = 7
"""The id of a special token; one token in 50 is one."""
FASTGEN = FastGen([SPECIAL], threshold=0.9, frequent=0.05, local=0.1)
KINDS = ("full", "special", "local", "frequency")
"""What heads attend to, in turn."""
HOST_PAGES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
"""Bytes of the host driver's pages; a GPU's are what they are."""


def returned(recording: Recording) -> Iterator[dict[str, Any]]:
    """Whether kept sets are the papers'; and bytes returned for each byte evicted, by extents of one size, each a page
    of the driver, by heads a range and by policy; and by extents of several sizes."""
    args = recording.args
    yield {"kept_sets_match_paper": kept_sets_match(args.seed)}
    gpu = args.device != "cpu"
    layers, kv_heads, dim = (4, 8, 128) if gpu else (2, 4, 16)
    shape = CacheShape(layers, kv_heads, dim, torch.bfloat16, 1, args.evicted_context + 64)
    rows: list[dict[str, Any]] = []
    recording.results["returned"] = rows
    found: dict[tuple[str, int, int], float] = {}
    pages = (open_driver(args.device).granularity(),) if gpu else HOST_PAGES
    heads_per_range = [1 << power for power in range(shape.num_kv_heads.bit_length())]
    for page, classes in [(page, 1) for page in pages] + [(pages[0], CLASSES)]:
        for name, policy in (("h2o", H2O(SHARE, SHARE)), ("fastgen", FASTGEN)):
            for heads in heads_per_range if classes == 1 else (1, shape.num_kv_heads):
                driver = open_driver(args.device) if gpu else HostDriver(page)
                ratio = returned_over_evicted(shape, driver, policy, heads, classes, args.device, args.seed)
                if page == pages[0]:
                    found[name, heads, classes] = ratio
                head_bytes = shape.layer_token_bytes // shape.num_kv_heads
                recording.add(
                    "returned",
                    {
                        "policy": name,
                        "heads_per_range": heads,
                        "extent_bytes": page,
                        "extent_sizes": classes,
                        "tokens_per_extent": page // (heads * head_bytes),
                        "prompt_tokens": args.evicted_context,
                        "returned_over_evicted": ratio,
                    },
                )
        if page == pages[0]:
            yield _returned_figures(found, shape.num_kv_heads, classes)


def _returned_figures(found: dict[tuple[str, int, int], float], all_heads: int, classes: int) -> dict[str, Any]:
    if classes > 1:
        return {
            "h2o_returned_over_evicted_large_extents": found["h2o", all_heads, classes],
            "fastgen_returned_over_evicted_large_extents": found["fastgen", 1, classes],
        }
    return {
        "h2o_returned_over_evicted": found["h2o", all_heads, 1],
        "h2o_returned_over_evicted_range_a_head": found["h2o", 1, 1],
        "fastgen_returned_over_evicted": found["fastgen", 1, 1],
        "row_of_all_heads_returned_over_evicted": found["fastgen", all_heads, 1],
    }


def returned_over_evicted(
    shape: CacheShape, driver: Driver, policy: CompressionPolicy, heads: int, classes: int, device: str, seed: int
) -> float:
    """Memory that goes back for each byte that the policy evicts of a prompt. `heads` of a layer share a range; extents
    are of `classes` sizes, from a page of the driver on; heads' attention is of `KINDS`."""
    tokens, layers = shape.max_seq_len - 64, shape.num_layers
    config = CacheConfig(own_lengths=True, heads_per_range=heads, layers_per_range=1, extent_classes=classes)
    generator = torch.Generator(device).manual_seed(seed)
    least = shape.max_seq_len * shape.token_bytes + 2 * layers * shape.num_kv_heads * driver.granularity()
    with KVCacheManager(shape, driver, 2 * least, config=config) as cache, torch.inference_mode():
        cache.admit(0, tokens)
        ids = torch.arange(tokens, device=device).remainder(50).eq(SPECIAL).long() * SPECIAL
        kept: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        first = [0] * layers
        for layer in range(layers):
            for kv in cache.head_groups(layer):
                assert isinstance(kv, FlatKV)
                view = _view(layer, first[layer], kv, ids, generator)
                first[layer] += kv.k.shape[2]
                kept[layer] += policy.keep(view)
        done = compact(cache, 0, kept)
        cache.check_integrity()
    return done.returned_bytes / done.evicted_bytes


def _view(layer: int, first: int, kv: FlatKV, ids: torch.Tensor, generator: torch.Generator) -> HeadsView:
    """Keys and queries of heads that attend to what their kind says, and random values."""
    tokens, (heads, dim), device = len(ids), kv.k.shape[2:], ids.device

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    keys, queries = noise(tokens, heads, dim), torch.zeros(QUERIES, heads, 1, dim, device=device)
    at = torch.arange(tokens, device=device) * (pi / tokens)
    for head in range(heads):
        kind = KINDS[(first + head) % len(KINDS)]
        if kind == "local":
            turns = torch.stack((at.cos(), at.sin()), dim=-1)
            keys[:, head, :2], queries[:, head, 0, :2] = turns, turns[-QUERIES:] * 4000 * dim**0.5
        elif kind != "full":
            heavy = ids == SPECIAL if kind == "special" else noise(tokens) > 2.4
            keys[:, head, 0] = 30.0 * heavy
            queries[:, head, 0, 0] = dim**0.5
    kv.k[0, :tokens], kv.v[0, :tokens] = keys.to(kv.k.dtype), noise(tokens, heads, dim).to(kv.v.dtype)
    positions = torch.arange(tokens, device=device).expand(heads, -1)
    none = torch.zeros(heads, tokens, device=device)
    where = ids.expand(heads, -1)
    return HeadsView(layer, first, tokens, tokens, keys, kv.v[0, :tokens], positions, where, queries, dim**-0.5, none)


def kept_sets_match(seed: int) -> float:
    """The share of random maps of attention on which a policy keeps what the paper's rule, computed in full, does."""
    same = []
    for number in range(12):
        queries, sharpness = ((None, 16)[number % 2], (0.2, 4.0, 12.0)[number % 3])
        seen = random_view(seed + number, queries, sharpness)
        same.append([each.tolist() for each in H2O(6, 5).keep(seen)] == h2o_sets(seen, 6, 5))
        policy = FastGen([0], [1, 2], threshold=(0.3, 0.7, 0.9, 0.99)[number % 4], frequent=0.2, local=0.2)
        same.append([each.tolist() for each in policy.keep(seen)] == [kept for _, kept in fastgen_sets(seen, policy)])
    return float(np.mean(same))


def scores(recording: Recording) -> Iterator[dict[str, Any]]:
    """Milliseconds that it takes to add up one layer's attention over a prompt of `--evicted-context` tokens, for 64
    queries of 32 heads that share 8 KV heads (a few small ones on the host); by torch, and by the kernels on a GPU."""
    args = recording.args
    gpu, device = args.device != "cpu", torch.device(args.device)
    heads, group, dim = (8, 4, 128) if gpu else (4, 2, 16)
    generator = torch.Generator(device).manual_seed(args.seed)
    dtype = torch.bfloat16 if gpu else torch.float32
    queries, keys = (
        torch.randn(size, generator=generator, device=device).to(dtype)
        for size in ((QUERIES, heads, group, dim), (args.evicted_context, heads, dim))
    )

    def by_torch() -> torch.Tensor:
        return maps(queries, keys, dim**-0.5).sum(dim=(1, 2))

    with torch.inference_mode():
        found = {"h2o_scores_torch_ms": median(timed_ms(by_torch, 5, device))}
        if gpu:
            kernel = median(timed_ms(lambda: attended(queries, keys, dim**-0.5), 5, device))
            found |= {"h2o_scores_ms": kernel, "h2o_scores_gb_per_s": 2 * keys.nbytes / kernel / 1e6}
    yield found


def eviction(recording: Recording) -> Iterator[dict[str, Any]]:
    """Milliseconds of a captured step over `--batch` sequences of `--context` tokens, and of the same graph behind the
    eviction of all but a fifth of them; None on the host."""
    args, model = recording.args, recording.model
    shape = shape_of(model, args.batch, args.context + 64)
    driver = open_driver(args.device)
    whole = (args.batch + 1) * (shape.max_seq_len * shape.token_bytes + 2 * shape.num_layers * driver.granularity())
    # Single pages, as `Engine.from_pretrained` takes for a policy.
    cache = KVCacheManager(shape, driver, whole, config=CacheConfig(own_lengths=True, extent_classes=1))
    options: dict[str, Any] = {"attention": args.attention, "buckets": [args.batch], "prefix_cache": False}
    with Engine(model, cache, max_step_tokens=32, **options) as engine:
        fill_lanes(engine, args.context, args.seed)
        before = _step_ms(engine)
        yield {"step_ms_before_eviction": before}
        kept = torch.arange(0, args.context, 5, device=args.device)
        places = [[kept] * shape.num_kv_heads] * shape.num_layers
        with torch.inference_mode():
            done = [compact(cache, sequence, places) for sequence in range(args.batch)]
        after = _step_ms(engine)
        empty_lanes(engine)
    yield {
        "step_ms_behind_eviction": after,
        f"evicted_step_over_whole_{args.batch}x{args.context}": after / before if before and after else None,
        "evicted_lanes_returned_over_evicted": sum(each.returned_bytes for each in done)
        / sum(each.evicted_bytes for each in done),
    }


def _step_ms(engine: Engine) -> float | None:
    times = [device_step_ms(engine, 6) for _ in range(3)]
    known = [each for each in times if each is not None]
    return median(known) if known else None


def latents(recording: Recording) -> Iterator[dict[str, Any]]:
    """Microseconds a layer of decoding `--batch` sequences of `--context` tokens, of 16 and of 128 query heads, and the
    bytes of latents that were read in that time; on the host by torch, of small rows."""
    args = recording.args
    gpu, device = args.device != "cpu", torch.device(args.device)
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = CacheShape(LATENT_LAYERS, 1, LATENT if gpu else 24, dtype, args.batch, args.context, kv_factor=1)
    generator = torch.Generator(device).manual_seed(args.seed)
    with make_cache("vattn", shape, args.device, lookahead=0) as cache, torch.inference_mode():
        fill_flat(cache, np.full(args.batch, args.context))
        lengths = torch.full((args.batch,), args.context, dtype=torch.int32, device=device)
        for heads in (16, 128) if gpu else (4,):
            attention = make_attention("auto", cache, heads)
            q = torch.randn(args.batch, heads, shape.head_dim, generator=generator, device=device).to(dtype)

            def all_layers(attention: Any = attention, q: torch.Tensor = q) -> None:
                attention.begin_step()
                for layer in range(LATENT_LAYERS):
                    attention.decode(layer, q, lengths)

            took = median(timed_ms(all_layers, 10, device)) / LATENT_LAYERS
            read = args.batch * args.context * shape.layer_token_bytes
            yield {
                "latents_backend": attention.name,
                f"latents_us_a_layer_{heads}_heads": 1e3 * took,
                f"latents_gb_per_s_{heads}_heads": read / took / 1e6,
            }
