"""The guard: before a replay, every position it can touch lies under a frontier.

It trusts the cache's frontiers, and the backend's word for how far past a length its kernels may load.
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
        self._reach = np.zeros(cache.shape.num_slots, np.int64)
        self._beyond = np.zeros(cache.shape.num_slots, np.bool_)

    def check(self, lengths: np.ndarray) -> None:
        """Pass, or raise UnmappedAccess naming the sequence; ConfigError where `lengths` is not one a slot.

        lengths int ``[num_slots]``: each lane's tokens once the step has written its own; 0 for an idle lane.
        """
        if lengths.shape != self._reach.shape:
            raise ConfigError(
                f"lengths have shape {lengths.shape}, but there are {len(self._reach)} slots; give one length a slot, "
                "0 for an idle lane"
            )
        reach = lengths
        if self.over_read:
            reach = np.add(lengths, self.over_read, out=self._reach)
            reach[lengths == 0] = 0
            np.minimum(reach, self.cache.shape.max_seq_len, out=reach)
            # An over-read ends with the slot; a length beyond it is refused all the same.
            np.maximum(reach, lengths, out=reach)
        if np.greater(reach, self.cache.frontiers, out=self._beyond).any():
            self._refuse(lengths, reach)

    def _refuse(self, lengths: np.ndarray, reach: np.ndarray) -> None:
        slots = np.flatnonzero(self._beyond).tolist()
        slot = slots[0]
        more = f" ({len(slots)} slots in all)" if len(slots) > 1 else ""
        raise UnmappedAccess(
            f"sequence {self.cache.sequence_at(slot)!r} in slot {slot}{more} would be {lengths[slot]} tokens long and "
            f"touch {reach[slot]}, but {self.cache.frontiers[slot]} are mapped, in all "
            f"{self.cache.shape.num_layers} layers; call prepare_step with these lengths before the step"
        )
