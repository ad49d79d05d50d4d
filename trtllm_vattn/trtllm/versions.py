"""Which versions of TensorRT-LLM the adapter was held against. Imports nothing heavy."""

from __future__ import annotations

import re

from trtllm_vattn.errors import ConfigError

VERSION_MODULE = "tensorrt_llm.version"
RECORDED = {
    "1.2": r"1\.2\.\d+",
    "1.3.0rc": r"1\.3\.0rc\d+",
    "1.4.0rc": r"1\.4\.0rc\d+",
}
"""Series whose interface is recorded (tests/data/trtllm_interface.json has the same keys), and what their versions look
like; a post-release or a local build of one counts as the one."""
RANGE = "1.2.x, 1.3.0rc* and 1.4.0rc*"
OVERRIDE = "any_version=True (trtllm-vattn run --any-version)"


def series_of(version: str) -> str | None:
    """The recorded series that a version belongs to; None for none."""
    for series, pattern in RECORDED.items():
        if re.fullmatch(rf"{pattern}(\.post\d+)?(\+.*)?", version):
            return series
    return None


def refuse_unrecorded(version: str) -> None:
    """Raise ConfigError, with the range and the override, for a version that the adapter was not held against."""
    if series_of(version) is None:
        raise ConfigError(
            f"tensorrt_llm {version} is installed, but the fixed-address KV cache was held against {RANGE} only: "
            f"install one of these, or try it all the same with {OVERRIDE}"
        )
