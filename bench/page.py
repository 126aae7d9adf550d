"""The page: `docs/benchmarks.md` and its plots, from the figures of the last runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bench
from bench import plot, tables
from bench.cases import HOSTS, WORKS
from bench.rounds import Measured

if TYPE_CHECKING:
    from pathlib import Path

    Results = list[tuple[dict[str, Any], Measured]]

# File, title, below the axis, work and figure.
PLOTS = (
    (
        "latency.svg",
        "One exit among K watched children: median latency, microseconds",
        "K, watched children",
        ("one", "p50"),
    ),
    (
        "cpu.svg",
        "N watched children that all exit at once: CPU per exit, microseconds",
        "N, children that exit at once",
        ("burst", "CPU"),
    ),
)
LINES = (*HOSTS, "trio", "asyncio, pidfds", "asyncio, threads", "uvloop", "Twisted")


def write(directory: Path, kept: dict[str, dict[str, Any]]) -> None:
    """Write benchmarks.md, and the plots beside it."""
    parts = ["# Benchmarks", (bench.__doc__ or "").strip()]
    for name, work in WORKS.items():
        results: Results = []
        machines = set()
        for settings, each in kept.get(name, {}).items():
            machines.add(each.pop("machine"))
            results.append((json.loads(settings), Measured(**each)))
        if not results:
            continue
        parts += [f"## {work.title}", f"On {'; and on '.join(sorted(machines))}."]
        for file, title, across, (drawn, figure) in PLOTS:
            if drawn == name:
                (directory / "benchmarks").mkdir(exist_ok=True)
                (directory / "benchmarks" / file).write_text(draw(title, across, figure, results))
                parts.append(f"![{title}](benchmarks/{file})")
        for parameters, measured in results:
            parts += [f"**{tables.settings(parameters)}**"] * bool(parameters)
            parts.append(tables.markdown(tables.cells(work, measured)))
    (directory / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


def draw(title: str, across: str, figure: str, results: Results) -> str:
    """One plot, of one figure over `k`. What is a total is divided by the exits."""
    lines = []
    for name in LINES:
        points = []
        for parameters, measured in results:
            spread = measured.spread(name, figure)
            if spread is not None:
                whole = figure == "CPU"
                points.append((parameters["k"], spread.median * 1000 / parameters["k"] if whole else spread.median))
        if points:
            lines.append(plot.Line(name, sorted(points), name in HOSTS))
    return plot.plot(title, across, lines)
