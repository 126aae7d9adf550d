"""The errors, all of them.

    Exception
     +-- OSError
     |    +-- ChildProcessError
     |         +-- NotAChild            what was handed in cannot be waited for by this process
     |         +-- StatusLost           the child has ended, and nobody can say how
     +-- RuntimeError
     |    +-- StillRunning              a child outlived SIGKILL and the block
     |    +-- SigchldUnavailable        the asked-for source cannot work here
     +-- subprocess.SubprocessError
          +-- subprocess.CalledProcessError
               +-- ChildFailed          the child ended, and not with success

The constructors own the sentences, so that every message says what was seen, why, and what to do instead.
Misuse (a closed reaper, another thread, a forked child) is a plain `RuntimeError`, and bad arguments are
`TypeError` and `ValueError`, as everywhere in Python.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from anyreap._status import ExitStatus


class NotAChild(ChildProcessError):
    """The pid that was handed in is not an unreaped child of this process.

    Only the parent of a process can wait for it (`man 2 wait`), and only until it has been collected once. Raised
    by `Reaper.watch`, `Reaper.adopt`, `Reaper.wait` and `anyreap.wait`; nothing was collected and nothing was
    signalled. `errno` is `ECHILD`.

    Attributes:
        pid: The pid that was handed in.

    Example:
        ```python
        import anyio
        import anyreap

        async def main() -> None:
            try:
                await anyreap.wait(1)  # nobody's child
            except anyreap.NotAChild as exc:
                print(exc.pid)

        anyio.run(main)
        ```
    """

    def __init__(self, pid: int, why: str = "") -> None:
        text = f"pid {pid} is not an unreaped child of this process" + (f": {why}" if why else "")
        super().__init__(errno.ECHILD, text)
        self.pid = pid
        self._why = why

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[Callable[..., NotAChild], tuple[int, str]]:
        return type(self), (self.pid, self._why)


class StatusLost(ChildProcessError):
    """The child has ended, but its status was consumed by somebody else and cannot be had any more.

    A wait status can be collected once (`man 2 wait`). Another `waitpid`, or a kernel that was told to discard the
    statuses of children (SIGCHLD ignored, `SA_NOCLDWAIT`), leaves nothing for us. On Linux 6.15 and later the
    status is read back from the child's pidfd, and this error is not seen. It is never reported as 0 or as 255.
    `errno` is `ECHILD`.

    Attributes:
        pid: The pid of the child that has ended.
        why: What is known about the cause, as a sentence.

    Example:
        ```python
        import anyio
        import anyreap

        async def end_of(child: anyreap.Child) -> str:
            try:
                return str(await child.wait())
            except anyreap.StatusLost as exc:
                return f"ended, nobody knows how: {exc.why}"
        ```
    """

    def __init__(self, pid: int, why: str) -> None:
        super().__init__(errno.ECHILD, f"child {pid} has ended, but its status is lost: {why}")
        self.pid = pid
        self.why = why

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[Callable[..., StatusLost], tuple[int, str]]:
        return type(self), (self.pid, self.why)


class ChildFailed(subprocess.CalledProcessError):
    """The child ended, and not with exit code 0.

    A `subprocess.CalledProcessError`, so that code which catches that one keeps working, with the `ExitStatus` on
    top of it. Raised by `ExitStatus.check`.

    Attributes:
        status: How the child ended.
        returncode: The same as `status.returncode`: the exit code, or the negative signal number.
        cmd: The command, where it is known, else the pid.

    Example:
        ```python
        import anyreap

        try:
            anyreap.ExitStatus(pid=7, returncode=-9).check()
        except anyreap.ChildFailed as exc:
            assert str(exc) == "child 7 was killed by SIGKILL"
        ```
    """

    status: ExitStatus

    def __init__(
        self,
        status: ExitStatus,
        cmd: Any = None,
        output: Any = None,
        stderr: Any = None,
    ) -> None:
        who: Any = status.pid if cmd is None else cmd
        super().__init__(status.returncode, who, output, stderr)
        self.status = status

    def __str__(self) -> str:
        who = f"child {self.status.pid}"
        if self.cmd != self.status.pid:
            who = f"command {self.cmd!r} (pid {self.status.pid})"
        how = str(self.status)
        return f"{who} was {how}" if how.startswith("killed") else f"{who} {how}"

    def __reduce__(self) -> tuple[Callable[..., ChildFailed], tuple[Any, ...]]:
        cmd = None if self.cmd == self.status.pid else self.cmd
        return type(self), (self.status, cmd, self.output, self.stderr)


class StillRunning(RuntimeError):
    """Owned children outlived SIGKILL, and the block was left without them.

    A process that is in an uninterruptible sleep, in a frozen cgroup, or held by a tracer does not end when it is
    killed (`man 7 signal`, `man 2 ptrace`); one of another user may not be signalled at all. Waiting for it without
    a bound would hang the program, so the block is left and the pids are named. SIGKILL stays pending where it was
    sent: such a child ends when whatever holds it lets go.

    Attributes:
        pids: The pids of the children that were still there, ascending.

    Example:
        ```python
        import anyreap

        error = anyreap.StillRunning({42: "state D (disk sleep)"})
        assert error.pids == (42,)
        ```
    """

    def __init__(self, pids: Mapping[int, str] | Iterable[int]) -> None:
        seen = pids if isinstance(pids, Mapping) else dict.fromkeys(pids, "")
        self._seen: dict[int, str] = {pid: seen[pid] for pid in sorted(seen)}
        self.pids: tuple[int, ...] = tuple(self._seen)
        named = ", ".join(f"{pid} ({why})" if why else f"{pid}" for pid, why in self._seen.items())
        super().__init__(
            f"still running after SIGKILL: {named}; they were left behind, and will be zombies of this process"
            " once they end"
        )

    def __reduce__(self) -> tuple[Callable[..., StillRunning], tuple[dict[int, str]]]:
        return type(self), (self._seen,)


class SigchldUnavailable(RuntimeError):
    """The source of wake-ups that was asked for cannot work here.

    A SIGCHLD handler can be installed only from the main thread (`signal.signal`), is destroyed by a library that
    installs its own in C (uvloop's libuv), and cannot be chained to one. The text names the reason and what to
    write instead. Raised by `open_reaper` before anything was installed.

    Example:
        ```python
        import anyreap

        async def main() -> None:
            try:
                async with anyreap.open_reaper(source="sigchld"):
                    ...
            except anyreap.SigchldUnavailable:
                async with anyreap.open_reaper(source="pidfd"):
                    ...
        ```
    """
