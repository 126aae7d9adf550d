"""Many loops and many reapers: in threads, one after the other, nested, and all about the same
children.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

import anyreap
from anyreap._finder import Finder
from anyreap._registry import registry
from anyreap._service import Service, Watch
from anyreap._table import Record
from tests.harness import (
    ASYNCIO,
    HOSTS,
    TRIO,
    UVLOOP,
    Gate,
    Host,
    await_death,
    collect,
    end,
    exits_with,
    is_zombie,
    look,
    open_fds,
    run_alone,
    set_sigaction,
    sigaction,
    sleeper,
    state_of,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from concurrent.futures import Future

    from anyio.from_thread import BlockingPortal

# Far above what a prompt wake-up takes: what comes within SOON was not found by a heartbeat.
LONG = 30.0
SOON = 10.0

BACKENDS = {"trio": TRIO, "asyncio": ASYNCIO, "uvloop": UVLOOP}
PAIRS = [("trio", "asyncio"), ("asyncio", "uvloop"), ("uvloop", "trio")]


def run(host: Host, main: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run a loop in the main thread, with nobody else's tasks on it."""
    return anyio.run(main, *args, backend=host.backend, backend_options=host.options)


@contextlib.contextmanager
def loop_in_thread(name: str) -> Iterator[BlockingPortal]:
    """A running loop in a thread of its own."""
    backend, options = BACKENDS[name]
    with anyio.from_thread.start_blocking_portal(backend, dict(options)) as portal:
        try:
            yield portal
        finally:
            portal.call(portal.stop, True)  # what a failed test has left waiting is cancelled


@contextlib.contextmanager
def reaper_in_thread(name: str) -> Iterator[tuple[BlockingPortal, anyreap.Reaper]]:
    """A reaper on a loop in a thread of its own."""
    with (
        loop_in_thread(name) as portal,
        portal.wrap_async_context_manager(anyreap.open_reaper(heartbeat=LONG)) as reaper,
    ):
        yield portal, reaper


@contextlib.contextmanager
def held(portal: BlockingPortal) -> Iterator[None]:
    """Stop a loop in its tracks."""
    entered, release = threading.Event(), threading.Event()

    async def stand_still() -> None:
        entered.set()
        release.wait(2 * SOON)

    future = portal.start_task_soon(stand_still)
    assert entered.wait(SOON)
    try:
        yield
    finally:
        release.set()
    future.result(SOON)


async def result_of(future: Future[Any]) -> Any:
    """Await what another loop is doing."""
    return await anyio.to_thread.run_sync(future.result, SOON)


@pytest.fixture(params=PAIRS, ids="+".join)
def two(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[tuple[BlockingPortal, anyreap.Reaper], tuple[BlockingPortal, anyreap.Reaper]]]:
    """Two loops in two threads, each with a reaper."""
    first, second = request.param
    with reaper_in_thread(first) as one, reaper_in_thread(second) as other:
        yield one, other


# A loop in a thread -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_reaper_in_a_thread_uses_pidfds(name: str) -> None:
    """In another than the main thread a reaper works by pidfds, and touches no signal (I1)."""
    before = signal.getsignal(signal.SIGCHLD)
    with reaper_in_thread(name) as (portal, reaper), Gate() as gate:
        assert reaper.statistics().source == "pidfd"
        assert signal.getsignal(signal.SIGCHLD) is before
        pid = gate.add("exit 3")
        waiting = portal.start_task_soon(reaper.wait, pid)
        owned = portal.call(reaper.adopt, exits_with(4))
        assert portal.call(owned.wait).exit_code == 4
        gate.open()
        assert waiting.result(SOON).exit_code == 3


@pytest.mark.parametrize("name", BACKENDS)
def test_no_self_pipe_in_a_thread(name: str) -> None:
    """SIGCHLD asked for by name, in another than the main thread, is an error with the remedy, and
    installs nothing.
    """

    async def main() -> None:
        async with anyreap.open_reaper(source="sigchld"):
            pytest.fail("it was opened")

    with loop_in_thread(name) as portal:
        before = set(open_fds())
        with pytest.raises(anyreap.SigchldUnavailable, match=r"main thread.*source='pidfd'"):
            portal.call(main)
        assert set(open_fds()) == before


@pytest.mark.parametrize("name", BACKENDS)
def test_cancelled_block_in_a_thread_ends_what_it_owns(name: str) -> None:
    """The shutdown works in a thread as it does in the main one."""

    async def main() -> anyreap.Child:
        with anyio.CancelScope() as scope:
            async with anyreap.open_reaper() as reaper:
                child = reaper.adopt(sleeper())
                scope.cancel()
        return child

    with loop_in_thread(name) as portal:
        child = portal.call(main)
    assert child.status is not None
    assert child.status.signal == signal.SIGTERM


# Several loops at once ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_two_loops_take_nothing_from_each_other(source: Any) -> None:
    """Two loops in two threads, a hundred children each, all ending at once: each gets its own
    statuses (I2, A2).
    """
    mine: list[tuple[anyreap.Child, int]] = []
    theirs: list[tuple[anyreap.Child, int]] = []
    with reaper_in_thread("asyncio") as (portal, there), Gate() as gate:
        async with anyreap.open_reaper(source=source, heartbeat=LONG) as here:
            for code in range(100):
                mine.append((here.watch(gate.add(f"exit {code}")), code))
                pid = gate.add(f"exit {100 + code}")
                theirs.append((portal.call(there.watch, pid), 100 + code))

            async def all_of_theirs() -> list[int | None]:
                return [(await child.wait()).exit_code for child, _ in theirs]

            future = portal.start_task_soon(all_of_theirs)
            gate.open()
            with anyio.fail_after(SOON):
                assert [(await child.wait()).exit_code for child, _ in mine] == list(range(100))
                assert await result_of(future) == list(range(100, 200))
            for reaper in (here, there):
                seen = reaper.statistics()
                assert (seen.reaped, seen.lost, seen.late, seen.watched) == (100, 0, 0, 0)


