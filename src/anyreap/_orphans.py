"""The orphans: descendants whose parent has ended, and that the kernel has given to this process (a subreaper).

The kernel does not say which of our children are orphans. They stand in one list with the children that were started
here, by us and by everybody else, and whose statuses are not ours to take. So an unknown child is a *stranger* until
one of three things proves that nobody in this process has started it:

1. **The tag.** Each child of `open_process` carries one in its environment, and hands it on to its descendants.
   `/proc/PID/environ` shows it from birth, but not of a zombie, and not of one that has cleared its environment or
   written its title over it.
2. **The mark.** What is owned, however it was started, is marked from outside (`_kernel.mark`), with the descendants
   that it has. What they start from then on inherits it, whatever it does to itself, and it shows of a zombie too.
3. **The age.** What is older than a complete list of our children that lacked it was somebody else's child then.

A proven orphan becomes a watched child like any other, with its pidfd and its identity: the finder finds it, the
registry collects it, the ladder ends it. That is all that this module does: it looks for strangers, and judges them.

A live stranger is never signalled. A dead one is left to whoever may have started it for `orphan_grace` seconds, and
for ever while a Popen or a multiprocessing.Process stands for it. Nothing here waits for any child: an orphan too is
collected by its pid.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Literal

from anyreap import _kernel, _sigchld
from anyreap._registry import registry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from anyreap._service import Service, Watch

# The environment variable that holds the tags, of each reaper around a child one, with a blank between them.
VARIABLE: Final = "ANYREAP_FAMILY"

# Looks are far enough from each other to take this part of a processor, where thousands of children make each of them
# long (2.5 ms at 4,000), as far as the heartbeat allows; and never closer than the pause, in seconds. What is done once
# for each newcomer does not count: were it put off, there would be more of them next time.
_SHARE: Final = 1 / 20
_PAUSE: Final = 0.005

# How long a look keeps the loop to itself, in seconds.
_SLICE: Final = 0.002

# By how much, in seconds, a process must be older than the list that lacked it. A fork notes the time a moment before
# the new process is in the list, and on a busy machine it may be put aside in between: who was started by this very
# process would look like an orphan then. A proof that comes late costs nothing but a moment, one that is wrong costs
# somebody his child.
_MARGIN: Final = 2.0

# When to judge again who can't be judged yet, in seconds.
_SOON: Final = 0.01

# How often an environment that is empty is read again. It is empty while a process is in the middle of its exec, which
# takes as long as the disk and the scheduler like. No arguments are shown then either, so that case gets a time, in
# seconds. One exec may follow another between the two readings, so the rest gets a few readings as well.
_READINGS: Final = 3
_EXEC: Final = 5.0


class Stranger:
    """A child of this process that nobody has handed in."""

    __slots__ = ("dead_since", "exec_since", "first", "lacked", "owner", "readings", "start")

    def __init__(self, lacked: int, *, first: bool | None) -> None:
        self.lacked = lacked  # when the last list was made that did not have it; -1: unknown
        self.first = first  # whether it is the first thread's: an orphan is given to that one; None: unknown
        self.start = -1
        self.readings = 0
        self.exec_since: float | None = None
        self.dead_since: float | None = None
        self.owner: weakref.ref[Any] | None = None

    def is_older_than_its_list(self) -> bool:
        """Whether it lived, and was no child of ours, when the last list was made that did not have it."""
        return self.first is not False and 0 <= self.start <= self.lacked - _kernel.ticks_in(_MARGIN)


class Orphans:
    """What one reaper knows of the strangers, and which of them it has taken in."""

    def __init__(self, service: Service, grace: float) -> None:
        self._service = service
        self._grace = grace
        # Two names of the same thing: for the environment, and for a limit that has to fit into 32 bits everywhere.
        self.number = 1 << 30 | int.from_bytes(os.urandom(4), "big") >> 2
        self.token = f"{os.getpid():x}-{self.number:x}"
        self.starting: set[int] = set()
        self._started = 0
        self._strangers: dict[int, Stranger] = {}
        self._unjudged: set[int] = set()
        self._listed_at = -1
        self._kin: set[Watch] = set()
        self._strays: set[Watch] = set()
        self.taken = 0  # how many were alive then
        self._useful = 0.0
        self.undecided = False  # whether the last look left somebody to be judged soon
        self._going_on: Iterator[None] | None = None
        self._hinted = False
        self._beat_at = self._pause_until = self._again_at = -math.inf

    # Opening and closing ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Become a subreaper; the first one notes what was found.

        Raises:
            RuntimeError: Not possible here.
        """
        global _found
        with registry.lock:
            if not _open:
                try:
                    _found = _kernel.orphans_come_here()
                    if not _found:
                        _kernel.set_subreaper(on=True)
                except OSError as exc:
                    msg = f"subreaper=True can't work here: the kernel or a sandbox refused it ({exc})"
                    raise RuntimeError(msg) from exc
            _open.append(self)
        self._list()

    def close(self) -> None:
        """Put back what was found, if this is the last one. Does nothing the second time."""
        with registry.lock:
            if self not in _open:
                return
            _open.remove(self)
            if _open or _found:
                return
            try:
                if _kernel.orphans_come_here():
                    _kernel.set_subreaper(on=False)
                    return
            except OSError:  # a sandbox that came after the opening
                return
        _sigchld.warn(
            "somebody cleared PR_SET_CHILD_SUBREAPER while a reaper with subreaper=True was open: descendants that"
            " were orphaned since then went to another process, and were not collected"
        )

    @property
    def _is_last(self) -> bool:
        """Whether nobody else stays open who could care for what is left."""
        return all(other is self or other._service.closing for other in _open)

    # The proofs ---------------------------------------------------------------------------------------------------

    def begin(self, env: Mapping[str, str] | None) -> tuple[int, dict[str, str]]:
        """Begin a start. Returns its number, and the environment for it, with the tag.

        Each start has a tag of its own: the child itself carries it as well, and until the reaper has been told its
        pid, only the number says that it is no orphan.
        """
        self._started += 1
        self.starting.add(self._started)
        tags = (os.environ if env is None else env).get(VARIABLE) or os.environ.get(VARIABLE, "")
        tagged = f"{tags} {self.token}.{self._started}".strip()
        return self._started, {**(os.environ if env is None else env), VARIABLE: tagged}

    def claim(self, pid: int) -> bool:
        """Mark a child, and the descendants that it has, from any thread. True if one of these was not marked yet."""
        # Marked first, then asked for its children: those that it starts after that inherit the mark. So a descendant
        # that is marked already was dealt with, and however fast they fork, this ends.
        _kernel.mark(pid, self.number)
        todo = _kernel.children_of(pid)
        found = False
        while todo:
            pid = todo.pop()
            if _kernel.mark(pid, self.number):
                found = True
                todo += _kernel.children_of(pid)
        return found

    def _judge(self, pid: int, stranger: Stranger) -> Literal["kin", "theirs", "stray", "soon", "unproven"]:
        fields = _kernel.stat_fields(pid)
        if len(fields) < 20:
            return "unproven"  # gone, or hidden from us (hidepid)
        if int(fields[1]) != os.getpid():
            return "unproven"  # it was collected, and its number given to a process elsewhere
        start = int(fields[19])
        if stranger.start not in (-1, start):
            stranger.lacked = -1  # it was collected, and its number given to another child
            stranger.dead_since = None
        stranger.start = start
        # It may be the very child that is being started, which has the mark too, and the tag of a start that goes on.
        # But that is the child of the thread that starts it: what was given to the first one was left behind by it, and
        # may die before the start is over.
        starting = stranger.first is not True and start >= min(list(registry.starts.values()), default=math.inf)
        mark = _kernel.mark_of(pid)
        if mark == self.number and not starting:
            return "kin"
        environment = _kernel.environment_of(pid)
        tags = _tags(environment)
        if self.token in tags and (stranger.first is True or tags[self.token] not in self.starting):
            return "kin"
        if starting:
            return "soon"
        if any(mark == other.number or other.token in tags for other in _open):
            return "theirs"  # that reaper will find it, unless it is closed before
        if environment == b"" and fields[0] not in "ZXx" and self._shows_more_soon(pid, stranger):
            return "soon"
        return "stray" if stranger.is_older_than_its_list() else "unproven"

    def _shows_more_soon(self, pid: int, stranger: Stranger) -> bool:
        if _kernel.has_arguments(pid):
            stranger.readings += 1
            return stranger.readings < _READINGS
        now = self._now()
        if stranger.exec_since is None:
            stranger.exec_since = now
        return now < stranger.exec_since + _EXEC

    # Looking ------------------------------------------------------------------------------------------------------

    def go_on(self, now: float, *, hint: bool) -> None:
        """Look for a slice of time, if it is time to look. The rest has to wait for the next call: so have others.

        Args:
            now: The time on the loop's clock.
            hint: Whether something has happened: who is orphaned is so because some process has ended.
        """
        self._hinted |= hint
        if self._going_on is None and now >= self.next_look:
            self._going_on = self.look()
        if self._going_on is not None and next(self._going_on, self) is self:
            self._going_on = None

    @property
    def next_look(self) -> float:
        """When to go on, on the loop's clock."""
        if self._going_on is not None:
            return -math.inf
        wanted = -math.inf if self._hinted else min(self._beat_at, self._again_at)
        return max(wanted, self._pause_until)

    def look(self, *, thorough: bool = False) -> Iterator[None]:
        """Look for orphans, and take them in. Yields now and then, for others to run.

        Args:
            thorough: Also look whether the old strangers are those that they were.
        """
        # Before, not after: what happens from here on is a reason to look once more.
        self._hinted = False
        self._again_at = math.inf
        self._useful = 0.0
        spent, began, cpu = 0.0, time.monotonic(), time.thread_time()
        for _ in self._look(thorough=thorough):
            if time.monotonic() - began > _SLICE:
                spent += time.thread_time() - cpu
                yield
                began, cpu = time.monotonic(), time.thread_time()
        spent += time.thread_time() - cpu - self._useful
        now = self._now()
        # Twice in a heartbeat: once may be a moment late, and no pidfd and no signal tells of an orphan that was never
        # seen alive.
        self._beat_at = now + self._service.heartbeat / 2
        self._pause_until = min(now + max(spent / _SHARE, _PAUSE), self._beat_at)

    def _look(self, *, thorough: bool) -> Iterator[None]:
        complete = self._list()
        for pid, known in list(self._strangers.items()) if thorough else ():
            if known.start != _started(pid):
                self._unjudged.add(pid)
            yield
        yield from self._judge_the_new(complete=complete)
        if self._grace < math.inf and _kernel.look_any() is not None:
            yield from self._look_at_the_dead()
        if self._service.closing and self._is_last:
            for watch in list(self._strays):  # what they have started will have to be ended too
                if _kernel.mark(watch.record.pid, self.number):
                    self.claim(watch.record.pid)
                yield

    def _judge_the_new(self, *, complete: bool) -> Iterator[None]:
        undecided = not complete  # it may lack somebody
        strays: dict[int, Stranger] = {}
        for pid in list(self._unjudged):
            record = registry.find(pid)
            stranger = self._strangers.get(pid)
            if record is not None or stranger is None:
                if record is None or not record.orphan:  # what another reaper has taken in may come to us yet
                    self._unjudged.discard(pid)
                continue
            # Who is not taken in, or left alone, is judged again: another reaper may have been faster, and another look
            # may be going on while this one pauses.
            began = time.thread_time()
            verdict = self._judge(pid, stranger)
            self._useful += time.thread_time() - began
            if verdict == "unproven" or (verdict == "kin" and self._take(pid, stranger, self._kin)):
                self._unjudged.discard(pid)
            elif verdict == "stray":
                strays[pid] = stranger
            elif verdict == "soon":
                undecided = True
            yield
        self.undecided = undecided
        if undecided:
            self._again_at = self._now() + _SOON
        # That a list is complete is as sure as the kernel's word for it. A Popen that says otherwise is believed.
        owners = owners_of(strays)
        for pid, stranger in strays.items():
            if pid in owners or self._take(pid, stranger, self._strays):
                self._unjudged.discard(pid)
            yield

    def _now(self) -> float:
        try:
            return self._service.loop.now()
        except RuntimeError:  # the loop is gone, and the block is being thrown away: nothing comes later
            return 0.0

    def _list(self) -> bool:
        """List the children, and note who is new. False if the list may lack somebody."""
        # All of it in one piece. Another look may be going on: the ladder has its own.
        now = _kernel.ticks()
        listed, complete = _kernel.children()
        for pid in listed.keys() - self._strangers.keys():
            self._strangers[pid] = Stranger(self._listed_at, first=listed[pid])
            self._unjudged.add(pid)
        # Who is not in a list that may lack somebody is not forgotten: he would be new, and too old, in the next one.
        if complete:
            for pid in self._strangers.keys() - listed.keys():
                del self._strangers[pid]
            self._listed_at = now
        return complete

    def _look_at_the_dead(self) -> Iterator[None]:
        now = self._now()
        due: dict[int, Stranger] = {}
        for pid, stranger in list(self._strangers.items()):
            yield
            if pid in self._unjudged:
                continue
            try:
                dead = registry.find(pid) is None and _kernel.look(pid) is not None
            except OSError:
                dead = False
            if not dead:
                stranger.dead_since = None
                continue
            if stranger.dead_since is None:
                stranger.dead_since = now
                stranger.start = _started(pid)
            if stranger.owner is not None and _is_owner(stranger.owner(), pid):
                continue
            if now >= stranger.dead_since + self._grace:
                due[pid] = stranger
            else:
                self._again_at = min(self._again_at, stranger.dead_since + self._grace)
        owners = owners_of(due)
        for pid, stranger in due.items():
            if pid in owners:
                stranger.owner = weakref.ref(owners[pid])
            elif not self._take(pid, stranger, self._strays):
                stranger.dead_since = None
            yield

    # Taking in ----------------------------------------------------------------------------------------------------

    def _take(self, pid: int, stranger: Stranger, family: set[Watch]) -> bool:
        began = time.thread_time()
        with self._service.loop.uninterrupted():
            watch = self._service.take_in(pid, stranger.start)
            if watch is None:
                return False
            family.add(watch)
        self._service.ask(watch)
        if watch in family:
            self.taken += 1
            if family is self._kin and _kernel.mark(pid, self.number):
                self.claim(pid)
        self._useful += time.thread_time() - began
        return True

    def to_end(self) -> set[Watch]:
        """The live orphans that are to be ended when the block is left.

        Those that are no known kin of ours are so by the last one to leave: they have no other parent any more.
        """
        found = self._kin | self._strays if self._is_last else self._kin
        return found - self._service.owned

    def ended(self, watch: Watch) -> None:
        """Note that a child was collected: its number may be another one's from now on."""
        self._kin.discard(watch)
        self._strays.discard(watch)
        if self._strangers.pop(watch.record.pid, None) is not None:
            self._unjudged.discard(watch.record.pid)


