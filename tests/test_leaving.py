"""Leaving the block: returned, raised, cancelled; the ladder of signals; what outlives SIGKILL."""

# ruff: noqa: PT012  (a block that is left by an exception is what is tested: it can't be one statement)

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import anyreap
from anyreap import _finder, _registry, _shutdown
from tests.harness import (
    Gate,
    Host,
    await_death,
    children,
    collect,
    end,
    exits_with,
    is_zombie,
    run_alone,
    sleeper,
    state_of,
    until,
)
from tests.staging import STUBBORN, Held, Sent, Stage, handling, on_asyncio, on_two_hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anyio.abc import TaskStatus

pytestmark = pytest.mark.anyio

TERM, CONT, KILL, INT = signal.SIGTERM, signal.SIGCONT, signal.SIGKILL, signal.SIGINT
PATIENT = anyreap.Shutdown(grace=3600)  # who waits for its end has failed
BRIEF = anyreap.Shutdown(grace=0.1)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Children that get ready before the test goes on."""
    with Stage() as stage:
        yield stage


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What this process sends."""
    return Sent(monkeypatch)


@pytest.fixture
def quick_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on killed children soon."""
    monkeypatch.setattr(_shutdown, "KILL_BOUND", 0.2)


class Left:
    """A block that another task has opened, and how it was left."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.error: BaseException | None = None
        self.done = False

    async def hold(
        self,
        source: Any,
        body: Callable[[anyreap.Reaper], Any],
        shutdown: anyreap.Shutdown = PATIENT,
        *,
        task_status: TaskStatus[anyreap.Reaper],
    ) -> None:
        """Open a block in a scope of its own, run a body in it, and leave."""
        try:
            with self.scope:
                async with anyreap.open_reaper(source=source, shutdown=shutdown) as reaper:
                    body(reaper)
                    task_status.started(reaper)
        except Exception as exc:  # noqa: BLE001
            self.error = exc
        finally:
            self.done = True


# 1. The body returned -----------------------------------------------------------------------------


async def test_returned_body_waits_for_owned_children(source: Any, stage: Stage) -> None:
    """When the body has returned, the block stays until every owned child has ended by itself."""
    left = Left()
    pids = [stage.add(f"exit {code}") for code in (3, 4)]
    held: list[anyreap.Child] = []
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(20):
            await tasks.start(left.hold, source, lambda it: held.extend(map(it.adopt, pids)))
            await anyio.wait_all_tasks_blocked()
            assert not left.done
            assert [state_of(pid) for pid in pids] != ["", ""]
            stage.open()
    assert [child.returncode for child in held] == [3, 4]
    assert left.error is None


async def test_watched_child_is_left_alone(source: Any, sent: Sent) -> None:
    """A child that is only watched neither keeps the block open, nor is it signalled (K23)."""
    pid = sleeper()
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source) as reaper:
            child = reaper.watch(pid)
    assert state_of(pid) in ("S", "R", "D")
    assert sent.all == []
    assert child.status is None
    assert not child.lost
    end(pid)


async def test_watched_child_is_left_alone_by_a_failing_block(source: Any, sent: Sent) -> None:
    """A child that is only watched is not signalled when the block fails, and its owned sibling is."""
    pid, owned = sleeper(), sleeper()
    with pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source) as reaper:
            reaper.watch(pid)
            reaper.adopt(owned)
            raise ZeroDivisionError
    assert sent.to(pid) == []
    assert sent.to(owned)[0] == TERM
    assert state_of(pid) in ("S", "R", "D")
    end(pid)


async def test_nothing_owned_nothing_awaited(source: Any) -> None:
    """A block that owns nothing is left at once."""
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source):
            pass


async def test_dead_children_are_collected_on_leaving(source: Any, pidfds: bool) -> None:
    """Children that ended before the block was left, and were never awaited, are collected (C11)."""
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source) as reaper:
            pids = [exits_with(code) for code in range(5)]
            await_death(*pids)
            owned = [reaper.adopt(pid) for pid in pids]
    assert [child.returncode for child in owned] == list(range(5))
    assert not set(pids) & children()


async def test_adopt_while_the_block_waits(source: Any, stage: Stage) -> None:
    """While the block waits for its owned children, another task may adopt one more, which it waits for too."""
    left = Left()
    first, second = stage.add("exit 3"), sleeper()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            reaper = await tasks.start(left.hold, source, lambda it: it.adopt(first))
            await anyio.wait_all_tasks_blocked()
            late = reaper.adopt(second)
            stage.open()
            assert (await reaper.wait(first)).exit_code == 3
            await anyio.wait_all_tasks_blocked()
            assert not left.done
            late.terminate()
    assert late.returncode == -TERM
    assert left.error is None


