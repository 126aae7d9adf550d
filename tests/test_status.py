"""How a child ended, as it really did; the value that says so; the errors; the public names. Ids as
in the scenarios.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import importlib
import inspect
import os
import pickle
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import anyreap
from anyreap import ExitStatus
from tests.harness import (
    Gate,
    await_death,
    beat,
    children,
    collect,
    exits_with,
    is_zombie,
    runs,
    sh,
    state_of,
    until,
)

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


SIGNALS = sorted(set(map(int, signal.valid_signals())))
# Python ignores some, and so would its children.
DEFAULTS = [number for number in SIGNALS if number not in (signal.SIGKILL, signal.SIGSTOP)]


def cat(gate: Gate) -> int:
    """A child that waits at a gate, with the default disposition of every signal."""
    actions = [(os.POSIX_SPAWN_DUP2, gate.read, 0)]
    pid = os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=actions, setsigdef=DEFAULTS)
    gate.pids.append(pid)
    return pid


@contextmanager
def no_core_dumps() -> Iterator[None]:
    """Let children that are started in it leave no core dumps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


# D: status fidelity
# --------------------------------------------------------------------------------------------------


async def test_every_exit_code(source: Any, pidfds: bool) -> None:
    """D1: each exit code from 0 to 255 is told exactly, with the usage of its child; 255 is not a
    lost status.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(30):
            watched = [reaper.watch(gate.add(f"exit {code}")) for code in range(256)]
            gate.open()
            for code, child in enumerate(watched):
                status = await child.wait()
                assert status.returncode == status.exit_code == status.shell_code == code
                assert status.pid == child.pid
                assert status.signal is None
                assert status.success is (code == 0)
                assert not status.core_dumped
                assert not status.orphan
                assert not child.lost
                assert status.usage is not None
                assert status.usage.ru_maxrss > 0
                assert str(status) == f"exited with code {code}"
        assert reaper.statistics().lost == 0


async def test_exit_code_beyond_a_byte(source: Any) -> None:
    """D2: of an exit code only the low eight bits reach the parent: 259 is 3, -1 is 255, as
    everywhere.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        for code, seen in ((259, 3), (-1, 255), (256, 0)):
            script = f"import os; os._exit({code})"
            argv = [sys.executable, "-ISc", script]
            pid = os.posix_spawn(sys.executable, argv, os.environ)
            with anyio.fail_after(20):
                assert (await reaper.wait(pid)).returncode == seen


async def test_every_signal(source: Any, pidfds: bool) -> None:
    """D3, field bug 13: death by each signal that kills, the real-time ones too, is told as its
    negative number.
    """
    harmless = {
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGURG,
        signal.SIGWINCH,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
    }
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with no_core_dumps(), Gate() as gate, anyio.fail_after(30):
            deadly = [number for number in SIGNALS if number not in harmless]
            watched = {number: reaper.watch(cat(gate)) for number in deadly}
            for number, child in watched.items():
                child.send_signal(number)
            for number, child in watched.items():
                status = await child.wait()
                assert status.returncode == -number
                assert status.signal == number
                assert status.exit_code is None
                assert status.shell_code == 128 + number
                assert not status.success
                assert not status.core_dumped
                assert str(status).startswith("killed by ")
    assert {signal.SIGRTMIN, signal.SIGRTMIN + 1, signal.SIGRTMAX, signal.SIGKILL} <= set(watched)


@pytest.mark.parametrize("limit", ["0", "unlimited"])
async def test_core_dumped(source: Any, limit: str, tmp_path: Path) -> None:
    """D4: whether a core was dumped is told as `waitpid` tells it: with RLIMIT_CORE 0
    it never is.
    """
    script = f"cd {tmp_path}; ulimit -c {limit}; kill -ABRT $$"
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        script = f"cd {tmp_path}; kill -ABRT $$"
    _, raw = os.waitpid(sh(script), 0)
    expected = os.WCOREDUMP(raw)
    assert limit == "unlimited" or not expected
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with anyio.fail_after(20):
            status = await reaper.wait(sh(script))
            observed = await reaper.wait(pid := sh(script), reap=False)
        assert status.returncode == -signal.SIGABRT
        assert status.core_dumped is observed.core_dumped is expected
        assert str(status) == "killed by SIGABRT" + (" (core dumped)" if expected else "")
    assert collect(pid) == -signal.SIGABRT


MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A cgroup (version 1) that allows its members 16 MiB."""
    cgroup = MEMORY_CGROUPS / f"anyreap-test-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "memory.limit_in_bytes").write_text(str(16 << 20))
    except OSError as exc:
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    yield cgroup
    cgroup.rmdir()


async def test_killed_by_the_oom_killer(source: Any, little_memory: Path) -> None:
    """D9: a child that the kernel kills for its memory was killed by SIGKILL."""
    greedy = f"open({str(little_memory / 'cgroup.procs')!r}, 'w').write('0'); b'x' * (256 << 20)"
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with anyio.fail_after(20):
            done = await reaper.run_process([sys.executable, "-ISc", greedy], check=False)
        assert done.returncode == -signal.SIGKILL
        assert done.stderr == b""


# More than this process has: what a child has used begins with what it was forked from (`man 2
# getrusage`).
MEMORY = 300 << 20
HEAVY = f"""
import os, time
x = b"x" * {MEMORY}
while time.process_time() < 0.2:
    pass
os.read(0, 1)
"""


async def test_usage_is_that_of_the_child(source: Any) -> None:
    """D5, demand 8: in a burst, each usage is that of its own child: time and memory, and of no
    other.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate, anyio.fail_after(30):
            actions = [(os.POSIX_SPAWN_DUP2, gate.read, 0)]
            light = [reaper.watch(gate.add("exit 0")) for _ in range(10)]
            argv = [sys.executable, "-ISc", HEAVY]
            heavy = os.posix_spawn(sys.executable, argv, os.environ, file_actions=actions)
            child = reaper.watch(heavy)
            light += [reaper.watch(gate.add("exit 0")) for _ in range(10)]
            await until(lambda: processor_time(heavy) >= 0.15)
            gate.open()
            usage = (await child.wait()).usage
            assert usage is not None
            assert usage.ru_utime + usage.ru_stime >= 0.1
            assert usage.ru_maxrss >= MEMORY >> 10
            for other in light:
                usage = (await other.wait()).usage
                assert usage is not None
                assert usage.ru_utime + usage.ru_stime < 0.1
                assert usage.ru_maxrss < MEMORY >> 10


def processor_time(pid: int) -> float:
    """The processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_stopped_and_continued(source: Any, pidfds: bool) -> None:
    """D6, field bugs 16 and 26: stop and continue are no exits: nobody is woken, nothing is
    reported, nothing spins.
    """
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        exits = reaper.exits()
        with Gate() as gate, anyio.fail_after(20):
            child = reaper.watch(cat(gate))
            for _ in range(5):
                child.send_signal(signal.SIGSTOP)
                await until(lambda: state_of(child.pid) == "T")
                child.send_signal(signal.SIGCONT)
                await until(lambda: runs(child.pid))
            with pytest.raises(TimeoutError), anyio.fail_after(0.02):
                await child.wait()
            assert child.status is None
            assert not child.lost
            now = reaper.statistics()
            assert (now.watched, now.reaped, now.lost) == (1, 0, 0)
            assert now.wakeups <= 12
            assert exits.statistics().current_buffer_used == 0
            gate.open()
            assert (await child.wait()).returncode == 0
        exits.close()


async def test_stopped_when_it_is_handed_in(source: Any, pidfds: bool) -> None:
    """D6: a child that is stopped when it is handed in has not ended."""
    with Gate() as gate, anyio.fail_after(20):
        pid = cat(gate)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: state_of(pid) == "T")
        heartbeat = beat(source, pidfds=pidfds)
        async with anyreap.open_reaper(source=source, heartbeat=heartbeat) as reaper:
            child = reaper.watch(pid)
            await anyio.wait_all_tasks_blocked()
            assert child.status is None
            child.send_signal(signal.SIGCONT)
            gate.open()
            assert (await child.wait()).returncode == 0


async def test_killed_while_stopped(source: Any, pidfds: bool) -> None:
    """D7: a stopped child that is killed was killed: -9."""
    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(20):
            child = reaper.watch(cat(gate))
            child.send_signal(signal.SIGSTOP)
            await until(lambda: state_of(child.pid) == "T")
            child.kill()
            assert (await child.wait()).returncode == -9


@pytest.mark.parametrize("code", ["CLD_STOPPED", "CLD_CONTINUED", "CLD_TRAPPED"])
async def test_a_status_that_is_no_end(
    source: Any,
    pidfds: bool,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """D8: were a wait call to say "stopped", the child has not ended; its real end is told."""
    real = os.waitid

    def waitid(idtype: int, which: int, flags: int) -> Any:
        if not nonsense or flags & os.WNOWAIT == 0:
            return real(idtype, which, flags)
        si_status = signal.SIGSTOP
        fields = (child.pid, os.getuid(), signal.SIGCHLD, si_status, getattr(os, code))
        return os.waitid_result(fields)

    async with anyreap.open_reaper(source=source, heartbeat=beat(source, pidfds=pidfds)) as reaper:
        with Gate() as gate, anyio.fail_after(20):
            child = reaper.watch(cat(gate))
            nonsense = True
            monkeypatch.setattr(os, "waitid", waitid)
            for _ in range(3):
                assert reaper.watch(child.pid) is child  # has the kernel looked at
                signal.raise_signal(signal.SIGCHLD)
                await anyio.wait_all_tasks_blocked()
            assert child.status is None
            assert not child.lost
            nonsense = False
            gate.open()
            assert (await child.wait()).returncode == 0


async def test_usage_where_somebody_else_collects(source: Any) -> None:
    """D5: the usage comes with our own collecting: it is None for a Popen, and for a child that is
    only observed.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with anyio.fail_after(20):
            popen = subprocess.Popen(["/bin/sh", "-c", "exit 3"])
            assert (await reaper.wait(popen)).usage is None
            pid = exits_with(4)
            assert (await reaper.wait(pid, reap=False)).usage is None
            assert (await reaper.wait(exits_with(5))).usage is not None
    assert collect(pid) == 4


