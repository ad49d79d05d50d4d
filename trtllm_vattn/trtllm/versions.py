"""Which versions of TensorRT-LLM the adapter accepts: those whose interface is recorded. Imports nothing heavy."""

from __future__ import annotations

import re

from trtllm_vattn.errors import ConfigError

VERSION_MODULE = "tensorrt_llm.version"
RECORDED = {"1.2": r"1\.2\.\d+", "1.3.0rc": r"1\.3\.0rc\d+", "1.4.0rc": r"1\.4\.0rc\d+"}
"""Version patterns of each recorded series (tests/data/trtllm_interface.json has the same keys). A post-release or a
local build of a version counts as that version."""
RANGE = "1.2.x, 1.3.0rc* and 1.4.0rc*"
OVERRIDE = "any_version=True (trtllm-vattn run --any-version)"


def series_of(version: str) -> str | None:
    """The recorded series that a version belongs to; None for none."""
    for series, pattern in RECORDED.items():
        if re.fullmatch(rf"{pattern}(\.post\d+)?(\+.*)?", version):
            return series
    return None


def refuse_unrecorded(version: str) -> None:
    """Raise ConfigError, with the range and the override, for a version that is in no recorded series."""
    if series_of(version) is None:
        raise ConfigError(
            f"tensorrt_llm {version} is installed, but the fixed-address KV cache was held against {RANGE} only: "
            f"install one of these, or try it all the same with {OVERRIDE}"
        )