# 2. The body raised -------------------------------------------------------------------------------


class Odd(BaseException):
    """Neither an Exception nor anything that the loops know."""


async def test_exception_leaves_as_itself(source: Any) -> None:
    """What the body raised leaves as the same object, unwrapped, without a note, when the children are gone."""
    for kind in (ValueError, Odd, KeyboardInterrupt, SystemExit, EOFError):
        error = kind("mine")
        with pytest.raises(kind) as caught:
            async with anyreap.open_reaper(source=source) as reaper:
                child = reaper.adopt(sleeper())
                raise error
        assert caught.value is error
        assert error.__context__ is None
        assert error.__cause__ is None
        assert not hasattr(error, "__notes__")
        assert child.returncode == -TERM


async def test_exception_group_of_the_body_leaves_as_it_is(source: Any) -> None:
    """An ExceptionGroup that the body raised is not wrapped once more."""
    group = ExceptionGroup("mine", [ValueError(1), KeyError(2)])
    with pytest.raises(ExceptionGroup) as caught:
        async with anyreap.open_reaper(source=source) as reaper:
            reaper.adopt(sleeper())
            raise group
    assert caught.value is group


async def test_exception_of_a_block_that_owns_nothing(source: Any) -> None:
    """An exception leaves as itself also where there is nothing to shut down."""
    error = ValueError()
    with pytest.raises(ValueError) as caught:
        async with anyreap.open_reaper(source=source):
            raise error
    assert caught.value is error


# 2. The block is cancelled ------------------------------------------------------------------------


async def test_cancelled_in_the_body(source: Any) -> None:
    """A block that is cancelled in its body ends what it owns, and the scope catches the cancellation (K12)."""
    with anyio.fail_after(20), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            child = reaper.adopt(sleeper())
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert child.returncode == -TERM


async def test_cancelled_while_it_waits(source: Any) -> None:
    """A block that is cancelled while it waits for its children ends them."""
    left = Left()
    held: list[anyreap.Child] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(sleeper())))
            await anyio.wait_all_tasks_blocked()
            assert not left.done
            left.scope.cancel()
    assert held[0].returncode == -TERM
    assert left.scope.cancelled_caught
    assert left.error is None


async def test_move_on_after(source: Any) -> None:
    """`move_on_after` around a block ends its children when the time is over, and goes on behind it."""
    with anyio.fail_after(20), anyio.move_on_after(0.05) as scope:
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            child = reaper.adopt(sleeper())
    assert scope.cancelled_caught
    assert child.returncode == -TERM


async def test_fail_after(source: Any) -> None:
    """`fail_after` around a block is a TimeoutError once its children are gone."""
    with anyio.fail_after(20), pytest.raises(TimeoutError), anyio.fail_after(0.05):
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            child = reaper.adopt(sleeper())
            await child.wait()
    assert child.returncode == -TERM


async def test_cancelled_by_a_task_group(source: Any) -> None:
    """A task that fails beside the block cancels it, and the children are gone when the group is left."""
    held: list[anyreap.Child] = []
    with anyio.fail_after(20), pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            left = Left()
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(sleeper())))
            raise ZeroDivisionError
    assert caught.group_contains(ZeroDivisionError)
    assert len(caught.value.exceptions) == 1
    assert held[0].returncode == -TERM


