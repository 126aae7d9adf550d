"""The library on a kernel that is played (`simkernel`): what real processes can't be made to do, in every order.

`ANYREAP_THOROUGH=1` in the environment looks at more of it, for minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import signal
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import pytest
import sniffio
import trio
import trio.testing
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import anyreap
from anyreap import _loop
from anyreap._finder import Finder
from anyreap._registry import Answer, Link, Registry
from tests import harness
from tests.harness import run_alone
from tests.simkernel import Kernel, Process, simulated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THOROUGH = bool(os.environ.get("ANYREAP_THOROUGH"))


# Any order: a machine that acts between any two steps of trio ---------------------------------------------------------


class Steps:
    """trio, one step of its scheduler at a time.

    `trio.run` is these lines in a loop. Nothing public stops between two of them: guest mode has a thread.
    """

    nursery: trio.Nursery

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self._runner = trio._core._run.setup_runner(self.clock, [], False, True)
        self._run = trio._core._run.unrolled_run(self._runner, self._main, ())
        self._events: Any = None
        self.settle()

    async def _main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            await trio.sleep_forever()

    def step(self) -> bool:
        """Let each task that can run do so once. False if there is none left."""
        before, sniffio.thread_local.name = sniffio.thread_local.name, "trio"
        try:
            timeout = self._run.send(self._events)
        except StopIteration:
            return False
        finally:
            sniffio.thread_local.name = before
        self._events = self._runner.io_manager.get_events(0)
        return timeout == 0 or bool(self._events)

    def settle(self) -> None:
        """Go on until everybody waits, which must not take for ever (promise 8: the loop does not spin)."""
        for _ in range(2000):
            if not self.step():
                return
        pytest.fail("the loop spins")

    def pass_time(self, seconds: float) -> None:
        """Let time pass, in pieces: what is asked for again soon is asked for several times."""
        for _ in range(8):
            self.clock.jump(seconds / 8)
            self.settle()

    def close(self) -> None:
        """End the run."""
        self.nursery.cancel_scope.cancel()
        self.settle()


class Block:
    """A task with a reaper."""

    reaper: anyreap.Reaper

    def __init__(self, source: Any) -> None:
        self.source = source
        self.scope = trio.CancelScope()
        self.leave = trio.Event()
        self.left = False
        self.error: BaseException | None = None

    async def run(self) -> None:
        """Open it, and leave when told."""
        try:
            with self.scope:
                async with anyreap.open_reaper(source=self.source) as self.reaper:
                    await self.leave.wait()
        except (OSError, RuntimeError) as exc:
            self.error = exc
        finally:
            self.left = True

    @property
    def failed(self) -> bool:
        """Whether its service has failed."""
        return self.error is not None or self.reaper._service.failure is not None


@dataclasses.dataclass(eq=False)
class Life:
    """What was done with a process: the model."""

    process: Process
    asked: dict[Block, bool] = dataclasses.field(default_factory=dict)  # who watches it, and whether to collect it
    owned: set[Block] = dataclasses.field(default_factory=set)
    sent: list[int] = dataclasses.field(default_factory=list)
    held_up: bool = False  # by a tracer, once: it may outlive SIGKILL, and its block
    forgotten: bool = False  # stolen, and nothing can tell how it ended


@dataclasses.dataclass(eq=False)
class Waiter:
    """A task that waits for a child."""

    life: Life
    block: Block
    child: anyreap.Child
    outcome: anyreap.ExitStatus | Exception | str = ""
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)

    async def run(self) -> None:
        """Wait."""
        with self.scope:
            try:
                self.outcome = await self.child.wait()
            except (anyreap.StatusLost, anyio.ClosedResourceError, RuntimeError) as exc:
                self.outcome = exc
        self.outcome = self.outcome or "cancelled"


# What a call may fail with. Not ECHILD, ESRCH or EAGAIN, nor EINVAL for the opening of a pidfd: those are answers.
TROUBLE = [errno.EPERM, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENOSYS, errno.EINVAL]
CALLS = ["waitid", "wait4", "pidfd_open", "fstat", "pidfd_send_signal", "kill", "ioctl"]


class World(RuleBasedStateMachine):
    """Anything happens to processes, in any order, between any two steps of the loop; reapers watch them."""

    @initialize(
        pidfds=st.booleans(),
        numbered=st.booleans(),
        remembers=st.booleans(),
        budget=st.sampled_from([1000, 1]),
        source=st.sampled_from(["sigchld", "pidfd"]),
    )
    def start(self, pidfds: bool, numbered: bool, remembers: bool, budget: int, source: str) -> None:
        """Begin with one reaper and no process."""
        self.stack = contextlib.ExitStack()
        kernel = Kernel(pidfds=pidfds, numbered=numbered, remembers=remembers, budget=budget)
        self.kernel = self.stack.enter_context(simulated(kernel))
        self.kernel.before = self.judge
        self.lives: dict[Process, Life] = {}
        self.children: list[tuple[Life, Block, anyreap.Child]] = []
        self.waiters: list[Waiter] = []
        self.blocks: list[Block] = []
        self.wrong: list[str] = []
        self.steps = Steps()
        self.open(source)
        for how in ("reap", "observe", "adopt"):
            self.begin(how, waits=True, deaf=False)

    def judge(self, call: str, process: Process | None) -> None:
        """Nobody is collected who was not handed in for it. An error here would only make the service fail."""
        if call == "wait4" and process is not None and not any(self.lives[process].asked.values()):
            self.wrong.append(f"{process} was collected")

    # What processes do

    def some(self, data: st.DataObject, wanted: Callable[[Process], bool]) -> Process | None:
        """One of the processes."""
        found = [process for process in self.kernel.processes.values() if wanted(process)]
        return data.draw(st.sampled_from(sorted(found, key=lambda process: process.birth))) if found else None

    @precondition(lambda self: not self.kernel.full)
    @rule(child=st.sampled_from([True, True, True, False]), deaf=st.booleans())
    def start_another(self, child: bool, deaf: bool) -> None:
        """A process starts that nobody hands in yet."""
        self.spawn(child=child, deaf=deaf)

    def spawn(self, *, child: bool, deaf: bool) -> Process:
        """Start a process. It gets a free number, which somebody has had."""
        process = self.kernel.spawn(child=child)
        process.deaf = deaf
        self.lives[process] = Life(process)
        return process

    @rule(data=st.data(), code=st.integers(0, 255))
    def exit(self, data: st.DataObject, code: int) -> None:
        """One exits."""
        if process := self.some(data, lambda process: process.state == "running" and not process.stopped):
            self.kernel.end(process, code=code)

    @rule(data=st.data(), signum=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, signal.SIGCONT]))
    def be_signalled(self, data: st.DataObject, signum: int) -> None:
        """One is signalled from elsewhere."""
        if process := self.some(data, lambda process: process.state == "running"):
            self.kernel.signal(process, signum)

    @rule(data=st.data())
    def steal(self, data: st.DataObject) -> None:
        """Somebody else collects a zombie; who left it to him on purpose, or was to get its status."""
        if process := self.some(data, lambda process: process.state == "zombie" and not process.traced):
            life = self.lives[process]
            pidfd = any(child._watch.record.pidfd >= 0 for each, _, child in self.children if each is life)
            life.forgotten = not (pidfd and self.kernel.remembers)
            self.kernel.steal(process)

    @rule(data=st.data())
    def trace(self, data: st.DataObject) -> None:
        """A tracer takes one, or lets it go, of which nothing tells."""
        if process := self.some(data, lambda process: process.child):
            process.traced = not process.traced and process.state == "running"
            self.lives[process].held_up |= process.traced

    # What is asked of reapers

    @precondition(lambda self: sum(not block.left for block in self.blocks) < 2)
    @rule(source=st.sampled_from(["sigchld", "pidfd"]))
    def open(self, source: str) -> None:
        """A reaper is opened, beside the one that is there."""
        block = Block(source)
        self.blocks.append(block)
        self.steps.nursery.start_soon(block.run)
        self.steps.settle()
        assert not block.left

    def usable(self) -> list[Block]:
        """The blocks that take children."""
        return [b for b in self.blocks if not (b.left or b.failed or b.leave.is_set() or b.scope.cancel_called)]

    @precondition(lambda self: self.usable() and not self.kernel.full)
    @rule(how=st.sampled_from(["reap", "reap", "observe", "adopt"]), waits=st.booleans(), deaf=st.booleans())
    def begin(self, how: str, waits: bool, deaf: bool) -> None:
        """A child is started and handed in, as most are; maybe somebody waits for it."""
        process = self.spawn(child=True, deaf=deaf)
        if self.watch(process, self.usable()[-1], how) and waits:
            self.let_wait(*self.children[-1])

    @rule(data=st.data(), how=st.sampled_from(["reap", "reap", "observe", "adopt"]))
    def hand_in(self, data: st.DataObject, how: str) -> None:
        """A pid is handed in: that of a child, a zombie, or a stranger."""
        process, blocks = self.some(data, lambda _: True), self.usable()
        if process is not None and blocks:
            self.watch(process, data.draw(st.sampled_from(blocks)), how)

    def watch(self, process: Process, block: Block, how: str) -> bool:
        """Hand one in. False if it is refused, as it must be."""
        life = self.lives[process]
        troubles = len(self.kernel.failed)
        # What has the number now is the child that is meant, also while one that had it is still in the table.
        before = dict(life.asked)
        life.asked[block] = life.asked.get(block, False) or how != "observe"
        try:
            if how == "adopt":
                child = block.reaper.adopt(process.pid)
                life.owned.add(block)
            else:
                child = block.reaper.watch(process.pid, reap=how == "reap")
        except anyreap.NotAChild:
            life.asked = before
            assert not process.child or len(self.kernel.failed) > troubles
            return False
        except OSError:
            life.asked = before
            assert len(self.kernel.failed) > troubles
            return False
        assert process.child
        self.children.append((life, block, child))
        return True

    @precondition(lambda self: self.children)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        """One more task waits, before the end or after it."""
        self.let_wait(*data.draw(st.sampled_from(self.children)))

    def let_wait(self, life: Life, block: Block, child: anyreap.Child) -> None:
        """Start a task that waits."""
        self.waiters.append(Waiter(life, block, child))
        self.steps.nursery.start_soon(self.waiters[-1].run)

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """One that waits is cancelled, in the same moment maybe as it is told (C4)."""
        data.draw(st.sampled_from(self.waiters)).scope.cancel()

    @precondition(lambda self: self.children)
    @rule(data=st.data(), signum=st.sampled_from([signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT]))
    def send(self, data: st.DataObject, signum: int) -> None:
        """A child is signalled through its handle: one that runs, or whose number is another one's by now (K2, K5)."""
        life, _, child = data.draw(st.sampled_from(self.children))
        arrives = life.process.state == "running" and not child.lost
        try:
            child.send_signal(signum)
        except OSError:
            assert self.kernel.failed
        else:
            life.sent += [signum] * arrives

    @rule(data=st.data(), how=st.sampled_from(["leave", "cancel"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        """A block is left: its body returns, or is cancelled."""
        if blocks := self.usable():
            block = data.draw(st.sampled_from(blocks))
            block.scope.cancel() if how == "cancel" else block.leave.set()

    # What else happens

    @rule(what=st.sampled_from(["hold", "deliver", "lose"]))
    def hint(self, what: str) -> None:
        """SIGCHLD is blocked for a while; then it comes, once for all (A5), or never."""
        if what == "lose":
            self.kernel.pending = False
        self.kernel.held = what == "hold"
        if what == "deliver":
            self.kernel.hint()

    @rule(call=st.sampled_from(CALLS), number=st.sampled_from(TROUBLE))
    def fail(self, call: str, number: int) -> None:
        """The next call of a name fails (N3)."""
        if (call, number) != ("pidfd_open", errno.EINVAL):
            self.kernel.trouble = {call: number}

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        """The loop goes on, not to its end."""
        for _ in range(count):
            self.steps.step()

    @rule()
    def beat(self) -> None:
        """Time for a heartbeat passes. Then everything must have been told that there is to tell (E7)."""
        self.steps.settle()
        ended = {process for process in self.lives if process.state != "running" and not process.traced}
        left = {block for block in self.blocks if block.left}
        self.steps.pass_time(1.25)
        for life in self.lives.values():
            healthy = [block for block in life.asked if not block.left and not block.failed]
            if life.process in ended and any(life.asked[block] for block in healthy) and not self.excused(life):
                assert life.process.state == "gone", f"{life.process} is left uncollected"
        for waiter in self.waiters:
            assert waiter.outcome or not (waiter.life.process in ended or waiter.block in left), f"untold: {waiter}"

    def excused(self, life: Life) -> bool:
        """Whether the kernel has refused an answer about a child: no promise holds for that one then."""
        return any(process is life.process for _, process in self.kernel.failed)

    # The promises

    @invariant()
    def nobody_else_is_collected(self) -> None:
        """Promise 3, for the collecting."""
        assert not self.wrong
        for life in self.lives.values():
            life.asked = {block: reap for block, reap in life.asked.items() if not block.left}

    @invariant()
    def nobody_else_is_signalled(self) -> None:
        """Promises 3 and 6: each process has got what was sent to it, and no other. What is owned gets more."""
        for life in self.lives.values():
            if not life.owned and not self.excused(life):
                assert life.process.signals == life.sent

    @invariant()
    def what_is_told_is_true(self) -> None:
        """Promise 2: a waiter is told how its child ended; or that nobody can know; or why it can't be told."""
        for waiter in self.waiters:
            life, outcome = waiter.life, waiter.outcome
            if isinstance(outcome, anyreap.ExitStatus):
                assert life.process.state != "running"
                assert (outcome.pid, outcome.returncode) == (life.process.pid, life.process.returncode)
                assert outcome.usage is None or outcome.usage.ru_utime == life.process.birth
            elif isinstance(outcome, anyreap.StatusLost):
                assert life.forgotten or self.excused(life)
            elif isinstance(outcome, anyio.ClosedResourceError):
                assert waiter.block.left or waiter.block.reaper._service.closed
            elif isinstance(outcome, RuntimeError):
                assert self.kernel.failed
                assert isinstance(outcome.__cause__, OSError)
            elif outcome:
                assert waiter.scope.cancel_called

    def teardown(self) -> None:
        """All blocks are left. What is owned is gone then, and everybody has been told something."""
        if not hasattr(self, "steps"):
            return
        with self.stack:
            self.kernel.trouble, self.kernel.held = {}, False
            for process in self.kernel.processes.values():
                process.traced = False
            for block in self.blocks:
                block.scope.cancel()
            for _ in range(8):  # the grace period of the deaf
                self.steps.pass_time(1.0)
            assert all(block.left for block in self.blocks)
            assert all(waiter.outcome for waiter in self.waiters)
            self.steps.close()
            for life in self.lives.values():
                left = life.owned and life.process.state != "gone"
                assert not left or life.held_up or self.excused(life), f"{life.process} is left"
            for block in self.blocks:
                assert block.error is None or self.kernel.failed or isinstance(block.error, anyreap.StillRunning)


def test_anything_in_any_order() -> None:
    """No zombie, no wrong status, no theft, no wrong process, nobody left waiting: whatever happens, in whatever order
    (A6, B2, B3, C1, C2, C4, D7, D11, E1, E9, I4, K2, K3, K5, N3).
    """
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=5000 if THOROUGH else 100,
            stateful_step_count=60,
            deadline=None,
            derandomize=not THOROUGH,  # a red run in CI is the same one at home
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Every point in turn: one life of a reaper, disturbed once ------------------------------------------------------------


class Boom(Exception):
    """What is no errno: a fault of the library, or no memory."""


@dataclasses.dataclass
class Story:
    """One life of a reaper, and of the children that it is given. `disturb` is called at each point of it, with what
    that point is: "before" or "after" an await of the service, or the name of a system call.
    """

    source: Any
    disturb: Callable[[str], None] = lambda point: None
    kernel: Kernel = dataclasses.field(default_factory=Kernel)
    told: dict[Process, object] = dataclasses.field(default_factory=dict)  # what its waiter got
    refused: set[Process] = dataclasses.field(default_factory=set)
    owned: list[Process] = dataclasses.field(default_factory=list)
    error: BaseException | None = None
    took: float = 0.0

    def run(self) -> Story:
        """Live it, on a clock that jumps to where something happens next."""

        async def interrupted(method: Callable[..., Any], *args: Any) -> Any:
            self.disturb("before")
            result = await method(*args)
            self.disturb("after")
            return result

        def fuse(name: str) -> Callable[..., Any]:
            method = getattr(_loop.TrioLoop, name)
            return lambda *args: interrupted(method, *args)

        self.kernel.before = lambda call, process: self.disturb(call)
        with simulated(self.kernel), pytest.MonkeyPatch.context() as patch:
            patch.setattr(_loop.TrioLoop, "_wait", fuse("_wait"))
            patch.setattr(_loop.TrioLoop, "checkpoint", fuse("checkpoint"))
            trio._core._run._r.seed(0)
            trio.run(self._tell, clock=trio.testing.MockClock(autojump_threshold=0))
        return self

    async def _tell(self) -> None:
        began = trio.current_time()
        mine = [self.kernel.spawn() for _ in range(5)]
        first, second, owned, observed, traced = mine
        self.owned = [owned]
        traced.traced = True
        async with trio.open_nursery() as nursery:
            try:
                async with anyreap.open_reaper(source=self.source, heartbeat=0.3) as reaper:
                    for process in mine:
                        self._hand_in(reaper, process, nursery, reap=process is not observed)
                    await trio.testing.wait_all_tasks_blocked()
                    self._exit(first, 1)
                    self._exit(second, 2)
                    await trio.testing.wait_all_tasks_blocked()
                    self._exit(traced, 5)
                    await trio.testing.wait_all_tasks_blocked()
                    traced.traced = False
                    self._exit(observed, 4)
                    await trio.sleep(1)
                    self._exit(owned, 3)
            except (Boom, OSError, RuntimeError) as exc:
                self.error = exc
        self.took = trio.current_time() - began
        # What was not collected still can be, by whoever comes next.
        self.disturb = lambda point: None
        async with anyreap.open_reaper(source=self.source, heartbeat=0.3) as reaper:
            for process in mine:
                if process.state != "gone":
                    self._exit(process, 9)
                    assert (await reaper.wait(process.pid)).returncode == process.returncode

    def _exit(self, process: Process, code: int) -> None:
        if process.state == "running":
            self.kernel.end(process, code=code)

    def _hand_in(self, reaper: anyreap.Reaper, process: Process, nursery: trio.Nursery, *, reap: bool) -> None:
        try:
            child = reaper.adopt(process.pid) if process in self.owned else reaper.watch(process.pid, reap=reap)
        except (Boom, OSError):
            self.refused.add(process)
        else:
            nursery.start_soon(self._wait, child, process)

    async def _wait(self, child: anyreap.Child, process: Process) -> None:
        try:
            self.told[process] = await child.wait()
        except (anyreap.StatusLost, RuntimeError, anyio.ClosedResourceError) as exc:
            self.told[process] = exc

    def check(self, *causes: BaseException) -> None:
        """Whoever was handed in has got its status, or is known as lost, or a RuntimeError that says why."""
        assert len(self.told) + len(self.refused) == 5
        for process, told in self.told.items():
            if isinstance(told, anyreap.ExitStatus):
                assert told.returncode == process.returncode
            elif isinstance(told, RuntimeError):
                assert told.__cause__ in causes
            else:
                # Somebody else's wait has raised it, or the block was left before the end of this one.
                assert isinstance(told, (anyreap.StatusLost, anyio.ClosedResourceError))
        for process in self.owned:
            assert process.state == "gone" or process in self.refused


def points_of(source: Any, *, service: bool = False) -> list[str]:
    """The points of an undisturbed life; only those at which the service runs, or all."""
    points: list[str] = []

    def note(point: str) -> None:
        if not service or in_service():
            points.append(point)

    story = Story(source, note).run()
    assert all(isinstance(told, anyreap.ExitStatus) for told in story.told.values())
    assert len(story.told) == 5
    return points


def in_service() -> bool:
    """Whether the service task runs now."""
    try:
        return "anyreap_service" in trio.lowlevel.current_task().name
    except RuntimeError:
        return False


def at(number: int, act: Callable[[], None], *, service: bool = False, calls: bool = False) -> Callable[[str], None]:
    """What does something at the n-th point, once; of those at which the service runs, or of the system calls."""
    left = number

    def disturb(point: str) -> None:
        nonlocal left
        if (in_service() or not service) and not (calls and point in ("before", "after")):
            left -= 1
            if left == -1:
                act()

    return disturb


def throws(exc: BaseException) -> Callable[[], None]:
    """What raises something."""

    def throw() -> None:
        raise exc

    return throw


SOURCES = pytest.mark.parametrize("source", ["sigchld", "pidfd"])


@SOURCES
def test_service_that_fails_at_any_point(source: Any) -> None:
    """The service fails at each of its awaits, and at each of its system calls, in turn: who waits gets a RuntimeError
    with the cause, the block is left, the owned one is collected, the others can be, and all is put back (N2).
    """
    handler = signal.getsignal(signal.SIGCHLD)
    points = points_of(source, service=True)
    assert {"before", "after", "waitid", "wait4"} <= set(points)
    heard = []
    for number in range(len(points)):
        boom = Boom(f"{points[number]}, point {number}")
        story = Story(source, at(number, throws(boom), service=True)).run()
        story.check(boom)
        # Who was told before keeps what he was told. No one is told that the status is lost, for it is not.
        untold = [told for told in story.told.values() if not isinstance(told, anyreap.ExitStatus)]
        assert all(isinstance(told, RuntimeError) for told in untold)
        heard.append(len(untold))
        if story.error is not None:
            assert story.error.__cause__ is boom
        assert signal.getsignal(signal.SIGCHLD) == handler
    assert heard == sorted(heard, reverse=True)
    assert set(heard) == {0, 1, 2, 3, 4, 5}


@SOURCES
@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, *((errno.ENOMEM, errno.EMFILE) if THOROUGH else ())])
def test_any_errno_at_any_call(source: Any, number: int) -> None:
    """Each system call of a reaper's life fails in turn with an errno that it does not expect: nobody is told what is
    not true, nobody waits for ever, and all is put back (N3, G6, B14).
    """
    calls = [point for point in points_of(source) if point not in ("before", "after")]
    for index in range(len(calls)):
        exc = OSError(number, os.strerror(number))
        disturb = at(index, throws(exc), calls=True)
        Story(source, disturb).run().check(exc)


class Race(Story):
    """A short life: one child that a test races with, while another one's exit keeps the service busy. Two wait."""

    child: Process
    scope: trio.CancelScope
    watched: bool
    point: str = ""

    async def _tell(self) -> None:
        # In front of ours stands somebody else's zombie, which is all that "has any child ended?" shows.
        foreign, self.child, other = (self.kernel.spawn() for _ in range(3))
        self.kernel.end(foreign)
        self.scope, self.watched = trio.CancelScope(), False
        self.outcomes: list[object] = []
        began = trio.current_time()
        async with (
            # So long that whatever the heartbeat has to find takes more than a second.
            anyreap.open_reaper(source=self.source, heartbeat=10) as reaper,
            trio.open_nursery() as nursery,
        ):
            self._hand_in(reaper, other, nursery, reap=True)
            try:
                child = reaper.watch(self.child.pid)
            except anyreap.NotAChild:
                self.refused.add(self.child)
                self.kernel.end(other)
                return
            self.watched = True
            nursery.start_soon(self._wait_for_it, child, self.scope)
            nursery.start_soon(self._wait_for_it, child, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
            self.kernel.end(other)
            await trio.testing.wait_all_tasks_blocked()
            self._exit(self.child, 6)
        self.took = trio.current_time() - began
        with contextlib.suppress(anyreap.StatusLost):
            self.outcomes.append(await child.wait())
        self.kernel.steal(foreign)  # its owner, at last

    async def _wait_for_it(self, child: anyreap.Child, scope: trio.CancelScope) -> None:
        with scope:
            try:
                self.outcomes.append(await child.wait())
            except anyreap.StatusLost as exc:
                self.outcomes.append(exc)

    def race(self, act: Callable[[], None]) -> Iterator[str]:
        """Live it once for each point up to the child's collection, with something else happening at that point."""
        number, reached = 0, True
        while reached:
            reached = False

            def act_once() -> None:
                nonlocal reached
                if self.child.state != "gone":
                    reached = True
                    act()

            kernel = self.kernel
            self.kernel = Kernel(pidfds=kernel.pidfds, remembers=kernel.remembers)
            disturb = at(number, act_once)

            def disturb_here(point: str, disturb: Callable[[str], None] = disturb) -> None:
                self.point = point
                disturb(point)

            self.disturb = disturb_here
            self.refused, self.told = set(), {}
            self.run()
            number += 1
            yield f"point {number}"

    def statuses(self) -> set[object]:
        """What everybody was told, as return codes; `StatusLost` for a lost status."""
        return {
            told.returncode if isinstance(told, anyreap.ExitStatus) else anyreap.StatusLost for told in self.outcomes
        }


KERNELS = pytest.mark.parametrize(
    "kernel", [Kernel(), Kernel(remembers=False), Kernel(pidfds=False)], ids=["new", "old", "bare"]
)


@SOURCES
@KERNELS
def test_exit_at_any_point(source: Any, kernel: Kernel) -> None:
    """A child exits at any await, or between any two system calls: no wake-up is lost (B1, B2, B3)."""
    race = Race(source, kernel=kernel)
    for point in race.race(lambda: race._exit(race.child, 6)):
        assert race.child.taker == "anyreap", point
        assert race.statuses() == {6}, point
        assert len(race.outcomes) == 3, point
        # Without pidfds nothing but the heartbeat wakes that source.
        assert race.took < 1 or (source == "pidfd" and not kernel.pidfds), point


@SOURCES
@KERNELS
def test_exit_and_cancellation_at_any_point(source: Any, kernel: Kernel) -> None:
    """A waiter is cancelled in the moment in which its child exits: the others are told, and so is who waits again
    (C2, C4).
    """

    def both() -> None:
        race._exit(race.child, 6)
        race.scope.cancel()

    race = Race(source, kernel=kernel)
    for point in race.race(both):
        assert race.statuses() == {6}, point
        assert len(race.outcomes) in (2, 3), point


@SOURCES
@KERNELS
@pytest.mark.parametrize("heir", ["none", "runs", "zombie"])
def test_theft_at_any_point(source: Any, kernel: Kernel, heir: str) -> None:
    """A child exits and is stolen at any point, also between the look at it and its collection. Who waits is told the
    truth, or that nobody knows it where the kernel does not; never what became of the next one that has its number,
    which is left alone (E1, E9, K3).
    """

    def steal() -> None:
        if not race.watched:  # else it would be the next one that is handed in
            return
        race._exit(race.child, 6)
        race.kernel.steal(race.child)
        if heir != "none":
            victim = heir_of(race.kernel, race.child)
            victims.append(victim)
            # Between the look at a zombie and its collection is no time to give a number to all others and then to
            # this one again, and have that one end. Nothing could be done about it: no wait call has both a pidfd and
            # the usage.
            if heir == "zombie" and race.point != "wait4":
                race.kernel.end(victim, code=77)

    victims: list[Process] = []
    seen: set[object] = set()
    known = {6} if kernel.pidfds and kernel.remembers else {6, anyreap.StatusLost}
    race = Race(source, kernel=kernel)
    for point in race.race(steal):
        assert len(race.statuses()) == 1, point
        seen |= race.statuses()
        assert all(not victim.taker and not victim.signals for victim in victims), point
    assert bool(victims) == (heir != "none")
    assert seen == known  # where it is not known, the glimpse before the collection is what tells


def heir_of(kernel: Kernel, process: Process, *, child: bool = True) -> Process:
    """Start processes until one gets the number of one that is gone."""
    while (heir := kernel.spawn(child=child)).pid != process.pid:
        pass
    return heir


@pytest.mark.parametrize("child", [True, False], ids=["child", "stranger"])
@pytest.mark.parametrize("numbered", [True, False], ids=["inodes", "start-times"])
@pytest.mark.parametrize(("pidfds", "budget"), [(True, 9), (True, 0), (False, 0)], ids=["pidfds", "spent", "none"])
def test_signal_never_hits_who_has_the_number_now(child: bool, numbered: bool, pidfds: bool, budget: int) -> None:
    """A child is stolen, or left, and its number is given to another one: a signal through its handle hits nobody
    (K2, K3, K5).
    """

    async def main() -> None:
        async with anyreap.open_reaper(source="pidfd") as reaper:
            stolen, left = kernel.spawn(), kernel.spawn()
            handles = [reaper.watch(stolen.pid), reaper.watch(left.pid)]
            handles[0].send_signal(signal.SIGUSR1)
            assert stolen.signals == [signal.SIGUSR1]
            kernel.steal(stolen)
            heir = heir_of(kernel, stolen, child=child)
            handles[0].kill()
        kernel.end(left)
        kernel.steal(left)
        second = heir_of(kernel, left, child=child)
        for handle in handles:
            handle.kill()
        assert heir.signals == second.signals == []

    kernel = Kernel(range(300, 306), pidfds=pidfds, numbered=numbered, budget=budget)
    with simulated(kernel):
        trio.run(main)


class Sandboxed(Kernel):
    """A sandbox, set up after the library has looked what there is, that knows no waiting for a pidfd."""

    def waitid(self, kind: int, number: int, flags: int) -> os.waitid_result | None:
        """`man 2 waitid`, but for P_PIDFD."""
        if kind == os.P_PIDFD:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().waitid(kind, number, flags)


def test_number_of_a_stolen_child_in_a_sandbox() -> None:
    """Where a child must be looked at by its number, though it has a pidfd, who has that number next is not collected
    in its place, and the pidfd still tells how it has ended (G6, K3).
    """

    async def main() -> None:
        async with anyreap.open_reaper(source="pidfd") as reaper:
            process = kernel.spawn()
            child = reaper.watch(process.pid)
            kernel.end(process, code=6)
            kernel.steal(process)
            heir = heir_of(kernel, process)
            kernel.end(heir, code=77)
            assert (await child.wait()).returncode == 6
            assert heir.state == "zombie"
            kernel.steal(heir)

    kernel = Sandboxed()
    with simulated(kernel):
        trio.run(main)


# Scale ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Somebody:
    """A reaper, and its share in each child, as little of both as the registry asks for."""

    finder: Finder
    reap: bool = True
    told: int = 0

    @property
    def home(self) -> Somebody:
        """The reaper of the share."""
        return self

    def post(self, watch: object, by: object) -> None:
        """Note that a child's waiters are told."""
        self.told += 1

    def forget(self, watch: object) -> None:
        """Nothing is observed."""

    def forked(self) -> None:
        """Nobody forks."""


def cost_of_an_exit(count: int) -> list[dict[str, int]]:
    """The system calls for each of some exits among so many children, all without a pidfd: past the budget."""
    kernel = Kernel(range(1, count + 2), budget=0)
    costs = []
    with simulated(kernel):
        crowd, somebody = Registry(), Somebody(Finder())
        link = Link(somebody)
        # As Registry.enter and join do it, but for the questions to the kernel.
        for _ in range(count):
            process = kernel.spawn()
            record = crowd._table.add(process.pid, -1, process.birth)
            crowd._table.join(record, link)
            somebody.finder.add(record)
        for pid in (1, count // 2, count):
            before = kernel.calls.copy()
            kernel.end(kernel.processes[pid])
            found = 0
            for record, _ in somebody.finder.candidates(0, beat=False):
                found += crowd.check(record, somebody) is Answer.ENDED
            assert found == 1
            costs.append(dict(kernel.calls - before))
        assert somebody.told == 3
        somebody.finder.close()
    return costs


def test_million_children() -> None:
    """Each exit among a million children costs as many system calls as among ten, also without pidfds (A11, G9)."""
    # In a process of its own: each child of this one would start with a gigabyte as its peak (wait4).
    run_alone(
        """
        from tests.test_simulation import cost_of_an_exit
        gc.disable()  # it would look at a million records again and again
        alone = cost_of_an_exit(10)
        assert max(sum(calls.values()) for calls in alone) < 10
        assert cost_of_an_exit(1_000_000) == alone
        os._exit(0)  # to let go of them one by one takes as long again
        """,
        flags=(),
        limit=60,
    )


# Agreement: the same acts, with real children and with the kernel that is played --------------------------------------


class Actor(Protocol):
    """Who plays a child. Each act is over when it returns: what it has killed is dead."""

    @property
    def pid(self) -> int:
        """Its pid."""

    def exit(self, code: int) -> None:
        """Let it exit."""

    def signal(self, signum: int) -> None:
        """Signal it from elsewhere."""

    def collect(self) -> bool:
        """Collect it as somebody else. False if there is no zombie."""


@dataclasses.dataclass
class Played:
    """A child of the kernel that is played."""

    kernel: Kernel
    process: Process

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    def exit(self, code: int) -> None:
        """Let it exit."""
        self.kernel.end(self.process, code=code)

    def signal(self, signum: int) -> None:
        """Signal it from elsewhere."""
        self.kernel.signal(self.process, signum)

    def collect(self) -> bool:
        """Collect it as somebody else."""
        if zombie := self.process.state == "zombie":
            self.kernel.steal(self.process)
        return zombie


class Real:
    """A real child: a shell that exits with what it reads."""

    def __init__(self) -> None:
        read, self._write = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
        self.pid = os.posix_spawn(harness.SHELL, ["sh", "-c", "read x; exit $x"], os.environ, file_actions=actions)
        os.close(read)

    def exit(self, code: int) -> None:
        """Let it exit."""
        os.write(self._write, b"%d\n" % code)
        harness.await_death(self.pid)

    def signal(self, signum: int) -> None:
        """Signal it from elsewhere."""
        os.kill(self.pid, signum)
        if signum != signal.SIGSTOP:
            harness.await_death(self.pid)

    def collect(self) -> bool:
        """Collect it as somebody else."""
        os.close(self._write)
        try:
            return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        except ChildProcessError:
            return False


async def play(seed: int, source: Any, spawn: Callable[[], Actor]) -> list[str]:
    """Do what the seed says, to one child after the other, and return what could be observed."""
    dice, seen = random.Random(seed), list[str]()
    still: list[Actor] = []
    async with anyreap.open_reaper(source=source, heartbeat=0.02) as reaper:
        for _ in range(16):
            actor, reap = spawn(), dice.random() < 0.7
            what = dice.choice(
                ["exit", "exit first", "killed", "hang up", "terminate", "stop", "steal", "steal", "stay"]
            )
            if what == "exit first":
                actor.exit(dice.randrange(256))
            child = reaper.watch(actor.pid, reap=reap)
            if dice.random() < 0.5:  # let it be seen running
                await trio.sleep(0.001)
            stolen = False
            match what:
                case "exit":
                    actor.exit(dice.randrange(256))
                case "killed":
                    actor.signal(signal.SIGKILL)
                case "hang up":
                    actor.signal(signal.SIGHUP)
                case "terminate":
                    child.terminate()
                case "stop":
                    actor.signal(signal.SIGSTOP)
                    child.kill()
                case "steal":
                    actor.exit(dice.randrange(256))
                    stolen = actor.collect()
                case "stay":
                    still.append(actor)
            with trio.move_on_after(0.05 if what == "stay" else 10) as scope:
                try:
                    told = str(await child.wait())
                except anyreap.StatusLost:
                    told = "lost"
            if scope.cancelled_caught:
                told = "running"
            zombie = what not in ("stay", "steal") and actor.collect()
            seen.append(f"{what} reap={reap}: {told}, {child.returncode}, {stolen=}, {zombie=}")
    for actor in still:
        actor.signal(signal.SIGKILL)
        assert actor.collect()
    return seen


def play_real(seed: int, source: Any) -> list[str]:
    """With real children."""
    return trio.run(play, seed, source, Real)


def play_simulated(seed: int, source: Any, kernel: Kernel) -> list[str]:
    """With the kernel that is played."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    with simulated(kernel):
        return trio.run(play, seed, source, lambda: Played(kernel, kernel.spawn()), clock=clock)


@SOURCES
@pytest.mark.parametrize("seed", range(50 if THOROUGH else 2))
def test_real_and_simulated_kernel_agree(source: Any, pidfds: bool, seed: int) -> None:
    """Real children and those of the simulated kernel, to which the same happens, are answered for in the same way:
    else all of this file would be about a kernel that there is not.
    """
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    kernel = Kernel(range(300, 330), pidfds=pidfds, remembers=release >= (6, 15))
    real = play_real(seed, source)
    assert play_simulated(seed, source, kernel) == real
    assert len(real) == 16
