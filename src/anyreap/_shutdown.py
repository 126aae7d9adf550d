"""`Shutdown`: the policy as plain values, and the ladder that carries it out.

The ladder runs in the task that leaves the block, as one loop with one place where it waits. What interrupts it there
(Ctrl-C, a native cancellation of asyncio: both reach a task through any shield) is noted, ends the grace, and the loop
goes on; it keeps all that it has done in one object, so it can be interrupted anywhere and begun again. A task of its
own would need all of that too, and somebody who waits for it.
"""

from __future__ import annotations

import dataclasses
import math
import signal as _signal
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import anyio

from anyreap import _kernel
from anyreap._registry import registry

if TYPE_CHECKING:
    from anyreap._orphans import Orphans
    from anyreap._service import Service, Watch

Scope: TypeAlias = Literal["process", "group"]

# How long a killed child may take to be gone before the block is left without it, in seconds. Death by SIGKILL takes
# microseconds, and seconds where gigabytes have to be given back; what takes longer is held by something.
KILL_BOUND: Final = 5.0

# How long orphans may go on to leave new ones behind, once each is killed as soon as it is seen, in seconds.
ORPHANS_BOUND: Final = 20.0

# How often the children are looked at while the ladder waits, in seconds: soon at first, then twice as long each time.
# It does not rely on the service: SIGCHLD may be blocked, the heartbeat long, the service itself have failed.
_LOOK_FIRST: Final = 0.005
_LOOK_LAST: Final = 0.25

# How often it looks again, at the end, for who could not be judged at once: a start that hangs must not hang this.
_LOOKS: Final = 50

# How often cancelled scopes are counted, in seconds: nothing tells of a second one.
_COUNT: Final = 0.05

_SLICE: Final = 0.002


@dataclasses.dataclass(frozen=True, slots=True)
class Shutdown:
    """How an owned child is ended when its block is cancelled or fails: a policy, as plain values.

    Send `signal`, then SIGCONT (a stopped child would never see it); wait `grace` seconds; send SIGKILL; collect. All
    children of a reaper are shut down at the same time, each by its own policy.

    Attributes:
        signal: The first signal. Default: SIGTERM.
        grace: Seconds between the first signal and SIGKILL. 0: SIGKILL at once, and no other signal. `math.inf`:
            never. Default: 5.0.
        scope: `"process"`: the child alone. `"group"`: the process group that it leads, so its descendants too, but for
            those that went into a group of their own. The escalation follows the group, not its leader: members that
            ignore the signal get SIGKILL, however soon the leader ended.

    Raises:
        ValueError: `grace` is negative or NaN, `scope` is unknown, or `signal` is not the number of a signal.

    Example:
        ```python
        import signal
        import anyreap

        async def main() -> None:
            polite = anyreap.Shutdown(signal=signal.SIGINT, grace=30)
            async with anyreap.open_reaper(shutdown=polite) as reaper:
                ...
        ```
    """

    signal: int = _signal.SIGTERM
    grace: float = 5.0
    scope: Scope = "process"

    def __post_init__(self) -> None:
        if not self.grace >= 0:  # NaN too
            msg = f"grace is a number of seconds, 0 or more (math.inf: SIGKILL is never sent), not {self.grace!r}"
            raise ValueError(msg)
        if self.scope not in get_args(Scope):
            msg = f"scope is 'process' or 'group', not {self.scope!r}"
            raise ValueError(msg)
        if self.signal not in _signal.valid_signals():
            msg = f"signal is the number of a signal, such as signal.SIGTERM, not {self.signal!r}"
            raise ValueError(msg)


