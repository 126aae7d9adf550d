"""With nothing but trio: its nursery, its scopes, its clock, its guest mode. The tests are pytest-trio's."""

# ruff: noqa: PT012  (a block that is left by an exception is what is tested: it can't be one statement)

from __future__ import annotations

import math
import os
import signal
from typing import TYPE_CHECKING

import anyio
import pytest
import trio
import trio.testing

import anyreap
from tests.harness import await_death, collect, exits_with, run_alone, sleeper, state_of
from tests.staging import STUBBORN, Held, Sent, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

TERM, CONT, KILL = signal.SIGTERM, signal.SIGCONT, signal.SIGKILL


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Children that get ready before the test goes on."""
    with Stage() as stage:
        yield stage


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What this process sends."""
    return Sent(monkeypatch)


@pytest.mark.trio
async def test_nursery_inside_of_the_block() -> None:
    """Tasks of a trio nursery inside of the block wait for their children, each for its own."""
    codes: dict[int, int] = {}

    async def one(reaper: anyreap.Reaper, code: int) -> None:
        codes[code] = (await reaper.adopt(exits_with(code)).wait()).returncode

    with trio.fail_after(20):
        async with anyreap.open_reaper() as reaper:
            assert reaper.statistics().source == "sigchld"
            async with trio.open_nursery() as nursery:
                for code in range(10):
                    nursery.start_soon(one, reaper, code)
    assert codes == {code: code for code in range(10)}


@pytest.mark.trio
async def test_block_inside_of_a_nursery() -> None:
    """A task of a trio nursery that fails beside the block cancels it, and its children are ended."""
    held: list[anyreap.Child] = []

    async def block(task_status: trio.TaskStatus[None]) -> None:
        async with anyreap.open_reaper() as reaper:
            held.append(reaper.adopt(sleeper()))
            task_status.started()
            await trio.sleep_forever()

    with trio.fail_after(20), pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(block)
            raise ZeroDivisionError
    assert caught.group_contains(ZeroDivisionError)
    assert held[0].returncode == -TERM


@pytest.mark.trio
async def test_move_on_after() -> None:
    """`trio.move_on_after` around a block ends its children."""
    with trio.fail_after(20), trio.move_on_after(0.05) as scope:
        async with anyreap.open_reaper() as reaper:
            child = reaper.adopt(sleeper())
    assert scope.cancelled_caught
    assert child.returncode == -TERM


@pytest.mark.trio
async def test_fail_after() -> None:
    """`trio.fail_after` around a block is trio's TooSlowError."""
    with trio.fail_after(20), pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
        async with anyreap.open_reaper() as reaper:
            child = reaper.adopt(sleeper())
            await child.wait()
    assert child.returncode == -TERM


@pytest.mark.trio
async def test_shielded_waiter_outlives_the_cancellation() -> None:
    """A waiter in a shielded scope of a cancelled block returns the status when its child ends (C12)."""
    with trio.fail_after(20), trio.CancelScope() as outer:
        async with anyreap.open_reaper() as reaper:
            child = reaper.watch(sleeper())
            outer.cancel()
            with trio.CancelScope(shield=True):
                child.terminate()
                assert (await child.wait()).signal == TERM


@pytest.mark.trio
async def test_grace_by_the_clock_of_trio(mock_clock: trio.testing.MockClock, stage: Stage, sent: Sent) -> None:
    """The grace is ten seconds of trio's clock: just before its end nothing happens, at its end SIGKILL (K11, X8)."""
    pid = stage.start(STUBBORN)
    held: list[anyreap.Child] = []
    scope = trio.CancelScope()

    async def block(task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with anyreap.open_reaper(shutdown=anyreap.Shutdown(grace=10)) as reaper:
                held.append(reaper.adopt(pid))
                task_status.started()

    async with trio.open_nursery() as nursery:
        await nursery.start(block)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert sent.to(pid) == [TERM, CONT]
        for _ in range(99):
            mock_clock.jump(0.1)
            await trio.testing.wait_all_tasks_blocked()
        assert sent.to(pid) == [TERM, CONT]
        assert state_of(pid) == "S"
        mock_clock.jump(0.2)
    assert sent.to(pid) == [TERM, CONT, KILL]
    assert held[0].returncode == -KILL


@pytest.mark.trio
async def test_endless_grace(mock_clock: trio.testing.MockClock, stage: Stage, sent: Sent) -> None:
    """With an endless grace there is no SIGKILL, in a thousand years neither; a second cancellation brings it."""
    pid = stage.start(STUBBORN)
    inner, outer = trio.CancelScope(), trio.CancelScope()
    held: list[anyreap.Child] = []

    async def block(task_status: trio.TaskStatus[None]) -> None:
        with outer, inner:
            async with anyreap.open_reaper(shutdown=anyreap.Shutdown(grace=math.inf)) as reaper:
                held.append(reaper.adopt(pid))
                task_status.started()

    async with trio.open_nursery() as nursery:
        await nursery.start(block)
        inner.cancel()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1000 * 365 * 86400)
        await trio.testing.wait_all_tasks_blocked()
        assert sent.to(pid) == [TERM, CONT]
        outer.cancel()
        mock_clock.jump(0.1)  # cancelled scopes are counted now and then
    assert held[0].returncode == -KILL


