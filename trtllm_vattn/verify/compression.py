"""The rules of H2O and FastGen computed in full, in numpy and float64, for policies to be held against."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_vattn.cache.compression.fastgen import KINDS, FastGen
from trtllm_vattn.cache.compression.policy import HeadsView, tokens_of


def random_view(
    seed: int = 0,
    queries: int | None = None,
    sharpness: float = 4.0,
    tokens: int = 40,
    heads: int = 3,
    group: int = 2,
    head_dim: int = 8,
) -> HeadsView:
    """Of a prompt of random keys, queries and token ids below 10; the larger `sharpness`, the fewer tokens have most of
    a query's attention. `queries` of them are seen; None is all."""
    random = torch.Generator().manual_seed(seed)
    q = sharpness * torch.randn(tokens, heads, group, head_dim, generator=random)
    keys = torch.randn(tokens, heads, head_dim, generator=random)
    ids = torch.randint(0, 10, (tokens,), generator=random).expand(heads, -1)
    positions = torch.arange(tokens).expand(heads, -1)
    some = q if queries is None else q[-queries:]
    none = torch.zeros(heads, tokens)
    return HeadsView(0, 0, tokens, tokens, keys, keys, positions, ids, some, head_dim**-0.5, none)


def attention_of(view: HeadsView, kept: np.ndarray | None = None) -> np.ndarray:
    """Attention, float64 ``[heads, group, queries, held]``, of a view that nothing was evicted from; over the keys in
    `kept` alone where given, bool of a shape that broadcasts to this. A row without any is 0."""
    first = view.length - len(view.queries)
    queries, keys = view.queries.cpu().double().numpy(), view.keys.cpu().double().numpy()
    scores = np.einsum("qhgd,thd->hgqt", queries, keys) * view.scale
    causal = np.arange(view.held) <= first + np.arange(len(queries))[:, None]
    visible = np.broadcast_to(causal if kept is None else causal & kept, scores.shape)
    scores = np.where(visible, scores, -np.inf)
    most = scores.max(-1, keepdims=True)
    weights = np.where(visible, np.exp(scores - np.where(np.isfinite(most), most, 0.0)), 0.0)
    shares: np.ndarray = weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return shares


def h2o_sets(view: HeadsView, heavy: int, recent: int) -> list[list[int]]:
    """What each head keeps of a prompt by H2O: `recent` last tokens, and of those before the `heavy` ones of most
    attention."""
    first = view.held - recent
    heaviest = (_heaviest(mass[:first], heavy) for mass in attention_of(view).sum((1, 2)))
    return [sorted([*some, *range(first, view.held)]) for some in heaviest]


def _heaviest(mass: np.ndarray, count: int) -> list[int]:
    """The places of the largest numbers; of equal ones the first."""
    places: list[int] = np.argsort(-mass, kind="stable")[:count].tolist()
    return places


def fastgen_sets(view: HeadsView, policy: FastGen) -> list[tuple[str, list[int]]]:
    """What each head's policy is by FastGen, and what it keeps of a prompt: the first whose map, computed anew without
    the evicted keys, is no farther from the head's own than 1 - threshold."""
    own, count = attention_of(view), len(view.queries)
    at, places = view.length - count + np.arange(count), np.arange(view.held)
    frequent = tokens_of(policy.frequent, view.length)
    near = places > at[:, None] - tokens_of(policy.local, view.length)
    newest = places == view.held - 1
    found = []
    for head, maps in enumerate(own):
        ids, mass = view.tokens[head].cpu().numpy(), maps.sum((0, 1))
        special = np.isin(ids, policy.special)
        punctuation = special | np.isin(ids, policy.punctuation)
        frequency = punctuation | np.isin(places, _heaviest(mass, frequent))
        masks = [special[None], punctuation[None], frequency[None], frequency | near, np.ones((1, view.held), bool)]
        for kind, mask in zip(KINDS, masks, strict=True):
            other = attention_of(view, mask)[head]
            # Total variation; a row without a key left is as far as can be.
            distance = np.where(other.sum(-1) > 0, np.abs(maps - other).sum(-1) / 2, 1.0)
            if kind == "full" or distance.mean() <= 1 - policy.threshold:
                found.append((kind, np.flatnonzero(mask[-1] | newest).tolist()))
                break
    return found
