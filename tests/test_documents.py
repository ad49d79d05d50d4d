"""Documents are held to what they speak of: links, anchors, tests, pictures, walks, and the lines to try."""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_vattn.cli.parser import build_parser
from trtllm_vattn.graphs.guard import Guard
from trtllm_vattn.graphs.host_graph import HostGraph
from trtllm_vattn.runtime import Engine, SamplingParams
from trtllm_vattn.runtime.features import feature_table
from trtllm_vattn.vmm.host import HostDriver

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "out", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def prose(path: Path) -> str:
    """A document without its fenced code."""
    return _FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_documents_are_those_that_are_linked_from_the_readme() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([\w/]+\.md)", (ROOT / "README.md").read_text())}
    assert set(DOCUMENTS) - {ROOT / "README.md"} == linked


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_anchor_leads_somewhere(name: str) -> None:
    document = ROOT / name
    for groups in _LINK.findall(prose(document)):
        target = groups[0] or groups[1]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{target}: {there.name} has {sorted(anchors(there))}"


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_is_named_exists(name: str) -> None:
    for file, function in _TEST.findall(prose(ROOT / name)):
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in defined, f"{file} has no {function}"


def test_every_rule_invariant_and_promise_names_a_test() -> None:
    rows = re.findall(r"^\| ([RIC]\d+) \|.*$", (ROOT / "trtllm_vattn/memory/DESIGN.md").read_text(), re.MULTILINE)
    assert rows == [*(f"R{n}" for n in range(1, 11)), *(f"I{n}" for n in range(1, 8)), *(f"C{n}" for n in range(1, 6))]
    for line in (ROOT / "trtllm_vattn/memory/DESIGN.md").read_text().splitlines():
        if re.match(r"\| [RIC]\d+ \|", line):
            assert "::test_" in line, line


@pytest.mark.parametrize("name", NAMES)
def test_python_in_documents_is_python(name: str) -> None:
    for source in blocks(ROOT / name, "python"):
        ast.parse(source)


def test_the_matrix_of_features_is_the_one_that_is_tried() -> None:
    assert feature_table() in (ROOT / "trtllm_vattn/README.md").read_text()


