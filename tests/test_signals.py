"""SIGCHLD: what is installed and put back, who else still hears signals, and what others do to ours."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import inspect
import logging
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from types import FrameType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest

import anyreap
from anyreap import _sigchld, lowlevel
from tests.harness import (
    ASYNCIO,
    HOSTS,
    SA_NOCLDWAIT,
    SA_RESTART,
    TRIO,
    UVLOOP,
    Gate,
    Host,
    await_death,
    children,
    collect,
    end,
    exits_with,
    look,
    open_fds,
    run_alone,
    said,
    set_sigaction,
    sigaction,
    sleeper,
    until,
    wakeup_fd,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.anyio

CHLD = signal.SIGCHLD

SELF_PIPE = tuple(host for host in HOSTS if host.source == "sigchld")
AUTO = (Host(*TRIO, "auto"), Host(*ASYNCIO, "auto"), Host(*UVLOOP, "auto"))

on_the_self_pipe = pytest.mark.parametrize("host", SELF_PIPE, ids=str)
on_auto = pytest.mark.parametrize("host", AUTO, ids=str)
on_asyncio = pytest.mark.parametrize("host", [host for host in HOSTS if host.backend == "asyncio"], ids=str)
on_plain_asyncio = pytest.mark.parametrize("host", [host for host in SELF_PIPE if host.backend == "asyncio"], ids=str)
on_trio = pytest.mark.parametrize("host", [host for host in HOSTS if host.backend == "trio"], ids=str)
on_trios_self_pipe = pytest.mark.parametrize("host", [host for host in SELF_PIPE if host.backend == "trio"], ids=str)

# A heartbeat that can't be what found an exit, and one that is there to find it.
NEVER = 3600.0
SOON = 0.1

# How long anything may take at most: only a hang takes it.
BOUND = 15.0

# Linux keeps the status of a stolen child in its pidfd.
REMEMBERS = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2]) >= (6, 15)


# Helpers. Those in FOR_SCRIPTS are there in the processes of their own, too.


def in_epoll(tid: int) -> bool:
    """Whether a thread of this process sleeps in epoll_wait."""
    with open(f"/proc/self/task/{tid}/syscall") as file:
        called = file.read().split()[0]
    # epoll_wait, epoll_pwait and epoll_pwait2 of x86-64, then epoll_pwait of the newer machines
    return called in {"232", "281", "441", "22"}


def in_read_of(tid: int, fd: int) -> bool:
    """Whether a thread of this process sleeps in read(fd)."""
    with open(f"/proc/self/task/{tid}/syscall") as file:
        called = file.read().split()
    return called[0] in {"0", "63"} and int(called[1], 16) == fd


class Worker:
    """A thread that acts once the loop of another one sleeps, and lives on until it is stopped."""

    def __init__(self, act: Callable[[], object], prepare: Callable[[], int] | None = None) -> None:
        self.loop_thread = threading.get_native_id()
        self.ready = threading.Event()
        self.over = threading.Event()
        self.value = 0
        self.thread = threading.Thread(target=self.work, args=(act, prepare))
        self.thread.start()
        assert self.ready.wait(30)

    def work(self, act: Callable[[], object], prepare: Callable[[], int] | None) -> None:
        """Prepare, wait for the loop to sleep, act, stay."""
        if prepare is not None:
            self.value = prepare()
        self.ready.set()
        while not in_epoll(self.loop_thread) and not self.over.is_set():
            time.sleep(0.001)
        act()
        self.over.wait(60)

    def __enter__(self) -> int:
        return self.value

    def __exit__(self, *exc_info: object) -> None:
        self.over.set()
        self.thread.join()


def child_of_a_worker(gate: Gate, code: int = 7) -> Worker:
    """A child forked by a thread that lives on; it exits when the loop of this thread sleeps.

    The kernel delivers SIGCHLD to the thread that forked. So nothing interrupts the loop's sleep.
    """
    return Worker(gate.open, lambda: gate.add(f"exit {code}"))


def blocked_set(pid: int) -> int:
    """The signals that a process blocks (its first thread), as /proc has them."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("SigBlk"))


FOR_SCRIPTS = "import contextlib, ctypes, fcntl, time\nfrom collections.abc import Callable\n" + "\n".join(
    inspect.getsource(part) for part in (in_epoll, in_read_of, Worker, child_of_a_worker, blocked_set)
)


def alone(
    script: str,
    host: Host | None = None,
    *,
    wrapper: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the helpers of this file; it must be silent."""
    done = run_alone(FOR_SCRIPTS + textwrap.dedent(script), host, wrapper=wrapper)
    assert said(done.stderr) == ""
    return done


def in_a_real_run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test as a program would.

    anyio's plugin runs trio as a guest, whose epoll waits in another thread. Here it has to be this
    one that sleeps in it.
    """

    def run(host: Host, **fixtures: Any) -> None:
        if "host" in signature.parameters:
            fixtures["host"] = host
        anyio.run(functools.partial(test, **fixtures), backend=host.backend, backend_options=host.options)

    signature = inspect.signature(test)
    needed = dict(signature.parameters)
    needed.setdefault("host", inspect.Parameter("host", inspect.Parameter.KEYWORD_ONLY))
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[each.replace(kind=each.KEYWORD_ONLY) for each in needed.values()]
    )
    return run


@contextlib.contextmanager
def sigchld_found() -> Iterator[None]:
    """Put SIGCHLD's handler back after a test, as Python has it and as the kernel has it."""
    handler, action = signal.getsignal(CHLD), sigaction()
    try:
        yield
    finally:
        signal.signal(CHLD, handler)
        set_sigaction(*action)


@contextlib.contextmanager
def wakeup_fd_found() -> Iterator[None]:
    """Put the wakeup fd back after a test. Not under trio: looking at its own flips a flag."""
    found = wakeup_fd()
    try:
        yield
    finally:
        signal.set_wakeup_fd(found)


@contextlib.contextmanager
def sigchld_blocked() -> Iterator[None]:
    """Block SIGCHLD in this thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [CHLD])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def one_warning(match: str) -> Iterator[None]:
    """Exactly one warning of ours is shown within."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    texts = [str(each.message) for each in seen if each.category is RuntimeWarning]
    assert len(texts) == 1, texts
    assert match in texts[0]


@contextlib.contextmanager
def foreign_pipe() -> Iterator[lowlevel.SelfPipe]:
    """A pipe of somebody else's, for use as a wakeup fd."""
    with lowlevel.SelfPipe() as pipe:
        yield pipe


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread of its own, and return its result or raise its exception."""
    result: list[Any] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(function())
        except BaseException as exc:  # noqa: BLE001  (it is raised where it is wanted)
            error.append(exc)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


def readable(pipe: lowlevel.SelfPipe, within: float = 0) -> bool:
    """Whether a pipe is readable."""
    return bool(select.select([pipe], [], [], within)[0])


# lowlevel.SelfPipe ----------------------------------------------------------------------------


def test_self_pipe_is_non_blocking_and_close_on_exec() -> None:
    """Both ends of a SelfPipe are non-blocking and close-on-exec (field bug 68)."""
    with lowlevel.SelfPipe() as pipe:
        for fd in (pipe.fileno(), pipe.write_fileno()):
            assert not os.get_blocking(fd)
            assert not os.get_inheritable(fd)


def test_self_pipe_is_readable_from_wake_to_drain() -> None:
    """`wake` makes a SelfPipe readable, `drain` returns the number of bytes and empties it."""
    with lowlevel.SelfPipe() as pipe:
        assert not readable(pipe)
        assert pipe.drain() == 0
        pipe.wake()
        pipe.wake()
        assert readable(pipe)
        assert pipe.drain() == 2
        assert not readable(pipe)


def test_self_pipe_drains_more_than_one_read() -> None:
    """`drain` empties a pipe that holds more than one read returns."""
    with lowlevel.SelfPipe() as pipe:
        size = fcntl.fcntl(pipe.write_fileno(), fcntl.F_SETPIPE_SZ, 1 << 18)
        assert os.write(pipe.write_fileno(), bytes(size)) == size
        assert pipe.drain() == size
        assert not readable(pipe)


def test_full_self_pipe_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """`wake` on a full pipe neither blocks, raises nor prints, and it stays readable (field bug 7)."""
    with lowlevel.SelfPipe() as pipe:
        size = fcntl.fcntl(pipe.write_fileno(), fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(size + 100):
            pipe.wake()
        assert readable(pipe)
        assert pipe.drain() == size
    assert capfd.readouterr() == ("", "")


def test_closed_self_pipe_is_silent(tmp_path: Path) -> None:
    """A closed SelfPipe writes to no one who was given its number since (field bug 43)."""
    pipe = lowlevel.SelfPipe()
    numbers = (pipe.fileno(), pipe.write_fileno())
    pipe.close()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    reused = [os.dup2(file, number) for number in numbers]
    try:
        assert (pipe.fileno(), pipe.write_fileno()) == (-1, -1)
        pipe.wake()
        pipe.close()
        assert os.fstat(file).st_size == 0
    finally:
        for fd in {file, *reused}:
            os.close(fd)


def test_self_pipe_that_somebody_closed() -> None:
    """A SelfPipe whose ends somebody else has closed wakes nobody, and closes, without a word."""
    pipe = lowlevel.SelfPipe()
    os.close(pipe.fileno())
    os.close(pipe.write_fileno())
    pipe.wake()
    pipe.close()


def test_self_pipe_without_descriptors() -> None:
    """A SelfPipe that can't be made is an OSError and leaks nothing (G4)."""
    before = open_fds()
    with spare_descriptors(1), pytest.raises(OSError, match="Too many open files"):
        lowlevel.SelfPipe()
    assert open_fds() == before


# lowlevel.install_handler and is_default_handler ------------------------------------------------


def test_install_handler_writes_a_byte_at_a_childs_end() -> None:
    """While installed a child's end writes to the fd, with SA_RESTART; -1 puts all back (F12)."""
    before = look()
    assert lowlevel.is_default_handler()
    with lowlevel.SelfPipe() as pipe:
        assert lowlevel.install_handler(pipe.write_fileno()) == -1
        try:
            assert not lowlevel.is_default_handler()
            assert sigaction()[1] & SA_RESTART
            pid = exits_with(3)
            assert readable(pipe, BOUND)
            assert pipe.drain() == 1
            assert collect(pid) == 3
        finally:
            assert lowlevel.install_handler(-1) == pipe.write_fileno()
        assert lowlevel.is_default_handler()
        collect(exits_with(0))
        assert not readable(pipe)
    assert look() == before


