"""Twice as many sequences as memory holds: who is sent back does not push out others, and little is lost.

Time is virtual: each launch costs what its rows do, each copy its bytes; the driver is the host's, and memory is mapped
between steps, so that every run is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.runtime.binding import shape_of
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.models import SHAPES, load_model
from trtllm_vattn.runtime.request import RequestState, StepRecord
from trtllm_vattn.runtime.sampling import SamplingParams
from trtllm_vattn.runtime.swap_cost import SwapCost
from trtllm_vattn.runtime.watermark import Watermark
from trtllm_vattn.vmm.host import HostDriver

PROMPT, OUTPUT, AT_ONCE, REQUESTS = 24, 40, 4, 16
STEP_S, TOKEN_S, BANDWIDTH = 5e-3, 1e-4, 2e6
"""A step of a few sequences, a prompt's token, and a link on which a whole sequence takes about as long as a step."""


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES["tiny-llama"], "num_hidden_layers", 1)
        yield load_model("tiny-llama", "cpu", torch.float32)


@dataclass
class Run:
    """What a run took in virtual time, and how often each request was swapped out."""

    seconds: float = 0.0
    swaps: Counter[int] = field(default_factory=Counter)
    recomputed: Counter[int] = field(default_factory=Counter)
    tokens: dict[int, list[int]] = field(default_factory=dict)


def run(model: PreTrainedModel, slots: int, lengths: list[int], swap: bool, monkeypatch: pytest.MonkeyPatch) -> Run:
    """All requests at once, in memory for `AT_ONCE` sequences of full length."""
    found = Run()
    shape = shape_of(model, slots, PROMPT + OUTPUT)
    cache = make_cache("vattn", shape, "cpu", lookahead=0, host_memory="64MiB", driver=HostDriver())
    cost = SwapCost(BANDWIDTH, BANDWIDTH, 1.0 if swap else 1e-12)

    def observe(record: StepRecord) -> None:
        found.seconds += STEP_S * record.steps + TOKEN_S * record.prefilled

    with Engine(
        model,
        cache,
        attention="torch",
        compile=False,
        capture=False,
        packed=False,
        prefix_cache=False,
        mapping="between-steps",
        swap_cost=cost,
        observer=observe,
    ) as engine:
        cache.set_budget(AT_ONCE * cache.bytes_of(PROMPT + OUTPUT) + cache.bytes_of(1))
        scheduler, suspend = engine.scheduler, engine.slots.suspend
        send_back = scheduler._leave_to_recompute

        def counted(request: RequestState, tokens: int, wait: bool = True) -> int:
            copied = suspend(request, tokens, wait)
            found.swaps[request.id] += 1
            return copied

        def recomputed(request: RequestState) -> None:
            found.recomputed[request.id] += 1
            send_back(request)

        monkeypatch.setattr(engine.slots, "suspend", counted)
        monkeypatch.setattr(scheduler, "_leave_to_recompute", recomputed)
        random = np.random.default_rng(0)
        prompts = [random.integers(0, 512, PROMPT).tolist() for _ in lengths]
        for prompt, length in zip(prompts, lengths, strict=True):
            engine.submit(prompt, SamplingParams(length, ignore_eos=True))
        while engine.busy:
            for event in engine.step():
                assert event.error is None
                found.tokens.setdefault(event.request, []).append(event.token)
        done = cache.transfers
        found.seconds += (done.out_bytes + done.in_bytes) / BANDWIDTH
        cache.check_integrity()
    return found


LENGTHS = {
    "equal": [OUTPUT] * REQUESTS,
    "unlike": np.random.default_rng(1).integers(OUTPUT // 4, OUTPUT + 1, REQUESTS).tolist(),
}


@pytest.mark.parametrize(("lengths", "swap"), [("equal", True), ("unlike", False)])
def test_oversubscription_degrades_and_does_not_collapse(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, lengths: str, swap: bool
) -> None:
    wanted = LENGTHS[lengths]
    admission = run(model, AT_ONCE, wanted, swap, monkeypatch)
    crowded = run(model, 2 * AT_ONCE, wanted, swap, monkeypatch)
    assert (admission.swaps, admission.recomputed) == ({}, {})
    assert crowded.tokens == admission.tokens
    backs = crowded.swaps if swap else crowded.recomputed
    # Without a watermark each is, and some of them many times.
    assert 0 < sum(backs.values()) <= REQUESTS // 2
    assert max(backs.values()) <= 2
    assert admission.seconds / crowded.seconds >= 0.9


class Pages:
    """Memory of a byte a token."""

    bytes_for_sequences = budget_bytes = 1000
    used = 0

    def bytes_of(self, tokens: int) -> int:
        return tokens

    def stats(self) -> Pages:
        return self

    @property
    def mapped_bytes(self) -> int:
        return self.used


def request(number: int, prompt: int, most: int, chosen: int = 1) -> RequestState:
    return RequestState(number, [1] * prompt, SamplingParams(most), most, chosen=[0] * chosen)


def test_the_reserve_is_what_all_grow_by_until_one_ends() -> None:
    mark = Watermark(cast(KVCache, Pages()))
    running = [request(0, 100, 31), request(1, 100, 61), request(2, 50, 6)]
    assert mark.reserve(running) == 3 * 5
    # A limit that nobody reaches keeps no more than a quarter free, and less where requests usually end before it.
    assert mark.reserve([request(0, 100, 5001), request(1, 100, 5001)]) == 250
    mark.ended(20)
    assert mark.reserve([request(0, 100, 5001), request(1, 100, 5001)]) == 40
    mark.ended(100)
    assert mark.usual == pytest.approx(30)


def test_what_a_broker_may_lend_one_day_is_not_there() -> None:
    pages = Pages()
    mark, running, next_one = Watermark(cast(KVCache, pages)), [request(0, 500, 101)], request(1, 400, 101)
    mark.sent_back()
    pages.used, pages.bytes_for_sequences = 501, 5000
    assert not mark.lets_in(next_one, running, 0)
    assert mark.reserve([request(0, 100, 5001)]) == 250
    # A larger budget is looked at.
    pages.budget_bytes = 5000
    assert mark.lets_in(next_one, running, 0)


def test_nobody_is_held_back_before_somebody_was_sent_back_or_where_nobody_runs() -> None:
    pages = Pages()
    mark, running, next_one = Watermark(cast(KVCache, pages)), [request(0, 500, 101)], request(1, 400, 101)
    pages.used = 501
    assert mark.lets_in(next_one, running, 0)
    mark.sent_back()
    assert not mark.lets_in(next_one, running, 0)
    assert mark.lets_in(next_one, [], 0)
    # Until something changed, it is not even looked.
    pages.used = 0
    assert not mark.lets_in(next_one, running, 0)
    assert mark.lets_in(next_one, running, 1)
    pages.used = 501
    assert not mark.lets_in(next_one, running, 2)
    mark.emptied()
    assert mark.lets_in(next_one, running, 2)
