"""SIGCHLD: the self-pipe, the one handler of this process, the wakeup fd, and what a fork does to them.

The only place that calls `signal.signal`, `signal.siginterrupt` and `signal.set_wakeup_fd`. It is the ancestor
`twisted.internet._signals` with its faults mended; in short:

- the previous handler is chained, and put back with its flags, but only where ours is still in place;
- a foreign wakeup fd is neither replaced nor reset;
- a full pipe is silent: a byte is a hint and no datum, one is as good as a thousand;
- a forked child neither runs our handler nor writes into our pipe.

Why a Python handler *and* a wakeup fd. A Python handler runs in the main thread, when the interpreter gets round to
it. Does a signal that arrives while the main thread sleeps in `epoll_wait` make it get round to it? Only if the kernel
delivers the signal to that very thread (EINTR). It may choose any thread that doesn't block it, and chooses the one
that forked; so an asyncio loop sleeps on (measured: until the next timer). The wakeup fd is written by C, in whatever
thread, and wakes whoever polls it. trio always has one; plain asyncio has none until `add_signal_handler`, so ours is
lent to it. Which fd it is does not matter: it wakes the main thread, the main thread runs the handler, and the
handler writes into every open reaper's pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, Final, Self

from anyreap import _kernel
from anyreap._errors import SigchldUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType


class SelfPipe:
    """A pipe that a program writes to itself, to make a signal something that can be waited for like any other I/O.

    Non-blocking at both ends and close-on-exec (`man 7 pipe`; D. J. Bernstein, "The self-pipe trick"). What is in it
    carries no meaning: readable means "look again". Not a stream: bytes may be dropped when it is full.

    Raises:
        OSError: The pipe could not be made (EMFILE, ENFILE).

    Example:
        ```python
        import anyreap.lowlevel

        with anyreap.lowlevel.SelfPipe() as pipe:
            pipe.wake()
            pipe.wake()
            assert pipe.drain() == 2  # bytes; now it is not readable any more
        ```
    """

    __slots__ = ("_inode", "_read", "_write")

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else _pipe()
        self._inode = os.fstat(self._read).st_ino

    def fileno(self) -> int:
        """Return the read end, the one to wait on; -1 once it is closed."""
        return self._read

    def write_fileno(self) -> int:
        """Return the write end, the one for `signal.set_wakeup_fd`; -1 once it is closed."""
        return self._write

    def wake(self) -> None:
        """Make the read end readable. For signal handlers and other threads: one `write(2)`, no lock.

        Silent when the pipe is full (it is readable then) and when it is closed (nobody waits then).
        """
        # A number that was closed may be somebody's file by now, so it is looked up each time and never kept.
        try:  # not suppress(), which makes an object: a signal handler shall need no memory
            if self._write >= 0:
                os.write(self._write, b"\0")
        except (OSError, MemoryError):  # the second in the middle of somebody's program: the heartbeat has to do
            pass

    def drain(self) -> int:
        """Read all that is in the pipe. Returns the number of bytes."""
        return len(self.read())

    def read(self) -> bytes:
        """Read and return all that is in the pipe: zeros from `wake`, signal numbers from a wakeup fd."""
        data = b""
        try:
            while chunk := os.read(self._read, 65536):
                data += chunk
                if len(chunk) < 65536:
                    break
        except OSError:  # empty; or closed behind our back, which the heartbeat notices
            pass
        return data

    def is_intact(self) -> bool:
        """Whether both numbers still are the two ends of this pipe: somebody may have closed them (`os.closerange`)."""
        return self._is_mine(self._read) and self._is_mine(self._write)

    def _is_mine(self, fd: int) -> bool:
        try:
            return os.fstat(fd).st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        """Close both ends. Does nothing the second time."""
        # The number is forgotten before it is closed: a handler that runs in between must not find it.
        read, write = self._read, self._write
        self._read = self._write = -1
        for fd in (write, read):
            if fd >= 0 and self._is_mine(fd):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pipe() -> tuple[int, int]:
    # macOS has no pipe2(). Python's os.pipe() is close-on-exec already (PEP 446).
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    return read, write


# ---------------------------------------------------------------------------------------------------------------------
# The disposition, as the kernel has it. `signal.getsignal` shows Python's table: it can't see a handler that was
# installed from C, nor the flags (SA_RESTART, SA_NOCLDWAIT), and `signal.signal` clears them. So "put back what was
# found" takes sigaction(2) itself. Where its layout is not known, Python's view has to do.


class _SigactionLinux(ctypes.Structure):
    # struct sigaction of glibc and of musl, on every architecture but MIPS.
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


class _SigactionDarwin(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint32),
        ("flags", ctypes.c_int),
    ]


_Sigaction: Final[type[ctypes.Structure] | None] = (
    _SigactionLinux
    if sys.platform == "linux" and not os.uname().machine.startswith("mips")
    else _SigactionDarwin
    if sys.platform == "darwin"
    else None
)


@functools.cache
def _sigaction() -> Callable[..., int] | None:
    if _Sigaction is None:
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).sigaction
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.POINTER(_Sigaction), ctypes.POINTER(_Sigaction)]
    function.restype = ctypes.c_int
    return function


def _disposition() -> Any:
    """The struct sigaction of SIGCHLD, or None where it can't be read."""
    function = _sigaction()
    if function is None or _Sigaction is None:
        return None
    found = _Sigaction()
    return found if function(signal.SIGCHLD, None, ctypes.byref(found)) == 0 else None