def test_install_handler_returns_the_previous_fd() -> None:
    """Each call returns the fd before it; -1 puts back the one found at first (field bug 10)."""
    with wakeup_fd_found(), foreign_pipe() as theirs, foreign_pipe() as one, foreign_pipe() as two:
        signal.set_wakeup_fd(theirs.write_fileno())
        assert lowlevel.install_handler(one.write_fileno()) == theirs.write_fileno()
        assert lowlevel.install_handler(two.write_fileno()) == one.write_fileno()
        signal.raise_signal(CHLD)
        assert (theirs.drain(), one.drain(), two.drain()) == (0, 0, 1)
        assert lowlevel.install_handler(-1) == two.write_fileno()
        assert wakeup_fd() == theirs.write_fileno()
        assert lowlevel.is_default_handler()


def test_uninstalling_nothing_touches_nothing() -> None:
    """-1 where nothing of ours is installed returns the foreign fd, and leaves it (field bug 10)."""
    assert lowlevel.install_handler(-1) == -1
    with sigchld_found(), wakeup_fd_found(), foreign_pipe() as theirs:
        signal.signal(CHLD, _nothing)
        signal.set_wakeup_fd(theirs.write_fileno())
        assert lowlevel.install_handler(-1) == theirs.write_fileno()
        assert wakeup_fd() == theirs.write_fileno()
        assert signal.getsignal(CHLD) is _nothing


@pytest.mark.parametrize("kind", ["closed", "blocking", "negative"])
def test_install_handler_with_an_invalid_fd(kind: str) -> None:
    """An fd that can't be written to from a handler is an error, and nothing was installed."""
    with wakeup_fd_found(), foreign_pipe() as theirs:
        read, write = os.pipe()
        try:
            signal.set_wakeup_fd(theirs.write_fileno())
            before = look()
            with pytest.raises((ValueError, OSError)):
                lowlevel.install_handler({"closed": 9999, "blocking": write, "negative": -2}[kind])
            assert look() == before
            assert before.wakeup == theirs.write_fileno()
            assert lowlevel.install_handler(-1) == theirs.write_fileno()
        finally:
            os.close(read)
            os.close(write)


def test_install_handler_in_another_thread() -> None:
    """In another thread `install_handler` is a ValueError, and nothing was installed."""
    before = look()
    with lowlevel.SelfPipe() as pipe, pytest.raises(ValueError, match="main thread"):
        in_a_thread(functools.partial(lowlevel.install_handler, pipe.write_fileno()))
    assert look() == before


def test_install_handler_calls_the_handler_that_it_found() -> None:
    """A Python handler that was there is called with (signum, frame), and put back (F10)."""
    calls: list[tuple[int, FrameType | None]] = []

    def theirs(signum: int, frame: FrameType | None) -> None:
        calls.append((signum, frame))

    with sigchld_found(), lowlevel.SelfPipe() as pipe:
        signal.signal(CHLD, theirs)
        lowlevel.install_handler(pipe.write_fileno())
        signal.raise_signal(CHLD)
        lowlevel.install_handler(-1)
        assert signal.getsignal(CHLD) is theirs
    assert len(calls) == 1
    assert calls[0][0] == CHLD
    assert isinstance(calls[0][1], FrameType)


def test_install_handler_leaves_what_was_changed_since() -> None:
    """-1 leaves a handler and a wakeup fd that somebody has set since to them (field bug 11)."""
    with (
        sigchld_found(),
        wakeup_fd_found(),
        lowlevel.SelfPipe() as pipe,
        foreign_pipe() as theirs,
    ):
        lowlevel.install_handler(pipe.write_fileno())
        signal.signal(CHLD, _nothing)
        signal.set_wakeup_fd(theirs.write_fileno())
        assert lowlevel.install_handler(-1) == theirs.write_fileno()
        assert signal.getsignal(CHLD) is _nothing
        assert wakeup_fd() == theirs.write_fileno()


def test_install_handler_found_an_fd_that_is_closed_meanwhile() -> None:
    """-1 where the wakeup fd that was found has been closed by its owner: none is set, and the handler
    is put back all the same (field bug 42).
    """
    with sigchld_found(), wakeup_fd_found(), lowlevel.SelfPipe() as pipe:
        with foreign_pipe() as theirs:
            signal.set_wakeup_fd(theirs.write_fileno())
            lowlevel.install_handler(pipe.write_fileno())
        try:
            assert lowlevel.install_handler(-1) == pipe.write_fileno()
        finally:
            left, handler = wakeup_fd(), signal.getsignal(CHLD)
            with contextlib.suppress(OSError):
                lowlevel.install_handler(-1)
        assert (left, handler) == (-1, signal.SIG_DFL)


def test_install_handler_puts_the_flags_back() -> None:
    """-1 puts back the flags that `signal.signal` clears, SA_NOCLDWAIT among them (F3, F12)."""
    with sigchld_found():
        set_sigaction(0, SA_NOCLDWAIT | SA_RESTART)
        with lowlevel.SelfPipe() as pipe:
            lowlevel.install_handler(pipe.write_fileno())
            assert not sigaction()[1] & SA_NOCLDWAIT
            lowlevel.install_handler(-1)
        assert sigaction() == (0, SA_NOCLDWAIT | SA_RESTART)


