"""How memory is divided among tenants: pure arithmetic over what each has, needs, wants and was promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What one tenant has and asks for, in bytes.

    Attributes
    ----------
    floor : int
        What it gets whenever it wants it, others' running sequences notwithstanding.
    ceiling : int
        What it may hold at most.
    priority : int
        Those of higher priority get first what is beyond floors.
    held : int
        Lent to it now.
    needs : int
        Of that, what its running sequences use: what it cannot give back without sending one of them back.
    wants : int
        What it would use now, with those that wait.
    """

    floor: int
    ceiling: int
    priority: int
    held: int
    needs: int
    wants: int


def divide(memory: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Bytes that each tenant may hold, `memory` together at most, where floors add up to no more.

    In this order: what each wants within its floor; what running sequences hold beyond it; what is wanted beyond it;
    what is held for nobody, cached and parked; and the rest, so that whoever grows need not ask. Each round goes by
    priority, and among equals the ones with least get first (max-min fairness).
    """
    shares = {name: min(claim.floor, claim.ceiling, max(claim.wants, claim.needs)) for name, claim in claims.items()}
    rounds: tuple[Callable[[Claim], int], ...] = (
        lambda claim: min(claim.needs, claim.held),
        lambda claim: max(claim.wants, claim.needs),
        lambda claim: claim.held,
        lambda claim: claim.ceiling,
    )
    left = memory - sum(shares.values())
    for wanted in rounds:
        for priority in sorted({claim.priority for claim in claims.values()}, reverse=True):
            asked = {
                name: (shares[name], max(shares[name], min(claim.ceiling, wanted(claim))))
                for name, claim in claims.items()
                if claim.priority == priority
            }
            for name, share in level(left, asked).items():
                left -= share - shares[name]
                shares[name] = share
    return shares


def level(room: int, asked: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Raise each from what it has towards what it asks for, by `room` in all, those with least first. Less than no
    room, as where a lost tenant has what others were promised, is none."""
    room = max(0, room)
    if sum(most - least for least, most in asked.values()) <= room:
        return {name: most for name, (_, most) in asked.items()}
    # The level to which the room suffices: between two of these edges as many rise with it.
    edges = sorted([(least, 1) for least, _ in asked.values()] + [(most, -1) for _, most in asked.values()])
    low = taken = rising = 0
    for edge, change in edges:
        if taken + rising * (edge - low) > room:
            low += (room - taken) // rising
            break
        taken += rising * (edge - low)
        low, rising = edge, rising + change
    shares = {name: max(least, min(low, most)) for name, (least, most) in asked.items()}
    rest = room - sum(shares[name] - least for name, (least, _) in asked.items())
    for name, (_, most) in asked.items():
        if rest > 0 and shares[name] == low < most:
            shares[name], rest = low + 1, rest - 1
    return shares
