"""Negative controls: with anyreap broken in one way, the tests that protect it go red."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests import broken, scenarios

CONTROLS = {
    "no_heartbeat": "test_theft.py::test_stolen_and_no_signal_ever_again[asyncio-sigchld-no-pidfds]",
    "no_source": "test_waiting.py::test_a_waiter_gets_the_exit_at_once[trio-sigchld-pidfds]",
    "reaps_before_it_notes": "test_waiting.py::test_observed_child_is_left_to_its_owner[trio-sigchld-pidfds]",
    "signals_by_bare_pid": "test_theft.py::test_recycled_after_a_theft",
    "blocks_on_a_traced_child": "test_bursts.py::test_traced_child[trio-pidfd-pidfds]",
    "takes_any_child": "test_theft.py::test_foreign_zombies_stay[trio-pidfd-pidfds]",
    "no_scan_behind_a_stranger": "test_theft.py::test_foreign_zombie_does_not_hide_ours[trio-sigchld]",
    "escalation_follows_the_leader": "test_groups.py::test_stubborn_members_are_killed_on_leaving[trio-pidfd-pidfds]",
    "zombies_count_as_members": "test_groups.py::test_zombie_members_do_not_count[trio-pidfd-pidfds]",
    "one_grace_each": "test_leaving.py::test_one_grace_for_all[trio-sigchld]",
    "no_continue": "test_leaving.py::test_stopped_child_hears_the_signal",
    "keeps_the_pipes_open": "test_processes.py::test_closing_ends_who_writes[trio-sigchld]",
    "forgets_cancelled_starts": "test_spawning.py::test_cancelled_start[trio-sigchld-before-fork]",
    "leaves_its_handler": "test_signals.py::test_disposition_is_put_back[trio-sigchld]",
    "forked_children_share_the_pipe": "test_fork.py::test_forked_childs_signals_stay_out_of_our_pipe[trio-sigchld]",
}


def test_each_breakage_has_a_control() -> None:
    """No way to break it is without a test that notices."""
    assert CONTROLS.keys() == broken.BREAKAGES.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="finds what a broken run leaves behind in /proc")
@pytest.mark.parametrize("name", CONTROLS)
def test_broken_is_noticed(name: str) -> None:
    """A test that passes without the code it protects tests nothing."""
    token = str(uuid.uuid4())
    # What it breaks may be what a block waits for, shielded: then the watchdog ends it, which is as red.
    watchdog = ["-o", "faulthandler_timeout=3", "-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *watchdog]
    try:
        done = subprocess.run(
            [*command, f"tests/{CONTROLS[name]}"],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "ANYREAP_BROKEN": name, "ANYREAP_CONTROL": token},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    finally:
        end_all(token)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " failed" in done.stdout or "Timeout" in done.stderr


def end_all(token: str) -> None:
    """End what a broken run has left behind: the processes that carry its token."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found = token.encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if found:
                os.kill(int(entry.name), signal.SIGKILL)


def test_no_scenario_is_unaccounted_for() -> None:
    """Each acceptance scenario is named by the docstring of a test, or has a reason why it is not."""
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    tests = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    ]
    covered = {scenario for test in tests for scenario in scenarios.named(ast.get_docstring(test))}
    assert scenarios.unaccounted(sorted(covered)) == []
    assert not covered & scenarios.NOT_TESTED.keys()
    assert len(scenarios.SCENARIOS) > 140
