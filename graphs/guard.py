"""The guard: before a replay, every address it can touch lies under a frontier.

It trusts the cache's frontiers, which are lowered before an unmapping is even queued, and the backend's word for how
far past a length its kernels may load.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError, UnmappedAccess


class Guard:
    """Checks the lanes of a step against what is mapped.

    Parameters
    ----------
    over_read : int
        Tokens past a length that the attention backend may load.
    """

    def __init__(self, cache: KVCache, over_read: int = 0) -> None:
        self.cache, self.over_read = cache, over_read
        # The dummy slot's is 0: an idle lane may have no length.
        self._longest = np.zeros(cache.dummy_slot + 1, np.int64)
        # Lanes stay in their slots for many steps: those last looked at, and how many of them are no idle ones.
        self._slots, self._writing = b"", 0

    def longest(self) -> np.ndarray:
        """How long each slot's sequence may be, int64 ``[num_slots]``, so that what is loaded past it is mapped too."""
        frontiers = self.cache.frontiers
        if not self.over_read:
            return frontiers
        # What is loaded past a length ends with the slot.
        whole = frontiers >= self.cache.shape.max_seq_len
        return np.where(whole, frontiers, np.maximum(frontiers - self.over_read, 0))

    def check(self, lengths: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Pass, or raise UnmappedAccess naming the sequence; ConfigError where the lanes contradict themselves.

        Parameters
        ----------
        lengths : int ``[lanes]``
            Tokens of each lane once its last step has written its own; 0 for an idle lane.
        slots : int ``[lanes]``
            Where each lane reads and writes, every one a slot of its own; the dummy slot for an idle lane.
        positions : int ``[lanes]``
            Where each lane writes first; 0 for an idle lane.
        """
        lanes, dummy = len(lengths), self.cache.dummy_slot
        if not (len(slots) == len(positions) == lanes <= dummy):
            raise ConfigError(
                f"{lanes} lengths, {len(slots)} slots and {len(positions)} positions; give one of each a lane, and no "
                f"more lanes than the {dummy} slots"
            )
        if not lanes:
            return
        lengths, slots = np.asarray(lengths, np.int64), np.asarray(slots, np.int64)
        longest = self._longest
        longest[:-1] = self.longest()
        if (edges := self.cache.lower_edges) is not None:
            self._check_edges(edges, slots)
        same = slots.tobytes()
        try:
            # Too large an index has no element, and a negative one no count.
            beyond = longest[slots] - lengths
            lanes_of = None if same == self._slots else np.bincount(slots, minlength=dummy + 1)
        except (IndexError, ValueError):
            self._refuse(lengths, slots, positions)
        if lanes_of is not None:
            used = int(np.count_nonzero(lanes_of[:dummy]))
            # Each slot that is used has one lane if all lanes but the idle ones are as many.
            if used != lanes - lanes_of[dummy]:
                self._refuse(lengths, slots, positions)
            self._slots, self._writing = same, used
        left = lengths - positions
        # One test for all lanes: as soon as one of the three is negative, so are they or-ed together. Who writes has a
        # length, for which the dummy slot has no room.
        beyond |= left
        beyond |= positions
        if beyond[beyond.argmin()] < 0 or np.count_nonzero(left) != self._writing:
            self._refuse(lengths, slots, positions)

    def check_chunk(self, slot: int, length: int) -> None:
        """The same for a chunk of a prompt in one slot, which makes its sequence `length` tokens long."""
        self.check(np.array([length]), np.array([slot]), np.array([length - 1]))

    # -- saying what is wrong --------------------------------------------------------------------------------------

    def _refuse(self, lengths: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> NoReturn:
        dummy = self.cache.dummy_slot
        active = (slots >= 0) & (slots < dummy) & (positions >= 0) & (positions < lengths)
        idle = (slots == dummy) & (positions == 0) & (lengths == 0)
        if not (active | idle).all():
            lane = int((active | idle).argmin())
            raise ConfigError(
                f"lane {lane} has length {lengths[lane]}, slot {slots[lane]} and writes from position "
                f"{positions[lane]}: a lane writes below its length in one of the slots 0 to {dummy - 1}; an idle one "
                f"has length 0, slot {dummy}, position 0"
            )
        lanes = np.flatnonzero(lengths > self._longest[slots]).tolist()
        if not lanes:
            self._refuse_shared(slots)
        lane = lanes[0]
        slot, length = int(slots[lane]), int(lengths[lane])
        reach = max(length, min(length + self.over_read, self.cache.shape.max_seq_len))
        others = f" ({len(lanes)} slots in all)" if len(lanes) > 1 else ""
        raise UnmappedAccess(
            f"sequence {self.cache.sequence_at(slot)!r} in slot {slot}{others} would be {length} tokens long and "
            f"touch {reach}, but {self.cache.frontiers[slot]} are mapped in layers 0 to "
            f"{self.cache.shape.num_layers - 1}; call prepare_step with these lengths before the step"
        )

    def _check_edges(self, edges: np.ndarray, slots: np.ndarray) -> None:
        """Raise UnmappedAccess where a lane's sequence has no memory at its beginning, which every kernel reads."""
        for slot in slots[(slots >= 0) & (slots < self.cache.dummy_slot)].tolist():
            if edges[slot]:
                raise UnmappedAccess(
                    f"sequence {self.cache.sequence_at(slot)!r} in slot {slot} is read from position 0 on, but only "
                    f"positions from {edges[slot]} on are mapped"
                )

    def _refuse_shared(self, slots: np.ndarray) -> NoReturn:
        slot = int(np.bincount(slots)[: self.cache.dummy_slot].argmax())
        lanes = np.flatnonzero(slots == slot).tolist()
        raise ConfigError(
            f"lanes {lanes} all write to slot {slot}, of sequence {self.cache.sequence_at(slot)!r}; give each sequence "
            "one lane"
        )