async def test_cancelled_before_it_is_opened(source: Any) -> None:
    """Entering a block in a cancelled scope installs nothing, and runs no body."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with anyreap.open_reaper(source=source):
            pytest.fail("the body ran")
    assert scope.cancelled_caught


async def test_children_that_end_in_a_cancelled_block(source: Any, sent: Sent) -> None:
    """Children that have ended when the block is cancelled are collected, and not signalled (K20)."""
    pids = [exits_with(code) for code in (0, 5)]
    await_death(*pids)
    with anyio.fail_after(20), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            owned = [reaper.adopt(pid) for pid in pids]
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert [child.returncode for child in owned] == [0, 5]
    assert sent.all == []


@on_asyncio
@pytest.mark.parametrize("where", ["body", "waiting"])
async def test_native_cancellation(source: Any, where: str) -> None:
    """A native `Task.cancel` counts as cancellation, in the body and while the block waits."""
    held: list[anyreap.Child] = []

    async def block() -> None:
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            held.append(reaper.adopt(sleeper()))
            if where == "body":
                await asyncio.sleep(3600)

    with anyio.fail_after(20):
        task = asyncio.create_task(block())
        await anyio.wait_all_tasks_blocked()
        task.cancel("mine")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    assert caught.value.args == ("mine",)
    assert not hasattr(caught.value, "__notes__")
    assert held[0].returncode == -TERM


@on_asyncio
async def test_asyncio_timeout(source: Any) -> None:
    """`asyncio.timeout` around a block ends its children, and is a TimeoutError."""
    with anyio.fail_after(20), pytest.raises(TimeoutError):
        async with (
            asyncio.timeout(0.05),
            anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper,
        ):
            child = reaper.adopt(sleeper())
    assert child.returncode == -TERM
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


# The ladder ---------------------------------------------------------------------------------------


async def test_obedient_child_is_not_killed(source: Any, stage: Stage, sent: Sent, pidfds: bool) -> None:
    """A child that obeys the first signal exits as it chose, and no SIGKILL is sent (K10)."""
    pid = stage.start(handling("exit 7"))
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            child = reaper.adopt(pid)
            raise ZeroDivisionError
    assert child.returncode == 7
    assert sent.to(pid)[0] == TERM
    assert set(sent.to(pid)) <= {TERM, CONT}


async def test_deaf_child_is_killed_after_the_grace(source: Any, stage: Stage, sent: Sent, pidfds: bool) -> None:
    """A child that ignores SIGTERM gets SIGKILL when the grace is over, and not before (K11)."""
    pid = stage.start(STUBBORN)
    began = time.monotonic()
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source, shutdown=anyreap.Shutdown(grace=0.2)) as reaper:
            child = reaper.adopt(pid)
            raise ZeroDivisionError
    took = time.monotonic() - began
    assert child.returncode == -KILL
    assert sent.to(pid) == [TERM, CONT, KILL]
    assert 0.2 <= took < 5


async def test_one_grace_for_all(source: Any, stage: Stage, sent: Sent) -> None:
    """Thirty stubborn children are shut down at the same time, with one grace period for all (K17)."""
    pids = stage.start_many(STUBBORN, 30)
    began = time.monotonic()
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source, shutdown=anyreap.Shutdown(grace=0.3)) as reaper:
            owned = [reaper.adopt(pid) for pid in pids]
            raise ZeroDivisionError
    took = time.monotonic() - began
    assert [child.returncode for child in owned] == [-KILL] * 30
    assert 0.3 <= took < 4.5  # and not nine seconds
    kinds = [signum for _, signum in sent.all]
    assert kinds.index(KILL) > max(place for place, kind in enumerate(kinds) if kind == TERM)
    assert sorted(pid for pid, kind in sent.all if kind == TERM) == sorted(pids)


async def test_each_by_its_own_policy(source: Any, stage: Stage, sent: Sent) -> None:
    """Each child is shut down by its own policy: one is killed while another's endless grace goes on."""
    polite = stage.start(handling("exit 11", "INT"))
    deaf = stage.start(STUBBORN)
    killed = stage.start(STUBBORN)
    slow = stage.start(handling("exec 0<&3; exit 12", "TERM"))
    waits = stage.start("trap '' TERM; echo >&3; read x; exit 13")
    left = Left()
    owned: dict[int, anyreap.Child] = {}

    def body(reaper: anyreap.Reaper) -> None:
        for pid, policy in (
            (polite, anyreap.Shutdown(signal=INT, grace=math.inf)),
            (deaf, BRIEF),
            (killed, anyreap.Shutdown(grace=0)),
            (slow, None),
            (waits, anyreap.Shutdown(grace=math.inf)),
        ):
            owned[pid] = reaper.adopt(pid, shutdown=policy)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, body)
            left.scope.cancel()
            for pid in (polite, deaf, killed, slow):
                await until(lambda pid=pid: owned[pid].status is not None)
            assert not left.done
            stage.open()
    assert owned[polite].returncode == 11
    assert sent.to(polite)[0] == INT
    assert owned[deaf].returncode == -KILL
    assert sent.to(deaf) == [TERM, CONT, KILL]
    assert owned[killed].returncode == -KILL
    assert sent.to(killed) == [KILL]
    assert owned[slow].returncode == 12
    assert owned[waits].returncode == 13
    assert sent.to(waits) == [TERM, CONT]


async def test_no_grace_is_sigkill_at_once(source: Any, stage: Stage, sent: Sent) -> None:
    """With `grace=0` SIGKILL is sent at once, and no other signal."""
    pid = stage.start(handling("exit 7"))
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source, shutdown=anyreap.Shutdown(grace=0)) as reaper:
            child = reaper.adopt(pid)
            raise ZeroDivisionError
    assert child.returncode == -KILL
    assert sent.all == [(pid, KILL)]


