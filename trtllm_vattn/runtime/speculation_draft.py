"""A draft model: a smaller one of the same vocabulary, over a cache of its own with fixed addresses.

It runs inside the captured step that verifies its drafts. Its cache is never waited for: a sequence that finds no
memory or no slot there, or whose driver call fails, goes on without drafts, and nobody else is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from trtllm_vattn.attention.base import MOST_QUERIES
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import CacheShape, KVCache
from trtllm_vattn.cache.select import make_cache
from trtllm_vattn.errors import ConfigError, DriverError, KVCacheOutOfMemory, MemoryQuarantined, NoFreeSlot
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.runtime.binding import DecodeStep, VerifyStep, bind, forward, options_for, shape_of
from trtllm_vattn.runtime.compiled import compile_model
from trtllm_vattn.runtime.prefill import Prefill, PromptChunk
from trtllm_vattn.runtime.step_model import StepModel
from trtllm_vattn.values import described
from trtllm_vattn.vmm.regions import Region
from trtllm_vattn.vmm.tensors import upload

logger = logging.getLogger(__name__)

CATCH_UP = MOST_QUERIES
"""Tokens of a lane that a step feeds the draft model at most before it drafts: the last ones that it has not seen. They
are one or two behind a step with drafts, and one more for each pass without."""

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""The lanes' tokens, int64 ``[bucket]``, out of logits ``[bucket, vocab]`` and how many drafts come before them."""


def check_draft_model(model: StepModel, draft: StepModel | str, lanes: int, max_seq_len: int) -> CacheShape:
    """The shape of a draft model's cache. Raises ConfigError where it cannot draft for the model."""
    if not isinstance(draft, PreTrainedModel):
        raise ConfigError(
            f"the draft model is {described(draft)}; give a Hugging Face causal language model, or its name to "
            "Engine.from_pretrained"
        )
    if draft is model:
        raise ConfigError("the draft model is the model itself, which would save nothing; give a smaller one")
    if draft.device != model.device:
        raise ConfigError(f"the draft model is on {draft.device}, the model on {model.device}; put them on one device")
    check_vocabularies(model.config.get_text_config(), draft.config.get_text_config())
    return shape_of(draft, lanes, max_seq_len)


def check_vocabularies(config: PreTrainedConfig, drafts: PreTrainedConfig) -> None:
    """Raise ConfigError where the vocabularies of a model and of the one that drafts differ in size."""
    if drafts.vocab_size != config.vocab_size:
        raise ConfigError(
            f"the draft model has a vocabulary of {drafts.vocab_size} tokens, the model one of {config.vocab_size}; "
            "they have to be the same"
        )


