"""Changing the KV budget of the running managers in this process."""

from __future__ import annotations

import weakref
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes

_managers: weakref.WeakSet[Any] = weakref.WeakSet()


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
    """The managers of this process, which may be resized.

    Raises ConfigError where there is none, or where one belongs to an LLM of several ranks: their schedulers must see
    the same budget at the same step, which a call on one rank cannot ensure.
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
    """Set the bytes of every manager of this process, a number or ``"40GiB"``; returns the sum of the budgets in force.

    Raises ConfigError as `managers`, or for a budget that is too small; no budget changed then.
    """
    size, found = parse_bytes(budget), managers()
    for manager in found:
        manager.vattn.check_budget(size)
    return sum(manager.vattn.set_budget(size) for manager in found)


def release() -> int:
    """Give back all memory that no running request needs; returns the bytes kept. Raises as `managers`."""
    return sum(manager.vattn.release() for manager in managers())


def resume() -> int:
    """Allow the whole budget again after `release`; returns it. Raises as `managers`."""
    return sum(manager.vattn.resume() for manager in managers())
