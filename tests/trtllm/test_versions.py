"""Versions that the adapter was not held against are refused, by every way in, and an override lets them by."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from types import SimpleNamespace

import forking
import pytest
from trtllm_shape import FAKE

from trtllm_vattn.cli import doctor
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import install, uninstall
from trtllm_vattn.trtllm.installation import TARGET
from trtllm_vattn.trtllm.versions import series_of

REFUSED = (
    "tensorrt_llm {} is installed, but the fixed-address KV cache was held against 1.2.x, 1.3.0rc* and 1.4.0rc* only"
)


@pytest.mark.parametrize(
    ("version", "series"),
    [
        ("1.2.0", "1.2"),
        ("1.2.1.post1+cu130", "1.2"),
        ("1.3.0rc20", "1.3.0rc"),
        ("1.4.0rc1", "1.4.0rc"),
        ("1.2.0rc3", None),
        ("1.3.0", None),
        ("1.20.0", None),
        ("1.5.0rc0", None),
        ("", None),
    ],
)
def test_the_series_of_a_version(version: str, series: str | None) -> None:
    assert series_of(version) == series


def test_install_refuses_with_the_range_and_the_override(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = sys.modules["tensorrt_llm.version"]
    monkeypatch.setattr(version, "__version__", "1.5.0")
    before = fake.executor.PyExecutor.start_worker
    with pytest.raises(ConfigError) as refused:
        install()
    assert REFUSED.format("1.5.0") in str(refused.value)
    assert "any_version=True (trtllm-vattn run --any-version)" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert fake.executor.PyExecutor.start_worker is before
    assert "VATTN_TRTLLM" not in os.environ
    assert install(any_version=True)
    assert fake.executor.PyExecutor.start_worker is not before
    uninstall()
    monkeypatch.delattr(version, "__version__")
    with pytest.raises(ConfigError, match="tensorrt_llm of no named version"):
        install()


SCRIPT = f"""
import sys
sys.path.insert(0, {str(FAKE)!r})
for attempt in range(2):
    # A second attempt is no way around.
    try:
        import {TARGET} as util
    except ValueError as error:
        print(type(error).__name__, error)
    else:
        print(util.get_kv_cache_manager_cls(None).__name__)
"""


@pytest.mark.parametrize("flags", [[], ["--any-version"]])
def test_the_launchers_processes_refuse_too(flags: list[str]) -> None:
    done = subprocess.run(
        [forking.python(), "-m", "trtllm_vattn", "run", *flags, "--", sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "TRTLLM_FAKE_VERSION": "1.2.0rc9"},
    )
    lines = done.stdout.splitlines()
    if flags:
        assert lines == ["FixedAddressKVCacheManager"] * 2, done.stderr
    else:
        assert len(lines) == 2
        assert all(line.startswith(f"ConfigError {REFUSED.format('1.2.0rc9')}") for line in lines), lines


def test_the_doctor_names_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, works in (("1.4.0rc1", True), ("0.21.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, it=version: it)
        finding = doctor._tensorrt_llm()
        assert (finding.works, finding.detail.split()[0].strip(";")) == (works, version)
    assert "1.2.x, 1.3.0rc* and 1.4.0rc*" in finding.detail
