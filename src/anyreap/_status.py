"""`ExitStatus`: how a child ended, as a value."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Self

from anyreap._errors import ChildFailed

if TYPE_CHECKING:
    import resource


@dataclasses.dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a child ended: a frozen, hashable, picklable value.

    Attributes:
        pid: The pid that the child had. The number may belong to another process by now.
        returncode: The exit code, 0 to 255, or the negative number of the signal that killed it, as in
            `subprocess.Popen.returncode`.
        core_dumped: Whether the kernel wrote a core dump (`WCOREDUMP`, `man 2 wait`).
        usage: What the child, and the descendants that it waited for, have used: `ru_utime` and `ru_stime` in
            seconds, `ru_maxrss` in KiB on Linux and in bytes on macOS (`man 2 getrusage`). On Linux `ru_maxrss` begins
            with what the process had before its exec, which is what this process had: it says nothing of a child that
            was smaller. None where somebody else collected the child: a `Popen` or `multiprocessing.Process` through
            its own method, the owner of a child that was only observed, or a thief.
        orphan: Whether the child was not started by this process, but adopted by it as a subreaper.

    Example:
        ```python
        from anyreap import ExitStatus

        status = ExitStatus.from_wait_status(42, 9)  # what os.waitpid returned
        assert status.signal == 9 and status.returncode == -9 and status.shell_code == 137
        assert str(status) == "killed by SIGKILL"
        ```
    """

    pid: int
    returncode: int
    core_dumped: bool = False
    usage: resource.struct_rusage | None = None
    orphan: bool = False

    @classmethod
    def from_wait_status(cls, pid: int, wait_status: int, usage: resource.struct_rusage | None = None) -> Self:
        """Decode a wait status, the number that `os.waitpid` and `os.wait4` return.

        Args:
            pid: The pid that was waited for.
            wait_status: The 16-bit status (`man 2 wait`).
            usage: What the child has used, as `os.wait4` returns it.

        Raises:
            ValueError: The status says that the child was stopped or continued, so it has not ended.

        Example:
            ```python
            from anyreap import ExitStatus

            assert ExitStatus.from_wait_status(42, 3 << 8).exit_code == 3
            ```
        """
        try:
            code = os.waitstatus_to_exitcode(wait_status)
        except ValueError:
            msg = f"wait status {wait_status:#x} of pid {pid} is of a stopped or continued child, not of an ended one"
            raise ValueError(msg) from None
        return cls(pid, code, code < 0 and os.WCOREDUMP(wait_status), usage)

    @property
    def exit_code(self) -> int | None:
        """The exit code, 0 to 255, or None if the child was killed by a signal."""
        return self.returncode if self.returncode >= 0 else None

    @property
    def signal(self) -> signal.Signals | int | None:
        """The signal that killed the child, or None if it exited. A plain int where Python has no name for it."""
        if self.returncode >= 0:
            return None
        try:
            return signal.Signals(-self.returncode)
        except ValueError:  # a real-time signal: only SIGRTMIN and SIGRTMAX are in the enumeration
            return -self.returncode

    @property
    def success(self) -> bool:
        """Whether the child exited with code 0."""
        return self.returncode == 0

    @property
    def shell_code(self) -> int:
        """The code that a shell would show: the exit code, or 128 plus the signal number (POSIX `sh`, 2.8.2)."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def check(self) -> Self:
        """Return this status if it is a success.

        Raises:
            ChildFailed: The child did not exit with code 0.

        Example:
            ```python
            import os
            import anyreap

            async def build(reaper: anyreap.Reaper, pid: int) -> None:
                (await reaper.wait(pid)).check()
            ```
        """
        if not self.success:
            raise ChildFailed(self)
        return self

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exited with code {self.returncode}"
        number = self.signal
        name = number.name if isinstance(number, signal.Signals) else f"signal {number}"
        return f"killed by {name}" + (" (core dumped)" if self.core_dumped else "")
