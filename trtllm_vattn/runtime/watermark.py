"""When to let requests in while memory is short, so that those that were sent back do not push out those that run.

Memory is used to the last page: whoever finds room is let in, though all who run may outgrow it together. Where they
did, and one was sent back (swapped out, or to be computed anew), it would find its own memory free again at once, come
back, and be sent back with the next page that anybody needs; each time its tokens are copied both ways, or computed
anew. So from then on, until nobody waits any more, a request is let in only where a reserve stays free behind it: what
all who run, it among them, grow by until the first of them ends. That is known from their lengths: the tokens that each
still wants, but no more than requests usually got so far. The reserve is no more than a quarter of the memory, so that
a limit that nobody reaches (`max_tokens`) does not keep it empty.

Between two requests that come back, then, one ends, or a quarter of the memory is filled: swaps are bounded by ends.
"""

from __future__ import annotations

from collections.abc import Iterable

from trtllm_vattn.cache.base import KVCache
from trtllm_vattn.runtime.request import RequestState

LARGEST_SHARE = 4
"""The reserve is at most one part in so many of the memory for sequences."""
KEEP = 7 / 8
"""Of the usual length of outputs, when another request has ended."""


class Watermark:
    """Says whether a request may be let in.

    Attributes
    ----------
    is_on : bool
        Whether somebody was sent back for lack of memory since nobody waited.
    usual : float or None
        Tokens that requests got before they ended, the latest ones above all; None before the first one.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.is_on = False
        self.usual: float | None = None
        self._refused: tuple[int, ...] = ()

    def sent_back(self) -> None:
        """Memory was short, and a request gave up its own."""
        self.is_on = True

    def emptied(self) -> None:
        """Nobody waits any more."""
        self.is_on = False

    def ended(self, tokens: int) -> None:
        """A request ended with so many tokens of output."""
        self.usual = float(tokens) if self.usual is None else KEEP * self.usual + (1 - KEEP) * tokens

    def reserve(self, running: Iterable[RequestState]) -> int:
        """Bytes that have to stay free for what these requests grow by until the first of them ends."""
        running, cache = list(running), self._cache
        steps = min((request.left for request in running), default=0)
        if self.usual is not None:
            steps = min(steps, round(self.usual))
        grown = sum(
            cache.bytes_of(request.length + min(request.left, steps)) - cache.bytes_of(request.length)
            for request in running
        )
        return min(grown, self._bytes // LARGEST_SHARE)

    @property
    def _bytes(self) -> int:
        """Of the memory for sequences, what there is now: a broker may lend more one day."""
        return min(self._cache.bytes_for_sequences, self._cache.budget_bytes)

    def lets_in(self, request: RequestState, running: list[RequestState], changes: int) -> bool:
        """Whether a request may take memory beside those that run; `changes` counts what may have freed any."""
        if not self.is_on or not running:
            return True
        # Else those who run have only grown.
        now = request.id, request.length, changes, self._cache.budget_bytes, len(running)
        if now == self._refused:
            return False
        free = self._bytes - self._cache.stats().mapped_bytes
        if free >= self._cache.bytes_of(request.length) + self.reserve([*running, request]):
            return True
        self._refused = now
        return False
