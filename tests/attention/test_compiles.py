"""Every Triton kernel compiled, without a GPU, for the compute capabilities that it may run on (compile_probe.py): it
compiles, takes no more shared memory than there is, and spills no more registers than is stated there. tests/README.md
says how to run it where triton is not installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from probing import probe

PROBE = Path(__file__).with_name("compile_probe.py")
CASES, TIMEOUT_S = ("all", 20_000) if os.environ.get("VATTN_THOROUGH") else ("some", 1200)


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0"])
def test_every_kernel_compiles_and_fits(capability: str) -> None:
    probe(PROBE, capability, CASES, interpreted=False, timeout_s=TIMEOUT_S)