def test_installed_fd_is_silent_when_full(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed fd that is full floods nobody's stderr (G1, field bug 7)."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with lowlevel.SelfPipe() as pipe:
        size = fcntl.fcntl(pipe.write_fileno(), fcntl.F_SETPIPE_SZ, 4096)
        lowlevel.install_handler(pipe.write_fileno())
        for _ in range(size + 100):
            signal.raise_signal(CHLD)
        lowlevel.install_handler(-1)
        assert pipe.drain() == size
    assert unraisable == []
    assert capfd.readouterr().err == ""


def test_is_default_handler() -> None:
    """`is_default_handler` is true for SIG_DFL alone."""
    with sigchld_found():
        for handler, expected in ((signal.SIG_DFL, True), (signal.SIG_IGN, False), (_nothing, False)):
            signal.signal(CHLD, handler)
            assert lowlevel.is_default_handler() is expected


@on_plain_asyncio
@pytest.mark.parametrize("lowlevel_first", [False, True])
async def test_install_handler_beside_a_reaper(source: Any, *, lowlevel_first: bool) -> None:
    """Nested, `install_handler` and a reaper both hear SIGCHLD and put back what they found."""
    before = look()
    with lowlevel.SelfPipe() as pipe:
        if lowlevel_first:
            lowlevel.install_handler(pipe.write_fileno())
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            if not lowlevel_first:
                lowlevel.install_handler(pipe.write_fileno())
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
            assert readable(pipe)
            if not lowlevel_first:
                lowlevel.install_handler(-1)
        if lowlevel_first:
            lowlevel.install_handler(-1)
    assert look() == before


@on_plain_asyncio
@pytest.mark.parametrize("lowlevel_first", [False, True])
async def test_install_handler_crossed_with_a_reaper(source: Any, *, lowlevel_first: bool) -> None:
    """Undone in the order of their installation, both still put back what was found (as I4)."""
    with sigchld_found(), lowlevel.SelfPipe() as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = look()
        if lowlevel_first:
            lowlevel.install_handler(pipe.write_fileno())
        async with anyreap.open_reaper(source=source, heartbeat=NEVER):
            lowlevel.install_handler(-1 if lowlevel_first else pipe.write_fileno())
        if not lowlevel_first:
            lowlevel.install_handler(-1)
        after = look()
    assert after.wakeup == before.wakeup
    assert (after.handler, after.action) == (before.handler, before.action)


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Somebody's handler."""


# What is put back (promise 4) ------------------------------------------------------------------


@contextlib.contextmanager
def spare_descriptors(count: int) -> Iterator[None]:
    """Let this process open so many more descriptors, and no more."""
    used = set(open_fds())
    limit = 0
    while count or limit in used:
        count -= limit not in used
        limit += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _with_a_python_handler(*, interrupting: bool) -> None:
    signal.signal(CHLD, _nothing)
    signal.siginterrupt(CHLD, interrupting)


def _with_a_python_handler_and_nocldwait() -> None:
    signal.signal(CHLD, _nothing)
    set_sigaction(sigaction()[0], SA_NOCLDWAIT | SA_RESTART)


DISPOSITIONS: dict[str, Callable[[], None]] = {
    "default": lambda: None,
    "python, restarting": functools.partial(_with_a_python_handler, interrupting=False),
    "python, interrupting": functools.partial(_with_a_python_handler, interrupting=True),
    "default, SA_NOCLDWAIT from C": functools.partial(set_sigaction, 0, SA_NOCLDWAIT),
    "default, SA_RESTART from C": functools.partial(set_sigaction, 0, SA_RESTART),
    "python, SA_NOCLDWAIT from C": _with_a_python_handler_and_nocldwait,
}


async def test_disposition_is_put_back(source: Any) -> None:
    """After the block SIGCHLD has the same handler object and the same sa_flags (F12, F3)."""
    for found, dispose in DISPOSITIONS.items():
        with sigchld_found():
            dispose()
            before = signal.getsignal(CHLD), sigaction()
            async with anyreap.open_reaper(source=source) as reaper:
                with anyio.fail_after(BOUND), Gate() as gate:
                    child = reaper.watch(gate.add("exit 3"))  # SA_NOCLDWAIT leaves no zombie
                    gate.open()
                    with contextlib.suppress(*() if REMEMBERS else (anyreap.StatusLost,)):
                        assert (await child.wait()).exit_code == 3, found
                if source == "sigchld":
                    assert signal.getsignal(CHLD) is not before[0]
                    assert sigaction()[1] & SA_RESTART
                else:
                    assert (signal.getsignal(CHLD), sigaction()) == before, found
            assert (signal.getsignal(CHLD), sigaction()) == before, found


async def test_ignored_sigchld_is_put_back(source: Any) -> None:
    """SIGCHLD that was found ignored is ignored again after the block (F1)."""
    with sigchld_found():
        signal.signal(CHLD, signal.SIG_IGN)
        before = sigaction()
        with one_warning("SIGCHLD is ignored"):
            async with anyreap.open_reaper(source=source):
                pass
        assert signal.getsignal(CHLD) is signal.SIG_IGN
        assert sigaction() == before


@on_the_self_pipe
async def test_disposition_is_put_back_where_its_layout_is_unknown(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sigaction(2) can't be called, the handler that Python knows is put back (F12)."""
    monkeypatch.setattr(_sigchld, "_Sigaction", None)
    with sigchld_found():
        signal.signal(CHLD, _nothing)
        async with anyreap.open_reaper(source=source) as reaper:
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
        assert signal.getsignal(CHLD) is _nothing


@pytest.mark.parametrize("way", ["exception", "cancelled"])
async def test_all_is_put_back_however_the_block_is_left(source: Any, way: str) -> None:
    """An exception and a cancellation put back handler, flags, fds and mask, too (promise 4)."""
    before = (signal.getsignal(CHLD), sigaction(), set(open_fds()), blocked_set(os.getpid()))
    with contextlib.suppress(ZeroDivisionError), anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source) as reaper:
            reaper.adopt(sleeper())
            if way == "exception":
                _ = 1 / 0
            scope.cancel()
            await anyio.sleep(BOUND)
    after = (signal.getsignal(CHLD), sigaction(), set(open_fds()), blocked_set(os.getpid()))
    assert after == before
    assert children() == set()


async def test_opened_and_closed_many_times(source: Any) -> None:
    """After 300 reapers the process is as it was before the first one (F20)."""
    before = (signal.getsignal(CHLD), sigaction(), open_fds())
    for _ in range(300):
        async with anyreap.open_reaper(source=source):
            pass
    assert (signal.getsignal(CHLD), sigaction(), open_fds()) == before


@on_plain_asyncio
@in_a_real_run
async def test_asyncio_gets_its_wakeup_fd_back(source: Any) -> None:
    """A wakeup fd that a reaper found on asyncio is there during and after the block (F14)."""
    with wakeup_fd_found(), foreign_pipe() as theirs:
        signal.set_wakeup_fd(theirs.write_fileno())
        async with anyreap.open_reaper(source=source, heartbeat=0.01) as reaper:
            assert wakeup_fd() == theirs.write_fileno()
            with anyio.fail_after(BOUND):
                await reaper.wait(exits_with(0))
                while not theirs.drain():
                    await anyio.sleep(0.001)
            assert wakeup_fd() == theirs.write_fileno()
        assert wakeup_fd() == theirs.write_fileno()


@on_plain_asyncio
@in_a_real_run
async def test_found_wakeup_fd_keeps_its_flag(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A found wakeup fd with asyncio's `warn_on_full_buffer` still warns after the block (F14)."""
    unraisable: list[Any] = []
    with sigchld_found(), wakeup_fd_found(), foreign_pipe() as theirs:
        signal.set_wakeup_fd(theirs.write_fileno())
        async with anyreap.open_reaper(source=source):
            pass
        signal.signal(CHLD, _nothing)
        size = fcntl.fcntl(theirs.write_fileno(), fcntl.F_SETPIPE_SZ, 4096)
        os.write(theirs.write_fileno(), bytes(size))
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        signal.raise_signal(CHLD)
        monkeypatch.undo()
    assert [type(each.exc_value) for each in unraisable] == [BlockingIOError]


@on_plain_asyncio
@pytest.mark.parametrize("when", ["before", "inside"])
def test_found_wakeup_fd_that_its_owner_closed(host: Host, when: str) -> None:
    """A wakeup fd whose owner closed it, and did not take it back, is as good as none: the reaper opens,
    lends its own, and works (B10, field bug 42).
    """
    run_alone(
        FOR_SCRIPTS
        + textwrap.dedent(
            f"""
            async def main():
                theirs = fcntl.fcntl(pipe.write_fileno(), fcntl.F_DUPFD_CLOEXEC, 900)  # not reused
                signal.set_wakeup_fd(theirs)
                if {when!r} == "before":
                    os.close(theirs)
                async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                    if {when!r} == "inside":
                        os.close(theirs)
                    for code in (7, 8):
                        with Gate() as gate, child_of_a_worker(gate, code) as pid, anyio.fail_after(15):
                            assert (await reaper.wait(pid)).exit_code == code
                    with anyio.fail_after(15):
                        while (now := signal.set_wakeup_fd(-1)) not in open_fds():
                            await anyio.sleep(0.01)
                        signal.set_wakeup_fd(now)

            run(anyio.sleep, 0)
            sys.unraisablehook = lambda _: None  # what CPython says of it is its own
            with anyreap.lowlevel.SelfPipe() as pipe:
                found = look()
                run(main)
                assert look() == found, (look(), found)
            """
        ),
        host,
    )


@on_trio
@in_a_real_run
async def test_trios_wakeup_fd_is_not_touched(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under trio nobody calls `set_wakeup_fd`: looking would flip trio's flag (F14)."""
    calls: list[tuple[int, bool]] = []

    def set_wakeup_fd(fd: int, *, warn_on_full_buffer: bool = True) -> int:
        calls.append((fd, warn_on_full_buffer))
        return -1

    monkeypatch.setattr(signal, "set_wakeup_fd", set_wakeup_fd)
    async with anyreap.open_reaper(source=source, heartbeat=0.01) as reaper:
        with anyio.fail_after(BOUND):
            await reaper.wait(exits_with(0))
            await reaper.wait(_gone_after(0.05))
    monkeypatch.undo()
    assert calls == []


def _gone_after(seconds: float) -> int:
    return os.posix_spawn("/bin/sleep", ["sleep", str(seconds)], os.environ)


# What children inherit (promise 4) ---------------------------------------------------------------


def _status_lines() -> str:
    """The signal sets of a new child, as it finds them itself."""
    read, write = os.pipe()
    pid = os.posix_spawn(
        "/bin/grep",
        ["grep", "^Sig[BIC]", "/proc/self/status"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
    )
    os.close(write)
    with open(read) as file:
        found = file.read()
    collect(pid)
    return found


async def test_children_start_with_the_signals_that_were_found(source: Any) -> None:
    """A child that is started inside of the block has the mask and the dispositions of one started
    before it: SIGCHLD default and not blocked (F19).
    """
    before = _status_lines()
    async with anyreap.open_reaper(source=source):
        inside = _status_lines()
        through_popen = subprocess.run(
            ["grep", "^Sig[BIC]", "/proc/self/status"],
            capture_output=True,
            text=True,
            check=True,
            restore_signals=False,
        ).stdout
    assert inside == before
    assert _sets(through_popen) == _sets(before)
    assert all(not value >> (CHLD - 1) & 1 for value in _sets(inside))


def _sets(lines: str) -> list[int]:
    """The sets without signals 32 and 33, which are libc's: its posix_spawn leaves them ignored."""
    return [int(line.split()[1], 16) & ~(3 << 31) for line in lines.splitlines()]


async def test_no_descriptor_of_ours_is_inherited(source: Any) -> None:
    """A child started with close_fds=False has none of our descriptors (G10, field bug 68)."""
    command = [sys.executable, "-I", "-S", "-c", "import os; print(os.listdir('/proc/self/fd'))"]
    run = functools.partial(subprocess.run, command, stdout=subprocess.PIPE, text=True, check=True, close_fds=False)
    before = run().stdout
    async with anyreap.open_reaper(source=source) as reaper:
        pid = sleeper()
        reaper.watch(pid)
        inside = run().stdout
        end(pid)
    assert inside == before


# Descriptors -------------------------------------------------------------------------------------


async def test_out_of_descriptors(source: Any) -> None:
    """However few descriptors are left, a reaper opens and works, or is an OSError, and then nothing
    was installed and nothing leaked (G4).
    """
    before = (signal.getsignal(CHLD), sigaction(), open_fds())
    outcomes = []
    pid = exits_with(3)
    await_death(pid)
    for spare in range(6):
        with spare_descriptors(spare):
            try:
                async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
                    if 3 not in outcomes:
                        with anyio.fail_after(BOUND):
                            outcomes.append((await reaper.wait(pid)).exit_code)
            except OSError as exc:
                if exc.errno != errno.EMFILE:
                    raise
                outcomes.append(-1)
        assert (signal.getsignal(CHLD), sigaction(), open_fds()) == before
    assert outcomes[0] == -1
    assert outcomes[-1] == 3


@on_plain_asyncio
async def test_failure_in_the_midst_of_installing(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after the handler was installed, and before the block was entered, leaves nothing
    installed (G4).
    """

    def lend(self: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(_sigchld, "_installed", None)  # put back, lest other tests fail too
    monkeypatch.setattr(_sigchld._Installed, "lend", lend)
    before = (signal.getsignal(CHLD), sigaction(), open_fds())
    with sigchld_found():
        with pytest.raises(OSError, match="Bad file descriptor"):
            async with anyreap.open_reaper(source=source):
                raise AssertionError
        assert (signal.getsignal(CHLD), sigaction(), open_fds()) == before


async def test_beyond_the_limit_of_select(source: Any) -> None:
    """1500 open descriptors are no obstacle (G12)."""
    held: list[int] = []
    try:
        while not held or held[-1] < 1500:
            held.append(os.open("/dev/null", os.O_RDONLY))
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
    finally:
        for fd in held:
            os.close(fd)


@on_the_self_pipe
def test_full_pipe_is_silent_and_loses_nothing(host: Host) -> None:
    """5000 signals while the loop is busy, more than pipe or trio's socket hold: no word on stderr, no
    blocking write, and all 50 statuses (G1, field bugs 7 and 8).
    """
    alone(
        """
        async def main():
            before = set(open_fds())
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                for fd, what in open_fds().items():
                    if fd not in before and what.startswith("pipe:"):
                        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096)
                with Gate() as gate:
                    ours = [reaper.watch(gate.add_cat()) for _ in range(50)]
                    gate.open()
                    await_death(*gate.pids)
                    for _ in range(5000):
                        os.kill(os.getpid(), signal.SIGCHLD)
                    with anyio.fail_after(15):
                        for child in ours:
                            assert (await child.wait()).returncode == 0
        run(main)
        """,
        host,
    )


@pytest.mark.parametrize("host", [HOSTS[1], HOSTS[3], HOSTS[4]], ids=str)
def test_somebody_closes_our_epoll(host: Host) -> None:
    """If somebody closes the epoll that holds the pidfds, exits are found all the same, or waiters and
    the block are told of the error: no hang, no lie (G2).
    """
    run_alone(
        """
        async def main():
            before = set(open_fds())
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                [epoll] = [fd for fd, what in open_fds().items()
                           if fd not in before and "eventpoll" in what]
                os.close(epoll)
                for code in (3, 4):
                    pid = exits_with(code)
                    try:
                        with anyio.fail_after(15):
                            assert (await reaper.wait(pid)).exit_code == code
                    except RuntimeError as exc:
                        assert isinstance(exc.__cause__, OSError), exc.__cause__
                        assert collect(pid) == code
        try:
            run(main)
        except RuntimeError as exc:
            assert isinstance(exc.__cause__, OSError), exc.__cause__
        assert not children()
        """,
        host,
    )


@on_the_self_pipe
@pytest.mark.parametrize("which", ["read", "write"])
def test_somebody_closes_our_pipe(host: Host, which: str, tmp_path: Path) -> None:
    """If somebody closes an end of our pipe, exits are found by the heartbeat, one warning says what has
    happened, stderr is not flooded for ever, and the number's next owner finds no byte of ours, and
    his file open afterwards (G2, 0.11, field bug 43).
    """
    done = run_alone(
        f"""
        async def main():
            before = set(open_fds())
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                    read, write = sorted(
                        fd for fd, what in open_fds().items() if fd not in before and "pipe:" in what
                    )
                    os.close({which})
                    with anyio.fail_after(15):
                        while not seen:
                            await anyio.sleep(0.01)
                    for fd in (read, write):
                        os.dup2(file, fd)
                    print("MARK", file=sys.stderr)
                    for _ in range(100):
                        os.kill(os.getpid(), signal.SIGCHLD)
                    for code in (3, 4):
                        with anyio.fail_after(15):
                            assert (await reaper.wait(exits_with(code))).exit_code == code
            texts = [str(each.message) for each in seen]
            assert len(texts) == 1 and "self-pipe" in texts[0], texts
            for fd in (read, write):
                assert os.fstat(fd).st_size == 0
                os.close(fd)
            assert set(open_fds()) <= before, open_fds()

        run(anyio.sleep, 0)
        file = os.open({str(tmp_path / "file")!r}, os.O_RDWR | os.O_CREAT)
        found = look()
        run(main)
        assert look() == found, (look(), found)
        """,
        host,
    )
    assert said(done.stderr).endswith("MARK\n")


# Signals stay ours to hear (promise 11) ------------------------------------------------------------


def kill_own_thread(signum: int) -> Worker:
    """Deliver a signal to a thread that is not the loop's, once the loop sleeps.

    Nothing interrupts the loop then: only a wakeup fd wakes it.
    """
    return Worker(lambda: signal.pthread_kill(threading.get_ident(), signum))


@in_a_real_run
async def test_open_signal_receiver(source: Any) -> None:
    """`anyio.open_signal_receiver` gets its signals at once, whether it was opened before the reaper,
    inside of its block, or outlives it (promise 11).
    """

    async def hear(signals: Any, signum: int) -> None:
        with anyio.fail_after(BOUND), kill_own_thread(signum):
            async for got in signals:
                assert got == signum
                return

    with anyio.open_signal_receiver(signal.SIGUSR1) as before:
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            await hear(before, signal.SIGUSR1)
            with anyio.open_signal_receiver(signal.SIGUSR2) as inside:
                await hear(inside, signal.SIGUSR2)
                await hear(before, signal.SIGUSR1)
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
        await hear(before, signal.SIGUSR1)


@in_a_real_run
async def test_signal_receiver_that_outlives_the_reaper(source: Any) -> None:
    """A receiver that was opened inside of the block and outlives it still hears (promise 11)."""
    block = anyreap.open_reaper(source=source, heartbeat=NEVER)
    reaper = await block.__aenter__()
    with anyio.open_signal_receiver(signal.SIGUSR1) as signals:
        with anyio.fail_after(BOUND):
            assert (await reaper.wait(exits_with(3))).exit_code == 3
        await block.__aexit__(None, None, None)
        with anyio.fail_after(BOUND), kill_own_thread(signal.SIGUSR1):
            async for got in signals:
                assert got == signal.SIGUSR1
                break


@on_asyncio
@in_a_real_run
async def test_add_signal_handler(source: Any) -> None:
    """A handler of asyncio's `add_signal_handler` is called at once, whether it was added before it
    was opened or after, and again when another one was removed (promise 11).
    """
    loop = asyncio.get_running_loop()
    heard: dict[int, asyncio.Event] = {
        signum: asyncio.Event() for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
    }

    def add(signum: int) -> None:
        loop.add_signal_handler(signum, heard[signum].set)

    async def hear(signum: int) -> None:
        heard[signum].clear()
        with anyio.fail_after(BOUND), kill_own_thread(signum):
            await heard[signum].wait()

    add(signal.SIGUSR1)
    async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
        await hear(signal.SIGUSR1)
        add(signal.SIGUSR2)
        await hear(signal.SIGUSR2)
        await hear(signal.SIGUSR1)
        assert loop.remove_signal_handler(signal.SIGUSR1)
        assert loop.remove_signal_handler(signal.SIGUSR2)
        add(signal.SIGWINCH)
        await hear(signal.SIGWINCH)
        with anyio.fail_after(BOUND):
            assert (await reaper.wait(exits_with(3))).exit_code == 3
    await hear(signal.SIGWINCH)
    assert loop.remove_signal_handler(signal.SIGWINCH)


@on_plain_asyncio
@in_a_real_run
async def test_signal_that_arrives_while_ours_is_lent(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal whose byte falls into our pipe while we look whether asyncio has a wakeup fd is passed
    on: its handler of `add_signal_handler` is called (promise 11).
    """
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    real = signal.set_wakeup_fd
    armed = True

    def set_wakeup_fd(fd: int, **options: Any) -> int:
        nonlocal armed
        found = real(fd, **options)
        if armed and fd != -1:
            armed = False
            signal.raise_signal(signal.SIGUSR1)
        return found

    loop.add_signal_handler(signal.SIGUSR1, heard.set)
    monkeypatch.setattr(signal, "set_wakeup_fd", set_wakeup_fd)
    async with anyreap.open_reaper(source=source, heartbeat=NEVER):
        with anyio.fail_after(BOUND):
            await heard.wait()
    assert not armed
    monkeypatch.undo()
    loop.remove_signal_handler(signal.SIGUSR1)


@in_a_real_run
async def test_python_handlers_are_called(source: Any) -> None:
    """A SIGTERM handler of `signal.signal` is called while the reaper waits, and stays (promise 11)."""
    heard = []
    found = signal.signal(signal.SIGTERM, lambda signum, _: heard.append(signum))
    theirs = signal.getsignal(signal.SIGTERM)
    try:
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            pid = sleeper()
            with anyio.fail_after(BOUND), kill_main_thread(signal.SIGTERM):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(reaper.wait, pid)
                    await until(lambda: heard)
                    end_watched(pid)
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, found)


def kill_main_thread(signum: int) -> Worker:
    """Deliver a signal to the main thread once its loop sleeps."""
    main = threading.main_thread().ident
    assert main is not None
    return Worker(lambda: signal.pthread_kill(main, signum))


def end_watched(pid: int) -> None:
    """Kill a child that a reaper collects."""
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2], HOSTS[4]], ids=str)
def test_ctrl_c(host: Host) -> None:
    """Ctrl-C while the block waits is a KeyboardInterrupt of the run, the owned child is ended, and
    all is put back (promise 11).
    """
    alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                child = reaper.adopt(sleeper())
                main_thread = threading.main_thread().ident
                with Worker(lambda: signal.pthread_kill(main_thread, signal.SIGINT)):
                    await child.wait()
        run(anyio.sleep, 0)
        before = look()
        try:
            run(main)
        except KeyboardInterrupt:
            print("interrupted")
        assert look() == before, (before, look())
        """,
        host,
    )


async def test_system_calls_are_not_interrupted(source: Any) -> None:
    """A C extension that blocks in read() in the main thread doesn't see EINTR when a child ends
    (F17, promise 11).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    tid, main = threading.get_native_id(), threading.get_ident()
    read, write = os.pipe()
    pending: list[bool] = []

    def meddle() -> None:
        while not in_read_of(tid, read):
            time.sleep(0.001)
        signal.pthread_kill(main, CHLD)
        # Gone from the pending set: it was delivered, and the C half of the handler has run or will
        # before anything else does in that thread.
        while _pending(tid):
            time.sleep(0.001)
        pending.append(_pending(tid))
        os.write(write, b"x")

    async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
        thread = threading.Thread(target=meddle)
        thread.start()
        got = libc.read(read, ctypes.create_string_buffer(1), 1)
        seen = ctypes.get_errno()
        os.write(write, b"x")  # had it been interrupted, the thread would wait for the next read
        if got != 1:
            libc.read(read, ctypes.create_string_buffer(1), 1)
        thread.join()
        assert got == 1, os.strerror(seen)
        with anyio.fail_after(BOUND):
            assert (await reaper.wait(exits_with(3))).exit_code == 3
    os.close(read)
    os.close(write)


