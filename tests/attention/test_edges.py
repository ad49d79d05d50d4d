"""The attention kernels at the edges of what they are given (edges_probe.py), in the interpreter and on the card."""

from __future__ import annotations

from pathlib import Path

import pytest
from probing import probe, probe_on_card

PROBE = Path(__file__).with_name("edges_probe.py")
CASES = ["lengths", "windows", "quiet", "infinite", "prefixes", "scales"]


@pytest.mark.parametrize("case", [*CASES, "far"])
def test_the_kernels_are_right_in_the_interpreter(case: str) -> None:
    probe(PROBE, "cpu", case, interpreted=True)


@pytest.mark.parametrize("case", ["windows", "prefixes"])
def test_loads_by_tma_are_right_in_the_interpreter(case: str) -> None:
    probe(PROBE, "cpu", case, "hopper", interpreted=True)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["hopper", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_right_on_the_card(case: str, path: str) -> None:
    probe_on_card(PROBE, case, path, eight_bits=case == "scales")
