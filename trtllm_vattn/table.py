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


def tabulate(rows: Sequence[Mapping[str, Any]], columns: str | Mapping[str, str | Callable[[Any], str]]) -> str:
    """A table of records.

    Parameters
    ----------
    columns : str or mapping
        Paths of values, as ``batch step_ms.p50``, each its column's heading. Or by heading a function of a record, or a
        path and a format, as ``step_ms.p50:.3f``. None, and a value that a record has not, is shown as ``-``.
    """
    if isinstance(columns, str):
        paths = columns.split()
        return table(paths, [[_shown(_value(row, path)) for path in paths] for row in rows])
    return table(list(columns), [[_cell(row, column) for column in columns.values()] for row in rows])


def _value(row: Any, path: str) -> Any:
    if not isinstance(row, Mapping):
        return None
    # A name may have a dot in it, as p99.9 has.
    key, _, rest = path.partition(".")
    return row[path] if path in row else _value(row.get(key), rest)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _cell(row: Any, column: str | Callable[[Any], str]) -> str:
    if callable(column):
        return column(row)
    path, _, form = column.partition(":")
    value = _value(row, path)
    return "-" if value is None else format(value, form)
