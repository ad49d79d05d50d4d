"""The budget of the managers in this process, while they run."""

from __future__ import annotations

import weakref
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes

_managers: weakref.WeakSet[Any] = weakref.WeakSet()


def register(manager: Any) -> None:
    """A manager was made."""
    _managers.add(manager)


def forget(manager: Any) -> None:
    """It was shut down."""
    _managers.discard(manager)


def is_ours(manager: Any) -> bool:
    """Whether a manager is one of ours that lives."""
    return manager in _managers


def managers() -> list[Any]:
    """Managers that live in this process and may be resized.

    Raises ConfigError where there is none, or where one is of an LLM of several ranks: their schedulers must see the
    same budget at the same step, which a call on one of them cannot promise.
    """
    found = list(_managers)
    if not found:
        raise ConfigError(
            "no fixed-address KV cache lives in this process; call this where the LLM's worker runs (with "
            "TLLM_WORKER_USE_SINGLE_PROCESS=1 that is here), after the LLM was made"
        )
    for manager in found:
        ranks = getattr(manager.mapping, "world_size", 1)
        if ranks > 1:
            raise ConfigError(
                f"this LLM runs on {ranks} ranks, whose schedulers must see the same budget at the same step; it is "
                "changed at run time on one rank only: give the budget at start"
            )
    return found


def set_budget(budget: int | str) -> int:
    """Raise or lower the bytes of every manager here, a number or ``"40GiB"``; returns the sum of the budgets in force.

    Raises ConfigError as `managers`, or for too little.
    """
    size, found = parse_bytes(budget), managers()
    for manager in found:
        manager.vattn_check_budget(size)
    return sum(manager.vattn_set_budget(size) for manager in found)


def release() -> int:
    """Give back all memory that no live request needs; returns the bytes that are kept. Raises as `managers`."""
    return sum(manager.vattn_release() for manager in managers())


def resume() -> int:
    """Be allowed the whole budget again; returns it. Raises as `managers`."""
    return sum(manager.vattn_resume() for manager in managers())
