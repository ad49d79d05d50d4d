"""The guard: before a replay, check that every address which the graph can touch is backed by memory.

The guard trusts two things: the cache's frontiers, which the cache lowers before it queues an unmapping, and the
attention backend's `over_read`.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.errors import ConfigError, UnmappedAccess


class Guard:
    """Checks the lanes of a step against the cache's frontiers.

    Parameters
    ----------
    over_read : int
        Tokens past a sequence's length that the attention backend's kernels may load.
    """

    def __init__(self, cache: KVCache, over_read: int = 0) -> None:
        self.cache, self.over_read = cache, over_read
        # 0 for the dummy slot: an idle lane has length 0.
        self._longest = np.zeros(cache.dummy_slot + 1, np.int64)
        # Lanes keep their slots for many steps, so the slots of the last check and its count of busy lanes are kept.
        self._slots, self._writing = b"", 0

    def longest(self) -> np.ndarray:
        """The greatest length, int64 ``[num_slots]``, at which all that a kernel loads from each slot is mapped."""
        frontiers = self.cache.frontiers
        if not self.over_read:
            return frontiers
        # Kernels load nothing past the end of a slot.
        whole = frontiers >= self.cache.shape.max_seq_len
        return np.where(whole, frontiers, np.maximum(frontiers - self.over_read, 0))

    def check(self, lengths: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Raise UnmappedAccess, naming the sequence, if the step would touch memory that is not mapped.

        Parameters
        ----------
        lengths : int ``[lanes]``
            Each lane's sequence length after the last step of the launch; 0 for an idle lane.
        slots : int ``[lanes]``
            The slot that each lane reads and writes, no two the same; the dummy slot for an idle lane.
        positions : int ``[lanes]``
            The first position that each lane writes; 0 for an idle lane.

        Raises
        ------
        UnmappedAccess
            A lane would read or write past its slot's frontier.
        ConfigError
            The arrays' sizes differ, two lanes share a slot, or a lane is neither busy nor idle.
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
            # A slot that is too large raises IndexError, a negative one ValueError.
            beyond = longest[slots] - lengths
            lanes_of = None if same == self._slots else np.bincount(slots, minlength=dummy + 1)
        except (IndexError, ValueError):
            self._refuse(lengths, slots, positions)
        if lanes_of is not None:
            used = int(np.count_nonzero(lanes_of[:dummy]))
            # No two lanes share a slot if there are as many different slots as busy lanes.
            if used != lanes - lanes_of[dummy]:
                self._refuse(lengths, slots, positions)
            self._slots, self._writing = same, used
        left = lengths - positions
        # One test for all lanes: the bitwise or of numbers is negative if one of them is. A lane in the dummy slot
        # cannot write, because its length may only be 0.
        beyond |= left
        beyond |= positions
        if beyond[beyond.argmin()] < 0 or np.count_nonzero(left) != self._writing:
            self._refuse(lengths, slots, positions)

    def check_chunk(self, slot: int, length: int) -> None:
        """`check` for a chunk of a prompt that makes the sequence in `slot` `length` tokens long."""
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
