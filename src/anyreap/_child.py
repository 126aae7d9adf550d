"""`Child`: a handle on one watched or adopted child."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Self

import anyio
import anyio.lowlevel

from anyreap._errors import StatusLost
from anyreap._registry import registry
from anyreap._table import State

if TYPE_CHECKING:
    from anyreap._service import Watch
    from anyreap._status import ExitStatus


class Child:
    """A handle on one child of this process, watched by a reaper.

    Made by `Reaper.watch` and `Reaper.adopt`; there is one for each child and reaper. Any number of tasks of the
    reaper's loop may use it, and it goes on telling what is known after the block was left.

    Example:
        ```python
        import os
        import anyio
        import anyreap

        async def main() -> None:
            async with anyreap.open_reaper() as reaper:
                pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], os.environ)
                child = reaper.watch(pid)
                status = await child.wait()
                assert status.exit_code == 3 and child.status is status

        anyio.run(main)
        ```
    """

    __slots__ = ("_watch",)

    _watch: Watch

    def __init__(self) -> None:
        msg = "a Child is made by Reaper.watch() and Reaper.adopt()"
        raise TypeError(msg)

    @classmethod
    def _of(cls, watch: Watch) -> Self:
        self = cls.__new__(cls)
        self._watch = watch
        return self

    @property
    def pid(self) -> int:
        """The pid that the child has, or had: once it is collected the number may be another process's."""
        return self._watch.record.pid

    @property
    def status(self) -> ExitStatus | None:
        """How the child ended; None while it runs, and when its status is lost."""
        return self._watch.record.status

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative signal number; None while it runs, and when its status is lost."""
        return None if self._watch.record.status is None else self._watch.record.status.returncode

    @property
    def lost(self) -> bool:
        """Whether the child has ended and nobody can say how: see `StatusLost`."""
        return self._watch.record.state is State.LOST

    async def wait(self) -> ExitStatus:
        """Wait for the child to end.

        Any number of tasks may wait, any number of times. It is about the process, never about its pipes.

        Cancel safety: always a checkpoint; cancelling one waiter changes nothing for the child and for the other
        waiters, and the status is still there afterwards.

        Returns:
            How it ended, the same object each time.

        Raises:
            StatusLost: It has ended, and its status was consumed by somebody else.
            anyio.ClosedResourceError: The block was left while the child ran, so nobody watches it any more.
            RuntimeError: Called in another thread or in a forked child; or the service of the reaper has failed,
                with its failure as `__cause__`.

        Example:
            ```python
            import anyio
            import anyreap

            async def at_most(child: anyreap.Child, seconds: float) -> None:
                with anyio.move_on_after(seconds):
                    print(await child.wait())
            ```
        """
        watch = self._watch
        watch.home.check_use(closed_is_fine=True)
        if watch.settled:
            await anyio.lowlevel.checkpoint()
        else:
            await watch.home.loop.park(watch.parked)
        record = watch.record
        if record.status is not None:
            return record.status
        if record.state is State.LOST:
            raise StatusLost(record.pid, record.why)
        if watch.home.failure is not None:
            msg = f"the service of this reaper has failed, and can't tell when child {record.pid} ends"
            raise RuntimeError(msg) from watch.home.failure
        raise anyio.ClosedResourceError

    def send_signal(self, sig: int) -> None:
        """Send a signal to the child.

        To this process or to none: through its pidfd, or after its identity was compared, so that it never hits
        another process that has been given the same pid. Does nothing once the child has ended.

        Not a checkpoint.

        Args:
            sig: A signal number, such as `signal.SIGHUP`.

        Raises:
            PermissionError: The child runs as another user (EPERM, `man 2 kill`).
            OSError: There is no such signal (EINVAL), or no descriptor to send it safely with (EMFILE).
            RuntimeError: Called in another thread or in a forked child.

        Example:
            ```python
            import signal
            import anyreap

            def reload(server: anyreap.Child) -> None:
                server.send_signal(signal.SIGHUP)
            ```
        """
        self._watch.home.check_use(closed_is_fine=True)
        registry.send(self._watch.record, sig)

    def terminate(self) -> None:
        """Send SIGTERM: `send_signal(signal.SIGTERM)`, with its errors. Does nothing once the child has ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL: `send_signal(signal.SIGKILL)`, with its errors. Does nothing once the child has ended."""
        self.send_signal(signal.SIGKILL)

    def __repr__(self) -> str:
        state = str(self.status) if self.status is not None else self._watch.record.state.name.lower()
        return f"<anyreap.Child pid={self.pid} {state}>"
