"""The finder: which of one reaper's children may have changed.

Waking and finding are two questions. Whatever woke the service (a signal, a pidfd, the heartbeat), what it finds is
found here, and in the same way:

1. Children with a pidfd: an epoll holds all of them, and reports the ones that have ended. O(exits), and blind to
   other people's zombies.
2. Children without one (past the budget, or no pidfds here): "has *any* child ended?", a few times over; each
   answer that is one of ours is collected, which makes room for the next. Bounded, because a burst is cheaper by
   one sweep over all.
3. That question always gets the same answer while a foreign zombie stands at the head of the kernel's list, and
   then never reports ours. So behind a foreign zombie each pid is asked for.
4. Once in a heartbeat each pid of 2. is asked for anyway: one whose status was stolen shows in no other way.

It finds candidates only; whether a child has ended is for the kernel to say.
"""

from __future__ import annotations

import contextlib
import enum
import math
import select
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from anyreap import _kernel
from anyreap._table import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyreap._table import Record


class Origin(enum.Enum):
    """Why a child is asked for, which says what a "not yet" means."""

    REPORTED = enum.auto()  # something said that it has ended: if it can't be collected, ask again soon
    SCANNED = enum.auto()  # its turn had come: it runs on
    RETRIED = enum.auto()


# A child that is readable but not collectable (traced, or its Popen's lock is held elsewhere) is asked for again after
# 5 ms, then after twice as long each time, up to 250 ms: no signal and no pidfd will tell when it becomes so.
_RETRY_FIRST: Final = 0.005
_RETRY_LAST: Final = 0.25

_PEEKS: Final = 8
_TURN: Final = 2000


class Finder:
    """Where one reaper looks for its children."""

    def __init__(self) -> None:
        self._epoll: Any = select.epoll() if hasattr(select, "epoll") and _kernel.pidfds_usable() else None
        self._by_fd: dict[int, Record[Any]] = {}
        self._bare: dict[int, Record[Any]] = {}
        self._observed: dict[int, Record[Any]] = {}
        self._ready: deque[Record[Any]] = deque()
        self._retries: dict[Record[Any], tuple[float, float]] = {}
        self._interrupted = False

    def fileno(self) -> int:
        """The epoll's fd, which is readable when a pidfd is; -1 where there is none."""
        return -1 if self._epoll is None else self._epoll.fileno()

    def also_wake_on(self, fd: int) -> None:
        """Make the epoll readable whenever another fd is: the reaper's own pipe."""
        self._epoll.register(fd, select.EPOLLIN)

    def add(self, record: Record[Any]) -> None:
        """Look out for a child."""
        if record.pidfd >= 0 and self._epoll is not None:
            try:
                # One report for each, then silence: a child that is readable and not collectable must not make the
                # epoll readable for ever.
                self._epoll.register(record.pidfd, select.EPOLLIN | select.EPOLLONESHOT)
            except OSError:  # ENOMEM, or ENOSPC from fs.epoll.max_user_watches
                pass
            else:
                self._by_fd[record.pidfd] = record
                return
        self._bare[record.pid] = record

    def drop(self, record: Record[Any]) -> None:
        """Look out for a child no longer. Called before its pidfd is closed, from any thread, under the lock."""
        # One that is not there is the rule but for the first two: this is a part of each exit.
        if self._by_fd.get(record.pidfd) is record:
            del self._by_fd[record.pidfd]
            # Of one that has ended the report is spent. Else an entry would outlive our descriptor if a child that was
            # forked past Python's back holds a copy: an epoll forgets a file when the last one is closed.
            if record.state is State.RUNNING:
                with contextlib.suppress(OSError):  # closed by somebody else (os.closerange)
                    self._epoll.unregister(record.pidfd)
        elif self._bare.get(record.pid) is record:
            del self._bare[record.pid]
        if self._observed and self._observed.get(record.pid) is record:
            del self._observed[record.pid]
        if self._retries:
            self._retries.pop(record, None)

    def observe(self, record: Record[Any]) -> None:
        """Watch over a zombie that is left to its owner, until that one has collected it."""
        self._observed[record.pid] = record

    def hand_in(self, record: Record[Any]) -> None:
        """Ask for a child at the next sweep, whatever wakes it."""
        self._ready.append(record)

    def retry(self, record: Record[Any], now: float) -> None:
        """Ask for a child again soon."""
        delay, _ = self._retries.get(record, (0.0, 0.0))
        delay = min(delay * 2 or _RETRY_FIRST, _RETRY_LAST)
        self._retries[record] = (delay, now + delay)

    def next_retry(self) -> float:
        """When to ask again, on the loop's clock; infinity for never."""
        return min((due for _, due in list(self._retries.values())), default=math.inf) if self._retries else math.inf

    @property
    def pending(self) -> bool:
        """Whether there are candidates already, without asking the kernel."""
        return bool(self._ready)

    def drain(self) -> bool:
        """Fetch the reports of the epoll, so that it is not readable any more. True if the reaper's own pipe is."""
        if self._epoll is None:
            return True
        piped = False
        # A report is given once. If a KeyboardInterrupt takes it away between the kernel and the queue (asyncio can't
        # keep one off), the next sweep asks for everybody.
        before, self._interrupted = self._interrupted, True
        while reports := self._epoll.poll(0, 1024):
            for fd, _ in reports:
                record = self._by_fd.get(fd)
                if record is not None:
                    self._ready.append(record)
                else:
                    piped = True
            if len(reports) < 1024 or piped:
                break
        self._interrupted = before
        return piped

    def candidates(self, now: float, *, beat: bool, drained: bool = False) -> Iterator[tuple[Record[Any], Origin]]:
        """Yield the children to ask the kernel for. What is yielded must be asked for before the next one."""
        everybody, self._interrupted = self._interrupted, True
        if not drained:
            self.drain()
        while self._ready:
            yield self._ready.popleft(), Origin.REPORTED
        if everybody:
            yield from self._each(self._by_fd)
        if beat or everybody:
            yield from self._each(self._bare)
            yield from self._each(self._observed)
            for pid in list(self._bare)[:_TURN]:  # those that came first come last in the next one
                if (record := self._bare.pop(pid, None)) is not None:
                    self._bare[pid] = record
        elif self._bare:
            yield from self._peeked()
        if self._retries:
            for record, (_, due) in list(self._retries.items()):
                if due <= now:
                    yield record, Origin.RETRIED
        self._interrupted = False

    def _each(self, records: dict[int, Record[Any]]) -> Iterator[tuple[Record[Any], Origin]]:
        for record in list(records.values()):
            yield record, Origin.SCANNED

    def _peeked(self) -> Iterator[tuple[Record[Any], Origin]]:
        for _ in range(_PEEKS):
            found = _kernel.look_any()
            if found is None:
                return
            record = self._bare.get(found[0])
            if record is None:
                break  # a foreign zombie hides what is behind it
            yield record, Origin.REPORTED
            if self._bare.get(found[0]) is record:
                break  # so does one of ours that can't be collected yet
        yield from self._each(self._bare)

    def close(self) -> None:
        """Close the epoll. Does nothing the second time."""
        if self._epoll is not None:
            self._epoll.close()
        for mine in (self._by_fd, self._bare, self._observed, self._retries, self._ready):
            mine.clear()
