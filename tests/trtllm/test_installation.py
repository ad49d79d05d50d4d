"""Installed, the fake's own way to a manager leads to ours; uninstalled, nothing is left; elsewhere it is inert."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forking
import pytest
from trtllm_shape import FAKE, SHAPE, VERSIONS

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.trtllm import TrtllmConfig, install, uninstall
from trtllm_vattn.trtllm.features import UnsupportedFeature
from trtllm_vattn.trtllm.installation import FALLBACK, HOOK, TARGET, environment_for

RunApart = Callable[..., subprocess.CompletedProcess[str]]


def creator(fake: SimpleNamespace, model: Any = None, config: Any = None, **named: Any) -> Any:
    """What `create_py_executor` makes first."""
    transceiver = named.pop("transceiver", None)
    return fake.util.KvCacheCreator(
        model_config=model or SimpleNamespace(),
        llm_args=SimpleNamespace(cache_transceiver_config=transceiver),
        kv_cache_config=config or fake.managers.KvCacheConfig(),
        mapping=fake.managers.Mapping(),
        dtype=fake.bindings.DataType.FLOAT,
        **SHAPE,
        **named,
    )


@pytest.fixture
def start(fake: SimpleNamespace) -> Iterator[Callable[..., tuple[Any, bool]]]:
    """Runs a start as TensorRT-LLM does; gives the executor's manager and whether its size was estimated first."""
    made = []

    def run(*arguments: Any, **named: Any) -> tuple[Any, bool]:
        executor, estimating = fake.util.create_py_executor(creator(fake, *arguments, **named))
        made.append(executor.kv_cache_manager)
        return executor.kv_cache_manager, estimating

    yield run
    for manager in made:
        manager.shutdown()


