"""Starting children: what may fail, what may be cancelled, and what a start leaves behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
import types
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import anyreap
from anyreap import _shutdown, _spawner
from tests.harness import HOSTS, Host, children, is_zombie, numbers, run_alone, sigaction, state_of, until
from tests.staging import on_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

BOUND = 20  # seconds; who needs them has failed
PATIENT = anyreap.Shutdown(grace=3600)
SLEEP = ["/bin/sleep", "3600"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
each_backend = pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2], HOSTS[4]], ids=str, indirect=True)


@pytest.fixture
async def reaper(source: Any, anyio_backend: tuple[str, Any]) -> AsyncIterator[anyreap.Reaper]:
    """An open reaper that has its threads already. Who waits for the grace period to pass has failed."""
    async with anyreap.open_reaper(source=source, shutdown=PATIENT, heartbeat=0.05) as reaper:
        await reaper.run_process(["/bin/true"])
        yield reaper


class Held:
    """Starts that take as long as the test likes, in the thread where they happen: before the fork, as when the disk is
    slow, or after it, when the child runs and nobody has heard of it yet. Commands with "free" in them are not held.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, after_fork: bool) -> None:
        self.go = threading.Event()
        self.reached = threading.Semaphore(0)
        self.pids: list[int] = []
        held = self

        class Popen(subprocess.Popen[bytes]):
            def __init__(self, args: Any, **options: Any) -> None:
                free = "free" in args
                if not after_fork and not free:
                    held.hold()
                super().__init__(args, **options)
                held.pids.append(self.pid)
                if after_fork and not free:
                    held.hold()

        monkeypatch.setattr(_spawner, "subprocess", types.SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE))

    def hold(self) -> None:
        """Hold the thread."""
        self.reached.release()
        assert self.go.wait(BOUND)

    async def at_it(self) -> None:
        """Wait until one start more is held."""
        await until(lambda: self.reached.acquire(blocking=False))