# What all reapers of this process share: who of them is a subreaper, oldest first, and what the first one found.
_open: Final[list[Orphans]] = []
_found = False


def _forked() -> None:
    # PR_SET_CHILD_SUBREAPER is not inherited.
    _open.clear()


os.register_at_fork(after_in_child=_forked)


def _started(pid: int) -> int:
    start = _kernel.start_time(pid)
    return -1 if start is None else start


def _tags(environment: bytes | None) -> dict[str, int]:
    """The tags in an environment: the token of each reaper, and the number of the start."""
    found = {}
    for setting in (environment or b"").split(b"\0"):
        name, _, tags = setting.partition(b"=")
        for tag in tags.decode("ascii", "replace").split() if name == VARIABLE.encode() else ():
            token, _, number = tag.partition(".")
            if number.isdecimal():
                found[token] = int(number)
    return found


# Who owns a zombie. A Popen that is alive and has not been polled is nowhere to be found but among all objects: in no
# list, and none that is kept while it is made could know of those that were made before. Asking the garbage collector
# who refers to the class takes 11 ms with a million objects (a fifth of what a collection takes), so it is asked only
# when a zombie is about to be taken, and once for all of them. It does not see what gc.freeze() has put away.

_POPEN: Final = subprocess.Popen


def owners_of(pids: Collection[int]) -> dict[int, Any]:
    """Find the Popen or multiprocessing.Process that stands for a child and has not collected it, where one does."""
    found: dict[int, Any] = {}
    if not pids:
        return found
    candidates = list(getattr(sys.modules.get("multiprocessing.process"), "_children", ()))
    kinds = {_POPEN}
    todo: list[type[Any]] = [_POPEN]
    while todo:
        fresh = [kind for kind in todo.pop().__subclasses__() if kind not in kinds]
        kinds.update(fresh)
        todo += fresh
    candidates += (each for each in gc.get_referrers(*kinds) if type(each) in kinds)
    for each in candidates:
        pid = _pid_and_code(each)[0]
        if pid in pids and _is_owner(each, pid):
            found[pid] = each
    return found


def _is_owner(owner: Any, pid: int) -> bool:
    return _pid_and_code(owner) == (pid, None)


def _pid_and_code(owner: Any) -> tuple[Any, Any]:
    # Past the attributes: what a subclass makes of them may be anything, a wait too.
    state = getattr(owner, "__dict__", {})
    if not isinstance(owner, _POPEN):
        state = getattr(state.get("_popen"), "__dict__", {})
    return state.get("pid"), state.get("returncode")
