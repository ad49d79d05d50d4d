from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tenancy.lending import lending

from trtllm_vattn.tenancy.broker import Broker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """One that lends 1 MiB in pages of 4 KiB, and gives tenants 0.2 s to give back what they owe."""
    with lending(tmp_path / "broker", 1 << 20, deadline_s=0.2) as made:
        yield made
