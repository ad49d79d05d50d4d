"""An engine on the host whose device is emulated: a launch computes nothing, and is over when a device's would be.

Everything else is the engine's own: scheduler, cache, pipeline of two launches, events, text. Whoever reads a launch's
tokens sleeps until then without holding the interpreter, as it does where it waits for a GPU. So times beside it, of a
server in the same process or another, are those that it would have beside a GPU, as far as the host's processors are
alike; throughput is what the emulated device gives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.runtime.decode import DecodeBatch, Launch
from trtllm_vattn.runtime.engine import Engine
from trtllm_vattn.runtime.step_model import StepModel

PROMPT_S = 20e-6
"""Seconds a token of a prompt adds to a launch: about those of Llama-3-8B on an H200."""


@dataclass(frozen=True)
class TimedLaunch(Launch):
    """A launch that is over at a time of `perf_counter`."""

    over_at: float = 0.0

    def read(self) -> list[list[int]]:
        """As `Launch.read`, when it is over."""
        sleep(max(0.0, self.over_at - perf_counter()))
        return super().read()


class TimedDecode(DecodeBatch):
    """Lanes of a device that takes `step_s` seconds for each launch, one after the other."""

    step_s = 0.0
    _free_at = 0.0

    def launched(self, lanes: dict[int, int], steps: int, *given: Any, **named: Any) -> Launch:
        """As `DecodeBatch.launched`."""
        made = super().launched(lanes, steps, *given, **named)
        took = self.step_s + PROMPT_S * made.prompt_tokens
        self._free_at = max(self._free_at, perf_counter()) + took
        return TimedLaunch(**{each.name: getattr(made, each.name) for each in fields(Launch)}, over_at=self._free_at)


class EmulatedEngine(Engine):
    """An `Engine` over a cache on the host, whose launches take `step_s` seconds and `PROMPT_S` for each token of a
    prompt; the token behind each token is looked up in a table."""

    decode_class: ClassVar[type[DecodeBatch]] = TimedDecode

    def __init__(self, model: StepModel, cache: KVCache, step_s: float, **options: Any) -> None:
        super().__init__(model, cache, capture=False, compile=False, **options)
        vocab = int(model.config.get_text_config().vocab_size)
        table = torch.rand(vocab, vocab, generator=torch.Generator().manual_seed(0))

        def forward(input_ids: torch.Tensor, logits_to_keep: torch.Tensor | None = None, **_: Any) -> Any:
            rows = input_ids[0] if logits_to_keep is None else input_ids[0, logits_to_keep]
            return SimpleNamespace(logits=table[None, rows])

        # Behind the dry pass that asks what the model's attention needs.
        vars(model)["forward"] = forward
        assert isinstance(self.decode, TimedDecode)
        self.decode.step_s = step_s
