"""The kernel calls, each against real children: what they see, what they take, whom they signal."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import anyreap
from anyreap import NotAChild, _kernel, lowlevel
from tests.harness import (
    HOSTS,
    Gate,
    await_death,
    collect,
    end,
    exits_with,
    is_zombie,
    open_fds,
    run_alone,
    set_sigaction,
    sh,
    sigaction,
    sleeper,
    state_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Kept by the kernel in the pidfd of a child that was collected: Linux >= 6.15.
KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
recalls = pytest.mark.skipif(KERNEL < (6, 15), reason="this kernel keeps no status in a pidfd")
numbered = pytest.mark.skipif(KERNEL < (6, 9), reason="pidfds have no inode of their own here")


def can_unshare() -> bool:
    """Whether a pid namespace can be made: as root, and where no sandbox forbids it."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False)
    return done.returncode == 0


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture
def child() -> Iterator[int]:
    """A child that runs until it is signalled."""
    pid = sleeper()
    yield pid
    end(pid)


@pytest.fixture
def zombie() -> Iterator[int]:
    """A child that has exited with 7, and was not collected."""
    pid = exits_with(7)
    await_death(pid)
    yield pid
    end(pid)


@contextlib.contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    """A pidfd, closed afterwards."""
    fd = _kernel.open_pidfd(pid)
    assert fd >= 0
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No descriptor can be had: EMFILE from every call that makes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def was_not_killed(pid: int) -> bool:
    """Whether no SIGKILL has reached a child: else that, not the SIGTERM of now, would be what it
    died of.
    """
    os.kill(pid, signal.SIGTERM)
    return collect(pid) == -signal.SIGTERM


def failing(number: int) -> Callable[..., Any]:
    """Make a call that fails with an errno."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# look ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["by pid", "by pidfd"])
def look(request: pytest.FixtureRequest) -> Callable[[int], int | None]:
    """Look at a child by its number, and through its pidfd."""

    def by_pidfd(pid: int) -> int | None:
        with pidfd_of(pid) as fd:
            return _kernel.look(pid, fd)

    return by_pidfd if request.param == "by pidfd" else _kernel.look


def test_running_child_has_no_status(look: Callable[[int], int | None], child: int) -> None:
    """A child that runs has no wait status."""
    assert look(child) is None


def test_look_consumes_nothing(look: Callable[[int], int | None], zombie: int) -> None:
    """A child that has ended can be looked at again and again, and stays a zombie for its owner."""
    assert [look(zombie) for _ in range(3)] == [7 << 8] * 3
    assert is_zombie(zombie)
    assert collect(zombie) == 7


def test_status_is_that_of_waitpid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits and every deadly signal look as they do to `waitpid`; exit(259) is 3 (D1, D2, D3)."""
    monkeypatch.chdir(tmp_path)  # for the cores
    harmless = {signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT}
    stopping = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    deadly = sorted(set(signal.valid_signals()) - harmless - stopping)
    blockable = set(deadly) - {signal.SIGKILL}
    expected = {exits_with(code): code for code in (0, 1, 2, 3, 64, 127, 128, 129, 254, 255)}
    expected[sh("exit 259")] = 3
    for number in deadly:
        # Python ignores SIGPIPE and SIGXFSZ, and children inherit that.
        pid = os.posix_spawn("/bin/sleep", ["sleep", "3600"], {}, setsigdef=blockable)
        os.kill(pid, number)
        expected[pid] = -number
    for pid, returncode in expected.items():
        await_death(pid)
        seen = _kernel.look(pid)
        taken = os.waitpid(pid, 0)[1]
        assert seen == taken
        assert anyreap.ExitStatus.from_wait_status(pid, taken).returncode == returncode


@pytest.mark.parametrize("limit", ["unlimited", "0"])
def test_core_dump_is_seen_beforehand(limit: str, tmp_path: Path) -> None:
    """A look tells whether a core was dumped, as the collection does afterwards (D4)."""
    pid = sh(f"cd {tmp_path} && ulimit -c {limit} && kill -ABRT $$")
    await_death(pid)
    seen = _kernel.look(pid)
    taken = os.waitpid(pid, 0)[1]
    assert seen == taken
    assert os.WTERMSIG(taken) == signal.SIGABRT
    if limit == "0" or not Path("/proc/sys/kernel/core_pattern").read_text().startswith("|"):
        assert os.WCOREDUMP(taken) is (limit != "0")


