from __future__ import annotations

import pytest
import torch

from trtllm_vattn.runtime.sampling import SamplingParams, in_parts, of_parts, sample

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def frequencies(params: SamplingParams, draws: int = 4000) -> list[float]:
    rows = LOGITS.expand(draws, 4)
    tokens = sample(rows, [params] * draws, list(range(draws)))
    return (torch.bincount(tokens, minlength=4) / draws).tolist()


def close(got: list[float], want: list[float]) -> bool:
    return all(abs(a - b) < 0.03 for a, b in zip(got, want, strict=True))


def test_tokens_are_drawn_by_their_probabilities() -> None:
    assert close(frequencies(SamplingParams(temperature=1.0)), [0.1, 0.4, 0.2, 0.3])


def test_temperature_sharpens() -> None:
    squares = [0.01, 0.16, 0.04, 0.09]
    assert close(frequencies(SamplingParams(temperature=0.5)), [value / 0.3 for value in squares])


def test_top_k_keeps_the_likeliest() -> None:
    assert close(frequencies(SamplingParams(temperature=1.0, top_k=2)), [0, 0.4 / 0.7, 0, 0.3 / 0.7])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert close(frequencies(SamplingParams(temperature=1.0, top_p=0.65)), [0, 0.4 / 0.7, 0, 0.3 / 0.7])
    assert frequencies(SamplingParams(temperature=1.0, top_p=0.3)) == [0, 1, 0, 0]


def test_greedy_and_drawn_rows_share_a_call() -> None:
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1.0, seed=1)]
    tokens = sample(LOGITS.expand(3, 4), params, [0, 0, 0])
    assert tokens[:2].tolist() == [1, 1]


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    again = [params.uniform(index) for index in (3, 1, 2)]
    assert again == [params.uniform(3), params.uniform(1), params.uniform(2)]
    assert len({*again, SamplingParams(temperature=1.0, seed=8).uniform(3)}) == 4


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
