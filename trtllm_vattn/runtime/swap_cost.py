"""Whether tokens of a request that gives its memory up are worth keeping in host memory, by what was measured.

Copying out and back takes its bytes over the link's bandwidth, twice; computing anew takes its tokens times the seconds
of a prompt token. Both are measured as they happen, so that a slow link, or a small model, recomputes.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

from trtllm_vattn.cache.base import Transfers

FIRST_BANDWIDTH = 20e9
"""Bytes a second of a copy between device and host before one was seen; PCIe 4 x16 has some 25e9, PCIe 5 some 55e9."""
SAMPLES = 15


class SwapCost:
    """Chooses between host memory and computing anew.

    Parameters
    ----------
    out_bandwidth, in_bandwidth : float or None
        Bytes a second from the device, and to it; None are measured.
    token_s : float or None
        Seconds that a prompt token takes; None is measured. While nothing is known, tokens are kept.
    """

    def __init__(
        self,
        out_bandwidth: float | None = None,
        in_bandwidth: float | None = None,
        token_s: float | None = None,
    ) -> None:
        self._fixed = (out_bandwidth, in_bandwidth)
        self.out_bandwidth, self.in_bandwidth = out_bandwidth or FIRST_BANDWIDTH, in_bandwidth or FIRST_BANDWIDTH
        self._fixed_token_s = token_s
        self._token_s: deque[float] = deque(maxlen=SAMPLES)

    @property
    def token_s(self) -> float | None:
        """Seconds of a prompt token; None where none was seen yet."""
        if self._fixed_token_s is not None:
            return self._fixed_token_s
        return median(self._token_s) if self._token_s else None

    def observe_prompt(self, tokens: int, seconds: float) -> None:
        """A pass with so many prompt tokens took so long."""
        if tokens > 0 and seconds > 0:
            self._token_s.append(seconds / tokens)

    def observe_transfers(self, done: Transfers) -> None:
        """All that was copied so far."""
        if self._fixed[0] is None and done.out_s > 0:
            self.out_bandwidth = done.out_bytes / done.out_s
        if self._fixed[1] is None and done.in_s > 0:
            self.in_bandwidth = done.in_bytes / done.in_s

    def choose(self, tokens: int, nbytes: int) -> Literal["swap", "recompute"]:
        """What becomes of so many tokens in so many bytes."""
        token_s = self.token_s
        if token_s is None:
            return "swap"
        copying = nbytes / self.out_bandwidth + nbytes / self.in_bandwidth
        return "swap" if copying < tokens * token_s else "recompute"
