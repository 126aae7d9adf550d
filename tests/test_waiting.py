"""Handing a child in, and waiting for it: registration races, waiters and cancellation, Popen and
Process, upgrades, `exits()`, statistics, misuse. The ids (B1, C4, ...) are those of the acceptance
scenarios.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing

import anyreap
from tests.harness import (
    HOSTS,
    Gate,
    Host,
    await_death,
    beat,
    children,
    collect,
    end,
    exits_with,
    is_zombie,
    leaves_with,
    open_fds,
    run_alone,
    runs,
    sleeper,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.anyio

FORK = multiprocessing.get_context("fork")


def shell(gate: Gate, script: str) -> subprocess.Popen[bytes]:
    """A Popen of a shell that waits at a gate, then runs a script."""
    return subprocess.Popen(["/bin/sh", "-c", "read x; " + script], stdin=gate.read)


def process(gate: Gate, code: int) -> multiprocessing.process.BaseProcess:
    """A started multiprocessing.Process that waits at a gate."""
    made = FORK.Process(target=leaves_with, args=(gate, code))
    made.start()
    return made


class Syscalls:
    """Counts the wait calls and kills that go through `os`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        for name in ("waitid", "waitpid", "wait4", "kill", "pidfd_open"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.made.append(name)
            return real(*args)

        return call


@pytest.fixture
def syscalls(monkeypatch: pytest.MonkeyPatch) -> Syscalls:
    """The wait calls and kills that are made from now on."""
    return Syscalls(monkeypatch)


# A, B: registration
# --------------------------------------------------------------------------------------------------


async def test_a_waiter_gets_the_exit_at_once(source: Any, pidfds: bool) -> None:
    """A1: the source, not the heartbeat, tells of an exit; the median over 30 children is below a
    tenth of a second.
    """
    took = []
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        for _ in range(30):
            with Gate() as gate, anyio.fail_after(10):
                child = reaper.watch(gate.add("exit 7"))
                await anyio.lowlevel.checkpoint()
                gate.open()
                await_death(child.pid)
                dead = time.perf_counter()
                status = await child.wait()
                took.append(time.perf_counter() - dead)
            assert status.returncode == 7
            assert status.pid == child.pid
    assert median(took) < 0.1


async def test_zombie_is_handed_in(source: Any, pidfds: bool) -> None:
    """B1, field bug 15: a child that is a zombie already when it is handed in gives its status at
    once.
    """
    pid = exits_with(7)
    await_death(pid)
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with anyio.fail_after(10):
            status = await reaper.wait(pid)
        assert status.returncode == 7
        assert pid not in children()


async def test_exit_before_the_first_wait(source: Any) -> None:
    """B2: a watched child that ends before anybody waits is collected, and the first wait returns
    at once.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 7"))
            before = child.status, child.returncode
            gate.open()
            await until(lambda: child.status is not None)
        assert before == (None, None)
        assert child.pid not in children()
        assert child.returncode == 7
        with anyio.fail_after(10):
            assert await child.wait() is child.status


@pytest.mark.parametrize("place", ["registration", "sweep"])
async def test_exit_between_the_look_and_the_sleep(
    source: Any, pidfds: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B3, field bug 9: an exit that lands just after "it runs on" was answered, before the service
    sleeps, is seen.
    """
    if place == "sweep" and (pidfds or source != "sigchld"):
        pytest.skip("no wait call is made in a sweep that finds nothing through pidfds")
    real = os.waitid
    armed = False

    def waitid(*args: Any) -> Any:
        nonlocal armed
        answer = real(*args)
        if armed and answer is None:
            armed = False
            gate.open()
            real(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return answer

    monkeypatch.setattr(os, "waitid", waitid)
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            pid = gate.add("exit 7")
            if place == "registration":
                armed = True
                child = reaper.watch(pid)
            else:
                child = reaper.watch(pid)
                await anyio.wait_all_tasks_blocked()
                armed = True
                signal.raise_signal(signal.SIGCHLD)
            assert (await child.wait()).returncode == 7
            assert not armed, "the exit was not placed"


async def test_exit_before_the_registration(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: a child that ends while its pidfd is being opened gives its status."""
    real = os.pidfd_open

    def pidfd_open(pid: int, *args: Any) -> int:
        if pid in gate.pids:
            gate.open()
            await_death(pid)
        return real(pid, *args)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            assert (await reaper.wait(gate.add("exit 7"))).returncode == 7


async def test_dead_before_the_reaper_was_opened(source: Any) -> None:
    """B5: children that ended before there was a service, and before it ran its first step, are
    found.
    """
    pids = [exits_with(code) for code in range(5)]
    await_death(*pids)
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        watched = [reaper.watch(pid) for pid in pids]
        with anyio.fail_after(10):
            assert [(await child.wait()).returncode for child in watched] == list(range(5))


async def test_same_pid_twice(source: Any) -> None:
    """B6, field bug 39: a pid that is handed in again gives the same Child, and
    is collected once.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            assert reaper.watch(child.pid) is child
            assert reaper.statistics().watched == 1
            gate.open()
            assert (await reaper.wait(child.pid)).returncode == 7
        assert reaper.statistics().reaped == 1


@pytest.mark.parametrize("live", [True, False], ids=["thread-lives", "thread-ended"])
async def test_spawned_in_another_thread(source: Any, live: bool) -> None:
    """B9, I12: a child that another thread forked is served, whether that thread still lives or
    not.
    """
    release = threading.Event()
    spawned = threading.Event()
    pids = []

    def spawn() -> None:
        pids.append(gate.add("exit 7"))
        spawned.set()
        if live:
            release.wait(30)

    with Gate() as gate:
        thread = threading.Thread(target=spawn)
        thread.start()
        try:
            assert spawned.wait(30)
            if not live:
                thread.join()
            async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
                child = reaper.watch(pids[0])
                with anyio.fail_after(10):
                    await anyio.wait_all_tasks_blocked()
                    gate.open()
                    assert (await child.wait()).returncode == 7
        finally:
            release.set()
            thread.join()


def test_spawned_in_one_runtime_awaited_in_the_next(host: Host, pidfds: bool) -> None:
    """B11: a child that was watched in one loop, and not collected there, is awaited in the next
    one.
    """
    handles = []

    async def first() -> None:
        async with anyreap.open_reaper(source=host.source) as reaper:
            handles.append(reaper.watch(gate.add("exit 7")))

    async def second() -> None:
        gate.open()
        heartbeat = beat(host.source, pidfds=pidfds)
        async with anyreap.open_reaper(source=host.source, heartbeat=heartbeat) as reaper:
            with anyio.fail_after(10):
                assert (await reaper.wait(handles[0].pid)).returncode == 7

    with Gate() as gate:
        for main in (first, second):
            anyio.run(main, backend=host.backend, backend_options=host.options)
    assert handles[0].status is None


async def test_popen_that_has_polled(source: Any, pidfds: bool, syscalls: Syscalls) -> None:
    """B12: a Popen whose code is set gives a finished Child, no question asked; its bare pid is
    NotAChild.
    """
    popen = subprocess.Popen(["/bin/sh", "-c", "exit 7"])
    popen.wait()
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        syscalls.made.clear()
        child = reaper.watch(popen)
        assert child.returncode == 7
        assert not child.lost
        with anyio.fail_after(10):
            status = await child.wait()
        assert status == anyreap.ExitStatus(popen.pid, 7)
        assert not syscalls.made
        assert reaper.adopt(popen).returncode == 7
        now = reaper.statistics()
        assert (now.watched, now.owned, now.reaped, now.lost) == (0, 0, 0, 0)
        with pytest.raises(anyreap.NotAChild):
            reaper.watch(popen.pid)


async def test_no_pidfd_for_this_child(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """B14, field bug 34: a child whose pidfd can't be opened is served all the same, and no
    descriptor is leaked.
    """
    real = os.pidfd_open
    errnos = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.ENOSYS]

    def pidfd_open(pid: int, *args: Any) -> int:
        if pid in gate.pids:
            raise OSError(errnos[0], os.strerror(errnos[0]))
        return real(pid, *args)

    async with anyreap.open_reaper(source=source, heartbeat=0.01) as reaper:
        before = open_fds()
        monkeypatch.setattr(os, "pidfd_open", pidfd_open)
        while errnos:
            with Gate() as gate, anyio.fail_after(10):
                child = reaper.watch(gate.add("exit 7"))
                other = reaper.watch(exits_with(3))
                assert (await other.wait()).returncode == 3
                gate.open()
                assert (await child.wait()).returncode == 7
            del errnos[0]
        assert open_fds().keys() == before.keys()


def test_no_descriptor_left_at_all(host: Host) -> None:
    """B14, G5: with every descriptor in use, children that run already are watched, collected and
    not lost.
    """
    run_alone(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                with Gate() as gate, anyio.fail_after(20):
                    pids = [gate.add(f"exit {code}") for code in range(8)]
                    hogs = []
                    try:
                        while True:
                            hogs.append(os.dup(0))
                    except OSError:
                        pass
                    watched = [reaper.watch(pid) for pid in pids]
                    gate.open()
                    codes = [(await child.wait()).returncode for child in watched]
                    assert codes == list(range(8)), codes
                    for fd in hogs:
                        os.close(fd)
        run(main)
        assert not children()
        """,
        host,
    )


# B7, B8: bad input --------------------------------------------------------------------------------
# -------------------


@pytest.fixture
def bystanders() -> Iterator[tuple[int, int]]:
    """A running child and a zombie that nobody handed in: still there, and still so, at the end."""
    running, zombie = sleeper(), exits_with(9)
    await_death(zombie)
    yield running, zombie
    assert runs(running)
    assert is_zombie(zombie)
    end(running)
    assert collect(zombie) == 9


BAD: list[tuple[Any, type[Exception]]] = [
    (0, ValueError),
    (-1, ValueError),
    (-(2**70), ValueError),
    (-os.getpgrp(), ValueError),
    (True, TypeError),
    (False, TypeError),
    (12.0, TypeError),
    (math.nan, TypeError),
    ("12", TypeError),
    (b"12", TypeError),
    (None, TypeError),
    ([12], TypeError),
    (subprocess.Popen, TypeError),
    (1, anyreap.NotAChild),
    (os.getppid(), anyreap.NotAChild),
    (2**40, anyreap.NotAChild),
    (2**70, anyreap.NotAChild),
    (2**31, anyreap.NotAChild),
    (2**31 - 1, anyreap.NotAChild),
]


async def test_bad_input(source: Any, pidfds: bool, bystanders: tuple[int, int]) -> None:
    """B7: what is no child of ours is refused with the right error; nothing is collected, nothing
    is signalled.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        before = open_fds()
        for value, error in BAD:
            with pytest.raises(error) as caught:
                reaper.watch(value)
            assert type(caught.value) is error
            with pytest.raises(error):
                reaper.adopt(value)
            with pytest.raises(error), anyio.fail_after(10):
                await reaper.wait(value)
            if isinstance(caught.value, anyreap.NotAChild):
                assert caught.value.pid == value
                assert caught.value.errno == errno.ECHILD
        now = reaper.statistics()
        assert (now.watched, now.owned, now.reaped, now.lost) == (0, 0, 0, 0)
        assert open_fds().keys() == before.keys()


async def test_bad_input_to_the_one_shot_wait(source: Any, bystanders: tuple[int, int]) -> None:
    """B7: `anyreap.wait` refuses the same things with the same errors."""
    for value, error in BAD:
        with pytest.raises(error), anyio.fail_after(10):
            await anyreap.wait(value)


async def test_this_process_and_its_threads(source: Any) -> None:
    """B7: this process and a thread of it are no children of it."""
    release, known = threading.Event(), threading.Event()

    def idle() -> None:
        known.set()
        release.wait(30)

    thread = threading.Thread(target=idle)
    thread.start()
    try:
        assert known.wait(30)
        assert thread.native_id is not None
        async with anyreap.open_reaper(source=source) as reaper:
            for pid in (os.getpid(), thread.native_id):
                with pytest.raises(anyreap.NotAChild):
                    reaper.watch(pid)
    finally:
        release.set()
        thread.join()


async def test_grandchild(source: Any) -> None:
    """B8: a grandchild is refused at once, and runs on."""
    read, write = os.pipe()
    script = "sleep 3600 & echo $!; read x"
    with Gate() as gate, os.fdopen(read) as output:
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", script],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, gate.read, 0), (os.POSIX_SPAWN_DUP2, write, 1)],
        )
        os.close(write)
        grandchild = int(output.readline())
        try:
            async with anyreap.open_reaper(source=source) as reaper:
                with pytest.raises(anyreap.NotAChild, match=str(grandchild)), anyio.fail_after(10):
                    await reaper.wait(grandchild)
            assert runs(grandchild)
        finally:
            os.kill(grandchild, signal.SIGKILL)
            gate.open()
            collect(pid)


async def test_closed_reaper(source: Any, bystanders: tuple[int, int]) -> None:
    """A reaper whose block was left is refused with an error that says so; its statistics can still
    be read.
    """
    async with anyreap.open_reaper(source=source) as reaper:
        pass
    running, zombie = bystanders
    for pid in (running, zombie, 0, 1):
        with pytest.raises(RuntimeError, match="closed"):
            reaper.watch(pid)
        with pytest.raises(RuntimeError, match="closed"):
            reaper.adopt(pid)
        with pytest.raises(RuntimeError, match="closed"):
            await reaper.wait(pid)
    with pytest.raises(RuntimeError, match="closed"):
        reaper.exits()
    assert reaper.statistics().reaped == 0


async def test_another_thread(source: Any, bystanders: tuple[int, int]) -> None:
    """A reaper, and a Child of it, used from another thread: an error that says so, and nothing
    happens.
    """
    running, zombie = bystanders
    async with anyreap.open_reaper(source=source) as reaper:
        child = reaper.watch(running)
        uses: list[Callable[[], object]] = [
            lambda: reaper.watch(zombie),
            lambda: reaper.adopt(zombie),
            reaper.exits,
            child.kill,
            lambda: child.wait().send(None),
        ]
        errors: list[BaseException] = []

        def use_all() -> None:
            for use in uses:
                try:
                    use()
                except RuntimeError as exc:
                    errors.append(exc)

        thread = threading.Thread(target=use_all)
        thread.start()
        thread.join()
        assert len(errors) == len(uses)
        assert all("thread" in str(exc) for exc in errors)


async def test_forked_child(source: Any, pidfds: bool, bystanders: tuple[int, int]) -> None:
    """J1, promise 7: in a forked child a reaper and its children raise an error that says so, and
    nothing happens.
    """
    running, zombie = bystanders
    with Gate() as gate:
        heartbeat = beat(source, pidfds=pidfds)
        async with anyreap.open_reaper(source=source, heartbeat=heartbeat) as reaper:
            child = reaper.watch(gate.add("exit 7"))
            observed = reaper.watch(running)
            uses: list[Callable[[], object]] = [
                lambda: reaper.watch(zombie),
                lambda: reaper.adopt(zombie),
                reaper.exits,
                observed.kill,
                child.terminate,
                lambda: child.wait().send(None),
            ]
            pid = os.fork()
            if pid == 0:  # pragma: no cover
                code = 0
                for use in uses:
                    try:
                        use()
                        code = 1
                    except RuntimeError as exc:
                        code = code or (0 if "forked" in str(exc) else 2)
                    except BaseException:  # noqa: BLE001
                        code = 3
                os._exit(code)
            assert collect(pid) == 0
            gate.open()
            with anyio.fail_after(10):
                assert (await child.wait()).returncode == 7


def test_not_made_by_hand() -> None:
    """A Reaper and a Child made by their constructors: an error that says what to call."""
    with pytest.raises(TypeError, match="open_reaper"):
        anyreap.Reaper()
    with pytest.raises(TypeError, match="watch"):
        anyreap.Child()


async def test_not_a_child_again_after_its_collection(source: Any) -> None:
    """A pid that has been collected is NotAChild again, to every method."""
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        pid = exits_with(7)
        with anyio.fail_after(10):
            await reaper.wait(pid)
        with pytest.raises(anyreap.NotAChild) as caught:
            reaper.watch(pid)
        assert caught.value.pid == pid
        with pytest.raises(anyreap.NotAChild):
            reaper.adopt(pid)
        with pytest.raises(anyreap.NotAChild):
            await reaper.wait(pid)


# C: waiters and cancellation
# -----------------------------------------------------------------------------------------


async def test_ten_waiters(source: Any) -> None:
    """C1: ten tasks that wait for one child all get its one status."""
    got: list[anyreap.ExitStatus] = []

    async def wait() -> None:
        got.append(await child.wait())

    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                gate.open()
    assert len(got) == 10
    assert all(status is child.status for status in got)


async def test_one_waiter_of_three_is_cancelled(source: Any) -> None:
    """C2, field bug 37: cancelling one waiter leaves the child alive and the
    other waiters served.
    """
    got: list[anyreap.ExitStatus] = []
    scope = anyio.CancelScope()

    async def wait(within: anyio.CancelScope) -> None:
        with within:
            got.append(await child.wait())

    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            async with anyio.create_task_group() as tasks:
                for each in (anyio.CancelScope(), scope, anyio.CancelScope()):
                    tasks.start_soon(wait, each)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
                await anyio.wait_all_tasks_blocked()
                assert runs(child.pid)
                gate.open()
    assert scope.cancelled_caught
    assert [status.returncode for status in got] == [7, 7]


async def test_all_waiters_are_cancelled(source: Any) -> None:
    """C3: with all its waiters cancelled a child is still collected when it ends, and a later wait
    gets its status.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            for _ in range(3):
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(child.wait)
                        tasks.start_soon(child.wait)
                        await anyio.wait_all_tasks_blocked()
                        scope.cancel()
                assert scope.cancelled_caught
            gate.open()
            await until(lambda: child.pid not in children())
            assert (await child.wait()).returncode == 7


async def test_cancellation_and_exit_in_any_order(source: Any) -> None:
    """C4: a wait that is cancelled as its child ends may go either way; the status is still there
    afterwards.
    """
    seen = set()

    async def wait() -> None:
        with scope:
            got.append(await child.wait())

    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        for seed in range(80):
            rng = random.Random(seed)
            got: list[anyreap.ExitStatus] = []
            scope = anyio.CancelScope()
            with Gate() as gate, anyio.fail_after(10):
                child = reaper.watch(gate.add("exit 7"))

                def die(gate: Gate = gate, rng: random.Random = rng) -> None:
                    gate.open()
                    if rng.random() < 0.7:
                        await_death(*gate.pids)

                steps: list[Callable[[], object]] = [die, scope.cancel]
                rng.shuffle(steps)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait)
                    await anyio.wait_all_tasks_blocked()
                    for step in steps:
                        step()
                        for _ in range(rng.randrange(5)):
                            await anyio.lowlevel.checkpoint()
                assert (await child.wait()).returncode == 7
            assert [status.returncode for status in got] in ([], [7])
            seen.add(len(got))
        assert reaper.statistics().reaped == 80
    assert seen == {0, 1}, "one of the two outcomes never came: the orders are not mixed"


def test_deadline_at_the_instant_of_the_exit() -> None:
    """C5: a deadline that passes in the same step as the exit is seen may go either way; the status
    is kept.
    """
    clock = trio.testing.MockClock()

    async def wait(child: anyreap.Child) -> None:
        with trio.move_on_after(5):
            got.append(await child.wait())

    async def main() -> None:
        async with anyreap.open_reaper(source="sigchld", heartbeat=3600) as reaper:
            for _ in range(30):
                got.clear()
                with Gate() as gate:
                    child = reaper.watch(gate.add("exit 7"))
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(wait, child)
                        await trio.testing.wait_all_tasks_blocked()
                        gate.open()
                        await_death(child.pid)
                        clock.jump(5)
                    assert (await child.wait()).returncode == 7
                    assert [status.returncode for status in got] in ([], [7])

    got: list[anyreap.ExitStatus] = []
    trio.run(main, clock=clock)


async def test_a_thousand_waits_after_the_end(source: Any, syscalls: Syscalls) -> None:
    """C6: after the end, each wait gives the same object, is a checkpoint, and asks the kernel
    nothing.
    """
    passes = 0

    async def count() -> None:
        nonlocal passes
        while True:
            passes += 1
            await anyio.lowlevel.checkpoint()

    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with anyio.fail_after(10):
            child = reaper.watch(exits_with(7))
            status = await child.wait()
            await anyio.wait_all_tasks_blocked()
            syscalls.made.clear()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(count)
                await anyio.lowlevel.checkpoint()
                before = passes
                for _ in range(1000):
                    assert await child.wait() is status
                tasks.cancel_scope.cancel()
    assert passes - before >= 999
    assert not syscalls.made


async def test_wait_in_a_cancelled_scope(source: Any) -> None:
    """C7: a wait for a dead child in a scope that is cancelled already is cancelled, and the status
    is kept.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with anyio.fail_after(10):
            child = reaper.watch(exits_with(7))
            await child.wait()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await child.wait()
        assert scope.cancelled_caught
        # And one that is handed in there, dead or not.
        pid = exits_with(3)
        await_death(pid)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await reaper.wait(pid)
        assert scope.cancelled_caught
        with anyio.fail_after(10):
            assert (await child.wait()).returncode == 7
            await until(lambda: pid not in children())


async def test_wait_after_the_block(source: Any) -> None:
    """C8: after the block a known status is still told; of a child that ran on,
    ClosedResourceError, never StatusLost.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        ended = reaper.watch(exits_with(7))
        running = reaper.watch(sleeper())
        with anyio.fail_after(10):
            await ended.wait()
    with anyio.fail_after(10):
        assert (await ended.wait()).returncode == 7
        with pytest.raises(anyio.ClosedResourceError):
            await running.wait()
    assert not running.lost
    assert running.status is None
    assert runs(running.pid)
    running.kill()  # its signals still go to it
    assert collect(running.pid) == -signal.SIGKILL
    running.kill()  # quiet, as for every child that has ended


async def test_pidfds_that_somebody_has_closed(source: Any) -> None:
    """Somebody has closed the pidfd of a child that still runs: the block is left as always, and all is put back."""
    pid = sleeper()
    before = set(open_fds())
    async with anyreap.open_reaper(source=source) as reaper:
        reaper.watch(pid)
        for fd in [fd for fd, name in open_fds().items() if "pidfd" in name]:
            os.close(fd)
    assert set(open_fds()) == before
    end(pid)


async def test_waiter_when_the_block_is_left(source: Any) -> None:
    """C8: a task elsewhere that waits for a watched child when the block is left gets
    ClosedResourceError.
    """
    errors: list[BaseException] = []

    async def wait(child: anyreap.Child) -> None:
        try:
            await child.wait()
        except anyio.ClosedResourceError as exc:
            errors.append(exc)

    pid = sleeper()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source) as reaper:
            child = reaper.watch(pid)
            tasks.start_soon(wait, child)
            tasks.start_soon(wait, child)
            await anyio.wait_all_tasks_blocked()
    assert len(errors) == 2
    end(pid)


async def test_waiting_task_is_dropped(source: Any, anyio_backend: tuple[str, Any]) -> None:
    """C10: a waiting task that nobody refers to disturbs nobody: the child is collected, and no
    warning comes.
    """
    if anyio_backend[0] == "trio":
        pytest.skip("a trio task belongs to a nursery: it can't be dropped")
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            asyncio.get_running_loop().create_task(child.wait())
            await anyio.wait_all_tasks_blocked()
            gc.collect()
            gate.open()
            await until(lambda: child.pid not in children())
            gc.collect()
            assert (await child.wait()).returncode == 7


async def test_handle_is_dropped(source: Any) -> None:
    """C11, field bug 53: a child whose handle was dropped without a wait is collected
    when it ends.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate:
            pid = gate.add("exit 7")
            reaper.watch(pid)
            gc.collect()
            gate.open()
            await until(lambda: pid not in children())
            assert reaper.statistics().reaped == 1


async def test_shielded_waiter(source: Any) -> None:
    """C12: a shielded wait inside of a cancelled scope returns the status."""
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            with anyio.CancelScope() as outer:
                outer.cancel()
                gate.open()
                with anyio.CancelScope(shield=True):
                    assert (await child.wait()).returncode == 7


async def test_native_cancellation_of_a_waiter(source: Any, anyio_backend: tuple[str, Any]) -> None:
    """C2: `asyncio.timeout` and `Task.cancel` cancel a wait as a cancel scope does, and nothing
    else.
    """
    if anyio_backend[0] == "trio":
        pytest.skip("asyncio's own cancellation")
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await child.wait()
            task = asyncio.create_task(child.wait())
            await anyio.wait_all_tasks_blocked()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            assert (await child.wait()).returncode == 7


# Popen and multiprocessing.Process
# -----------------------------------------------------------------------------------


async def test_popen(source: Any, pidfds: bool) -> None:
    """E10: a Popen is collected through its own method: its returncode is right afterwards, with
    nothing asked of it.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            popen = shell(gate, "exit 7")
            child = reaper.watch(popen)
            assert child.pid == popen.pid
            before = popen.returncode
            gate.open()
            status = await child.wait()
            assert (before, popen.returncode) == (None, 7)
        assert status == anyreap.ExitStatus(popen.pid, 7)
        assert popen.wait() == 7
        assert reaper.statistics().reaped == 1


async def test_popen_killed_by_a_signal(source: Any) -> None:
    """E10: the returncode of a Popen whose child was killed is the negative signal number, as it is
    in our status.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        popen = subprocess.Popen(["sleep", "3600"])
        child = reaper.watch(popen)
        child.send_signal(signal.SIGUSR1)
        with anyio.fail_after(10):
            assert (await child.wait()).returncode == -signal.SIGUSR1 == popen.returncode


async def test_popen_awaited_in_a_thread(source: Any, pidfds: bool) -> None:
    """E10: `Popen.wait()` in another thread and our wait at the same time both get the status, in
    every round.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.02) as reaper:
        for _ in range(8):
            with Gate() as gate, anyio.fail_after(10):
                popen = shell(gate, "exit 7")
                child = reaper.watch(popen)
                thread = threading.Thread(target=popen.wait)
                thread.start()
                await anyio.wait_all_tasks_blocked()
                gate.open()
                assert (await child.wait()).returncode == 7
                thread.join()
                assert popen.returncode == 7


async def test_popen_collected_but_not_told_yet(source: Any, pidfds: bool) -> None:
    """Promise 2: `Popen.wait()` in a thread has taken the status and not noted it yet: we wait for
    it, it isn't lost.
    """
    # The moment between the waitpid() of the thread and its `self.returncode = ...`, made long.
    taken, noted = threading.Event(), threading.Event()

    async with anyreap.open_reaper(source=source, heartbeat=0.02) as reaper:
        with Gate() as gate, anyio.fail_after(20):
            popen: Any = shell(gate, "exit 7")
            real = popen._try_wait

            def try_wait(flags: int) -> Any:
                answer = real(flags)
                taken.set()
                noted.wait(20)
                return answer

            child = reaper.watch(popen)
            popen._try_wait = try_wait
            thread = threading.Thread(target=popen.wait)
            thread.start()
            try:
                gate.open()
                assert taken.wait(20)
                await anyio.sleep(0.1)  # several heartbeats
            finally:
                noted.set()
                thread.join()
            assert (await child.wait()).returncode == 7
            assert popen.returncode == 7


async def test_process_collected_but_not_told_yet(
    source: Any,
    pidfds: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise 2: `Process.join()` in a thread has taken the status and not noted it yet: it isn't
    lost either.
    """
    taken, noted = threading.Event(), threading.Event()
    real = os.waitpid

    async with anyreap.open_reaper(source=source, heartbeat=0.02) as reaper:
        with Gate() as gate, anyio.fail_after(20):
            made = process(gate, 7)

            def waitpid(pid: int, flags: int) -> tuple[int, int]:
                answer = real(pid, flags)
                if answer[0] == made.pid and threading.current_thread() is thread:
                    taken.set()
                    noted.wait(20)
                return answer

            child = reaper.watch(made)
            monkeypatch.setattr(os, "waitpid", waitpid)
            thread = threading.Thread(target=made.join)
            thread.start()
            try:
                gate.open()
                assert taken.wait(20)
                await anyio.sleep(0.04)  # a thread may take that long to get the GIL back
            finally:
                noted.set()
                thread.join()
            assert (await child.wait()).returncode == 7
            assert made.exitcode == 7
            made.close()


async def test_popen_whose_lock_is_held(source: Any, pidfds: bool) -> None:
    """Promise 8: while another thread holds a Popen's lock its child can't be collected: the loop
    runs on, then it is.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            popen: Any = shell(gate, "exit 7")
            child = reaper.watch(popen)
            other = reaper.watch(gate.add("exit 3"))
            with popen._waitpid_lock:
                gate.open()
                await_death(popen.pid, other.pid)
                assert (await other.wait()).returncode == 3
                await anyio.sleep(0.02)
                assert child.status is None
                assert is_zombie(child.pid)
            assert (await child.wait()).returncode == 7
            assert popen.returncode == 7


async def test_popen_polled_by_its_owner(source: Any) -> None:
    """E10, field bug 24: a `popen.poll()` of the owner that takes the status gives it to our waiter
    too.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            popen = shell(gate, "exit 7")
            child = reaper.watch(popen)
            await anyio.wait_all_tasks_blocked()
            gate.open()
            await_death(popen.pid)
            assert popen.poll() == 7
            assert (await child.wait()).returncode == 7
        assert reaper.statistics().lost == 0


async def test_process(source: Any, pidfds: bool) -> None:
    """A multiprocessing.Process is collected through itself: exitcode, is_alive and join are right
    afterwards (0.16).
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            made = process(gate, 7)
            child = reaper.watch(made)
            assert child.pid == made.pid
            assert made.is_alive()
            gate.open()
            assert (await child.wait()).returncode == 7
            assert made.exitcode == 7
            assert not made.is_alive()
            made.join(0)
            assert reaper.watch(made).returncode == 7
            made.close()
            with pytest.raises(ValueError):
                reaper.watch(made)


async def test_process_joined_in_a_thread(source: Any) -> None:
    """A Process joined in another thread at the same time: both get its code."""
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            made = process(gate, 7)
            child = reaper.watch(made)
            thread = threading.Thread(target=made.join)
            thread.start()
            gate.open()
            assert (await child.wait()).returncode == 7
            thread.join()
            assert made.exitcode == 7
            made.close()


async def test_process_that_was_not_started(source: Any) -> None:
    """A Process that was not started is a ValueError that says so, and can be handed in once it
    was.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            made = FORK.Process(target=leaves_with, args=(gate, 7))
            for hand_in in (reaper.watch, reaper.adopt):
                with pytest.raises(ValueError, match="start"):
                    hand_in(made)
            made.start()
            gate.open()
            assert (await reaper.wait(made)).returncode == 7
            made.close()


def test_processes_of_other_start_methods(host: Host) -> None:
    """J6: a "spawn" Process is a child like any other; one of the fork server is NotAChild, until
    its code is known.
    """
    run_alone(
        """
        import multiprocessing, multiprocessing.forkserver, multiprocessing.resource_tracker
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                made = multiprocessing.get_context("spawn").Process(target=os._exit, args=(7,))
                made.start()
                assert (await reaper.wait(made)).returncode == 7
                assert made.exitcode == 7
                made.close()
                made = multiprocessing.get_context("forkserver").Process(target=os._exit, args=(5,))
                made.start()
                for hand_in in (reaper.watch, reaper.adopt):
                    try:
                        hand_in(made)
                    except anyreap.NotAChild as exc:
                        assert "fork server" in str(exc) and exc.pid == made.pid, exc
                    else:
                        raise AssertionError("a child of the fork server was taken")
                made.join()
                assert made.exitcode == 5
                assert (await reaper.wait(made)).returncode == 5
                made.close()
        run(main)
        multiprocessing.forkserver._forkserver._stop()
        """,
        host,
    )


# reap=False ---------------------------------------------------------------------------------------
# -------------------


async def test_observed_child_is_left_to_its_owner(source: Any, pidfds: bool) -> None:
    """`reap=False` sees the exit and leaves the zombie: its owner still gets the status, also from
    a Popen.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            pid, popen = gate.add("exit 7"), shell(gate, "exit 8")
            gate.open()
            assert (await reaper.wait(pid, reap=False)).returncode == 7
            assert (await reaper.wait(popen, reap=False)).returncode == 8
            # Again: still seen, the same way.
            assert (await reaper.wait(pid, reap=False)).returncode == 7
        assert is_zombie(pid)
        assert is_zombie(popen.pid)
        assert popen.returncode is None
        assert reaper.statistics().reaped == 0
    assert collect(pid) == 7
    assert popen.wait() == 8


async def test_observed_child_that_its_owner_has_collected(source: Any, pidfds: bool) -> None:
    """The owner of an observed child collects it: its status stays known, it is not lost, its pid
    is NotAChild again.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        with anyio.fail_after(10):
            child = reaper.watch(exits_with(7), reap=False)
            await child.wait()
            assert collect(child.pid) == 7
            with pytest.raises(anyreap.NotAChild):
                reaper.watch(child.pid)
            assert (await child.wait()).returncode == 7
        assert not child.lost
        assert reaper.statistics().lost == 0
        child.kill()  # it has ended: nothing happens


async def test_observed_children_are_forgotten(source: Any, pidfds: bool) -> None:
    """Promise 10: once its owner has collected an observed child, and nobody holds its handle,
    nothing is left of it.
    """

    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, anyreap.Child) for found in gc.get_objects())

    before = alive()
    async with anyreap.open_reaper(source=source, heartbeat=0.02) as reaper:
        for _ in range(20):
            pid = exits_with(0)
            with anyio.fail_after(10):
                await reaper.wait(pid, reap=False)
            collect(pid)
        await until(lambda: alive() == before, within=2)


async def test_observed_here_and_collected_there(source: Any, pidfds: bool) -> None:
    """If anyone asks for the collecting, it is collected: one reaper observes, another one
    collects.
    """
    async with (
        anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as one,
        anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as two,
    ):
        with Gate() as gate, anyio.fail_after(10):
            pid = gate.add("exit 7")
            observing, collecting = one.watch(pid, reap=False), two.watch(pid)
            gate.open()
            assert (await observing.wait()) is (await collecting.wait())
            assert pid not in children()
        assert (one.statistics().reaped, two.statistics().reaped) == (0, 1)


# Upgrades -----------------------------------------------------------------------------------------
# -------------------


async def test_upgraded_to_be_collected(source: Any, pidfds: bool) -> None:
    """`reap=True` beats `False`, on the same Child, while it runs and while it is a zombie that was
    seen.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        for dead in (False, True):
            with Gate() as gate, anyio.fail_after(10):
                child = reaper.watch(gate.add("exit 7"), reap=False)
                if dead:
                    gate.open()
                    await child.wait()
                    assert is_zombie(child.pid)
                assert reaper.watch(child.pid) is child
                gate.open()
                assert (await child.wait()).returncode == 7
                await until(lambda pid=child.pid: pid not in children())
        assert reaper.statistics().reaped == 2


async def test_upgraded_before_it_is_heard_of(source: Any) -> None:
    """A reaper in another thread has seen the end of a child, and here it is asked to be collected before that is heard
    of: who waited here already is told.
    """
    gate = Gate()
    pid = gate.add("exit 3")
    watched, seen, go = threading.Event(), threading.Event(), threading.Event()

    async def elsewhere() -> None:
        async with anyreap.open_reaper(heartbeat=0.05) as reaper:
            child = reaper.watch(pid, reap=False)
            watched.set()
            await child.wait()
            seen.set()
            while not go.is_set():
                await anyio.sleep(0.002)

    thread = threading.Thread(target=anyio.run, args=[elsewhere])
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source) as reaper, anyio.create_task_group() as tasks:
            child = reaper.watch(pid, reap=False)
            tasks.start_soon(child.wait)
            await anyio.wait_all_tasks_blocked()
            thread.start()
            try:
                assert watched.wait(20)
                gate.open()
                assert seen.wait(20)  # this thread's loop does not run meanwhile
                assert reaper.watch(pid) is child
                assert (await child.wait()).exit_code == 3
            finally:
                go.set()
                thread.join()
    gate.close()


async def test_never_downgraded(source: Any) -> None:
    """A later `reap=False` changes nothing for a child that is to be collected."""
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            assert reaper.watch(child.pid, reap=False) is child
            owned = reaper.adopt(gate.add("exit 8"))
            assert reaper.watch(owned.pid, reap=False) is owned
            assert reaper.statistics().owned == 1
            gate.open()
            assert (await reaper.wait(child.pid, reap=False)).returncode == 7
            assert (await owned.wait()).returncode == 8
            assert not children() & {child.pid, owned.pid}


async def test_popen_given_later(source: Any, pidfds: bool) -> None:
    """A Popen or a Process that is given after its pid takes over the collecting, on the same
    Child.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        for reap in (True, False):
            with Gate() as gate, anyio.fail_after(10):
                popen, made = shell(gate, "exit 7"), process(gate, 8)
                assert made.pid is not None
                first = reaper.watch(popen.pid, reap=reap)
                second = reaper.watch(made.pid, reap=reap)
                assert reaper.watch(popen) is first
                assert reaper.watch(made) is second
                assert reaper.watch(popen.pid) is first
                gate.open()
                assert (await first.wait()).returncode == 7 == popen.returncode
                assert (await second.wait()).returncode == 8 == made.exitcode
                made.close()


async def test_adopted_later(source: Any) -> None:
    """A watched child that is adopted is owned from then on: the block waits for it."""
    with Gate() as gate:
        async with anyio.create_task_group() as tasks:
            with anyio.fail_after(10):
                async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
                    child = reaper.watch(gate.add("exit 7"), reap=False)
                    assert reaper.statistics().owned == 0
                    assert reaper.adopt(child.pid) is child
                    assert reaper.adopt(child.pid) is child
                    now = reaper.statistics()
                    assert (now.watched, now.owned) == (1, 1)

                    async def open_it() -> None:
                        await anyio.wait_all_tasks_blocked()
                        gate.open()

                    tasks.start_soon(open_it)
        assert child.returncode == 7
        assert child.pid not in children()


async def test_adopted_again(source: Any) -> None:
    """A second `adopt` replaces the policy."""
    with anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source) as reaper:
            child = reaper.adopt(sleeper(), shutdown=anyreap.Shutdown(signal=signal.SIGUSR1))
            other = anyreap.Shutdown(signal=signal.SIGUSR2)
            assert reaper.adopt(child.pid, shutdown=other) is child
            scope.cancel()
    assert child.returncode == -signal.SIGUSR2