def _pending(tid: int) -> bool:
    with open(f"/proc/self/task/{tid}/status") as file:
        for line in file:
            if line.startswith("SigPnd"):
                return bool(int(line.split()[1], 16) >> (CHLD - 1) & 1)
    raise AssertionError


@on_the_self_pipe
async def test_found_handler_is_called_for_each_delivery(source: Any) -> None:
    """A Python handler that was there before is called with (signum, frame) for each signal, also when
    it came from a child's end, and no more by us afterwards (F10).
    """
    calls: list[tuple[int, FrameType | None]] = []

    def theirs(signum: int, frame: FrameType | None) -> None:
        calls.append((signum, frame))

    with sigchld_found():
        signal.signal(CHLD, theirs)
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            for count in range(1, 4):
                signal.raise_signal(CHLD)
                assert len(calls) == count
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
            assert len(calls) > 3
        calls.clear()
        signal.raise_signal(CHLD)
        assert len(calls) == 1
    assert all(signum == CHLD and isinstance(frame, FrameType) for signum, frame in calls)


@on_the_self_pipe
def test_found_handler_that_raises(host: Host) -> None:
    """If the chained handler raises, the exception goes where Python sends it, and ours has done its
    work before: the status arrives although no heartbeat comes (F11).
    """
    done = alone(
        """
        class Boom(Exception):
            pass

        def theirs(signum, frame):
            raise Boom

        async def main():
            signal.signal(signal.SIGCHLD, theirs)
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
                pid = exits_with(7)
                child = reaper.watch(pid)
                await_death(pid)
                await anyio.sleep(0)
                try:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                except Boom:
                    print("raised")
                with anyio.fail_after(15):
                    assert (await child.wait()).exit_code == 7
            assert signal.getsignal(signal.SIGCHLD) is theirs
        run(main)
        """,
        host,
    )
    assert done.stdout == "raised\n"