@pytest.mark.parametrize("script", [handling("exit 9"), "echo >&3; exec sleep 3600"])
async def test_stopped_child_hears_the_signal(source: Any, stage: Stage, sent: Sent, script: str) -> None:
    """A stopped child gets SIGCONT after the signal, so that it runs its handler, unkilled (K13, field bug 60)."""
    pid = stage.start(script)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert state_of(pid) == "T"
    sent.all.clear()
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            child = reaper.adopt(pid)
            raise ZeroDivisionError
    assert child.returncode == (9 if "exit 9" in script else -TERM)
    assert sent.to(pid) == [TERM, CONT]


async def test_child_that_ends_in_the_grace(source: Any, stage: Stage, sent: Sent) -> None:
    """A child that ends by itself in the grace period has its own status, and is sent no SIGKILL (K20)."""
    pid = stage.start("trap '' TERM; echo >&3; read x; exit 6")
    left = Left()
    held: list[anyreap.Child] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(pid)))
            left.scope.cancel()
            await until(lambda: CONT in sent.to(pid))
            stage.open()
    assert held[0].returncode == 6
    assert sent.to(pid) == [TERM, CONT]


async def test_dead_at_the_deadline_is_not_killed(source: Any, stage: Stage, sent: Sent) -> None:
    """A child that has ended unseen when its grace is over keeps its status: nobody is left to kill (K20)."""
    pid = stage.start("trap '' TERM; echo >&3; read x; exit 6")
    left = Left()
    held: list[anyreap.Child] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            shutdown = anyreap.Shutdown(grace=0.15)
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(pid)), shutdown)
            left.scope.cancel()
            await until(lambda: CONT in sent.to(pid))
            stage.open()
            await_death(pid)
            time.sleep(0.25)  # the loop is busy past the deadline
    assert held[0].returncode == 6
    assert KILL not in sent.to(pid)


async def test_other_tasks_run_while_the_block_shuts_down(source: Any, stage: Stage) -> None:
    """A shutdown that takes its time keeps no other task waiting (field bugs 6 and 28: frozen loops)."""
    pid = stage.start(STUBBORN)
    left = Left()
    turns = 0
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, lambda it: it.adopt(pid), anyreap.Shutdown(grace=0.2))
            left.scope.cancel()
            while not left.done:
                await anyio.sleep(0.001)
                turns += 1
    assert turns > 10


@on_two_hosts
async def test_five_hundred_end_while_the_block_is_left(source: Any) -> None:
    """Five hundred children that are ending when the block is cancelled have a status each, and none is left (K21)."""
    with Gate() as gate, anyio.fail_after(30), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source) as reaper:
            owned = [reaper.adopt(gate.add_cat()) for _ in range(500)]
            gate.open()
            scope.cancel()
    assert {child.returncode for child in owned} <= {0, -TERM}
    assert not set(gate.pids) & children()
    assert reaper.statistics().owned == 0


async def test_adopting_again_replaces_the_policy(source: Any, stage: Stage, sent: Sent) -> None:
    """A second `adopt` of a child returns the same handle, and its policy is the one that counts."""
    pid = stage.start(handling("exit 7", "INT"))
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with anyreap.open_reaper(source=source) as reaper:
            child = reaper.watch(pid)
            assert reaper.adopt(pid, shutdown=anyreap.Shutdown(grace=0)) is child
            assert reaper.adopt(pid, shutdown=anyreap.Shutdown(INT, grace=3600)) is child
            assert reaper.statistics().owned == 1
            raise ZeroDivisionError
    assert child.returncode == 7
    assert sent.to(pid)[0] == INT
    assert KILL not in sent.to(pid)


@pytest.mark.parametrize("form", ["pid", "popen", "waited popen"])
async def test_adopting_a_finished_child(source: Any, sent: Sent, form: str) -> None:
    """A child that has ended already can be adopted: it has its status, and keeps no block open."""
    popen = subprocess.Popen(["sh", "-c", "exit 3"])
    await_death(popen.pid)
    if form == "waited popen":
        popen.wait()
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source) as reaper:
            child = reaper.adopt(popen.pid if form == "pid" else popen)
            if form == "waited popen":
                assert child.returncode == 3
                assert reaper.statistics().owned == 0
    assert child.returncode == 3
    assert sent.all == []
    if form == "pid":
        popen.returncode = 3  # it was collected behind its back
    assert popen.returncode == 3


