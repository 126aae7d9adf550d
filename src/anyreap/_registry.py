"""The registry: what all reapers of this process share, and the way from a wait call to everybody who waits.

A status can be collected once, so reapers that watch the same child, in whatever thread and on whatever loop, share
one record of it. One lock guards the table from the look at the kernel to the end of the bookkeeping: were it let go
in between, another reaper would find the child gone, and call its status lost. It is held for a few system calls that
don't block. It is re-entrant because a signal handler of the program may call `Child.send_signal` in the middle.

Two rules keep a status safe from a KeyboardInterrupt that lands between any two instructions (trio keeps them off,
asyncio can't): it is looked at and noted before it is taken, and whatever was begun can be begun again.
"""

from __future__ import annotations

import enum
import os
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from anyreap import _kernel, _sigchld
from anyreap._errors import NotAChild
from anyreap._status import ExitStatus
from anyreap._table import Keeper, Record, State, Table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.process import BaseProcess

    from anyreap._finder import Finder


class Home(Protocol):
    """What the registry needs of a reaper."""

    finder: Finder

    def post(self, watch: Any, by: Home) -> None:
        """Tell the tasks that wait for a child; `by` is the reaper that found out, maybe in another thread."""

    def forget(self, watch: Any) -> None:
        """Let go of a child that was observed, now that its owner has collected it."""

    def forked(self) -> None:
        """Close what was inherited by a forked child."""


class Answer(enum.Enum):
    """What comes of asking for a child."""

    RUNNING = enum.auto()
    LATER = enum.auto()  # it has ended, but can't be dealt with yet: ask again soon
    ENDED = enum.auto()


class Link:
    """What stands in the table for a reaper that watches a child.

    Weak, for the registry lives as long as the process, and a loop that is closed under an open block does not: what
    is left of it must be free to go, for it is then that its children are ended and its handler is removed.
    """

    __slots__ = ("_watch",)

    def __init__(self, watch: Any) -> None:
        self._watch = weakref.ref(watch)

    @property
    def reap(self) -> bool:
        """Whether it wants the child collected."""
        watch = self._watch()
        return watch is not None and watch.reap

    def watch(self) -> Any:
        """What it stands for; None if that is gone."""
        return self._watch()


# How often somebody who has taken a status is given the time to put it down before it counts as lost: between a
# thread's waitpid() and its `self.returncode = ...` it may have to wait for the GIL. With the pauses of the finder,
# from 5 ms on and doubling, 0.3 s in all.
_TRIES: Final = 6


class PopenKeeper:
    """Collects a `subprocess.Popen` through its own `poll`, which takes its lock and sets its `returncode`."""

    def __init__(self, popen: subprocess.Popen[Any]) -> None:
        self._popen = popen

    def collect(self, returncode: int) -> bool:
        """Have it collect its child; False if it can't now, because another thread is in its `wait`."""
        try:
            code = self._popen.poll()
        except Exception:  # noqa: BLE001  (somebody's subclass: it must neither end the service nor leave a zombie)
            code = subprocess.Popen.poll(self._popen)
        if code is None:
            return False
        # If somebody took the status between our look and its poll, it has put down 0 (cpython#127050).
        self._popen.returncode = returncode
        return True

    def told(self) -> int | None:
        """What it says."""
        return self._popen.returncode

    def told_soon(self) -> int | None:
        """What it says of a child that is gone, once another thread that is in its `wait` has put it down."""
        # That thread has the status, holds this lock, and wants the GIL, which is let go of here. The bound is for a
        # Popen that somebody has made anew.
        lock = getattr(self._popen, "_waitpid_lock", None)
        if lock is not None and lock.acquire(timeout=0.1):
            lock.release()
        return self._popen.returncode

    def tell(self, returncode: int) -> None:
        """Tell it what it can't find out any more."""
        self._popen.returncode = returncode


class ProcessKeeper:
    """Collects a `multiprocessing.Process` through its own `exitcode`.

    Its code is kept in an object of its own, `_popen`, which has no public name. Where that is not there any more,
    nothing is lost but that a stolen status is not handed on to it.
    """

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def collect(self, returncode: int) -> bool:  # noqa: ARG002  (the Protocol's)
        """Have it collect its child; False if it can't now."""
        try:
            return self._process.exitcode is not None
        except ValueError:  # it was closed, and knows nothing any more
            return False

    def told(self) -> int | None:
        """What it says, without asking the kernel: `exitcode` would collect."""
        return getattr(getattr(self._process, "_popen", None), "returncode", None)

    def told_soon(self) -> int | None:
        """The same: `multiprocessing` has no lock, and one thread that waits."""
        return self.told()

    def tell(self, returncode: int) -> None:
        """Tell it what it can't find out any more."""
        popen = getattr(self._process, "_popen", None)
        if getattr(popen, "returncode", 0) is None:
            popen.returncode = returncode  # type: ignore[union-attr]


