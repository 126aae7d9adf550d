"""The acceptance scenarios, and which tests cover them: `make scenarios`.

A test covers a scenario by having its id in its docstring. `scenarios.txt` says what each of them is about: setup →
action ⇒ what is expected.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCENARIOS = dict(line.split("\t") for line in Path(__file__).with_suffix(".txt").read_text().splitlines())

# Those that no test is about, and why.
NOT_TESTED = {
    "N5": "there are no callbacks. A waiter that is cancelled in the tick of the exit is C4",
}

ID = re.compile(r"\b([A-N])(\d{1,2})\b(?:(?:-| to )\1?(\d{1,2})\b)?")


def named(text: str | None) -> Iterator[str]:
    """The ids that a docstring names; `A1-A3` and `A1 to A3` name three."""
    for letter, first, last in ID.findall(text or ""):
        yield from (f"{letter}{number}" for number in range(int(first), int(last or first) + 1))


class Collected:
    """A plugin that notes which tests name which scenarios, and with which parameters they run."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Look at the tests."""
        for item in session.items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            for scenario in named(getattr(getattr(item, "function", None), "__doc__", None)):
                name = item.nodeid.partition("[")[0].removeprefix("tests/")
                where = " ".join(str(parameters[each]) for each in ("host", "pidfds", "mode") if each in parameters)
                self.tests[scenario][name].add(where)


def table(collected: Collected) -> Iterator[str]:
    """Each scenario, its tests, and the backends and sources that they run on."""
    for scenario, text in SCENARIOS.items():
        yield f"{scenario:4} {text}"
        for name, where in sorted(collected.tests.get(scenario, {}).items()):
            yield f"       {name}" + (f"  [{', '.join(sorted(where))}]" if where != {""} else "")
        if scenario in NOT_TESTED:
            yield f"       not tested: {NOT_TESTED[scenario]}"


def unaccounted(scenarios: Sequence[str]) -> list[str]:
    """The scenarios that are neither in this list nor excused."""
    return [scenario for scenario in SCENARIOS if scenario not in scenarios and scenario not in NOT_TESTED]


def main() -> int:
    """Print the table. Returns 1 if a scenario is unaccounted for."""
    collected = Collected()
    pytest.main(["--collect-only", "-qq", "--all", "--no-summary", "-p", "no:cacheprovider"], plugins=[collected])
    missing = unaccounted(list(collected.tests))
    covered = sum(scenario in collected.tests for scenario in SCENARIOS)
    lines = [
        *table(collected),
        f"\n{len(SCENARIOS)} scenarios: {covered} covered, {len(NOT_TESTED)} with a reason why not",
        *(f"unaccounted for: {scenario}" for scenario in missing),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
