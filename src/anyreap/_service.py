"""The service: the one loop of a reaper. Wait, drain, sweep, wake.

It owns what one reaper has: the self-pipe, the finder, the children that it watches, the counters. It outlives every
cancellation of the block, because the shutdown needs it most then, and is joined before the block is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from anyreap import _kernel, _sigchld
from anyreap._errors import SigchldUnavailable
from anyreap._finder import Finder, Origin
from anyreap._loop import current_loop
from anyreap._orphans import Orphans
from anyreap._registry import Answer, registry
from anyreap._spawner import Spawner, Start
from anyreap._table import State

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectSendStream

    from anyreap._child import Child
    from anyreap._process import Process
    from anyreap._registry import Home, Link
    from anyreap._shutdown import Shutdown
    from anyreap._status import ExitStatus
    from anyreap._table import Record

# How long the service keeps the loop to itself before it lets the others run, in seconds of real time: some 200 exits.
# The tasks that they wake take their time after it.
_SLICE: Final = 0.002

# Of how many children without a pidfd the identity is compared in a heartbeat; they take turns. At 4 to 15 us each this
# is what a reaper with thousands of them costs while nothing happens.
_IDENTITIES: Final = 2000

# How often a block that is being left looks whether its service task has ended, should nothing say so, in seconds.
_LOOK: Final = 0.25

# How long a block that is thrown away blocks for its killed children, in seconds.
_ABANDON: Final = 1.0


class Watch:
    """One reaper's share in one child: who waits for it here, and whether it is to be collected and owned."""

    __slots__ = ("__weakref__", "child", "home", "orphan", "parked", "policy", "reap", "record", "told")

    def __init__(self, record: Record[Link], home: Service, *, reap: bool) -> None:
        self.record: Final = record
        self.home: Final = home
        self.reap = reap
        self.policy: Shutdown = home.shutdown
        self.told = State.RUNNING
        self.orphan = False  # taken in, not handed in
        self.child: Child | None = None  # the handle, as long as the same one has to be returned again
        self.parked: list[Any] = []  # the tasks that wait, see `_loop`

    @property
    def settled(self) -> bool:
        """Whether a wait has nothing left to wait for."""
        record = self.record
        known = record.ended or (record.state is State.OBSERVED and (record.held or not self.reap))
        return known or self.home.closed or self.home.failure is not None

    def settle(self) -> None:
        """Wake the tasks that wait."""
        try:  # noqa: SIM105  (suppress() takes as long as the rest: this is a part of each exit)
            self.home.loop.unpark(self.parked)
        except RuntimeError:  # of a loop that is being torn down: nobody waits there any more
            pass