class DraftModel:
    """A draft model for as many sequences as run at once; `close` gives its memory back.

    Parameters
    ----------
    shape : CacheShape
        As `check_draft_model` gives it.
    attention : str
        The backend's name, as for the engine.
    budget : int or None
        Bytes of its cache; None is enough for all.
    chunk : int
        Most tokens of a prompt that go into it in one pass.
    compiling : bool
        Whether its layers are compiled by torch.compile, in place.

    Attributes
    ----------
    slots, fed : Tensor
        int64 ``[lanes + 1]`` by row of `Speculator.history`: the sequence's slot in the cache, the dummy slot where it
        has none; and how many of its tokens are in there.

    Raises
    ------
    ConfigError
        The model cannot be served, or the backend takes one query a lane.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: CacheShape,
        attention: str,
        budget: int | None = None,
        chunk: int = 2048,
        compiling: bool = False,
    ) -> None:
        # Rejected drafts take tokens back, which a window that went on does not have.
        shape = replace(shape, windows=())
        needs = bind(model, shape)
        self.model = model
        with ExitStack() as undo:
            self.cache: KVCache = undo.enter_context(make_cache("vattn", shape, model.device, budget))
            heads = model.config.get_text_config().num_attention_heads
            options = options_for(needs, shape, model.device)
            self.attention = make_attention(attention, self.cache, heads, needs.scale, options=options)
            if self.attention.most_queries < CATCH_UP:
                raise ConfigError(
                    f"the {self.attention.name} backend takes {self.attention.most_queries} queries of a lane for the "
                    f"draft model, which needs {CATCH_UP}; use attention='shares' over flat KV, or attention='torch'"
                )
            if compiling:
                compile_model(model)
            self.prefill = Prefill(model, self.attention, chunk)
            undo.pop_all()
        lanes, device = shape.num_slots, model.device
        self.slots = torch.full((lanes + 1,), self.cache.dummy_slot, dtype=torch.int64, device=device)
        self.fed = torch.zeros(lanes + 1, dtype=torch.int64, device=device)
        self._then = torch.zeros(lanes, dtype=torch.int64, device=device)
        """By lane: what `fed` is behind the step, if all drafts are right."""
        self._has_budget = budget is not None
        self._guard = Guard(self.cache, self.attention.over_read)
        self._slot_of = np.full(lanes + 1, self.cache.dummy_slot)
        self._row_of: dict[int, int] = {}
        """By row of `history`; each is the name of its sequence in the cache, too."""
        self._changed = False
        self._new: dict[int, Sequence[int]] = {}
        self._again: dict[int, int] = {}
        """By row: a sequence that goes on from so many tokens."""
        self._left: list[int] = []
        """Sequences whose release failed."""

    def take_part_of(self, left: int, token_bytes: int) -> int:
        """Set the cache's budget out of bytes that are left for it and for a cache with so many bytes a token; returns
        those that it may still take. No more than enough for all sequences."""
        held, own = self.cache.held_bytes, self.cache.shape.token_bytes
        if not self._has_budget:
            part = max(0, left) * own // (own + token_bytes)
            self.cache.set_budget(min(self.cache.budget_bytes, held + part))
        return self.cache.budget_bytes - held

    def storages(self) -> list[torch.Tensor]:
        """Tensors that a captured step touches."""
        return [
            *self.model.parameters(),
            *self.model.buffers(),
            *self.cache.storages(),
            *self.attention.storages(),
            *self.state(),
        ]

    def state(self) -> list[torch.Tensor]:
        """Tensors that a step changes for the steps behind it."""
        return [self.slots, self.fed, self._then]

    def regions(self) -> list[Region]:
        """As `Attention.regions`."""
        return self.attention.regions()

    # -- in a step ---------------------------------------------------------------------------------------------------

    def propose(
        self,
        inputs: torch.Tensor,
        row_of: torch.Tensor,
        history: torch.Tensor,
        drafts: torch.Tensor,
        counts: torch.Tensor,
        choose: Choose,
        bucket: int,
        most: int,
    ) -> None:
        """Draft up to `most` tokens of each of the first lanes; arguments as `speculation_step.look_up` takes them."""
        dummy = self.cache.dummy_slot
        rows, length, limit = row_of[:bucket], inputs[3, :bucket], inputs[4, :bucket]
        slots, fed = self.slots.index_select(0, rows), self.fed.index_select(0, rows)
        running = (length > 0) & (slots != dummy)
        count = torch.where(running, (length - fed).clamp(min=0, max=CATCH_UP), 0)
        query = torch.arange(CATCH_UP, device=inputs.device)
        there = query < count[:, None]
        place = torch.where(there, fed[:, None] + query, 0)
        where = (place + rows[:, None] * history.shape[1]).view(-1)
        tokens = torch.where(there.view(-1), history.view(-1).index_select(0, where).long(), 0)
        of_row = torch.where(there, slots[:, None], dummy).view(-1)
        lengths = torch.where(count > 0, fed + count, 0).to(torch.int32)
        last = torch.arange(bucket, device=inputs.device) * CATCH_UP + (count - 1).clamp(min=0)
        step = VerifyStep(self.attention, of_row, place.view(-1), lengths, count.to(torch.int32), slots)
        logits = forward(self.model, tokens, place.view(-1), step, last)
        ready = running & (fed + count == length)
        room = torch.where(ready, (limit - length).clamp(min=0, max=most), 0)
        drafts[:bucket, 0].copy_(choose(logits, 0).clamp(min=0))
        for draft in range(1, most):
            goes_on = room > draft
            tokens = torch.where(goes_on, drafts[:bucket, draft - 1], 0)
            places = torch.where(goes_on, length - 1 + draft, 0)
            lengths = torch.where(goes_on, length + draft, 0).to(torch.int32)
            one = DecodeStep(self.attention, torch.where(goes_on, slots, dummy), places, lengths, anywhere=True)
            logits = forward(self.model, tokens, places, one)
            drafts[:bucket, draft].copy_(choose(logits, draft).clamp(min=0))
        counts.zero_()
        counts[:bucket].copy_(room)
        # The last draft is chosen and not fed.
        self._then[:bucket].copy_(torch.where(ready, length + (room - 1).clamp(min=0), fed + count))

    def leave_out(self, row_of: torch.Tensor, counts: torch.Tensor) -> None:
        """The step has no drafts."""
        counts.zero_()
        self._then.copy_(self.fed.index_select(0, row_of))

    def settle(self, inputs: torch.Tensor, row_of: torch.Tensor) -> None:
        """Lanes were advanced: what was fed behind the first wrong draft does not count."""
        self.fed.scatter_(0, row_of, torch.minimum(self._then, (inputs[3] - 1).clamp(min=0)))

    # -- on the host -------------------------------------------------------------------------------------------------

    def join(self, row: int, tokens: Sequence[int], known: bool) -> None:
        """A sequence has a lane, and this row of `history`, and these tokens; `known` says that it had them before."""
        if known and row in self._row_of:
            self._again[row] = len(tokens) - 1
            return
        self._release_left()
        if row in self._left:
            return
        try:
            slot = self.cache.admit(row, max(1, len(tokens)))
        except (NoFreeSlot, KVCacheOutOfMemory, DriverError, MemoryQuarantined) as error:
            logger.info("a sequence goes on without drafts: %s", error)
            return
        self._row_of[row] = slot
        self._slot_of[row] = slot
        self._new[row] = tokens
        self._changed = True

    def leave(self, row: int) -> None:
        """A sequence has no lane any more, or no drafts."""
        if self._row_of.pop(row, None) is None:
            return
        self._new.pop(row, None)
        self._again.pop(row, None)
        self._slot_of[row] = self.cache.dummy_slot
        self._changed = True
        self._left.append(row)
        self._release_left()

    def _release_left(self) -> None:
        while self._left:
            try:
                self.cache.release(self._left[-1])
            except DriverError as error:
                logger.warning("taking memory of the draft model's cache back is tried again: %s", error)
                return
            self._left.pop()

    def clear(self) -> None:
        """No sequence has a lane. Begins from any state."""
        self.cache.reset()
        self._row_of.clear()
        self._new.clear()
        self._again.clear()
        self._left.clear()
        self._slot_of[:] = self.cache.dummy_slot
        self._changed = True

    def send(self) -> None:
        """Bring the device's numbers up to date, and put the tokens of new sequences in, on the stream of the launch
        that follows."""
        if self._changed:
            self.slots.copy_(upload(self._slot_of, self.slots.device))
            self._changed = False
        for row, length in self._again.items():
            self.fed[row].clamp_(max=length)
        self._again.clear()
        for row, tokens in self._new.items():
            self._put_in(self._row_of[row], tokens)
            self.fed[row].fill_(max(0, len(tokens) - 1))
        self._new.clear()

    def _put_in(self, slot: int, tokens: Sequence[int]) -> None:
        """All but the last token, which the next step feeds."""
        chunk = self.prefill.chunk
        for start in range(0, len(tokens) - 1, chunk):
            self.prefill.run([PromptChunk(slot, tokens[start : min(start + chunk, len(tokens) - 1)], start)])

    def prepare(self, ends: dict[int, int]) -> bool:
        """Back a step that makes sequences, by their row of `history`, so long at most; whether it can be. Who finds no
        memory has no drafts from now on."""
        while True:
            lengths = np.zeros(self.cache.shape.num_slots, np.int64)
            for row, end in ends.items():
                if row in self._row_of:
                    lengths[self._row_of[row]] = end
            there = lengths > 0
            # What was backed for rejected tokens is written again.
            lengths[there] = np.maximum(lengths, self.cache.lengths)[there]
            try:
                self.cache.prepare_step(lengths)
                self.cache.map_ahead()
            except KVCacheOutOfMemory:
                longest = max(self._row_of, key=lambda row: int(lengths[self._row_of[row]]))
                logger.info("the draft model's cache is full; a sequence of %d tokens goes on without", lengths.max())
                self.leave(longest)
            except (DriverError, MemoryQuarantined) as error:
                logger.warning("a step goes without drafts, for backing them failed: %s", error)
                broken = self.cache.broken_slots()
                for row in [row for row, slot in self._row_of.items() if slot in broken]:
                    self.leave(row)
                return False
            else:
                return bool(there.any())

    def check(self, ends: dict[int, int]) -> None:
        """Raise UnmappedAccess where sequences, by their row of `history`, would be longer than their memory."""
        there = {self._row_of[row]: end for row, end in ends.items() if row in self._row_of}
        slots, lengths = np.array([*there], np.int64), np.array([*there.values()], np.int64)
        self._guard.check(lengths, slots, np.zeros(len(there), np.int64))

    def close(self) -> None:
        """Drop graphs and the cache. Idempotent."""
        self.prefill.close()
        self.cache.close()