async def test_adopt_while_the_block_shuts_down(source: Any, stage: Stage, sent: Sent) -> None:
    """While the block shuts its children down, `adopt` is a RuntimeError that says so, and takes nothing."""
    pid, late = stage.start(STUBBORN), sleeper()
    left = Left()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            reaper = await tasks.start(left.hold, source, lambda it: it.adopt(pid))
            left.scope.cancel()
            await until(lambda: TERM in sent.to(pid))
            with pytest.raises(RuntimeError, match="shutting"):
                reaper.adopt(late)
            os.kill(pid, KILL)
    assert state_of(late) in ("S", "R", "D")
    assert sent.to(late) == []
    end(late)


# Hurry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["body", "waiting"])
async def test_second_cancellation_ends_the_grace(source: Any, stage: Stage, sent: Sent, where: str) -> None:
    """When an outer scope is cancelled too, the grace of the block inside ends at once."""
    pid = stage.start(STUBBORN)
    held: list[anyreap.Child] = []
    inner, outer = anyio.CancelScope(), anyio.CancelScope()

    async def block() -> None:
        with outer:
            with inner:
                async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
                    held.append(reaper.adopt(pid))
                    if where == "body":
                        await anyio.sleep_forever()
            await anyio.lowlevel.checkpoint()
            pytest.fail("the outer cancellation was lost")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block)
            await until(lambda: bool(held))
            inner.cancel()
            await until(lambda: CONT in sent.to(pid))
            assert sent.to(pid) == [TERM, CONT]
            outer.cancel()
    assert held[0].returncode == -KILL
    assert sent.to(pid) == [TERM, CONT, KILL]
    assert outer.cancelled_caught


async def test_second_deadline_ends_the_grace(source: Any, stage: Stage) -> None:
    """When the time of an outer scope is over as well, the grace ends at once."""
    pid = stage.start(STUBBORN)
    with anyio.fail_after(20), anyio.move_on_after(0.2) as outer, anyio.move_on_after(0.05):
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            child = reaper.adopt(pid)
    assert child.returncode == -KILL
    assert outer.cancel_called


async def test_cancellation_outside_of_a_shield_does_not_hurry(source: Any, stage: Stage, sent: Sent) -> None:
    """A cancellation that a shield keeps off the block is not a second one: the grace goes on."""
    pid = stage.start("trap '' TERM; echo >&3; read x; exit 6")
    held: list[anyreap.Child] = []
    inner, shield, outer = anyio.CancelScope(), anyio.CancelScope(shield=True), anyio.CancelScope()

    async def block() -> None:
        with outer, shield, inner:
            async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
                held.append(reaper.adopt(pid))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(block)
            await until(lambda: bool(held))
            inner.cancel()
            await until(lambda: CONT in sent.to(pid))
            outer.cancel()
            await anyio.sleep(0.2)  # a few looks at the scopes
            assert sent.to(pid) == [TERM, CONT]
            stage.open()
    assert held[0].returncode == 6


async def test_same_cancellation_twice_does_not_hurry(source: Any, stage: Stage, sent: Sent) -> None:
    """One scope's cancellation, which is delivered again and again on asyncio, is one cancellation."""
    pid = stage.start("trap '' TERM; echo >&3; read x; exit 6")
    left = Left()
    held: list[anyreap.Child] = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(pid)))
            left.scope.cancel()
            await until(lambda: CONT in sent.to(pid))
            left.scope.cancel()
            await anyio.sleep(0.2)
            assert sent.to(pid) == [TERM, CONT]
            stage.open()
    assert held[0].returncode == 6


@on_asyncio
@pytest.mark.parametrize("first", ["raised", "cancelled", "scope"])
async def test_native_cancellation_in_the_grace(source: Any, stage: Stage, sent: Sent, first: str) -> None:
    """A native cancellation during the grace ends it at once, and is the exception that leaves."""
    pid = stage.start(STUBBORN)
    held: list[anyreap.Child] = []
    scope = anyio.CancelScope()

    async def block() -> None:
        # Seen at the block, not at the task: up to 4.15 anyio's scope takes a native cancellation for its own.
        with scope, pytest.raises(asyncio.CancelledError):
            async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
                held.append(reaper.adopt(pid))
                if first == "raised":
                    raise ZeroDivisionError
                await asyncio.sleep(3600)

    with anyio.fail_after(20):
        task = asyncio.create_task(block())
        await until(lambda: bool(held))
        if first == "cancelled":
            task.cancel("first")
        elif first == "scope":
            scope.cancel()
        await until(lambda: CONT in sent.to(pid))
        assert sent.to(pid) == [TERM, CONT]
        task.cancel()
        await task
    assert held[0].returncode == -KILL
    assert sent.to(pid) == [TERM, CONT, KILL]


