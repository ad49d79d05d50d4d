"""The self-check's verdicts, and its probe over a fake of the LLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.cli.main import main
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import selfcheck


def side(**changes: Any) -> dict[str, Any]:
    usual = dict(tokens=[[1, 2], [3]], start_s=9.0, step_ms=2.0, idle_bytes=5 << 30, busy_bytes=6 << 30)
    return {**usual, **changes}


def verdicts(monkeypatch: pytest.MonkeyPatch, version: str = "1.2.1", **fixed: Any) -> dict[str, bool]:
    monkeypatch.setattr(selfcheck.importlib.metadata, "version", lambda name: version)
    sides = {"stock": side(), "fixed": side(**fixed)}
    return {check.name: check.passed for check in selfcheck.self_check("m", lambda model, kind: sides[kind])}


def test_each_check_fails_for_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(verdicts(monkeypatch).values())
    for changes, failing in (
        ({"tokens": [[1, 2], [4]]}, "tokens"),
        ({"step_ms": 2.2}, "step"),
        ({"busy_bytes": 7 << 30}, "memory"),
        ({"version": "1.3.0"}, "version"),
    ):
        found = verdicts(monkeypatch, **changes)  # type: ignore[arg-type]
        assert [name for name, passed in found.items() if not passed] == [failing]


def test_without_tensorrt_llm_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--trtllm"]) == 2
    assert "tensorrt_llm is not installed" in capsys.readouterr().err


def test_a_side_that_dies_is_quoted() -> None:
    with pytest.raises(ConfigError, match=r"(?s)the stock side ended with 1.*No module named 'tensorrt_llm'"):
        selfcheck.run_probe("model", "stock")


LLM = """
class _Out:
    def __init__(self, ids): self.token_ids = ids
class LLM:
    def __init__(self, **named): self.named = named
    def generate(self, prompts, params):
        assert params.named == {"max_tokens": 64, "temperature": 0.0}
        return [type("Request", (), {"outputs": [_Out([len(prompt)] * 4)]}) for prompt in prompts]
    def shutdown(self): pass
class SamplingParams:
    def __init__(self, **named): self.named = named
"""


def test_the_probe_measures_an_llm(tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text(LLM)
    (package / "llmapi.py").write_text("from types import SimpleNamespace as KvCacheConfig\n")
    (tmp_path / "pynvml.py").write_text(
        "from types import SimpleNamespace as N\n"
        "nvmlInit = nvmlShutdown = lambda: None\n"
        "nvmlDeviceGetHandleByIndex = lambda i: i\n"
        "nvmlDeviceGetMemoryInfo = lambda h: N(used=123)\n"
    )
    command = [sys.executable, "-m", "trtllm_vattn.trtllm.probe", "some-model", "stock"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    found = json.loads(done.stdout)
    assert found["tokens"] == [[24] * 4, [26] * 4, [17] * 4, [31] * 4]
    assert (found["kind"], found["idle_bytes"], found["busy_bytes"]) == ("stock", 123, 123)
    assert found["step_ms"] > 0
