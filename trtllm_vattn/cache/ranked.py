"""One cache on several ranks: heads are divided, addresses are each rank's own, and a call happens on all or on none.

Rank 0 has a `LeadingCache`, which decides; each other rank has a `FollowingCache`, which makes the calls that it is
told of. A sequence has the same slot on all ranks. Whatever may fail (memory for a prompt, or for a step) is answered
by all ranks before it counts, and is undone on those where it succeeded if it failed on one. What cannot fail is told
and not answered: a step whose lengths all ranks have reported to be backed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from trtllm_vattn.cache.base import SequenceId, Tokens
from trtllm_vattn.cache.manager import KVCacheManager
from trtllm_vattn.errors import ConfigError, DriverError, MemoryQuarantined, VattnError


class Report(NamedTuple):
    """What a rank says of its cache: int64 ``[num_slots]``, how far each slot is backed, and slots in which an unmap
    failed."""

    frontiers: np.ndarray
    broken: Sequence[int]


class Peers(Protocol):
    """The other ranks, as a `LeadingCache` reaches them (runtime/parallel/channel.py).

    Each method raises RankLost where one of them has ended.
    """

    @property
    def reports(self) -> Sequence[Report]:
        """The newest of each rank; none of one that has not reported yet."""

    def note(self, call: str, *arguments: Any) -> None:
        """Tell all of a call, at the latest with the next launch."""

    def ask(self, call: str, *arguments: Any, ranks: Sequence[int] | None = None) -> None:
        """Tell all, or some, of a call that they answer."""

    def answers(self) -> dict[int, VattnError | None]:
        """What became of the call that was asked, by rank."""

    def broke(self, rank: int, error: VattnError) -> NoReturn:
        """A rank could not undo a call: nothing is on all ranks alike any more."""


class _Ranked(KVCacheManager):
    def _build(self, budget: int | None) -> None:
        super()._build(budget)
        self._to_release: list[SequenceId] = []

    def release_soon(self, sequence: SequenceId) -> None:
        """Release a sequence; where the driver refuses, later."""
        self._to_release.append(sequence)
        self.release_left()

    def release_left(self) -> None:
        """Release what could not be released before."""
        left = self._to_release
        while left:
            try:
                KVCacheManager.release(self, left[0])
            except DriverError:
                return
            left.pop(0)

    def _release_left_of(self, sequence: SequenceId) -> None:
        """Before a sequence begins: release what was left of one of the same name. Raises DriverError where the driver
        refuses still."""
        self.release_left()
        if sequence in self._to_release:
            KVCacheManager.release(self, sequence)
            self._to_release.remove(sequence)

    def reset(self) -> None:
        super().reset()
        self._to_release.clear()

    def restore_lengths(self, lengths: np.ndarray) -> None:
        """Undo `prepare_step`: lengths as they were before."""
        for slot in np.flatnonzero(self.lengths > lengths).tolist():
            sequence = self.sequence_at(slot)
            assert sequence is not None
            KVCacheManager.truncate(self, sequence, int(lengths[slot]))


class FollowingCache(_Ranked):
    """The cache of a rank that is told what to do."""

    def admit_at(self, sequence: SequenceId, slot: int, prompt_len: int) -> None:
        """`admit` in the slot that rank 0 has chosen. Raises MemoryQuarantined where an unmap failed in it."""
        self._release_left_of(sequence)
        self._check_new(sequence, prompt_len)
        self._run(self._do_admit_at, sequence, slot, prompt_len)

    def _do_admit_at(self, sequence: SequenceId, slot: int, prompt_len: int) -> None:
        arena = self.arena
        with self._lock:
            arena.complete_pending_unmaps()
            if not arena.slots[slot].is_free:
                arena.complete_pending_unmaps(wait=True)
            if not arena.slots[slot].is_free:
                raise MemoryQuarantined(f"slot {slot} cannot be used, for a driver call failed in it")
            self._make_room(self.layout.bytes_for(prompt_len) * self.layout.num_ranges, self.ahead.tokens)
            arena.allocate_slot(prompt_len, slot + 1, self.ahead.tokens, at=slot)
            self._place_sequence(sequence, slot, prompt_len)
        self._wake_for_memory()

    def report(self) -> Report:
        """How far slots are backed now; only calls of rank 0 that are answered make it less."""
        return Report(self.frontiers.copy(), self.broken_slots())


def _refused(what: str) -> Callable[..., Any]:
    def method(self: LeadingCache, *arguments: Any, **named: Any) -> NoReturn:
        self._cannot(what)

    return method


class LeadingCache(_Ranked):
    """The cache of rank 0. Until it has `peers` it is a cache like any other.

    What would have to be answered by all and is not (forks, retained and suspended sequences, sleep, moves) is refused
    by ConfigError.
    """

    peers: Peers | None = None
    _told_prompts: Sequence[int] = ()

    def _cannot(self, what: str) -> NoReturn:
        raise ConfigError(f"a cache that several ranks have cannot {what}; use an engine of one rank")

    move = _refused("move a sequence")
    fork = _refused("fork a sequence")
    replace = _refused("replace a sequence's memory")
    retain = _refused("retain a sequence")
    adopt = _refused("retain a sequence")
    set_length = _refused("give ranges lengths of their own")
    suspend = _refused("suspend a sequence")
    resume = _refused("suspend a sequence")
    sleep = _refused("give its memory back")
    extend = _refused("extend a sequence; prepare a step")
    truncate = _refused("truncate a sequence")
    shrink_towards = _refused("shrink as far as it can; set a budget")

    def admit(
        self, sequence: SequenceId, prompt_len: int, *, prefix: Tokens | None = None, alias: Tokens | None = None
    ) -> int:
        if self.peers is None:
            return super().admit(sequence, prompt_len)
        if prefix is not None or alias is not None:
            self._cannot("begin a sequence with another slot's tokens")
        return self._uninterrupted(self._admit_everywhere, self.peers, sequence, prompt_len)

    def _admit_everywhere(self, peers: Peers, sequence: SequenceId, prompt_len: int) -> int:
        self._release_left_of(sequence)
        slot = super().admit(sequence, prompt_len)
        self._everywhere(
            peers,
            ("admit_at", sequence, slot, prompt_len),
            ("release_soon", sequence),
            lambda: None,
            partial(self.release_soon, sequence),
        )
        return slot

    def _everywhere(
        self,
        peers: Peers,
        call: tuple[Any, ...],
        undo: tuple[Any, ...],
        own: Callable[[], object],
        undo_own: Callable[[], object],
    ) -> None:
        """A call here and on all other ranks; where one refuses, it is undone on the others, and raised."""
        peers.ask(*call)
        error: Exception | None = None
        try:
            own()
        except Exception as refused:
            error = refused
        answers = peers.answers()
        self._note_broken(peers)
        failed = [answer for answer in answers.values() if answer is not None]
        if error is None and not failed:
            return
        done = [rank for rank, answer in answers.items() if answer is None]
        if done:
            peers.ask(*undo, ranks=done)
            for rank, answer in peers.answers().items():
                if answer is not None:
                    peers.broke(rank, answer)
        if error is None:
            undo_own()
            error = failed[0]
        raise error

    def _note_broken(self, peers: Peers) -> None:
        """A slot that is of no use on one rank is of no use."""
        for slot in {slot for report in peers.reports for slot in report.broken}:
            if not self.arena.slots[slot].broken:
                with self._lock:
                    self.arena.slots[slot].mark_broken()
                    self.arena.publish(slot)

    def release(self, sequence: SequenceId) -> None:
        super().release(sequence)
        if self.peers is not None:
            self.peers.note("release_soon", sequence)

    def prepare_step(self, lengths: np.ndarray) -> None:
        peers = self.peers
        if peers is None:
            super().prepare_step(lengths)
            return
        if all((lengths <= report.frontiers).all() for report in peers.reports):
            super().prepare_step(lengths)
            peers.note("prepare_step", lengths.copy())
        else:
            self._uninterrupted(self._prepare_everywhere, peers, lengths.copy())

    def _prepare_everywhere(self, peers: Peers, lengths: np.ndarray) -> None:
        self._check_open()
        self._check_step(lengths)
        before = self.lengths.copy()
        self._everywhere(
            peers,
            ("prepare_step", lengths),
            ("restore_lengths", before),
            partial(super().prepare_step, lengths),
            partial(self.restore_lengths, before),
        )

    def set_budget(self, budget: int | str) -> None:
        if self.peers is None:
            super().set_budget(budget)
        else:
            self._uninterrupted(self._set_budget_everywhere, self.peers, budget)

    def _set_budget_everywhere(self, peers: Peers, budget: int | str) -> None:
        before = self.budget_bytes
        set_budget = super().set_budget
        self._everywhere(
            peers,
            ("set_budget", budget),
            ("set_budget", before),
            partial(set_budget, budget),
            partial(set_budget, before),
        )

    def reset(self) -> None:
        if self.peers is None:
            super().reset()
        else:
            self._uninterrupted(self._reset_everywhere, self.peers)

    def _reset_everywhere(self, peers: Peers) -> None:
        peers.ask("reset")
        super().reset()
        for rank, answer in peers.answers().items():
            if answer is not None:
                peers.broke(rank, answer)

    def preallocate_for(self, prompts: Sequence[int]) -> None:
        super().preallocate_for(prompts)
        if self.peers is not None and list(prompts) != self._told_prompts:
            self._told_prompts = list(prompts)
            self.peers.note("preallocate_for", self._told_prompts)

    def release_free_memory(self, size: int | None = None) -> int:
        if self.peers is not None:
            self.peers.note("release_free_memory", size)
        return super().release_free_memory(size)