@on_the_self_pipe
async def test_found_handler_that_spawns_and_waits(source: Any) -> None:
    """A chained SIGCHLD handler may itself start and await children: no recursion into ours, and each
    of ours is reported once (H7).
    """
    spawned: list[int] = []

    def theirs(signum: int, frame: FrameType | None) -> None:
        if len(spawned) < 5:
            spawned.append(0)
            spawned[-1] = subprocess.run(["true"], check=True).returncode
            pid = exits_with(9)
            assert collect(pid) == 9

    with sigchld_found():
        signal.signal(CHLD, theirs)
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            exits = reaper.exits()
            with Gate() as gate, anyio.fail_after(BOUND):
                pids = [gate.add(f"exit {code}") for code in range(10)]
                ours = [reaper.watch(pid) for pid in pids]
                gate.open()
                assert [(await child.wait()).exit_code for child in ours] == list(range(10))
            reported = [exits.receive_nowait().pid for _ in range(10)]
            assert exits.statistics().current_buffer_used == 0
            exits.close()
    assert sorted(reported) == sorted(pids)
    assert spawned == [0] * 5


@on_trio
@in_a_real_run
async def test_trios_receiver_of_sigchld(source: Any) -> None:
    """`trio.open_signal_receiver(SIGCHLD)` that was opened first gets SIGCHLD all the same (promise 11)."""
    import trio

    with sigchld_found(), trio.open_signal_receiver(CHLD) as signals:
        theirs = signal.getsignal(CHLD)
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
                assert await anext(signals) == CHLD
        assert signal.getsignal(CHLD) is theirs


@on_plain_asyncio
async def test_asyncios_receiver_of_sigchld(source: Any) -> None:
    """An `add_signal_handler(SIGCHLD)` of asyncio that came first is called all the same (promise 11)."""
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    with sigchld_found():
        loop.add_signal_handler(CHLD, heard.set)
        theirs = signal.getsignal(CHLD)
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
                await heard.wait()
        assert signal.getsignal(CHLD) is theirs
        loop.remove_signal_handler(CHLD)


@on_plain_asyncio
@in_a_real_run
async def test_replaced_by_asyncios_receiver_for_a_while(source: Any) -> None:
    """Somebody calls asyncio's `add_signal_handler(SIGCHLD)` inside of the block, and removes it: both
    hear meanwhile; afterwards SIGCHLD has no handler, which is left so, with one warning, and exits
    are noticed within a heartbeat (F6, F9, F16).
    """
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    with sigchld_found(), one_warning("another SIGCHLD handler"):
        async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
            loop.add_signal_handler(CHLD, heard.set)
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
                await heard.wait()
            loop.remove_signal_handler(CHLD)
            with Gate() as gate, Worker(gate.open), anyio.fail_after(BOUND):
                assert (await reaper.wait(gate.add("exit 4"))).exit_code == 4
        assert signal.getsignal(CHLD) is signal.SIG_DFL


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2], HOSTS[4]], ids=str)
def test_other_signals_during_a_burst(host: Host) -> None:
    """SIGALRM a thousand times a second, SIGUSR1 and SIGWINCH during 200 exits: every handler of
    theirs ran, and every status is right (H3).
    """
    alone(
        """
        from collections import Counter
        heard = Counter()
        for signum in (signal.SIGALRM, signal.SIGUSR1, signal.SIGWINCH):
            signal.signal(signum, lambda signum, frame: heard.update([signum]))

        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with Gate() as gate:
                    ours = [reaper.watch(gate.add_cat()) for _ in range(200)]
                    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
                    gate.open()
                    with anyio.fail_after(20):
                        for number, child in enumerate(ours):
                            if number % 20 == 0:
                                os.kill(os.getpid(), signal.SIGUSR1)
                                os.kill(os.getpid(), signal.SIGWINCH)
                            assert (await child.wait()).returncode == 0
                        while not heard[signal.SIGALRM]:
                            await anyio.sleep(0.001)
                    signal.setitimer(signal.ITIMER_REAL, 0)
        run(main)
        assert heard[signal.SIGUSR1] == heard[signal.SIGWINCH] == 10, heard
        """,
        host,
    )


# Wake-ups: coalesced, idle, in whatever thread ------------------------------------------------------


@in_a_real_run
async def test_child_of_a_worker_thread_wakes_an_idle_loop(source: Any) -> None:
    """A child that was forked by a thread that lives on is noticed at once, although the signal
    interrupts that thread and not the loop's (B10, field bug 2).
    """
    async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
        for code in (7, 8):
            with (
                Gate() as gate,
                child_of_a_worker(gate, code) as pid,
                anyio.fail_after(BOUND / 2),
            ):
                assert (await reaper.wait(pid)).exit_code == code
        assert reaper.statistics().late == 0


@on_auto
def test_main_thread_stuck_in_c(host: Host) -> None:
    """A loop in another thread notices an exit while the main thread is stuck in C, where no Python
    handler can run (H5).
    """
    read, write = os.pipe()

    async def main() -> int | None:
        try:
            async with anyreap.open_reaper(heartbeat=NEVER) as reaper:
                with anyio.fail_after(BOUND), Gate() as gate:
                    child = reaper.watch(gate.add("exit 7"))
                    while not in_read_of(main_tid, read):
                        await anyio.sleep(0.001)
                    gate.open()
                    return (await child.wait()).exit_code
        finally:
            os.write(write, b"x")

    main_tid = threading.get_native_id()
    codes: list[int | None] = []
    thread = threading.Thread(
        target=lambda: codes.append(anyio.run(main, backend=host.backend, backend_options=host.options))
    )
    thread.start()
    got = ctypes.CDLL(None).read(read, ctypes.create_string_buffer(1), 1)
    thread.join()
    os.close(read)
    os.close(write)
    assert got == 1
    assert codes == [7]


@on_the_self_pipe
def test_one_signal_for_many_exits(host: Host) -> None:
    """200 exits that coalesce into exactly one SIGCHLD are 200 statuses, without a heartbeat
    (A5, field bug 1).
    """
    alone(
        """
        from anyreap import _kernel
        calls = []
        signal.signal(signal.SIGCHLD, lambda *args: calls.append(args))

        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
                with Gate() as gate:
                    ours = [reaper.watch(gate.add_cat()) for _ in range(200)]
                    gate.open()
                    await_death(*gate.pids)
                await anyio.sleep(0.01)
                assert not any(child.status for child in ours)
                assert calls == []
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                assert len(calls) == 1, calls
                with anyio.fail_after(15):
                    for child in ours:
                        assert (await child.wait()).returncode == 0
                assert reaper.statistics().late == 0
                assert len(calls) == 1, calls
        run(anyio.sleep, 0)  # whatever it imports may start processes
        for _kernel._usable in (True, False):
            calls.clear()
            run(main)
        """,
        host,
    )


@on_the_self_pipe
def test_foreign_exit_in_the_same_signal(host: Host) -> None:
    """Two exits of ours and two foreign ones in one coalesced signal are two statuses, and the foreign
    zombies are left to their owner (A6, field bug 20).
    """
    alone(
        """
        from anyreap import _kernel

        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
                with Gate() as gate:
                    first, one, two, last = [gate.add(f"exit {code}") for code in (3, 4, 5, 6)]
                    ours = [reaper.watch(pid) for pid in (one, two)]
                    gate.open()
                    await_death(*gate.pids)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                with anyio.fail_after(15):
                    assert [(await child.wait()).exit_code for child in ours] == [4, 5]
                assert is_zombie(first) and is_zombie(last)
                assert (collect(first), collect(last)) == (3, 6)
        for _kernel._usable in (True, False):
            run(main)
        """,
        host,
    )


async def test_signal_without_an_exit(source: Any) -> None:
    """A SIGCHLD that a stranger sends reports nothing, wakes no waiter, and makes nobody busy (A7)."""
    woken = []

    async def wait() -> None:
        woken.append(await child.wait())

    async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
        child = reaper.watch(pid := sleeper())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0)
            stranger = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", "kill -CHLD $PPID; read x; exit 0"],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, (ends := os.pipe())[0], 0)],
            )
            if source == "sigchld":
                await until(lambda: reaper.statistics().wakeups)
            for _ in range(50):
                await anyio.sleep(0.001)
            assert woken == []
            now = reaper.statistics()
            assert (now.watched, now.reaped, now.late) == (1, 0, 0)
            assert now.wakeups == (1 if source == "sigchld" else 0)
            os.close(ends[1])
            os.close(ends[0])
            await_death(stranger)
            assert collect(stranger) == 0
            end_watched(pid)
            with anyio.fail_after(BOUND):
                await child.wait()
    assert [status.signal for status in woken] == [signal.SIGKILL]


@on_the_self_pipe
@in_a_real_run
async def test_heartbeat_is_not_put_off(source: Any, no_pidfds: None) -> None:
    """The heartbeat comes in its time while other people's signals wake the reaper again and again: a
    stolen status, which shows in no other way without pidfds, is noticed (promise 5, field bug 17).
    """
    over = threading.Event()

    def disturb() -> None:
        while not over.wait(0.005):
            os.kill(os.getpid(), CHLD)

    thread = threading.Thread(target=disturb)
    async with anyreap.open_reaper(source=source, heartbeat=0.3) as reaper:
        with Gate() as gate:
            child = reaper.watch(pid := gate.add("exit 7"))
            thread.start()
            try:
                await until(lambda: reaper.statistics().wakeups > 3)
                gate.open()
                collect(pid)
                with anyio.fail_after(BOUND), pytest.raises(anyreap.StatusLost):
                    await child.wait()
            finally:
                over.set()
                thread.join()
        assert reaper.statistics().lost == 1


# Blocked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2]], ids=str)
def test_blocked_at_the_start(host: Host) -> None:
    """SIGCHLD that is blocked when Python starts is one warning for source="sigchld", costs a heartbeat
    at most, and stays blocked, here and in children, as it was found (F4, field bug 3).
    """
    alone(
        """
        async def main():
            found = blocked_set(os.getpid())
            assert found >> (signal.SIGCHLD - 1) & 1
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                    with Gate() as gate:
                        pid = gate.add("exit 7")
                        child = reaper.watch(pid)
                        assert blocked_set(pid) == found == blocked_set(os.getpid())
                        with Worker(gate.open), anyio.fail_after(15):
                            assert (await child.wait()).exit_code == 7
                    assert reaper.statistics().late == 1
            assert len(seen) == 1 and "blocked" in str(seen[0].message), seen
            assert blocked_set(os.getpid()) == found
        run(main)
        """,
        host,
        wrapper=("env", "--block-signal=CHLD"),
    )