@pytest.mark.usefixtures("no_pidfds")
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_loops_take_nothing_from_each_other_without_pidfds(names: tuple[str, str]) -> None:
    """The same where there are no pidfds: each loop sees the zombies of the other (I2, E9)."""

    async def watch_all(pids: dict[int, int], ready: threading.Event) -> anyreap.ReaperStatistics:
        async with anyreap.open_reaper(source="pidfd", heartbeat=0.05) as reaper:
            children = {reaper.watch(pid): code for pid, code in pids.items()}
            ready.set()
            for child, code in children.items():
                assert (await child.wait()).exit_code == code
            return reaper.statistics()

    with loop_in_thread(names[0]) as one, loop_in_thread(names[1]) as other, Gate() as gate:
        futures = []
        pids: tuple[dict[int, int], dict[int, int]] = ({}, {})
        for code in range(40):
            pids[code % 2][gate.add(f"exit {code}")] = code
        for portal, some in zip((one, other), pids, strict=True):
            ready = threading.Event()
            futures.append(portal.start_task_soon(watch_all, some, ready))
            assert ready.wait(SOON)
        gate.open()
        for future in futures:
            seen = future.result(SOON)
            assert (seen.reaped, seen.lost) == (20, 0)


# One child, many reapers --------------------------------------------------------------------------


def test_reapers_of_two_threads_share_a_child(two: Any) -> None:
    """A child that is watched in two threads gives both its status at once, whichever of them sees
    the end; one who wants it collected is enough.
    """
    expected = [[0, 0], [0, 0]]
    for reaps in ((True, True), (True, False), (False, True)):
        for collector in (0, 1):
            share_a_child(two, reaps, collector)
            for i in (0, 1):
                seen = two[i][1].statistics()
                expected[i][0] += reaps[i]
                assert [seen.reaped, seen.lost] == expected[i]
                assert (seen.watched, seen.late) == (0, 0)


def share_a_child(two: Any, reaps: tuple[bool, bool], collector: int) -> None:
    """Have two reapers watch a child, and one of them see its end, while the loop of the other
    stands still.
    """
    with Gate() as gate:
        pid = gate.add("exit 7")
        children = [
            portal.call(lambda r=reaper, c=reap: r.watch(pid, reap=c))
            for (portal, reaper), reap in zip(two, reaps, strict=True)
        ]
        waiting = [two[i][0].start_task_soon(children[i].wait) for i in (0, 1)]
        with held(two[1 - collector][0]):
            gate.open()
            status = waiting[collector].result(SOON)
            assert state_of(pid) == ""  # collected, by the one that could
            assert children[1 - collector].returncode == 7
        assert waiting[1 - collector].result(SOON) is status
        assert status.exit_code == 7


def test_zombie_is_left_where_nobody_wants_it(two: Any) -> None:
    """A child that two threads only observe stays a zombie, and both have its status."""
    with Gate() as gate:
        pid = gate.add("exit 7")
        observe = [functools.partial(reaper.wait, pid, reap=False) for _, reaper in two]
        waiting = [two[i][0].start_task_soon(observe[i]) for i in (0, 1)]
        for portal, reaper in two:
            portal.call(lambda r=reaper: r.watch(pid, reap=False))  # they are registered now
        gate.open()
        assert {future.result(SOON).exit_code for future in waiting} == {7}
        assert is_zombie(pid)
        assert collect(pid) == 7


def test_second_thread_collects_what_the_first_one_observed(two: Any) -> None:
    """A zombie that one thread has observed is collected when another asks for it, before that one
    has its status.
    """
    (one, first), (other, second) = two
    pid = exits_with(7)
    await_death(pid)
    child = one.call(lambda: first.watch(pid, reap=False))
    assert one.call(child.wait).exit_code == 7
    assert is_zombie(pid)
    assert other.start_task_soon(second.wait, pid).result(SOON).exit_code == 7
    assert state_of(pid) == ""
    assert child.returncode == 7


def test_popen_in_one_thread_and_its_pid_in_another(two: Any) -> None:
    """A Popen that one thread watches knows its returncode, also when the one who collects was
    given its pid.
    """
    for collector in (0, 1):
        for popen_first in (True, False):
            with subprocess.Popen(["sh", "-c", "read x; exit 7"], stdin=subprocess.PIPE) as popen:
                share_a_popen(two, popen, collector, popen_first=popen_first)


def share_a_popen(two: Any, popen: Any, collector: int, *, popen_first: bool) -> None:
    """Give one reaper a Popen and another its pid, and have one of them see its end."""
    things = [popen, popen.pid] if popen_first else [popen.pid, popen]
    waiting = [
        portal.start_task_soon(portal.call(reaper.watch, thing).wait)
        for (portal, reaper), thing in zip(two, things, strict=True)
    ]
    assert popen.stdin is not None
    with held(two[1 - collector][0]):
        popen.stdin.close()
        assert waiting[collector].result(SOON).exit_code == 7
        assert popen.returncode == 7
    assert waiting[1 - collector].result(SOON).exit_code == 7
    assert popen.wait(SOON) == 7