def test_stopped_child_has_not_ended(look: Callable[[int], int | None], child: int) -> None:
    """Stopping and continuing are no exits; nor do they hide the end that follows (D6, D7, D8)."""
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)
    assert look(child) is None
    assert _kernel.look_any() is None
    assert _kernel.take(child) is None
    os.kill(child, signal.SIGCONT)
    os.waitid(os.P_PID, child, os.WCONTINUED | os.WNOWAIT)
    assert look(child) is None
    assert _kernel.take(child) is None
    os.kill(child, signal.SIGKILL)
    await_death(child)
    assert look(child) == signal.SIGKILL


def a_grandchild() -> tuple[int, int]:
    """Start a shell with a child of its own: (the shell, its child)."""
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write, 1)]
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", "sleep 3600 >/dev/null & echo $!; wait"],
        os.environ,
        file_actions=actions,
    )
    os.close(write)
    with open(read, encoding="ascii") as lines:
        return pid, int(lines.readline())


def test_only_children_can_be_looked_at() -> None:
    """Own pid, init, a grandchild, a collected child and numbers that no pid has are no children
    (B7, B8).
    """
    pid, grandchild = a_grandchild()
    gone = exits_with(0)
    collect(gone)
    for number in (os.getpid(), 1, grandchild, gone, 2**22 + 1, 2**31 - 1, 2**31, 2**63, 2**100):
        with pytest.raises(ChildProcessError) as caught:
            _kernel.look(number)
        assert caught.value.errno == errno.ECHILD
    os.kill(grandchild, signal.SIGKILL)
    end(pid)


def test_collected_child_is_no_child_through_its_pidfd_either(zombie: int) -> None:
    """A pidfd outlives its child, but doesn't bring the status back to `waitid`."""
    with pidfd_of(zombie) as fd:
        collect(zombie)
        with pytest.raises(ChildProcessError):
            _kernel.look(zombie, fd)


def test_sandbox_that_came_after_the_probe(zombie: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `waitid` doesn't know pidfds after all (EINVAL), the pid is asked for instead (G6)."""
    real = os.waitid

    def waitid(kind: int, *args: Any) -> Any:
        if kind == _kernel._P_PIDFD:
            raise OSError(errno.EINVAL, "no pidfds here")
        return real(kind, *args)

    with pidfd_of(zombie) as fd:
        monkeypatch.setattr(os, "waitid", waitid)
        assert _kernel.look(zombie, fd) == 7 << 8


def test_other_trouble_is_raised(zombie: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An errno that is not understood is not taken for "still running" (N3)."""
    with pidfd_of(zombie) as fd:
        for number in (errno.EPERM, errno.EBADF):
            monkeypatch.setattr(os, "waitid", failing(number))
            with pytest.raises(OSError, match=os.strerror(number)):
                _kernel.look(zombie, fd)


# A child that is held by a tracer -----------------------------------------------------------------

TRACER = """
import ctypes, sys
PTRACE_SEIZE = 0x4206
assert ctypes.CDLL(None).ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None) == 0
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Have another process trace a child, and not care for it when it ends."""
    command = [sys.executable, "-I", "-S", "-c", TRACER, str(pid)]
    tracer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != b"held\n":
            pytest.skip("no ptrace here")
        yield


def test_traced_child_is_dead_and_can_not_be_collected(child: int) -> None:
    """A readable pidfd is no promise: as long as a tracer holds the child it looks as if it ran,
    and nothing blocks (D11).
    """
    with pidfd_of(child) as fd:
        with traced(child):
            os.kill(child, signal.SIGKILL)
            assert select.select([fd], [], [], 20)[0] == [fd]
            assert _kernel.look(child, fd) is None
            assert _kernel.look(child) is None
            assert _kernel.look_any() is None
            assert _kernel.take(child) is None
        await_death(child)
        assert _kernel.look(child, fd) == signal.SIGKILL
        assert _kernel.look_any() == (child, signal.SIGKILL)


# Children cloned with another exit signal ---------------------------------------------------------


def clone_that_exits(code: int) -> int:
    """Fork past Python's back, with exit signal 0: such a child raises no SIGCHLD."""
    number = {"x86_64": 56, "aarch64": 220}.get(platform.machine())
    if number is None:
        pytest.skip("the number of clone() is not known here")
    pid = ctypes.PyDLL(None).syscall(number, 0, 0, 0, 0, 0)  # PyDLL: nobody else may take the GIL
    if pid == 0:
        os._exit(code)
    return int(pid)


def test_child_without_an_exit_signal_is_seen_and_collected() -> None:
    """A child that was cloned with exit signal 0 is one of ours, although a plain `waitid` denies
    it (0.15).
    """
    pid = clone_that_exits(7)
    wall = 0x40000000
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | wall)
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    with pidfd_of(pid) as fd:
        assert _kernel.look(pid, fd) == 7 << 8
    assert _kernel.look(pid) == 7 << 8
    assert _kernel.look_any() == (pid, 7 << 8)
    taken = _kernel.take(pid)
    assert taken is not None
    assert taken[0] == 7 << 8


