"""The likeliest tokens are in a total order, whatever finds them."""

from __future__ import annotations

import pytest
import torch

from trtllm_vattn.runtime.logprobs import ROWS_AT_ONCE, likeliest_ids, of_logits
from trtllm_vattn.runtime.sampling_fields import MOST_LOGPROBS

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_equally_likely_tokens_are_in_the_order_of_their_ids(device: str) -> None:
    torch.manual_seed(0)
    # Few different values, so that most are equal, at the edge of what is given too; as of bfloat16 logits.
    logits = (torch.randn(ROWS_AT_ONCE + 3, 384, device=device) * 2).round().clamp(-2, 3)
    logits[1, ::2], logits[1, 1::2] = 0.0, -0.0
    logits[2, 5:] = -torch.inf
    logits[3] = torch.linspace(-1e38, 1e38, 384)
    wanted = logits.sort(dim=-1, descending=True, stable=True).indices[:, :MOST_LOGPROBS]
    assert likeliest_ids(logits, MOST_LOGPROBS).equal(wanted)
    # Whatever the layout, and whatever stands beside them.
    assert likeliest_ids(logits.t().contiguous().t(), MOST_LOGPROBS).equal(wanted)
    others = logits.clone()
    others[0][others[0] < logits[0, wanted[0, -1]]] -= 0.25
    assert likeliest_ids(others, MOST_LOGPROBS)[0].equal(wanted[0])


def test_log_probabilities_of_equal_logits_are_equal_and_likeliest_first() -> None:
    logits = torch.zeros(1, 64)
    logits[0, [9, 3, 40]] = 2.0
    own, ids, values = of_logits(logits, torch.tensor([40]))
    assert ids[0, :5].tolist() == [3, 9, 40, 0, 1]
    assert values[0, 2] == own[0] == logits.log_softmax(-1)[0, 40]
    assert of_logits(logits[:, :5], torch.tensor([-1]))[1].tolist() == [[3, 0, 1, 2, 4]]
