"""What the tests share: real children, gates to let them go at a chosen moment, and looks at the operating system.

Nothing here sleeps to let something happen: children are released through pipes, and their deaths are confirmed with
`waitid(WNOWAIT)`, which consumes nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import anyio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

SHELL = "/bin/sh"


class Host(NamedTuple):
    """A backend of anyio, its options, and a source of wake-ups that works on it."""

    backend: str
    options: dict[str, Any]
    source: Any

    def __str__(self) -> str:
        name = "uvloop" if self.options.get("use_uvloop") else self.backend
        return f"{name}-{self.source}"


TRIO: tuple[str, dict[str, Any]] = ("trio", {})
ASYNCIO: tuple[str, dict[str, Any]] = ("asyncio", {"use_uvloop": False})
UVLOOP: tuple[str, dict[str, Any]] = ("asyncio", {"use_uvloop": True})

# Under uvloop the self-pipe can't work: libuv's handler and ours destroy each other.
HOSTS = (
    Host(*TRIO, "sigchld"),
    Host(*TRIO, "pidfd"),
    Host(*ASYNCIO, "sigchld"),
    Host(*ASYNCIO, "pidfd"),
    Host(*UVLOOP, "pidfd"),
)


def beat(source: str, *, pidfds: bool = True) -> float:
    """A heartbeat that can't be what finds an exit, unless nothing else can: a lost wake-up is a
    hang then.
    """
    return 0.01 if source == "pidfd" and not pidfds else 3600.0


# Starting children ---------------------------------------------------------------------------------------------------


def sh(script: str) -> int:
    """Start a shell with a script. Returns its pid."""
    return os.posix_spawn(SHELL, ["sh", "-c", script], os.environ)


def exits_with(code: int) -> int:
    """Start a child that exits with a code at once."""
    return sh(f"exit {code}")


def sleeper() -> int:
    """Start a child that runs until it is signalled."""
    return os.posix_spawn("/bin/sleep", ["sleep", "3600"], os.environ)


class Gate:
    """Children that block on one pipe, and all go on when it is opened.

    Started with `os.posix_spawn`, never with a bare fork: forked siblings would inherit the write end, and no one of
    them would ever see it closed.
    """

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self.pids: list[int] = []

    def add(self, script: str = "exit 0") -> int:
        """Start a shell that waits at the gate, then runs a script. Returns its pid."""
        actions = [(os.POSIX_SPAWN_DUP2, self.read, 0)]
        pid = os.posix_spawn(SHELL, ["sh", "-c", "read x; " + script], os.environ, file_actions=actions)
        self.pids.append(pid)
        return pid

    def add_cat(self) -> int:
        """Start the cheapest child there is: it exits with 0 when the gate opens."""
        actions = [
            (os.POSIX_SPAWN_DUP2, self.read, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        ]
        pid = os.posix_spawn("/bin/cat", ["cat"], os.environ, file_actions=actions)
        self.pids.append(pid)
        return pid

    def open(self) -> None:
        """Let all go on. Does nothing the second time."""
        if self.write >= 0:
            write, self.write = self.write, -1
            os.close(write)

    def close(self) -> None:
        """Open it, and close what is left of it."""
        self.open()
        if self.read >= 0:
            read, self.read = self.read, -1
            os.close(read)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def leaves_with(gate: Gate, code: int) -> None:
    """What a forked multiprocessing.Process does: wait at a gate, then exit."""
    os.close(gate.write)
    os.read(gate.read, 1)
    os._exit(code)


def await_death(*pids: int) -> None:
    """Block until children have ended, and leave them zombies."""
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def runs(pid: int) -> bool:
    """Whether a process is alive, and not stopped."""
    return state_of(pid) in {"R", "S", "D"}


def is_zombie(pid: int) -> bool:
    """Whether a child of ours is a zombie."""
    return state_of(pid) == "Z"


def state_of(pid: int) -> str:
    """The state letter of a process, "" if there is none."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    return line[line.rfind(b")") + 2 : line.rfind(b")") + 3].decode()


def collect(pid: int) -> int:
    """Collect a child as its owner would; its returncode as `subprocess` has it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end(pid: int) -> None:
    """Kill and collect a child that a test started; nothing if it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