# Two reapers --------------------------------------------------------------------------------------
# -------------------


async def test_two_reapers_on_one_loop(source: Any, pidfds: bool) -> None:
    """E11, I4: two reapers on one loop share a child, both with its one status, whichever of them
    closes first.
    """
    heartbeat = beat(source, pidfds=pidfds)
    for order in ("inner-first", "outer-first"):
        blocks = [anyreap.open_reaper(source=source, heartbeat=heartbeat) for _ in range(2)]
        one, two = [await block.__aenter__() for block in blocks]
        with Gate() as gate, Gate() as later, anyio.fail_after(20):
            shared = gate.add("exit 7")
            first, second = one.watch(shared), two.watch(shared)
            assert first is not second
            gate.open()
            assert await first.wait() is await second.wait()
            assert shared not in children()
            # The one that stays serves what it has, the shared ones too.
            shared = later.add("exit 8")
            first, second = one.watch(shared), two.watch(shared)
            left, kept = (blocks[1], first) if order == "inner-first" else (blocks[0], second)
            await left.__aexit__(None, None, None)
            later.open()
            assert (await kept.wait()).returncode == 8
            blocks.remove(left)
            await blocks[0].__aexit__(None, None, None)
        assert one.statistics().lost == two.statistics().lost == 0


def test_two_reapers_in_two_threads(host: Host, pidfds: bool) -> None:
    """E11, I2, field bug 47: reapers in two threads that share their children both get every
    status, none is lost.
    """
    ready = threading.Barrier(2, timeout=30)
    results: list[list[int]] = []
    errors: list[BaseException] = []

    async def main(source: Any) -> None:
        async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
            watched = [reaper.watch(pid) for pid in pids]
            await anyio.to_thread.run_sync(ready.wait)
            gate.open()
            with anyio.fail_after(20):
                results.append([(await child.wait()).returncode for child in watched])
            await anyio.to_thread.run_sync(ready.wait)
            assert reaper.statistics().lost == 0
            assert reaper.statistics().reaped == len(pids)

    def second() -> None:
        try:
            anyio.run(main, "pidfd", backend=host.backend, backend_options=host.options)
        except BaseException as exc:  # noqa: BLE001
            errors.append(exc)
            ready.abort()

    with Gate() as gate:
        pids = [gate.add(f"exit {code}") for code in range(60)]
        thread = threading.Thread(target=second)
        thread.start()
        try:
            anyio.run(main, host.source, backend=host.backend, backend_options=host.options)
        finally:
            thread.join()
    assert not errors
    assert results == [list(range(60))] * 2