@pytest.fixture(params=[False, True], ids=["before-fork", "after-fork"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Starts that are held, before the fork and after it."""
    held = Held(monkeypatch, after_fork=request.param)
    yield held
    held.go.set()


@pytest.fixture
def held_after_fork(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Starts that are held when the child runs."""
    held = Held(monkeypatch, after_fork=True)
    yield held
    held.go.set()


def spawners() -> list[threading.Thread]:
    """The threads that start children."""
    return [thread for thread in threading.enumerate() if "spawner" in thread.name]


# Starts that fail -----------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[dict[str, tuple[Any, dict[str, Any]]]]:
    """Commands that can't be started, and their options."""
    plain, garbage, busy = (tmp_path / name for name in ("plain", "garbage", "busy"))
    plain.write_text("#!/bin/sh\n")
    garbage.write_bytes(b"\x7fELF garbage")
    shutil.copy("/bin/true", busy)
    for path in (garbage, busy):
        path.chmod(stat.S_IRWXU)
    with busy.open("ab"):
        yield {
            "ENOENT": (["/no/such/program"], {}),
            "ENOENT on the path": (["no-such-program"], {}),
            "EACCES": ([plain], {}),
            "EACCES for a directory": (["/"], {}),
            "ENOEXEC": ([garbage], {}),
            "E2BIG": (["/bin/true", "a" * (4 << 20)], {}),
            "ETXTBSY": ([busy], {}),
            "no such cwd": (["/bin/true"], {"cwd": "/no/such/directory"}),
            "cwd that is a file": (["/bin/true"], {"cwd": plain}),
            "NUL in the program": (["/bin/true\0"], {}),
            "NUL in an argument": (["/bin/true", "a\0b"], {}),
            "NUL in the environment": (["/bin/true"], {"env": {"A": "a\0b"}}),
            "nothing": ([], {}),
            "no such descriptor": (["/bin/true"], {"stdin": 9999}),
            "no such user": (["/bin/true"], {"user": "no such user"}),
            "no such umask": (["/bin/true"], {"umask": 1 << 40}),
            "no command": (7, {}),
        }


def _whole(error: BaseException) -> tuple[Any, ...]:
    return type(error), str(error), getattr(error, "errno", None), getattr(error, "filename", None)


async def test_start_that_fails(reaper: anyreap.Reaper, failing: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    """A start that fails raises what `subprocess` raises, and leaves no child, no descriptor, and the handler as it was
    (M1 to M7, field bug 54).
    """
    for name, (command, options) in failing.items():
        with pytest.raises((OSError, ValueError, TypeError, IndexError, KeyError, OverflowError)) as theirs:
            subprocess.run(command, check=False, capture_output=not options.get("stdin"), **options)
        before = children(), numbers(), sigaction()
        for start in (reaper.open_process, reaper.run_process):
            with pytest.raises(type(theirs.value)) as ours, anyio.fail_after(BOUND):
                await start(command, **options)
            assert _whole(ours.value) == _whole(theirs.value), name
        assert (children(), numbers(), sigaction()) == before, name
    assert reaper.statistics().owned == reaper.statistics().watched == 0
    assert (await reaper.run_process(["/bin/echo", "a"])).stdout == b"a\n"
    assert len(spawners()) <= 4


async def test_start_that_fails_in_the_shell(reaper: anyreap.Reaper) -> None:
    """A command of the shell that is not found is the shell's failure, not ours."""
    done = await reaper.run_process("no-such-program", check=False)
    assert done.returncode == 127
    assert b"not found" in done.stderr


@needs_root
@each_backend
def test_start_as_another_user_is_refused(host: Host) -> None:
    """A start as a user that we may not become is a PermissionError, and leaves no zombie (M9)."""
    run_alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                before = set(open_fds())
                for options in ({"user": 0}, {"group": 0}, {"extra_groups": [0]}):
                    for start in (reaper.open_process, reaper.run_process):
                        try:
                            await start(["/bin/true"], **options)
                        except PermissionError:
                            pass
                        else:
                            raise AssertionError(options)
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    pass
                else:
                    raise AssertionError("there is a child")
                assert set(open_fds()) == before
        run(main)
        """,
        host,
    )


@each_backend
def test_start_without_descriptors(host: Host) -> None:
    """However few descriptors are left, a start works or is an EMFILE, and leaves no child and no descriptor (X6)."""
    done = run_alone(
        """
        import errno, resource
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                await reaper.run_process(["/bin/true"])
                found = resource.getrlimit(resource.RLIMIT_NOFILE)
                before = set(open_fds())
                for spare in range(14):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (64, found[1]))
                    taken = []
                    try:
                        while True:
                            taken.append(os.dup(0))
                    except OSError:
                        pass
                    for _ in range(spare):
                        os.close(taken.pop())
                    outcome = 0
                    try:
                        with anyio.fail_after(10):
                            done = await reaper.run_process(["/bin/cat"], input=b"a")
                        assert done.stdout == b"a", done
                    except OSError as exc:
                        outcome = exc.errno
                    for fd in taken:
                        os.close(fd)
                    resource.setrlimit(resource.RLIMIT_NOFILE, found)
                    assert (children(), set(open_fds())) == (set(), before), (spare, open_fds())
                    print(errno.errorcode.get(outcome, outcome), end=" ")
        run(main)
        """,
        host,
    )
    outcomes = done.stdout.split()
    assert outcomes[:8] == ["EMFILE"] * 8  # three pipes, and the one on which subprocess hears of a failing exec
    assert outcomes[-1] == "0"
    assert set(outcomes) == {"EMFILE", "0"}


@needs_root
@each_backend
@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_start_without_processes(host: Host, first: bool) -> None:
    """Where no process can be had, a start is the BlockingIOError (EAGAIN) that `subprocess` raises; a first one too,
    for which there is no thread yet. The next one after that works (G7).
    """
    run_alone(
        """
        import resource
        async def main():
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                if not FIRST:
                    await reaper.run_process(["/bin/true"])
                before = set(open_fds())
                os.setresuid(65534, 65534, 65534)  # the limit is not root's
                soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
                resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
                for start in (reaper.open_process, reaper.run_process):
                    try:
                        await start(["/bin/true"])
                    except BlockingIOError:
                        pass
                    else:
                        raise AssertionError("it started")
                assert (children(), set(open_fds())) == (set(), before)
                assert reaper.statistics().owned == 0
                resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
                assert (await reaper.run_process(["/bin/echo", "a"])).stdout == b"a\\n"
        run(main)
        """.replace("FIRST", str(first)),
        host,
    )


# Starts that are cancelled --------------------------------------------------------------------------------------------


async def test_cancelled_start(reaper: anyreap.Reaper, held: Held) -> None:
    """A start that is cancelled, while it has no child yet or when the child runs already, returns at once; the child
    is killed as soon as it is there, and collected, and nothing is left (M10).
    """
    before = children(), numbers()
    with reaper.exits() as exits, anyio.fail_after(BOUND):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_when, held, scope.cancel)
                await reaper.open_process(SLEEP)
        assert scope.cancelled_caught
        held.go.set()
        status = await exits.receive()
        assert (status.pid, status.signal) == (held.pids[-1], signal.SIGKILL)
        await until(lambda: (children(), numbers()) == before)
        assert reaper.statistics().owned == 0


async def _when(held: Held, call: Callable[[], Any]) -> None:
    await held.at_it()
    call()


@on_asyncio
@pytest.mark.parametrize("way", ["cancel", "timeout"])
async def test_natively_cancelled_start(reaper: anyreap.Reaper, held: Held, way: str) -> None:
    """A native cancellation of asyncio leaves nothing of a start behind either (M10)."""
    before = children(), numbers()

    async def timed() -> None:
        async with asyncio.timeout(None) as timeout, anyio.create_task_group() as tasks:
            tasks.start_soon(_when, held, lambda: timeout.reschedule(0))
            await reaper.open_process(SLEEP)

    task = asyncio.create_task(reaper.open_process(SLEEP) if way == "cancel" else timed())
    if way == "cancel":
        await _when(held, task.cancel)
    with anyio.fail_after(BOUND), pytest.raises(asyncio.CancelledError if way == "cancel" else TimeoutError):
        await task
    held.go.set()
    await until(lambda: held.pids and (children(), numbers()) == before)


async def test_cancelled_before_it_starts(reaper: anyreap.Reaper, held: Held) -> None:
    """In a cancelled scope nothing is started."""
    for start in (reaper.open_process, reaper.run_process):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await start(SLEEP)
        assert scope.cancelled_caught
    assert not held.reached.acquire(timeout=0.05)


async def test_cancelled_run_process_that_starts(reaper: anyreap.Reaper, held_after_fork: Held) -> None:
    """A `run_process` that is cancelled when its child runs, and only the loop has not heard of it yet, ends it by the
    policy, and returns when it is gone: as it promises.
    """
    # BUG: it returns at once, as a cancelled open_process does, and the child is killed and collected later.
    read, write = os.pipe()
    before = children()
    script = f"trap 'exit 7' TERM; echo >/dev/fd/{write}; while :; do sleep 0.01; done"

    async def cancel() -> None:
        await held_after_fork.at_it()
        await anyio.wait_readable(read)
        scope.cancel()
        await anyio.lowlevel.checkpoint()
        held_after_fork.go.set()

    try:
        with reaper.exits() as exits, anyio.fail_after(BOUND):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                with anyio.CancelScope() as scope:
                    await reaper.run_process(["/bin/sh", "-c", script], pass_fds=[write])
                left = children() - before
                held_after_fork.go.set()
            assert scope.cancelled_caught
            assert (await exits.receive()).exit_code == 7
            assert left == set()
    finally:
        os.close(read)
        os.close(write)


async def test_cancelled_start_of_a_group(reaper: anyreap.Reaper, held_after_fork: Held) -> None:
    """The descendants that a child has forked when its start is cancelled end with it, if it leads a group."""
    read, write = os.pipe()
    script = f"sleep 3600 & echo $! >/dev/fd/{write}; wait"
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            group = anyreap.Shutdown(scope="group", grace=3600)
            tasks.start_soon(lambda: reaper.open_process(["/bin/sh", "-c", script], pass_fds=[write], shutdown=group))
            await anyio.wait_readable(read)
            member = int(os.read(read, 100))
            assert state_of(member) in ("S", "R")
            tasks.cancel_scope.cancel()
        held_after_fork.go.set()
        await until(lambda: state_of(member) in ("", "Z"))
    os.close(read)
    os.close(write)


async def test_block_is_left_while_a_start_is_held(source: Any, held: Held) -> None:
    """A block is not left before a start is over: what it brings is ended with the others."""
    before = children()
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source) as reaper:
            tasks.start_soon(reaper.open_process, SLEEP)
            await held.at_it()
            scope.cancel()
            timer = threading.Timer(0.05, held.go.set)
            timer.start()
    assert scope.cancelled_caught
    assert len(held.pids) == 1
    assert children() == before
    timer.join()


async def test_start_that_outlives_the_block(source: Any, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that takes longer than the bound of the shutdown is not waited for; its thread ends the child itself."""
    monkeypatch.setattr(_shutdown, "KILL_BOUND", 0.05)
    before = children(), numbers()
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source) as reaper:
            tasks.start_soon(reaper.open_process, SLEEP)
            await held.at_it()
            scope.cancel()
    assert not held.go.is_set()
    held.go.set()
    await until(lambda: held.pids and not spawners())
    assert (children(), numbers()) == before


async def test_start_that_the_end_of_the_body_overtakes(source: Any, held: Held) -> None:
    """A child that is being started when the body returns gets its pipes closed, as those that were there: `cat` ends,
    and the block with it.
    """
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
            tasks.start_soon(reaper.open_process, ["/bin/cat"])
            await held.at_it()

            async def let_go() -> None:
                await anyio.wait_all_tasks_blocked()  # the block waits
                held.go.set()

            tasks.start_soon(let_go)
    assert children() == set()


@pytest.mark.parametrize("late", [False, True])
async def test_who_waits_for_a_start_that_outlives_the_block(
    source: Any, held: Held, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A task outside of the block that waits for such a start is told that the block was left; `late`: also when the
    start is on its way to the loop at that moment.
    """
    monkeypatch.setattr(_shutdown, "KILL_BOUND", 0.05)
    before = children(), numbers()
    heard: list[str] = []

    async def start(reaper: anyreap.Reaper) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await reaper.open_process(SLEEP)
        heard.append("closed")

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyreap.open_reaper(source=source) as reaper:
                    tasks.start_soon(start, reaper)
                    await held.at_it()
                    scope.cancel()
            if late:
                held.go.set()
                while not held.pids or spawners():
                    time.sleep(0.002)
    assert heard == ["closed"]
    held.go.set()
    await until(lambda: held.pids and not spawners())
    assert (children(), numbers()) == before


async def test_start_in_a_closing_reaper(source: Any) -> None:
    """While its children are shut down, and afterwards, a reaper starts none: a RuntimeError that says so."""
    errors: list[str] = []

    async def start_one() -> None:
        with pytest.raises(RuntimeError) as raised:
            await reaper.open_process(SLEEP)
        errors.append(str(raised.value))

    async def heard() -> None:
        await anyio.wait_readable(read)
        os.read(read, 1)

    async def start_during_the_grace() -> None:
        await heard()
        await start_one()
        again.cancel()

    read, write = os.pipe()
    script = f"trap 'echo >/dev/fd/{write}' TERM; echo >/dev/fd/{write}; while :; do sleep 0.01; done"
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as again, anyio.CancelScope() as scope:
                async with anyreap.open_reaper(source=source, shutdown=PATIENT) as reaper:
                    await reaper.open_process(["/bin/sh", "-c", script], pass_fds=[write])
                    await heard()
                    tasks.start_soon(start_during_the_grace)
                    scope.cancel()
        await start_one()
    os.close(read)
    os.close(write)
    assert "shutting" in errors[0]
    assert "closed" in errors[1]


@each_backend
async def test_a_thousand_cancelled_starts(source: Any) -> None:
    """A thousand starts, each cancelled in another step of the way, leave the descriptors, the threads and the children
    as they were (M10).
    """
    started = 0

    async def start_one(steps: int) -> None:
        nonlocal started
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                tasks.start_soon(_cancels, scope, steps)
                process = await opened.open_process(SLEEP)
                started += 1
                process.close_pipes()
                process.kill()

    before = children(), numbers(), threading.active_count()
    with anyio.fail_after(60):
        async with anyreap.open_reaper(source=source, shutdown=PATIENT) as opened:
            await opened.run_process(["/bin/true"])
            inside = numbers()
            for batch in range(50):
                async with anyio.create_task_group() as tasks:
                    for number in range(20):
                        tasks.start_soon(start_one, batch * number % 100)
            await until(lambda: opened.statistics().owned == 0)
            await until(lambda: (children(), numbers()) == (before[0], inside))
            assert len(spawners()) <= 4
            assert started < 1000
    assert (children(), numbers(), threading.active_count()) == before


async def _cancels(scope: anyio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await anyio.lowlevel.checkpoint()
    scope.cancel()


# Starts that take their time ------------------------------------------------------------------------------------------

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

SLOW_EXEC = """
import contextlib, ctypes, sys, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_long(-1), 0, 0, 0)  # PR_SET_PTRACER: yama may ask for it
SLOW = ["/usr/bin/sleep", "3600"]
DELAY = 0.4

@contextlib.contextmanager
def trace():
    command = f"strace -f -o /dev/null -p {os.getpid()} -P {SLOW[0]} -e trace=execve -e"
    delay = f"inject=execve:delay_enter={int(DELAY * 1e6)}"
    tracer = subprocess.Popen([*command.split(), delay], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for line in tracer.stderr:
            if b"attached" in line:
                break
            if b"ot permitted" in line:
                print("no ptrace")
                sys.exit()
        else:
            raise AssertionError("strace does not attach")
        yield tracer
    finally:
        tracer.kill()
        tracer.communicate()

async def main():
    longest = 0.0
    slow = None

    async def tick():
        nonlocal longest
        last = time.perf_counter()
        while True:
            await anyio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    async def start_slow():
        nonlocal slow
        slow = await reaper.open_process(SLOW)

    async def started(beside):
        await until(lambda: children() - beside)

    async with anyreap.open_reaper(source=SOURCE) as reaper:
        await reaper.run_process(["/bin/true"])
        before = set(open_fds())
        with trace() as tracer:
            inside = set(open_fds())
            # A busy machine may stall the loop too, but not three times; a slow start does each time.
            for _ in range(3):
                longest, slow = 0.0, None
                async with anyio.create_task_group() as ticking:
                    ticking.start_soon(tick)
                    began = time.perf_counter()
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(start_slow)
                        await started({tracer.pid})
                        await reaper.run_process(["/bin/echo"])
                    assert time.perf_counter() - began >= DELAY
                    ticking.cancel_scope.cancel()
                if longest < 0.1:
                    break
                slow.kill()
                await slow.aclose()
            print("gap", longest)

            # Cancelled meanwhile: nothing is left.
            began = time.perf_counter()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(start_slow)
                await started({tracer.pid, slow.pid})
                tasks.cancel_scope.cancel()
            slow.kill()
            await slow.aclose()
            await until(lambda: (children(), set(open_fds())) == ({tracer.pid}, inside))
            assert time.perf_counter() - began >= DELAY
        assert (children(), set(open_fds())) == (set(), before)
run(main)
"""


@needs_strace
@each_backend
def test_slow_exec_stalls_nobody(host: Host) -> None:
    """While an exec takes 400 ms the loop goes on, and a start that is cancelled meanwhile leaves nothing (M10).

    A stalled loop would show a gap of 400 ms; 100 allow for a busy machine under strace.
    """
    done = run_alone(SLOW_EXEC, host, limit=40)
    if "no ptrace" in done.stdout:
        pytest.skip("a process may not be traced here")
    assert float(done.stdout.split()[1]) < 0.1


async def test_slow_starts_hold_up_no_other(reaper: anyreap.Reaper, held: Held) -> None:
    """While starts take their time, others proceed; and the loop does."""
    got: list[anyreap.Process] = []

    async def start_one() -> None:
        got.append(await reaper.open_process(SLEEP))

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(start_one)
            for _ in range(3):
                await held.at_it()
            for number in range(3):
                assert (await reaper.run_process(["/bin/echo", "free"])).stdout == b"free\n", number
            assert got == []
            held.go.set()
    assert len(got) == 3
    for process in got:
        process.kill()


async def test_threads_last(source: Any) -> None:
    """All starts come from a few threads that last as long as the reaper: none before the first start, four at most
    however many start at once, none after the block (K24, field bug 52).
    """
    async with anyreap.open_reaper(source=source) as reaper:
        assert spawners() == []
        await reaper.run_process(["/bin/true"])
        first = {thread.native_id for thread in spawners()}
        assert len(first) == 1
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(reaper.run_process, ["/bin/true"])
            now = {thread.native_id for thread in spawners()}
            assert first <= now
            assert first <= set(map(int, os.listdir("/proc/self/task")))
            assert len(now) <= 4
    await until(lambda: not spawners())


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
async def test_child_that_dies_with_its_parent(source: Any) -> None:
    """A child that has set PR_SET_PDEATHSIG, which is tied to the thread that forked it, lives as long as the reaper,
    however many starts come and go (K24, field bug 52).
    """
    with anyio.fail_after(BOUND):
        async with anyreap.open_reaper(source=source) as reaper:
            command = ["setpriv", "--pdeathsig", "KILL", "/bin/sh", "-c", "echo; read x; exit 3"]
            processes = [await reaper.open_process(command) for _ in range(3)]
            for process in processes:
                assert process.stdout is not None
                await process.stdout.receive()
            for _ in range(3):
                async with anyio.create_task_group() as tasks:
                    for _ in range(10):
                        tasks.start_soon(reaper.run_process, ["/bin/true"])
            for process in processes:
                assert state_of(process.pid) == "S"
                assert process.stdin is not None
                await process.stdin.send(b"\n")
                assert await process.wait() == 3


# What a child starts with ---------------------------------------------------------------------------------------------


async def test_no_descriptor_is_inherited(reaper: anyreap.Reaper) -> None:
    """A child has its three descriptors and none of ours, with `close_fds=False` too, and not those of a sibling: that
    one reads to the end although the others live (field bug 68, G10).
    """
    inheritable = {fd for fd in numbers() if os.get_inheritable(fd)}  # pytest has some
    async with anyio.create_task_group() as tasks:
        processes: list[anyreap.Process] = []

        async def start_one(command: list[str]) -> None:
            processes.append(await reaper.open_process(command, close_fds=False))

        for _ in range(6):
            tasks.start_soon(start_one, ["/bin/cat"])
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"a")
        assert await process.stdout.receive() == b"a"  # it is past its start, where it has files open for a moment
        assert set(map(int, os.listdir(f"/proc/{process.pid}/fd"))) == {0, 1, 2} | inheritable
    for process in processes:
        assert process.stdin is not None
        await process.stdin.aclose()
        with anyio.fail_after(BOUND):
            assert await process.wait() == 0


SIGNALS = """
warnings.simplefilter("ignore")
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGUSR2, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP, *BLOCKED])
COMMAND = ["grep", "^Sig[BIC]", "/proc/self/status"]
def sets(text):
    return {line.split()[0]: int(line.split()[1], 16) & ~(3 << 31) for line in text.decode().splitlines()}

