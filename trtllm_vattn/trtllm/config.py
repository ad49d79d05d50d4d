"""Settings of the TensorRT-LLM adapter: keywords, a YAML section, the environment. Read once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes

ENVIRONMENT = "VATTN_TRTLLM"
"""Holds all settings as JSON; the launcher sets it for the processes it starts."""
SECTION = "vattn"
"""The part of a YAML file that is ours; a file without it is taken whole."""


@dataclass(frozen=True)
class TrtllmConfig:
    """How TensorRT-LLM's KV cache is kept.

    Parameters
    ----------
    budget : int or None
        Bytes of physical memory on each GPU; None is what TensorRT-LLM itself would take (its
        ``free_gpu_memory_fraction`` and ``max_tokens``), asked once its graphs are captured.
    layers_per_range : int or None
        Layers of one pool; None is all of them in one pool.
    lookahead : int or None
        Tokens that are mapped before a sequence needs them; None is one block.

    Raises
    ------
    ConfigError
        A value is out of its range.
    """

    budget: int | None = None
    layers_per_range: int | None = None
    lookahead: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("layers_per_range", 1), ("lookahead", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}, or left out")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrtllmConfig:
        """From a mapping whose budget may be text. Raises ConfigError for a name that is none of ours."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"no setting {', '.join(unknown)}; there are {', '.join(known)}")
        values = dict(settings)
        if values.get("budget") is not None:
            values["budget"] = parse_bytes(values["budget"])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path) -> TrtllmConfig:
        """From the section ``vattn`` of a YAML file, or the whole of one without it. Raises ConfigError."""
        try:
            import yaml
        except ImportError as error:
            raise ConfigError("reading YAML needs PyYAML: pip install pyyaml, or give keywords instead") from error
        try:
            found = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read settings from {path}: {error}") from error
        section = found.get(SECTION, found) if isinstance(found, dict) else found
        if not isinstance(section, dict):
            raise ConfigError(
                f"{path} holds {type(section).__name__}, not settings; write `{SECTION}:` and names below"
            )
        return cls.of(section)

    @classmethod
    def from_environment(cls) -> TrtllmConfig:
        """From the variable ``VATTN_TRTLLM``; the defaults where it is not set. Raises ConfigError."""
        text = os.environ.get(ENVIRONMENT, "{}")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{ENVIRONMENT} is {text!r}, which is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{ENVIRONMENT} is {text!r}; it must be an object of settings")
        return cls.of(found)

    def as_environment(self) -> dict[str, str]:
        """The variable that `from_environment` reads."""
        return {ENVIRONMENT: json.dumps({k: v for k, v in asdict(self).items() if v is not None})}