async def test_one_shot_wait_in_two_tasks(source: Any) -> None:
    """E11: `anyreap.wait` for one pid in two tasks at once gives both the status."""
    got: list[anyreap.ExitStatus] = []

    async def wait(pid: int) -> None:
        got.append(await anyreap.wait(pid))

    with Gate() as gate, anyio.fail_after(10):
        pid = gate.add("exit 7")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, pid)
            tasks.start_soon(wait, pid)
            await anyio.wait_all_tasks_blocked()
            gate.open()
    assert [status.returncode for status in got] == [7, 7]
    assert pid not in children()
    with pytest.raises(anyreap.NotAChild):
        await anyreap.wait(pid)


async def test_one_shot_wait_is_cancelled(source: Any) -> None:
    """C3: `anyreap.wait` that is cancelled leaves the child alone; a second one gets its status."""
    with Gate() as gate, anyio.fail_after(10):
        pid = gate.add("exit 7")
        with anyio.move_on_after(0.01) as scope:
            await anyreap.wait(pid)
        assert scope.cancelled_caught
        gate.open()
        await_death(pid)
        assert is_zombie(pid)
        assert (await anyreap.wait(pid)).returncode == 7


async def test_one_shot_wait_for_a_popen(source: Any) -> None:
    """`anyreap.wait` takes a Popen and a Process too, and sets their codes."""
    with Gate() as gate, anyio.fail_after(10):
        popen, made = shell(gate, "exit 7"), process(gate, 8)
        gate.open()
        assert (await anyreap.wait(popen)).returncode == 7 == popen.returncode
        assert (await anyreap.wait(made)).returncode == 8 == made.exitcode
        made.close()


