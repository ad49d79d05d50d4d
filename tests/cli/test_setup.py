"""scripts/setup.sh with a stand-in for Python, which notes what it is asked for: steps, interruptions, failures."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/usr/bin/env bash
echo "$*" | head -n 1 >> "$LOG"
case "$*" in
--version) echo "Python 3.11.7" ;;
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*"import torch"*) test -e .venv/torch ;;
*find_spec*) test -e .venv/torch && test -e .venv/project ;;
*"show -q torch"*) test -e .venv/torch ;;
*"install"*$FAILS*) echo "no such wheel"; exit 7 ;;
*"install"*torch==*) touch .venv/torch ;;
*"install -e"*) touch .venv/project ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    stub = tmp_path / "stub"
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    (tmp_path / "bin").mkdir()
    # No GPU, whatever this machine has.
    gpu = tmp_path / "bin" / "nvidia-smi"
    gpu.write_text("#!/bin/sh\nexit 1\n")
    gpu.chmod(0o755)
    return tmp_path


def set_up(project: Path, fails: str = "nothing", python: str = "") -> tuple[int, str, str]:
    """Exit code, what it said, and what Python was asked for."""
    log = project / "log"
    log.write_text("")
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": python or str(project / "stub"), "LOG": str(log)}
    command = ["bash", "-c", "set -euo pipefail; source scripts/setup.sh; echo ready"]
    done = subprocess.run(
        command,
        cwd=project,
        env={**environment, "FAILS": fails},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == (done.stdout == "ready\n"), done
    return done.returncode, done.stderr, log.read_text()


def test_setting_up_says_each_step_and_is_done_once(project: Path) -> None:
    code, said, _ = set_up(project)
    assert code == 0
    for number, what in enumerate(
        (".venv, with Python 3.11.7", "setuptools", "torch for the CPU (about 200 MB", "this project"), 1
    ):
        assert f"setup: {number} of 4: {what}" in said
    code, said, asked = set_up(project)
    assert (code, said) == (0, "")
    assert "install" not in asked


@pytest.mark.parametrize("left", ["an empty folder", "a link to nowhere", "a Python that does not start"])
def test_what_an_interrupted_run_left_is_made_again(project: Path, left: str) -> None:
    if left == "a link to nowhere":
        (project / ".venv").symlink_to(project / "nowhere")
    else:
        (project / ".venv" / "bin").mkdir(parents=True)
    if left == "a Python that does not start":
        (project / ".venv/bin/python").symlink_to("/nowhere/python3")
    code, said, asked = set_up(project)
    assert code == 0
    assert "setup: .venv is there and does not work" in said
    assert "-m venv" in asked


def test_an_interrupted_install_is_gone_on_with(project: Path) -> None:
    code, said, _ = set_up(project, fails="-e")
    assert code == 7
    assert "no such wheel" in said
    code, said, asked = set_up(project)
    assert code == 0
    assert "1 of 4: .venv is there" in said
    assert "3 of 4: torch is there" in said
    assert "-m venv" not in asked
    # And where something is gone afterwards.
    (project / ".venv/torch").unlink()
    code, said, _ = set_up(project)
    assert code == 0
    assert "3 of 4: torch for the CPU" in said


def test_without_a_python_it_says_so(project: Path) -> None:
    code, said, _ = set_up(project, python="python-that-is-not-there")
    assert code == 1
    assert said == "setup: there is no python-that-is-not-there; install Python 3.10 or newer, or set PYTHON\n"
