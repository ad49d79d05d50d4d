"""Waiting requests, in the order in which they are given slots."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from trtllm_vattn.runtime.request import RequestState

Rank = tuple[int, float, int]


class RequestQueue:
    """Requests of the highest priority first; of one priority those with the earliest deadline, and then first come,
    first served. But whoever has waited for `max_wait_s` since it came goes before all others, so that nobody waits for
    ever, however many of higher priority come.

    Parameters
    ----------
    clock : callable
        Seconds.
    max_wait_s : float
        Seconds; infinite where priorities alone count.
    """

    def __init__(self, clock: Callable[[], float], max_wait_s: float) -> None:
        self.clock, self.max_wait_s = clock, max_wait_s
        self._by_id: dict[int, RequestState] = {}
        # Sorted. Inserting and removing moves a few bytes for each that waits; for many thousands, microseconds.
        self._ranks: list[Rank] = []
        self._ids: list[int] = []

    def rank(self, request: RequestState) -> Rank:
        """Those with smaller ranks go first, among requests that wait and among those that hold slots."""
        if self.clock() - request.arrived >= self.max_wait_s:
            return -LARGEST, 0.0, request.id
        return _usual(request)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[RequestState]:
        """By priority and deadline alone."""
        return (self._by_id[number] for _, _, number in self._ranks)

    @property
    def first(self) -> RequestState:
        """The next one. Raises IndexError where there is none."""
        oldest = self._by_id[self._ids[0]]
        if self.clock() - oldest.arrived >= self.max_wait_s:
            return oldest
        return self._by_id[self._ranks[0][2]]

    def add(self, request: RequestState) -> None:
        """Let a request wait, one that waited before too."""
        self.remove(request)
        self._by_id[request.id] = request
        insort(self._ids, request.id)
        insort(self._ranks, _usual(request))

    def remove(self, request: RequestState) -> None:
        """Take a request out, if it is there."""
        _discard(self._ranks, _usual(request))
        _discard(self._ids, request.id)
        self._by_id.pop(request.id, None)

    def clear(self) -> None:
        self._ranks.clear()
        self._ids.clear()
        self._by_id.clear()


LARGEST = 1 << 62


def _usual(request: RequestState) -> Rank:
    return -request.priority, request.deadline, request.id


def _discard(ordered: list, value: object) -> None:  # type: ignore[type-arg]
    at = bisect_left(ordered, value)
    if at < len(ordered) and ordered[at] == value:
        del ordered[at]
