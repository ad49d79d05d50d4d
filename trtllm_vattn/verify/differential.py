"""Two replicas decode the same sequences by the same captured step: one over a cache whose memory is remapped all the
time, one over a cache whose memory never changes. Whatever happens beneath the first, both must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.errors import KVCacheOutOfMemory
from trtllm_vattn.runtime.binding import DecodeStep, bind, forward, options_for
from trtllm_vattn.runtime.decode import DecodeBatch, Launch
from trtllm_vattn.runtime.prefill import Prefill, PromptChunk
from trtllm_vattn.verify.workload import Workload

LANES, SLOTS, MAX_SEQ_LEN = 6, 10, 512
STEPS = 4
"""Decode steps of the launches that have several."""


class DigestedBatch(DecodeBatch):
    """Decode steps that also write a digest of the bits of each lane's logits.

    Attributes
    ----------
    digests : Tensor
        int64 ``[steps, lanes]`` of the last launch, on the device; 0 for an idle lane.
    """

    def __init__(self, model: PreTrainedModel, attention: Attention, lanes: int, steps: int) -> None:
        super().__init__(model, attention, [lanes], steps=steps, packed=True)
        device = attention.cache.device
        self.digests = torch.zeros(steps, lanes, dtype=torch.int64, device=device)
        # Odd, so that no word can change without its product, modulo 2**64, changing too.
        vocab = model.config.get_text_config().vocab_size
        odd = torch.randint(-(1 << 62), 1 << 62, (vocab,), generator=torch.Generator().manual_seed(0)) * 2 + 1
        self._odd = odd.to(device)
        self.runner.static += [self.digests, self._odd]

    def launch(self, steps: int = 1, drafts: int = 0) -> Launch:
        self._miscounted = True  # the first step's digests are in the first row
        return super().launch(steps, drafts)

    def _forward(self, bucket: int) -> torch.Tensor:
        logits = super()._forward(bucket)
        words = logits.view(torch.int32 if logits.itemsize == 4 else torch.int16)
        digests = (words.to(torch.int64) * self._odd).sum(dim=-1)
        lengths, taken = self.inputs[3, :bucket], self._device[-2:-1]
        self.digests.index_copy_(0, taken.remainder(self.steps), torch.where(lengths > 0, digests, 0)[None])
        return logits


class Replica:
    """One cache and one captured step of `LANES` lanes over it, by the torch backend, whose sums have a fixed order."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        needs = bind(model, cache.shape)
        self.model, self.cache = model, cache
        heads = model.config.get_text_config().num_attention_heads
        options = options_for(needs, cache.shape, cache.device)
        self.attention = make_attention("torch", cache, heads, needs.scale, options=options)
        self.decode = DigestedBatch(model, self.attention, LANES, STEPS)
        self.prefill = Prefill(model, self.attention, 64, pool=self.decode.runner.pool)
        self.captures = len(self.decode.capture().seconds)
        self.prefill.capture()

    def admit(self, sequence: int, prompt: list[int], limit: int) -> None:
        """A prompt goes in; its sequence decodes up to `limit` tokens."""
        slot = self.cache.admit(sequence, len(prompt))
        token = int(self.prefill.run([PromptChunk(slot, prompt, 0)]).argmax())
        self.decode.set_lane(slot, token, len(prompt) + 1, limit)

    def resume(self, sequence: int, token: int, limit: int) -> None:
        """The sequence goes on with a new token after those that the cache holds."""
        slot = self.cache.slot_of(sequence)
        self.decode.set_lane(slot, token, int(self.cache.lengths[slot]) + 1, limit)

    def fork(self, sequence: int, new: int, tokens: int) -> None:
        """`new` begins with the first tokens of a sequence: shared where the cache can, else copied."""
        if self.cache.remaps:
            self.cache.fork(sequence, new, tokens)
            return
        source, target = self.cache.slot_of(sequence), self.cache.admit(new, tokens)
        for layer in range(self.cache.shape.num_layers):
            kv = self.cache.layer(layer)
            assert isinstance(kv, FlatKV)
            for tensor in (kv.k, kv.v):
                tensor[target, :tokens] = tensor[source, :tokens]

    def release(self, sequence: int) -> None:
        """The sequence ends."""
        self.decode.clear_lane(self.cache.slot_of(sequence))
        self.cache.release(sequence)

    def launch(self, steps: int) -> Launch:
        """So many decode steps of all lanes, by one replay each."""
        self.cache.prepare_step(self.decode.lengths_after(steps))
        return self.decode.launch(steps)

    def eager_logits(self) -> torch.Tensor:
        """Logits of the next step without a graph; it writes the same K and V as the captured step."""
        self.cache.prepare_step(self.decode.lengths_after(1))
        lanes = len(self.decode.lane_of)
        inputs = (self.decode.tokens, self.decode.positions, self.decode.slots, self.decode.lengths)
        device = self.cache.device
        tokens, positions, slots, lengths = (torch.from_numpy(array[:lanes].copy()).to(device) for array in inputs)
        step = DecodeStep(self.attention, slots, positions, lengths.to(torch.int32), anywhere=True)
        return forward(self.model, tokens, positions, step)

    def close(self) -> None:
        """Give graphs and cache back."""
        self.decode.close()
        self.prefill.close()
        self.cache.close()