def test_wait_returns_after_the_collection_that_it_asked_for(host: Host) -> None:
    """A wait for a child that has been observed before, and is to be collected now, returns when it
    is collected: no zombie is left, and a Popen has its returncode.
    """

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            for _ in range(20):
                with anyio.fail_after(SOON):
                    with subprocess.Popen(["sh", "-c", "exit 7"]) as popen:
                        assert (await reaper.wait(popen.pid, reap=False)).exit_code == 7
                        assert is_zombie(popen.pid)
                        assert (await reaper.wait(popen)).exit_code == 7
                        assert popen.returncode == 7
                        assert state_of(popen.pid) == ""

    run(host, main)


@pytest.mark.parametrize("upgrade", ["watch", "adopt"])
def test_upgrade_forgets_nobody_who_waits(host: Host, upgrade: str) -> None:
    """Who waits for a running child that is only observed still hears of its end when its
    collection is asked for meanwhile, and so does who waits after that.
    """

    # BUG: Reaper.watch drops Watch.event on an upgrade also while the child runs: who waits on it
    # is never woken.
    async def main() -> None:
        codes: list[int | None] = []

        async def wait(child: anyreap.Child) -> None:
            codes.append((await child.wait()).exit_code)

        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            with Gate() as gate, anyio.fail_after(SOON / 4):
                pid = gate.add("exit 7")
                async with anyio.create_task_group() as group:
                    child = reaper.watch(pid, reap=False)
                    group.start_soon(wait, child)
                    await until(lambda: child._watch.parked)
                    group.start_soon(wait, getattr(reaper, upgrade)(pid))
                    await anyio.lowlevel.checkpoint()
                    gate.open()
            assert codes == [7, 7]
            assert state_of(pid) == ""

    run(host, main)


def test_adopted_child_whose_owner_was_faster(host: Host) -> None:
    """A child that was observed, then adopted, and collected by its owner in the same instant, has
    ended: it holds up neither a wait nor the block.
    """

    async def main() -> None:
        with anyio.fail_after(1):
            async with anyreap.open_reaper(source=host.source, heartbeat=0.05) as reaper:
                pid = exits_with(7)
                assert (await reaper.wait(pid, reap=False)).exit_code == 7
                child = reaper.adopt(pid)
                assert collect(pid) == 7
                assert (await child.wait()).exit_code == 7
        assert reaper.statistics().owned == 0

    run(host, main)


def test_popen_that_was_observed_and_then_stolen(host: Host) -> None:
    """A Popen that was observed, and is stolen just when its collection is asked for, is told how
    it ended: else it would make a 0 of what it can't find out (promise 2).
    """

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=0.05) as reaper:
            popen = subprocess.Popen(["sh", "-c", "exit 7"])
            assert (await reaper.wait(popen.pid, reap=False)).exit_code == 7
            child = reaper.watch(popen)
            assert collect(popen.pid) == 7
            await until(lambda: len(registry._table) == 0)
            assert child.returncode == 7
            assert popen.poll() == 7

    run(host, main)


def test_wake_up_across_loops_is_prompt(two: Any) -> None:
    """Fifty children in a row, each watched in two threads: both hear of each end long before a
    heartbeat.
    """
    for code in range(50):
        with Gate() as gate:
            pid = gate.add(f"exit {code}")
            waiting = []
            for portal, reaper in two:
                child = portal.call(reaper.watch, pid)
                waiting.append(portal.start_task_soon(child.wait))
            gate.open()
            assert [future.result(SOON).exit_code for future in waiting] == [code, code]
    for _, reaper in two:
        seen = reaper.statistics()
        assert (seen.reaped, seen.lost, seen.late, seen.watched) == (50, 0, 0, 0)


@pytest.mark.anyio
async def test_main_thread_and_another_share_children(source: Any) -> None:
    """The same between the main thread, by whatever source, and another one."""
    with reaper_in_thread("asyncio") as (portal, there):
        async with anyreap.open_reaper(source=source, heartbeat=LONG) as here:
            for code in range(20):
                with Gate() as gate, anyio.fail_after(SOON):
                    pid = gate.add(f"exit {code}")
                    child = here.watch(pid)
                    future = portal.start_task_soon(portal.call(there.watch, pid).wait)
                    gate.open()
                    assert (await child.wait()).exit_code == code
                    assert (await result_of(future)).exit_code == code
            assert here.statistics().late == there.statistics().late == 0


@pytest.mark.anyio
async def test_one_shot_waits_of_two_threads_and_two_tasks(host: Host) -> None:
    """`anyreap.wait` of one pid, twice in this loop and once in another: all get the status, and a
    reaper each.
    """
    statuses = []

    async def wait_here(pid: int) -> None:
        statuses.append(await anyreap.wait(pid))

    with loop_in_thread("asyncio") as portal:
        for code in range(5):
            with Gate() as gate, anyio.fail_after(SOON):
                pid = gate.add(f"exit {code}")
                async with anyio.create_task_group() as group:
                    group.start_soon(wait_here, pid)
                    group.start_soon(wait_here, pid)
                    future = portal.start_task_soon(anyreap.wait, pid)
                    await until(lambda: watchers_of(pid) == 3)  # noqa: B023
                    gate.open()
                statuses.append(await result_of(future))
    assert [status.exit_code for status in statuses] == [n for n in range(5) for _ in range(3)]