def _dispose(wanted: Any) -> None:
    function = _sigaction()
    if function is not None and wanted is not None:
        function(signal.SIGCHLD, ctypes.byref(wanted), None)


# ---------------------------------------------------------------------------------------------------------------------


class _Installed:
    """Our handler, from its installation to its removal.

    A new object each time, with the handler as its method. Were it one function with its state beside it, somebody who
    chains to us and stays would lead back into itself after the next installation.
    """

    def __init__(self) -> None:
        self.pipes: tuple[SelfPipe, ...] = ()
        self.waking = False
        self.pid = os.getpid()
        self.found_action = _disposition()
        self.found: Any = signal.getsignal(signal.SIGCHLD)
        self.plain = False  # wanted by install_handler, which has no pipe of ours
        self.lent = -1
        self.lends = False
        signal.signal(signal.SIGCHLD, self.handle)
        signal.siginterrupt(signal.SIGCHLD, False)  # noqa: FBT003  (it takes no keyword)
        self.action = _disposition()

    def hides_a_c_handler(self) -> bool:
        """Whether what was found looked like a Python handler to Python, and was not: it had been replaced from C."""
        if not callable(self.found) or self.action is None or self.found_action is None:
            return False
        return self.found_action.handler not in (None, _SIG_IGN, self.action.handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Write one byte into each open reaper's pipe, then call the handler that was found."""
        # A signal that comes while this runs calls it again from within, and whoever sends them faster than it runs, as
        # any child can (`while kill -CHLD $PPID`), would nest it until the RecursionError, in whatever the program was
        # doing. Blocking the signal meanwhile would do, but the mask is not ours to change. So the inner call returns
        # at once, which leaves no time to speak of for the next one. Nothing is lost: the pipes are drained in this
        # very thread, so after this call, and the sweep that follows is later than either signal.
        if self.waking:
            return
        # Ours first: the one that was found may raise. In a child that was forked past Python's back (C code that
        # calls fork), where nobody could restore anything, the pipes are the parent's.
        if self.pid == os.getpid():
            self.waking = True
            try:
                for pipe in self.pipes:
                    pipe.wake()
            finally:
                self.waking = False
        if callable(self.found):
            self.found(signum, frame)

    def in_place(self) -> bool:
        """Whether ours is still the handler, as Python sees it and as the kernel does."""
        # == and not "is": each access to a method makes a new object
        if signal.getsignal(signal.SIGCHLD) != self.handle:
            return False
        action = _disposition()
        return action is None or self.action is None or action.handler == self.action.handler

    def remove(self) -> bool:
        """Put back what was found; False if somebody else's handler is in place, which is left to them."""
        if signal.getsignal(signal.SIGCHLD) != self.handle:
            return False
        action = _disposition()
        ours = action is None or self.action is None or action.handler == self.action.handler
        if self.found is not None:
            # Python complains on stderr of a signal that it has noted and has no handler for by then ("ignored due to
            # race condition"). So the kernel is told first, after which none comes; what another thread is about to
            # note is waited for; and what was noted is handled by ours, in the call that follows, before that takes it
            # out.
            if ours and not callable(self.found):
                _dispose(self.found_action)
                _let_handlers_end()
            try:
                signal.signal(signal.SIGCHLD, self.found)
            except BaseException:  # of another handler, which that call runs as well: ours is in place still
                if ours:
                    _dispose(self.action)
                raise
        # From Python's table our handler is gone either way. What the kernel calls is the one that was found, with its
        # flags, or the one that somebody installed from C after us.
        _dispose(self.found_action if ours else action)
        return ours

    def lend(self) -> None:
        """Lend a pipe as the wakeup fd, if there is none: see the module's docstring.

        There is no call that tells the wakeup fd without setting it. So ours is set, and one that is found is put back
        at once, along with what fell into ours meanwhile: asyncio dispatches its signals by the bytes. It gets the flag
        `warn_on_full_buffer` that asyncio gives it, which can't be read either; hence it is not looked for again
        until there is a sign that nothing wakes us.
        """
        pipe = next((pipe for pipe in self.pipes if pipe.is_intact()), None)
        if pipe is None:  # somebody closed it, and its owner has not noticed yet
            return
        if _trio_runs():  # as a guest of this loop: its own is there, and set with a flag that can't be put back
            return
        self.lent = pipe.write_fileno() if self._exchange(pipe) else -1

    def take_back(self, pipe: SelfPipe) -> None:
        """Take the wakeup fd back, if ours is still set: to none, for it was lent only where there was none."""
        self.lent = -1
        if pipe.is_intact():
            if self._exchange(pipe):
                signal.set_wakeup_fd(-1)
        elif (found := signal.set_wakeup_fd(-1)) not in (-1, pipe.write_fileno()):  # it can't be set any more
            _set_wakeup_fd(found)

    def _exchange(self, pipe: SelfPipe) -> bool:
        """Set a pipe as the wakeup fd; False, and all as it was, if somebody's is set. At no moment is there none."""
        hinted = pipe.drain()  # of no meaning to asyncio: from before
        found = signal.set_wakeup_fd(pipe.write_fileno(), warn_on_full_buffer=False)
        ours = found == -1 or any(found == each.write_fileno() for each in (pipe, *self.pipes))
        if not ours and not _set_wakeup_fd(found):  # closed by its owner, who did not take it back: as good as none
            ours = True
        if not ours:
            strays = pipe.read()
            hinted += len(strays)
            if strays := strays.replace(b"\0", b""):
                with contextlib.suppress(OSError):
                    os.write(found, strays)
        if hinted:
            pipe.wake()
        return ours


def _let_handlers_end() -> None:
    """Wait until no other thread is in the C part of a SIGCHLD handler: a few instructions, in which it may be put
    aside on a busy machine. Bounded, for a thread that computes with the signal blocked looks the same.
    """
    if threading.active_count() == 1:  # as far as Python knows. Others are rare, and all that is at stake is a message
        return
    end = time.monotonic() + 0.02
    while _kernel.others_handle(signal.SIGCHLD) and time.monotonic() < end:
        time.sleep(0.0001)


def _set_wakeup_fd(fd: int) -> bool:
    try:
        signal.set_wakeup_fd(fd)
    except (ValueError, OSError):  # it is closed, or has been made blocking
        return False
    return True


_SIG_IGN: Final = 1
_C_HANDLER: Final = (
    "a handler that was installed from C is in place, which Python can neither chain nor see: write source='pidfd'"
)

_installed: _Installed | None = None
_warned = False


def unavailable() -> str:
    """Why a SIGCHLD handler can't work here, in a sentence with the remedy; "" if it can."""
    if threading.current_thread() is not threading.main_thread():
        return (
            "a signal handler can be installed only from the main thread, and this is another one: open the reaper in"
            " the main thread, or write source='pidfd'"
        )
    if _loop_is_uvloop():
        return (
            "under uvloop a Python SIGCHLD handler and libuv's destroy each other: write source='pidfd', or run on"
            " plain asyncio or trio"
        )
    handler = signal.getsignal(signal.SIGCHLD)
    if handler is None or (not callable(handler) and _kernel.signal_set("SigCgt", signal.SIGCHLD)):
        return _C_HANDLER
    return ""


def blocked() -> bool:
    """Whether SIGCHLD is blocked in this thread."""
    return signal.SIGCHLD in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _loop_is_uvloop() -> bool:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    return bool(type(loop).__module__.partition(".")[0] == "uvloop")


def _trio_runs() -> bool:
    lowlevel = getattr(sys.modules.get("trio"), "lowlevel", None)
    in_trio_run = getattr(lowlevel, "in_trio_run", None)  # trio >= 0.23
    return in_trio_run is not None and bool(in_trio_run())


def subscribe(pipe: SelfPipe, *, lend: bool) -> None:
    """Have a pipe written to at every SIGCHLD; the first one installs the handler.

    Args:
        pipe: The pipe.
        lend: Whether the loop may lack a wakeup fd of its own (asyncio does, trio doesn't).

    Raises:
        SigchldUnavailable: It can't work here. Nothing was installed.
    """
    global _installed, _warned
    if why := unavailable():
        raise SigchldUnavailable("no SIGCHLD self-pipe here: " + why)
    installed = _installed or _Installed()
    if _installed is None and installed.hides_a_c_handler():
        installed.remove()
        signal.raise_signal(signal.SIGCHLD)  # for whom it was meant, had one come meanwhile
        raise SigchldUnavailable("no SIGCHLD self-pipe here: " + _C_HANDLER)
    if not installed.pipes:
        _warned = False
    installed.pipes += (pipe,)
    _installed = installed
    if lend:
        installed.lends = True
        installed.lend()


def unsubscribe(pipe: SelfPipe) -> bool:
    """Take a pipe out again, in any order; the last one puts back what the first one found.

    Returns:
        Whether the pipe can be closed. Not if this is the wrong thread to take it back as the wakeup fd: a block that
        was thrown away is ended by whichever thread collects garbage. Then the next reaper puts things right.
    """
    installed = _installed
    if installed is None or pipe not in installed.pipes:
        return True
    lent = installed.lent >= 0 and installed.lent == pipe.write_fileno()
    installed.pipes = tuple(other for other in installed.pipes if other is not pipe)
    if threading.current_thread() is not threading.main_thread():
        return not lent
    if lent:
        installed.take_back(pipe)
        if installed.pipes:
            installed.lend()
    _remove_if_unused()
    return True


def _remove_if_unused() -> None:
    global _installed
    if _installed is not None and not _installed.pipes and not _installed.plain:
        gone, _installed = _installed, None
        if not gone.remove():
            _warn_replaced()


def refresh(*, late: bool) -> None:
    """Once in a heartbeat: lend the wakeup fd again if asyncio has reset it; say so once if our handler is gone.

    Args:
        late: Whether the heartbeat has just found an exit that no signal told of.
    """
    if _installed is None or not _installed.pipes:
        return
    if _installed.lends:
        _installed.lend()
    if _installed.in_place():
        signal.siginterrupt(signal.SIGCHLD, False)  # noqa: FBT003  (who sets it back, as trio does, clears SA_RESTART)
    elif late:
        _warn_replaced()


def _warn_replaced() -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warn(
        "another SIGCHLD handler took the place of anyreap's while a reaper was open; it is left alone. Exits are seen"
        " up to one heartbeat late meanwhile. Let it call the handler that it found, or open the reaper with"
        " source='pidfd'."
    )


def warn(text: str) -> None:
    """Warn, and never raise: neither a warning that was made an error nor a log that fails must end the service."""
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except Exception:  # noqa: BLE001  (an error by a filter, or what somebody's `warnings.showwarning` raises)
        import logging  # noqa: PLC0415  (it takes as long to import as all of this package, for what hardly ever comes)

        with contextlib.suppress(Exception):
            logging.getLogger("anyreap").warning(text)


# ---------------------------------------------------------------------------------------------------------------------
# The ancestor's two functions.

_wakeup: tuple[int, int] = (-1, -1)  # the one that was set here, and the one that was found


def install_handler(fd: int) -> int:
    """Have a byte written to a file descriptor at every SIGCHLD; -1 undoes it.

    The ancestor's `installHandler`, with the same meaning: a Python handler that does nothing (without one the kernel
    tells nobody), `siginterrupt(SIGCHLD, False)` so that system calls go on, and `set_wakeup_fd(fd)`. What it got
    wrong is mended: a Python handler that was there is still called; and -1 puts handler, flags and wakeup fd back as
    they were found, unless somebody has changed them since, who then keeps them.

    `open_reaper` needs none of this. Main thread only. Not under trio, which has a wakeup fd of its own.

    Args:
        fd: The write end of a non-blocking pipe or socket, or -1.

    Returns:
        The wakeup fd that was in place before the call, -1 for none.

    Raises:
        ValueError: The fd is blocking, or this is not the main thread. Nothing was installed.
        OSError: The fd is not open. Nothing was installed.

    Example:
        ```python
        import os, select
        from anyreap import lowlevel

        with lowlevel.SelfPipe() as pipe:
            lowlevel.install_handler(pipe.write_fileno())
            pid = os.posix_spawn("/bin/true", ["true"], {})
            select.select([pipe], [], [])
            lowlevel.install_handler(-1)
            assert lowlevel.reap(pid).success
        ```
    """
    global _installed, _wakeup
    plain = _installed is not None and _installed.plain
    if fd != -1:
        found = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)  # first: it is the one that can fail
        _installed = _installed or _Installed()
        _installed.plain = True
        if found == _installed.lent:  # a reaper's, lent because there was none: now there is one
            _installed.lent = found = -1
        _wakeup = (fd, _wakeup[1] if plain else found)
        return found
    if not plain or _installed is None:
        found = signal.set_wakeup_fd(-1)
        if found != -1:
            signal.set_wakeup_fd(found)  # nobody's but theirs
        return found
    (ours, before), _wakeup = _wakeup, (-1, -1)
    found = signal.set_wakeup_fd(-1)
    back = before if found == ours else found
    if back != -1:
        _set_wakeup_fd(back)
    _installed.plain = False
    if _installed.pipes and _installed.lends:
        _installed.lend()
    _remove_if_unused()
    return found


def is_default_handler() -> bool:
    """Whether SIGCHLD has its default disposition, as far as Python can see: the ancestor's `isDefaultHandler`.

    A handler that was installed from C is invisible to it (see `signal.getsignal`).

    Example:
        ```python
        from anyreap import lowlevel

        assert lowlevel.is_default_handler()
        ```
    """
    return signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


# ---------------------------------------------------------------------------------------------------------------------
# Fork.


def forked() -> None:
    """In a forked child: restore what was found, and forget the rest. The pipes are closed by who owns them."""
    global _installed, _wakeup
    (ours, _), _wakeup = _wakeup, (-1, -1)
    installed, _installed = _installed, None
    mine = {-1, ours, -1 if installed is None else installed.lent}
    if mine != {-1}:
        # A wakeup fd that the parent still reads is no place for this process's signals.
        found = signal.set_wakeup_fd(-1)
        if found not in mine:
            _set_wakeup_fd(found)
    if installed is not None:
        pipes = installed.pipes
        installed.remove()
        for pipe in pipes:
            pipe.close()
