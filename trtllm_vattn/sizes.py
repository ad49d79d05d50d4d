"""Numbers of bytes as people write them, and how long sequences may be where nobody says it."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.values import as_whole, shown

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_WRITTEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)
MOST = (1 << 63) - 1
"""Bytes; a driver's sizes are 64-bit numbers."""
USUAL_MAX_SEQ_LEN = 4096
"""Tokens of the longest sequence, of models with so many positions (`runtime.models.longest_of`)."""


def parse_bytes(given: Any, name: str = "") -> int:
    """Bytes of a whole number, or of text: ``17179869184``, ``16GiB``, ``16G`` or ``512 MiB`` (powers of 1,024).

    `name` is what the number is for, as messages say it. Raises ConfigError for anything else: booleans, floats,
    negative numbers, other text.
    """
    what = f"{name} is {shown(given)}, which" if name else f"{shown(given)}"
    refused = ConfigError(f"{what} is no number of bytes; write 17179869184 or 16GiB")
    if isinstance(given, str):
        written = _WRITTEN.fullmatch(given)
        if written is None or ("." in written[1] and not written[2]):
            raise refused
        # 2.7GiB is no whole number of bytes; what is beyond the last one is left out.
        number: int | None = int(Decimal(written[1]) * _UNITS[written[2].lower()])
    else:
        number = as_whole(given)
    if number is None or not 0 <= number <= MOST:
        raise refused
    return number
