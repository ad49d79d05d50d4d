"""Changing the KV budget of the running managers in this process."""

from __future__ import annotations

import weakref
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.trtllm.agreement import BudgetAgreement, why_alone

_managers: weakref.WeakSet[Any] = weakref.WeakSet()
_why_alone: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
"""Why ranks cannot agree, by manager."""


def register(manager: Any) -> None:
    """Add a manager that was made."""
    _managers.add(manager)


def forget(manager: Any) -> None:
    """Remove a manager that was shut down."""
    _managers.discard(manager)


def is_ours(manager: Any) -> bool:
    """Whether a manager was registered and not shut down."""
    return manager in _managers


def managers() -> list[Any]:
    """The managers of this process. Raises ConfigError where there is none."""
    found = list(_managers)
    if not found:
        raise ConfigError(
            "no fixed-address KV cache lives in this process; call this where the LLM's worker runs (with "
            "TLLM_WORKER_USE_SINGLE_PROCESS=1 that is here), after the LLM was made"
        )
    return found


def let_ranks_agree(manager: Any, executor: Any) -> None:
    """Have a manager's budget change at the same step as the other ranks', where there are any and they can meet."""
    if not hasattr(manager.vattn, "agreement") or getattr(manager.mapping, "world_size", 1) < 2:
        return
    why = why_alone(executor, manager.mapping)
    _why_alone[manager] = why
    manager.vattn.agreement = None if why else BudgetAgreement(manager.vattn, executor.dist.allgather)


def _check_ranks(manager: Any) -> None:
    ranks = getattr(manager.mapping, "world_size", 1)
    if ranks > 1 and getattr(manager.vattn, "agreement", None) is None:
        why = _why_alone.get(manager) or "and they cannot agree on one here"
        raise ConfigError(
            f"this LLM runs on {ranks} ranks, whose schedulers must see the same budget at the same step, {why}: give "
            "the budget at start"
        )


def set_budget(budget: int | str) -> int:
    """Set the bytes of every manager of this process, a number or ``"40GiB"``; returns the sum of the budgets in force.

    On several ranks it is enough to ask one of them. Where several are asked, the least counts. It is in force on all
    of them from the same step on, some steps later (agreement.py), and what is returned is the budget until then.

    Raises ConfigError as `managers`, for ranks that cannot agree, or for a budget that is too small; no budget changed
    then.
    """
    size, found = parse_bytes(budget), managers()
    for manager in found:
        _check_ranks(manager)
        manager.vattn.check_budget(size)
    return sum(manager.vattn.set_budget(size) for manager in found)


def release() -> int:
    """Give back all memory that no running request needs; returns the bytes kept. The budget stays, so on several
    ranks each may do it by itself. Raises as `managers`."""
    return sum(manager.vattn.release() for manager in managers())


def resume() -> int:
    """Allow the whole budget again after `release`; returns it. Raises as `managers`."""
    return sum(manager.vattn.resume() for manager in managers())
