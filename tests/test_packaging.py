"""The package is what the tree is, and imports only point down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"graphs": "trtllm_vattn.graphs", "plugins": "trtllm_vattn.plugins"}
LAYERS = [
    "errors",
    "values",
    "sizes",
    "vmm",
    "memory",
    "tenancy",
    "cache",
    "graphs",
    "attention",
    "runtime",
    "trtllm",
    "plugins",
    "bench",
    "cli",
]
"""From the bottom up; a module may import its own layer and those before it."""


def modules() -> dict[str, Path]:
    """Every module's full name and its file."""
    found = {}
    for top in ("trtllm_vattn", "graphs", "plugins"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join((MAPPED.get(parts[0], parts[0]), *parts[1:]))
            found[name.removesuffix(".__init__")] = path
    return found


def packages_in_pyproject() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("packages = [") : text.index("[tool.setuptools.package-dir]")]
    return sorted(line.strip().strip('",') for line in listed.splitlines() if line.strip().startswith('"'))


def test_every_package_of_the_tree_is_listed() -> None:
    of_tree = sorted(name for name, path in modules().items() if path.name == "__init__.py")
    assert packages_in_pyproject() == of_tree


@pytest.mark.parametrize(("name", "path"), sorted(modules().items()))
def test_imports_point_down(name: str, path: Path) -> None:
    parts = name.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return
    own = LAYERS.index(parts[1])
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            targets = [node.module or ""]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        for target in targets:
            below = target.split(".")
            if below[0] == "trtllm_vattn" and len(below) > 1:
                assert LAYERS.index(below[1]) <= own, f"{name} imports {target}, which is above it"


@pytest.mark.parametrize(("name", "path"), sorted(modules().items()))
def test_no_file_holds_two_ideas(name: str, path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400, f"{name} is too long"


def test_it_is_typed_and_licensed() -> None:
    assert (ROOT / "trtllm_vattn" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
