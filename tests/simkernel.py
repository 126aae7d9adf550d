"""A kernel that is played, behind the module that holds the wait calls.

`Kernel` knows processes; a test says what happens to them (`spawn`, `end`, `steal`, `trace` ...). `simulated(kernel)`
puts its system calls in the place of the real ones in `anyreap._kernel`, so all of the library is the real one, that
module too, on a real loop. Nothing here is random, and nothing takes time.

What is like the real one, and why it matters:

- A child that has ended is a zombie until somebody collects it, once. Then its pid is free, and given away again soon:
  there are only a few.
- A pidfd names its process for ever, is readable once that has ended, and is a real descriptor (an eventfd), so a real
  epoll waits on it. Since Linux 6.15 the status can be read back from it after the collection (`remembers`).
- "Has any child ended?" shows the oldest zombie, whoever wants it, again and again.
- A child that is traced ends, its pidfd is readable, and it can't be collected until it is let go.
- SIGCHLD is a real one, raised by hand: the real handler runs. It can be held back, in which case many become one, and
  it can be lost.

What can't be had elsewhere: `before` is called ahead of each system call, and may do anything that other processes, or
other threads, could do in that moment; `trouble` has the next call of a name fail with an errno.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
import signal
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import trio._core._run

from anyreap import _kernel, _registry, _service, _shutdown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# What a process does about a signal that it does not handle, as far as it matters here.
_HARMLESS = (0, signal.SIGCONT, signal.SIGCHLD)


@dataclasses.dataclass(eq=False, slots=True)
class Process:
    """One process, from its start to long after its end.

    Attributes:
        pid: Its number, which is another one's later.
        birth: A number that no other process has.
        child: Whether it is a child of the process under test; else a stranger.
        state: "running", "zombie" or "gone".
        raw: Its wait status, once it has ended.
        traced: Whether a tracer keeps it from being collected.
        stopped: Whether SIGSTOP has stopped it.
        deaf: Whether it ignores whatever can be ignored.
        signals: What the library has sent it while it ran.
        taker: Who has collected it: "anyreap", or "thief".
    """

    pid: int
    birth: int
    child: bool = True
    state: str = "running"
    raw: int = -1
    traced: bool = False
    stopped: bool = False
    deaf: bool = False
    signals: list[int] = dataclasses.field(default_factory=list)
    taker: str = ""
    _pending: list[int] = dataclasses.field(default_factory=list)

    @property
    def returncode(self) -> int:
        """How it has ended, as `subprocess` has it."""
        return os.waitstatus_to_exitcode(self.raw)

    def __repr__(self) -> str:
        return f"<pid {self.pid} (the {self.birth}.) {self.state}>"


class Kernel:
    """The processes, and the system calls that the library makes.

    Args:
        pids: The numbers that there are.
        pidfds: Whether there are pidfds (Linux >= 5.4, and no sandbox).
        numbered: Whether their inodes tell processes apart (Linux >= 6.9); else start times do.
        remembers: Whether a collected status can be read back (Linux >= 6.15).
        budget: How many pidfds the library may keep.
    """

    def __init__(
        self,
        pids: Iterable[int] = range(300, 307),
        *,
        pidfds: bool = True,
        numbered: bool = True,
        remembers: bool = True,
        budget: int = 1000,
    ) -> None:
        self.pidfds, self.numbered, self.remembers, self.budget = pidfds, numbered, remembers, budget
        self.processes: dict[int, Process] = {}  # who has which number now
        self.fds: dict[int, Process] = {}
        self.calls: Counter[str] = Counter()
        self.before: Callable[[str, Process | None], object] = lambda call, process: None
        self.trouble: dict[str, int] = {}
        self.failed: list[tuple[str, Process | None]] = []
        self.held = self.pending = False
        self._pids = list(pids)
        self._zombies: set[Process] = set()
        self._next = self._births = self._children = 0

    # What happens in the world ------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether all numbers are taken (EAGAIN)."""
        return len(self.processes) == len(self._pids)

    def spawn(self, *, child: bool = True) -> Process:
        """Start a process. Its number is the next one that is free, round and round, as Linux has it."""
        assert not self.full
        while (pid := self._pids[self._next % len(self._pids)]) in self.processes:
            self._next += 1
        self._next += 1
        self._births += 1
        self._children += child
        process = self.processes[pid] = Process(pid, self._births, child)
        return process

    def end(self, process: Process, *, code: int = 0, signum: int = 0) -> None:
        """Let it exit with a code, or die of a signal. A stranger is collected by its own parent at once."""
        assert process.state == "running"
        process.state = "zombie"
        process.raw = signum or code << 8
        for fd in [fd for fd, named in self.fds.items() if named is process]:
            os.eventfd_write(fd, 1)
        if process.child:
            self._zombies.add(process)
            self.pending = True
            if not self.held:
                self.hint()
        else:
            self._collect(process, "its parent")

    def signal(self, process: Process, signum: int) -> None:
        """Let a signal arrive."""
        if process.state != "running":
            return
        if signum == signal.SIGSTOP:
            process.stopped = True
        elif signum == signal.SIGKILL:
            self.end(process, signum=signum)
        elif signum == signal.SIGCONT:
            process.stopped = False
            for waiting in process._pending[:]:
                self.signal(process, waiting)
        elif signum not in _HARMLESS and not process.deaf:
            if process.stopped:
                process._pending.append(signum)
            else:
                self.end(process, signum=signum)

    def steal(self, process: Process) -> None:
        """Collect it behind the library's back: somebody's waitpid()."""
        assert process in self._zombies
        assert not process.traced
        self._collect(process, "thief")

    def hint(self) -> None:
        """Deliver SIGCHLD, once for all that have ended since; nothing if none has."""
        if self.pending:
            self.pending = False
            signal.raise_signal(signal.SIGCHLD)

    def _collect(self, process: Process, taker: str) -> None:
        process.state, process.taker = "gone", taker
        self._zombies.discard(process)
        self._children -= process.child
        del self.processes[process.pid]

    # The system calls ---------------------------------------------------------------------------------------------

    def _enter(self, call: str, process: Process | None) -> None:
        self.calls[call] += 1
        self.before(call, process)
        if (number := self.trouble.pop(call, 0)) != 0:
            self.failed.append((call, process))
            _fail(number)

    def waitid(self, kind: int, number: int, flags: int) -> os.waitid_result | None:
        """`man 2 waitid`."""
        assert flags & os.WNOHANG, "a wait call that blocks"
        assert flags & os.WNOWAIT, "waitid() is for looking"
        process = self._named(kind, number)
        self._enter("waitid", process)
        process = self._named(kind, number)  # anything may have happened meanwhile
        if not self._children if kind == os.P_ALL else (process is None or not process.child):
            _fail(errno.ECHILD)
        if process is None or process.state == "running" or process.traced:
            return None
        if process.state == "gone":
            _fail(errno.ECHILD)
        died = os.WIFSIGNALED(process.raw)
        status = os.WTERMSIG(process.raw) if died else os.WEXITSTATUS(process.raw)
        code = os.CLD_KILLED if died else os.CLD_EXITED
        return os.waitid_result((process.pid, 0, signal.SIGCHLD, status, code))

    def _named(self, kind: int, number: int) -> Process | None:
        if kind == os.P_PID:
            return self.processes.get(number)
        if kind == os.P_PIDFD:
            return self._behind(number)
        can_be_had = (process for process in self._zombies if not process.traced)
        return min(can_be_had, key=lambda process: process.birth, default=None)

    def wait4(self, pid: int, flags: int) -> tuple[int, int, resource.struct_rusage]:
        """`man 2 wait4`. The CPU time of a process is its birth number, so each one's usage is its own."""
        assert flags & os.WNOHANG, "a wait call that blocks"
        assert pid > 0, "a wait call for whoever has ended"
        self._enter("wait4", self.processes.get(pid))
        process = self.processes.get(pid)
        if process is None or not process.child:
            _fail(errno.ECHILD)
        if process.state == "running" or process.traced:
            return 0, 0, resource.struct_rusage([0.0] * 16)
        self._collect(process, "anyreap")
        return pid, process.raw, resource.struct_rusage([float(process.birth)] + [0.0] * 15)

    def pidfd_open(self, pid: int) -> int:
        """`man 2 pidfd_open`."""
        self._enter("pidfd_open", self.processes.get(pid))
        process = self.processes.get(pid)
        if process is None:
            _fail(errno.ESRCH)
        fd = os.eventfd(process.state == "zombie", os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.fds[fd] = process
        return fd

    def close(self, fd: int) -> None:
        """`man 2 close`, of a pidfd or of anything."""
        self.fds.pop(fd, None)
        os.close(fd)

    def fstat(self, fd: int) -> Any:
        """`man 2 fstat`: the inode of a pidfd is the identity of its process."""
        if fd not in self.fds:
            return os.fstat(fd)
        self._enter("fstat", self.fds[fd])
        return SimpleNamespace(st_ino=self.fds[fd].birth)

    def pidfd_send_signal(self, fd: int, signum: int) -> None:
        """`man 2 pidfd_send_signal`."""
        process = self._behind(fd)
        self._enter("pidfd_send_signal", process)
        self._send(process, signum)

    def kill(self, pid: int, signum: int) -> None:
        """`man 2 kill`."""
        self._enter("kill", self.processes.get(pid))
        self._send(self.processes.get(pid), signum)

    def _send(self, process: Process | None, signum: int) -> None:
        if process is None or process.state == "gone":
            _fail(errno.ESRCH)
        if process.state == "running":
            process.signals.append(signum)
            self.signal(process, signum)

    def ioctl(self, fd: int, request: int, question: bytearray) -> None:
        """`PIDFD_GET_INFO`, for the exit status."""
        process = self._behind(fd)
        self._enter("ioctl", process)
        if not self.remembers:
            _fail(errno.ENOTTY)
        known = _kernel._PIDFD_INFO_EXIT if process.state == "gone" else 0
        _kernel._INFO.pack_into(question, 0, known, *([0] * 12), process.raw if known else 0)

    def _behind(self, fd: int) -> Process:
        return self.fds.get(fd) or _fail(errno.EBADF)

    def stat_fields(self, pid: int) -> list[str]:
        """`man 5 proc_pid_stat`: the state, and the start time."""
        process = self.processes.get(pid)
        self._enter("/proc", process)
        if (process := self.processes.get(pid)) is None:
            return []
        return [process.state[0].upper(), *["0"] * 18, str(process.birth)]


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


class _Module:
    """A module with some of its functions replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def simulated(kernel: Kernel) -> Iterator[Kernel]:
    """Have the library ask this kernel. What it leaves behind, in the kernel or in its own table, is an error."""
    calls = ("waitid", "wait4", "pidfd_open", "close", "fstat", "kill")
    registry = _registry.registry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernel, "os", _Module(os, **{name: getattr(kernel, name) for name in calls}))
        patch.setattr(_kernel, "signal", _Module(signal, pidfd_send_signal=kernel.pidfd_send_signal))
        patch.setattr(_kernel, "fcntl", _Module(fcntl, ioctl=kernel.ioctl))
        patch.setattr(_kernel, "stat_fields", kernel.stat_fields)
        patch.setattr(_kernel, "fd_budget", lambda: kernel.budget)
        patch.setattr(_kernel, "_usable", kernel.pidfds)
        patch.setattr(_kernel, "_numbered", kernel.numbered)
        patch.setattr(_registry, "os", _Module(os, close=kernel.close))
        # Two runs must not differ by how fast this machine is, or by where in memory an object is: others run after
        # each child, sets have an order, and trio's tasks run in one that a seed decides.
        patch.setattr(_service, "_SLICE", -1.0)
        patch.setattr(_shutdown, "_SLICE", -1.0)
        patch.setattr(_service.Watch, "__hash__", lambda watch: watch.record.pid)
        patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        try:
            yield kernel
            assert not registry._table._records, "records are left behind"
            assert not registry._pidfds, "pidfds count as open"
            assert not kernel.fds, "pidfds are left open"
        finally:
            registry._table._records.clear()
            registry._pidfds.clear()
            for fd in list(kernel.fds):
                kernel.close(fd)
