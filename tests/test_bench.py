"""The benchmark runs: each work, done once at a tiny size by ours and by a peer, and the tables made of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest

from bench import page, tables
from bench.cases import CONTENDERS, WORKS
from bench.rounds import Measured, Spread, one_case, run

if TYPE_CHECKING:
    from pathlib import Path

# Work, parameters, who does it: each work with each kind of contender that needs nothing but the tests' own packages.
CASES = [
    ("storm", {"n": 4, "limit": 2}, ("Python, waitpid", "anyreap trio sigchld", "anyreap asyncio pidfd, open_process")),
    ("burst", {"k": 4}, ("C", "trio", "anyreap uvloop pidfd")),
    ("one", {"k": 3, "exits": 2, "warm": 1, "foreign": True}, ("C", "Python, scan", "anyreap trio pidfd")),
    ("one", {"k": 3, "exits": 2, "warm": 1, "nofile": 64}, ("asyncio, pidfds", "anyreap asyncio sigchld")),
    ("idle", {"k": 200, "seconds": 0.05}, ("trio, waiting for nothing", "anyreap asyncio sigchld")),
    ("calls", {"k": 4}, ("psutil", "anyreap trio sigchld")),
    ("signals", {"k": 2, "rate": 1000, "seconds": 0.1}, ("anyreap trio sigchld",)),
    ("read", {"size": 2}, ("Python, waitpid", "anyio on asyncio", "anyreap trio pidfd, run_process")),
    ("import", {}, ("import anyreap",)),
]


@pytest.mark.parametrize(
    ("function", "parameters", "contender"),
    [pytest.param(work, given, who, id=f"{work}-{who}") for work, given, all_ in CASES for who in all_],
)
def test_a_case_gives_its_figures(function: str, parameters: dict[str, Any], contender: str) -> None:
    """A case that does its work prints a number for each figure that its table shows, and none of them is below 0."""
    result = one_case(function, contender, parameters, limit=30)
    if contender == "C" and "no C compiler" in result.get("failed", ""):
        pytest.skip(result["failed"])
    assert "failed" not in result, result
    work = next(work for work in WORKS.values() if work.function == function)
    assert set(result) - {"gap"} == set(work.figures) - {"gap"}
    assert all(value >= 0 for value in result.values())
    assert all(result[figure] > 0 for figure in work.compared)


def test_a_failure_is_a_result_with_its_reason() -> None:
    """A contender that can't do the work is listed with why, is not asked again, and spoils nobody else's table."""
    cases: list[str] = []
    work = WORKS["budget"]._replace(contenders=("trio", "Python, scan"))
    parameters = {"k": 30, "exits": 1, "warm": 0, "nofile": 24}
    measured = run("one", parameters, work.contenders, rounds=2, limit=30, say=cases.append)
    assert len(cases) == 3
    assert "Too many open files" in measured.failed["trio"]
    assert len(measured.figures["Python, scan"]) == 2
    table = tables.text(tables.cells(work, measured))
    assert "failed: OSError: [Errno 24] Too many open files" in table


def test_one_that_takes_too_long_is_ended() -> None:
    """A contender that hangs is ended at the time limit, and listed with it."""
    assert one_case("idle", "trio", {"k": 1, "seconds": 3600}, limit=1) == {"failed": "not done after 1 s"}


def test_a_ratio_is_taken_round_by_round() -> None:
    """A ratio is the median of those of the rounds: a bad minute of the machine, which hits all, does no harm."""
    measured = Measured()
    for slow, ours in ((1, 2), (10, 30), (100, 200)):
        measured.add("trio", {"p50": slow})
        measured.add("anyreap trio pidfd", {"p50": ours})
    assert measured.ratio("anyreap trio pidfd", "trio", "p50") == Spread(2, 2, 3)
    assert measured.ratio("trio", "trio", "p50") is None
    measured.add("trio", {"failed": "why"})
    assert measured.ratio("anyreap trio pidfd", "trio", "p50") is None


def test_every_contender_of_the_table_is_known() -> None:
    """The works name no contender that isn't there, and compare nobody with one that doesn't take part."""
    for work in WORKS.values():
        assert set(work.contenders) <= set(CONTENDERS)
        assert set(work.native.values()) <= set(work.contenders)


def test_the_page_shows_tables_and_plots(tmp_path: Path) -> None:
    """What was measured becomes a page with its tables, its failures, and plots that are well-formed."""
    kept: dict[str, Any] = {"one": {}}
    for k in (0, 1000):
        figures = {"p50": 100.0 + k, "p99": 200.0, "CPU/exit": 50.0}
        kept["one"][json.dumps({"k": k})] = {
            "machine": "a machine",
            "figures": {"trio": [figures], "anyreap trio sigchld": [figures]},
            "failed": {"Twisted": "out of patience"},
        }
    page.write(tmp_path, kept)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "- Twisted failed: out of patience" in text
    assert "| trio | 1100 |" in text
    plot = ET.parse(tmp_path / "benchmarks" / "latency.svg")
    assert len(plot.findall("{http://www.w3.org/2000/svg}polyline")) == 2
