"""Children for the tests of leaving a block: set up before they are used, deaf to signals, or held by a tracer."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests import harness

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

STUBBORN = "trap '' TERM; echo >&3; exec sleep 3600"


def handling(trap: str, name: str = "TERM") -> str:
    """Return the script of a child that runs a trap at a signal, and waits for that at its gate."""
    return f"trap '{trap}' {name}; echo >&3; read x; exec sleep 3600"


class Stage(harness.Gate):
    """A gate whose children say on descriptor 3 that they are set up: their traps are in place then."""

    def __init__(self) -> None:
        super().__init__()
        self._said, self._say = os.pipe()

    def start(self, script: str) -> int:
        """Start a shell, and wait until it has said that it is ready. Returns its pid."""
        return self.start_many(script, 1)[0]

    def start_many(self, script: str, count: int) -> list[int]:
        """Start several, which get ready at the same time."""
        actions = [
            (os.POSIX_SPAWN_DUP2, self.read, 0),
            (os.POSIX_SPAWN_DUP2, self._say, 3),
        ]
        pids = [
            os.posix_spawn(harness.SHELL, ["sh", "-c", script], os.environ, file_actions=actions) for _ in range(count)
        ]
        self.pids += pids
        said = 0
        while said < count:
            said += len(os.read(self._said, count - said))
        # They say so before they wait at the gate. A signal between the two is looked at after the wait only: the
        # shell asks for pending ones, then reads. No shell can do both at once, so see that they are asleep.
        deadline = time.monotonic() + 20
        while any(harness.state_of(pid) in ("R", "D") for pid in pids):
            assert time.monotonic() < deadline, "a child that is set up does not wait at the gate"
            os.sched_yield()
        return pids

    def hear(self) -> None:
        """Block until a child has said one thing more."""
        os.read(self._said, 1)

    def close(self) -> None:
        """Open the gate, and close all that is left."""
        super().close()
        for fd in (self._said, self._say):
            if fd >= 0:
                os.close(fd)
        self._said = self._say = -1

    def __enter__(self) -> Self:
        return self


class Sent:
    """The signals that this process sends, in order: `(pid, signal)`. What the kernel is asked for, however."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[int, int]] = []
        for module, name in ((signal, "pidfd_send_signal"), (os, "kill")):
            if hasattr(module, name):
                spied = self._spied(getattr(module, name), through=name == "pidfd_send_signal")
                monkeypatch.setattr(module, name, spied)

    def _spied(self, send: Any, *, through: bool) -> Callable[..., Any]:
        @functools.wraps(send)
        def spy(target: int, signum: int, *args: Any) -> Any:
            pid = pid_of(target) if through else target
            self.all.append((pid, int(signum)))
            return send(target, signum, *args)

        return spy

    def to(self, pid: int) -> list[int]:
        """Return the signals that were sent to one process."""
        return [signum for target, signum in self.all if target == pid]


def pid_of(pidfd: int) -> int:
    """Return the pid that a pidfd stands for, as the kernel tells it."""
    found = re.search(r"^Pid:\s*(-?\d+)", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def strace() -> str:
    """Where strace is; skips the test if there is none, or it may not trace."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    probe = [found, "-qq", "-o", "/dev/null", "true"]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    return found


# What is seized, and killed, stays a zombie that its parent can't collect before the tracer has, or is gone:
# `man 2 ptrace`.
_TRACER = """
import ctypes, sys
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
failed = ptrace(0x4206, int(sys.argv[1]), None, None)  # PTRACE_SEIZE
print(ctypes.get_errno() if failed else 0, flush=True)
sys.stdin.read()
"""


class Held:
    """Holds a child with ptrace: killed, it can't be collected until the tracer lets it go.

    The tracer is a child of this process as well, and nobody's business but ours.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._tracer = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TRACER, str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._tracer.stdout is not None
        said = self._tracer.stdout.readline()
        if said != b"0\n":
            self.release()
            pytest.skip(f"no ptrace here: errno {said!r}")

    def release(self) -> None:
        """Let it go, and wait for the tracer's end: from then on the kernel shows the child's to its parent."""
        self._tracer.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def asyncio_hosts() -> list[harness.Host]:
    """Return the hosts that run on asyncio."""
    return [host for host in harness.HOSTS if host.backend == "asyncio"]


on_asyncio = pytest.mark.parametrize("host", asyncio_hosts(), ids=str, indirect=True)
"""Run a test on the loops of asyncio only."""

# What takes long, and differs little from loop to loop.
on_two_hosts = pytest.mark.parametrize("host", [harness.HOSTS[0], harness.HOSTS[3]], ids=str, indirect=True)
"""Run a test on trio with SIGCHLD, and on asyncio with pidfds."""