@on_auto
async def test_blocked_when_auto_chooses(source: Any) -> None:
    """With SIGCHLD blocked, "auto" takes pidfds, says nothing, and notices at once (F4)."""
    with sigchld_blocked():
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            assert reaper.statistics().source == "pidfd"
            assert signal.getsignal(CHLD) is signal.SIG_DFL
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(7))).exit_code == 7
        assert blocked_set(os.getpid()) >> (CHLD - 1) & 1


@on_the_self_pipe
def test_late_is_counted_before_the_waiter_goes_on(host: Host) -> None:
    """Who waited for a child that only the heartbeat found sees that in the statistics, even where the service lets
    other tasks run before it has gone through all children.
    """
    alone(
        """
        from anyreap import _service
        _service._SLICE = -1.0

        async def wait(child, reaper):
            await child.wait()
            assert reaper.statistics().late >= 1

        async def main():
            warnings.simplefilter("ignore")  # that SIGCHLD is blocked
            with Gate() as gate, anyio.fail_after(15):
                async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                    async with anyio.create_task_group() as tasks:
                        for _ in range(5):
                            tasks.start_soon(wait, reaper.watch(gate.add_cat()), reaper)
                        await anyio.wait_all_tasks_blocked()
                        gate.open()
                        await_death(*gate.pids)
        run(main)
        """,
        host,
        wrapper=("env", "--block-signal=CHLD"),
    )


@on_the_self_pipe
def test_blocked_while_running(host: Host) -> None:
    """SIGCHLD that is blocked later, in the main thread or in all threads, costs a heartbeat at most,
    and the mask stays (F5).
    """
    alone(
        """
        def block_here():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])

        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                block_here()
                # in the main thread alone: another one takes it
                with Worker(lambda: None):
                    with Gate() as gate, Worker(gate.open), anyio.fail_after(15):
                        assert (await reaper.wait(gate.add("exit 5"))).exit_code == 5
                # in all threads
                with Gate() as gate, Worker(gate.open, block_here), anyio.fail_after(15):
                    assert (await reaper.wait(gate.add("exit 6"))).exit_code == 6
                assert reaper.statistics().late >= 1
            assert blocked_set(os.getpid()) >> (signal.SIGCHLD - 1) & 1
        run(main)
        """,
        host,
    )


# Ignored -------------------------------------------------------------------------------------------


def test_ignored_at_the_start() -> None:
    """SIGCHLD that is ignored when Python starts is one warning; statuses are real, or lost where
    nobody can know them, and never a false 0; it is ignored again afterwards (F1, field bug 19).
    """
    alone(
        f"""
        from anyreap import _kernel

        async def main(source, usable):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                async with anyreap.open_reaper(source=source, heartbeat=0.1) as reaper:
                    with Gate() as gate:
                        child = reaper.watch(gate.add("exit 7"))
                        gate.open()
                        with anyio.fail_after(15):
                            try:
                                code = (await child.wait()).exit_code
                            except anyreap.StatusLost:
                                code = "lost"
            assert len(seen) == 1 and "ignored" in str(seen[0].message), seen
            known = source == "sigchld" or (usable and {REMEMBERS})
            assert code == (7 if known else "lost"), code

        assert sigaction() == (1, 0), sigaction()
        for host in HOSTS:
            for usable in (True, False):
                _kernel._usable = usable
                try:
                    anyio.run(
                        main, host.source, usable,
                        backend=host.backend, backend_options=host.options,
                    )
                except BaseException as exc:
                    exc.add_note(f"on {{host}}, pidfds: {{usable}}")
                    raise
                assert sigaction() == (1, 0), sigaction()
                assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        """,
        wrapper=("env", "--ignore-signal=CHLD"),
    )


@on_the_self_pipe
async def test_ignored_while_running(source: Any, *, pidfds: bool) -> None:
    """SIGCHLD that is set to SIG_IGN while five children run: each is noticed within a heartbeat, as
    what it was or as lost, never as 0; one warning; what they set is left (F2, field bug 19).
    """
    with sigchld_found(), one_warning("another SIGCHLD handler"):
        async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
            with Gate() as gate:
                ours = [reaper.watch(gate.add("exit 7")) for _ in range(5)]
                signal.signal(CHLD, signal.SIG_IGN)
                gate.open()
                await all_told(ours, 7 if pidfds and REMEMBERS else None)
        assert signal.getsignal(CHLD) is signal.SIG_IGN


async def test_nocldwait_while_running(source: Any, *, pidfds: bool) -> None:
    """SA_NOCLDWAIT that is set while children run, without a handler or with the one that is there:
    each is noticed within a heartbeat, as what it was or as lost, never as 0 (F3, field bug 19).
    """
    for handler in ("default", "the one that is there"):
        replaced = source == "sigchld" and handler == "default"
        warned = one_warning("another SIGCHLD handler") if replaced else contextlib.nullcontext()
        with sigchld_found(), warned:
            async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
                with Gate() as gate:
                    ours = [reaper.watch(gate.add("exit 7")) for _ in range(5)]
                    set_sigaction(0 if handler == "default" else sigaction()[0], SA_NOCLDWAIT)
                    gate.open()
                    await all_told(ours, 7 if pidfds and REMEMBERS else None)


async def all_told(ours: list[anyreap.Child], expected: int | None) -> None:
    """Every waiter is told the exit code, or, for None, that it is lost."""
    with anyio.fail_after(BOUND):
        for child in ours:
            if expected is None:
                with pytest.raises(anyreap.StatusLost):
                    await child.wait()
            else:
                assert (await child.wait()).exit_code == expected


# Replaced ------------------------------------------------------------------------------------------


@on_the_self_pipe
async def test_replaced_by_a_handler_that_chains(source: Any) -> None:
    """Somebody installs a handler that calls ours: both are called, at once; theirs stays, with one
    warning; the next reaper works on top of it (F6a, F16, field bug 11).
    """
    calls = []

    def theirs(signum: int, frame: FrameType | None) -> None:
        calls.append(signum)
        assert callable(ours)
        ours(signum, frame)

    with sigchld_found():
        with one_warning("another SIGCHLD handler"):
            async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
                ours = signal.signal(CHLD, theirs)
                with anyio.fail_after(BOUND):
                    assert (await reaper.wait(exits_with(3))).exit_code == 3
                assert calls
        assert signal.getsignal(CHLD) is theirs
        calls.clear()
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(4))).exit_code == 4
            signal.raise_signal(CHLD)
        assert calls
        assert signal.getsignal(CHLD) is theirs


@on_the_self_pipe
async def test_replaced_by_a_handler_that_does_not_chain(source: Any) -> None:
    """Somebody installs a handler that doesn't call ours: every exit is noticed within a heartbeat,
    theirs is called, and stays; one warning in all (F6b, F16).
    """
    calls = []
    with sigchld_found():
        with one_warning("another SIGCHLD handler"):
            async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
                signal.signal(CHLD, lambda signum, _: calls.append(signum))
                theirs = signal.getsignal(CHLD)
                for code in (3, 4, 5):
                    with anyio.fail_after(BOUND):
                        assert (await reaper.wait(exits_with(code))).exit_code == code
                    assert calls
                    calls.clear()
        assert signal.getsignal(CHLD) is theirs


