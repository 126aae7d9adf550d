"""The table: which children are watched, and what is known of each. Pure state.

The rules:

- Everything that is known about a child lives here. This file knows no loop, no clock, no system call; it can be run
  against a simulated kernel with a million children.
- A record is one child, from the moment it was handed in until it was collected. Its pid leads to it meanwhile, and
  no longer: the number may be given to the next process then.
- States only go forward:

      RUNNING --> OBSERVED --> EXITED      the status is known; the zombie is left to its owner until somebody asks
         |  `------------------^           for it to be collected, or held because it leads a group
         `--> LOST                         it has ended, the status is gone

- A status is written once. There is nothing to write it over with.
- Nobody who watches is forgotten: what ends a record returns everybody who has to be told.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from anyreap._status import ExitStatus


class State(enum.Enum):
    """What is known of a child."""

    RUNNING = enum.auto()
    OBSERVED = enum.auto()
    EXITED = enum.auto()
    LOST = enum.auto()


class Keeper(Protocol):
    """An object that collects the child itself, so that its own `returncode` is right (a `Popen`)."""

    def collect(self, returncode: int) -> bool: ...
    def told(self) -> int | None: ...
    def told_soon(self) -> int | None: ...
    def tell(self, returncode: int) -> None: ...


class Watcher(Protocol):
    """Somebody who watches a child: one of each reaper, at most."""

    @property
    def reap(self) -> bool: ...


_W = TypeVar("_W", bound=Watcher)


class Record(Generic[_W]):
    """One child.

    `pidfd` is -1 where it has none; `glimpse` is the wait status that was seen before it was taken. `group`: the ids of
    those who have to end the process group that it leads. `held`: it leads a group whose number only its own zombie
    keeps from being given away, so it is not collected before the group is gone. `orphan`: it was not started by this
    process, but given to it.
    """

    __slots__ = (
        "ended",
        "glimpse",
        "group",
        "held",
        "identity",
        "keeper",
        "orphan",
        "pid",
        "pidfd",
        "state",
        "status",
        "tries",
        "watchers",
        "why",
    )

    def __init__(self, pid: int, pidfd: int, identity: int | None) -> None:
        self.pid: Final = pid
        self.pidfd = pidfd
        self.identity: Final = identity
        self.keeper: Keeper | None = None
        self.state = State.RUNNING
        self.ended = False  # whether everything that will ever be known of this child is known
        self.status: ExitStatus | None = None
        self.glimpse: int | None = None
        self.why = ""
        self.tries = 0
        self.group: frozenset[int] = frozenset()
        self.held = False
        self.orphan = False
        self.watchers: list[_W] = []

    @classmethod
    def over(cls, pid: int, state: State, *, status: ExitStatus | None = None, why: str = "") -> Self:
        """Make one of a child that was over before it could be entered."""
        record = cls(pid, -1, None)
        record.state, record.ended, record.status, record.why = state, True, status, why
        return record

    @property
    def reap(self) -> bool:
        """Whether it is to be collected: one who wants it is enough, and a held one has to wait."""
        if not self.held:
            for watcher in self.watchers:  # any() takes four times as long, in each exit
                if watcher.reap:
                    return True
        return False


class Table(Generic[_W]):
    """All the children that are watched in this process, by pid."""

    def __init__(self) -> None:
        self._records: dict[int, Record[_W]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, pid: int) -> Record[_W] | None:
        """Return the record of an uncollected child."""
        return self._records.get(pid)

    def add(self, pid: int, pidfd: int = -1, identity: int | None = None) -> Record[_W]:
        """Enter a child that is not in the table."""
        if pid in self._records:
            msg = f"pid {pid} is in the table already"
            raise ValueError(msg)
        record: Record[_W] = Record(pid, pidfd, identity)
        self._records[pid] = record
        return record

    def join(self, record: Record[_W], watcher: _W) -> None:
        """Let somebody watch a child."""
        record.watchers.append(watcher)

    def leave(self, record: Record[_W], watcher: _W) -> bool:
        """Let somebody stop watching; True if nobody is left, and the record with them."""
        if watcher in record.watchers:
            record.watchers.remove(watcher)
        if record.watchers:
            return False
        self._remove(record)
        return True

    def observed(self, record: Record[_W], status: ExitStatus) -> list[_W]:
        """Note how a child ended that is left to its owner. Returns who has to be told."""
        if record.state is not State.RUNNING:
            return []
        record.state = State.OBSERVED
        record.status = status
        return list(record.watchers)

    def exited(self, record: Record[_W], status: ExitStatus) -> list[_W]:
        """Note how a child ended that has been collected. Returns who has to be told."""
        if record.ended:
            return []
        if record.state is State.RUNNING or status.usage is not None:  # which only the collection gives
            record.status = dataclasses.replace(status, orphan=True) if record.orphan else status
        return self._end(record, State.EXITED)

    def lost(self, record: Record[_W], why: str) -> list[_W]:
        """Note that a child has ended and its status is gone. Returns who has to be told."""
        if record.state is not State.RUNNING:
            return []
        record.why = why
        return self._end(record, State.LOST)

    def drop(self, record: Record[_W]) -> None:
        """Forget an observed child that its owner has collected: its pid is free again."""
        self._remove(record)

    def _end(self, record: Record[_W], state: State) -> list[_W]:
        record.state, record.ended = state, True
        record.keeper = None
        self._remove(record)
        return list(record.watchers)

    def _remove(self, record: Record[_W]) -> None:
        if self._records.get(record.pid) is record:
            del self._records[record.pid]
