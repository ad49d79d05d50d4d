"""The guard: before a replay, check that every address which the graph can touch is backed by memory.

The guard trusts two things: the cache's frontiers, which the cache lowers before it queues an unmapping, and the
attention backend's `over_read`. A slot whose first tokens lie in other slots is read there: each segment is checked
against its owner's memory, which is not unmapped while the segment is there. Nobody writes what others read.
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
        return self._within(self.cache.frontiers)

    def _within(self, frontiers: np.ndarray) -> np.ndarray:
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
            A lane would read or write past its slot's frontier, read tokens in another slot that are not there, or
            write what other slots read too.
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
        segments = self.cache.segments
        if segments is not None:
            self._check_segments(segments)
        if (edges := self.cache.lower_edges) is not None:
            self._check_edges(edges, segments, slots)
        if (floors := self.cache.write_floors) is not None:
            self._check_writes(floors, slots, positions)
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

    def check_chunk(self, slot: int, length: int, start: int | None = None) -> None:
        """`check` for a chunk of a prompt that makes the sequence in `slot` `length` tokens long, and writes from token
        `start` on; None is its last token alone."""
        self.check(np.array([length]), np.array([slot]), np.array([length - 1 if start is None else start]))

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
        where = f"layers 0 to {self.cache.shape.num_layers - 1}"
        if self.cache.num_groups > 1:
            where = "the range group that has least"
        raise UnmappedAccess(
            f"sequence {self.cache.sequence_at(slot)!r} in slot {slot}{others} would be {length} tokens long and "
            f"touch {reach}, but {self.cache.frontiers[slot]} are mapped in {where}; call prepare_step with these "
            "lengths before the step"
        )

    def _busy(self, slots: np.ndarray) -> np.ndarray:
        """The lanes that are not idle."""
        return np.flatnonzero((slots >= 0) & (slots < self.cache.dummy_slot))

    def _check_segments(self, segments: np.ndarray) -> None:
        """Raise UnmappedAccess where tokens that a slot reads in another one have no memory there."""
        backed, edges = self.cache.frontiers, self.cache.lower_edges
        if (retained := self.cache.retained_frontiers) is not None:
            backed = np.maximum(backed, retained)
        _, owners, starts, stops = segments.T
        wrong = self._within(backed)[owners] < stops
        if edges is not None:
            wrong |= edges[owners] > starts
        if wrong.any():
            holder, owner, start, stop = segments[int(wrong.argmax())].tolist()
            edge = 0 if edges is None else edges[owner]
            raise UnmappedAccess(
                f"sequence {self.cache.sequence_at(holder)!r} in slot {holder} reads tokens {start} to {stop} in slot "
                f"{owner}, where {edge} to {backed[owner]} are mapped"
            )

    def _check_edges(self, edges: np.ndarray, segments: np.ndarray | None, slots: np.ndarray) -> None:
        """Raise UnmappedAccess where a lane's sequence has no memory at its beginning, which every kernel reads."""
        prefixes = np.zeros_like(edges)
        if segments is not None:
            np.maximum.at(prefixes, segments[:, 0], segments[:, 3])
        busy = slots[self._busy(slots)]
        if (wrong := edges[busy] > prefixes[busy]).any():
            slot = int(busy[int(wrong.argmax())])
            behind = f", and its first {prefixes[slot]} in other slots" if prefixes[slot] else ""
            raise UnmappedAccess(
                f"sequence {self.cache.sequence_at(slot)!r} in slot {slot} is read from position 0 on, but only "
                f"positions from {edges[slot]} on are mapped{behind}"
            )

    def _check_writes(self, floors: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Raise UnmappedAccess where a lane would write tokens that lie in another slot, or in shared memory."""
        lanes = self._busy(slots)
        busy = slots[lanes]
        if (wrong := np.asarray(positions)[lanes] < floors[busy]).any():
            lane = int(lanes[int(wrong.argmax())])
            slot = int(slots[lane])
            raise UnmappedAccess(
                f"sequence {self.cache.sequence_at(slot)!r} in slot {slot} would write from position "
                f"{positions[lane]}, but other sequences read what lies below {floors[slot]}; truncate it to that "
                "position, which copies what it shares, or begin it with fewer of their tokens"
            )

    def _refuse_shared(self, slots: np.ndarray) -> NoReturn:
        slot = int(np.bincount(slots)[: self.cache.dummy_slot].argmax())
        lanes = np.flatnonzero(slots == slot).tolist()
        raise ConfigError(
            f"lanes {lanes} all write to slot {slot}, of sequence {self.cache.sequence_at(slot)!r}; give each sequence "
            "one lane"
        )