# exits() ------------------------------------------------------------------------------------------
# -------------------


async def test_exits_in_order(source: Any) -> None:
    """`exits()` gives every exit from its call on, in order, to each stream, and ends with the
    block.
    """
    early: list[anyreap.ExitStatus] = []
    later: list[anyreap.ExitStatus] = []
    waited: list[anyreap.ExitStatus] = []

    async def read(stream: Any, into: list[anyreap.ExitStatus]) -> None:
        async with stream:
            async for status in stream:
                into.append(status)  # noqa: PERF401

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            heartbeat = 3600
            async with anyreap.open_reaper(source=source, heartbeat=heartbeat) as reaper:
                tasks.start_soon(read, reaper.exits(), early)
                for code in range(10):
                    if code == 5:
                        tasks.start_soon(read, reaper.exits(), later)
                    with Gate() as gate:
                        child = reaper.watch(gate.add(f"exit {code}"))
                        gate.open()
                        waited.append(await child.wait())
    assert early == waited
    assert [status.returncode for status in early] == list(range(10))
    assert later == waited[5:]


async def test_exits_has_only_what_was_collected(source: Any, no_pidfds: None) -> None:
    """`exits()` has neither the lost ones nor those that are only observed."""
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        stream = reaper.exits()
        with Gate() as gate, anyio.fail_after(10):
            stolen = reaper.watch(gate.add("exit 1"))
            observed = reaper.watch(gate.add("exit 2"), reap=False)
            collected = reaper.watch(gate.add("exit 3"))
            gate.open()
            assert collect(stolen.pid) == 1
            with pytest.raises(anyreap.StatusLost):
                await stolen.wait()
            await observed.wait()
            await collected.wait()
    async with stream:
        assert [status async for status in stream] == [collected.status]
    assert collect(observed.pid) == 2


