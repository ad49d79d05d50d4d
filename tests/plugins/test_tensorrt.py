"""Finding TensorRT, and the names that tensorrt-rtx's library wants to be found by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trtllm_vattn.errors import ConfigError
from trtllm_vattn.plugins import tensorrt
from trtllm_vattn.plugins.tensorrt import MODULES, available, link_folder, load_tensorrt


def test_unversioned_links_point_at_the_wheels_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for version in ("1", "2"):
        libraries = tmp_path / f"libraries-{version}"
        libraries.mkdir()
        for name in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
            (libraries / f"{name}.{version}").write_bytes(b"")
        folder = link_folder(libraries)
        assert (folder / "libtensorrt_rtx.so").readlink() == libraries / f"libtensorrt_rtx.so.{version}"
        assert sorted(path.name for path in folder.iterdir()) == ["libtensorrt_onnxparser_rtx.so", "libtensorrt_rtx.so"]


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no TensorRT module 'onnxruntime'; there are auto, tensorrt, tensorrt_rtx"):
        load_tensorrt("onnxruntime")
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorrt and tensorrt_rtx: not installed; pip install"):
        load_tensorrt()
    assert all(text.startswith("no: ") for text in available().values())


def test_a_module_without_plugins_of_version_3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "8.6"

    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: Old)
    with pytest.raises(ConfigError, match=r"tensorrt 8\.6 has no IPluginV3; install version 10 or newer"):
        load_tensorrt("tensorrt")


def test_the_installed_module_is_found(rtx: Any) -> None:
    assert load_tensorrt("tensorrt_rtx") is rtx
    assert set(available()) == set(MODULES)
    assert available()["tensorrt_rtx"] == str(rtx.__version__)
