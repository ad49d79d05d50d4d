"""Two captured decode steps over the same sequences: one above memory that is remapped all the time, one above memory
that never is. Whatever happens beneath the first, both must give the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from trtllm_vattn.attention.base import Attention
from trtllm_vattn.attention.select import make_attention
from trtllm_vattn.cache.base import FlatKV, KVCache
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import OutOfPages
from trtllm_vattn.memory.reclaim import reclaim
from trtllm_vattn.runtime.binding import DecodeStep, bind, forward
from trtllm_vattn.runtime.decode import DecodeBatch, Launch
from trtllm_vattn.runtime.prefill import Prefill, PromptChunk

LANES, SLOTS, MAX_SEQ_LEN = 6, 10, 512
STEPS = 4
"""Decode steps of the launches that have several."""


class DigestedBatch(DecodeBatch):
    """Decode steps that leave a number for the bits of each lane's logits behind.

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

    def _forward(self, bucket: int) -> torch.Tensor:
        logits = super()._forward(bucket)
        words = logits.view(torch.int32 if logits.itemsize == 4 else torch.int16)
        digests = (words.to(torch.int64) * self._odd).sum(dim=-1)
        lengths, taken = self._inputs[3, :bucket], self._device[-2:-1]
        self.digests.index_copy_(0, taken.remainder(self.steps), torch.where(lengths > 0, digests, 0)[None])
        return logits


