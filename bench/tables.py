"""Tables: the same cells as plain text for a terminal, and as Markdown for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.cases import CONTENDERS, FLOORS, UNITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.cases import Work
    from bench.rounds import Measured, Spread


def title(work: Work, parameters: dict[str, Any]) -> str:
    """What was measured."""
    return f"{work.title}{': ' * bool(parameters)}{settings(parameters)}"


def settings(parameters: dict[str, Any]) -> str:
    """The parameters, as one reads them."""
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def cells(work: Work, measured: Measured) -> list[list[str]]:
    """The header, then a row for each contender."""
    floor = next((name for name in FLOORS if name in work.contenders and measured.done(name)), "")
    header = ["contender"]
    for figure in work.figures:
        header.append(f"{figure}, {UNITS[figure]}" if UNITS[figure] else figure)
        if figure in work.compared:
            header += ["/ native"] * bool(work.native) + [f"/ {floor}"] * bool(floor)
    rows = [header]
    for name in work.contenders:
        if name in measured.failed:
            rows.append([name, "failed: " + measured.failed[name]])
            continue
        row = [name]
        for figure in work.figures:
            row.append(_spread(measured.spread(name, figure)))
            if figure in work.compared:
                native = work.native.get(CONTENDERS[name].loop, "")
                if work.native:
                    row.append(_spread(measured.ratio(name, native, figure), ratio=True))
                if floor:
                    row.append(_number(measured.ratio(name, floor, figure), ratio=True))
        rows.append(row)
    return rows


def _number(spread: Spread | None, *, ratio: bool = False) -> str:
    return "" if spread is None else _digits(spread.median, ratio=ratio)


def _spread(spread: Spread | None, *, ratio: bool = False) -> str:
    if spread is None:
        return ""
    middle, low, high = (_digits(value, ratio=ratio) for value in spread)
    return middle if low == high else f"{middle} ({low} to {high})"


def _digits(value: float, *, ratio: bool = False) -> str:
    if ratio or value < 10:
        return f"{value:.2f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def text(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """For a page."""
    lines = ["| " + " | ".join(row) + " |" for row in rows if len(row) == len(rows[0])]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    failed = [f"- {row[0]} {row[1]}" for row in rows if len(row) != len(rows[0])]
    return "\n".join([*lines, *[""] * bool(failed), *failed])