# look_any -----------------------------------------------------------------------------------------


def test_any_child_is_none_without_children() -> None:
    """With no children at all, none of them has ended."""
    assert _kernel.look_any() is None


def test_any_child_shows_the_same_zombie_until_it_is_collected(child: int) -> None:
    """The kernel shows one zombie, and hides all others behind it, until that one is collected."""
    first, second = exits_with(3), exits_with(4)
    await_death(first, second)
    found = {first: 3 << 8, second: 4 << 8}
    shown = _kernel.look_any()
    assert shown is not None
    assert shown in found.items()
    assert _kernel.look_any() == shown
    del found[shown[0]]
    collect(shown[0])
    assert _kernel.look_any() == found.popitem()
    collect(first + second - shown[0])
    assert _kernel.look_any() is None  # the one that runs


# take ---------------------------------------------------------------------------------------------


def test_running_child_is_not_taken(child: int) -> None:
    """A child that runs can't be collected, and asking doesn't block."""
    assert _kernel.take(child) is None
    assert was_not_killed(child)


def test_take_collects_once_and_brings_the_usage() -> None:
    """A child is collected with its own usage, and is not there the second time (D5)."""
    busy = sh("i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done")
    idle = exits_with(0)
    await_death(busy, idle)
    used = {}
    for pid in (busy, idle):
        taken = _kernel.take(pid)
        assert taken is not None
        assert taken[0] == 0
        used[pid] = taken[1].ru_utime + taken[1].ru_stime
        assert taken[1].ru_maxrss > 100  # KiB
        assert state_of(pid) == ""
        with pytest.raises(ChildProcessError):
            _kernel.take(pid)
    assert used[busy] > used[idle]


def test_take_takes_no_other_child(zombie: int) -> None:
    """Whoever is asked for, the zombie beside it stays (promise 3)."""
    running = sleeper()
    assert _kernel.take(running) is None
    end(running)
    with pytest.raises(ChildProcessError):
        _kernel.take(running)
    assert is_zombie(zombie)


# recall -------------------------------------------------------------------------------------------


@recalls
@pytest.mark.parametrize("script", ["exit 0", "exit 7", "exit 255", "kill -TERM $$", "kill -9 $$"])
def test_stolen_status_is_read_back(script: str) -> None:
    """The status of a child that somebody else has collected is the one that they got (E1)."""
    with Gate() as gate:
        pid = gate.add(script)
        with pidfd_of(pid) as fd:
            assert _kernel.recall(fd) == "later"  # it runs
            gate.open()
            await_death(pid)
            assert _kernel.recall(fd) == "later"  # nobody has collected it
            stolen = os.waitpid(pid, 0)[1]
            assert [_kernel.recall(fd) for _ in range(2)] == [stolen] * 2


@recalls
def test_stolen_core_dump_is_read_back(tmp_path: Path) -> None:
    """The core flag comes back with the stolen status."""
    pid = sh(f"cd {tmp_path} && ulimit -c unlimited && kill -ABRT $$")
    with pidfd_of(pid) as fd:
        stolen = os.waitpid(pid, 0)[1]
        assert _kernel.recall(fd) == stolen


@recalls
def test_status_that_the_kernel_discarded_is_read_back() -> None:
    """With SIGCHLD ignored the kernel collects children itself, and the pidfd still knows how they
    ended (F2).
    """
    found = sigaction()
    with Gate() as gate:
        pid = gate.add("exit 9")
        with pidfd_of(pid) as fd:
            set_sigaction(1, 0)
            try:
                gate.open()
                with pytest.raises(ChildProcessError):
                    os.waitpid(pid, 0)  # blocks until it is gone
                assert _kernel.recall(fd) == 9 << 8
            finally:
                set_sigaction(*found)


def test_without_a_pidfd_nothing_is_recalled() -> None:
    """A child that has no pidfd has no memory."""
    assert _kernel.recall(-1) == "unknown"


