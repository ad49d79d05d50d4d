"""Every Triton kernel compiled, without a GPU, for the compute capabilities that it may run on: it compiles, and takes
no more shared memory than there is, nor more registers than is stated (compile_probe.py). tests/README.md says how to
run it where triton is not installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from probing import probe

PROBE = Path(__file__).with_name("compile_probe.py")
CASES = "all" if os.environ.get("VATTN_THOROUGH") else "some"


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0"])
def test_every_kernel_compiles_and_fits(capability: str) -> None:
    probe(PROBE, capability, CASES, interpreted=False)