class Service:
    """One reaper, without its public face."""

    def __init__(self, *, heartbeat: float, shutdown: Shutdown, orphan_grace: float | None = None) -> None:
        self.heartbeat = heartbeat
        self.shutdown = shutdown
        self.loop = current_loop()
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.source: Literal["sigchld", "pidfd"] = "pidfd"
        self.returned = self.closing = self.closed = False
        self.failure: BaseException | None = None
        self.watches: set[Watch] = set()
        self.owned: set[Watch] = set()
        self.groups: set[Watch] = set()  # of owned leaders that have ended, and left members behind
        self.starting: set[Start] = set()
        self.processes: dict[Watch, Process] = {}  # kept alive while they run: dropping a handle closes no pipe
        self._spawner: Spawner | None = None
        self.parked: list[Any] = []  # the tasks that wait for a change
        self.exits: list[MemoryObjectSendStream[ExitStatus]] = []
        self.reaped = self.orphans_reaped = self.lost = self.wakeups = self.late = 0
        self.orphans = None if orphan_grace is None else Orphans(self, orphan_grace)  # None: no subreaper
        self._stopping = self._broken = self._left_behind = False
        self._beat_at = math.inf
        self._stopped = anyio.Event()
        self._inbox: deque[Watch] = deque()

    # Opening and closing ------------------------------------------------------------------------------------------

    def open(self, source: Literal["auto", "sigchld", "pidfd"]) -> None:
        """Take what is needed and start; take nothing if anything of it fails."""
        self._pipe = _sigchld.SelfPipe()
        try:
            self.finder = Finder()
            try:
                self._subscribe(source)
                if self.orphans is not None:
                    self.orphans.open()
                fd = self._pipe.fileno()
                if self.source == "pidfd" and self.finder.fileno() >= 0:
                    self.finder.also_wake_on(fd)
                    fd = self.finder.fileno()
                self.loop.open(fd, self._drain, self._pipe.wake)
                self.loop.start(self._serve, self._died)
                registry.add(self)
            except BaseException:
                _sigchld.unsubscribe(self._pipe)
                if self.orphans is not None:
                    self.orphans.close()
                self.loop.close()
                self.finder.close()
                raise
        except BaseException:
            self._pipe.close()
            raise

    def _subscribe(self, source: Literal["auto", "sigchld", "pidfd"]) -> None:
        # Warnings come first: one that was made an error must find nothing installed.
        if ignored := _kernel.ignored_statuses():
            _warn(
                f"{ignored}. The status of one that ends while no SIGCHLD handler is installed can be read back on"
                " Linux >= 6.15 only, and is lost elsewhere. Give SIGCHLD its default disposition before children"
                " start: signal.signal(signal.SIGCHLD, signal.SIG_DFL)"
            )
        if source == "sigchld":
            if _sigchld.blocked():
                _warn(
                    "SIGCHLD is blocked in this thread: exits are seen up to one heartbeat late. Unblock it"
                    " (signal.pthread_sigmask), or open the reaper with source='pidfd'. The mask is left as it is"
                )
            self._subscribe_sigchld()
        elif source == "auto":
            self._choose()

    def _choose(self) -> None:
        why = _sigchld.unavailable()
        if not why and _sigchld.blocked():
            why = "SIGCHLD is blocked in this thread: unblock it (signal.pthread_sigmask), or write source='sigchld'"
        if not why:
            try:
                self._subscribe_sigchld()
            except SigchldUnavailable as exc:
                why = str(exc)
            else:
                return
        if not _kernel.pidfds_usable():
            msg = (
                "nothing can wake a reaper here. No pidfds: this kernel or sandbox has none (Linux >= 5.4 has). No"
                f" SIGCHLD: {why}. With source='pidfd' written out, each child is looked at once in a heartbeat"
            )
            raise SigchldUnavailable(msg)

    def _subscribe_sigchld(self) -> None:
        _sigchld.subscribe(self._pipe, lend=self.loop.lends_wakeup_fd)
        self.source = "sigchld"

    async def stop(self) -> BaseException | None:
        """End the service task and let go of everything. Returns the interrupt that came meanwhile, if one did."""
        interrupt: BaseException | None = None
        self._stopping = True
        self.loop.kick()
        while not (self._stopped.is_set() or self.loop.ended()):
            try:
                with anyio.CancelScope(shield=True, deadline=self.loop.now() + _LOOK):
                    await self._stopped.wait()
            except self.loop.interrupts as exc:
                interrupt = exc
        try:
            with self.loop.uninterrupted():
                self.release()
        except KeyboardInterrupt as exc:
            interrupt = exc
            self.release()
        return interrupt

    def abandon(self) -> None:
        """Leave at once, without a single await: the coroutine of the block is being thrown away (GeneratorExit)."""
        self._stopping = self.closing = True
        self.close_pipes()
        for watch in (*self.owned, *self.groups):
            registry.relink(watch)
            send = registry.send_group if watch.policy.scope == "group" else registry.send
            with contextlib.suppress(OSError):
                send(watch.record, signal.SIGKILL)
        end = time.monotonic() + _ABANDON
        while self.owned and time.monotonic() < end:
            for watch in list(self.owned):
                registry.check(watch.record, self)
            time.sleep(0.001)
        while self.orphans is not None and time.monotonic() < end:
            deque(self.orphans.look(), maxlen=0)
            if not self.orphans.to_end():
                break
            for watch in self.orphans.to_end():
                registry.relink(watch)
                with contextlib.suppress(OSError):
                    registry.send(watch.record, signal.SIGKILL)
                registry.check(watch.record, self)
            time.sleep(0.001)
        left = sorted(watch.record.pid for watch in self.owned)
        self.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.kick()
        if left:
            warnings.warn(f"a reaper was thrown away with children running: {left}", ResourceWarning, stacklevel=2)

    def release(self) -> None:
        """Put back and close everything, in an order in which nothing is used after it. Can be done twice."""
        self._stopping = self.closed = True
        unused = _sigchld.unsubscribe(self._pipe)  # first: from now on no handler writes into the pipe
        self.loop.close()
        for watch in list(self.groups):  # while it is watched: a leader that was held is collected now
            registry.let_go(watch, self)
        with registry.lock:
            for watch in list(self.watches):
                registry.leave(watch.record, watch)
                watch.settle()
                watch.child = None
                self.watches.discard(watch)
            registry.discard(self)
        if self.orphans is not None:
            self.orphans.close()
        self.owned.clear()
        self.groups.clear()
        while self.exits:
            self.exits.pop().close()
        if self._spawner is not None:
            self._spawner.close()
        for start in self.starting:  # it is undone when it is there; nobody waits for that
            with contextlib.suppress(RuntimeError):  # of a loop that is gone
                start.done.set()
        self.finder.close()
        if unused:
            self._pipe.close()

    def forked(self) -> None:
        """In a forked child: close the copies of our descriptors. What the loop knows of them is the parent's."""
        self.closed = self._stopping = True
        self._pipe.close()
        self.finder.close()

    def check_use(self, *, closed_is_fine: bool = False) -> None:
        """Refuse misuse.

        Raises:
            RuntimeError: In a forked child, in another thread, or after the block was left.
        """
        if os.getpid() != self.pid:
            msg = (
                f"this reaper belongs to process {self.pid}, and this is a forked child of it, {os.getpid()}: the"
                " children are the parent's to wait for. Open a reaper of its own here"
            )
            raise RuntimeError(msg)
        if threading.get_ident() != self.thread:
            msg = (
                "this reaper was opened in another thread: call it there (anyio.from_thread.run_sync), or open one here"
            )
            raise RuntimeError(msg)
        if self.closed and not closed_is_fine:
            msg = "this reaper is closed: its block was left. Use it inside of `async with anyreap.open_reaper()`"
            raise RuntimeError(msg)

    # The loop -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            self._beat_at = self.loop.now() + self.heartbeat
            await self.loop.serve(self._beat_at, self._woken)
        except Exception as exc:  # noqa: BLE001  (whatever it is, the waiting tasks must hear of it)
            self._fail(exc)

    async def _woken(self, hint: bool) -> float | None:  # noqa: FBT001
        if self._stopping:
            return None
        # The heartbeat is a period, not a timeout of idleness: other people's exits don't put it off. A hint comes
        # before its time, so there is no need to look at the clock.
        now = -math.inf if hint and self.orphans is None else self.loop.now()
        beat = now >= self._beat_at
        if beat:
            self._beat_at = now + self.heartbeat
            hint = self._drain() or hint  # a signal that comes in the same moment is no silence
        self.wakeups += hint
        await self._sweep(now, woken=hint, beat=beat)
        due = min(self._beat_at, self.finder.next_retry())
        return due if self.orphans is None else min(due, self.orphans.next_look)

    def _drain(self) -> bool:
        if self.closed:  # the block was thrown away, and this is the last time that the service is woken
            return False
        if self.source == "sigchld" or self.finder.drain():
            return self._pipe.drain() > 0
        return False

    async def _sweep(self, now: float, *, woken: bool, beat: bool) -> None:
        # With pidfds for a source it is their epoll that has just been drained.
        drained = self.source == "pidfd" and (woken or beat)
        before, identities = self.late, _IDENTITIES
        while self._inbox:
            self.tell(self._inbox.popleft())
        began = time.monotonic()
        for record, origin in self.finder.candidates(now, beat=beat, drained=drained):
            running = record.state is State.RUNNING
            thorough = beat and origin is Origin.SCANNED and identities > 0
            identities -= thorough
            answer = registry.check(record, self, thorough=thorough)
            if answer is Answer.ENDED:
                # Counted at once: at the next checkpoint who waited goes on, and may look.
                self.late += running and beat and not woken and origin is not Origin.RETRIED
            elif answer is Answer.LATER or origin is not Origin.SCANNED:
                self.finder.retry(record, self.loop.now())
            if time.monotonic() - began > _SLICE:
                await self.loop.checkpoint()
                if self._stopping:
                    return
                began = time.monotonic()
        if self.orphans is not None:
            self.orphans.go_on(now, hint=woken)
        if beat:
            self._check_pipe()
        if beat or self._left_behind:
            self.look_at_groups()
        if beat and self.source == "sigchld":
            _sigchld.refresh(late=self.late > before)

    def take_in(self, pid: int, start: int) -> Watch | None:
        """Watch an orphan, to collect it; None if it is gone, or is being watched.

        Args:
            pid: Its pid.
            start: When it was started, to tell it from another one that has its number by now; -1: unknown.
        """
        with registry.lock:
            if registry.find(pid) is not None:
                return None
            try:
                record, _ = registry.enter(pid, None, self)
            except OSError:  # gone
                return None
            watch = Watch(record, self, reap=True)
            watch.policy = dataclasses.replace(self.shutdown, scope="process")
            watch.orphan = record.orphan = True
            self.watches.add(watch)
            registry.join(record, watch)
            if start not in (-1, _kernel.start_time(pid)):
                self.watches.discard(watch)
                registry.leave(record, watch)
                return None
        return watch

    def ask(self, watch: Watch) -> None:
        """Ask for a child now, and, if it can't be collected yet, again soon."""
        if registry.check(watch.record, self) is Answer.LATER:
            self.finder.retry(watch.record, self.loop.now())

    def forget(self, watch: Watch) -> None:
        """Let go of a child that was observed, now that its owner has collected it."""
        self.watches.discard(watch)
        watch.child = None

    def _check_pipe(self) -> None:
        if not self._broken and not self._pipe.is_intact():
            self._broken = True
            _sigchld.unsubscribe(self._pipe)  # what has those numbers now is no place for our bytes
            self.loop.close()
            self._pipe.close()
            _sigchld.warn(
                "somebody closed the descriptors of anyreap's self-pipe (os.closerange?) while a reaper was open: exits"
                " are seen up to one heartbeat late from now on"
            )

    def _died(self) -> None:
        if not self._stopping and self.failure is None:
            self.abandon()  # the loop is being torn down under an open block
        self._stopped.set()

    def _fail(self, exc: BaseException) -> None:
        self.failure = exc
        for watch in list(self.watches):
            watch.settle()
        self.change()

    # Telling ------------------------------------------------------------------------------------------------------

    def post(self, watch: Watch, by: Home) -> None:
        """Tell the waiting tasks of a child, in the loop that they run on."""
        if by is self or (isinstance(by, Service) and by.loop.home is self.loop.home):
            self.tell(watch)
        else:
            self._inbox.append(watch)
            self._pipe.wake()

    def tell(self, watch: Watch) -> None:
        """Wake the tasks that wait for a child, and count it. The second time does nothing."""
        record = watch.record
        over = watch in self.owned and (record.ended or record.held)  # also of one that was told before it was owned
        if watch.told is record.state and not over:
            return
        if watch.parked and (record.ended or watch.settled):
            watch.settle()
        self.processes.pop(watch, None)
        if over:
            self.owned.discard(watch)
            if id(watch) in record.group:
                self.groups.add(watch)
                self._left_behind = True
            self.change()
        if not record.ended:
            watch.told = record.state
            return
        self.watches.discard(watch)
        watch.child = None
        if self.orphans is not None:
            self.orphans.ended(watch)
            self.change()
        if record.state is State.LOST:
            self.lost += not watch.orphan
        elif watch.reap and record.status is not None:
            self.orphans_reaped += watch.orphan
            self.reaped += not watch.orphan
            for stream in list(self.exits):
                try:
                    stream.send_nowait(record.status)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    stream.close()
                    self.exits.remove(stream)
        watch.told = record.state  # last: what was interrupted before is done again

    @property
    def spawner(self) -> Spawner:
        """The threads that start children; none before the first start."""
        if self._spawner is None:
            self._spawner = Spawner(self.loop.in_loop)
        return self._spawner

    def close_pipes(self) -> None:
        """Close our ends of the pipes of every process that runs: a child that reads, or writes, can end then."""
        for process in list(self.processes.values()):
            process.close_pipes()

    def look_at_groups(self) -> None:
        """Let go of the groups that ended children have led, if nobody in them is alive."""
        self._left_behind = False
        alive = registry.survivors([watch.record for watch in self.groups])
        for watch in list(self.groups):
            if watch.record not in alive:
                self.groups.discard(watch)
                registry.let_go(watch, self)
                self.change()

    def own(self, watch: Watch, policy: Shutdown | None) -> None:
        """Own a child, under a policy; None: the one that it has, or that of the reaper."""
        if policy is not None or watch not in self.owned:
            watch.policy = policy or self.shutdown
        if watch.record.ended:
            return
        self.owned.add(watch)  # first: a leader that was held is collected when it is let go
        self.groups.discard(watch)
        if watch.policy.scope == "group":
            registry.lead(watch)
        elif id(watch) in watch.record.group:
            registry.let_go(watch, self)
        if self.orphans is not None:
            self.orphans.claim(watch.record.pid)

    def begin_start(self, options: dict[str, Any]) -> int:
        """Begin the start of a child. Returns its number, and puts the tag into its environment, with `subreaper`."""
        if self.orphans is None:
            return 0
        number, options["env"] = self.orphans.begin(options["env"])
        return number

    def end_start(self, number: int) -> None:
        """Note that a start is over, whatever came of it."""
        if self.orphans is not None:
            self.orphans.starting.discard(number)
        self.change()

    def change(self) -> None:
        """Say that something was started or has ended."""
        with contextlib.suppress(RuntimeError):  # of a loop that is gone
            self.loop.unpark(self.parked)

    def kick(self) -> None:
        """Have the service sweep now."""
        self.loop.kick()


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