def watchers_of(pid: int) -> int:
    """How many reapers watch a child."""
    record = registry._table.find(pid)
    return 0 if record is None else len(record.watchers)


def test_closing_one_reaper_leaves_the_other_watching(two: Any) -> None:
    """A reaper that closes while its child runs tells its own waiters so, and the other reaper's
    are served.
    """
    (one, _), (other, second) = two
    opened, leave = threading.Event(), threading.Event()
    failures: list[str] = []

    async def wait(child: anyreap.Child) -> None:
        try:
            await child.wait()
        except anyio.ClosedResourceError:
            failures.append("closed")

    async def short(pid: int) -> None:
        block = anyreap.open_reaper(heartbeat=LONG)
        async with anyio.create_task_group() as group, block as reaper:
            group.start_soon(wait, reaper.watch(pid))
            await anyio.sleep(0)
            opened.set()
            await anyio.to_thread.run_sync(leave.wait, SOON)

    with Gate() as gate:
        pid = gate.add("exit 7")
        child = other.call(second.watch, pid)
        waiting = other.start_task_soon(child.wait)
        closing = one.start_task_soon(short, pid)
        assert opened.wait(SOON)
        leave.set()
        closing.result(SOON)
        assert failures == ["closed"]
        assert child.status is None
        assert watchers_of(pid) == 1
        gate.open()
        assert waiting.result(SOON).exit_code == 7


def test_closing_one_reaper_at_the_exit_loses_nothing(two: Any) -> None:
    """Whether the end of a child comes just before or just after one of its reapers closes, the
    other is served.
    """
    (one, _), (other, second) = two

    async def short(pid: int, watched: threading.Event) -> None:
        async with anyreap.open_reaper(heartbeat=LONG) as reaper:
            reaper.watch(pid)
            watched.set()

    for code in range(25):
        with Gate() as gate:
            pid = gate.add(f"exit {code}")
            watched = threading.Event()
            waiting = other.start_task_soon(other.call(second.watch, pid).wait)
            closing = one.start_task_soon(short, pid, watched)
            assert watched.wait(SOON)
            gate.open()
            closing.result(SOON)
            assert waiting.result(SOON).exit_code == code
    assert second.statistics().lost == 0


def test_child_owned_by_one_reaper_and_watched_by_another(two: Any) -> None:
    """The reaper that owns a child ends it, and the one that only watches it hears how."""
    (one, _), (other, second) = two

    async def short(pid: int) -> None:
        with anyio.CancelScope() as scope:
            async with anyreap.open_reaper(heartbeat=LONG) as reaper:
                reaper.adopt(pid)
                scope.cancel()

    pid = sleeper()
    waiting = other.start_task_soon(other.call(second.watch, pid).wait)
    one.call(short, pid)
    assert waiting.result(SOON).signal == signal.SIGTERM


# The wrong thread ---------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_use_in_another_thread_is_an_error(source: Any) -> None:
    """A reaper and its children belong to the thread of their loop; all else is an error that says
    so, and how to do it right, which works.
    """
    async with anyreap.open_reaper(source=source) as reaper:
        pid = exits_with(3)
        await_death(pid)
        running = sleeper()
        child = reaper.watch(running)

        def misuse() -> None:
            calls: list[Callable[[], Any]] = [
                lambda: reaper.watch(pid),
                lambda: reaper.adopt(pid),
                reaper.exits,
                child.kill,
                child.terminate,
                lambda: child.send_signal(signal.SIGKILL),
            ]
            for call in calls:
                with pytest.raises(RuntimeError, match="another thread"):
                    call()
            for wait in (lambda: reaper.wait(pid), child.wait):
                with pytest.raises(RuntimeError, match="another thread"):
                    anyio.run(wait)

        await anyio.to_thread.run_sync(misuse)
        assert child.status is None
        assert reaper.statistics().watched == 1
        assert is_zombie(pid)

        def proper_use() -> anyreap.Child:
            assert reaper.statistics().watched == 1  # may be read anywhere, as all that is known
            assert (child.pid, child.status, child.lost) == (running, None, False)
            anyio.from_thread.run_sync(child.terminate)
            return anyio.from_thread.run_sync(reaper.watch, pid)

        adopted = await anyio.to_thread.run_sync(proper_use)
        assert (await adopted.wait()).exit_code == 3
        assert (await child.wait()).signal == signal.SIGTERM


@pytest.mark.anyio
async def test_use_after_the_block_is_an_error(source: Any) -> None:
    """A reaper that was closed takes no child, and says that it is closed."""
    async with anyreap.open_reaper(source=source) as reaper:
        pass
    pid = sleeper()
    for call in (reaper.watch, reaper.adopt):
        with pytest.raises(RuntimeError, match="closed"):
            call(pid)
    with pytest.raises(RuntimeError, match="closed"):
        await reaper.wait(pid)
    with pytest.raises(RuntimeError, match="closed"):
        reaper.exits()
    assert reaper.statistics().watched == 0
    end(pid)


# One after the other, and nested ------------------------------------------------------------------