async def main():
    async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
        for restore in (False, True):
            done = await reaper.run_process(COMMAND, restore_signals=restore)
            assert sets(done.stdout) == found[restore], (restore, sets(done.stdout), found)
        for _ in range(2):  # from another thread
            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(reaper.run_process, COMMAND)
found = {
    restore: sets(subprocess.run(COMMAND, capture_output=True, restore_signals=restore).stdout)
    for restore in (False, True)
}
assert found[False]["SigBlk:"] >> (signal.SIGHUP - 1) & 1
assert found[False]["SigIgn:"] >> (signal.SIGUSR1 - 1) & 1
run(main)
"""


def test_mask_and_dispositions(host: Host) -> None:
    """A child starts with the signal mask and the dispositions that were found when the reaper was opened: as one that
    `subprocess` had started then (promise 4).
    """
    for blocked in ("[]", "[signal.SIGCHLD]"):
        run_alone(SIGNALS.replace("BLOCKED", blocked), host)


@each_backend
def test_starts_in_another_thread(host: Host) -> None:
    """A reaper that was opened in another thread starts children there, and refuses to do so in ours."""
    run_alone(
        """
        def theirs():
            async def main():
                async with anyreap.open_reaper(source="pidfd") as reaper:
                    process = await reaper.open_process(["/bin/cat"])
                    reapers.append(reaper)
                    opened.set()
                    await until(refused.is_set)
                    await process.aclose()
                    assert process.returncode == 0
                    assert (await reaper.run_process(["/bin/cat"], input=b"a")).stdout == b"a"
                    codes.append(0)
            run(main)
        async def ours():
            try:
                await reapers[0].open_process(["/bin/true"])
            except RuntimeError as exc:
                assert "another thread" in str(exc), exc
                refused.set()
        reapers, codes = [], []
        opened, refused = threading.Event(), threading.Event()
        thread = threading.Thread(target=theirs)
        thread.start()
        assert opened.wait(10)
        run(ours)
        thread.join()
        assert codes == [0] and not children()
        """,
        host,
    )


async def test_ended_before_the_loop_hears_of_it(reaper: anyreap.Reaper, held_after_fork: Held) -> None:
    """A child that has ended when the loop takes it over is collected with its status, without another signal (B4)."""
    got: list[int] = []

    async def run_one() -> None:
        got.append((await reaper.run_process(["/bin/sh", "-c", "exit 7"], check=False)).returncode)

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_one)
            await held_after_fork.at_it()
            await until(lambda: is_zombie(held_after_fork.pids[0]))
            held_after_fork.go.set()
    assert got == [7]