@on_asyncio
async def test_one_native_cancellation_does_not_hurry(source: Any, stage: Stage, sent: Sent) -> None:
    """The native cancellation that began the shutdown is not taken for a second one: the grace goes on."""
    pid = stage.start("trap '' TERM; echo >&3; read x; exit 6")
    held: list[anyreap.Child] = []

    async def block() -> None:
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            held.append(reaper.adopt(pid))

    with anyio.fail_after(20):
        task = asyncio.create_task(block())
        await until(lambda: bool(held))
        task.cancel()
        await until(lambda: CONT in sent.to(pid))
        await anyio.sleep(0.2)  # several of the ladder's pauses
        assert sent.to(pid) == [TERM, CONT]
        stage.open()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert held[0].returncode == 6


# 3. What outlives SIGKILL -------------------------------------------------------------------------


async def test_still_running_when_the_body_had_returned(source: Any, quick_bound: None) -> None:
    """A child that SIGKILL does not end is named by StillRunning, within a bound, if the body had returned (K18)."""
    left = Left()
    pid, other = sleeper(), sleeper()
    held: list[anyreap.Child] = []
    with anyio.fail_after(20), Held(pid):
        async with anyio.create_task_group() as tasks:
            policy = anyreap.Shutdown(grace=0)
            await tasks.start(left.hold, source, lambda it: held.extend((it.adopt(pid), it.adopt(other))), policy)
            await anyio.wait_all_tasks_blocked()
            left.scope.cancel()
        assert isinstance(left.error, anyreap.StillRunning)
        assert left.error.pids == (pid,)
        assert str(pid) in str(left.error)
        assert held[1].returncode == -KILL
        with pytest.raises(anyio.ClosedResourceError):
            await held[0].wait()
        assert held[0].status is None
    assert is_zombie(pid)
    assert collect(pid) == -KILL


async def test_still_running_is_a_note_on_what_the_body_raised(source: Any, quick_bound: None) -> None:
    """If the body raised, its exception leaves, with a note that names the child (K18, field bug 50)."""
    pid = sleeper()
    error = ZeroDivisionError()
    with anyio.fail_after(20), Held(pid):
        with pytest.raises(ZeroDivisionError) as caught:
            async with anyreap.open_reaper(source=source, shutdown=BRIEF) as reaper:
                reaper.adopt(pid)
                raise error
        assert caught.value is error
        assert len(error.__notes__) == 1
        assert f"still running after SIGKILL: {pid}" in error.__notes__[0]
    assert collect(pid) == -KILL


async def test_still_running_is_a_note_on_a_cancellation(source: Any, quick_bound: None) -> None:
    """If the body was cancelled, the cancellation leaves, with a note, and the scope catches it."""
    pid = sleeper()
    notes: list[str] = []
    with anyio.fail_after(20), Held(pid):
        with anyio.CancelScope() as scope:
            try:
                async with anyreap.open_reaper(source=source, shutdown=anyreap.Shutdown(grace=0)) as reaper:
                    reaper.adopt(pid)
                    scope.cancel()
                    await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class() as exc:
                notes += getattr(exc, "__notes__", [])
                raise
        assert scope.cancelled_caught
        assert len(notes) == 1
        assert str(pid) in notes[0]
    assert collect(pid) == -KILL


async def test_waiters_of_a_held_child(source: Any, quick_bound: None) -> None:
    """The tasks that wait elsewhere for a child that was left behind get ClosedResourceError, never StatusLost."""
    pid = sleeper()
    heard: list[BaseException] = []
    left = Left()

    async def waiter(child: anyreap.Child) -> None:
        try:
            await child.wait()
        except Exception as exc:  # noqa: BLE001
            heard.append(exc)

    with anyio.fail_after(20), Held(pid):
        held: list[anyreap.Child] = []
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(pid)), anyreap.Shutdown(grace=0))
            for _ in range(3):
                tasks.start_soon(waiter, held[0])
            await anyio.wait_all_tasks_blocked()
            left.scope.cancel()
        assert [type(exc) for exc in heard] == [anyio.ClosedResourceError] * 3
        assert not held[0].lost
    assert collect(pid) == -KILL


