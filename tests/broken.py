"""Negative controls: anyreap, broken in one way at a time, to see that the tests notice.

`ANYREAP_BROKEN=name` in the environment breaks it, in this process and in those that `harness.run_alone` starts.
"""

from __future__ import annotations

import math
import os
import signal
from typing import TYPE_CHECKING, Any

from anyreap import _finder, _kernel, _process, _registry, _service, _shutdown, _sigchld

if TYPE_CHECKING:
    from collections.abc import Callable

BREAKAGES: dict[str, Callable[[], None]] = {}


def breakage(function: Callable[[], None]) -> Callable[[], None]:
    """Give a way to break it a name."""
    BREAKAGES[function.__name__] = function
    return function


@breakage
def no_heartbeat() -> None:
    """Look only when woken."""
    init = _service.Service.__init__

    def deaf(self: Any, *, heartbeat: float, **rest: Any) -> None:
        init(self, heartbeat=math.inf, **rest)

    _service.Service.__init__ = deaf  # type: ignore[method-assign]


@breakage
def no_source() -> None:
    """Hear neither of a signal nor of a pidfd."""
    _sigchld.SelfPipe.wake = lambda self: None  # type: ignore[method-assign]
    _kernel._usable = False


@breakage
def reaps_before_it_notes() -> None:
    """Take a status where it should only be looked at."""

    def look(pid: int, pidfd: int = -1) -> int | None:
        taken, raw = os.waitpid(pid, os.WNOHANG)
        return raw if taken else None

    _kernel.look = look


@breakage
def signals_by_bare_pid() -> None:
    """Signal whoever has the number now."""

    def send(pid: int, pidfd: int, identity: int | None, signum: int) -> bool:
        os.kill(pid, signum)
        return True

    _kernel.send = send
    _registry.Registry.send = lambda self, record, signum: send(record.pid, -1, None, signum)  # type: ignore[method-assign]


@breakage
def blocks_on_a_traced_child() -> None:
    """Wait for what is readable and not collectable."""
    take = _kernel.take

    def patient(pid: int) -> Any:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return take(pid)

    _kernel.take = patient
    _kernel.look = lambda pid, pidfd=-1: 0


@breakage
def takes_any_child() -> None:
    """Collect whoever has ended."""
    look = _kernel.look

    def greedy(pid: int, pidfd: int = -1) -> int | None:
        while (found := _kernel.look_any()) is not None and found[0] != pid:
            os.waitpid(found[0], os.WNOHANG)
        return look(pid, pidfd)

    _kernel.look = greedy


@breakage
def no_scan_behind_a_stranger() -> None:
    """Give up where a foreign zombie stands in the way."""

    def peeked(self: Any) -> Any:
        found = _kernel.look_any()
        record = self._bare.get(found[0]) if found is not None else None
        if record is not None:
            yield record, _finder.Origin.REPORTED

    _finder.Finder._peeked = peeked  # type: ignore[method-assign]
    no_heartbeat()


@breakage
def escalation_follows_the_leader() -> None:
    """Take a group for gone when its leader is."""
    _registry.Registry.survivors = lambda self, records: {}  # type: ignore[method-assign]


@breakage
def zombies_count_as_members() -> None:
    """Take a group that can be signalled for alive."""
    _kernel._lives = lambda fields: True


@breakage
def one_grace_each() -> None:
    """End one child after the other."""
    step = _shutdown.Ladder._step
    rest = _shutdown.Ladder._rest

    async def one(self: Any, now: float) -> Any:
        self._rest = lambda: rest(self)[:1]
        return await step(self, now)

    _shutdown.Ladder._step = one  # type: ignore[method-assign]


@breakage
def no_continue() -> None:
    """Leave a stopped child stopped."""
    send = _shutdown.Ladder._send

    def unheard(self: Any, watch: Any, signum: int) -> None:
        if signum != signal.SIGCONT:
            send(self, watch, signum)

    _shutdown.Ladder._send = unheard  # type: ignore[method-assign]


@breakage
def keeps_the_pipes_open() -> None:
    """Wait for a child before its pipes are closed."""
    _process.Process.close_pipes = lambda self: None  # type: ignore[method-assign]


@breakage
def forgets_cancelled_starts() -> None:
    """Leave a child whose start was cancelled to itself."""
    _process._kill = lambda process: None


@breakage
def leaves_its_handler() -> None:
    """Put nothing back."""
    _sigchld._Installed.remove = lambda self: True  # type: ignore[method-assign]


@breakage
def forked_children_share_the_pipe() -> None:
    """Do nothing about a fork."""

    def handle(self: Any, signum: int, frame: Any) -> None:
        for pipe in self.pipes:
            pipe.wake()

    _sigchld.forked = lambda: None
    _service.Service.forked = lambda self: None  # type: ignore[method-assign]
    _sigchld._Installed.handle = handle  # type: ignore[method-assign]


if name := os.environ.get("ANYREAP_BROKEN"):
    BREAKAGES[name]()