async def test_exits_whose_reader_has_gone(source: Any) -> None:
    """A stream that was closed by its reader stops nobody: the other streams and the waiters are
    served.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        gone, dropped, kept = reaper.exits(), reaper.exits(), reaper.exits()
        gone.close()
        with anyio.fail_after(10):
            await reaper.wait(exits_with(7))
            dropped.close()
            await reaper.wait(exits_with(8))
    async with kept:
        assert [status.returncode async for status in kept] == [7, 8]


async def test_exits_after_a_failed_body(source: Any) -> None:
    """`exits()` ends with the block also when the body fails; what the shutdown collected
    is in it.
    """
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with anyreap.open_reaper(source=source) as reaper:
            stream = reaper.exits()
            child = reaper.adopt(sleeper())
            raise ZeroDivisionError
    async with stream:
        with anyio.fail_after(10):
            assert [status async for status in stream] == [child.status]


# Statistics ---------------------------------------------------------------------------------------
# -------------------


async def test_statistics(source: Any, pidfds: bool) -> None:
    """`watched` and `owned` count now, owned ones among the watched; `reaped` and `lost` since the
    opening.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        now = reaper.statistics()
        assert now == anyreap.ReaperStatistics(0, 0, 0, 0, 0, now.wakeups, 0, source)
        with Gate() as one, Gate() as two, anyio.fail_after(10):
            watched = [reaper.watch(one.add("exit 7")) for _ in range(3)]
            owned = reaper.adopt(two.add("exit 8"))
            now = reaper.statistics()
            assert (now.watched, now.owned, now.reaped, now.lost) == (4, 1, 0, 0)
            one.open()
            for child in watched:
                await child.wait()
            now = reaper.statistics()
            assert (now.watched, now.owned, now.reaped, now.lost) == (1, 1, 3, 0)
            two.open()
            await owned.wait()
        now = reaper.statistics()
        assert (now.watched, now.owned, now.reaped, now.lost) == (0, 0, 4, 0)
        assert now.orphans_reaped == 0
        if pidfds or source == "sigchld":
            assert now.wakeups >= 1
        with pytest.raises(AttributeError):
            now.reaped = 9  # type: ignore[misc]