class Side:
    """One cache and one captured step of `LANES` lanes over it, by the torch backend, whose sums have a fixed order."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        scale = bind(model, cache.shape)
        self.model, self.cache = model, cache
        heads = model.config.get_text_config().num_attention_heads
        self.attention = make_attention("torch", cache, heads, scale)
        self.decode = DigestedBatch(model, self.attention, LANES, STEPS)
        self.prefill = Prefill(model, self.attention, 64, pool=self.decode.runner.pool)
        self.captures = len(self.decode.capture().seconds)
        self.prefill.capture()

    def admit(self, sequence: int, prompt: list[int], limit: int) -> None:
        slot = self.cache.admit(sequence, len(prompt))
        token = int(self.prefill.run([PromptChunk(slot, prompt, 0)]).argmax())
        self.decode.set_lane(slot, token, len(prompt) + 1, limit)

    def resume(self, sequence: int, token: int, limit: int) -> None:
        """The sequence goes on with a token behind what the cache holds of it."""
        slot = self.cache.slot_of(sequence)
        self.decode.set_lane(slot, token, int(self.cache.lengths[slot]) + 1, limit)

    def fork(self, sequence: int, new: int, tokens: int) -> None:
        if isinstance(self.cache, KVCacheManager):
            self.cache.fork(sequence, new, tokens)
            return
        source, target = self.cache.slot_of(sequence), self.cache.admit(new, tokens)
        for layer in range(self.cache.shape.num_layers):
            kv = self.cache.layer(layer)
            assert isinstance(kv, FlatKV)
            for tensor in (kv.k, kv.v):
                tensor[target, :tokens] = tensor[source, :tokens]

    def release(self, sequence: int) -> None:
        self.decode.clear_lane(self.cache.slot_of(sequence))
        self.cache.release(sequence)

    def launch(self, steps: int) -> Launch:
        self.cache.prepare_step(self.decode.lengths_after(steps))
        return self.decode.launch(steps)

    def eager_logits(self) -> torch.Tensor:
        """What the next step would give without a graph; it stores the K and V that the captured one will."""
        self.cache.prepare_step(self.decode.lengths_after(1))
        lanes = len(self.decode.lane_of)
        inputs = (self.decode.tokens, self.decode.positions, self.decode.slots, self.decode.lengths)
        device = self.cache.device
        tokens, positions, slots, lengths = (torch.from_numpy(array[:lanes].copy()).to(device) for array in inputs)
        step = DecodeStep(self.attention, slots, positions, lengths.to(torch.int32), anywhere=True)
        return forward(self.model, tokens, positions, step)

    def close(self) -> None:
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


class Twins:
    """A seeded life of both sides: sequences come, go, fork and fall back; beneath the subject memory is remapped.

    Parameters
    ----------
    subject, twin : Side
        The one that is remapped, where its cache can be, and the one to compare with.
    tolerance : float
        By how much eager logits may differ, in standard deviations of the logits.
    """

    def __init__(self, subject: Side, twin: Side, seed: int, tolerance: float) -> None:
        self.subject, self.twin, self.tolerance = subject, twin, tolerance
        self.random = random.Random(seed)
        self.vocab = subject.model.config.get_text_config().vocab_size
        self.limits: dict[int, int] = {}
        self._ids = 0
        self._wrong = torch.zeros(1, dtype=torch.int64, device=subject.cache.device)
        self.tally = Tally()

    # -- the life of sequences, the same on both sides -------------------------------------------------------------

    def _both(self, operation: Callable[[Side], None]) -> None:
        operation(self.subject)
        operation(self.twin)

    def _count(self, name: str) -> None:
        self.tally.operations[name] = self.tally.operations.get(name, 0) + 1

    def _new(self) -> int:
        self._ids += 1
        return self._ids

    def _token(self) -> int:
        return self.random.randrange(self.vocab)

    def admit(self, prompt_len: int | None = None) -> None:
        sequence = self._new()
        prompt = [self._token() for _ in range(prompt_len or self.random.randint(1, 64))]
        self.limits[sequence] = self.random.randint(len(prompt) + 8, MAX_SEQ_LEN)
        self._both(lambda side: side.admit(sequence, prompt, self.limits[sequence]))
        self._count("admit")

    def release(self) -> None:
        sequence = self.random.choice(list(self.limits))
        del self.limits[sequence]
        self._both(lambda side: side.release(sequence))
        self._count("release")

    def fork(self) -> None:
        sequence, new = self.random.choice(list(self.limits)), self._new()
        length = int(self.subject.cache.lengths[self.subject.cache.slot_of(sequence)])
        tokens, token = self.random.randint(max(1, length // 2), length), self._token()
        self.limits[new] = self.random.randint(tokens + 1, MAX_SEQ_LEN)

        def both(side: Side) -> None:
            side.fork(sequence, new, tokens)
            side.resume(new, token, self.limits[new])

        self._both(both)
        self._count("share")

    def truncate(self) -> None:
        sequence = self.random.choice(list(self.limits))
        length = int(self.subject.cache.lengths[self.subject.cache.slot_of(sequence)])
        shorter, token = self.random.randint(max(1, length // 3), length), self._token()

        def both(side: Side) -> None:
            side.cache.truncate(sequence, shorter)
            side.resume(sequence, token, self.limits[sequence])

        self._both(both)
        self._count("truncate")

    # -- what happens to memory beneath the subject ----------------------------------------------------------------

    def move(self) -> None:
        cache = self.subject.cache
        assert isinstance(cache, KVCacheManager)
        free = cache.arena.free_slots()
        if not free:
            return
        sequence, target = self.random.choice(list(self.limits)), self.random.choice(free)
        source = cache.slot_of(sequence)
        cache.move(sequence, target)
        decode = self.subject.decode
        lane = decode.lane_of[target] = decode.lane_of.pop(source)
        decode.slots[lane] = target
        self._count("move")

    def replace(self) -> None:
        assert isinstance(self.subject.cache, KVCacheManager)
        self.subject.cache.replace(self.random.choice(list(self.limits)))
        self._count("replace")

    def take_away(self) -> None:
        assert isinstance(self.subject.cache, KVCacheManager)
        reclaim(self.subject.cache.arena, self.random.randint(1, 4) * self.subject.cache.layout.granule)
        self._count("take away")

    def resize(self) -> None:
        cache = self.subject.cache
        assert isinstance(cache, KVCacheManager)
        pages = -(-MAX_SEQ_LEN * cache.shape.token_bytes // cache.layout.granule) + cache.layout.num_ranges
        least, most = LANES * pages + 2 * cache.layout.num_ranges, SLOTS * pages
        try:
            cache.set_budget(self.random.randint(least, 2 * most) * cache.layout.granule)
        except OutOfPages:
            self._count("budget too low")
        else:
            self._count("budget")

    # -- one launch ------------------------------------------------------------------------------------------------

    def step(self, check_eager: bool) -> None:
        """One launch on both sides, with changes to memory before it and while it runs, and its bits compared."""
        self._live()
        remapped = isinstance(self.subject.cache, KVCacheManager)
        if remapped:
            self._beneath(("move", 0.08), ("replace", 0.02), ("resize", 0.02))
        steps = STEPS if self.random.random() < 0.4 and not check_eager else 1
        eager = self.subject.eager_logits() if check_eager else None
        launches = [side.launch(steps) for side in (self.subject, self.twin)]
        lanes = len(self.limits)
        mine, others = (side.decode.digests[:steps] for side in (self.subject, self.twin))
        self._wrong += (mine != others).sum()
        if eager is not None:
            self._compare(eager, launches[0].logits[:lanes])
        if remapped:
            # The device is at work on both now.
            self.subject.cache.map_ahead()
            self._beneath(("take_away", 0.1), ("move", 0.08), ("resize", 0.02))
        rows, theirs = (launch.read() for launch in launches)
        if rows != theirs:
            self.tally.mismatches += 1
        for side, launch, taken in zip((self.subject, self.twin), launches, (rows, theirs), strict=True):
            launch.lane_of.update({slot: lane for slot, lane in side.decode.lane_of.items() if lane < lanes})
            side.decode.commit(launch, taken)
        self.tally.replays += steps
        self.tally.tokens += steps * lanes
        if self.tally.replays % 1000 < steps:
            self.subject.cache.check_integrity()
            self.settle()

    def settle(self) -> None:
        """Fetch the count of lanes and steps whose logits differed."""
        self.tally.mismatches += int(self._wrong.item())
        self._wrong.zero_()

    def _compare(self, eager: torch.Tensor, captured: torch.Tensor) -> None:
        difference = float((eager.float() - captured.float()).abs().max() / captured.float().std())
        self.tally.eager_checks += 1
        self.tally.worst_eager_difference = max(self.tally.worst_eager_difference, difference)
        self.tally.eager_mismatches += difference > self.tolerance

    def _live(self) -> None:
        """End what has reached its limit, and let others come, fork and fall back."""
        cache = self.subject.cache
        for sequence, limit in list(self.limits.items()):
            if cache.lengths[cache.slot_of(sequence)] + STEPS >= limit:
                del self.limits[sequence]
                self._both(lambda side, sequence=sequence: side.release(sequence))  # type: ignore[misc]
                self._count("end")
        while len(self.limits) < 2 or (len(self.limits) < LANES and self.random.random() < 0.3):
            if self.limits and self.random.random() < 0.4:
                self.fork()
            else:
                self.admit()
        if self.random.random() < 0.01:
            self.truncate()
        if self.random.random() < 0.005 and len(self.limits) > 1:
            self.release()

    def _beneath(self, *chances: tuple[str, float]) -> None:
        for name, chance in chances:
            if self.random.random() < chance:
                getattr(self, name)()