# lowlevel: the same of a single call
# ---------------------------------------------------------------------------------


def test_peek_and_reap() -> None:
    """`lowlevel.peek` consumes nothing, `reap` collects the one child, once, with its usage;
    neither blocks.
    """
    lowlevel = anyreap.lowlevel
    with Gate() as gate:
        pid = gate.add("exit 7")
        assert lowlevel.peek(pid) is None
        assert lowlevel.reap(pid) is None
        assert lowlevel.peek(None) is None
        gate.open()
        await_death(pid)
    for _ in range(3):
        assert lowlevel.peek(pid) == lowlevel.peek(None) == ExitStatus(pid, 7)
    other = exits_with(8)
    await_death(other)
    status = lowlevel.reap(pid)
    assert status is not None
    assert (status.pid, status.returncode) == (pid, 7)
    assert status.usage is not None
    assert is_zombie(other)
    for call in (lowlevel.peek, lowlevel.reap):
        with pytest.raises(anyreap.NotAChild):
            call(pid)
    assert collect(other) == 8


def test_peek_and_reap_of_what_is_no_child() -> None:
    """B7: `lowlevel.reap(0)` and `reap(-1)`, "any child" to waitpid, are a ValueError, and collect
    nothing.
    """
    zombie = exits_with(9)
    await_death(zombie)
    bad: list[tuple[Any, type[Exception]]] = [
        (0, ValueError),
        (-1, ValueError),
        (-os.getpgrp(), ValueError),
        (True, TypeError),
        ("7", TypeError),
        (7.0, TypeError),
        (1, anyreap.NotAChild),
        (os.getpid(), anyreap.NotAChild),
        (2**31, anyreap.NotAChild),
        (2**40, anyreap.NotAChild),
        (2**70, anyreap.NotAChild),
    ]
    for call in (anyreap.lowlevel.peek, anyreap.lowlevel.reap):
        for value, error in bad:
            with pytest.raises(error) as caught:
                call(value)
            assert type(caught.value) is error
    with pytest.raises(TypeError):
        anyreap.lowlevel.reap(None)  # type: ignore[arg-type]
    assert is_zombie(zombie)
    assert collect(zombie) == 9


# ExitStatus, the value
# -----------------------------------------------------------------------------------------------