@on_trios_self_pipe
@in_a_real_run
async def test_replaced_by_trios_receiver_for_a_while(source: Any) -> None:
    """Somebody opens a `trio.open_signal_receiver(SIGCHLD)` inside of the block: exits are noticed
    within a heartbeat meanwhile, at once afterwards, and all is put back (F6).
    """
    import trio

    with sigchld_found(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
            ours = signal.getsignal(CHLD)
            with trio.open_signal_receiver(CHLD) as signals, anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
                assert await anext(signals) == CHLD
            assert signal.getsignal(CHLD) == ours
            with anyio.fail_after(BOUND):
                wakeups = reaper.statistics().wakeups
                assert (await reaper.wait(exits_with(4))).exit_code == 4
                await until(lambda: reaper.statistics().wakeups > wakeups)


@on_the_self_pipe
def test_replaced_from_c(host: Host) -> None:
    """SIGCHLD's handler is replaced from C, invisibly to Python, by SIG_DFL, SIG_IGN or a function:
    exits are noticed within a heartbeat, what was installed stays, Python's table is as before, one
    warning in all (F7, F16, field bug 4).
    """
    alone(
        f"""
        function = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value

        async def main(theirs):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                    with Gate() as one, Gate() as two:
                        ours = [reaper.watch(gate.add("exit 7")) for gate in (one, two)]
                        set_sigaction(theirs, SA_RESTART)
                        for gate, child in zip((one, two), ours):
                            with Worker(gate.open), anyio.fail_after(15):
                                try:
                                    assert (await child.wait()).exit_code == 7
                                except anyreap.StatusLost:
                                    assert theirs == 1 and not {REMEMBERS}
                        assert reaper.statistics().late == 2
                    assert len(seen) == 1, "it was not said while it mattered"
                    assert sigaction() == (theirs, SA_RESTART)
            texts = [str(each.message) for each in seen]
            assert len(texts) == 1 and "another SIGCHLD handler" in texts[0], (theirs, texts)

        for theirs in (0, 1, function):
            run(main, theirs)
            assert sigaction() == (theirs, SA_RESTART), sigaction()
            assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
            set_sigaction(0, 0)
        """,
        host,
    )


USE_UVLOOP = """
import asyncio, uvloop
async def true(gate):
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "read x; exit 5", stdin=gate.read)
    return process
"""


@on_the_self_pipe
def test_replaced_by_libuv(host: Host) -> None:
    """In another thread uvloop starts a child while we run: libuv replaces our handler in C, and leaves
    SIG_DFL at the end; ours is noticed within a heartbeat in both phases, uvloop's too (F7, 0.1).
    """
    alone(
        USE_UVLOOP
        + textwrap.dedent(
            """
            started, release, codes = threading.Event(), threading.Event(), []

            def elsewhere():
                async def other():
                    with Gate() as gate:
                        process = await true(gate)
                        started.set()
                        await asyncio.to_thread(release.wait, 20)
                        gate.open()
                        codes.append(await process.wait())
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(other())

            async def main():
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    async with anyreap.open_reaper(source=SOURCE, heartbeat=0.1) as reaper:
                        ours = sigaction()
                        with Gate() as gate:
                            early = reaper.watch(gate.add("exit 7"))
                            thread = threading.Thread(target=elsewhere)
                            thread.start()
                            started.wait(20)
                            assert sigaction() != ours
                            gate.open()
                            with anyio.fail_after(15):
                                assert (await early.wait()).exit_code == 7
                        release.set()
                        thread.join()
                        assert sigaction()[0] == 0, "libuv used to leave SIG_DFL"
                        with anyio.fail_after(15):
                            assert (await reaper.wait(exits_with(6))).exit_code == 6
                assert codes == [5], codes
                texts = [str(each.message) for each in seen if each.category is RuntimeWarning]
                assert len(texts) == 1 and "another SIGCHLD handler" in texts[0], texts
            run(main)
            assert sigaction() == (0, 0), sigaction()
            """
        ),
        host,
    )


@pytest.mark.parametrize("first", ["uvloop", "anyreap"])
def test_uvloops_subprocesses_beside_ours(first: str) -> None:
    """Under uvloop its own subprocesses and ours both end as they should, whichever came first, and its
    handler is never touched (I8, field bugs 4 and 5).
    """
    alone(
        USE_UVLOOP
        + textwrap.dedent(
            f"""
            async def main():
                with Gate() as gate, Gate() as mine:
                    if {first!r} == "uvloop":
                        process = await true(gate)
                    async with anyreap.open_reaper(heartbeat=3600) as reaper:
                        assert reaper.statistics().source == "pidfd"
                        child = reaper.watch(mine.add("exit 7"))
                        if {first!r} != "uvloop":
                            process = await true(gate)
                        theirs = sigaction()
                        mine.open()
                        with anyio.fail_after(15):
                            assert (await child.wait()).exit_code == 7
                        assert sigaction() == theirs
                        assert process.returncode is None
                        gate.open()
                        with anyio.fail_after(15):
                            assert await process.wait() == 5
                            assert (await reaper.wait(exits_with(6))).exit_code == 6
            run(main)
            assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
            """
        ),
        HOSTS[4],
    )


def test_libuvs_handler_is_left_alone_by_auto() -> None:
    """While uvloop in another thread has a child, "auto" takes pidfds on trio and asyncio, "sigchld" is
    refused, and uvloop still learns of its child's end (I8, field bug 5).
    """
    alone(
        USE_UVLOOP
        + textwrap.dedent(
            """
            started, release, codes = threading.Event(), threading.Event(), []

            def elsewhere():
                async def other():
                    with Gate() as gate:
                        process = await true(gate)
                        started.set()
                        await asyncio.to_thread(release.wait, 20)
                        gate.open()
                        codes.append(await process.wait())
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(other())

            async def main():
                theirs = sigaction()
                assert theirs[0] > 1
                async with anyreap.open_reaper(heartbeat=3600) as reaper:
                    assert reaper.statistics().source == "pidfd"
                    with anyio.fail_after(15):
                        assert (await reaper.wait(exits_with(6))).exit_code == 6
                try:
                    async with anyreap.open_reaper(source="sigchld"):
                        raise AssertionError("opened")
                except anyreap.SigchldUnavailable as exc:
                    assert "from C" in str(exc) and "source='pidfd'" in str(exc), exc
                assert sigaction() == theirs

            thread = threading.Thread(target=elsewhere)
            thread.start()
            started.wait(20)
            for host in (HOSTS[0], HOSTS[2]):
                anyio.run(main, backend=host.backend, backend_options=host.options)
            release.set()
            thread.join()
            assert codes == [5], codes
            """
        )
    )


@on_the_self_pipe
@in_a_real_run
async def test_somebody_else_sets_the_wakeup_fd(source: Any) -> None:
    """Another library sets its own wakeup fd while we run: exits are noticed within a heartbeat, also
    of a worker thread's children, and theirs is left, also at the end (F8, field bug 10).
    """
    with foreign_pipe() as theirs:
        async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
            found = signal.set_wakeup_fd(theirs.write_fileno())
            for code in (7, 8):
                with Gate() as gate, child_of_a_worker(gate, code) as pid, anyio.fail_after(BOUND):
                    assert (await reaper.wait(pid)).exit_code == code
                assert wakeup_fd() == theirs.write_fileno()
            assert theirs.drain()
        assert wakeup_fd() == theirs.write_fileno()
        # trio's is given back to trio, as its owner would; on asyncio it was ours, and is closed
        trios = found if source_host_is_trio() else -1
        signal.set_wakeup_fd(trios, warn_on_full_buffer=trios == -1)


def source_host_is_trio() -> bool:
    """Whether the running loop is trio's."""
    import sniffio

    return sniffio.current_async_library() == "trio"


@on_plain_asyncio
@in_a_real_run
async def test_asyncio_resets_the_wakeup_fd(source: Any) -> None:
    """The `remove_signal_handler` of asyncio sets the wakeup fd to -1: the exit of a worker's child
    is noticed within a heartbeat, which lends ours again (F9, 0.4).
    """
    loop = asyncio.get_running_loop()
    async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
        ours = wakeup_fd()
        assert ours in open_fds()
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)
        assert wakeup_fd() not in (-1, ours)
        loop.remove_signal_handler(signal.SIGUSR1)
        assert wakeup_fd() == -1
        with Gate() as gate, child_of_a_worker(gate) as pid, anyio.fail_after(BOUND):
            assert (await reaper.wait(pid)).exit_code == 7
        await until(lambda: wakeup_fd() == ours)


@on_plain_asyncio
@in_a_real_run
async def test_asyncio_resets_the_wakeup_fd_that_was_found(source: Any) -> None:
    """As before, where asyncio had its own wakeup fd already when the reaper was opened (F9)."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: None)
    async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
        loop.remove_signal_handler(signal.SIGUSR1)
        assert wakeup_fd() == -1
        for code in (7, 8):
            with Gate() as gate, child_of_a_worker(gate, code) as pid, anyio.fail_after(BOUND):
                assert (await reaper.wait(pid)).exit_code == code
        await until(lambda: wakeup_fd() != -1)
    assert wakeup_fd() == -1


@on_the_self_pipe
def test_signal_during_install_and_restore(host: Host) -> None:
    """A SIGCHLD that arrives during each single rt_sigaction of installing and restoring is not lost to
    the handler that was found, and crashes nobody (F21).
    """
    if not _can_trace():
        pytest.skip("strace is missing, or ptrace is not allowed")
    done = run_alone(
        """
        calls = []
        def theirs(signum, frame):
            calls.append(signum)

        async def main():
            for found in (theirs, signal.SIG_DFL):
                signal.signal(signal.SIGCHLD, found)
                before = signal.getsignal(signal.SIGCHLD), sigaction()
                async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                    if found is theirs:
                        assert calls
                        calls.clear()
                    with anyio.fail_after(15):
                        assert (await reaper.wait(exits_with(7))).exit_code == 7
                    calls.clear()
                if found is theirs:
                    assert calls
                    calls.clear()
                assert (signal.getsignal(signal.SIGCHLD), sigaction()) == before
        run(main)
        """,
        host,
        wrapper=(
            "strace",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=rt_sigaction",
            "-e",
            "inject=rt_sigaction:signal=SIGCHLD",
        ),
    )
    assert said(done.stderr) == ""


def _can_trace() -> bool:
    try:
        done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


# Several reapers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first", "last"])
@in_a_real_run
async def test_two_reapers_closed_in_any_order(source: Any, order: str) -> None:
    """Of two reapers, closed in the order they were opened or the other way round, the one that is left
    still hears, and the last one puts all back (I4, 0.13).
    """
    before = (signal.getsignal(CHLD), sigaction(), open_fds())
    blocks = [anyreap.open_reaper(source=source, heartbeat=NEVER) for _ in range(2)]
    reapers = [await block.__aenter__() for block in blocks]
    with anyio.fail_after(BOUND):
        for code, reaper in enumerate(reapers):
            assert (await reaper.wait(exits_with(code))).exit_code == code
        gone = 0 if order == "first" else 1
        await blocks.pop(gone).__aexit__(None, None, None)
        reapers.pop(gone)
        with Gate() as gate, child_of_a_worker(gate) as pid:
            assert (await reapers[0].wait(pid)).exit_code == 7
        assert reapers[0].statistics().late == 0
    await blocks[0].__aexit__(None, None, None)
    assert (signal.getsignal(CHLD), sigaction(), open_fds()) == before


# Warnings that were made errors ----------------------------------------------------------------------


async def test_warning_as_error_at_opening_ignored(source: Any) -> None:
    """Under `-W error` a reaper that finds SIGCHLD ignored is not opened, and leaves nothing (I6)."""
    with sigchld_found():
        signal.signal(CHLD, signal.SIG_IGN)
        before = (signal.getsignal(CHLD), sigaction(), open_fds())
        with pytest.raises(RuntimeWarning, match="SIGCHLD is ignored"):
            async with anyreap.open_reaper(source=source):
                raise AssertionError
        assert (signal.getsignal(CHLD), sigaction(), open_fds()) == before


@on_the_self_pipe
async def test_warning_as_error_at_opening_blocked(source: Any) -> None:
    """Under `-W error` a reaper that finds SIGCHLD blocked is not opened, and leaves nothing (I6)."""
    with sigchld_blocked():
        before = (signal.getsignal(CHLD), sigaction(), open_fds())
        with pytest.raises(RuntimeWarning, match="SIGCHLD is blocked"):
            async with anyreap.open_reaper(source=source):
                raise AssertionError
        assert (signal.getsignal(CHLD), sigaction(), open_fds()) == before


@on_the_self_pipe
@in_a_real_run
async def test_warning_as_error_while_running(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Under `-W error` the warning of a heartbeat is logged, once, and neither ends the service nor the
    shutdown of the block (I6, promise 8).
    """
    with sigchld_found():
        async with anyreap.open_reaper(source=source, heartbeat=SOON) as reaper:
            set_sigaction(0, 0)
            for code in (3, 4):
                with Gate() as gate, Worker(gate.open), anyio.fail_after(BOUND):
                    assert (await reaper.wait(gate.add(f"exit {code}"))).exit_code == code
    assert [(each.name, each.levelname) for each in caplog.records] == [("anyreap", "WARNING")]
    assert "another SIGCHLD handler" in caplog.text


# The choice of a source ------------------------------------------------------------------------------


