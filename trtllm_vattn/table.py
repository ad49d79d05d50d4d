"""Tables as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text that is a Markdown table too; columns of numbers are right-aligned."""
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, right, strict=True)]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return False
    return True


def tabulate(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | Callable[[Any], str]]) -> str:
    """A table of records: each column is a function of a record, or the path of a value in it and its format, as
    ``step_ms.p50:.3f``; ``-`` where the value is None."""
    return table(list(columns), [[_cell(row, column) for column in columns.values()] for row in rows])


def _cell(row: Any, column: str | Callable[[Any], str]) -> str:
    if callable(column):
        return column(row)
    path, _, form = column.partition(":")
    for key in path.split("."):
        row = row[key]
    return "-" if row is None else format(row, form)
