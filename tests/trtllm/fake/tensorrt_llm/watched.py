"""Which names of a stand-in somebody outside of it uses."""

from __future__ import annotations

import sys
from typing import Any, ClassVar


class Watched:
    """Notes attributes that are read or set by code of the package under test."""

    used: ClassVar[set[str]]

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "used" not in cls.__dict__ and not hasattr(cls, "used"):
            cls.used = set()

    def __getattribute__(self, name: str) -> Any:
        _note(type(self), name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        _note(type(self), name)
        super().__setattr__(name, value)


def _note(cls: type[Watched], name: str) -> None:
    caller = sys._getframe(2)
    if "/trtllm_vattn/" in caller.f_code.co_filename and not name.startswith("__"):
        cls.used.add(name)