class Ladder:
    """Ends the owned children of a reaper: the first signal, the grace period, SIGKILL, the collecting.

    Args:
        service: The reaper.
        leaving: What began it.
        only: End this one child and no other. Default: all.
    """

    def __init__(self, service: Service, leaving: BaseException | None, *, only: Watch | None = None) -> None:
        self._service = service
        self._loop = service.loop
        self._only = only
        self._began = self._loop.now()
        self._kill_at: dict[Watch, float] = {}
        self._killed_at: dict[Watch, float] = {}
        self._trouble: dict[Watch, str] = {}
        self._given_up = False  # on the owned ones
        self._taken = 0
        self._thorough = False
        self._orphans_until = self._orphans_given_up = math.inf
        self._hurry = False
        self.interrupt: BaseException | None = None
        # The second cancellation says that it takes too long. The first one is what began this, or is still to come.
        self._cancelled = service.loop.cancelled_scopes()
        cancelled = isinstance(leaving, (KeyboardInterrupt, anyio.get_cancelled_exc_class()))
        self._patience = self._cancelled() if cancelled else max(1, self._cancelled())

    async def climb(self) -> dict[int, str]:
        """End them. Shielded and bounded; returns those that outlived SIGKILL, and in what state."""
        look_at, delay = -math.inf, _LOOK_FIRST
        due, last = -math.inf, False
        while True:
            try:
                now = self._loop.now()
                if now >= look_at:
                    await self._look()
                    look_at, delay = now + delay, min(delay * 2, _LOOK_LAST)
                if not self._left() and not await self._look_for_orphans(certain=True):
                    return self._survivors()
                if not self._hurry and self._cancelled() > self._patience:
                    self._hurry, due = True, -math.inf
                if now >= due or self._service.starting or self._news():
                    due, last = await self._step(now)
                    if last and now >= due:
                        if self._only is not None or self._service.orphans is None or self._family is not None:
                            return self._survivors()
                        self._given_up, due = True, -math.inf  # the orphans have to be ended all the same
                await self._pause(min(due, look_at, now + _COUNT))
            except self._loop.interrupts as exc:
                self.interrupt = exc
                self._hurry = True
                look_at, delay, due = -math.inf, _LOOK_FIRST, -math.inf

    def _left(self) -> bool:
        return bool(self._rest() or (self._service.starting and not self._given_up and self._only is None))

    def _rest(self) -> list[Watch]:
        return list(self._family.to_end()) if self._family is not None else self._owned()

    def _owned(self) -> list[Watch]:
        both = (*self._service.owned, *self._service.groups)
        return [watch for watch in both if self._only is None or watch is self._only]

    # Orphans come last: who owned them, as far as anybody did, is given the time to end them himself. And they come in
    # rounds, for one that is ended may leave children behind. Each of them gets the first signal. But a family in which
    # each generation waits for SIGKILL would take a grace period for each, so from the end of the second one on SIGKILL
    # follows at once; and one that forks faster than it is killed is given up in the end.

    @property
    def _family(self) -> Orphans | None:
        """The orphans, once it is their turn."""
        service = self._service
        busy = service.owned or service.groups or service.starting
        return None if self._only is not None or (busy and not self._given_up) else service.orphans

    def _news(self) -> bool:
        return self._family is not None and self._family.taken != self._taken

    async def _look_for_orphans(self, *, certain: bool = False) -> bool:
        """Look whether there are new ones, to be certain until nothing is undecided. True if there is anybody left."""
        family = self._family
        for _ in range(_LOOKS):
            if family is None:
                break
            for _ in family.look(thorough=certain and not self._thorough):
                await self._pause(-math.inf)
            self._thorough |= certain
            if not certain or not family.undecided:
                break
            await self._pause(self._loop.now() + _LOOK_FIRST)
        return self._left()

    async def _step(self, now: float) -> tuple[float, bool]:
        """Send what is due. Returns when there is something to do again, and whether that is to give up."""
        began = time.monotonic()
        if self._family is not None:
            self._taken = self._family.taken
            self._orphans_until = min(self._orphans_until, now + 2 * self._service.shutdown.grace)
            if self._hurry or now >= self._orphans_until:
                self._orphans_given_up = min(self._orphans_given_up, now + ORPHANS_BOUND)
        for watch in self._rest():
            policy = watch.policy
            if watch in self._killed_at:
                continue
            if self._hurry or policy.grace == 0 or now >= self._kill_at.get(watch, math.inf):
                # It may have ended in time without having been seen: then there is nobody to kill.
                registry.check(watch.record, self._service, thorough=True)
                self._send(watch, _signal.SIGKILL)
                self._killed_at[watch] = now
            elif watch not in self._kill_at:
                self._kill_at[watch] = min(now + policy.grace, self._orphans_until)
                self._send(watch, policy.signal)
                self._send(watch, _signal.SIGCONT)
            if time.monotonic() - began > _SLICE:
                await self._pause(-math.inf)
                began = time.monotonic()
        rest = self._rest()
        if now >= self._orphans_given_up:
            return now, True
        waiting = [self._kill_at.get(watch, now) for watch in rest if watch not in self._killed_at]
        if waiting:
            return min(waiting), False
        return max((self._killed_at[watch] for watch in rest), default=self._began) + KILL_BOUND, True

    def _send(self, watch: Watch, signum: int) -> None:
        if watch not in self._service.owned and watch not in self._service.groups and not watch.orphan:
            return
        if watch.policy.scope == "process":
            sends = [registry.send]
        elif watch.record.ended or _kernel.leads_group(watch.record.pid):
            sends = [registry.send_group]
        else:  # it went into another group. That one is not ours to signal, but the child is
            sends = [registry.send_group, registry.send]
        for send in sends:
            try:
                send(watch.record, signum)
            except OSError as exc:  # EPERM: another user's by now. It may end by itself, and is named if it does not
                self._trouble[watch] = f"signal {signum} could not be sent: {exc.strerror}"

    async def _look(self) -> None:
        began = time.monotonic()
        for watch in self._rest():
            registry.check(watch.record, self._service, thorough=True)
            if time.monotonic() - began > _SLICE:
                await self._pause(-math.inf)
                began = time.monotonic()
        self._service.look_at_groups()
        await self._look_for_orphans()

    async def _pause(self, until: float) -> None:
        """Wait until a time, or until a child has ended. Only what no shield keeps off comes through."""
        with anyio.CancelScope(shield=True, deadline=max(until, self._loop.now())):
            await self._loop.park(self._service.parked)

    def _survivors(self) -> dict[int, str]:
        seen: dict[int, str] = {}
        left = {*self._owned(), *self._rest()}
        members = registry.survivors(watch.record for watch in left if watch.policy.scope == "group")
        for watch in left:
            pids = set() if watch.record.status is not None else {watch.record.pid}
            for pid in pids.union(members.get(watch.record, ())):
                seen[pid] = ", ".join(filter(None, (_state(pid), self._trouble.get(watch))))
        return dict(sorted(seen.items()))


def _state(pid: int) -> str:
    fields = _kernel.stat_fields(pid)
    return f"state {fields[0]}" if fields else ""