def commands_in(path: Path) -> list[list[str]]:
    """The words behind `trtllm-vattn` in each command that a document shows. Captions have those of older versions, as
    has what stands in spans as `bench tlb` is told to have been."""
    text = re.sub(r"<details>.*?</details>|<sub>.*?</sub>", "", path.read_text(), flags=re.DOTALL)
    fenced = "\n".join(_FENCE.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    found = [re.findall(r"(?:trtllm-vattn |^(?=bench ))([a-z][^#|;&]*)", line) for line in fenced + spans]
    return [each.split(" -- ")[0].split() for commands in found for each in commands]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A command's own commands, by name."""
    return next((dict(each.choices or {}) for each in parser._actions if each.nargs == argparse.PARSER), {})  # type: ignore[call-overload]


OLDER = ["bench", "tlb"]
"""A command of captions, whose successor scripts/results/README.md names."""


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_flag_that_is_shown_is_there(name: str) -> None:
    for words in commands_in(ROOT / name):
        if words == OLDER:
            continue
        parser, known = build_parser(words[:2], "0"), True
        flags: set[str] = set()
        for word in words:
            if known and (below := subcommands(parser)) and not word.startswith("-"):
                # `broker` has flags of its own, of which this may be a value; NAME stands for any.
                known = word in below
                told = known or parser.prog.endswith(" broker") or not word.islower()
                assert told, f"{name} shows {' '.join(words)}, and there is no {word}"
                parser = below.get(word, parser)  # type: ignore[assignment]
            flags |= {flag for each in parser._actions for flag in each.option_strings}
        shown = {word.partition("=")[0].rstrip(".,)") for word in words if word.startswith("--")}
        assert shown <= flags, f"{name} shows {' '.join(words)}, which has no {', '.join(shown - flags)}"


def test_the_readme_is_short_and_its_picture_small() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    pictures = re.findall(r"(?:src|srcset)=\"([^\"]+)\"", (ROOT / "README.md").read_text())
    sizes = [(ROOT / picture).stat().st_size for picture in pictures]
    assert len(sizes) == 2
    assert max(sizes) < 1 << 20
    assert sum(sizes) < 2 << 20


def test_the_readmes_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    smaller = (
        ("path/to/llama", "tiny-llama"),
        ("max_seqs=32, max_seq_len=8192", 'max_seqs=2, max_seq_len=64, device="cpu"'),
        ("max_tokens=64", "max_tokens=4"),
        ("max_tokens=16", "max_tokens=4"),
    )
    for old, new in smaller:
        assert old in source
        source = source.replace(old, new)
    exec(compile(source, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.endswith("] length") for line in printed[:2]] == [True, True]
    assert [line.split()[0] for line in printed[2:6]] == ["2"] * 4
    assert "AuditReport" in printed[6]


# -- packaging ---------------------------------------------------------------------------------------------------------


def test_the_readme_is_the_description_and_documents_are_not_installed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("trtllm_vattn", "graphs", "plugins"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = "import setuptools.build_meta as b; b.build_wheel('wheel')"
    (tree / "wheel").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (wheel,) = (tree / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "trtllm_vattn/graphs/guard.py" in names
    assert [name for name in names if name.endswith((".md", ".svg"))] == []
    data = ("trtllm_vattn/runtime/tuned/", "trtllm_vattn/planner/")
    assert [name for name in names if name.endswith(".json") and not name.startswith(data)] == []
    assert {f"trtllm_vattn/planner/calibration/{card}.json" for card in ("h100", "h200")} <= set(names)
    assert metadata.endswith((ROOT / "README.md").read_text())


# -- walks -------------------------------------------------------------------------------------------------------------


def walk(title: str) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """The packages of a walk in trtllm_vattn/README.md, each with its files and their functions."""
    document = ROOT / "trtllm_vattn" / "README.md"
    section = document.read_text().split(f"### {title}\n")[1].split("\n##")[0]
    packages = []
    for package, functions, _ in re.findall(r"^\| (\w+) \| (.*?) \| (.*) \|$", section, re.MULTILINE)[1:]:
        files = re.findall(r"\[[\w.]+\]\(([\w./]+)\): ((?:`\w+`(?:, )?)+)", functions)
        found = [(file.removeprefix("../"), re.findall(r"`(\w+)`", names)) for file, names in files]
        packages.append((package, found))
    return packages


CALLED_THROUGH = {"uninterrupted", "on_stream", "_run", "_uninterrupted", "at_once"}
"""Functions that make a call for their caller: so that no signal cuts it short (vmm/uninterrupted.py), on a stream
(vmm/tensors.py), or with the cache noting that it is under way. They are no package that a walk goes through."""


def stack() -> list[tuple[str, str]]:
    """The functions of ours that are being called now, the outermost first: file and name."""
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = any(path.is_relative_to(ROOT / package) for package in ("trtllm_vattn", "graphs", "plugins"))
        name = frame.f_code.co_name
        # Comprehensions have frames of their own before 3.12.
        if ours and not name.startswith("<") and name not in CALLED_THROUGH:
            found.append((path.name, name))
        frame = frame.f_back
    return found[::-1]


def run_an_engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, str]]]:
    """Generate a few tokens; the first call stack of a mapping, and of a step's lengths, guard and replay."""
    stacks: dict[str, list[tuple[str, str]]] = {}

    def watch(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            now = stack()
            in_pass = ("passes.py", "launch") in now
            if recording and (name == "map" or (("engine.py", "_step") in now and not in_pass)):
                stacks.setdefault(name, [*now, (Path(sys.modules[owner.__module__].__file__ or "").name, name)])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    recording: list[bool] = []
    with Engine.from_pretrained("tiny-llama", device="cpu", dtype=torch.float32, max_seqs=2, max_seq_len=64) as engine:
        for owner, name in ((HostDriver, "map"), (type(engine.cache), "prepare_step"), (Guard, "check")):
            watch(owner, name)
        watch(HostGraph, "replay")
        recording.append(True)
        # In the main thread a helper thread makes the calls that change the cache (vmm/uninterrupted.py), and the stack
        # would begin there.
        run = threading.Thread(target=engine.generate, args=([[1, 2, 3]], SamplingParams(max_tokens=4)))
        run.start()
        run.join()
    return stacks


def test_a_walk_is_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = run_an_engine(monkeypatch)
    down = walk("From `Engine.generate` to `cuMemMap`")
    step = walk("From a step's lengths to the replay")
    for packages in (down, step):
        names = [package for package, _ in packages]
        assert len(names) <= 7
        assert len(set(names)) == len(names), "a package is entered twice"
        for package, files in packages:
            assert files, f"the package {package} names no file"
            assert all(file.split("/")[0] == package for file, _ in files)
    # On the host the last file is another driver's; and the watcher stands where its caller called it.
    told = [(Path(file).name, name) for _, files in down for file, names in files for name in names]
    assert told[-1] == ("cuda.py", "map")
    assert stacks["map"] == [*told[:-1], ("host.py", "map")]
    told = [(Path(file).name, name) for _, files in step for file, names in files for name in names]
    for name, last in (("prepare_step", "manager.py"), ("check", "guard.py"), ("replay", "host_graph.py")):
        done = stacks[name][stacks[name].index(("engine.py", "_step")) :]
        assert done[-1][1] == name
        steps = [told.index(each) for each in [*done[:-1], (last, name)]]
        assert steps == sorted(steps), f"the walk has another order than the run: {done}"