# Looking at this process ---------------------------------------------------------------------------------------------


def children() -> set[int]:
    """The pids of all children of this process, zombies too, as the kernel lists them."""
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found.update(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
    return found


def open_fds() -> dict[int, str]:
    """The open file descriptors of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listdir used
            continue
    return found


def numbers() -> set[int]:
    """The numbers of the open descriptors."""
    return set(open_fds())


class _Sigaction(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_libc = ctypes.CDLL(None, use_errno=True)

SA_RESTART = 0x10000000
SA_NOCLDWAIT = 2


def sigaction(signum: int = signal.SIGCHLD) -> tuple[int, int]:
    """What the kernel has for a signal: (address of the handler, flags)."""
    found = _Sigaction()
    assert _libc.sigaction(int(signum), None, ctypes.byref(found)) == 0
    return int(found.handler or 0), int(found.flags) & ~0x04000000  # SA_RESTORER: libc's own


def set_sigaction(handler: int, flags: int, signum: int = signal.SIGCHLD) -> None:
    """Install a handler as C code does, past Python's back: 0 for SIG_DFL, 1 for SIG_IGN, or an address."""
    action = _Sigaction()
    action.handler = handler
    action.flags = flags
    assert _libc.sigaction(int(signum), ctypes.byref(action), None) == 0


def wakeup_fd() -> int:
    """The wakeup fd of the main thread. For tests only, outside of any loop: looking at it sets it."""
    found = signal.set_wakeup_fd(-1)
    if found != -1:
        signal.set_wakeup_fd(found)
    return found


class Found(NamedTuple):
    """What a reaper must put back."""

    children: frozenset[int]
    fds: frozenset[int]
    threads: frozenset[str]
    handler: Any
    action: tuple[int, int]
    wakeup: int
    mask: frozenset[int]


def look() -> Found:
    """Look at everything that a reaper must put back. Main thread."""
    return Found(
        children=frozenset(children()),
        fds=frozenset(open_fds()),
        threads=frozenset(thread.name for thread in threading.enumerate()),
        handler=signal.getsignal(signal.SIGCHLD),
        action=sigaction(),
        wakeup=wakeup_fd(),
        mask=frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    )


# A process of its own, for what changes a process for good -----------------------------------------------------------

PRELUDE = """
import faulthandler, gc, os, signal, subprocess, sys, threading, warnings
faulthandler.dump_traceback_later({limit}, exit=True)
# That watchdog is a thread, if only to the kernel, which Python >= 3.12 asks.
warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
import anyio, anyio.lowlevel
import anyreap
from tests import broken
from tests.harness import *
BACKEND, OPTIONS, SOURCE = {backend!r}, {options!r}, {source!r}
def run(main, *args):
    return anyio.run(main, *args, backend=BACKEND, backend_options=OPTIONS)
"""


def run_alone(
    script: str,
    host: Host | None = None,
    *,
    limit: float = 30,
    wrapper: Sequence[str] = (),
    flags: Sequence[str] = ("-X", "dev"),
    expect: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python of its own, with the names of this module, `run(main)`, BACKEND, OPTIONS and SOURCE.

    It fails the test if it hangs longer than the limit (then with all stacks) or ends with another code.
    """
    backend, options, source = host or HOSTS[0]
    code = PRELUDE.format(limit=limit, backend=backend, options=options, source=source) + textwrap.dedent(script)
    done = subprocess.run(
        [*wrapper, sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=limit + 20,
        check=False,
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.DEVNULL,
    )
    done.stderr = said(done.stderr)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def said(stderr: str) -> str:
    """What a process wrote to stderr, without asyncio's words on how slow this machine is."""
    slow = re.compile(r"^Executing <.* took [0-9.]+ seconds\n", re.MULTILINE)
    return slow.sub("", stderr)


async def until(condition: Any, *, within: float = 20.0) -> None:
    """Let the loop run until a condition holds: for what no event tells of, such as a state in /proc."""
    with anyio.fail_after(within):
        while not condition():
            await anyio.sleep(0.002)
