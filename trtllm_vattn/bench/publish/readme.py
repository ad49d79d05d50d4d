"""The documents' tables, made from committed results.

A table stands between ``<!-- table:CARD/NAME -->`` and ``<!-- /table -->``. It is made from the results in the folder
``CARD``, all of which must be of that card, and is followed by a caption: card, date, commit, command, file.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from trtllm_vattn.bench.harness.report import load
from trtllm_vattn.bench.publish.tables import Result, table_of
from trtllm_vattn.errors import ConfigError
from trtllm_vattn.machine import card

_MARKED = re.compile(r"(<!-- table:([\w-]+)/([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_LONGEST_COMMAND = 300
"""Characters of a command in a caption; the whole of it stands in the result."""


def results_of(folder: Path, files: tuple[str, ...]) -> list[Result]:
    """The results in the folder of a card. Raises ConfigError where one is missing or of another card."""
    found = [load(folder / file) for file in files]
    names = {_card_name(result) for result in found}
    for file, result in zip(files, found, strict=True):
        if card(result["machine"]) != folder.name:
            raise ConfigError(
                f"{folder / file} was measured on {_card_name(result)}, whose results belong into the folder "
                f"{card(result['machine'])!r}; move it there"
            )
    if len(names) > 1:
        raise ConfigError(f"{', '.join(files)} in {folder} are of several cards: {', '.join(sorted(names))}")
    return found


def _card_name(result: Result) -> str:
    gpu = result["machine"]["gpu"]
    return gpu["name"] if gpu else f"the host driver, {result['machine']['cpus']} CPUs"


def caption(results: list[Result], links: list[str]) -> str:
    """What a table was measured on and by, below it: card, driver, date, commit, command, file."""
    lines = [_source(result, link) for result, link in zip(results, links, strict=True)]
    first = results[0]["machine"]["gpu"]
    where = f"{_card_name(results[0])}, driver {first['driver']}" if first else _card_name(results[0])
    if len(lines) == 1:
        return f"<sub>{where}; {lines[0]}</sub>"
    items = "\n".join(f"* {line}" for line in lines)
    return f"<details><summary><sub>{where}: dates, commits, commands</sub></summary>\n\n{items}\n\n</details>"


def _source(result: Result, link: str) -> str:
    words = iter(shlex.split(result["command"]))
    kept = []
    for word in words:
        if word in ("--output-json", "--plot"):
            next(words, None)
        else:
            kept.append(word)
    command = shlex.join(kept)
    if len(command) > _LONGEST_COMMAND:
        command = command[: _LONGEST_COMMAND - 4] + " ..."
    return f"{result['started'][:10]}, commit {result['commit']}, `{command}`, [{Path(link).name}]({link})"


def render(text: str, results: Path, folder: Path) -> str:
    """A document with its tables made anew.

    Parameters
    ----------
    results : Path
        The folder that has a folder of results for each card.
    folder : Path
        Where the document lies; its links to results start there.

    Raises
    ------
    ConfigError
        A table is unknown, or a result of it is missing or of another card.
    """

    def made(match: re.Match[str]) -> str:
        of, name = match.group(2), match.group(3)
        files, make = table_of(name, results / of)
        found = results_of(results / of, files)
        links = [Path(os.path.relpath(results / of / file, folder)).as_posix() for file in files]
        return f"{match.group(1)}{make(*found)}\n\n{caption(found, links)}\n{match.group(4)}"

    return _MARKED.sub(made, text)


def main() -> int:
    """Write the documents' tables; with ``--check``, only say which are not up to date."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, required=True, help="the folder that has one for each card")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for document in args.documents:
        before = document.read_text()
        after = render(before, args.results, document.parent)
        if before != after:
            stale.append(document)
            if not args.check:
                document.write_text(after)
    if args.check and stale:
        names = ", ".join(map(str, stale))
        print(f"the tables of {names} are not those of {args.results}; run scripts/report", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
