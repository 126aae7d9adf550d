"""Plots as SVG: lines over a logarithmic axis or a linear one, readable on a light page and on a dark one."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 40, 52

# An image does not see the page's colours, only what the reader's system prefers; so these are readable on both.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #6e7781; }
.title { font-weight: 600; }
.grid { stroke: #6e7781; stroke-opacity: .25; }
@media (prefers-color-scheme: dark) { text { fill: #9aa4ae; } .grid { stroke: #9aa4ae; } }
"""
COLOURS = ("#0e9384", "#e8590c", "#7c6cf0", "#3b82f6", "#d6409f", "#a18400", "#6b8e23", "#888888", "#c0392b", "#2aa1c0")


class Line(NamedTuple):
    """One contender: its points, and whether it is one of ours, which are drawn in full."""

    name: str
    points: Sequence[tuple[float, float]]
    ours: bool


def plot(title: str, across: str, lines: Sequence[Line]) -> str:
    """Draw lines over logarithmic axes; 0 on the axis across stands at its left end."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points if y > 0]
    start = min((x for x in xs if x), default=1) / 4
    x_at = _scale(start, max(xs), LEFT, WIDTH - RIGHT)
    low, high = 10 ** math.floor(math.log10(min(ys))), max(ys) * 1.1
    y_at = _scale(low, high, HEIGHT - BOTTOM, TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for x in xs:
        at = x_at(max(x, start))
        out.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>')
    for y in (step * 10**power for power in range(-2, 7) for step in (1, 2, 5)):
        if low <= y <= high:
            at = y_at(y)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            out.append(f'<text x="{LEFT - 8}" y="{at + 4:.0f}" text-anchor="end">{y:,g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>')
    labels: list[tuple[float, Line, str]] = []
    for line, colour in zip(lines, COLOURS, strict=False):
        points = " ".join(f"{x_at(max(x, start))},{y_at(y)}" for x, y in line.points)
        dashes = "" if line.ours else ' stroke-dasharray="5 3"'
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        labels.append((y_at(line.points[-1][1]), line, colour))
    # The names stand beside the ends of their lines, pushed down where two would overlap.
    below = float(TOP)
    for at, line, colour in sorted(labels):
        below = max(below, at)
        out.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{below + 4:.0f}" style="fill: {colour}">{escape(line.name)}</text>'
        )
        below += 16
    return "\n".join([*out, "</svg>", ""])


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    factor = (end - start) / (math.log(high) - math.log(low))
    return lambda value: round(start + (math.log(value) - math.log(low)) * factor, 1)