def test_older_kernel_recalls_nothing(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel doesn't know the question, the status is unknown: never 0 (promise 2)."""
    with pidfd_of(child) as fd:
        for number in (errno.ENOTTY, errno.ESRCH, errno.EINVAL, errno.EPERM):
            monkeypatch.setattr(fcntl, "ioctl", failing(number))
            assert _kernel.recall(fd) == "unknown"


# identify -----------------------------------------------------------------------------------------


@pytest.fixture(params=["inode", "start time"])
def identity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the inode of pidfds (Linux >= 6.9), and by start time, as on older kernels."""
    if request.param == "inode" and KERNEL < (6, 9):
        pytest.skip("pidfds have no inode of their own here")
    monkeypatch.setattr(_kernel, "_numbered", None if request.param == "inode" else False)
    return str(request.param)


def test_process_has_one_identity(identity: str, child: int) -> None:
    """A process is the same one each time, by number and by pidfd, alive and as a zombie."""
    with pidfd_of(child) as fd:
        seen = {_kernel.identify(child), _kernel.identify(child, fd), _kernel.identify(child)}
        os.kill(child, signal.SIGKILL)
        await_death(child)
        seen |= {_kernel.identify(child), _kernel.identify(child, fd)}
    assert len(seen) == 1
    assert None not in seen


@numbered
def test_two_processes_have_two_identities(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that were started in the same tick are told apart by the inode of their pidfds
    (promise 6).
    """
    monkeypatch.setattr(_kernel, "_numbered", None)
    others = [sleeper() for _ in range(20)]
    seen = {_kernel.identify(pid) for pid in (child, *others)}
    for pid in others:
        end(pid)
    assert len(seen) == 21


def test_start_time_is_that_of_the_process(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds the identity is field 22 of /proc/PID/stat: the start time."""
    monkeypatch.setattr(_kernel, "_usable", False)
    monkeypatch.setattr(_kernel, "_numbered", None)
    line = Path(f"/proc/{child}/stat").read_text()
    assert _kernel.identify(child) == int(line.split()[21])


@pytest.mark.parametrize("usable", [True, False])
def test_nobody_has_no_identity(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that no process has names nobody, and neither does that of a thread."""
    monkeypatch.setattr(_kernel, "_usable", usable)
    gone = exits_with(0)
    collect(gone)
    assert _kernel.identify(gone) is None
    if usable:
        with a_thread() as tid:
            assert _kernel.identify(tid) is None


def test_identity_without_descriptors(child: int) -> None:
    """Out of descriptors there is no identity: it is not mixed up with one of the other kind."""
    with pidfd_of(child) as fd:
        known = _kernel.identify(child, fd)
        with no_descriptors():
            assert _kernel.identify(child) is None
            assert _kernel.identify(child, fd) in (known, None)


@contextlib.contextmanager
def a_thread() -> Iterator[int]:
    """A thread; its id is from the same numbers as pids are."""
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        yield thread.native_id
    finally:
        leave.set()
        thread.join(20)


RECYCLE = """
    import time
    from pathlib import Path
    from anyreap import _kernel

    def recycle(pid):
        "Start a sleeper with a number that was somebody else's."
        for _ in range(100):
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            got = sleeper()
            if got == pid:
                return
            end(got)
        raise SystemExit(77)

    def was_not_killed(pid):
        os.kill(pid, signal.SIGTERM)
        return collect(pid) == -signal.SIGTERM
"""


def test_recycled_pid_is_another_process() -> None:
    """A process that got the number of a collected one has another identity, and none of its
    signals (K2, K5).
    """
    if not can_unshare():
        pytest.skip("no pid namespace can be made here")
    run_alone(
        RECYCLE
        + """
    for usable, numbered in ((True, None), (True, False), (False, False)):
        _kernel._usable, _kernel._numbered = usable, numbered
        old = sleeper()
        fd = os.pidfd_open(old)
        identity = _kernel.identify(old)
        by_fd = _kernel.identify(old, fd)
        assert identity is not None
        tick = time.clock_gettime(time.CLOCK_BOOTTIME) + 0.02
        end(old)
        while time.clock_gettime(time.CLOCK_BOOTTIME) < tick:
            pass  # a start time is in ticks of 10 ms; no pid comes round in one but here
        recycle(old)
        assert _kernel.identify(old) not in (identity, None), (usable, numbered)
        if numbered is None:
            assert _kernel.identify(old, fd) == by_fd == identity  # still the old one's
        assert _kernel.send(old, fd, identity, signal.SIGKILL) is False
        assert _kernel.send(old, fd, None, signal.SIGKILL) is False
        assert _kernel.send(old, -1, identity, signal.SIGKILL) is False
        try:
            _kernel.look(old, fd)
        except ChildProcessError:
            pass
        else:
            raise AssertionError("the old pidfd shows the new child")
        assert was_not_killed(old), (usable, numbered)
        os.close(fd)
    """,
        wrapper=NAMESPACE,
    )


# send ---------------------------------------------------------------------------------------------

WAYS = ["by pidfd", "by transient pidfd", "by number"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Through the pidfd of the child, through one that is opened for it, and by number where there
    are none.
    """
    if request.param == "by number":
        monkeypatch.setattr(_kernel, "_usable", False)
        monkeypatch.setattr(_kernel, "_numbered", None)
    return str(request.param)


@pytest.fixture
def addressee(way: str) -> Iterator[tuple[int, int, int | None]]:
    """A running child: (pid, pidfd, identity)."""
    pid = sleeper()
    fd = os.pidfd_open(pid) if way == "by pidfd" else -1
    yield pid, fd, _kernel.identify(pid)
    if fd >= 0:
        os.close(fd)
    end(pid)


def test_signal_arrives(addressee: tuple[int, int, int | None]) -> None:
    """A child that runs gets the signal that is sent to it."""
    assert _kernel.send(*addressee, signal.SIGUSR1) is True
    assert collect(addressee[0]) == -signal.SIGUSR1


def test_signal_arrives_without_an_identity(addressee: tuple[int, int, int | None]) -> None:
    """Where no identity could be had (no /proc), a running child of ours still gets its signals."""
    pid, fd, _ = addressee
    assert _kernel.send(pid, fd, None, signal.SIGUSR1) is True
    assert collect(pid) == -signal.SIGUSR1


def test_collected_child_gets_no_signal(addressee: tuple[int, int, int | None]) -> None:
    """To a child that was collected nothing is sent, and that is no error (K1)."""
    end(addressee[0])
    assert _kernel.send(*addressee, signal.SIGKILL) is False
    assert _kernel.send(addressee[0], addressee[1], None, signal.SIGKILL) is False


def test_zombie_may_be_signalled(addressee: tuple[int, int, int | None]) -> None:
    """A signal to a zombie is no error, and doesn't change how it ended."""
    os.kill(addressee[0], signal.SIGTERM)
    await_death(addressee[0])
    _kernel.send(*addressee, signal.SIGKILL)
    assert collect(addressee[0]) == -signal.SIGTERM


@pytest.mark.parametrize("way", WAYS[1:], indirect=True)
def test_wrong_identity_gets_no_signal(addressee: tuple[int, int, int | None]) -> None:
    """If the process that has the number is not the one that was handed in, nothing is sent
    (promise 6).
    """
    pid, fd, identity = addressee
    assert identity is not None
    assert _kernel.send(pid, fd, identity + 1, signal.SIGKILL) is False
    assert was_not_killed(pid)


@pytest.mark.parametrize("usable", [True, False])
def test_no_identity_no_signal_but_to_a_child(
    usable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a number with no identity this much is known: it must be an unreaped child of ours."""
    monkeypatch.setattr(_kernel, "_usable", usable)
    pid, grandchild = a_grandchild()
    for number in (grandchild, os.getpid(), 1):
        assert _kernel.send(number, -1, None, signal.SIGKILL) is False
    assert state_of(grandchild) in "SR"
    os.kill(grandchild, signal.SIGKILL)
    end(pid)


@pytest.mark.parametrize("usable", [True, False])
def test_number_that_is_a_thread_now_gets_no_signal(
    usable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of a stolen child may become that of a thread: then the child has ended, and that
    is no error.
    """
    # BUG: send() takes only ESRCH of pidfd_open for "ended"; a thread's number is EINVAL, or ENOENT
    # since Linux 6.9.
    monkeypatch.setattr(_kernel, "_usable", usable)
    with a_thread() as tid:
        assert _kernel.send(tid, -1, 1234, signal.SIGUSR1) is False
        assert _kernel.send(tid, -1, None, signal.SIGUSR1) is False


def test_signal_that_does_not_exist_is_an_error(addressee: tuple[int, int, int | None]) -> None:
    """A number that is no signal is refused by the kernel, and the child lives."""
    with pytest.raises(OSError, match="Invalid argument"):
        _kernel.send(*addressee, 1000)
    assert was_not_killed(addressee[0])


@pytest.mark.parametrize("way", WAYS[1:2], indirect=True)
def test_signal_that_can_not_be_sent_for_lack_of_descriptors(
    addressee: tuple[int, int, int | None],
) -> None:
    """Where no descriptor can be had to send safely, it is an error: an unsent signal must not pass
    for a sent one.
    """
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        _kernel.send(*addressee, signal.SIGKILL)
    assert was_not_killed(addressee[0])


def test_permission_is_an_error() -> None:
    """A child that we may not signal is there all the same: EPERM is raised, and it can be
    collected (K9).
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not")
    run_alone(
        """
    from anyreap import _kernel
    pid = sleeper()
    fd = os.pidfd_open(pid)
    os.setresuid(65534, 65534, 0)
    for usable in (True, False):
        _kernel._usable = usable
        for pidfd, identity in ((fd, None), (-1, _kernel.identify(pid)), (-1, None)):
            try:
                _kernel.send(pid, pidfd, identity, signal.SIGKILL)
            except PermissionError:
                pass
            else:
                raise AssertionError((usable, pidfd, identity))
    os.setresuid(0, 0, 0)
    os.kill(pid, signal.SIGTERM)
    await_death(pid)
    assert _kernel.take(pid)[0] == signal.SIGTERM
    """
    )


def test_sending_leaves_no_descriptor(child: int) -> None:
    """The pidfd that is opened for one signal is closed again, whatever comes of it."""
    before = set(open_fds())
    identity = _kernel.identify(child)
    assert identity is not None
    _kernel.send(child, -1, identity, 0)
    _kernel.send(child, -1, identity + 1, 0)
    _kernel.send(1, -1, None, 0)
    with contextlib.suppress(OSError):
        _kernel.send(child, -1, identity, 1000)
    assert set(open_fds()) == before


# open_pidfd ---------------------------------------------------------------------------------------


def test_pidfd_is_not_inherited(child: int) -> None:
    """A pidfd is close-on-exec (promise 4), and becomes readable when its process ends."""
    with pidfd_of(child) as fd:
        assert not os.get_inheritable(fd)
        assert select.select([fd], [], [], 0)[0] == []
        os.kill(child, signal.SIGKILL)
        assert select.select([fd], [], [], 20)[0] == [fd]


def test_child_without_a_pidfd_is_no_error(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pidfd that can't be had does not cost the child that already runs (B14, G5)."""
    assert _kernel.pidfds_usable()
    out_of_something = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV)
    for number in (*out_of_something, errno.ENOSYS, errno.EPERM):
        monkeypatch.setattr(os, "pidfd_open", failing(number))
        assert _kernel.open_pidfd(child) == -1


def test_no_descriptors_left_is_no_error(child: int) -> None:
    """The same with a true EMFILE."""
    with no_descriptors():
        assert _kernel.open_pidfd(child) == -1


def test_process_that_is_not_there(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel says of a number that names no process, it is a `ProcessLookupError`."""
    assert _kernel.pidfds_usable()
    for number in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
        monkeypatch.setattr(os, "pidfd_open", failing(number))
        with pytest.raises(ProcessLookupError) as caught:
            _kernel.open_pidfd(child)
        assert caught.value.errno == errno.ESRCH


def test_number_of_nobody_has_no_pidfd() -> None:
    """The same with true numbers: a collected child, and a thread."""
    gone = exits_with(0)
    collect(gone)
    with pytest.raises(ProcessLookupError):
        _kernel.open_pidfd(gone)
    with a_thread() as tid, pytest.raises(ProcessLookupError):
        _kernel.open_pidfd(tid)


def test_nobody_asks_where_there_are_none(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the probe has failed, no pidfd is asked for any more, and the start time is the
    identity.
    """
    monkeypatch.setattr(_kernel, "_usable", False)
    monkeypatch.setattr(os, "pidfd_open", lambda *_: pytest.fail("asked"))
    assert _kernel.open_pidfd(child) == -1
    assert _kernel.identify(child) == _kernel.start_time(child)


# The probe ----------------------------------------------------------------------------------------


def test_pidfds_are_usable_here() -> None:
    """The kernel that runs these tests has pidfds, and the probe finds them."""
    assert _kernel._probe() is True


def test_probe_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked once, and the answer remembered."""
    asked: list[int] = []
    monkeypatch.setattr(_kernel, "_usable", None)

    def probe() -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr(_kernel, "_probe", probe)
    assert [_kernel.pidfds_usable() for _ in range(3)] == [False] * 3
    assert asked == [1]


def test_probe_without_descriptors_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """That no descriptor could be had for the probe says nothing of the kernel, and is not
    remembered (G5).
    """
    monkeypatch.setattr(_kernel, "_usable", None)
    with no_descriptors():
        _kernel.pidfds_usable()
    assert _kernel.pidfds_usable()


def test_probe_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without pidfds (ENOSYS), a sandbox that denies them (EPERM): there are none (G6)."""
    for number in (errno.ENOSYS, errno.EPERM):
        monkeypatch.setattr(os, "pidfd_open", failing(number))
        assert _kernel._probe() is False


def test_probe_finds_pidfds_that_can_not_be_waited_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 5.3 opens pidfds, and `waitid` doesn't know them (EINVAL): as good as none, and none is
    leaked (G6).
    """
    before = set(open_fds())
    for number in (errno.EINVAL, errno.ENOSYS):
        monkeypatch.setattr(os, "waitid", failing(number))
        assert _kernel._probe() is False
    assert set(open_fds()) == before


def test_probe_asks_nothing_on_android(monkeypatch: pytest.MonkeyPatch) -> None:
    """Android up to 11 kills a process that asks for a pidfd, so nobody asks there."""
    monkeypatch.setattr(sys, "getandroidapilevel", lambda: 30, raising=False)
    monkeypatch.setattr(os, "pidfd_open", lambda *_: pytest.fail("asked"))
    assert _kernel._probe() is False


def test_probe_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that was built without `os.pidfd_open` has none."""
    monkeypatch.delattr(os, "pidfd_open")
    assert _kernel._probe() is False


# Decoding -----------------------------------------------------------------------------------------


def test_decoding_of_what_waitid_says() -> None:
    """Exits, kills and core dumps become wait statuses; stops, traps and the unheard-of are no end
    (D8).
    """
    for code, status, raw in (
        (os.CLD_EXITED, 0, 0),
        (os.CLD_EXITED, 7, 7 << 8),
        (os.CLD_EXITED, 255, 255 << 8),
        (os.CLD_EXITED, 259, 3 << 8),  # some kernels hand on more than eight bits
        (os.CLD_KILLED, 9, 9),
        (os.CLD_KILLED, 64, 64),
        (os.CLD_DUMPED, 11, 11 | 0x80),
        (os.CLD_STOPPED, 19, None),
        (os.CLD_TRAPPED, 5, None),
        (os.CLD_CONTINUED, 18, None),
        (99, 1, None),
    ):
        found = os.waitid_result((5, 0, signal.SIGCHLD, status, code))
        assert _kernel._raw(found) == raw, (code, status)
        if raw is not None:
            decoded = anyreap.ExitStatus.from_wait_status(5, raw)
            assert decoded.core_dumped is (code == os.CLD_DUMPED)
            assert (decoded.signal is None) is (code == os.CLD_EXITED)


def test_decoding_of_nothing() -> None:
    """Neither None nor a result about nobody is an end."""
    assert _kernel._raw(None) is None
    assert _kernel._raw(os.waitid_result((0, 0, 0, 0, 0))) is None
    assert _kernel._raw(os.waitid_result((0, 0, 0, 0, os.CLD_EXITED))) is None


# /proc --------------------------------------------------------------------------------------------


def test_name_of_a_process_does_not_move_its_fields(tmp_path: Path) -> None:
    """The command in /proc/PID/stat may hold any byte: the fields after it are found."""
    mine = _kernel.start_time(os.getpid())
    assert mine is not None
    for name in (") (", ") R 1 (", "a b\tc", "x\ny) Z", "(((", "\u00e4\udcff"):
        program = tmp_path / name
        program.symlink_to("/bin/sleep")
        pid = os.posix_spawn(program, ["sleep", "3600"], os.environ)
        try:
            # posix_spawn returns when the exec can't fail any more, which is just before the name
            # changes.
            expected, give_up = os.fsencode(name) + b"\n", time.monotonic() + 20
            while Path(f"/proc/{pid}/comm").read_bytes() != expected:
                assert time.monotonic() < give_up
                os.sched_yield()
            fields = _kernel.stat_fields(pid)
            found = _kernel.start_time(pid)
        finally:
            end(pid)
        assert fields[0] in "RSD"
        assert fields[1] == str(os.getpid())
        assert len(fields) >= 50
        assert found is not None
        assert found >= mine


def test_zombie_has_its_state(zombie: int) -> None:
    """A zombie still has its line in /proc, with the state first."""
    assert _kernel.stat_fields(zombie)[0] == "Z"


def test_nobody_has_no_fields() -> None:
    """A process that is not there has no fields, and no start time."""
    gone = exits_with(0)
    collect(gone)
    assert _kernel.stat_fields(gone) == []
    assert _kernel.start_time(gone) is None


def test_signal_sets_of_this_process() -> None:
    """What is blocked, caught and ignored is read from the kernel, for each signal."""
    assert not _kernel.signal_set("SigBlk", signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        assert _kernel.signal_set("SigBlk", signal.SIGUSR2)
        assert not _kernel.signal_set("SigBlk", signal.SIGUSR1)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    assert _kernel.signal_set("SigCgt", signal.SIGINT)
    assert not _kernel.signal_set("SigCgt", signal.SIGKILL)
    assert not _kernel.signal_set("SigNothing", signal.SIGINT)


def test_signal_sets_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc no signal is in any set."""
    monkeypatch.setattr(builtins, "open", failing(errno.ENOENT))
    caught = _kernel.signal_set("SigCgt", signal.SIGINT)
    fields = _kernel.stat_fields(os.getpid())
    monkeypatch.undo()
    assert caught is False
    assert fields == []


def test_ignored_sigchld_is_said() -> None:
    """SIGCHLD that is ignored is noticed, also when C code did it past Python's back; the default
    is no reason (F1).
    """
    found = sigaction()
    assert _kernel.ignored_statuses() == ""
    set_sigaction(1, 0)
    try:
        assert "ignored" in _kernel.ignored_statuses()
    finally:
        set_sigaction(*found)
    before = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert "ignored" in _kernel.ignored_statuses()
    finally:
        signal.signal(signal.SIGCHLD, before)
        set_sigaction(*found)
    assert _kernel.ignored_statuses() == ""


def test_budget_is_half_of_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pidfds take half of the soft limit on descriptors at most, as it is now, and all there is if
    there is none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (257, hard))
    try:
        assert _kernel.fd_budget() == 128
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert _kernel.fd_budget() == sys.maxsize


def test_this_python_can_peek() -> None:
    """Where these tests run, a status can be looked at before it is taken."""
    assert _kernel.waits_can_peek()


# lowlevel -----------------------------------------------------------------------------------------


def test_peek_and_reap(child: int) -> None:
    """`peek` tells how a child ended and consumes nothing; `reap` collects it, with its usage,
    once.
    """
    assert lowlevel.peek(child) is None
    assert lowlevel.reap(child) is None
    os.kill(child, signal.SIGKILL)
    await_death(child)
    for _ in range(2):
        status = lowlevel.peek(child)
        assert status is not None
        assert (status.pid, status.signal, status.usage) == (child, signal.SIGKILL, None)
    status = lowlevel.reap(child)
    assert status is not None
    assert (status.pid, status.signal) == (child, signal.SIGKILL)
    assert status.usage is not None
    for call in (lowlevel.peek, lowlevel.reap):
        with pytest.raises(NotAChild) as caught:
            call(child)
        assert caught.value.pid == child


def test_peek_at_any_child(child: int) -> None:
    """`peek(None)` is about any child, and None if no child has ended."""
    assert lowlevel.peek(None) is None
    pid = exits_with(3)
    await_death(pid)
    status = lowlevel.peek(None)
    assert status is not None
    assert (status.pid, status.exit_code) == (pid, 3)
    assert is_zombie(pid)
    collect(pid)
    assert lowlevel.peek(None) is None


@pytest.mark.parametrize("call", [lowlevel.peek, lowlevel.reap])
def test_parts_refuse_what_is_no_pid(call: Callable[[Any], Any], zombie: int) -> None:
    """0 and negative numbers would mean "any child": they are refused, and collect nothing (B7)."""
    for number in (0, -1, -zombie):
        with pytest.raises(ValueError, match="above 0"):
            call(number)
    for thing in (True, False, "5", 5.0, b"5"):
        with pytest.raises(TypeError):
            call(thing)
    assert is_zombie(zombie)


def test_reap_takes_no_none(zombie: int) -> None:
    """There is no collecting of just any child."""
    with pytest.raises(TypeError):
        lowlevel.reap(None)  # type: ignore[arg-type]
    assert is_zombie(zombie)


@pytest.mark.parametrize("call", [lowlevel.peek, lowlevel.reap])
def test_parts_know_no_strangers(call: Callable[[Any], Any]) -> None:
    """Init, and numbers too large for a pid, are no children of this process (B7, B8)."""
    for number in (1, 2**22 + 1, 2**31, 2**64):
        with pytest.raises(NotAChild):
            call(number)


# The registry over it -----------------------------------------------------------------------------


def test_child_is_not_lost_for_lack_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `watch` at a moment when no descriptor can be had finds the same running child
    (promise 2, G5).
    """

    async def main() -> None:
        async with anyreap.open_reaper(source="sigchld") as reaper:
            monkeypatch.setattr(_kernel, "fd_budget", lambda: 0)
            pid = sleeper()
            child = reaper.watch(pid)
            with no_descriptors():
                again = reaper.watch(pid)
            os.kill(pid, signal.SIGTERM)
            with anyio.fail_after(20):
                assert (await again.wait()).signal == signal.SIGTERM
                assert (await child.wait()).signal == signal.SIGTERM
            assert again is child

    anyio.run(main, backend=HOSTS[0].backend)
