"""What an arena knows of one slot."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from trtllm_vattn.vmm.base import Fence
from trtllm_vattn.vmm.owners import Mapping


class SlotState(enum.Enum):
    FREE = "free"
    RUNNING = "running"
    RETIRED = "retired"
    """An unmap failed in it: its addresses are not used again."""


FREE, RUNNING, RETIRED = SlotState
"""By these names: looking a member up in its class takes Python 3.11 longer than the rest of a loop over slots."""


@dataclass
class Slot:
    """What backs one slot.

    `columns` lists, from the slot's start, mappings of equal size and offset, one in each range; `mapped` is their
    bytes in one range. `since` is when it was last parked or occupied, in seconds of a monotonic clock. `leaving`
    is still mapped at the slot's addresses, but in nobody's use; it goes when `fence` is done, and until then the slot
    is not free. `offered` is how many of the mapped bytes its sequence may use where that is not all: what it found
    parked beyond its need was never its own, and goes, too, when `fence` is done, if it has not been offered by then.
    """

    columns: list[list[Mapping]] = field(default_factory=list)
    mapped: int = 0
    offered: int | None = None
    state: SlotState = FREE
    fence: Fence | None = None
    since: float = 0.0
    leaving: list[Mapping] = field(default_factory=list)
    broken: bool = False

    @property
    def is_free(self) -> bool:
        """Whether a sequence may be given it."""
        return self.state is FREE and not self.leaving
