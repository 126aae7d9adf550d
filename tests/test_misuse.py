"""Wrong arguments, wrong times, wrong places: each is an error that says so; and silence where nothing is wrong."""

from __future__ import annotations

import math
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import anyreap
from anyreap import _shutdown
from tests.harness import Host, collect, end, exits_with, run_alone, sleeper, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [-1, -0.001, math.nan, -math.inf])
def test_grace_is_zero_or_more(grace: float) -> None:
    """A grace below 0, or NaN, is a ValueError that names it."""
    with pytest.raises(ValueError, match="grace"):
        anyreap.Shutdown(grace=grace)


@pytest.mark.parametrize("grace", [0, 0.0, 1, 2.5, math.inf])
def test_grace_may_be_endless(grace: float) -> None:
    """A grace of 0 and an endless one are fine (field bug 38)."""
    assert anyreap.Shutdown(grace=grace).grace == grace


@pytest.mark.parametrize("scope", ["", "Process", "tree", None])
def test_scope_is_known(scope: Any) -> None:
    """A scope that nobody knows is a ValueError that names it."""
    with pytest.raises(ValueError, match="scope"):
        anyreap.Shutdown(scope=scope)


@pytest.mark.parametrize("signum", [0, -1, 65, 1000, "SIGTERM", None])
def test_signal_of_a_policy_is_a_signal(signum: Any) -> None:
    """What is no signal is a ValueError when the policy is made, not when the block is left."""
    with pytest.raises(ValueError, match="signal"):
        anyreap.Shutdown(signal=signum)


def test_policy_is_a_value() -> None:
    """A policy is frozen, and equal to another one with the same values."""
    policy = anyreap.Shutdown(signal.SIGINT, grace=1)
    assert policy == anyreap.Shutdown(signal=signal.SIGINT, grace=1.0)
    assert hash(policy) == hash(anyreap.Shutdown(signal=signal.SIGINT, grace=1.0))
    assert policy != anyreap.Shutdown()
    with pytest.raises(AttributeError):
        policy.grace = 2  # type: ignore[misc]
    assert anyreap.Shutdown() == anyreap.Shutdown(signal.SIGTERM, 5.0, "process")


@pytest.mark.parametrize("heartbeat", [0, -1, -0.5, math.nan, -math.inf])
def test_heartbeat_is_above_zero(heartbeat: float) -> None:
    """A heartbeat of 0 or below, or NaN, is a ValueError when the reaper is asked for."""
    with pytest.raises(ValueError, match="heartbeat"):
        anyreap.open_reaper(heartbeat=heartbeat)


@pytest.mark.parametrize("source", ["", "kqueue", "SIGCHLD", None, 1])
def test_source_is_known(source: Any) -> None:
    """A source that nobody knows is a ValueError."""
    with pytest.raises(ValueError, match="source"):
        anyreap.open_reaper(source=source)


@pytest.mark.parametrize("shutdown", [5, "SIGTERM", signal.SIGTERM, {"grace": 1}])
def test_shutdown_is_a_policy(shutdown: Any) -> None:
    """What is no policy is a TypeError that shows how to write one."""
    with pytest.raises(TypeError, match=r"Shutdown\("):
        anyreap.open_reaper(shutdown=shutdown)


def test_arguments_are_named() -> None:
    """The arguments of `open_reaper` are keywords only."""
    with pytest.raises(TypeError):
        anyreap.open_reaper("sigchld")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [anyreap.Reaper, anyreap.Child])
def test_handles_are_not_made_by_hand(kind: Callable[[], object]) -> None:
    """Reaper and Child say where they come from."""
    with pytest.raises(TypeError, match="made by"):
        kind()


@pytest.mark.anyio
async def test_policy_of_adopt(source: Any) -> None:
    """`adopt` with something else than a policy is a TypeError, and owns nothing."""
    pid = sleeper()
    wrong: Any = 5
    async with anyreap.open_reaper(source=source) as reaper:
        with pytest.raises(TypeError, match="Shutdown"):
            reaper.adopt(pid, shutdown=wrong)
        assert reaper.statistics().owned == 0
        assert reaper.statistics().watched == 0
    assert state_of(pid) in ("S", "R", "D")
    end(pid)


