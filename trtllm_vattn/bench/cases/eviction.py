"""Part of `bench compression`: what evicting tokens by H2O and FastGen gives back, by pages, heads a range, policy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import pi
from statistics import median
from typing import Any

import numpy as np
import torch

from trtllm_vattn.bench.harness.case import model_of, vocab_of
from trtllm_vattn.bench.harness.contenders import device_step_ms
from trtllm_vattn.cache.base import CacheShape, FlatKV
from trtllm_vattn.cache.compression import H2O, CompressionPolicy, FastGen, HeadsView, compact
from trtllm_vattn.cache.config import CacheConfig
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.memory.pool import CLASSES
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.verify.compression import fastgen_sets, h2o_sets, random_view
from trtllm_vattn.vmm.open import open_driver

QUERIES, OUTPUT = 64, 24
SHARE = 0.1
"""Of the prompt: H2O's heavy hitters, and its recent tokens."""
SPECIAL = 7
"""The id of a special token; one token in 50 is one."""
KINDS = ("full", "special", "local", "frequency")
"""What heads attend to, in turn."""


def eviction(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes returned for each byte evicted, whether kept sets are the papers', and a step before and behind."""
    policies: dict[str, CompressionPolicy] = {"h2o": H2O(SHARE, SHARE), "fastgen": _fastgen()}
    found = {
        (name, heads, classes): returned_over_evicted(args, policy, heads, classes)
        for name, policy in policies.items()
        for heads in (1, None)
        for classes in (1, CLASSES)
    }
    return {
        "h2o_returned_over_evicted": found["h2o", None, 1],
        "h2o_returned_over_evicted_range_a_head": found["h2o", 1, 1],
        "h2o_returned_over_evicted_large_extents": found["h2o", None, CLASSES],
        "fastgen_returned_over_evicted": found["fastgen", 1, 1],
        "fastgen_returned_over_evicted_large_extents": found["fastgen", 1, CLASSES],
        "row_of_all_heads_returned_over_evicted": found["fastgen", None, 1],
        "kept_sets_match_paper": kept_sets_match(args.seed),
        **same_tokens(args),
        **steps(args),
    }


def _fastgen() -> FastGen:
    return FastGen([SPECIAL], threshold=0.9, frequent=0.05, local=0.1)


def returned_over_evicted(
    args: argparse.Namespace, policy: CompressionPolicy, heads: int | None, classes: int
) -> float:
    """Memory that goes back for each byte that the policy evicts of a prompt of `--evicted-context` tokens. `heads`
    share a range, None all of them; extents are of `classes` sizes; heads' attention is of `KINDS`."""
    gpu, tokens = args.device != "cpu", args.evicted_context
    layers, kv_heads, dim = (4, 8, 128) if gpu else (2, 4, 16)
    shape = CacheShape(layers, kv_heads, dim, torch.bfloat16, 1, tokens + 64)
    # A head that has a range of its own has it in each layer, too.
    config = CacheConfig(
        own_lengths=True,
        heads_per_range=heads,
        layers_per_range=None if heads is None else 1,
        extent_classes=classes,
    )
    generator = torch.Generator(args.device).manual_seed(args.seed)
    driver = open_driver(args.device)
    least = (tokens + 64) * shape.token_bytes + 2 * layers * kv_heads * driver.granularity()
    with KVCacheManager(shape, driver, 2 * least, config=config) as cache, torch.inference_mode():
        cache.admit(0, tokens)
        ids = torch.arange(tokens, device=args.device).remainder(50).eq(SPECIAL).long() * SPECIAL
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


def same_tokens(args: argparse.Namespace) -> dict[str, float]:
    """The share of steps that choose the token which they choose with everything kept, of `OUTPUT` behind each of a few
    prompts of `--context` tokens, all fed the same; by how many of 100 tokens of a prompt H2O keeps."""
    model = model_of(args)
    random = np.random.default_rng(args.seed)
    prompts = [random.integers(0, vocab_of(model), args.context).tolist() for _ in range(3)]

    def chosen(policy: CompressionPolicy | None, forced: list[list[int]] | None) -> list[list[int]]:
        shape = shape_of(model, len(prompts), args.context + OUTPUT)
        cache = make_cache("vattn", shape, args.device, own_lengths=policy is not None, extent_classes=1)
        options: dict[str, Any] = {"compile": False, "capture": False, "prefix_cache": False}
        with Engine(model, cache, attention=args.attention, compression=policy, **options) as engine:
            params = SamplingParams(OUTPUT, ignore_eos=True)
            tokens: dict[int, list[int]] = {
                engine.submit(prompt, params, None if forced is None else forced[index]): []
                for index, prompt in enumerate(prompts)
            }
            for event in engine.run():
                tokens[event.request].append(-1 if event.token is None else event.token)
        return [*tokens.values()]

    whole = chosen(None, None)
    found = {}
    for kept in (20, 40, 60, 80):
        other = chosen(H2O(kept / 200, kept / 200), whole)
        found[f"h2o_same_tokens_kept_{kept}"] = float(np.mean(np.array(other) == np.array(whole)))
    return found


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a captured step over `--batch` sequences of `--context` tokens, and of the same graph behind the
    eviction of all but a fifth of them; None on the host."""
    model = model_of(args)
    shape = shape_of(model, args.batch, args.context + 64)
    driver = open_driver(args.device)
    whole = (args.batch + 1) * (shape.max_seq_len * shape.token_bytes + 2 * shape.num_layers * driver.granularity())
    cache = KVCacheManager(shape, driver, whole, config=CacheConfig(own_lengths=True))
    found: list[float | None] = []
    with Engine(model, cache, attention=args.attention, buckets=[args.batch], prefix_cache=False) as engine:
        for sequence in range(args.batch):
            slot = cache.admit(sequence, args.context)
            engine.decode.set_lane(slot, sequence, args.context + 1, shape.max_seq_len)
        with torch.inference_mode():
            # A lane whose logits are no numbers would become idle.
            for memory in cache.mapped_tensors():
                memory.normal_()
        found.append(_step_ms(engine))
        kept = torch.arange(0, args.context, 5, device=args.device)
        with torch.inference_mode():
            for sequence in range(args.batch):
                compact(cache, sequence, [[kept] * shape.num_kv_heads] * shape.num_layers)
        found.append(_step_ms(engine))
        for sequence in range(args.batch):
            engine.decode.clear_lane(cache.slot_of(sequence))
            cache.release(sequence)
    before, after = found
    return {
        "step_ms_before_eviction": before,
        "step_ms_behind_eviction": after,
        f"evicted_step_over_whole_{args.batch}x{args.context}": after / before if before and after else None,
    }


def _step_ms(engine: Engine) -> float | None:
    times: Sequence[float | None] = [device_step_ms(engine, 6) for _ in range(3)]
    known = [each for each in times if each is not None]
    return median(known) if known else None
