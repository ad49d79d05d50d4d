"""Installed, the stand-in's own way to a manager leads to ours; uninstalled, nothing is left; elsewhere it is inert."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trtllm_shape import DOUBLE, SHAPE

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import TrtllmConfig, install, uninstall
from trtllm_vattn.trtllm.features import UnsupportedFeature
from trtllm_vattn.trtllm.installation import HOOK, TARGET, environment_for

RunApart = Callable[..., subprocess.CompletedProcess[str]]


def start(double: SimpleNamespace, util: Any, model: Any = None, **llm_args: Any) -> tuple[Any, bool]:
    """What `create_py_executor` does with the names of `_util`."""
    creator = util.KvCacheCreator(
        model_config=model or SimpleNamespace(),
        llm_args=SimpleNamespace(cache_transceiver_config=llm_args.get("transceiver")),
        kv_cache_config=double.managers.KvCacheConfig(),
        mapping=double.managers.Mapping(),
        dtype=double.bindings.DataType.FLOAT,
        **SHAPE,
    )
    estimating = creator.try_prepare_estimation()
    resources: dict[str, Any] = {}
    creator.build_managers(resources, estimating)
    executor = util.PyExecutor(resources["kv"], 4) if hasattr(resources["kv"], "vattn_size") else None
    if executor:
        executor.start_worker()
    return resources["kv"], estimating


def test_a_start_makes_our_manager_once_and_sizes_it_last(
    double: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert install(lookahead=32)
    util = importlib.import_module(TARGET)
    manager, estimating = start(double, util)
    try:
        assert not estimating
        assert isinstance(manager, double.managers.KVCacheManager)
        assert manager._vattn_settings == TrtllmConfig(lookahead=32)
        assert manager._vattn_sized
        assert manager._vattn_target == manager.stock_blocks * manager._vattn_pages.block_bytes
    finally:
        manager.shutdown()
        manager._vattn_pages.cache.driver.close()
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("trtllm-vattn is installed in process" in text for text in said)
    assert any("KV cache at fixed addresses" in text for text in said)


def test_uninstalled_everything_is_as_it_was(double: SimpleNamespace) -> None:
    util = importlib.import_module(TARGET)
    names = [(util, "get_kv_cache_manager_cls"), (util.PyExecutor, "start_worker")]
    names += [(util.KvCacheCreator, name) for name in ("__init__", "try_prepare_estimation")]
    before = [getattr(*place) for place in names]
    environment = dict(os.environ)
    install()
    assert all(getattr(*place) is not was for place, was in zip(names, before, strict=True))
    assert os.environ["PYTHONPATH"].startswith(str(HOOK))
    install(budget="1GiB")  # again, with other settings
    uninstall()
    uninstall()
    assert [getattr(*place) for place in names] == before
    assert dict(os.environ) == environment
    manager, estimating = start(double, util)
    assert estimating
    assert type(manager) is double.managers.KVCacheManager


def test_classes_that_we_do_not_know_are_refused(double: SimpleNamespace) -> None:
    util = importlib.import_module(TARGET)
    install()
    hybrid = type("MambaHybridCacheManager", (double.managers.KVCacheManager,), {})
    with pytest.raises(UnsupportedFeature, match="a MambaHybridCacheManager, of which"):
        start(double, util, SimpleNamespace(manager=hybrid))
    with pytest.raises(UnsupportedFeature, match="disaggregated serving"):
        start(double, util, transceiver=object())


def test_another_util_is_refused(double: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    util = importlib.import_module(TARGET)
    monkeypatch.delattr(util, "get_kv_cache_manager_cls")
    with pytest.raises(ConfigError, match="has no get_kv_cache_manager_cls"):
        install()


def test_without_tensorrt_llm_it_is_inert(run_apart: RunApart) -> None:
    code = "import trtllm_vattn.trtllm as t, os; print(t.install(budget=1), 'VATTN_TRTLLM' in os.environ)"
    done = run_apart(code)
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert "nothing to do" in done.stderr


SCRIPT = f"""
import sys
assert "torch" not in sys.modules, "the hook is heavy"
sys.path.insert(0, {str(DOUBLE)!r})
import {TARGET} as util
print(util.get_kv_cache_manager_cls(None).__name__)
"""


def run_command(*flags: str, script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtllm_vattn", "run", *flags, "--", sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def test_the_launcher_reaches_the_processes_of_its_command() -> None:
    # As MPI and Ray do: a process that a process of the command starts.
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SCRIPT!r}], check=True)"
    for script in (SCRIPT, nested):
        done = run_command("--budget", "2GiB", script=script)
        assert done.stdout.split() == ["FixedAddressKVCacheManager"], done.stderr
        assert "budget=2147483648" in done.stderr


def test_the_hook_is_inert_elsewhere_and_runs_who_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the other one')")
    script = "import sys; print(any(type(f).__name__ == '_Watch' for f in sys.meta_path), 'torch' in sys.modules)"
    done = run_command(script=script, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines() == ["the other one"] * 2 + ["True False"], done.stderr
    assert done.stderr == ""
    bare = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(HOOK)},
    )
    assert bare.stdout.split() == ["False", "False"]


def test_the_launcher_says_what_is_wrong() -> None:
    def failing(*arguments: str) -> str:
        command = [sys.executable, "-m", "trtllm_vattn", "run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "trtllm-vattn run -- trtllm-serve MODEL" in failing()
    assert "cannot run no-such-command" in failing("--", "no-such-command")
    assert "'much' is no number of bytes" in failing("--budget", "much", "--", "true")


def test_settings_come_from_a_file_and_flags_over_it(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "serve.yaml"
    path.write_text("vattn:\n  budget: 3GiB\n  lookahead: 64\n")
    script = "import os; print(os.environ['VATTN_TRTLLM'], os.environ['TLLM_WORKER_USE_SINGLE_PROCESS'])"
    done = run_command("--config", str(path), "--lookahead", "32", "--single-process", script=script)
    assert done.stdout.strip() == '{"budget": 3221225472, "lookahead": 32} 1', done.stderr


def test_the_environment_carries_all_settings() -> None:
    config = TrtllmConfig(budget=5 << 30, layers_per_range=4, lookahead=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_for(config).items():
            patch.setenv(name, value)
        assert TrtllmConfig.from_environment() == config
        assert environment_for(config)["PYTHONPATH"].count(str(HOOK)) == 1
        patch.setenv("VATTN_TRTLLM", "[1]")
        with pytest.raises(ConfigError, match="must be an object"):
            TrtllmConfig.from_environment()
        patch.setenv("VATTN_TRTLLM", "{")
        with pytest.raises(ConfigError, match="not JSON"):
            TrtllmConfig.from_environment()


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"bugdet": 1}, "no setting bugdet; there are budget, layers_per_range, lookahead"),
        ({"budget": "12 apples"}, "write 17179869184 or 16GiB"),
        ({"lookahead": -1}, "lookahead is -1"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        TrtllmConfig.of(settings)


def test_files_that_cannot_work(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(ConfigError, match="cannot read settings"):
        TrtllmConfig.from_yaml(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list, not settings"):
        TrtllmConfig.from_yaml(path)
    path.write_text("budget: 512 MiB\n")
    assert TrtllmConfig.from_yaml(path) == TrtllmConfig(budget=512 << 20)


def test_importing_the_ray_extension_installs(run_apart: RunApart) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(DOUBLE)!r})
from trtllm_vattn.trtllm.ray_extension import WorkerExtension
import {TARGET} as util
print(util.get_kv_cache_manager_cls(None).__name__)
try:
    WorkerExtension().vattn_set_budget(1 << 30)
except ValueError as error:
    print("no fixed-address KV cache lives in this process" in str(error))
"""
    done = run_apart(code)
    assert done.stdout.split() == ["FixedAddressKVCacheManager", "True"], done.stderr