def test_run_and_run_again() -> None:
    """Thirty runs on alternating loops work alike, and each puts back what it found (I3)."""
    before = look()

    async def main(source: Any, code: int) -> int:
        async with anyreap.open_reaper(source=source, heartbeat=LONG) as reaper:
            with anyio.fail_after(SOON):
                return (await reaper.wait(exits_with(code))).returncode

    for code in range(30):
        host = HOSTS[code % len(HOSTS)]
        assert run(host, main, host.source, code) == code
        assert look() == before


def test_child_of_one_run_is_awaited_in_the_next() -> None:
    """A child that was watched in one run, and still runs after it, can be handed in on another
    loop (B11).
    """

    async def first(pid: int) -> anyreap.Child:
        async with anyreap.open_reaper(source="pidfd") as reaper:
            return reaper.watch(pid)

    async def second(pid: int) -> anyreap.ExitStatus:
        with anyio.fail_after(SOON):
            return await anyreap.wait(pid)

    with Gate() as gate:
        pid = gate.add("exit 3")
        for host in HOSTS:
            old = run(host, first, pid)
            assert old.status is None
        gate.open()
        assert run(HOSTS[-1], second, pid).exit_code == 3
        assert old.status is None  # nobody watched it for this one


@pytest.mark.anyio
async def test_reapers_of_one_loop_close_in_any_order(source: Any) -> None:
    """Three reapers in one loop are all served, and those that are left when one closes go on; the
    last one puts back what the first one found (I4, 0.13).
    """
    for order in itertools.permutations(range(3)):
        await open_and_close(source, order)


async def open_and_close(source: Any, order: tuple[int, ...]) -> None:
    """Open three reapers, and close them in an order."""
    before = signal.getsignal(signal.SIGCHLD)
    blocks = [anyreap.open_reaper(source=source, heartbeat=LONG) for _ in range(3)]
    reapers = [await block.__aenter__() for block in blocks]
    installed = signal.getsignal(signal.SIGCHLD)
    assert (installed != before) is (source == "sigchld")
    left = list(range(3))
    with anyio.fail_after(SOON):
        for number in order:
            with Gate() as gate:
                pid = gate.add(f"exit {number}")
                shared = [reapers[i].watch(pid) for i in left]
                own = [(reapers[i].watch(gate.add(f"exit {i + 10}")), i + 10) for i in left]
                gate.open()
                for child in shared:
                    assert (await child.wait()).exit_code == number
                for child, code in own:
                    assert (await child.wait()).exit_code == code
            assert signal.getsignal(signal.SIGCHLD) == installed
            await blocks[number].__aexit__(None, None, None)
            left.remove(number)
    assert signal.getsignal(signal.SIGCHLD) == before
    for reaper in reapers:
        assert reaper.statistics().late == 0


@pytest.mark.anyio
async def test_reapers_with_different_sources_share_a_loop(host: Host) -> None:
    """A reaper by SIGCHLD and one by pidfds on the same loop are both served, of their own and of a
    shared child.
    """
    sources: Any = ("sigchld", "pidfd") if host.source == "sigchld" else ("pidfd", "auto")
    async with (
        anyreap.open_reaper(source=sources[0], heartbeat=LONG) as one,
        anyreap.open_reaper(source=sources[1], heartbeat=LONG) as other,
    ):
        with Gate() as gate, anyio.fail_after(SOON):
            pid = gate.add("exit 3")
            children = [one.watch(pid), other.watch(pid), one.watch(gate.add("exit 3"))]
            children.append(other.watch(gate.add("exit 3")))
            gate.open()
            assert [(await child.wait()).exit_code for child in children] == [3] * 4
        assert [one.statistics().reaped, other.statistics().reaped] == [2, 2]


@pytest.mark.anyio
async def test_a_thousand_blocks_leave_nothing(source: Any) -> None:
    """Opened and closed a thousand times, descriptors, handler, threads and tasks are as they were
    at first (F20).
    """
    async with anyreap.open_reaper(source=source):
        pass
    before, handler = set(open_fds()), signal.getsignal(signal.SIGCHLD)
    for _ in range(1000):
        async with anyreap.open_reaper(source=source):
            pass
    assert set(open_fds()) == before
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert len(registry.homes) <= 1
    assert len(registry._table) == 0


# Children of threads ------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("thread", ["ended", "alive"])
async def test_children_that_threads_have_started(source: Any, thread: str) -> None:
    """Children that were started in other threads are served at once, whether these threads have
    ended (I12, B9) or live on, in which case the kernel may give them the signal (B10).
    """
    leave = threading.Event()
    with Gate() as gate:
        started: list[threading.Event] = []
        threads = []
        for code in range(5):

            def start(code: int = code) -> None:
                gate.add(f"exit {code}")
                started[code].set()
                if thread == "alive":
                    leave.wait(2 * SOON)

            started.append(threading.Event())
            threads.append(threading.Thread(target=start))
            threads[-1].start()
            assert started[-1].wait(SOON)
        if thread == "ended":
            for each in threads:
                each.join(SOON)
        try:
            async with anyreap.open_reaper(source=source, heartbeat=LONG) as reaper:
                children = [reaper.watch(pid) for pid in gate.pids]
                await anyio.sleep(0)
                gate.open()
                with anyio.fail_after(SOON):
                    found = [(await child.wait()).exit_code for child in children]
                assert found == list(range(5))
                assert reaper.statistics().late == 0
        finally:
            leave.set()
            for each in threads:
                each.join(SOON)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