@on_asyncio
async def test_still_running_after_a_native_cancellation(source: Any, quick_bound: None) -> None:
    """StillRunning leaves also where the waiting block was cancelled natively: as a note nobody would read it."""
    pid = sleeper()

    async def block() -> None:
        async with anyreap.open_reaper(source=source, shutdown=anyreap.Shutdown(grace=0)) as reaper:
            reaper.adopt(pid)

    with anyio.fail_after(20), Held(pid):
        task = asyncio.create_task(block())
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        with pytest.raises(anyreap.StillRunning) as caught:
            await task
        assert caught.value.pids == (pid,)
    assert collect(pid) == -KILL


async def test_held_child_that_is_let_go_in_time(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed child that its tracer lets go in time is collected like any other; no loop froze (D11, field bug 28)."""
    pid = sleeper()
    left = Left()
    held: list[anyreap.Child] = []
    longest = 0.0
    with anyio.fail_after(20):
        hold = Held(pid)
        async with anyio.create_task_group() as tasks:
            await tasks.start(left.hold, source, lambda it: held.append(it.adopt(pid)), anyreap.Shutdown(grace=0))
            left.scope.cancel()
            await until(lambda: is_zombie(pid))
            for _ in range(100):
                before = time.monotonic()
                await anyio.sleep(0.001)
                longest = max(longest, time.monotonic() - before)
            assert not left.done
            hold.release()
    assert held[0].returncode == -KILL
    assert left.error is None
    assert longest < 1


@on_two_hosts
async def test_child_that_may_not_be_signalled(host: Host) -> None:
    """A child of another user: PermissionError, but it is collected when it ends, and leaving is bounded (K9, X14)."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    done = run_alone(
        """
        import anyreap._shutdown
        anyreap._shutdown.KILL_BOUND = 0.2
        run(anyio.sleep, 0)

        async def main():
            for leave in ("ends", "stays"):
                with Gate() as gate:
                    pid = gate.add("exit 4")
                    os.setresuid(65534, 65534, 0)
                    try:
                        with anyio.fail_after(20):
                            async with anyreap.open_reaper(
                                source=SOURCE, shutdown=anyreap.Shutdown(grace=0.2)
                            ) as reaper:
                                child = reaper.adopt(pid)
                                for refused in (
                                    child.terminate, child.kill, lambda: child.send_signal(1)
                                ):
                                    try:
                                        refused()
                                    except PermissionError:
                                        pass
                                    else:
                                        raise AssertionError
                                if leave == "ends":
                                    gate.open()
                                    assert (await child.wait()).exit_code == 4
                                raise ZeroDivisionError
                    except ZeroDivisionError as exc:
                        notes = getattr(exc, "__notes__", [])
                    finally:
                        os.setresuid(0, 0, 0)
                    if leave == "ends":
                        assert notes == [], notes
                    else:
                        assert len(notes) == 1 and str(pid) in notes[0], notes
                        assert "could not be sent" in notes[0], notes
                        gate.open()
                        assert collect(pid) == 4
        before = look()
        run(main)
        gc.collect()
        assert look() == before, (look(), before)
        print("fine")
        """,
        host,
    )
    assert done.stdout == "fine\n"
    assert done.stderr == ""


# A child that outlives its block ------------------------------------------------------------------


async def test_handle_of_a_child_that_outlived_its_block(source: Any, pidfds: bool) -> None:
    """A Child whose block was left while it ran can't be awaited any more; its signals still reach it (C8)."""
    pid, sibling = sleeper(), sleeper()
    async with anyreap.open_reaper(source=source) as reaper:
        child = reaper.watch(pid)
    with anyio.fail_after(20), pytest.raises(anyio.ClosedResourceError):
        await child.wait()
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    child.terminate()
    child.send_signal(CONT)
    await_death(pid)
    child.kill()  # a zombie: a quiet no-op
    assert collect(pid) == -TERM
    child.kill()  # nobody at all
    assert state_of(sibling) in ("S", "R", "D")
    assert child.status is None
    end(sibling)


async def test_waiters_when_the_block_of_a_watched_child_is_left(source: Any) -> None:
    """Tasks of an outer nursery that wait for a watched child are told that its block was left."""
    pid = sleeper()
    heard: list[type[BaseException]] = []

    async def waiter(child: anyreap.Child) -> None:
        try:
            await child.wait()
        except Exception as exc:  # noqa: BLE001
            heard.append(type(exc))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source) as reaper:
            child = reaper.watch(pid)
            for _ in range(3):
                tasks.start_soon(waiter, child)
            await anyio.wait_all_tasks_blocked()
    assert heard == [anyio.ClosedResourceError] * 3
    end(pid)