@on_auto
async def test_auto_in_the_main_thread(host: Host, source: Any) -> None:
    """In the main thread "auto" is the self-pipe on trio and asyncio, and pidfds on uvloop (I7)."""
    async with anyreap.open_reaper(source=source) as reaper:
        expected = "pidfd" if host.options.get("use_uvloop") else "sigchld"
        assert reaper.statistics().source == expected
        assert lowlevel.is_default_handler() is (expected == "pidfd")
        with anyio.fail_after(BOUND):
            assert (await reaper.wait(exits_with(3))).exit_code == 3


@on_auto
def test_auto_in_another_thread(host: Host) -> None:
    """In another thread "auto" is pidfds, and touches no handler (I1)."""

    async def main() -> str:
        async with anyreap.open_reaper(heartbeat=NEVER) as reaper:
            assert lowlevel.is_default_handler()
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3
            return reaper.statistics().source

    run = functools.partial(anyio.run, main, backend=host.backend, backend_options=host.options)
    assert in_a_thread(run) == "pidfd"


@pytest.mark.parametrize("python", [False, True])
def test_auto_with_a_handler_from_c(*, python: bool) -> None:
    """With a handler that was installed from C "auto" is pidfds, also where Python's table shows a
    Python handler in its stead; "sigchld" is refused, and the handler stays.
    """
    alone(
        f"""
        def theirs(signum, frame):
            pass
        if {python}:
            signal.signal(signal.SIGCHLD, theirs)
        in_table = signal.getsignal(signal.SIGCHLD)
        address = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value
        set_sigaction(address, SA_RESTART | SA_NOCLDWAIT * 0)
        before = sigaction()

        async def main():
            async with anyreap.open_reaper(heartbeat=3600) as reaper:
                assert reaper.statistics().source == "pidfd"
                with anyio.fail_after(15):
                    assert (await reaper.wait(exits_with(3))).exit_code == 3
            fds = open_fds()
            try:
                async with anyreap.open_reaper(source="sigchld"):
                    raise AssertionError("opened")
            except anyreap.SigchldUnavailable as exc:
                assert "from C" in str(exc) or "uvloop" in str(exc), exc
                assert "source='pidfd'" in str(exc), exc
            assert open_fds() == fds

        for host in (HOSTS[0], HOSTS[2], HOSTS[4]):
            anyio.run(main, backend=host.backend, backend_options=host.options)
            assert sigaction() == before, (host, sigaction(), before)
            assert signal.getsignal(signal.SIGCHLD) is in_table
        """
    )


@on_auto
async def test_auto_where_python_knows_no_handler(host: Host, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `signal.getsignal` gives None (a handler from before Python was embedded) "auto" is pidfds."""
    monkeypatch.setattr(signal, "getsignal", lambda signum: None)
    async with anyreap.open_reaper(source=source) as reaper:
        assert reaper.statistics().source == "pidfd"


@on_auto
async def test_auto_without_pidfds(host: Host, source: Any, no_pidfds: None) -> None:
    """Without pidfds "auto" is the self-pipe where that can work, and an error with the remedy else."""
    if host.options.get("use_uvloop"):
        with pytest.raises(anyreap.SigchldUnavailable, match=r"uvloop.*source='pidfd'"):
            async with anyreap.open_reaper(source=source):
                raise AssertionError
    else:
        async with anyreap.open_reaper(source=source, heartbeat=NEVER) as reaper:
            assert reaper.statistics().source == "sigchld"
            with anyio.fail_after(BOUND):
                assert (await reaper.wait(exits_with(3))).exit_code == 3


@on_auto
async def test_auto_without_pidfds_and_blocked(source: Any, no_pidfds: None) -> None:
    """No pidfds, and SIGCHLD blocked: an error whose text names the remedies."""
    with sigchld_blocked(), pytest.raises(anyreap.SigchldUnavailable) as caught:
        async with anyreap.open_reaper(source=source):
            raise AssertionError
    assert "source='pidfd'" in str(caught.value)
    assert "Linux >= 5.4" in str(caught.value)
    assert lowlevel.is_default_handler()


@on_auto
def test_auto_without_pidfds_in_another_thread(host: Host, no_pidfds: None) -> None:
    """No pidfds, and not the main thread: an error whose text names the remedies."""

    async def main() -> None:
        async with anyreap.open_reaper():
            raise AssertionError

    with pytest.raises(anyreap.SigchldUnavailable, match=r"main thread.*source='pidfd'"):
        in_a_thread(functools.partial(anyio.run, main, backend=host.backend, backend_options=host.options))


def test_auto_without_pidfds_and_a_handler_from_c() -> None:
    """No pidfds, and a handler that was installed from C: an error whose text names the remedies."""
    alone(
        """
        from anyreap import _kernel
        _kernel._usable = False
        set_sigaction(ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value, 0)
        before = sigaction()

        async def main():
            try:
                async with anyreap.open_reaper():
                    raise AssertionError("opened")
            except anyreap.SigchldUnavailable as exc:
                assert "from C" in str(exc) and "source='pidfd'" in str(exc), exc

        for host in (HOSTS[0], HOSTS[2]):
            anyio.run(main, backend=host.backend, backend_options=host.options)
            assert sigaction() == before
        """
    )


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2], HOSTS[4]], ids=str)
@in_a_real_run
async def test_pidfd_without_pidfds(host: Host, no_pidfds: None) -> None:
    """Where there are no pidfds, source="pidfd" looks once in a heartbeat, without a handler
    (promise 5).
    """
    async with anyreap.open_reaper(source="pidfd", heartbeat=SOON) as reaper:
        assert lowlevel.is_default_handler()
        with Gate() as gate, Worker(gate.open), anyio.fail_after(BOUND):
            assert (await reaper.wait(gate.add("exit 3"))).exit_code == 3


@pytest.mark.parametrize("host", [Host(*UVLOOP, "sigchld")], ids=str)
async def test_sigchld_under_uvloop(source: Any) -> None:
    """Asking for "sigchld" under uvloop is an error that names the remedy; nothing was installed."""
    before = (sigaction(), open_fds())
    with pytest.raises(anyreap.SigchldUnavailable, match=r"uvloop.*source='pidfd'"):
        async with anyreap.open_reaper(source=source):
            raise AssertionError
    assert lowlevel.is_default_handler()
    assert (sigaction(), open_fds()) == before


@on_the_self_pipe
def test_sigchld_in_another_thread(host: Host) -> None:
    """Asking for "sigchld" in another thread is an error that names the remedy; nothing was installed."""

    async def main() -> None:
        before = open_fds()
        try:
            async with anyreap.open_reaper(source="sigchld"):
                raise AssertionError
        finally:
            assert open_fds() == before

    with pytest.raises(anyreap.SigchldUnavailable, match=r"main thread.*source='pidfd'"):
        in_a_thread(functools.partial(anyio.run, main, backend=host.backend, backend_options=host.options))
    assert lowlevel.is_default_handler()


@on_the_self_pipe
def test_gil_held_in_c(host: Host) -> None:
    """H6: C code holds the GIL while a child ends: nothing of Python's can run; noticed right after, by
    the signal, no heartbeat comes.
    """
    alone(
        """
        import ctypes
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with Gate() as gate, anyio.fail_after(15):
                    child = reaper.watch(gate.add("exit 7"))
                    await anyio.lowlevel.checkpoint()
                    gate.open()
                    ctypes.PyDLL(None).usleep(300_000)
                    await_death(child.pid)
                    assert child.status is None
                    assert (await child.wait()).exit_code == 7
                    assert reaper.statistics().late == 0
        run(main)
        """,
        host,
    )


@on_the_self_pipe
async def test_no_memory_in_the_handler(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """N7: a handler that has no memory to write its byte raises nothing into whatever the program was
    doing; the heartbeat finds the exit.
    """
    written, failed = os.write, 0

    def write(fd: int, data: bytes) -> int:
        nonlocal failed
        if any(fd == pipe.write_fileno() for pipe in pipes):
            failed += 1
            raise MemoryError
        return written(fd, data)

    async with anyreap.open_reaper(source=source, heartbeat=0.1) as reaper:
        installed = _sigchld._installed
        assert installed is not None
        pipes = installed.pipes
        with monkeypatch.context() as patch, anyio.fail_after(BOUND):
            patch.setattr(os, "write", write)
            pid = exits_with(7)
            assert (await reaper.wait(pid)).exit_code == 7
        assert failed
        assert (await reaper.wait(exits_with(8))).exit_code == 8


@on_the_self_pipe
async def test_log_that_raises(source: Any) -> None:
    """N6: warnings are errors here, so what there is to say goes to the log, whose handler raises:
    no status is lost by that, and the service goes on.
    """

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            raise ValueError("the disk is full")

    lines: list[str] = []
    log, handler = logging.getLogger("anyreap"), Raising()
    log.addHandler(handler)
    try:
        with sigchld_found():
            async with anyreap.open_reaper(source=source, heartbeat=0.05) as reaper:
                signal.signal(CHLD, lambda *_: None)  # in the place of ours, and it does not call it
                for code in (7, 8):
                    with anyio.fail_after(BOUND):
                        assert (await reaper.wait(exits_with(code))).exit_code == code
    finally:
        log.removeHandler(handler)
    assert len(lines) == 1
    assert "took the place of anyreap's" in lines[0]


def test_no_signal_is_noted_for_a_handler_that_is_gone() -> None:
    """A thread is in the handler while the main thread takes it out: Python does not complain of a signal without
    a handler ("ignored due to race condition"), however often.
    """
    done = run_alone(
        """
        import threading
        from anyreap import lowlevel
        complaints = []
        sys.unraisablehook = lambda info: complaints.append(info.exc_value)
        end_of_thread, ends_thread = os.pipe()
        thread = threading.Thread(target=os.read, args=(end_of_thread, 1))
        thread.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # so that it goes to the thread
        parent = os.getpid()
        senders = []
        for _ in range(3):  # more than there are processors, or so: a thread in a handler is put aside
            senders.append(os.fork())
            if senders[-1] == 0:
                while os.getppid() == parent:
                    os.kill(parent, signal.SIGCHLD)
                os._exit(0)
        with lowlevel.SelfPipe() as pipe:
            for _ in range(3000):
                lowlevel.install_handler(pipe.write_fileno())
                lowlevel.install_handler(-1)
        for sender in senders:
            end(sender)
        os.write(ends_thread, b"x")
        thread.join()
        print(len(complaints))
        """,
        flags=(),
    )
    assert done.stdout == "0\n"
