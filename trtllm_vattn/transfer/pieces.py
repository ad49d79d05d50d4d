"""What a transfer moves."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Bytes at one address that are to be at another, in one extent on either side: a descriptor."""

    source: int
    target: int
    size: int
