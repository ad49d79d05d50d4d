"""The part of TensorRT's Python interface that plugins are made of, written from the published interface.

`emulated.EmulatedEngine` calls plugins of these classes where no TensorRT is installed, or none that runs on the GPU at
hand. The module itself builds nothing and runs nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

__version__ = "stand-in"


DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT32")
TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW32")
TensorRTPhase = enum.Enum("TensorRTPhase", "BUILD RUNTIME")
PluginFieldType = enum.Enum("PluginFieldType", "CHAR INT32 FLOAT32")


@dataclass(frozen=True)
class PluginField:
    """A name, a buffer, and what is in it."""

    name: str
    data: Any
    type: PluginFieldType


PluginFieldCollection = list


class DimsExprs(list[Any]):
    """Dimensions of an output, to be filled in."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class IPluginV3:
    """Base of plugins."""


class IPluginV3OneCore:
    """A plugin's name and version."""


class IPluginV3OneBuild:
    """A plugin's callbacks while a network is built."""


class IPluginV3OneRuntime:
    """A plugin's callbacks while an engine runs."""


class IPluginCreatorV3One:
    """Base of creators."""


class Registry:
    """Creators by name, version and namespace."""

    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        """False where there is one of that name already."""
        key = (creator.name, creator.plugin_version, namespace)
        return self._creators.setdefault(key, creator) is creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        """None where there is none."""
        return self._creators.get((name, version, namespace))


_registry = Registry()


def get_plugin_registry() -> Registry:
    """The process's registry."""
    return _registry