@pytest.mark.trio
async def test_bound_by_the_clock_of_trio(mock_clock: trio.testing.MockClock, sent: Sent) -> None:
    """A child that SIGKILL does not end keeps the block for five seconds of trio's clock, and no longer (K18, X8)."""
    pid = sleeper()
    scope = trio.CancelScope()
    errors: list[BaseException] = []

    async def block(task_status: trio.TaskStatus[None]) -> None:
        try:
            with scope:
                async with anyreap.open_reaper(shutdown=anyreap.Shutdown(grace=0)) as reaper:
                    reaper.adopt(pid)
                    task_status.started()
        except anyreap.StillRunning as exc:
            errors.append(exc)

    with Held(pid):
        async with trio.open_nursery() as nursery:
            await nursery.start(block)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert sent.to(pid) == [KILL]
            mock_clock.jump(4.9)
            await trio.testing.wait_all_tasks_blocked()
            assert not errors
            mock_clock.jump(0.2)
        (error,) = errors
        assert isinstance(error, anyreap.StillRunning)
        assert error.pids == (pid,)
    assert collect(pid) == -KILL


@pytest.mark.trio
async def test_deadline_at_the_instant_of_the_exit(mock_clock: trio.testing.MockClock) -> None:
    """When a deadline passes at the moment of the exit, one of the two comes out, and the status is kept (C5)."""
    async with anyreap.open_reaper() as reaper:
        for _ in range(20):
            pid = sleeper()
            child = reaper.watch(pid)
            with trio.move_on_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(child.wait)
                    await trio.testing.wait_all_tasks_blocked()
                    child.kill()
                    await_death(pid)
                    mock_clock.jump(10)
            assert (await child.wait()).signal == KILL


@pytest.mark.trio
async def test_waiters_of_trio_are_closed_out() -> None:
    """The ClosedResourceError of a child whose block was left is anyio's, under trio too (C8)."""
    pid = sleeper()
    async with anyreap.open_reaper() as reaper:
        child = reaper.watch(pid)
    with pytest.raises(anyio.ClosedResourceError):
        await child.wait()
    os.kill(pid, KILL)
    collect(pid)


GUEST = """
import asyncio
import trio

async def guest():
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        assert reaper.statistics().source == SOURCE
        got = []
        async def one(code):
            got.append((await reaper.adopt(exits_with(code)).wait()).returncode)
        async with trio.open_nursery() as nursery:
            for code in range(5):
                nursery.start_soon(one, code)
        deadlined = reaper.adopt(sleeper())
        with trio.move_on_after(0.05):
            await deadlined.wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        while not heard:
            await trio.sleep(0.002)
        deadlined.terminate()
        got.append((await deadlined.wait()).returncode)
        return got

async def host():
    loop = asyncio.get_running_loop()
    if OWNS:
        loop.add_signal_handler(signal.SIGUSR1, lambda: heard.append("usr1"))
    done = loop.create_future()
    trio.lowlevel.start_guest_run(
        guest,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        done_callback=done.set_result,
        host_uses_signal_set_wakeup_fd=OWNS,
    )
    outcome = await done
    # Behind it, the host's signals still work.
    if OWNS:
        heard.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        while not heard:
            await asyncio.sleep(0.002)
        loop.remove_signal_handler(signal.SIGUSR1)
    return outcome.unwrap()

heard = []
if not OWNS:
    signal.signal(signal.SIGUSR1, lambda *_: heard.append("usr1"))
asyncio.run(asyncio.sleep(0))
trio.run(trio.sleep, 0)
before = look()
got = asyncio.run(asyncio.wait_for(host(), 20))
gc.collect()
after = look()
assert sorted(got) == [-15, 0, 1, 2, 3, 4], got
assert after._replace(threads=None) == before._replace(threads=None), (after, before)
print("fine")
"""


def test_reaper_of_the_host_beside_a_guest() -> None:
    """A reaper of asyncio, whose loop is the host of trio: trio's wakeup fd is not touched, so a burst is silent."""
    script = """
        import asyncio, trio
        async def main():
            loop = asyncio.get_running_loop()
            ended, go = loop.create_future(), trio.Event()
            trio.lowlevel.start_guest_run(
                go.wait, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=ended.set_result
            )
            await asyncio.sleep(0.05)
            async with anyreap.open_reaper(source="sigchld", heartbeat=0.02) as reaper:
                assert (await reaper.wait(exits_with(3))).exit_code == 3
                await asyncio.sleep(0.1)
                for _ in range(2000):
                    signal.raise_signal(signal.SIGCHLD)
            go.set()
            (await ended).unwrap()
            assert not trio.lowlevel.in_trio_run()
        asyncio.run(main())
    """
    assert run_alone(script).stderr == ""


@pytest.mark.parametrize("source", ["sigchld", "pidfd"])
@pytest.mark.parametrize("owns", [True, False], ids=["host-owns-wakeup-fd", "trio-owns-it"])
def test_guest_of_asyncio(source: str, owns: bool) -> None:
    """Trio as a guest of asyncio, whoever owns the wakeup fd: statuses are right, the host's signals arrive (I5)."""
    script = f"SOURCE, OWNS = {source!r}, {owns}\n" + GUEST
    done = run_alone(script)
    assert done.stdout == "fine\n"
    assert done.stderr == ""


NO_ANYIO_BACKEND = """
import trio

async def main():
    async with anyreap.open_reaper() as reaper:
        return (await reaper.wait(exits_with(3))).exit_code

print(trio.run(main), "asyncio.base_events" in sys.modules)
"""


def test_plain_trio_run() -> None:
    """`trio.run` is enough: nobody has to know of anyio."""
    assert run_alone(NO_ANYIO_BACKEND).stdout.startswith("3 ")
