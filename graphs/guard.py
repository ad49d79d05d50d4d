"""The guard: before a replay, every address it can touch lies under a frontier.

It trusts the cache's frontiers, which are lowered before an unmapping is even queued, and the backend's word for how
far past a length its kernels may load.
"""

from __future__ import annotations

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
        self._mapped = np.zeros(cache.shape.num_slots, np.int64)
        self._wrong = np.zeros(cache.shape.num_slots, np.bool_)

    def check(self, lengths: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Pass, or raise UnmappedAccess naming the sequence; ConfigError where the lanes contradict themselves.

        Parameters
        ----------
        lengths : int ``[lanes]``
            Tokens of each lane once its last step has written its own; 0 for an idle lane.
        slots : int ``[lanes]``
            Where each lane reads and writes; the dummy slot for an idle lane.
        positions : int ``[lanes]``
            Where each lane writes first; 0 for an idle lane.
        """
        lanes = len(lengths)
        if not (len(slots) == len(positions) == lanes <= len(self._mapped)):
            raise ConfigError(
                f"{lanes} lengths, {len(slots)} slots and {len(positions)} positions; give one of each a lane, and no "
                f"more lanes than the {len(self._mapped)} slots"
            )
        mapped, wrong = self._mapped[:lanes], self._wrong[:lanes]
        np.greater(lengths, positions, out=wrong)
        if np.not_equal(wrong, slots != self.cache.dummy_slot, out=wrong).any() or positions[lengths == 0].any():
            self._refuse_lane(lengths, slots, positions)
        reach = lengths
        if self.over_read:
            # It ends with the slot; a length beyond the slot is refused all the same.
            end = np.maximum(self.cache.shape.max_seq_len, lengths)
            reach = np.where(lengths > 0, np.minimum(lengths + self.over_read, end), 0)
        np.take(self.cache.frontiers, slots, mode="clip", out=mapped)
        if np.greater(reach, mapped, out=wrong).any():
            self._refuse(lengths, slots, reach)

    def check_chunk(self, slot: int, length: int) -> None:
        """The same for a chunk of a prompt in one slot, which makes its sequence `length` tokens long."""
        self.check(np.array([length]), np.array([slot]), np.array([length - 1]))

    def _refuse_lane(self, lengths: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        dummy = self.cache.dummy_slot
        wrong = ((lengths > positions) != (slots != dummy)) | ((lengths == 0) & (positions != 0))
        lane = int(wrong.argmax())
        raise ConfigError(
            f"lane {lane} has length {lengths[lane]}, slot {slots[lane]} and writes from position {positions[lane]}: a "
            f"lane writes below its length in a slot of its own; an idle one has length 0, slot {dummy}, position 0"
        )

    def _refuse(self, lengths: np.ndarray, slots: np.ndarray, reach: np.ndarray) -> None:
        lanes = np.flatnonzero(self._wrong[: len(lengths)]).tolist()
        lane = lanes[0]
        slot = int(slots[lane])
        more = f" ({len(lanes)} slots in all)" if len(lanes) > 1 else ""
        raise UnmappedAccess(
            f"sequence {self.cache.sequence_at(slot)!r} in slot {slot}{more} would be {lengths[lane]} tokens long and "
            f"touch {reach[lane]}, but {self.cache.frontiers[slot]} are mapped in layers 0 to "
            f"{self.cache.shape.num_layers - 1}; call prepare_step with these lengths before the step"
        )