def test_wakeup_fd_is_lent_on_when_its_lender_closes(order: tuple[int, int]) -> None:
    """On asyncio the wakeup fd that wakes the loop is one of the open reapers', whichever of them
    closes: children of a live thread, whose signals go to that thread, are noticed at once (B10, I4).
    """

    async def main() -> None:
        blocks = [anyreap.open_reaper(source="sigchld", heartbeat=LONG) for _ in range(2)]
        reapers = [await block.__aenter__() for block in blocks]
        await blocks[order[0]].__aexit__(None, None, None)
        child = reapers[order[1]].watch(gate.pids[0])
        for _ in range(5):
            await anyio.sleep(0)
        threading.Timer(0.05, gate.open).start()  # when the loop sleeps
        with anyio.fail_after(SOON / 4):
            assert (await child.wait()).exit_code == 3
        await blocks[order[1]].__aexit__(None, None, None)

    leave, started = threading.Event(), threading.Event()

    def start() -> None:
        gate.add("exit 3")
        started.set()
        leave.wait(2 * SOON)

    with Gate() as gate:
        thread = threading.Thread(target=start)
        thread.start()
        assert started.wait(SOON)
        try:
            run(HOSTS[2], main)
        finally:
            leave.set()
            thread.join(SOON)


# uvloop's own children ----------------------------------------------------------------------------


def test_children_of_uvloop_beside_ours() -> None:
    """Under uvloop its own subprocesses and ours, started in either order, all get their statuses;
    so does a self-pipe in a later run, although libuv has left its own mark on SIGCHLD (I7, I8,
    0.1).
    """
    run_alone(
        """
    import asyncio

    def theirs(gate, code):
        return asyncio.create_subprocess_exec("sh", "-c", f"read x; exit {code}", stdin=gate.read)

    async def main(order):
        with Gate() as gate, anyio.fail_after(20):
            if order == "theirs first":
                their = [await theirs(gate, code) for code in range(5)]
            async with anyreap.open_reaper(heartbeat=30) as reaper:
                assert reaper.statistics().source == "pidfd"
                ours = []
                if order == "ours first":
                    ours = [reaper.watch(gate.add(f"exit {code}")) for code in range(10, 15)]
                    their = [await theirs(gate, code) for code in range(5)]
                ours += [reaper.watch(gate.add(f"exit {code}")) for code in range(15, 20)]
                their += [await theirs(gate, code) for code in range(5, 10)]
                gate.open()
                expected = list(range(10 if order == "ours first" else 15, 20))
                assert [(await child.wait()).exit_code for child in ours] == expected
                assert [await each.wait() for each in their] == list(range(10))
                # libuv has no child left: it has put SIG_DFL in place
                assert (await reaper.wait(exits_with(3))).exit_code == 3
                last = await theirs(gate, 4)
                assert await last.wait() == 4

    for order in ("theirs first", "ours first", "theirs first"):
        run(main, order)

    async def later(source):
        async with anyreap.open_reaper(source=source, heartbeat=30) as reaper:
            with anyio.fail_after(20):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
            return reaper.statistics().source

    for backend in ("asyncio", "trio"):
        assert anyio.run(later, "sigchld", backend=backend) == "sigchld"
        assert anyio.run(later, "auto", backend=backend) == "sigchld"
    run(main, "ours first")
    """,
        HOSTS[-1],
    )


def test_children_of_uvloop_in_another_thread() -> None:
    """A uvloop in another thread whose libuv takes SIGCHLD from the self-pipe in the main one: both
    get all statuses, ours within a heartbeat, and it is said (0.1, F7).
    """
    done = run_alone(
        """
    import asyncio, uvloop
    from anyio.from_thread import start_blocking_portal

    async def theirs(code):
        process = await asyncio.create_subprocess_exec("sh", "-c", f"exit {code}")
        return await process.wait()

    async def main(portal):
        async with anyreap.open_reaper(source="sigchld", heartbeat=0.2) as reaper:
            with anyio.fail_after(20):
                for code in range(3):
                    future = portal.start_task_soon(theirs, code)
                    assert await anyio.to_thread.run_sync(future.result, 10) == code
                    assert (await reaper.wait(exits_with(code))).exit_code == code
                with Gate() as gate:
                    child = reaper.watch(gate.add("exit 7"))
                    await anyio.sleep(0)
                    gate.open()
                    assert (await child.wait()).exit_code == 7
            print("late", reaper.statistics().late)

    import anyio.to_thread
    with start_blocking_portal("asyncio", {"use_uvloop": True}) as portal:
        run(main, portal)
    """,
        HOSTS[2],
        flags=("-W", "always"),
    )
    assert "late 0" not in done.stdout
    assert done.stderr.count("another SIGCHLD handler took the place") == 1


# Loops that end badly -----------------------------------------------------------------------------