@pytest.mark.parametrize("series", list(VERSIONS))
def test_a_start_makes_our_manager_once_and_sizes_it_last(
    fake: SimpleNamespace, start: Callable[..., tuple[Any, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert install(lookahead=32)
    made = creator(fake)
    assert not caplog.records
    assert not made.try_prepare_estimation()
    manager, estimating = start()
    assert not estimating
    assert isinstance(manager, fake.managers.KVCacheManager)
    assert manager._vattn_config == TrtllmConfig(lookahead=32)
    assert manager.vattn.is_budget_set
    assert manager.vattn.target == manager.stock_blocks * manager.vattn.slots.block_bytes
    said = [record.message for record in caplog.records if "at fixed addresses" in record.message]
    (line,) = said
    assert f"the first at {manager.kv_cache_pool_pointers[0, 0]:#x}; 4 requests of 128 tokens" in line


@pytest.mark.parametrize("series", list(VERSIONS))
def test_the_users_limit_on_bytes_is_heeded(
    fake: SimpleNamespace, start: Callable[..., tuple[Any, bool]], series: str
) -> None:
    """The estimate that would have heeded it is skipped."""
    install()
    config = fake.managers.KvCacheConfig(max_gpu_total_bytes=150_000)
    assert start(config=config)[0].vattn.target == 150_000
    assert config.max_gpu_total_bytes == 150_000
    install(budget=200_000)
    assert start(config=config)[0].vattn.target == 150_000
    assert start(config=fake.managers.KvCacheConfig())[0].vattn.target == 200_000


@pytest.mark.parametrize("series", ["1.2", "1.4.0rc"])
def test_uninstalled_everything_is_as_it_was(
    fake: SimpleNamespace, start: Callable[..., tuple[Any, bool]], series: str
) -> None:
    util = fake.util
    names = [(util, "get_kv_cache_manager_cls"), (util.PyExecutor, "start_worker")]
    names += [(util.KvCacheCreator, name) for name in ("__init__", "try_prepare_estimation")]
    names += [(util.KvCacheCreator, FALLBACK)] if series != "1.2" else []
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
    manager, estimating = start()
    assert estimating
    assert type(manager) is fake.managers.KVCacheManager


def test_classes_that_we_do_not_know_are_refused(
    fake: SimpleNamespace, start: Callable[..., tuple[Any, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    install()
    hybrid = type("MambaHybridCacheManager", (fake.managers.KVCacheManager,), {})
    with pytest.raises(UnsupportedFeature, match=r"a MambaHybridCacheManager, of which.*--allow-stock"):
        start(SimpleNamespace(manager=hybrid))
    with pytest.raises(UnsupportedFeature, match="disaggregated serving"):
        start(transceiver=object())
    install(allow_stock=True)
    manager, estimating = start(SimpleNamespace(manager=hybrid))
    assert type(manager) is hybrid
    assert estimating
    assert "runs on TensorRT-LLM's own MambaHybridCacheManager" in caplog.text
    assert "carrying on with it, as allow_stock says" in caplog.text
    assert "requests of" not in caplog.text


def test_another_util_is_refused(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = fake.executor.PyExecutor
    before = executor.start_worker
    for owner, name, told in (
        (fake.util, "get_kv_cache_manager_cls", r"_util of the installed TensorRT-LLM has no get_kv_cache_manager"),
        (fake.util.KvCacheCreator, "try_prepare_estimation", "KvCacheCreator of .* has no try_prepare_estimation"),
        (executor, "start_worker", "PyExecutor of .* has no start_worker"),
    ):
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            with pytest.raises(ConfigError, match=told):
                install()
        assert executor.start_worker is before
        assert "VATTN_TRTLLM" not in os.environ
    monkeypatch.setitem(sys.modules, TARGET, None)
    with pytest.raises(ConfigError, match=r"_util of the installed TensorRT-LLM is not there.*install one of these"):
        install()


def test_without_tensorrt_llm_it_is_inert(run_apart: RunApart) -> None:
    code = "import trtllm_vattn.trtllm as t, os; print(t.install(budget=1), 'VATTN_TRTLLM' in os.environ)"
    done = run_apart(code)
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert "nothing to do" in done.stderr


SCRIPT = f"""
import sys
assert "torch" not in sys.modules, "the hook is heavy"
sys.path.insert(0, {str(FAKE)!r})
import {TARGET} as util
print(util.get_kv_cache_manager_cls(None).__name__)
"""


def run_command(
    *flags: str, script: str = SCRIPT, python: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [python or forking.python(), "-m", "trtllm_vattn", "run", *flags, "--", sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def test_the_launcher_reaches_the_processes_of_its_command() -> None:
    # As MPI and Ray do: a process that a process of the command starts.
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SCRIPT!r}], check=True)"
    for script in (SCRIPT, nested):
        done = run_command("--budget", "2GiB", script=script)
        assert done.stdout.split() == ["FixedAddressKVCacheManager"], done.stderr
        assert done.stderr == ""


def test_the_hook_is_inert_elsewhere_and_runs_who_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the other one')")
    script = "import sys; print(any(type(f).__name__ == '_Watch' for f in sys.meta_path), 'torch' in sys.modules)"
    done = run_command(script=script, python=sys.executable, PYTHONPATH=str(tmp_path))
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
        command = [forking.python(), "-m", "trtllm_vattn", "run", *arguments]
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
    done = run_command("--config", str(path), "--any-version", "--allow-stock", "--single-process", script=script)
    assert '"lookahead": 64, "any_version": true, "allow_stock": true} 1' in done.stdout, done.stderr


def test_the_environment_carries_all_settings() -> None:
    config = TrtllmConfig(budget="5GiB", layers_per_range=4, lookahead=0, any_version=True, allow_stock=True)
    assert config.budget == config.budget_bytes == 5 << 30
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
        ({"bugdet": 1}, "no setting bugdet; there are budget, layers_per_range, lookahead, any_version"),
        ({"budget": "12 apples"}, "write 17179869184 or 16GiB"),
        ({"lookahead": -1}, "lookahead is -1"),
        ({"budget": True}, "budget is True"),
        ({"budget": 2.5e9}, "budget is 2500000000.0; it must be a whole number"),
        ({"any_version": "yes"}, "any_version is 'yes'; it must be true or false"),
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
sys.path.insert(0, {str(FAKE)!r})
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
