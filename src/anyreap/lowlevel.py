"""The parts: the self-pipe and its handler, a look at a child, and its collection.

For programs that have a loop of their own. With trio or anyio, `anyreap.open_reaper` does all of this.
"""

from __future__ import annotations

from anyreap import _kernel
from anyreap._errors import NotAChild
from anyreap._sigchld import SelfPipe, install_handler, is_default_handler
from anyreap._status import ExitStatus

__all__ = ("SelfPipe", "install_handler", "is_default_handler", "peek", "reap")


def peek(pid: int | None) -> ExitStatus | None:
    """Look whether a child has ended, and consume nothing (`WNOWAIT`, `man 2 waitid`).

    Never blocks. `usage` is None: it comes with the collection.

    Args:
        pid: A pid, or None for any child. For any child the kernel shows the same one until it is collected.

    Returns:
        How it ended; None if it has not, or, for any child, if there is none.

    Raises:
        NotAChild: The pid is not an unreaped child of this process.
        ValueError: The pid is below 1.

    Example:
        ```python
        import os
        from anyreap import lowlevel

        pid = os.posix_spawn("/bin/true", ["true"], os.environ)
        while lowlevel.peek(pid) is None:
            pass
        assert lowlevel.reap(pid).success
        ```
    """
    if pid is None:
        found = _kernel.look_any()
        return None if found is None else ExitStatus.from_wait_status(*found)
    _check(pid)
    try:
        raw = _kernel.look(pid)
    except ChildProcessError:
        raise NotAChild(pid) from None
    return None if raw is None else ExitStatus.from_wait_status(pid, raw)


def reap(pid: int) -> ExitStatus | None:
    """Collect a child if it has ended (`man 2 wait4`).

    Never blocks, and never collects any other child.

    Args:
        pid: A pid.

    Returns:
        How it ended, with its usage; None if it has not ended.

    Raises:
        NotAChild: The pid is not an unreaped child of this process.
        ValueError: The pid is below 1: to `waitpid` that means "any child".

    Example:
        ```python
        from anyreap import lowlevel

        def collect(pids: set[int]) -> None:
            for pid in list(pids):
                if (status := lowlevel.reap(pid)) is not None:
                    pids.remove(pid)
                    print(pid, status)
        ```
    """
    _check(pid)
    try:
        taken = _kernel.take(pid)
    except (ChildProcessError, OverflowError):
        raise NotAChild(pid) from None
    return None if taken is None else ExitStatus.from_wait_status(pid, *taken)


def _check(pid: int) -> None:
    if isinstance(pid, bool) or not isinstance(pid, int):
        msg = f"a pid is an int, not {pid!r}"
        raise TypeError(msg)
    if pid <= 0:
        msg = f"a pid is above 0, not {pid}: waitpid gives 0 and negative numbers the meaning of 'any child'"
        raise ValueError(msg)


for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
