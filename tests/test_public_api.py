"""What `from trtllm_vattn import ...` gives, and that it costs nothing before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import trtllm_vattn
from trtllm_vattn import errors

DOCUMENT = Path(__file__).resolve().parents[1] / "trtllm_vattn" / "README.md"


@pytest.mark.parametrize("name", trtllm_vattn.__all__)
def test_every_public_name_is_what_its_module_calls_it(name: str) -> None:
    value = getattr(trtllm_vattn, name)
    assert value.__name__ == {"OutOfPages": "KVCacheOutOfMemory"}.get(name, name)
    assert getattr(sys.modules[value.__module__], name) is value
    assert name in dir(trtllm_vattn)


def test_every_error_is_public() -> None:
    raised = {
        value.__name__
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.VattnError)
    }
    assert raised <= set(trtllm_vattn.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'trtllm_vattn' has no attribute 'Engin'"):
        trtllm_vattn.Engin  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Engin'"):
        exec("from trtllm_vattn import Engin")


def test_importing_the_package_loads_no_torch_until_a_name_is_used() -> None:
    script = (
        "import sys, trtllm_vattn\n"
        "dir(trtllm_vattn)\n"
        "from trtllm_vattn import ConfigError, install\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'tensorrt_llm'} & set(sys.modules)))\n"
        "from trtllm_vattn import KVCacheManager\n"
        "print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "True"]


def test_the_document_lists_the_public_names() -> None:
    section = DOCUMENT.read_text().split("\n## Public API\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    named.append("OutOfPages")
    assert sorted(named) == sorted(trtllm_vattn.__all__)