def keeper_of(child: object) -> tuple[int, Keeper | None]:
    """Return the pid of what was handed in, and who collects it.

    Raises:
        TypeError: It is neither a pid, nor a Popen, nor a multiprocessing.Process.
        ValueError: A pid below 1, or a Process that was not started.
    """
    if isinstance(child, int) and not isinstance(child, bool):
        if child <= 0:
            msg = f"a pid is above 0, not {child}: waitpid gives 0 and negative numbers the meaning of 'any child'"
            raise ValueError(msg)
        return int(child), None
    if isinstance(child, subprocess.Popen):
        return child.pid, PopenKeeper(child)
    process = sys.modules.get("multiprocessing.process")
    if process is not None and isinstance(child, process.BaseProcess):
        if child.pid is None:
            msg = f"{child!r} was not started: call its start() first"
            raise ValueError(msg)
        return child.pid, ProcessKeeper(child)
    msg = (
        "a child is a pid (int), a subprocess.Popen or a multiprocessing.Process, not"
        f" {type(child).__module__}.{type(child).__qualname__} {child!r}"
    )
    raise TypeError(msg)


class Registry:
    """The table of this process, its lock, and the budget of pidfds."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._table: Table[Link] = Table()
        self._pidfds: set[int] = set()
        self.starts: dict[Any, int] = {}  # what is being started by a thread of ours, and since when (`_kernel.ticks`)
        self.homes: weakref.WeakSet[Any] = weakref.WeakSet()

    def find(self, pid: int) -> Record[Link] | None:
        """The record of a child that is watched, by whichever reaper."""
        return self._table.find(pid)

    def enter(self, pid: int, keeper: Keeper | None, by: Home) -> tuple[Record[Link], bool]:
        """Find or make the record of a child. Returns it, and whether the child has ended already.

        Raises:
            NotAChild: It is not an unreaped child of this process.
        """
        record = self._table.find(pid)
        if record is not None and self._is_current(record, by):
            record.keeper = keeper or record.keeper
            return record, record.state is not State.RUNNING
        try:
            pidfd = _kernel.open_pidfd(pid)
        except (ProcessLookupError, OverflowError):
            raise NotAChild(pid, _why_not(keeper)) from None
        try:
            ended = _kernel.look(pid, pidfd) is not None
            identity = _kernel.identify(pid, pidfd)
            if pidfd >= 0 and len(self._pidfds) >= _kernel.fd_budget():
                os.close(pidfd)
                pidfd = -1
        except BaseException as exc:
            if pidfd >= 0:
                os.close(pidfd)
            if isinstance(exc, ChildProcessError):
                raise NotAChild(pid, _why_not(keeper)) from None
            raise
        record = self._table.add(pid, pidfd, identity)
        if pidfd >= 0:
            self._pidfds.add(pidfd)
        record.keeper = keeper
        return record, ended

    def join(self, record: Record[Link], watch: Any) -> None:
        """Let a reaper watch a child."""
        self._table.join(record, Link(watch))
        watch.home.finder.add(record)

    def relink(self, watch: Any) -> None:
        """Let a reaper watch a child again, when the garbage collector has cut its link before it ends what it owns."""
        with self.lock:
            if not watch.record.ended and self.watch_of(watch.record, watch.home) is None:
                self._table.join(watch.record, Link(watch))

    def watch_of(self, record: Record[Link], home: Home) -> Any:
        """The share that a reaper has in a child already; None if it has none."""
        shares = (link.watch() for link in record.watchers)
        return next((watch for watch in shares if watch is not None and watch.home is home), None)

    def stolen(self, pid: int) -> Record[Link]:
        """Make the record of a child that was gone before it could be entered."""
        return Record.over(pid, State.LOST, why=_kernel.ignored_statuses() or _STOLEN)

    def leave(self, record: Record[Link], watch: Any) -> None:
        """Let a reaper stop watching a child that has not ended."""
        watch.home.finder.drop(record)
        self._unlead(watch)
        gone = [link for link in record.watchers if link.watch() in (None, watch)]
        if not record.ended and [self._table.leave(record, link) for link in gone][-1:] == [True]:
            record.group, record.held = frozenset(), False
            self._close_pidfd(record)

    def _is_current(self, record: Record[Link], by: Home) -> bool:
        """Whether a record is still about the child that has its pid now."""
        try:
            if record.pidfd >= 0:
                _kernel.look(record.pid, record.pidfd)
                return True
            _kernel.look(record.pid)
            current = _kernel.identify(record.pid)
            if current == record.identity or None in (current, record.identity):  # None: out of descriptors
                return True
        except ChildProcessError:
            pass
        self._gone(record, by, certain=True)
        return False

    def check(self, record: Record[Link], by: Home, *, thorough: bool = False) -> Answer:
        """Ask the kernel for one child; collect it and tell everybody if it has ended.

        Args:
            record: The child.
            by: The reaper that asks.
            thorough: Of one that runs and has no pidfd, also ask whether it is the one that was handed in: its status
                may have been stolen, and its number given to another child of ours.
        """
        with self.lock:
            if record.ended or not record.watchers:  # by another reaper, or before an interruption; or left
                self._publish(record, by)
                return Answer.ENDED
            try:
                raw = _kernel.look(record.pid, record.pidfd)
            except ChildProcessError:
                return self._gone(record, by)
            except OSError as exc:
                # No errno but ECHILD is known here. Not to know is no reason to hang, to spin, or to end the service.
                self._table.lost(record, f"the kernel answered {exc}")
                self._publish(record, by)
                return Answer.ENDED
            if raw is None:
                # Observed, and running: the owner has collected it, and the number is another child's by now.
                if record.state is State.OBSERVED or (thorough and self._recycled(record)):
                    return self._gone(record, by, certain=True)
                return Answer.RUNNING
            if record.pidfd < 0 and self._recycled(record):  # not ours to take
                return self._gone(record, by, certain=True)
            record.glimpse = raw
            return self._collect(record, raw, by)

    def _recycled(self, record: Record[Link]) -> bool:
        """Whether the pid of a child without a pidfd is another child's by now."""
        if record.pidfd >= 0 or record.identity is None:
            return False
        return _kernel.identify(record.pid) not in (None, record.identity)

    def _collect(self, record: Record[Link], raw: int, by: Home) -> Answer:
        if not record.reap:
            self._table.observed(record, ExitStatus.from_wait_status(record.pid, raw))
            self._publish(record, by)
            return Answer.ENDED
        usage = None
        if record.keeper is not None:
            if not record.keeper.collect(ExitStatus.from_wait_status(record.pid, raw).returncode):
                return Answer.LATER
        else:
            try:
                taken = _kernel.take(record.pid)
            except ChildProcessError:
                pass  # somebody was faster, or we were, before an interruption: the glimpse is the status
            else:
                if taken is None:
                    return Answer.LATER
                raw, usage = taken
        self._table.exited(record, ExitStatus.from_wait_status(record.pid, raw, usage))
        self._publish(record, by)
        return Answer.ENDED

    def _gone(self, record: Record[Link], by: Home, *, certain: bool = False) -> Answer:
        """Deal with a child that somebody else has collected.

        Args:
            record: The child.
            by: The reaper that found out.
            certain: Its pid is needed for another child: what can't be known now is lost.
        """
        keeper = record.keeper
        status = record.status
        if record.state is State.OBSERVED and not (record.held or record.reap):  # by its owner, as it should be
            self._table.drop(record)
            for link in record.watchers:
                if (watch := link.watch()) is not None:
                    watch.home.finder.drop(record)
                    watch.home.forget(watch)
            return Answer.ENDED
        if status is None:
            raw = record.glimpse if record.glimpse is not None else _kernel.recall(record.pidfd)
            if isinstance(raw, int):
                status = ExitStatus.from_wait_status(record.pid, raw)
            elif keeper is not None and (code := keeper.told()) is not None:
                status = ExitStatus(record.pid, code)
            elif not certain and (raw == "later" or keeper is not None) and record.tries < _TRIES:
                record.tries += 1
                return Answer.LATER
        if status is None:
            self._table.lost(record, _kernel.ignored_statuses() or _STOLEN)
        else:
            if keeper is not None:
                keeper.tell(status.returncode)
            self._table.exited(record, status)
        self._publish(record, by)
        return Answer.ENDED

    def _publish(self, record: Record[Link], by: Home) -> None:
        # From the end, one by one, and each can be told twice: an interruption leaves the rest for the next time.
        for link in record.watchers[::-1]:
            watch = link.watch()
            if watch is not None:
                watch.home.finder.drop(record)
                watch.home.post(watch, by)
                if record.state is State.OBSERVED:
                    watch.home.finder.observe(record)
                    continue
            if link in record.watchers:  # telling it may have been what ended a held one
                record.watchers.remove(link)
        self._close_pidfd(record)

    def lead(self, watch: Any) -> None:
        """Have the group that a child leads outlive it here, for a reaper that will end it.

        Its number must not be given away. Through a pidfd it is named for ever, and the leader collected as always;
        without one the leader is held.
        """
        with self.lock:
            record = watch.record
            record.group |= {id(watch)}
            record.held = record.pidfd < 0 or not _kernel.groups_usable()

    def _unlead(self, watch: Any) -> None:
        watch.record.group -= {id(watch)}
        watch.record.held &= bool(watch.record.group)

    def send_group(self, record: Record[Link], signum: int) -> bool:
        """Signal the group of a child; False, and nothing sent, if there is none, or none that is surely its own."""
        with self.lock:
            if record.pidfd < 0 and record.ended:
                return False  # collected by somebody else: the number may be anybody's
            return _kernel.send_group(record.pid, record.pidfd, record.identity, signum)

    def survivors(self, records: Iterable[Record[Link]]) -> dict[Record[Link], list[int]]:
        """The pids of the live members of children's groups, of what is left of them that can be proved to be theirs.

        A group without one is left out.
        """
        with self.lock:
            there = [record for record in records if self._group_is_there(record)]
            alive = _kernel.live_members({record.pid for record in there})
            return {record: alive[record.pid] for record in there if record.pid in alive}

    def _group_is_there(self, record: Record[Link]) -> bool:
        try:
            return self.send_group(record, 0)
        except PermissionError:
            return True

    def let_go(self, watch: Any, by: Home) -> None:
        """Its group is gone, or given up here: collect a leader that was held, close a pidfd that was kept, unless
        another reaper has to end that group.
        """
        with self.lock:
            record = watch.record
            self._unlead(watch)
            if record.ended:
                self._close_pidfd(record)
            elif record.state is State.OBSERVED:
                self.check(record, by)

    def _close_pidfd(self, record: Record[Link]) -> None:
        if record.group:
            return  # it names the group still
        pidfd, record.pidfd = record.pidfd, -1
        if pidfd in self._pidfds:
            self._pidfds.discard(pidfd)
            try:  # noqa: SIM105  (suppress() takes longer than the close does: this is a part of each exit)
                os.close(pidfd)
            except OSError:  # closed by somebody else (os.closerange)
                pass

    def add(self, home: Home) -> None:
        """Note a reaper that was opened."""
        with self.lock:
            self.homes.add(home)
            _kernel.keep_spare()

    def discard(self, home: Home) -> None:
        """Forget a reaper that was closed."""
        with self.lock:
            self.homes.discard(home)
            if not self.homes:
                _kernel.drop_spare()

    def send(self, record: Record[Link], signum: int) -> bool:
        """Signal a child; False, and nothing sent, if it has ended."""
        with self.lock:
            if record.ended:
                return False
            return _kernel.send(record.pid, record.pidfd, record.identity, signum)

    def forked(self) -> None:
        """In a forked child: the children and the descriptors are the parent's; start anew."""
        self.lock = threading.RLock()  # a thread that isn't here may have held it
        for home in list(self.homes):
            home.forked()
        self.homes.clear()
        _kernel.drop_spare()
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds.clear()
        self.starts.clear()
        self._table = Table()


_STOLEN: Final = (
    "somebody else collected it (a waitpid in this process, Popen.poll or os.wait), and this kernel does not keep it"
)


def _why_not(keeper: Keeper | None) -> str:
    if keeper is None:
        return (
            "it is somebody else's child, or has been collected already. A process can be waited for by its parent"
            " only, and once"
        )
    return "it was collected behind the back of the object that was handed in, or is a child of the fork server"


registry: Final = Registry()


def _forked() -> None:
    _sigchld.forked()
    registry.forked()


os.register_at_fork(after_in_child=_forked)
