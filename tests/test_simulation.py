"""The library on a kernel that is played (`simkernel`): what real processes can't be made to do, in every order.

`ANYREAP_THOROUGH=1` in the environment looks at more of it, for minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
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
from anyreap import _kernel, _loop
from anyreap._finder import Finder
from anyreap._registry import Answer, Link, Registry, registry
from anyreap._table import State
from tests import harness
from tests.simkernel import Kernel, Process, simulated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anyreap._table import Record

THOROUGH = bool(os.environ.get("ANYREAP_THOROUGH"))


# Any order: a machine that acts between any two steps of trio -----------------------------------------------------------


class Steps:
    """trio, one step of its scheduler at a time.

    `trio.run` is these lines in a loop. Nothing public stops between two of them: guest mode has a thread.
    """

    nursery: trio.Nursery

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self._runner = trio._core._run.setup_runner(self.clock, [], False, True)  # type: ignore[attr-defined]
        self._run = trio._core._run.unrolled_run(self._runner, self._main, ())  # type: ignore[attr-defined]
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
TROUBLE = [errno.EPERM, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENOSYS]
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
        """Nobody is collected who was not handed in for it. (An error here would only make the service fail.)"""
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
        except OSError as exc:
            life.asked = before
            if len(self.kernel.failed) == troubles:
                assert isinstance(exc, anyreap.NotAChild)
                assert not process.child
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
        """Promise 3, the first half."""
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
            max_examples=5000 if THOROUGH else 60,
            stateful_step_count=60,
            deadline=None,
            derandomize=not THOROUGH,  # a red run in CI is the same one at home
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
