"""Rounds: all contenders of a work one after the other, each in a process of its own, again and again.

A machine has good and bad minutes, so contenders are compared within a round, and what is told is the median of the
rounds. The order changes with each round, and is the same in each run.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Of our environment, what a case needs: the size of it is a part of what starting a child costs.
KEPT = ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV")


class Spread(NamedTuple):
    """The median of the rounds, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Measured:
    """What the rounds of one work gave: for each contender its figures, round by round, or why it failed."""

    def __init__(
        self, figures: dict[str, list[dict[str, float]]] | None = None, failed: dict[str, str] | None = None
    ) -> None:
        self.figures = figures or {}
        self.failed = failed or {}

    def add(self, contender: str, result: dict[str, Any]) -> None:
        if "failed" in result:
            self.failed[contender] = result["failed"]
        else:
            self.figures.setdefault(contender, []).append(result)

    def done(self, contender: str) -> bool:
        return contender in self.figures and contender not in self.failed

    def spread(self, contender: str, figure: str) -> Spread | None:
        """A figure of a contender; None if it has none of that name, or failed."""
        rounds = self.figures.get(contender, [])
        if not self.done(contender) or figure not in rounds[0]:
            return None
        return Spread.of([each[figure] for each in rounds])

    def ratio(self, contender: str, other: str, figure: str) -> Spread | None:
        """A figure against another contender's, each round by itself."""
        if contender == other or self.spread(contender, figure) is None or self.spread(other, figure) is None:
            return None
        pairs = zip(self.figures[contender], self.figures[other], strict=True)
        if any(not theirs[figure] for _, theirs in pairs):
            return None
        pairs = zip(self.figures[contender], self.figures[other], strict=True)
        return Spread.of([ours[figure] / theirs[figure] for ours, theirs in pairs])


def run(
    function: str,
    parameters: dict[str, Any],
    contenders: Sequence[str],
    *,
    rounds: int,
    limit: float,
    say: Callable[[str], object],
) -> Measured:
    """Measure. A contender that fails, or takes longer than `limit` seconds, is not asked again."""
    measured = Measured()
    order = list(contenders)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for contender in order:
            if contender in measured.failed:
                continue
            say(f"{function} {parameters} round {number + 1}/{rounds}: {contender}")
            measured.add(contender, one_case(function, contender, parameters, limit))
    return measured


def one_case(function: str, contender: str, parameters: dict[str, Any], limit: float) -> dict[str, Any]:
    """Measure one case once, in a process of its own."""
    command = [sys.executable, "-m", "bench.case", function, contender, json.dumps(parameters)]
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        # If it has to be killed, the children that it leaves end with it: they read from pipes that only it writes to.
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": f"exit code {done.returncode}: {last}"}