def test_status_is_a_value() -> None:
    """An ExitStatus is frozen, without a dict, compares and hashes by what it says, and survives
    pickle and copy.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    status = ExitStatus(7, -9, core_dumped=True, usage=usage, orphan=True)
    assert status == ExitStatus(7, -9, core_dumped=True, usage=usage, orphan=True)
    assert status != ExitStatus(8, -9, core_dumped=True, usage=usage, orphan=True)
    assert status != ExitStatus(7, 0)
    assert hash(status) == hash(ExitStatus(7, -9, core_dumped=True, usage=usage, orphan=True))
    assert len({status, copy.copy(status), ExitStatus(7, 9), ExitStatus(7, 9)}) == 2
    for name in ("pid", "returncode", "usage", "core_dumped", "orphan"):
        with pytest.raises(AttributeError):
            setattr(status, name, 1)
        with pytest.raises(AttributeError):
            delattr(status, name)
    for name in ("signal", "exit_code", "anything"):  # TypeError: 3.11, tripped by its slots=True
        with pytest.raises((AttributeError, TypeError)):
            setattr(status, name, 1)
    assert not hasattr(status, "__dict__")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(status, protocol))
        assert again == status
        assert type(again) is ExitStatus
        assert again.usage == usage
    assert copy.deepcopy(status) == status
    assert dataclasses.replace(status, pid=8).pid == 8
    assert repr(ExitStatus(7, 3)).startswith("ExitStatus(pid=7, returncode=3")


@pytest.mark.parametrize(
    ("returncode", "core", "exit_code", "signum", "shell_code", "text"),
    [
        (0, False, 0, None, 0, "exited with code 0"),
        (3, False, 3, None, 3, "exited with code 3"),
        (255, False, 255, None, 255, "exited with code 255"),
        (-9, False, None, signal.SIGKILL, 137, "killed by SIGKILL"),
        (-15, False, None, signal.SIGTERM, 143, "killed by SIGTERM"),
        (-11, True, None, signal.SIGSEGV, 139, "killed by SIGSEGV (core dumped)"),
        (-34, False, None, signal.SIGRTMIN, 162, "killed by SIGRTMIN"),
        (-35, False, None, 35, 163, "killed by signal 35"),
        (-64, False, None, signal.SIGRTMAX, 192, "killed by SIGRTMAX"),
    ],
)
def test_what_a_status_says(  # noqa: PLR0917
    returncode: int,
    core: bool,
    exit_code: int | None,
    signum: int | None,
    shell_code: int,
    text: str,
) -> None:
    """A status as numbers, as a signal, as a shell would have it, and as a sentence."""
    raw = returncode << 8 if returncode >= 0 else -returncode | (0x80 if core else 0)
    for status in (ExitStatus(7, returncode, core), ExitStatus.from_wait_status(7, raw)):
        assert status.returncode == returncode
        assert status.exit_code == exit_code
        assert status.signal == signum
        assert isinstance(status.signal, signal.Signals) is (signum in list(signal.Signals))
        assert status.shell_code == shell_code
        assert status.core_dumped is core
        assert status.success is (returncode == 0)
        assert str(status) == text
        assert status.usage is None
        assert not status.orphan
    assert ExitStatus.from_wait_status(7, raw) == ExitStatus(7, returncode, core)


def test_every_wait_status_as_python_decodes_it() -> None:
    """D1, D3, D8: each of the 65536 wait statuses is decoded as `os.waitstatus_to_exitcode` does,
    or is a ValueError.
    """
    for raw in range(0x10000):
        if os.WIFSTOPPED(raw) or os.WIFCONTINUED(raw):
            with pytest.raises(ValueError, match="stopped"):
                ExitStatus.from_wait_status(7, raw)
        elif os.WIFEXITED(raw) or os.WIFSIGNALED(raw):
            status = ExitStatus.from_wait_status(7, raw)
            assert status.returncode == os.waitstatus_to_exitcode(raw)
            assert status.core_dumped is (os.WIFSIGNALED(raw) and os.WCOREDUMP(raw))


def test_a_real_stopped_status() -> None:
    """D8: the wait status of a stopped child is a ValueError that says so."""
    with Gate() as gate:
        pid = cat(gate)
        os.kill(pid, signal.SIGSTOP)
        _, raw = os.waitpid(pid, os.WUNTRACED)
        with pytest.raises(ValueError, match=str(pid)):
            ExitStatus.from_wait_status(pid, raw)
        os.kill(pid, signal.SIGKILL)
        _, raw, usage = os.wait4(pid, 0)
        status = ExitStatus.from_wait_status(pid, raw, usage)
    assert status == ExitStatus(pid, -9, usage=usage)


def test_check() -> None:
    """`check` returns a success, and raises ChildFailed for all else, which `except
    CalledProcessError` catches.
    """
    fine = ExitStatus(7, 0)
    assert fine.check() is fine
    for returncode in (1, 255, -9):
        status = ExitStatus(7, returncode)
        with pytest.raises(subprocess.CalledProcessError) as caught:
            status.check()
        assert type(caught.value) is anyreap.ChildFailed
        assert caught.value.status is status
        assert caught.value.returncode == returncode


# The errors ---------------------------------------------------------------------------------------
# -------------------


def test_child_failed() -> None:
    """ChildFailed says who failed and how, with the command where it is known; it is picklable with
    all that it holds.
    """
    error = anyreap.ChildFailed(ExitStatus(7, 3))
    assert str(error) == "child 7 exited with code 3"
    assert (error.returncode, error.cmd, error.output, error.stderr) == (3, 7, None, None)
    assert isinstance(error, subprocess.CalledProcessError)
    assert str(anyreap.ChildFailed(ExitStatus(7, -9))) == "child 7 was killed by SIGKILL"
    full = anyreap.ChildFailed(ExitStatus(7, -11, True), ["make", "all"], b"out", b"err")
    assert str(full) == "command ['make', 'all'] (pid 7) was killed by SIGSEGV (core dumped)"
    assert full.stdout == full.output == b"out"
    for one in (error, full):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is anyreap.ChildFailed
        assert str(again) == str(one)
        assert (again.status, again.cmd, again.output, again.stderr) == (
            one.status,
            one.cmd,
            one.output,
            one.stderr,
        )


def test_not_a_child() -> None:
    """NotAChild is a ChildProcessError with errno ECHILD, that names the pid; it is picklable."""
    error = anyreap.NotAChild(7)
    assert isinstance(error, ChildProcessError)
    assert error.pid == 7
    assert error.errno == errno.ECHILD
    assert str(error) == "pid 7 is not an unreaped child of this process"
    assert str(anyreap.NotAChild(7, "so there")).endswith("of this process: so there")
    for one in (error, anyreap.NotAChild(7, "so there")):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is anyreap.NotAChild
        assert (str(again), again.pid, again.errno) == (str(one), 7, errno.ECHILD)


def test_status_lost() -> None:
    """StatusLost is a ChildProcessError with errno ECHILD, that names the pid and the cause; it is
    picklable.
    """
    error = anyreap.StatusLost(7, "the cause")
    assert isinstance(error, ChildProcessError)
    assert not issubclass(anyreap.StatusLost, anyreap.NotAChild)
    assert (error.pid, error.why, error.errno) == (7, "the cause", errno.ECHILD)
    assert str(error) == "child 7 has ended, but its status is lost: the cause"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is anyreap.StatusLost
    assert (str(again), again.pid, again.why) == (str(error), 7, "the cause")


def test_still_running() -> None:
    """StillRunning names the pids, in order, and what is known of each; it is picklable."""
    error = anyreap.StillRunning({9: "", 7: "state D"})
    assert isinstance(error, RuntimeError)
    assert error.pids == (7, 9)
    assert "7 (state D), 9" in str(error)
    assert anyreap.StillRunning([9, 7]).pids == (7, 9)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is anyreap.StillRunning
    assert (str(again), again.pids) == (str(error), (7, 9))


def test_sigchld_unavailable() -> None:
    """SigchldUnavailable is a RuntimeError, and picklable."""
    error = anyreap.SigchldUnavailable("a remedy")
    assert isinstance(error, RuntimeError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is anyreap.SigchldUnavailable
    assert str(again) == "a remedy"


async def test_errors_as_they_are_raised(source: Any, no_pidfds: None) -> None:
    """The errors that a reaper raises survive pickle as well, as they go between processes."""
    errors: list[Exception] = []
    async with anyreap.open_reaper(source=source, heartbeat=0.02) as reaper:
        with pytest.raises(anyreap.NotAChild) as refused:
            reaper.watch(1)
        errors.append(refused.value)
        with Gate() as gate, anyio.fail_after(20):
            child = reaper.watch(gate.add("exit 3"))
            gate.open()
            collect(child.pid)
            with pytest.raises(anyreap.StatusLost) as lost:
                await child.wait()
            errors.append(lost.value)
            with pytest.raises(anyreap.ChildFailed) as failed:
                (await reaper.wait(exits_with(3))).check()
            errors.append(failed.value)
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)


# The public names ---------------------------------------------------------------------------------
# -------------------

PUBLIC = [
    *((anyreap, name) for name in anyreap.__all__ if name != "lowlevel"),
    *((anyreap.lowlevel, name) for name in anyreap.lowlevel.__all__),
]


def exported(module: types.ModuleType) -> set[str]:
    """What a module shows: all public names that are neither modules nor from `__future__`."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }


def test_all_names_what_is_exported() -> None:
    """`__all__` is sorted, holds each name once, and is what the module exports."""
    assert isinstance(anyreap.__all__, tuple)
    assert len(set(anyreap.__all__)) == len(anyreap.__all__)
    assert set(anyreap.__all__) == exported(anyreap) | {"lowlevel"}
    assert list(anyreap.__all__) == sorted(anyreap.__all__)
    assert inspect.ismodule(anyreap.lowlevel)
    for name in anyreap.lowlevel.__all__:
        assert hasattr(anyreap.lowlevel, name)
    assert set(anyreap.lowlevel.__all__) == {
        "SelfPipe",
        "install_handler",
        "is_default_handler",
        "peek",
        "reap",
    }


def test_names_are_there_before_their_first_use() -> None:
    """The names are imported when they are used, and known before; one that is none is an AttributeError."""
    assert set(anyreap.__all__) <= set(dir(anyreap))
    script = "import anyreap; assert set(anyreap.__all__) <= set(dir(anyreap)); from anyreap import *; ExitStatus, wait"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = anyreap.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_object(module: types.ModuleType, name: str) -> None:
    """Every public object names the module that users import it from, and has a docstring with an
    example.
    """
    found = getattr(module, name)
    assert found.__module__ == module.__name__
    assert found.__qualname__ == name
    assert found.__doc__ is not None
    assert "Example:" in found.__doc__
    assert "```python" in found.__doc__
    assert getattr(importlib.import_module(found.__module__), found.__qualname__) is found


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_public_methods(module: types.ModuleType, name: str) -> None:
    """Every public method and property of ours has a docstring, and types for all its parameters
    and its result.
    """
    found = getattr(module, name)
    members = {name: found} if inspect.isfunction(found) else dict(vars(found))
    for member, value in members.items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            value = value.fget  # noqa: PLW2901
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__  # noqa: PLW2901
        if not inspect.isfunction(value):
            continue
        assert value.__doc__, f"{name}.{member}"
        assert "return" in value.__annotations__, f"{name}.{member}"
        given = [*inspect.signature(value).parameters][0 if value is found else 1 :]
        assert set(given) <= set(value.__annotations__), f"{name}.{member}"