@pytest.mark.parametrize("waits", ["elsewhere", "for its child"])
@pytest.mark.parametrize("host", [HOSTS[2], HOSTS[4]], ids=str)
def test_loop_that_is_closed_under_an_open_block(host: Host, waits: str) -> None:
    """A loop that is closed under a block, and forgotten: no storm of tracebacks, the owned child
    is ended, the other one is there for the next reaper, and all is put back (I11).
    """
    done = run_alone(
        f"""
    import asyncio
    run(anyio.sleep, 0)  # libuv makes a pipe for ever
    before = look()
    if OPTIONS["use_uvloop"]:
        import uvloop
        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    gate = Gate()
    watched, owned = gate.add("exit 3"), sleeper()
    try:
        async def main(started):
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                child = reaper.watch(watched)
                reaper.adopt(owned)
                started.set_result(None)
                await ({waits == "for its child"} and child.wait() or asyncio.Event().wait())

        async def begin():
            started = loop.create_future()
            task = loop.create_task(main(started))
            await started
            await asyncio.sleep(0)

        loop.run_until_complete(begin())
        loop.close()
        del loop, main, begin
        gc.collect()
        gate.open()
        print(anyio.run(anyreap.wait, watched))
        gc.collect()
        gate.close()
        for field, was, now in zip(before._fields, before, look()):
            assert was == now, (field, was, now)
    finally:
        end(owned)
        end(watched)
    """,
        host,
        flags=("-W", "always"),
    )
    assert "exited with code 3" in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Task was destroyed") <= 2  # asyncio's own word for it
    assert "with children running" not in done.stderr


@pytest.mark.parametrize("host", [HOSTS[2], HOSTS[4]], ids=str)
def test_empty_block_of_a_loop_that_is_closed(host: Host) -> None:
    """A block without children, on a loop that is closed and forgotten, puts all back when it is
    collected (I11).
    """
    done = run_alone(
        """
    import asyncio
    run(anyio.sleep, 0)  # libuv makes a pipe for ever
    before = look()
    if OPTIONS["use_uvloop"]:
        import uvloop
        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()

    async def main(started):
        async with anyreap.open_reaper(source=SOURCE):
            started.set_result(None)
            await asyncio.Event().wait()

    async def begin():
        started = loop.create_future()
        task = loop.create_task(main(started))
        await started
        await asyncio.sleep(0)

    loop.run_until_complete(begin())
    loop.close()
    del loop, main, begin
    gc.collect()
    for field, was, now in zip(before._fields, before, look()):
        assert was == now, (field, was, now)
    """,
        host,
        flags=("-W", "always"),
    )
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Task was destroyed") <= 2


@pytest.mark.parametrize("host", HOSTS[2:], ids=str)
def test_service_survives_the_cancellation_of_all_tasks(host: Host) -> None:
    """A program that cancels all tasks, again and again, does not cancel the service, nor wake its
    waiters.
    """

    def cancel_others() -> int:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        return len(others)

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            assert cancel_others() == 1  # before its first step, where a cancellation kills
            for _ in range(10):
                await asyncio.sleep(0)
                cancel_others()
            with Gate() as gate:
                pid = gate.add("exit 3")
                child = reaper.watch(pid)
                for _ in range(10):
                    await asyncio.sleep(0)
                    cancel_others()
                assert child.status is None
                gate.open()
                await_death(pid)
                cancel_others()  # with the exit on its way
                with anyio.fail_after(SOON):
                    assert (await child.wait()).exit_code == 3
            assert reaper.statistics().late == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(host, main)


@pytest.mark.parametrize("host", HOSTS[2:], ids=str)
def test_cancellation_of_all_tasks_ends_the_block_as_usual(host: Host) -> None:
    """Where the task of the block is cancelled along with all others, it ends what it owns and lets
    that go on.
    """
    children = []

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            children.append(reaper.adopt(sleeper()))
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(LONG)

    with pytest.raises(asyncio.CancelledError):
        run(host, main)
    assert children[0].status is not None


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio has no eager tasks here")
@pytest.mark.parametrize("host", HOSTS[2:4], ids=str)
def test_eager_tasks(host: Host) -> None:
    """With asyncio's eager task factory the service works as ever, although its first step comes at
    once.
    """

    async def main() -> None:
        eager: Any = asyncio
        asyncio.get_running_loop().set_task_factory(eager.eager_task_factory)
        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            with anyio.fail_after(SOON), Gate() as gate:
                child = reaper.watch(gate.add("exit 3"))
                await anyio.sleep(0)
                gate.open()
                assert (await child.wait()).exit_code == 3

    run(host, main)


# What is kept alive -------------------------------------------------------------------------------


def ours() -> list[Any]:
    """All objects of reapers that are alive."""
    kinds = (anyreap.Reaper, anyreap.Child, Service, Watch, Record, Finder)
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


def test_closed_reaper_is_collected(host: Host) -> None:
    """After the block, and with the loop still running, nothing keeps the reaper, its service and
    its children (J10).
    """
    gc.collect()
    assert ours() == []

    async def block() -> None:
        async with anyreap.open_reaper(source=host.source) as reaper:
            children = [reaper.watch(exits_with(3)), reaper.adopt(exits_with(4))]
            for child in children:
                await child.wait()
            with anyio.move_on_after(0):
                await reaper.watch(gate.add()).wait()  # this one is left running
            assert ours() != []

    async def main() -> None:
        await block()
        await anyio.sleep(0)  # trio keeps the last value of a task until its next step
        gc.collect()
        assert ours() == []

    with Gate() as gate:
        run(host, main)
        gate.open()
        await_death(*gate.pids)
        collect(gate.pids[0])


def test_finished_child_is_let_go_while_its_reaper_goes_on(host: Host) -> None:
    """A child that has ended, and whose handle was dropped, is kept by nobody: no cycle, no list,
    no event (C11).
    """

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            gc.collect()
            gc.disable()
            try:
                for _ in range(3):
                    assert (await reaper.wait(exits_with(3))).exit_code == 3
                    popen = subprocess.Popen(["true"])
                    assert (await reaper.wait(popen)).success
                    kept = weakref.ref(popen)
                    del popen
                    await until(lambda: kept() is None)  # noqa: B023
                await until(lambda: not [it for it in ours() if isinstance(it, (Watch, Record))])
            finally:
                gc.enable()

    run(host, main)


