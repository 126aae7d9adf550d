"""The spawner: starts children without stalling the loop.

`subprocess.Popen` returns when the child has called exec, or failed to. From a slow disk, or out of a large process,
that takes as long as it takes, so a thread does it (CPython gives the GIL up meanwhile). Which thread matters:

- A pooled one ends when it has been idle for a while, and with it every child that has set `PR_SET_PDEATHSIG`, which
  is tied to the thread that forked (`man 2 prctl`): trio's pool kills such a child after ten seconds.
- One single thread makes a fast start wait behind a slow one.
- A thread for each start is what trio's spawning cost is made of.

So: threads that live as long as the reaper, made when all of them are busy, four at most.

From the moment that a pid exists somebody owns it. The thread owns it until the loop has taken it; the loop adopts
it whether or not the task that asked is still there; and where the loop is gone, the thread ends the child itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import anyio

from anyreap import _kernel
from anyreap._registry import registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyreap._orphans import Orphans

_THREADS: Final = 4


class _Claimed(subprocess.Popen[bytes]):
    """Claims its child for a subreaper in the moment in which it learns the pid.

    That is before it reads whether the exec failed, for which it gives the GIL up; to get it back may take longer than
    a shell takes to leave an orphan behind and end.
    """

    def __init__(self, command: Any, orphans: Orphans, **options: Any) -> None:
        self._orphans = orphans
        self.late = False  # whether the child had started others before it was marked, or may have: it had ended
        super().__init__(command, **options)

    @property
    def pid(self) -> int:
        """The child's."""
        return self.__dict__["pid"]  # type: ignore[no-any-return]

    @pid.setter
    def pid(self, pid: int) -> None:
        self.__dict__["pid"] = pid
        if pid:
            self.late = self._orphans.claim(pid)
            with contextlib.suppress(OSError):
                self.late |= _kernel.look(pid) is not None


class Start:
    """One start: what to start, and what came of it."""

    def __init__(
        self, command: Any, options: dict[str, Any], taken: Callable[[Start], None], orphans: Orphans | None = None
    ) -> None:
        self.command = command
        self.options = options
        self.orphans = orphans  # of a subreaper
        self.late = False  # see _Claimed
        self.pid = -1
        self.pipes: dict[str, int] = {}
        self.error: BaseException | None = None
        self.abandoned = False
        self.done = anyio.Event()
        self._taken = taken

    def run(self) -> None:
        """Start it. In a thread; does not raise."""
        theirs: list[int] = []
        registry.starts[self] = _kernel.ticks()  # until somebody knows its pid, and has it
        try:
            options = dict(self.options)
            size = options.pop("pipesize", -1)
            for name, read_is_ours in (("stdin", False), ("stdout", True), ("stderr", True)):
                if options[name] == subprocess.PIPE:
                    read, write = os.pipe()
                    if size > 0 and hasattr(fcntl, "F_SETPIPE_SZ"):
                        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, size)
                    self.pipes[name] = read if read_is_ours else write
                    options[name] = write if read_is_ours else read
                    theirs.append(options[name])
            popen: subprocess.Popen[bytes]
            if self.orphans is None:
                popen = subprocess.Popen(self.command, bufsize=0, **options)
            else:
                popen = claimed = _Claimed(self.command, self.orphans, bufsize=0, **options)
                self.late = claimed.late
            self.pid = popen.pid
            # The reaper collects it. A Popen that thinks its child runs would do so too, whenever it is thrown away
            # and another one is made (subprocess._cleanup), and hit whoever has the pid then.
            popen.returncode = 0
        except BaseException as exc:  # noqa: BLE001  (it is raised in the task that asked)
            self.error = exc
            self.close_pipes()
        finally:
            for fd in theirs:
                os.close(fd)

    def close_pipes(self) -> None:
        """Close our ends."""
        while self.pipes:
            os.close(self.pipes.popitem()[1])

    def take(self) -> None:
        """In the loop: adopt the child, and tell the task that asked."""
        self._taken(self)
        registry.starts.pop(self, None)
        self.done.set()

    def undo(self) -> None:
        """Where nobody can take it any more: end the child and collect it."""
        self.close_pipes()
        if self.pid > 0:
            _kernel.end_now(self.pid)
        registry.starts.pop(self, None)


class Spawner:
    """The threads of one reaper that start its children."""

    def __init__(self, in_loop: Callable[[Callable[[], None]], None]) -> None:
        self._in_loop = in_loop
        self._starts: deque[Start] = deque()
        self._changed = threading.Condition()
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, start: Start) -> None:
        """Have a child started soon."""
        with self._changed:
            self._starts.append(start)
            if len(self._starts) <= self._idle or len(self._threads) == _THREADS:
                self._changed.notify()
                return
        thread = threading.Thread(target=self._work, name=f"anyreap spawner {len(self._threads) + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # no thread can be had; one that there is will come to it
            if not self._threads:
                self._starts.remove(start)
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from exc
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._starts and not self._closed:
                    self._changed.wait()
                self._idle -= 1
                if not self._starts:
                    return
                start = self._starts.popleft()
            start.run()
            try:
                if self._closed:
                    start.undo()
                else:
                    self._in_loop(start.take)
            except RuntimeError:  # the loop is closed
                start.undo()
            del start

    def close(self) -> None:
        """End the threads. One that is in the middle of a start undoes it; nobody waits for that."""
        with self._changed:
            self._closed = True
            self._starts.clear()
            self._changed.notify_all()
            busy = len(self._threads) - self._idle
        if not busy:
            for thread in self._threads:
                thread.join()
        self._threads.clear()