@dataclass
class Tally:
    """What a soak has done so far."""

    replays: int = 0
    tokens: int = 0
    mismatches: int = 0
    eager_checks: int = 0
    eager_mismatches: int = 0
    worst_eager_difference: float = 0.0
    seconds: float = 0.0
    operations: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for a report."""
        return {**vars(self), "operations": dict(self.operations)}


class Differential(Workload):
    """A seeded workload on both replicas: sequences begin, end, fork and are truncated; the subject's memory is
    remapped where its cache supports that.

    Parameters
    ----------
    subject, reference : Replica
        The one whose memory changes, and the one to compare with.
    tolerance : float
        By how much eager logits may differ, in standard deviations of the logits.
    """

    def __init__(self, subject: Replica, reference: Replica, seed: int, tolerance: float) -> None:
        super().__init__(seed)
        self.subject, self.reference, self.tolerance = subject, reference, tolerance
        self.vocab = subject.model.config.get_text_config().vocab_size
        self.limits: dict[int, int] = {}
        self._wrong = torch.zeros(1, dtype=torch.int64, device=subject.cache.device)
        self.tally = Tally(operations=self.operations)

    def close(self) -> None:
        """Close both replicas."""
        self.subject.close()
        self.reference.close()

    # -- sequences, the same in both replicas ----------------------------------------------------------------------

    def _both(self, operation: Callable[[Replica], None]) -> None:
        operation(self.subject)
        operation(self.reference)

    def _pick(self) -> tuple[int, int]:
        """A running sequence and its length."""
        sequence = self.random.choice(list(self.limits))
        return sequence, int(self.subject.cache.lengths[self.subject.cache.slot_of(sequence)])

    def _token(self) -> int:
        return self.random.randrange(self.vocab)

    def admit(self, prompt_len: int | None = None) -> None:
        """A prompt of this length, or of any up to a chunk, begins."""
        sequence = self.new()
        prompt = [self._token() for _ in range(prompt_len or self.random.randint(1, 64))]
        self.limits[sequence] = self.random.randint(len(prompt) + 8, MAX_SEQ_LEN)
        self._both(lambda replica: replica.admit(sequence, prompt, self.limits[sequence]))
        self.operations["admit"] += 1

    def release(self, sequence: int | None = None, name: str = "release") -> None:
        """This sequence, or any, ends."""
        ended = self._pick()[0] if sequence is None else sequence
        del self.limits[ended]
        self._both(lambda replica: replica.release(ended))
        self.operations[name] += 1

    def fork(self) -> None:
        """A sequence begins with at least half of another's tokens."""
        (sequence, length), new = self._pick(), self.new()
        tokens, token = self.random.randint(max(1, length // 2), length), self._token()
        self.limits[new] = self.random.randint(tokens + 1, MAX_SEQ_LEN)

        def both(replica: Replica) -> None:
            replica.fork(sequence, new, tokens)
            replica.resume(new, token, self.limits[new])

        self._both(both)
        self.operations["share"] += 1

    def truncate(self) -> None:
        """A sequence is truncated to at least a third of its length."""
        sequence, length = self._pick()
        shorter, token = self.random.randint(max(1, length // 3), length), self._token()

        def both(replica: Replica) -> None:
            replica.cache.truncate(sequence, shorter)
            replica.resume(sequence, token, self.limits[sequence])

        self._both(both)
        self.operations["truncate"] += 1

    # -- memory beneath the subject --------------------------------------------------------------------------------

    def move(self) -> None:
        """A sequence moves to another slot, and its lane with it."""
        cache = self.subject.cache
        free = cache.free_slots()
        if not free:
            return
        (sequence, _), target = self._pick(), self.random.choice(free)
        source = cache.slot_of(sequence)
        cache.move(sequence, target)
        decode = self.subject.decode
        lane = decode.lane_of[target] = decode.lane_of.pop(source)
        decode.slots[lane] = target
        decode.resend()
        self.operations["move"] += 1

    def replace(self) -> None:
        """Other memory with the same bytes is put beneath a sequence."""
        self.subject.cache.replace(self._pick()[0])
        self.operations["replace"] += 1

    def take_away(self) -> None:
        """Memory that no sequence uses is unmapped."""
        cache = self.subject.cache
        cache.release_free_memory(self.random.randint(1, 4) * cache.bytes_of(1))
        self.operations["take away"] += 1

    def resize(self) -> None:
        """Another budget: enough for all lanes at their longest, but sometimes less than slots hold now."""
        cache = self.subject.cache
        page = cache.bytes_of(1)
        slot = cache.bytes_of(MAX_SEQ_LEN) // page + 1
        try:
            cache.set_budget(self.random.randint(LANES * slot + 2, 2 * SLOTS * slot) * page)
        except KVCacheOutOfMemory:
            self.operations["budget too low"] += 1
        else:
            self.operations["budget"] += 1

    # -- one launch ------------------------------------------------------------------------------------------------

    def step(self, check_eager: bool) -> None:
        """One launch on both replicas, with changes to memory before it and while it runs, and its bits compared."""
        self._change_sequences()
        if self.subject.cache.remaps:
            self.run_some({"move": 0.08, "replace": 0.02, "resize": 0.02})
        steps = STEPS if self.random.random() < 0.4 and not check_eager else 1
        eager = self.subject.eager_logits() if check_eager else None
        launches = [replica.launch(steps) for replica in (self.subject, self.reference)]
        lanes = len(self.limits)
        mine, others = (replica.decode.digests[:steps] for replica in (self.subject, self.reference))
        self._wrong += (mine != others).sum()
        if eager is not None:
            self._compare(eager, launches[0].logits[:lanes])
        if self.subject.cache.remaps:
            # The device is at work on both now.
            self.subject.cache.map_ahead()
            self.run_some({"take_away": 0.1, "move": 0.08, "resize": 0.02})
        rows, theirs = (launch.read() for launch in launches)
        if rows != theirs:
            self.tally.mismatches += 1
        for replica, launch, taken in zip((self.subject, self.reference), launches, (rows, theirs), strict=True):
            launch.lane_of.update({slot: lane for slot, lane in replica.decode.lane_of.items() if lane < lanes})
            replica.decode.commit(launch, taken)
        self.tally.replays += steps
        self.tally.tokens += steps * lanes
        if self.tally.replays % 1000 < steps:
            self.subject.cache.check_integrity()
            self.count_mismatches()

    def count_mismatches(self) -> None:
        """Fetch the number of lanes and steps whose logits differed from the device."""
        self.tally.mismatches += int(self._wrong.item())
        self._wrong.zero_()

    def _compare(self, eager: torch.Tensor, captured: torch.Tensor) -> None:
        difference = float((eager.float() - captured.float()).abs().max() / captured.float().std())
        self.tally.eager_checks += 1
        self.tally.worst_eager_difference = max(self.tally.worst_eager_difference, difference)
        self.tally.eager_mismatches += difference > self.tolerance

    def _change_sequences(self) -> None:
        """End what has reached its limit, and let others begin, fork and be truncated."""
        cache = self.subject.cache
        for sequence, limit in list(self.limits.items()):
            if cache.lengths[cache.slot_of(sequence)] + STEPS >= limit:
                self.release(sequence, "end")
        while len(self.limits) < 2 or (len(self.limits) < LANES and self.random.random() < 0.3):
            if self.limits and self.random.random() < 0.4:
                self.fork()
            else:
                self.admit()
        if self.random.random() < 0.01:
            self.truncate()
        if self.random.random() < 0.005 and len(self.limits) > 1:
            self.release()