def test_observed_child_is_let_go_once_its_owner_has_collected_it(host: Host) -> None:
    """A reaper that lives long, and only observes children, keeps nothing of those that their owner
    has collected.
    """

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=0.02) as reaper:
            for _ in range(3):
                pid = exits_with(3)
                assert (await reaper.wait(pid, reap=False)).exit_code == 3
                collect(pid)
            await until(lambda: len(registry._table) == 0)
            gc.collect()
            assert [it for it in ours() if isinstance(it, (Watch, Record))] == []

    run(host, main)


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]], ids=str)
def test_handler_that_somebody_keeps_does_not_keep_the_loop(host: Host) -> None:
    """Somebody who chained to our handler and stays keeps neither a reaper nor its loop alive with
    it (J10, F6).
    """
    before, action = signal.getsignal(signal.SIGCHLD), sigaction()
    loops: list[weakref.ref[Any]] = []

    async def main() -> Any:
        async with anyreap.open_reaper(source="sigchld", heartbeat=LONG) as reaper:
            if host.backend == "asyncio":
                loops.append(weakref.ref(asyncio.get_running_loop()))
            found = signal.getsignal(signal.SIGCHLD)
            called = []

            def chaining(signum: int, frame: Any) -> None:
                called.append(signum)
                assert callable(found)
                found(signum, frame)

            signal.signal(signal.SIGCHLD, chaining)
            with anyio.fail_after(SOON):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
            assert called
            return chaining

    try:
        with pytest.warns(RuntimeWarning, match="another SIGCHLD handler took the place"):
            chaining = run(host, main)
        assert signal.getsignal(signal.SIGCHLD) is chaining  # it is left to them
        gc.collect()
        assert ours() == []
        assert [loop() for loop in loops] == [None for _ in loops]
        collect(exits_with(0))  # theirs is called, and ours through it: it does nothing any more
    finally:
        signal.signal(signal.SIGCHLD, before)
        set_sigaction(*action)


# The heartbeat ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pidfds")
@pytest.mark.parametrize(
    ("host", "noise"),
    # Where there is no self-pipe, other people's children wake nobody.
    [(host, "foreign exits") for host in HOSTS if host.source == "sigchld"]
    + [(host, "children handed in") for host in HOSTS],
    ids=str,
)
def test_heartbeat_is_a_period(host: Host, noise: str) -> None:
    """What only a heartbeat can find (here a status that was stolen from a child without a pidfd)
    is found within one, also while other things wake the service every few milliseconds (promise 5,
    E7).
    """

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=0.2) as reaper:
            with Gate() as gate:
                pid = gate.add("exit 3")
                child = reaper.watch(pid)
                await anyio.sleep(0)
                gate.open()
                collect(pid)  # before the service has a chance
            rounds, before = 0, reaper.statistics().wakeups
            with anyio.fail_after(SOON):
                while not child.lost:
                    rounds += 1
                    if noise == "foreign exits":
                        collect(exits_with(0))
                        await anyio.sleep(0)
                    else:
                        other = exits_with(4)
                        await_death(other)
                        assert (await reaper.wait(other)).exit_code == 4
            assert rounds > 2
            assert reaper.statistics().wakeups - before > 2
            with pytest.raises(anyreap.StatusLost, match="somebody else collected it"):
                await child.wait()
            assert reaper.statistics().lost == 1

    run(host, main)


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]], ids=str)
def test_heartbeat_comes_although_sigchld_is_blocked(host: Host) -> None:
    """With SIGCHLD blocked exits are found within a heartbeat, and counted as late, also while
    other people's children come and go; the mask is left alone (promise 5, F4).
    """
    run_alone(
        """
    from anyreap import _kernel
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])

    async def main(usable):
        _kernel._usable = usable
        async with anyreap.open_reaper(source="sigchld", heartbeat=0.2) as reaper:
            with Gate() as gate, anyio.fail_after(10):
                children = [reaper.watch(gate.add(f"exit {code}")) for code in range(3)]
                await anyio.sleep(0)
                gate.open()
                while children[-1].status is None:
                    collect(exits_with(0))
                    await anyio.sleep(0)
                assert [(await child.wait()).exit_code for child in children] == [0, 1, 2]
            assert reaper.statistics().late > 0
            assert reaper.statistics().wakeups <= 1

    for usable in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(main, usable)
        assert len(caught) == 1 and "SIGCHLD is blocked" in str(caught[0].message), caught
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGCHLD}
    """,
        host,
    )


def test_idle_reaper_costs_a_heartbeat_and_no_more(host: Host) -> None:
    """A reaper with a running child and nothing to do is woken by nothing but its heartbeat."""

    async def main() -> None:
        async with anyreap.open_reaper(source=host.source, heartbeat=LONG) as reaper:
            pid = sleeper()
            child = reaper.watch(pid)
            assert (await reaper.wait(exits_with(3))).exit_code == 3
            for _ in range(100):
                await anyio.sleep(0)
            before = reaper.statistics().wakeups
            with anyio.move_on_after(0.1):
                await child.wait()
            assert reaper.statistics().wakeups <= before + 1
            os.kill(pid, signal.SIGTERM)
            assert (await child.wait()).signal == signal.SIGTERM

    run(host, main)