async def test_waiters_in_an_outer_nursery_hear_of_the_shutdown(source: Any) -> None:
    """Tasks of an outer nursery that wait for an owned child get the status that the shutdown gave it."""
    pid = sleeper()
    heard: list[str] = []

    async def waiter(child: anyreap.Child) -> None:
        heard.append(str(await child.wait()))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyreap.open_reaper(source=source) as reaper:
                    child = reaper.adopt(pid)
                    for _ in range(3):
                        tasks.start_soon(waiter, child)
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()
    assert heard == ["killed by SIGTERM"] * 3


async def test_signal_to_an_ended_child_asks_nobody(source: Any, sent: Sent, pidfds: bool) -> None:
    """Signals to a child that has been collected are quiet, and reach no system call (K1, field bugs 62 and 69)."""
    async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
        child = reaper.adopt(exits_with(0))
        await child.wait()
        child.terminate()
        child.kill()
        child.send_signal(signal.SIGHUP)
    child.kill()
    assert sent.all == []


RECYCLED = """
async def main():
    for _ in range(5):
        await once()
    print("unharmed")

async def once():
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        child = reaper.watch(sleeper())
    os.kill(child.pid, signal.SIGKILL)
    await_death(child.pid)
    collect(child.pid)
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(child.pid - 1))
    victim = sleeper()
    assert victim == child.pid, (victim, child.pid)
    child.terminate()
    child.kill()
    assert os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    with anyio.fail_after(20):
        try:
            await child.wait()
        except anyio.ClosedResourceError:
            pass
    os.kill(victim, signal.SIGTERM)
    assert collect(victim) == -signal.SIGTERM
run(main)
"""


async def test_handle_does_not_hit_a_recycled_pid(host: Host) -> None:
    """A Child that outlived its block never signals the process that was given its pid next (K2, field bug 58)."""
    wrapper = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no pid namespaces here")
    assert run_alone(RECYCLED, host, wrapper=wrapper).stdout == "unharmed\n"


# When the service fails ---------------------------------------------------------------------------


def _fail(*_: Any, **__: Any) -> Any:
    raise LookupError("planted")


async def test_failed_service_tells_who_waits(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the service fails, who waits gets a RuntimeError that names the cause; the children are ended (N2)."""
    pid, watched = sleeper(), sleeper()
    with anyio.fail_after(20):
        with pytest.raises(RuntimeError, match="service") as caught:
            async with anyreap.open_reaper(source=source) as reaper:
                child = reaper.adopt(pid)
                other = reaper.watch(watched)
                monkeypatch.setattr(_finder.Finder, "candidates", _fail)
                end_it = exits_with(0)
                await_death(end_it)
                reaper.watch(end_it)
                await child.wait()
        assert isinstance(caught.value.__cause__, LookupError)
        with pytest.raises(RuntimeError) as again:
            await other.wait()
        assert isinstance(again.value.__cause__, LookupError)
    assert child.returncode == -TERM
    assert pid not in children()
    end(watched)
    collect(end_it)


@pytest.mark.parametrize("fault", ["candidates", "next_retry", "check"])
async def test_failed_service_ends_the_waiting_block(source: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """When the service fails while the block waits for its children, they are ended, and the failure leaves (N2)."""
    pid = sleeper()
    left = Left()
    held: list[anyreap.Child] = []
    failed = False

    def fail_once(*_: Any, **__: Any) -> Any:
        nonlocal failed
        failed = True
        monkeypatch.undo()
        raise LookupError("planted")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            reaper = await tasks.start(left.hold, source, lambda it: held.append(it.adopt(pid)))
            await anyio.wait_all_tasks_blocked()
            home = _registry.Registry if fault == "check" else _finder.Finder
            monkeypatch.setattr(home, fault, fail_once)
            gone = exits_with(0)
            await_death(gone)
            reaper.watch(gone)
    assert failed
    assert isinstance(left.error, RuntimeError)
    assert isinstance(left.error.__cause__, LookupError)
    assert held[0].returncode == -TERM
    end(gone)


async def test_failure_of_the_service_does_not_hide_the_body_s(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the service fails and the body raises, the body's exception leaves, and the children are ended (N2)."""
    pid = sleeper()
    error = ZeroDivisionError()
    with anyio.fail_after(20):
        with pytest.raises(ZeroDivisionError) as caught:
            async with anyreap.open_reaper(source=source) as reaper:
                child = reaper.adopt(pid)
                monkeypatch.setattr(_finder.Finder, "candidates", _fail)
                gone = exits_with(0)
                await_death(gone)
                with pytest.raises(RuntimeError):
                    await reaper.wait(gone)
                raise error
    assert caught.value is error
    assert child.returncode == -TERM
    collect(gone)
