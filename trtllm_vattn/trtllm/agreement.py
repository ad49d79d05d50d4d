"""Budgets that change at run time on several ranks: at the same step on all of them, or on none.

The schedulers of tensor parallel ranks decide alike because they see alike, the blocks that a budget backs among it. So
what one rank is asked for waits until all ranks have met, by the executor's own communicator (`Distributed.allgather`),
after a step that all of them count as the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

EVERY = 8
"""Steps between two meetings. A meeting where nobody was asked for anything is one allgather of a word."""


def why_alone(executor: Any, mapping: Any) -> str | None:
    """Why the ranks of an executor cannot meet after a step; None where they can."""
    if getattr(mapping, "pp_size", 1) > 1:
        return "and ranks of a pipeline are never at the same one"
    if getattr(mapping, "enable_attention_dp", False):
        return "and with attention data parallelism each rank counts steps of its own"
    if not callable(getattr(getattr(executor, "dist", None), "allgather", None)):
        return "and this executor has no communicator by which they could agree (dist.allgather)"
    return None


class BudgetAgreement:
    """What the ranks of one manager agree on.

    Parameters
    ----------
    memory : ManagerMemory
        This rank's.
    allgather : callable
        ``allgather(value)`` gives every rank's value, by rank; all ranks call it.
    """

    def __init__(self, memory: Any, allgather: Callable[[Any], list[Any]]) -> None:
        self._memory, self._allgather = memory, allgather
        self._asked: int | None = None
        self._steps = 0

    def ask(self, budget: int) -> None:
        """Bring a budget in bytes to the next meeting. The last one asked for counts."""
        self._asked = budget

    def step(self) -> None:
        """A step has ended; on the executor's thread, the same number of times on all ranks.

        Every `EVERY` steps the ranks meet: the least that any of them was asked for, in blocks, is put in force on
        all. Where that fails on one of them all have the budget that they had, and say so in the log.
        """
        self._steps += 1
        if self._steps % EVERY:
            return
        asked, self._asked = self._asked, None
        memory = self._memory
        mine = None if asked is None else memory.slots.blocks_backed_by(asked)
        wanted = [blocks for blocks in self._allgather(mine) if blocks is not None]
        if not wanted:
            return
        before, failed = memory.target, None
        try:
            memory.put_in_force(memory.slots.budget_for(min(wanted)))
        except Exception as error:
            # Whatever it is, the other ranks wait for an answer.
            failed = f"{type(error).__name__}: {error}"
        failures = {rank: text for rank, text in enumerate(self._allgather(failed)) if text is not None}
        if failures:
            memory.put_in_force(before)
            told = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
            logger.error("the budget stays %s bytes on all ranks, for it could not be changed (%s)", before, told)
        else:
            logger.info("the budget is %s bytes from this step on, %d blocks on all ranks", memory.target, min(wanted))
