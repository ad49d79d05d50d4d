"""The package is what the tree is, and imports only point down."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"graphs": "trtllm_vattn.graphs", "plugins": "trtllm_vattn.plugins"}
LAYERS = [
    "errors",
    "lost",
    "values",
    "files",
    "planner",
    "sizes",
    "arguments",
    "machine",
    "table",
    "progress",
    "trace",
    "vmm",
    "memory",
    "tenancy",
    "cache",
    "transfer",
    "graphs",
    "attention",
    "runtime",
    "observe",
    "serve",
    "trtllm",
    "plugins",
    "verify",
    "bench",
    "cli",
]
"""From the bottom up; a module may import its own layer and those before it."""


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a module."""
    return list(ast.walk(ast.parse(path.read_text())))


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
    for node in nodes_of(path):
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
def test_public_names_are_documented(name: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} says nothing of itself"


LONGEST_FUNCTION = 75
"""Lines of a function, without its docstring and the classes inside it. A Triton kernel cannot be divided."""


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    statements = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    inner = sum(
        (node.end_lineno or 0) - node.lineno + 1 for node in ast.walk(function) if isinstance(node, ast.ClassDef)
    )
    return (function.end_lineno or 0) - statements[0].lineno + 1 - inner


@pytest.mark.parametrize(("name", "path"), sorted(modules().items()))
def test_functions_fit_a_screen(name: str, path: Path) -> None:
    functions = (node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    written = [each for each in functions if not any("triton.jit" in ast.unparse(each) for each in each.decorator_list)]
    long = {each.name: lines_of(each) for each in written if lines_of(each) > LONGEST_FUNCTION}
    assert not long, f"{name}: {long}"


def imported(path: Path, known: set[str]) -> set[str]:
    """The project's modules that a module imports when it is imported itself."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                found.update(each for name in node.names if (each := f"{node.module}.{name.name}") in known)
                found.update({node.module} & known)
            elif isinstance(node, ast.Import):
                found.update({name.name for name in node.names} & known)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
                visit([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])

    visit(ast.parse(path.read_text()).body)
    return found


def test_no_module_imports_itself_by_a_detour() -> None:
    found = modules()
    # A package's __init__ only names what its modules hold.
    graph = {
        name: {each for each in imported(path, set(found)) if found[each].name != "__init__.py"}
        for name, path in found.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for each in sorted(graph[name]):
                visit(each, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize(("name", "path"), sorted(modules().items()))
def test_no_private_name_of_another_package_is_imported(name: str, path: Path) -> None:
    own = name.split(".")[:2]
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trtllm_vattn."):
            private = [each.name for each in node.names if each.name.startswith("_")]
            assert not private or (node.module or "").split(".")[:2] == own, (
                f"{name} imports {private} of {node.module}"
            )


SCRIPTS = {f"scripts.{path.stem}": path for path in (ROOT / "scripts").rglob("*.py")}
THEIRS = {
    "torch": {"_C", "_cdata", "_compiled_call_impl", "_dynamo", "_parameters", "_sleep", "_version", "_InferenceMode"}
    | {"_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_index_put_impl_"}
    | {"_schema", "_unsafe_index", "_unsafe_index_put"},
    "transformers": {"_attn_implementation", "_model_mapping", "_supports_attention_backend"},
    "argparse": {"_SubParsersAction"},
    "os": {"_exit"},
    "atexit": {"_run_exitfuncs"},
    "vllm": {"_vllm_fa3_C"},
    # Public, and named so that no field is hidden by it.
    "collections.namedtuple": {"_replace"},
}
"""Private names of others that have no public counterpart."""


def package_of(name: str) -> str:
    return name.rpartition(".")[0]


@cache
def private_names(path: Path) -> set[str]:
    """Private names that a module defines, as a function, a class, a variable or an attribute of `self`."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return {name for name in found if name.startswith("_")}


@pytest.mark.parametrize(("name", "path"), sorted({**modules(), **SCRIPTS}.items()))
def test_no_private_attribute_of_another_package_is_used(name: str, path: Path) -> None:
    known = set().union(*THEIRS.values())
    for other, file in {**modules(), **SCRIPTS}.items():
        if package_of(other) == package_of(name):
            known = known | private_names(file)
    for node in nodes_of(path):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            own = ast.unparse(node.value) in ("self", "cls", "super()")
            assert own or node.attr in known, f"{name}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(("name", "path"), sorted({**modules(), **SCRIPTS}.items()))
def test_above_the_cache_only_the_contract_of_caches_is_used(name: str, path: Path) -> None:
    """Nothing asks whether a cache is a `KVCacheManager`, or reaches for the arena inside it."""
    below = name.startswith(("trtllm_vattn.cache", "trtllm_vattn.memory", "trtllm_vattn.tenancy"))
    for node in nodes_of(path):
        where = f"{name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            is_asked = "KVCacheManager" in ast.unparse(node.args[1])
            assert name.startswith("trtllm_vattn.cache") or not is_asked, f"{where}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr == "arena":
            assert below, f"{where}: {ast.unparse(node)}"


def test_it_is_typed_and_licensed() -> None:
    assert (ROOT / "trtllm_vattn" / "py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