def test_pickles_name_the_package() -> None:
    """What is pickled names `anyreap`, not the file that a class happens to be in."""
    for value in (ExitStatus(7, 3), anyreap.Shutdown(), anyreap.NotAChild(7)):
        data = pickle.dumps(value, 0)
        assert b"anyreap" in data
        assert b"_status" not in data
        assert b"_errors" not in data
        assert b"_shutdown" not in data
        assert pickle.loads(data).__class__ is value.__class__


def test_typed() -> None:
    """The package says that it is typed (PEP 561)."""
    assert anyreap.__file__ is not None
    assert (Path(anyreap.__file__).parent / "py.typed").exists()


def test_import_starts_nothing() -> None:
    """Importing the package installs nothing, starts nothing, and imports no loop: whoever runs on one has done so."""
    script = (
        "import os, signal, sys, threading, anyreap\n"
        "anyreap.open_reaper\n"  # whose first use imports all of it
        "assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL\n"
        "assert threading.active_count() == 1\n"
        "assert not {'trio', 'asyncio', 'logging'} & set(sys.modules), set(sys.modules)\n"
        "assert 'multiprocessing' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
    assert not children()


def test_asyncio_takes_no_trio() -> None:
    """Nobody who runs on asyncio imports trio."""
    script = (
        "import anyio, os, sys, anyreap\n"
        "async def main():\n"
        "    async with anyreap.open_reaper() as reaper:\n"
        "        await reaper.wait(os.posix_spawn('/bin/true', ['true'], os.environ))\n"
        "        await reaper.run_process(['true'])\n"
        "anyio.run(main)\n"
        "assert 'trio' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
