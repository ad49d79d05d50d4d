"""Policies keep what the papers' rules, computed in full on random maps of attention, keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from probing import probe

from trtllm_vattn.cache.compression import H2O, CompressionPolicy, FastGen, HeadsView, mass
from trtllm_vattn.cache.compression.fastgen import KINDS
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.verify.compression import attention_of, fastgen_sets, h2o_sets, random_view

HEADS, GROUP, DIM, TOKENS = 3, 2, 8, 40
SPECIAL, PUNCTUATION = (0,), (1, 2)


def test_the_kernels_add_up_attention_in_the_interpreter() -> None:
    probe(Path(__file__).with_name("mass_probe.py"), "cpu", interpreted=True)


def test_tiles_of_the_kernels_fit_into_the_shared_memory_of_every_card() -> None:
    tiles = {(dims, itemsize): mass.tile_of(dims, itemsize) for dims in (64, 128, 256) for itemsize in (2, 4)}
    assert tiles == {(64, 2): 64, (64, 4): 64, (128, 2): 64, (128, 4): 32, (256, 2): 32, (256, 4): 16}


@pytest.mark.gpu
def test_the_kernels_add_up_attention_on_the_card() -> None:
    probe(Path(__file__).with_name("mass_probe.py"), "cuda:0", interpreted=False)


def test_attention_adds_up() -> None:
    seen = random_view(queries=7)
    full = attention_of(seen)
    assert np.allclose(seen.attended().numpy(), full.sum((1, 2)), atol=1e-5)
    at = seen.length - 7 + np.arange(7)
    near = np.arange(seen.held) > at[:, None] - 4
    assert np.allclose(seen.attended(4).numpy(), (full * near).sum((1, 2)), atol=1e-5)


def test_maps_are_causal_attention() -> None:
    seen = random_view(queries=7)
    assert np.allclose(seen.maps().numpy(), attention_of(seen), atol=1e-5)
    assert np.allclose(seen.maps(2, 5).numpy(), attention_of(seen)[:, :, 2:5], atol=1e-5)


@pytest.mark.parametrize("queries", [None, 9])
@pytest.mark.parametrize("seed", range(4))
def test_h2o_keeps_heavy_hitters_and_recent_tokens(seed: int, queries: int | None) -> None:
    seen = random_view(seed, queries)
    kept = H2O(heavy=6, recent=0.2).keep(seen)
    assert [each.tolist() for each in kept] == h2o_sets(seen, 6, 8)
    assert kept[0].tolist() != kept[1].tolist()


def test_h2o_is_the_papers_greedy_algorithm_step_by_step() -> None:
    """Algorithm 1: once the budget is full, each step evicts the token of the least accumulated attention that is not
    among the recent ones."""
    policy, prompt, heavy, recent = H2O(heavy=5, recent=4, every=1, queries=None), 9, 5, 4
    whole = random_view(3)
    q, keys = whole.queries, whole.keys
    for head in range(HEADS):
        sets: list[int] = []
        score: dict[int, float] = {}
        held, carried = torch.arange(prompt), torch.zeros(1, prompt)
        for now in range(prompt - 1, TOKENS):
            # The paper's, one token at a time; the prompt's before its end.
            for at in range(prompt) if now == prompt - 1 else [now]:
                sets.append(at)
                logits = np.array([[float(q[at, head, g] @ keys[t, head]) for t in sets] for g in range(GROUP)])
                shares = np.exp(DIM**-0.5 * logits)
                for place, token in enumerate(sets):
                    score[token] = score.get(token, 0.0) + float(
                        (shares / shares.sum(1, keepdims=True))[:, place].sum()
                    )
            if len(sets) > heavy + recent:
                sets.remove(min(sets[:-recent], key=score.__getitem__))
            # Ours, over what is held.
            if now >= prompt:
                held, carried = torch.cat((held, torch.tensor([now]))), torch.nn.functional.pad(carried, (0, 1))
            asked = q[:prompt] if now == prompt - 1 else q[now : now + 1]
            where = held[None]
            seen = HeadsView(
                0, head, now + 1, prompt, keys[held][:, head : head + 1], keys[held][:, head : head + 1], where, where,
                asked[:, head : head + 1], DIM**-0.5, carried,
            )  # fmt: skip
            (kept,) = policy.keep(seen)
            held, carried = held[kept], seen.mass[:, kept]
            assert held.tolist() == sets


@pytest.mark.parametrize("queries", [None, 12])
@pytest.mark.parametrize("sharpness", [0.2, 4.0, 12.0])
def test_fastgen_takes_the_first_policy_that_recovers_the_map(sharpness: float, queries: int | None) -> None:
    kinds = set()
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        policy = FastGen(SPECIAL, PUNCTUATION, threshold=threshold, frequent=0.2, local=0.2)
        seen = random_view(5, queries, sharpness)
        expected = fastgen_sets(seen, policy)
        assert [each.tolist() for each in policy.keep(seen)] == [kept for _, kept in expected]
        assert [KINDS[kind] for kind in seen.notes["kinds"]] == [kind for kind, _ in expected]
        kinds |= {kind for kind, _ in expected}
    assert len(kinds) >= 3


def test_more_tokens_than_a_sequence_may_have_are_all_of_them() -> None:
    seen = random_view(1)
    for policy in (H2O(10**26, 10**26), FastGen(threshold=1, frequent=1, local=10**26)):
        assert [len(kept) for kept in policy.keep(seen)] == [TOKENS] * len(policy.keep(seen))


def test_fastgen_keeps_a_heads_policy() -> None:
    policy = FastGen(SPECIAL, PUNCTUATION, threshold=0.5, every=4)
    seen = random_view(1)
    seen.notes["kinds"] = [0, 4, 3]
    kept = policy.keep(seen)
    special = set(np.flatnonzero(seen.tokens[0].numpy() == 0).tolist()) | {TOKENS - 1}
    assert set(kept[0].tolist()) == special
    assert len(kept[1]) == TOKENS
    assert set(range(TOKENS - 12, TOKENS)) <= set(kept[2].tolist())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: H2O(1.5), "a share is between 0.0 and 1.0"),
        (lambda: H2O(0, 0), "nothing is kept"),
        (lambda: H2O([]), "heavy is empty"),
        (lambda: H2O(every=0), "every"),
        (lambda: H2O([1, 2]).check(3), "heavy has 2 amounts for 3 layers"),
        (lambda: FastGen("ab"), "give the token ids"),
        (lambda: FastGen(threshold=0), "threshold"),
        (lambda: FastGen(queries=0), "queries"),
    ],
)
def test_wrong_numbers_are_refused(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()  # type: ignore[operator]


def test_budgets_a_layer() -> None:
    policy: CompressionPolicy = H2O([2, 4], [1, 3])
    for layer, count in ((0, 3), (1, 7)):
        fields = {name: value for name, value in vars(random_view()).items() if name != "mass"}
        assert [len(each) for each in policy.keep(HeadsView(**{**fields, "layer": layer}))] == [count] * HEADS
