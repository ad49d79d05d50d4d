"""`TenantConfig`: how a process becomes a broker's tenant."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.sizes import parse_bytes
from trtllm_vattn.values import described, shown, whole

_NAME = re.compile(r"[A-Za-z0-9._:@+-]{1,200}")


@dataclass(frozen=True)
class TenantConfig:
    """How a process becomes a broker's tenant.

    Parameters
    ----------
    path : str
        Of the broker's socket.
    name : str or None
        By which the broker's operator knows the tenant, one process at a time: letters, digits and ``._:@+-``. None is
        ``pid-`` and the process's number.
    floor, ceiling : int, str or None
        Bytes (``"10GiB"`` too) that the tenant asks to be promised, and that it holds at most (None is all); limits
        that the broker's operator set for the name hold instead.
    priority : int
        Tenants of higher priority get first what is beyond floors.

    Raises
    ------
    ConfigError
        A setting is of the wrong type or out of its range.
    """

    path: str
    name: str | None = None
    floor: int | str = 0
    ceiling: int | str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not str(self.path):
            raise ConfigError(f"a broker's path is {described(self.path)}; give that of its Unix socket")
        if self.name is not None and (not isinstance(self.name, str) or not _NAME.fullmatch(self.name)):
            raise ConfigError(f"a tenant's name is {shown(self.name)}; give letters, digits and ._:@+-, 200 at most")
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "floor", parse_bytes(self.floor, "floor"))
        if self.ceiling is not None:
            object.__setattr__(self, "ceiling", parse_bytes(self.ceiling, "ceiling"))
        whole("priority", self.priority, -1000, 1000)
