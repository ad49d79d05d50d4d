"""placeholder: being written"""

from __future__ import annotations

import enum


class MappingPolicy(str, enum.Enum):
    CONCURRENT = "concurrent"
    BETWEEN_STEPS = "between-steps"
    QUIESCE = "quiesce"
