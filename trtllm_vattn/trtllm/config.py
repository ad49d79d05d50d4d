"""Settings of the TensorRT-LLM adapter, from keywords, a YAML file or the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.files import reason
from trtllm_vattn.sizes import parse_bytes

ENVIRONMENT = "VATTN_TRTLLM"
"""The environment variable with all settings as JSON; the launcher sets it for the processes it starts."""
SECTION = "vattn"
"""The section of a YAML file with the settings; a file without it holds nothing else."""


@dataclass(frozen=True)
class TrtllmConfig:
    """Settings of the fixed-address KV cache under TensorRT-LLM.

    Parameters
    ----------
    budget : int or None
        Bytes of physical memory on each GPU, or text such as ``"40GiB"``. None is what TensorRT-LLM itself would take
        (by ``free_gpu_memory_fraction`` and ``max_tokens``) once its graphs are captured.
    layers_per_range : int or None
        Layers of one pool; None is all of them.
    lookahead : int or None
        Tokens that are mapped before a request needs them; None is one block.
    any_version : bool
        Accept versions of TensorRT-LLM whose interface was not recorded.
    allow_stock : bool
        Where TensorRT-LLM uses a KV cache manager that the adapter does not replace (AutoDeploy, a hybrid model, …),
        log a warning and carry on with it. By default that is an error.

    Raises
    ------
    ConfigError
        A value is out of its range.
    """

    budget: int | str | None = None
    layers_per_range: int | None = None
    lookahead: int | None = None
    any_version: bool = False
    allow_stock: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", parse_bytes(self.budget))
        for name, least in (("budget", 1), ("layers_per_range", 1), ("lookahead", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}, or left out")
        for name in ("any_version", "allow_stock"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")

    @property
    def budget_bytes(self) -> int | None:
        """`budget` as a number."""
        return None if self.budget is None else int(self.budget)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrtllmConfig:
        """From a mapping of field names to values. Raises ConfigError for an unknown name."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"no setting {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**settings)

    @classmethod
    def from_yaml(cls, path: Path) -> TrtllmConfig:
        """From the section ``vattn`` of a YAML file, or from all of a file without it. Raises ConfigError."""
        try:
            import yaml
        except ImportError as error:
            raise ConfigError("reading YAML needs PyYAML: pip install pyyaml, or give keywords instead") from error
        try:
            found = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read settings from {path}: {reason(error)}") from error
        section = found.get(SECTION, found) if isinstance(found, dict) else found
        if not isinstance(section, dict):
            raise ConfigError(
                f"{path} holds {type(section).__name__}, not settings; write `{SECTION}:` and names below"
            )
        return cls.of(section)

    @classmethod
    def from_environment(cls) -> TrtllmConfig:
        """From the environment variable ``VATTN_TRTLLM``; the defaults without it. Raises ConfigError."""
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
        return {ENVIRONMENT: json.dumps({k: v for k, v in asdict(self).items() if v is not None and v is not False})}
