from __future__ import annotations

import pytest
import torch

from trtllm_vattn.runtime.sampling import NO_TOKEN, SamplingParams, choose, have_token, in_parts, of_parts, sample

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def test_a_draw_goes_by_token_and_not_by_rank() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 512, generator=generator)
    near = logits * (1 + 1e-7 * torch.randn(200, 512, generator=generator).sign())
    for params in (SamplingParams(temperature=1.0, seed=2), SamplingParams(temperature=1.0, top_p=0.9, seed=2)):
        assert sample(logits, [params] * 200, range(200)).tolist() == sample(near, [params] * 200, range(200)).tolist()
    # Tokens that trade places trade their noise too.
    pair = torch.tensor([[0.0, 1e-7], [1e-7, 0.0]])
    for index in range(50):
        first, second = sample(pair, [SamplingParams(temperature=1.0, seed=4)] * 2, [index] * 2).tolist()
        assert first == second


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    logits = torch.randn(32, 1009, generator=torch.Generator().manual_seed(5)) * 3
    params = [SamplingParams(temperature=0.1 + 0.1 * n, top_p=1 - n / 64, top_k=n % 3 * 20, seed=n) for n in range(32)]
    together = sample(logits, params, range(32)).tolist()
    alone = [sample(logits[n : n + 1], [params[n]], [n]).item() for n in range(32)]
    assert together == alone


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities as the papers have them, in float64: temperature, then top-k, then top-p."""
    order = (logits.double() / params.temperature).sort(descending=True, stable=True)
    values = order.values.clone()
    if params.top_k:
        values[params.top_k :] = -torch.inf
    likely = values.softmax(0)
    likely[likely.cumsum(0) - likely >= params.top_p] = 0
    return torch.zeros_like(likely).scatter(0, order.indices, likely / likely.sum())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (3.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 7, 0.6), (1.0, 1, 1.0)],
)
def test_draws_have_the_reference_distribution(device: str, temperature: float, top_k: int, top_p: float) -> None:
    draws, vocab = 20000, 16
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(7)) * 1.5
    # Two equal ones, and a masked one.
    logits[3], logits[5] = logits[4], -torch.inf
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    tokens = sample(logits.to(device).expand(draws, vocab), [params] * draws, range(draws)).cpu()
    counts, wanted = torch.bincount(tokens, minlength=vocab).double(), draws * reference(logits, params)
    there = wanted > 0
    assert counts[~there].sum() == 0
    squared = ((counts - wanted)[there] ** 2 / wanted[there]).sum()
    freedom = int(there.sum()) - 1
    # The 99.99th percentile is below this (Laurent and Massart, 2000).
    assert squared <= freedom + 2 * (freedom * 9.22) ** 0.5 + 2 * 9.22


def test_seeds_and_indices_give_independent_draws() -> None:
    logits = torch.zeros(4000, 4)
    by_index = sample(logits, [SamplingParams(temperature=1.0, seed=1)] * 4000, range(4000))
    by_seed = sample(logits, [SamplingParams(temperature=1.0, seed=n) for n in range(4000)], [1] * 4000)
    for tokens in (by_index, by_seed):
        pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
        wanted = 3999 / 16
        assert ((pairs - wanted) ** 2 / wanted).sum() < 15 + 2 * (15 * 9.22) ** 0.5 + 2 * 9.22


def test_greedy_and_drawn_rows_share_a_call() -> None:
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1.0, seed=1)]
    tokens = sample(LOGITS.expand(3, 4), params, [0, 0, 0])
    assert tokens[:2].tolist() == [1, 1]


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    params = SamplingParams(temperature=1.0)
    one, other = params.seeded(), params.seeded()
    assert params.seed is None
    assert one.seed is not None
    assert one.seed != other.seed
    assert one.seeded() is one
    assert SamplingParams().seeded().seed is None
    keys = {SamplingParams(temperature=1.0, seed=seed).key(n) for seed in (0, 1, 2**64 - 1) for n in range(100)}
    assert len(keys) == 300
    assert all(-(2**63) <= key < 2**63 for key in keys)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("row", "good"),
    [
        ([NAN, NAN, NAN, NAN], False),
        ([0.0, NAN, 1.0, -INF], False),
        ([-INF, -INF, -INF, -INF], False),
        ([0.0, INF, 1.0, 2.0], False),
        ([0.0, -INF, 1.0, 2.0], True),
        ([-INF, -INF, 5.0, -INF], True),
        ([3e38, -3e38, 0.0, 1.0], True),
    ],
)
def test_every_choice_is_total(device: str, row: list[float], good: bool) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0], row, [0.0, 1.0, 9.0, 2.0]], device=device)
    assert have_token(logits) == [True, good, True]
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1e-4, seed=1),
        SamplingParams(temperature=0.5, top_k=2, top_p=0.5, seed=1),
        SamplingParams(temperature=1e300, top_k=1, seed=1),
    ):
        tokens = sample(logits, [params] * 3, [0] * 3).tolist()
        assert (tokens[0], tokens[2]) == (3, 2)
        assert (tokens[1] != NO_TOKEN) is good
        chosen = choose(logits, [(params, 0)] * 3)
        assert (chosen[0], chosen[2]) == (3, 2)
        assert 0 <= chosen[1] < 4
    parts = in_parts(logits)
    whole = of_parts(*parts.max(dim=-1), parts.shape[2]).tolist()
    assert (whole[0], whole[2]) == (3, 2)
    assert whole[1] == (int(logits[1].argmax()) if good else NO_TOKEN)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 9e-6])
def test_what_logits_cannot_be_divided_by_is_greedy(temperature: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    cold = SamplingParams(temperature=temperature, seed=3)
    assert cold.greedy
    assert sample(logits, [cold] * 3, [0, 1, 2]).tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("vocab", [1, 7, 512, 1009, 128256])
def test_the_first_of_the_largest_is_chosen(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # Few different values, so that rows have many largest ones.
    logits = torch.randint(0, 5, (6, vocab), generator=generator).bfloat16()
    for values in (logits, torch.randn(6, vocab, generator=generator)):
        parts = in_parts(values)
        assert parts.shape[1] <= 128
        assert torch.equal(of_parts(*parts.max(dim=-1), parts.shape[2]), values.argmax(dim=-1))