@pytest.mark.anyio
async def test_child_is_a_child(source: Any) -> None:
    """A number below 1 is a ValueError, another type is a TypeError; nothing is collected (B7)."""
    bystander = exits_with(3)
    wrong: tuple[Any, ...] = (True, False, 1.0, "1", None, object(), [bystander])
    async with anyreap.open_reaper(source=source) as reaper:
        for wanted, pids in ((ValueError, (0, -1, -bystander, -(2**40))), (TypeError, wrong)):
            for pid in pids:
                with pytest.raises(wanted):
                    reaper.watch(pid)
                with pytest.raises(wanted):
                    reaper.adopt(pid)
                with pytest.raises(wanted):
                    await reaper.wait(pid)
        assert reaper.statistics().watched == 0
    assert collect(bystander) == 3


@pytest.mark.anyio
async def test_stranger_is_not_a_child(source: Any) -> None:
    """This process, init, a dead pid and no pid at all are NotAChild, also when they are adopted (B7, B8)."""
    gone = exits_with(0)
    collect(gone)
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source) as reaper:
            for pid in (os.getpid(), 1, gone, 2**31 - 1, 2**31, 2**63, 2**64):
                with pytest.raises(anyreap.NotAChild) as caught:
                    reaper.adopt(pid)
                assert caught.value.pid == pid
            assert reaper.statistics().owned == 0


@pytest.mark.anyio
async def test_endless_heartbeat(source: Any) -> None:
    """An endless heartbeat is fine: the source alone tells of exits."""
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source, heartbeat=math.inf) as reaper:
            assert (await reaper.wait(exits_with(4))).exit_code == 4


