"""scripts/gpu with a stand-in for Python: limits, failures, what is said of each part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"""#!/usr/bin/env bash
echo "$TORCHINDUCTOR_CACHE_DIR $PYTHONPYCACHEPREFIX $*" | head -n 1 >> "$LOG"
case "$*" in
*"import card"*) echo h200 ;;
*"import gpu"*) echo 139 ;;
-S*) exec {sys.executable} "$@" ;;
*"bench forks"*) echo '{{"summary": {{"ratio": 1.25, "spread": [1, 2]}}}}' > "${{@: -1}}" ;;
*"bench tiers"*) echo '{{"summary": {{"link": 55.5, "incomplete": ["sleep", "crowd"]}}}}' > "${{@: -1}}"; sleep 60 ;;
*"bench doors"*) echo "trtllm-vattn: no such door"; exit 2 ;;
esac
"""


def run(folder: Path, parts: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit code, lines of its output, and what Python was asked for."""
    stub, log = folder / "python", folder / "log"
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    given = {"PYTHON": str(stub), "LOG": str(log), "TRACES": "traces", "CACHES": str(folder / "caches"), "PARTS": parts}
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu"), str(folder / "out")],
        env={**os.environ, **given, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines() or done.stderr.splitlines(), log.read_text()


def test_each_part_has_a_limit_and_one_that_fails_leaves_the_others_to_run(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "tiers:1 doors forks")
    assert code == 0
    assert said[0].startswith("== tiers, ")
    assert said[0].endswith(" s: cut off at 1 s; INCOMPLETE: sleep,crowd link=55.5")
    assert said[1].endswith(" s: ended with 2; trtllm-vattn: no such door")
    assert said[2].endswith(" s: ratio=1.25")
    assert [line.split("\t")[0] for line in said[4:]] == ["part", "tiers", "doors", "forks"]
    assert said[-1].split("\t")[2] == "ratio=1.25"
    caches = tmp_path / "caches"
    assert f"{caches}/inductor {caches}/bytecode -m trtllm_vattn bench tiers" in asked
    assert (tmp_path / "out" / "doors.log").read_text() == "trtllm-vattn: no such door\n"


def test_what_is_left_of_an_earlier_run_is_not_told_as_this_ones(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = tmp_path / "out" / "doors.json"
    old.write_text('{"summary": {"old": 1}}')
    assert "old" not in " ".join(run(tmp_path, "doors")[1])
    assert old.exists()


def test_nothing_begins_where_no_time_is_left(tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, "forks memory", TOTAL="1")
    assert code == 0
    assert "bench" not in asked
    assert [line.split("\t")[1:] for line in said[-5:]] == [["-", "not begun"]] * 5


@pytest.mark.parametrize("parts", ["forks no-such", "no-such:5"])
def test_an_unknown_part_is_refused_before_anything_runs(parts: str, tmp_path: Path) -> None:
    code, said, asked = run(tmp_path, parts)
    assert (code, "bench" in asked) == (2, False)
    assert said[0].startswith("no part no-such; there are tests ")