async def test_statistics_of_what_was_lost(source: Any, no_pidfds: None) -> None:
    """`lost` counts the children whose status was gone; they are neither watched nor reaped any
    more.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            child = reaper.watch(gate.add("exit 7"))
            gate.open()
            collect(child.pid)
            with pytest.raises(anyreap.StatusLost):
                await child.wait()
        now = reaper.statistics()
        assert (now.watched, now.reaped, now.lost) == (0, 0, 1)


@pytest.mark.parametrize("host", [host for host in HOSTS if host.source == "sigchld"], ids=str)
def test_statistics_of_a_silent_source(host: Host) -> None:
    """F5, promise 5: with SIGCHLD blocked an exit is found by the heartbeat, counted as `late`;
    else nothing is late.
    """
    # In a process of its own: a thread of a pool, left by another test, would get the signal that
    # is blocked here.
    run_alone(
        """
        from anyreap import _kernel
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                with Gate() as gate, anyio.fail_after(10):
                    child = reaper.watch(gate.add("exit 7"))
                    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
                    gate.open()
                    assert (await child.wait()).returncode == 7
                assert reaper.statistics().late == 1, reaper.statistics()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                for _ in range(10):
                    with anyio.fail_after(10):
                        await reaper.wait(exits_with(7))
                now = reaper.statistics()
                assert (now.reaped, now.late) == (10, 0), now
        run(main)
        _kernel._usable = False
        run(main)
        """,
        host,
    )


@pytest.mark.parametrize("host", [host for host in HOSTS if host.source == "pidfd"], ids=str)
async def test_nothing_is_late_with_pidfds(source: Any) -> None:
    """With pidfds the exits of a hundred children are reported by them, and none is late."""
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            watched = [reaper.watch(gate.add_cat()) for _ in range(100)]
            gate.open()
            for child in watched:
                await child.wait()
        now = reaper.statistics()
        assert (now.reaped, now.late) == (100, 0)
        assert now.wakeups >= 1


async def test_reprs_say_what_it_is(source: Any) -> None:
    """The repr of a Child and of a Reaper says its pid, its state, its counts."""
    async with anyreap.open_reaper(source=source) as reaper:
        child = reaper.watch(sleeper())
        assert repr(child) == f"<anyreap.Child pid={child.pid} running>"
        assert repr(reaper) == f"<anyreap.Reaper watched=1 owned=0 source={source}>"
        child.kill()
        with anyio.fail_after(10):
            await child.wait()
        assert repr(child) == f"<anyreap.Child pid={child.pid} killed by SIGKILL>"
    assert "closed" in repr(reaper)


class Broken(subprocess.Popen[bytes]):
    """Somebody's Popen, that can't be asked."""

    def poll(self) -> int | None:
        """Fail, as a method with a bug does."""
        raise ZeroDivisionError


async def test_popen_whose_poll_raises(source: Any, pidfds: bool) -> None:
    """N1: somebody else's code raises while its child is collected: that one and the 99 others of
    the same burst are told how they ended, and the Popen too.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(20):
            others = [reaper.adopt(gate.add("exit 3")) for _ in range(99)]
            popen = Broken(["/bin/sh", "-c", "read x; exit 4"], stdin=gate.read)
            broken = reaper.adopt(popen)
            gate.open()
            assert (await broken.wait()).exit_code == 4
            assert popen.returncode == 4
            assert [(await child.wait()).exit_code for child in others] == [3] * 99
        assert reaper.statistics().reaped == 100


class Late(subprocess.Popen[bytes]):
    """A Popen whose thread is put aside between the collection and the line that notes it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.collected = threading.Event()
        super().__init__(*args, **options)

    def _handle_exitstatus(self, *args: Any) -> None:
        self.collected.set()
        time.sleep(0.02)  # to be put aside is what takes time
        super()._handle_exitstatus(*args)  # type: ignore[misc]


async def test_popen_that_another_thread_is_about_to_note(source: Any) -> None:
    """E10: handed in at the moment in which another thread's `wait` has its status and has not yet put it down: it is
    as one that had been waited for before.
    """
    popen = Late(["/bin/sh", "-c", "exit 6"])
    thread = threading.Thread(target=popen.wait)
    thread.start()
    async with anyreap.open_reaper(source=source) as reaper:
        popen.collected.wait()
        child = reaper.adopt(popen)
        assert child.returncode == 6
        assert (await child.wait()).exit_code == 6
    thread.join()