# Times --------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_closed_reaper(source: Any) -> None:
    """A reaper whose block was left is a RuntimeError that says so; its statistics can still be read."""
    pid = sleeper()
    async with anyreap.open_reaper(source=source) as reaper:
        pass
    for use in (
        lambda: reaper.watch(pid),
        lambda: reaper.adopt(pid),
        reaper.exits,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    with pytest.raises(RuntimeError, match="closed"):
        await reaper.wait(pid)
    assert reaper.statistics().watched == 0
    assert "closed" in repr(reaper)
    end(pid)


@pytest.mark.anyio
async def test_block_is_entered_once(source: Any) -> None:
    """One block can't be entered twice, neither one inside the other nor one after the other; the first goes on."""
    block = anyreap.open_reaper(source=source)
    with anyio.fail_after(20):
        async with block as reaper:
            with pytest.raises(RuntimeError, match="once"):
                async with block:
                    pytest.fail("entered")
            assert (await reaper.wait(exits_with(2))).exit_code == 2
        with pytest.raises(RuntimeError, match="once"):
            async with block:
                pytest.fail("entered")


# Places -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_reaper_in_another_thread(source: Any) -> None:
    """A reaper or a child that is used in another thread is a RuntimeError that says so; nothing is signalled."""
    pid = sleeper()
    with anyio.fail_after(20):
        async with anyreap.open_reaper(source=source) as reaper:
            child = reaper.watch(pid)
            said: list[BaseException] = []

            def misuse() -> None:
                for use in (
                    lambda: reaper.watch(pid),
                    lambda: reaper.adopt(pid),
                    reaper.exits,
                    child.kill,
                    lambda: child.wait().send(None),
                    lambda: reaper.wait(pid).send(None),
                ):
                    try:
                        use()
                    except RuntimeError as exc:
                        said.append(exc)

            thread = threading.Thread(target=misuse)
            thread.start()
            thread.join()
            assert len(said) == 6
            assert all("another thread" in str(exc) for exc in said)
            assert reaper.statistics().owned == 0
    assert state_of(pid) in ("S", "R", "D")
    end(pid)


def test_no_loop() -> None:
    """A block that is entered outside of any loop is a RuntimeError, and installs nothing."""
    entering = anyreap.open_reaper().__aenter__()
    with pytest.raises(RuntimeError):
        entering.send(None)


FORK = """
async def main():
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        child = reaper.adopt(sleeper())
        dead = reaper.watch(exits_with(3))
        await dead.wait()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = []
            for use in (
                lambda: reaper.watch(child.pid),
                lambda: reaper.adopt(child.pid),
                reaper.exits,
                child.kill,
                child.terminate,
                lambda: child.wait().send(None),
                lambda: reaper.wait(child.pid).send(None),
            ):
                try:
                    use()
                except RuntimeError as exc:
                    said.append("forked child" in str(exc))
            assert dead.returncode == 3
            os.write(write, repr(said).encode())
            os._exit(0)
        os.close(write)
        with open(read) as file:
            print(file.read())
        assert collect(pid) == 0
        assert child.status is None and state_of(child.pid) in "SRD"
        child.terminate()
        print(await child.wait())

run(main)
"""


def test_reaper_in_a_forked_child(host: Host) -> None:
    """In a forked child each method is a RuntimeError that says so; the parent's children are not touched (J1)."""
    flags = ("-W", "ignore::DeprecationWarning")
    done = run_alone(FORK, host, flags=flags)
    assert done.stdout == f"{[True] * 7}\nkilled by SIGTERM\n"
    assert done.stderr == ""


LEAVING_IN_A_FORK = """
async def main():
    try:
        async with anyreap.open_reaper(source=SOURCE) as reaper:
            child = reaper.adopt(sleeper())
            pid = os.fork()
            if pid == 0:
                raise SystemExit(7)
            assert collect(pid) == 7
            assert child.status is None and state_of(child.pid) in "SRD"
            child.terminate()
    except SystemExit as exc:
        os._exit(exc.code)
    print(child.status)

run(anyio.sleep, 0)
before = look()
run(main)
gc.collect()
assert look() == before, (look(), before)
"""


def test_block_left_in_a_forked_child(host: Host) -> None:
    """A forked child that leaves the block on its way out ends and restores nothing of its parent's (J3)."""
    flags = ("-W", "ignore::DeprecationWarning")
    assert run_alone(LEAVING_IN_A_FORK, host, flags=flags).stdout == "killed by SIGTERM\n"


# Silence ------------------------------------------------------------------------------------------

SILENCE = """
async def returned():
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        with Gate() as gate:
            children = [reaper.adopt(gate.add_cat()) for _ in range(100)]
            popen = reaper.watch(subprocess.Popen(["true"]))
        await popen.wait()
    assert all(child.status.success for child in children)

async def raised():
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        reaper.adopt(sleeper())
        raise ZeroDivisionError

async def cancelled():
    with anyio.move_on_after(0.01):
        async with anyreap.open_reaper(source=SOURCE, shutdown=anyreap.Shutdown(grace=0)) as reaper:
            reaper.adopt(sleeper())
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(reaper.wait, sleeper_of(reaper))

def sleeper_of(reaper):
    return reaper.adopt(sleeper()).pid

async def dropped():
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        reaper.adopt(exits_with(1))
        reaper.exits().close()
        gc.collect()

async def forgotten():
    await anyreap.wait(exits_with(0))

async def patient(main):
    # A busy machine is no fault of anybody's.
    if BACKEND == "asyncio":
        import asyncio
        asyncio.get_running_loop().slow_callback_duration = 20
    await main()

for main in (returned, raised, cancelled, dropped, forgotten):
    before = look()
    for _ in range(2):
        try:
            run(patient, main)
        except ZeroDivisionError:
            assert main is raised
    gc.collect()
    after = look()
    assert after.children == before.children and after.handler == before.handler, main
"""


def test_silence(host: Host) -> None:
    """In every way to leave a block, nothing is said under -X dev and -W error (I6, C10)."""
    done = run_alone(SILENCE, host, flags=("-X", "dev", "-W", "error"))
    assert done.stdout == ""
    assert done.stderr == ""


def test_bound_of_the_documentation() -> None:
    """The bound that the documentation of `open_reaper` names is the one that is kept (field bug 50)."""
    assert _shutdown.KILL_BOUND == 5.0
    assert "five seconds" in str(anyreap.open_reaper.__doc__)
