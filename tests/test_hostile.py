"""Children that mean harm: what the threat model (docs/threats.md) says that they can't do."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import anyreap
from anyreap import _kernel
from tests.harness import state_of, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

BOUND = 20  # seconds; who needs them has failed
BRIEF = anyreap.Shutdown(scope="group", grace=0.1)


async def started(reaper: anyreap.Reaper, command: list[str], **options: Any) -> anyreap.Process:
    """Start a child, and wait until it has said something."""
    process = await reaper.open_process(command, **options)
    assert process.stdout is not None
    with anyio.fail_after(BOUND):
        assert await process.stdout.receive()
    return process


@pytest.mark.parametrize("deaf", ["", "trap '' TERM;"], ids=["obedient", "deaf"])
async def test_group_that_forks_without_end(source: Any, pidfds: bool, deaf: str) -> None:
    """A group whose members fork all the time, and hear no SIGTERM, is ended in one grace period: the kernel starts no
    process in a group while SIGKILL is on its way to it.
    """
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source, shutdown=BRIEF, heartbeat=0.05) as reaper:
            forks = f"{deaf} echo; while :; do sleep 0.1 & sleep 0.1 & sleep 0.01; done"
            process = await started(reaper, ["/bin/sh", "-c", forks])
            await until(lambda: len(_kernel.live_members({process.pid}).get(process.pid, [])) > 3)
            scope.cancel()
    assert process.returncode == (-signal.SIGKILL if deaf else -signal.SIGTERM)
    assert not _kernel.live_members({process.pid})


async def test_child_that_stops_itself_at_each_cont(source: Any, pidfds: bool) -> None:
    """A child that is stopped whenever it is continued, and ignores SIGTERM, is killed at the end of the grace."""
    stops = "trap '' TERM; trap 'kill -STOP $$' CONT; echo; kill -STOP $$; while :; do sleep 0.01; done"
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source, shutdown=BRIEF, heartbeat=0.05) as reaper:
            process = await started(reaper, ["/bin/sh", "-c", stops])
            await until(lambda: state_of(process.pid) == "T")
            scope.cancel()
    assert process.returncode == -signal.SIGKILL


async def test_child_that_sends_us_sigchld_all_the_time(source: Any, pidfds: bool) -> None:
    """Thousands of signals for nothing end no wait, keep no other task from running, and hide no exit."""
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await anyio.sleep(0)
            turns += 1

    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        storm = await started(reaper, ["/bin/sh", "-c", "echo; while kill -CHLD $PPID; do :; done"])
        idle = await reaper.open_process(["/bin/cat"])
        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(tick)
                for _ in range(20):
                    done = await reaper.run_process("exit 7", check=False)
                    assert done.returncode == 7
                await until(lambda: turns > 100)
                tasks.cancel_scope.cancel()
        assert storm.status is idle.status is None
        assert reaper.statistics().lost == 0
        storm.kill()


JOINS = """
import os, sys, time
os.setpgid(0, int(sys.argv[1]))
print(os.getpgrp(), flush=True)
time.sleep(3600)
"""


async def test_leader_that_joins_our_group(source: Any, pidfds: bool) -> None:
    """A leader that leaves its own group, for that of this process, is ended itself, and this group gets no signal."""
    heard: list[int] = []
    found = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
            async with anyreap.open_reaper(source=source, shutdown=BRIEF, heartbeat=0.05) as reaper:
                process = await started(reaper, [sys.executable, "-c", JOINS, str(os.getpgrp())])
                assert os.getpgid(process.pid) == os.getpgrp()
                scope.cancel()
        assert process.status is not None
        assert process.status.signal is not None
        assert heard == []
    finally:
        signal.signal(signal.SIGTERM, found)


async def test_leader_that_joins_the_group_of_another(source: Any, pidfds: bool) -> None:
    """A leader that joins a sibling's group is ended with it, by the sibling's policy; its own end waits for nobody."""
    async with anyreap.open_reaper(source=source, shutdown=BRIEF, heartbeat=0.05) as reaper:
        sibling = await started(reaper, ["/bin/sh", "-c", "echo; exec sleep 3600"])
        process = await started(reaper, [sys.executable, "-c", JOINS, str(sibling.pid)])
        with anyio.fail_after(BOUND):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await sibling.aclose()
            assert sibling.returncode == -signal.SIGTERM
            assert await process.wait() in (-signal.SIGTERM, -signal.SIGKILL)


@pytest.mark.parametrize("name", [") Z 1 1", "a) X 0 0 0"])
async def test_name_that_looks_like_a_zombie(source: Any, pidfds: bool, tmp_path: Path, name: str) -> None:
    """A member whose name imitates the fields of /proc/PID/stat is not taken for a dead one: it is killed, too."""
    shutil.copy("/bin/sleep", tmp_path / name)
    script = f"trap '' TERM; '{tmp_path / name}' 3600 & trap - TERM; echo $!; wait"
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source, shutdown=BRIEF, heartbeat=0.05) as reaper:
            process = await reaper.open_process(["/bin/sh", "-c", script])
            assert process.stdout is not None
            member = int(await process.stdout.receive())
            await until(lambda: os.path.basename(os.readlink(f"/proc/{member}/exe")) == name)
            scope.cancel()
    assert process.returncode == -signal.SIGTERM
    assert state_of(member) in ("", "Z")
