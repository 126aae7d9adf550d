"""Orphans: proven, collected, ended when the block is left; and everybody else's children left alone."""

# ruff: noqa: PT012  (a block that is left by an exception is what is tested: it can't be one statement)

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import pytest

import anyreap
from anyreap import _kernel, _orphans, _service, _shutdown, _spawner
from tests import harness
from tests.harness import (
    HOSTS,
    SHELL,
    Gate,
    Host,
    await_death,
    children,
    collect,
    end,
    exits_with,
    is_zombie,
    run_alone,
    sleeper,
    state_of,
    until,
)
from tests.staging import Held, Sent, on_asyncio, on_two_hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from anyio.streams.memory import MemoryObjectReceiveStream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="a subreaper is Linux's"),
]

PATIENT = anyreap.Shutdown(grace=3600)  # who waits for its end has failed
BRIEF = anyreap.Shutdown(grace=0.1)

# A shell that leaves an orphan behind, and has said who it is.
LEAVES_ONE = "sleep 3600 & echo $!"
LEAVES_A_DEAF_ONE = "sh -c 'trap \"\" TERM; echo $$; exec sleep 3600' & read x"


class Nest:
    """Starts children, of which descendants say their pids on standard output, one in a line."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._gate, self._open = os.pipe()
        self._said = b""

    async def start(self, reaper: anyreap.Reaper, script: str, how: str = "open_process") -> int:
        """Start a shell that is owned, and that runs the script from then on. Returns its pid."""
        if how == "open_process":
            child = await reaper.open_process(script, stdin=self._gate, stdout=self._write, stderr=None)
            return child.pid
        pid = self.start_foreign("read x; " + script)
        reaper.adopt(pid)
        os.write(self._open, b"\n")
        return pid

    def start_foreign(self, script: str) -> int:
        """Start a shell that nobody knows of. Returns its pid."""
        actions = [(os.POSIX_SPAWN_DUP2, self._gate, 0), (os.POSIX_SPAWN_DUP2, self._write, 1)]
        return os.posix_spawn(SHELL, ["sh", "-c", script], os.environ, file_actions=actions)

    def say(self) -> None:
        """Let one shell that reads a line go on."""
        os.write(self._open, b"\n")

    def hear(self, count: int = 1) -> list[int]:
        """Block until so many have said their pids."""
        while self._said.count(b"\n") < count:
            assert select.select([self._read], [], [], 20)[0], f"of {count}, only these have said so: {self._said!r}"
            self._said += os.read(self._read, 65536)
        *lines, rest = self._said.split(b"\n")
        self._said = b"\n".join([*lines[count:], rest])
        return [int(line) for line in lines[:count]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._read, self._write, self._gate, self._open):
            os.close(fd)


@pytest.fixture
def nest() -> Iterator[Nest]:
    """Who starts children with descendants."""
    with Nest() as nest:
        yield nest


@pytest.fixture(autouse=True)
def proven_soon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a proof by age take no seconds, but where a wrong one is what is tested for."""
    if "never" not in request.node.name:
        monkeypatch.setattr(_orphans, "_MARGIN", 0.05)


class Looks:
    """How often somebody has looked for orphans."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        look = _orphans.Orphans.look

        def counted(orphans: _orphans.Orphans, **options: Any) -> Iterator[None]:
            yield from look(orphans, **options)
            self.count += 1

        monkeypatch.setattr(_orphans.Orphans, "look", counted)

    async def more(self, count: int = 3) -> None:
        """Wait for some more looks, the first of which may have begun already."""
        wanted = self.count + count
        await until(lambda: self.count >= wanted)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Count the looks for orphans."""
    return Looks(monkeypatch)


def is_subreaper() -> bool:
    """Whether the kernel has this process for a subreaper."""
    found = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(37, ctypes.byref(found), 0, 0, 0) == 0
    return bool(found.value)


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it is gone."""
    fields = _kernel.stat_fields(pid)
    return int(fields[1]) if fields else 0


def ours(*pids: int) -> bool:
    """Whether they all are children of this process."""
    return all(parent_of(pid) == os.getpid() for pid in pids)


def drain(exits: MemoryObjectReceiveStream[anyreap.ExitStatus]) -> dict[int, anyreap.ExitStatus]:
    """What is in a stream of exits now, by pid."""
    found = {}
    with exits, contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream):
        while True:
            status = exits.receive_nowait()
            assert status.pid not in found
            found[status.pid] = status
    return found


# The daemon ----------------------------------------------------------------------------------------------------------

# Everything that a daemon may do to get away: it forks twice, in a session of its own between, writes a title over its
# arguments and its environment, changes its name, is deaf to SIGTERM, and holds no descriptor.
DAEMON = """
import ctypes, os, signal
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ctypes.CDLL(None).prctl(15, b"innocent", 0, 0, 0)
line = open("/proc/self/stat").read()
first, _, _, last = map(int, line[line.rfind(")") + 2:].split()[45:49])
ctypes.memset(first, 0, last - first)
ctypes.memmove(first, b"innocent", 8)
os.write(1, b"%d\\n" % os.getpid())
os.closerange(0, 1024)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("how", ["open_process", "without its environment"])
async def test_daemon_is_gone_and_a_foreign_child_lives_on(source: Any, nest: Nest, how: str) -> None:
    """A daemon that did all that daemons do is gone when the block is left, and its end was told. A foreign Popen's
    child, started beside it, lives on, and its owner gets its status.
    """
    with Gate() as gate:
        async with anyreap.open_reaper(
            source=source, subreaper=True, shutdown=BRIEF, orphan_grace=math.inf, heartbeat=0.1
        ) as reaper:
            exits = reaper.exits()
            foreign = subprocess.Popen(["sh", "-c", "read x; exit 7"], stdin=gate.read)
            bare = gate.add("exit 8")
            python = f"{'env -i ' if how != 'open_process' else 'exec '}{sys.executable} -ISc '{DAEMON}'"
            await nest.start(reaper, python)
            (pid,) = nest.hear()
            await until(lambda: ours(pid) and not os.listdir(f"/proc/{pid}/fd"))
            assert _orphans.VARIABLE.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
            assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"innocent\0")
        assert not Path(f"/proc/{pid}").exists()
        told = drain(exits)
        assert told[pid].orphan
        assert told[pid].signal == signal.SIGKILL
        assert foreign.pid not in told
        assert bare not in told
        assert state_of(foreign.pid) == state_of(bare) == "S"
        gate.open()
        assert foreign.wait() == 7
        assert collect(bare) == 8


@pytest.mark.parametrize("leaving", ["returned", "raised", "cancelled"])
@pytest.mark.parametrize("how", ["open_process", "adopt"])
async def test_orphans_are_ended_however_the_block_is_left(source: Any, nest: Nest, leaving: str, how: str) -> None:
    """A live orphan keeps no block open; it gets the first signal of the default policy, and its exit is told."""
    with anyio.CancelScope() as scope, contextlib.suppress(ZeroDivisionError):
        async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
            exits = reaper.exits()
            middle = await nest.start(reaper, LEAVES_ONE, how)
            (pid,) = nest.hear()
            if leaving == "raised":
                raise ZeroDivisionError
            if leaving == "cancelled":
                scope.cancel()
                await anyio.sleep_forever()
    told = drain(exits)
    assert told.keys() == {middle, pid}
    assert told[middle].orphan is False
    assert (told[pid].orphan, told[pid].signal) == (True, signal.SIGTERM)
    assert told[pid].usage is not None
    now = reaper.statistics()
    assert (now.reaped, now.orphans_reaped, now.lost) == (1, 1, 0)


@on_two_hosts
async def test_orphans_come_after_the_owned_children(source: Any, nest: Nest) -> None:
    """An orphan is not signalled as long as an owned child runs: that one may have use for it."""
    async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, LEAVES_ONE)
        (pid,) = nest.hear()
        owned = await nest.start(reaper, f"read x; kill -0 {pid} && exit 5; exit 6")
        await until(lambda: ours(pid))
        nest.say()
    told = drain(exits)
    assert told[owned].exit_code == 5
    assert told[pid].signal == signal.SIGTERM
    assert list(told)[-1] == pid


@on_two_hosts
async def test_orphan_that_is_deaf_is_killed_after_the_grace(
    source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the first signal, SIGCONT, and SIGKILL after the grace of the default policy."""
    sent = Sent(monkeypatch)
    async with anyreap.open_reaper(source=source, subreaper=True, shutdown=BRIEF) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, LEAVES_A_DEAF_ONE)
        (pid,) = nest.hear()
        nest.say()
    assert drain(exits)[pid].signal == signal.SIGKILL
    assert sent.to(pid) == [signal.SIGTERM, signal.SIGCONT, signal.SIGKILL]


@on_two_hosts
async def test_orphans_are_ended_in_rounds(source: Any, nest: Nest) -> None:
    """What an orphan leaves behind when it is ended is ended as well, however deep that goes."""
    async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, generations(5))
        pids = nest.hear(5)
        nest.say()
    told = drain(exits)
    assert set(pids) < told.keys()
    assert len(told) == 7  # and the shell that left them, and the sleep
    assert not children() & told.keys()


def generations(count: int, trap: str = "") -> str:
    """The script of a shell that leaves a family behind when it may read: so many shells, each the last one's child."""
    script = f'{trap} echo $$; if [ $1 -gt 1 ]; then sh -c "$0" "$0" $(($1 - 1)); fi; sleep 3600; :'
    return f"sh -c '{script}' '{script}' {count} & read x"


@on_two_hosts
async def test_deaf_generations_do_not_take_a_grace_each(source: Any, nest: Nest) -> None:
    """After two grace periods each orphan that is left behind is killed as soon as it is seen."""
    async with anyreap.open_reaper(source=source, subreaper=True, shutdown=anyreap.Shutdown(grace=0.5)) as reaper:
        await nest.start(reaper, generations(10, 'trap "" TERM;'))
        pids = nest.hear(10)
        nest.say()
        await until(lambda: ours(pids[0]))
        began = time.monotonic()
    assert time.monotonic() - began < 0.5 * 9
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@on_two_hosts
async def test_family_that_does_not_stop_forking_is_named(
    source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that forks faster than it is killed is given up after a bound, and named."""
    monkeypatch.setattr(_shutdown, "ORPHANS_BOUND", 0.2)
    monkeypatch.setattr(_service.Service, "take_in", take_in := Immortal(_service.Service.take_in))
    with pytest.raises(anyreap.StillRunning) as info:
        async with anyreap.open_reaper(source=source, subreaper=True, shutdown=anyreap.Shutdown(grace=0)) as reaper:
            await nest.start(reaper, LEAVES_ONE)
            take_in.first = nest.hear()[0]
    assert info.value.pids
    for pid in children():
        end(pid)


class Immortal:
    """Whenever an orphan is taken in, starts another one in a session like that of an orphan, marked as one."""

    def __init__(self, take_in: Callable[..., Any]) -> None:
        self._take_in = take_in
        self.first = 0
        self.started: list[int] = []

    def __get__(self, service: Any, kind: Any) -> Callable[[int, int], Any]:
        def take_in(pid: int, start: int) -> Any:
            watch = self._take_in(service, pid, start)
            if watch is not None:
                self.started.append(sleeper())
                _kernel.mark(self.started[-1], service.orphans.number)
            return watch

        return take_in


@on_two_hosts
async def test_second_cancellation_ends_the_grace_of_orphans(source: Any, nest: Nest) -> None:
    """A second cancellation while orphans are shut down is SIGKILL at once, and they are collected."""
    with anyio.CancelScope() as outer:
        async with anyio.create_task_group() as tasks, nothing_else():
            with anyio.CancelScope() as inner:
                async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
                    exits = reaper.exits()
                    script = "sh -c 'trap \"echo 1\" TERM; echo $$; while :; do sleep 3600 & wait; done' & read x"
                    await nest.start(reaper, script)
                    (pid,) = nest.hear()
                    nest.say()
                    await until(lambda: ours(pid))

                    async def hurry() -> None:
                        await anyio.to_thread.run_sync(nest.hear)  # it has got SIGTERM, and lives
                        outer.cancel()

                    tasks.start_soon(hurry)
                    inner.cancel()
    assert drain(exits)[pid].signal == signal.SIGKILL
    assert not Path(f"/proc/{pid}").exists()


def nothing_else() -> Any:
    """Stand for nothing."""
    return contextlib.nullcontext()


@on_asyncio
async def test_native_cancellation_ends_the_grace_of_orphans(source: Any, nest: Nest) -> None:
    """A native cancellation while orphans are shut down is SIGKILL at once, and it is what leaves."""

    async def block() -> None:
        async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
            script = "sh -c 'trap \"echo 1\" TERM; echo $$; while :; do sleep 3600 & wait; done' & read x"
            await nest.start(reaper, script)
            pids.extend(nest.hear())  # its trap is set
            nest.say()

    pids: list[int] = []
    task = asyncio.create_task(block())
    await until(lambda: pids)
    (pid,) = pids
    await anyio.to_thread.run_sync(nest.hear)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid}").exists()


@on_two_hosts
async def test_orphans_are_ended_also_if_an_owned_child_outlives_sigkill(
    source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owned child that can't be ended is named, and the orphans are ended all the same."""
    monkeypatch.setattr(_shutdown, "KILL_BOUND", 0.2)
    owned = sleeper()
    with Held(owned):
        with pytest.raises(anyreap.StillRunning) as info, anyio.CancelScope() as scope:
            async with anyreap.open_reaper(source=source, subreaper=True, shutdown=anyreap.Shutdown(grace=0)) as reaper:
                reaper.adopt(owned)
                await nest.start(reaper, LEAVES_ONE)
                (pid,) = nest.hear()
                scope.cancel()
        assert info.value.pids == (owned,)
        assert not Path(f"/proc/{pid}").exists()
    assert collect(owned) == -signal.SIGKILL


@pytest.mark.parametrize("host", HOSTS[::2], ids=str)
def test_block_that_is_thrown_away_ends_its_orphans(host: Host) -> None:
    """A block whose coroutine is thrown away can't wait for anything, and leaves no orphan of its children behind."""
    run_alone(
        """
        async def main():
            from tests.test_subreaper import Nest, LEAVES_ONE, ours
            async def block():
                async with anyreap.open_reaper(source=SOURCE, subreaper=True) as reaper:
                    await nest.start(reaper, LEAVES_ONE)
                    pids.extend(nest.hear())
                    await until(lambda: ours(*pids))
                    await Forever()
            class Forever:
                def __await__(self):
                    yield "thrown away"
            pids = []
            with Nest() as nest:
                coroutine = block()
                async def drive():
                    # As a loop does it, until it waits for what nobody knows
                    value = None
                    while True:
                        item = coroutine.send(value)
                        if item == "thrown away":
                            return
                        value = await Pass(item)
                class Pass:
                    def __init__(self, item):
                        self.item = item
                    def __await__(self):
                        return (yield self.item)
                await drive()
                coroutine.close()
            assert not children(), children()
        run(main)
        """,
        host,
        flags=(),
    )


# Collecting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["open_process", "adopt"])
async def test_orphans_that_die_are_collected_soon(source: Any, nest: Nest, how: str) -> None:
    """L1: orphans that die at random are all collected within a second after their end, at once where they are proven,
    whatever the grace for others; each with its own status.
    """
    rng = random.Random(1)
    codes = [rng.randrange(256) for _ in range(40)]
    # They wait until they are orphans: a shell collects its own children while it runs. Not at <&0, which is /dev/null
    # by then: a shell gives its children in the background that one first (POSIX, 2.9.3), and then redirects.
    jobs = (f"(read x; sleep 0.{rng.randrange(1, 30):02}; exit {code}) <&3 & echo $!\n" for code in codes)
    script = "exec 3<&0\n" + "".join(jobs)
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf) as reaper:
        exits = reaper.exits()
        middle = await nest.start(reaper, script, how)
        pids = nest.hear(len(codes))
        await until(lambda: middle not in children())
        for _ in codes:
            nest.say()
        dead: dict[int, float] = {}
        with anyio.fail_after(20):
            while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
                now = time.monotonic()
                for pid in left:
                    if is_zombie(pid):
                        assert now - dead.setdefault(pid, now) < 5.0  # on a busy machine; else a second
                await anyio.sleep(0.01)
        assert reaper.statistics().orphans_reaped >= len(codes)
    told = drain(exits)
    assert [told[pid].exit_code for pid in pids] == codes
    assert all(told[pid].orphan for pid in pids)
    assert not told[middle].orphan


@on_two_hosts
async def test_orphans_that_were_left_before_the_mark(source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was left behind before its ancestor could be marked, and is alive when `open_process` returns, is proven by
    then: it may die before the next look, and a zombie has no tag.
    """
    mark = _kernel.mark

    def late(pid: int, number: int) -> bool:
        if threading.current_thread().name.startswith("anyreap spawner"):
            await_death(pid)  # as if the thread had been put aside since the fork
        return mark(pid, number)

    monkeypatch.setattr(_kernel, "mark", late)
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, "exec 3<&0; (read x; exit 5) <&3 & echo $!; (read x; exit 5) <&3 & echo $!; exit 0")
        pids = nest.hear(2)
        for _ in pids:
            nest.say()
        await_death(*pids)  # no await: nobody looks in between
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    told = drain(exits)
    assert [(told[pid].exit_code, told[pid].orphan) for pid in pids] == [(5, True)] * 2


@on_two_hosts
async def test_orphan_that_dies_before_the_start_is_over(
    source: Any, nest: Nest, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that takes its time puts no judgment off: it is the child of another thread than the orphans are."""
    go_on = threading.Event()
    run = _spawner.Start.run

    def hold(start: _spawner.Start) -> None:
        run(start)
        go_on.wait(60)

    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, heartbeat=0.02) as reaper:
        exits = reaper.exits()
        monkeypatch.setattr(_spawner.Start, "run", hold)
        async with anyio.create_task_group() as tasks:
            try:
                tasks.start_soon(nest.start, reaper, "exec 3<&0; (read x; exit 5) <&3 & echo $!; exec sleep 0")
                await until(lambda: bool(select.select([nest._read], [], [], 0)[0]))
                (pid,) = nest.hear()
                await until(lambda: ours(pid))
                await looks.more()
                nest.say()
                await until(lambda: not Path(f"/proc/{pid}").exists())
            finally:
                go_on.set()
    assert drain(exits)[pid].orphan


@on_two_hosts
async def test_orphan_in_the_middle_of_its_exec(source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as an exec goes on there is no environment to be read: who is in it is judged again, and again, and is
    no stray meanwhile.
    """
    monkeypatch.setattr(_kernel, "mark", lambda *_: False)
    monkeypatch.setattr(_orphans, "_MARGIN", -3600)  # anybody would be one
    readings: Counter[int] = Counter()
    environment_of, has_arguments = _kernel.environment_of, _kernel.has_arguments

    def environment(pid: int) -> bytes | None:
        readings[pid] += 1
        return environment_of(pid) if readings[pid] > 8 else b""

    monkeypatch.setattr(_kernel, "environment_of", environment)
    monkeypatch.setattr(_kernel, "has_arguments", lambda pid: readings[pid] > 8 and has_arguments(pid))
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, shutdown=PATIENT) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, LEAVES_ONE)
        (pid,) = nest.hear()
    assert drain(exits)[pid].orphan
    assert readings[pid] == 9


@on_two_hosts
async def test_last_list_must_be_complete(source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that may lack somebody says nothing about who is left when the block is to be left."""
    found = _kernel.children
    lists: list[int] = []

    def incomplete() -> tuple[dict[int, bool | None], bool]:
        if not lists:
            return found()
        lists.pop()
        return {}, False

    monkeypatch.setattr(_kernel, "children", incomplete)
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, shutdown=PATIENT) as reaper:
        exits = reaper.exits()
        lists += range(10)
        await nest.start(reaper, LEAVES_ONE)
        (pid,) = nest.hear()
    assert drain(exits)[pid].orphan
    assert not lists


@pytest.mark.usefixtures("no_pidfds")
async def test_orphans_without_pidfds(source: Any, nest: Nest) -> None:
    """Where there are no pidfds, orphans are found, collected and ended all the same."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, heartbeat=0.1) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, "sleep 0.02 & echo $!; " + LEAVES_ONE)
        short, long = nest.hear(2)
        await until(lambda: not Path(f"/proc/{short}").exists())
    told = drain(exits)
    assert (told[short].orphan, told[short].exit_code) == (True, 0)
    assert (told[long].orphan, told[long].signal) == (True, signal.SIGTERM)


async def test_orphan_that_had_died_before_it_was_ours(source: Any, nest: Nest) -> None:
    """L3: a zombie that its parent left behind is collected at once: the mark shows of a zombie too."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, heartbeat=0.1) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, "sh -c 'echo $$; exit 9' & exec head -c1 > /dev/null", "adopt")
        (pid,) = nest.hear()
        await until(lambda: is_zombie(pid))
        assert not ours(pid)
        nest.say()
        await until(lambda: not Path(f"/proc/{pid}").exists())
    assert drain(exits)[pid].orphan
    assert reaper.statistics().orphans_reaped == 1


async def test_without_subreaper_orphans_go_elsewhere(source: Any, nest: Nest) -> None:
    """L4, the negative control: without subreaper no orphan comes here, nothing is put into the environment, and no
    limit is changed.
    """
    assert not is_subreaper()
    async with anyreap.open_reaper(source=source, orphan_grace=0) as reaper:
        assert not is_subreaper()
        exits = reaper.exits()
        await nest.start(reaper, LEAVES_ONE)
        (pid,) = nest.hear()
        await until(lambda: parent_of(pid) != 0 and not drain_names(pid))
        assert not ours(pid)
        assert _kernel.mark_of(pid) == 0
    assert pid not in drain(exits)
    assert reaper.statistics().orphans_reaped == 0
    os.kill(pid, signal.SIGKILL)


def drain_names(pid: int) -> bool:
    """Whether a process has a tag in its environment, or has not come to its exec yet."""
    environment = _kernel.environment_of(pid)
    return not environment or _orphans.VARIABLE.encode() in environment


# Other people's children ---------------------------------------------------------------------------------------------


@on_two_hosts
async def test_unproven_zombie_is_left_for_the_grace(source: Any, looks: Looks) -> None:
    """A zombie that nobody handed in, and that nobody stands for, is collected once it was seen for `orphan_grace`."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0.3, heartbeat=0.05) as reaper:
        exits = reaper.exits()
        began = time.monotonic()
        pid = exits_with(7)
        await_death(pid)
        await looks.more(1)
        assert is_zombie(pid)
        status = await exits.receive()
        assert time.monotonic() - began >= 0.3
        assert (status.pid, status.exit_code, status.orphan) == (pid, 7, True)
        exits.close()
    assert reaper.statistics().orphans_reaped == 1


async def test_unproven_zombie_is_never_taken_with_an_infinite_grace(source: Any, looks: Looks) -> None:
    """With `orphan_grace=math.inf` a zombie that is not proven an orphan is its owner's for ever."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, heartbeat=0.02):
        pid = exits_with(7)
        await_death(pid)
        await looks.more(5)
        assert collect(pid) == 7


class MyPopen(subprocess.Popen[bytes]):
    """Somebody's subclass."""


class MyProcess(multiprocessing.get_context("fork").Process):  # type: ignore[misc]
    """Somebody's subclass."""


@pytest.mark.parametrize("kind", ["Popen", "a subclass", "Process", "a subclass of Process"])
async def test_zombie_of_a_live_object_is_its_own(source: Any, looks: Looks, kind: str) -> None:
    """A zombie for which a live Popen or multiprocessing.Process stands is never taken, however long it is left."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0, heartbeat=0.02):
        owner: Any
        if kind in ("Popen", "a subclass"):
            owner = (subprocess.Popen if kind == "Popen" else MyPopen)(["sh", "-c", "exit 7"])
        else:
            fork = multiprocessing.get_context("fork")
            owner = (fork.Process if kind == "Process" else MyProcess)(target=os._exit, args=(7,))
            owner.start()
        await_death(owner.pid)
        await looks.more(5)
        assert is_zombie(owner.pid)
        if isinstance(owner, subprocess.Popen):
            assert owner.wait() == 7
        else:
            owner.join()
            assert owner.exitcode == 7
            owner.close()


@on_two_hosts
async def test_popen_that_has_finished_stands_for_nobody(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Popen that has its code does not stand for the next child that has its pid."""
    popen = subprocess.Popen(["true"])
    popen.wait()
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0, heartbeat=0.02) as reaper:
        exits = reaper.exits()
        pid = exits_with(7)
        monkeypatch.setattr(popen, "pid", pid)
        assert (await exits.receive()).pid == pid
        exits.close()


async def test_what_is_only_observed_is_left_to_its_owner(source: Any, looks: Looks) -> None:
    """A child that was handed in with `reap=False` is not an unknown zombie, be it by another reaper."""
    async with (
        anyreap.open_reaper(source=source) as other,
        anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0, heartbeat=0.02) as reaper,
    ):
        with Gate() as gate:
            mine, theirs = gate.add("exit 7"), gate.add("exit 8")
            child, others = reaper.watch(mine, reap=False), other.watch(theirs, reap=False)
        assert (await child.wait()).exit_code == 7
        assert (await others.wait()).exit_code == 8
        await looks.more(5)
        assert is_zombie(mine)
        assert is_zombie(theirs)
        assert collect(mine) == 7
        assert collect(theirs) == 8


@on_two_hosts
async def test_grace_is_not_inherited_by_the_next_zombie_with_its_pid(
    source: Any, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zombie that has the number of one that was collected by its owner gets the whole grace for itself."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0.5, heartbeat=0.02) as reaper:
        pid = exits_with(7)
        await_death(pid)
        await looks.more(2)
        orphans = reaper._service.orphans
        assert orphans is not None
        stranger = orphans._strangers[pid]
        assert stranger.dead_since is not None
        # As if it had been another one until now: the number is the same, and the start is not.
        stranger.start -= 100
        stranger.dead_since -= 3600
        await looks.more(3)
        assert is_zombie(pid)
        assert collect(pid) == 7


@on_two_hosts
async def test_live_strangers_are_not_signalled(source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No child that something else in this process started is signalled on leaving, nor is an orphan that nothing
    proves to be one: what a foreign child left behind in its first moment.
    """
    sent = Sent(monkeypatch)
    before = sleeper()
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0, heartbeat=0.02):
        bare, popen = sleeper(), subprocess.Popen(["sleep", "3600"])
        # No await in here: no list of our children is made between the orphan's birth and its parent's end.
        middle = nest.start_foreign(LEAVES_ONE)
        (orphan,) = nest.hear()
        await_death(middle)
        assert collect(middle) == 0
    assert ours(before, bare, popen.pid, orphan)
    assert sent.all == []
    for pid in (before, bare, popen.pid, orphan):
        end(pid)
    popen.wait()


async def test_orphan_of_a_foreign_child_is_proven_by_its_age(source: Any, nest: Nest, looks: Looks) -> None:
    """What is older than a list of our children that lacked it is an orphan, whoever its parent was: it is collected at
    once when it is dead, and ended on leaving when it is alive.
    """
    async with anyreap.open_reaper(
        source=source, subreaper=True, orphan_grace=math.inf, heartbeat=0.05, shutdown=PATIENT
    ) as reaper:
        exits = reaper.exits()
        script = "exec 3<&0; sh -c 'read x; exit 5' <&3 & echo $!; sleep 3600 & echo $!; exec sleep 3600"
        middle = nest.start_foreign(script)
        first, second = nest.hear(2)
        orphans = reaper._service.orphans
        assert orphans is not None
        born = max(_kernel.start_time(pid) or 0 for pid in (first, second))
        await until(lambda: orphans._listed_at >= born + _kernel.ticks_in(0.1))
        end(middle)
        assert ours(first, second)
        nest.say()
        await until(lambda: not Path(f"/proc/{first}").exists())
        assert ours(second)
    told = drain(exits)
    assert (told[first].returncode, told[second].returncode) == (5, -signal.SIGTERM)
    assert told[first].orphan
    assert told[second].orphan


@on_two_hosts
async def test_foreign_child_is_never_older_than_a_list_that_lacked_it(source: Any, looks: Looks) -> None:
    """However often is looked while children are started, in all threads, none of them is taken for an orphan."""
    stop = threading.Event()
    failures: list[str] = []

    def work() -> None:
        while not stop.is_set():
            pid = exits_with(7)
            await_death(pid)
            code = collect(pid)
            if code != 7:
                failures.append(f"{pid}: {code}")

    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=10, heartbeat=0.001) as reaper:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            await looks.more(100)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert reaper.statistics().orphans_reaped == 0


# The proofs ----------------------------------------------------------------------------------------------------------


@on_two_hosts
async def test_tags_append(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag is put into the environment that was given, or ours, behind those of the reapers around us."""
    monkeypatch.setenv(_orphans.VARIABLE, "outer.3")
    async with anyreap.open_reaper(source=source, subreaper=True) as reaper:

        async def tags(**options: Any) -> tuple[list[str], list[str]]:
            done = await reaper.run_process(["/usr/bin/env"], **options)
            lines = sorted(done.stdout.decode().splitlines())
            (mine,) = (line.partition("=")[2] for line in lines if line.startswith(_orphans.VARIABLE + "="))
            return mine.split(), [line for line in lines if not line.startswith(_orphans.VARIABLE)]

        (outer, first), rest = await tags()
        assert outer == "outer.3"
        assert "PATH=" + os.environ["PATH"] in rest
        (outer, second), rest = await tags(env={"A": "1"})
        assert outer == "outer.3"
        assert rest == ["A=1"]
        (outer, _), rest = await tags(env={_orphans.VARIABLE: "other.1"})
        assert outer == "other.1"
        assert rest == []
        assert first != second  # each start has its own
        assert first.partition(".")[0] == second.partition(".")[0]
    assert os.environ[_orphans.VARIABLE] == "outer.3"


@pytest.mark.parametrize("proof", ["tag", "mark"])
async def test_each_proof_is_enough(source: Any, nest: Nest, proof: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag proves an orphan where nothing could be marked, and the mark does where the environment was cleared."""
    if proof == "tag":
        monkeypatch.setattr(_kernel, "mark", lambda *_: False)
    async with anyreap.open_reaper(
        source=source, subreaper=True, orphan_grace=math.inf, shutdown=PATIENT, heartbeat=3600
    ) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, f"read x; {'env -i ' * (proof == 'mark')} sleep 3600 & echo $!; read x")
        nest.say()
        (pid,) = nest.hear()
        # In the middle of the exec it has its new name, and no environment yet
        await until(lambda: Path(f"/proc/{pid}/comm").read_bytes() == b"sleep\n" and _kernel.has_arguments(pid))
        environment = _kernel.environment_of(pid)
        assert environment is not None
        assert (_orphans.VARIABLE.encode() in environment) is (proof == "tag")
        assert (_kernel.mark_of(pid) != 0) is (proof == "mark")
        nest.say()
        await until(lambda: ours(pid))
    assert drain(exits)[pid].orphan


async def test_descendants_that_an_adopted_child_has_already_are_marked(source: Any, nest: Nest) -> None:
    """Adopting a child claims the descendants that it has, to any depth, and what they start later."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf, shutdown=PATIENT) as reaper:
        exits = reaper.exits()
        script = "sh -c 'echo $$; sh -c \"read x; sleep 3600 & echo \\$!; exec sleep 3600\"; :'; :"
        middle = nest.start_foreign(script)
        (first,) = nest.hear()
        reaper.adopt(middle)
        nest.say()
        (last,) = nest.hear()
        os.kill(middle, signal.SIGKILL)
    told = drain(exits)
    assert {middle, first, last} < told.keys()
    assert len(told) == 4
    assert not told[middle].orphan
    assert all(told[pid].orphan for pid in told.keys() - {middle})


@on_two_hosts
async def test_child_of_ours_is_no_orphan_of_its_own(source: Any, looks: Looks) -> None:
    """A child that is being started carries the tag and the mark as its descendants do, and is not taken for one."""
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=0, heartbeat=0.001) as reaper:
        exits = reaper.exits()

        async def start() -> None:
            for number in range(20):
                done = await reaper.run_process(f"exit {number}", check=False)
                assert done.returncode == number
                assert not done.status.orphan

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(start)
        await looks.more(1)
    told = drain(exits)
    assert len(told) == reaper.statistics().reaped == 80
    assert reaper.statistics().orphans_reaped == 0


@pytest.mark.parametrize("readable", [False, True])
def test_environment_and_mark_of_whom_one_may_not_ask(readable: bool) -> None:
    """The mark can be read from everybody, a zombie too; the environment can't, and that is no error."""
    pid = sleeper()
    assert _kernel.mark(pid, 1 << 30)
    assert not _kernel.mark(pid, 1 << 30)  # it was already
    if not readable:
        os.kill(pid, signal.SIGKILL)
        await_death(pid)
        assert _kernel.environment_of(pid) is None
    assert _kernel.mark_of(pid) == 1 << 30
    end(pid)
    assert _kernel.mark_of(pid) == 0
    assert not _kernel.mark(pid, 1 << 30)
    assert _kernel.environment_of(pid) is None


# Several reapers, and what they share --------------------------------------------------------------------------------


async def test_each_reaper_ends_the_orphans_of_its_own(source: Any, nest: Nest) -> None:
    """Of two subreapers in one process, the inner one leaves the orphans of the outer one alone."""
    async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT, heartbeat=0.02) as outer:
        theirs = outer.exits()
        await nest.start(outer, LEAVES_ONE)
        (first,) = nest.hear()
        async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT, heartbeat=0.02) as inner:
            mine = inner.exits()
            await nest.start(inner, LEAVES_ONE)
            (second,) = nest.hear()
            await until(lambda: ours(first, second))
        assert not Path(f"/proc/{second}").exists()
        assert second in drain(mine)
        assert ours(first)
        assert is_subreaper()
    assert first in drain(theirs)
    assert not is_subreaper()


@on_two_hosts
async def test_what_is_nobody_s_is_ended_by_the_last(source: Any, nest: Nest) -> None:
    """An orphan of a foreign child, proven by its age, is left to the reaper that stays open, and ended by the last."""
    async with anyreap.open_reaper(
        source=source, subreaper=True, orphan_grace=math.inf, shutdown=PATIENT, heartbeat=0.02
    ) as outer:
        exits = outer.exits()
        async with anyreap.open_reaper(
            source=source, subreaper=True, orphan_grace=math.inf, shutdown=PATIENT, heartbeat=0.02
        ) as inner:
            middle = nest.start_foreign("sleep 3600 & echo $!; sleep 3600")
            (pid,) = nest.hear()
            born = _kernel.start_time(pid) or 0
            for reaper in (inner, outer):
                orphans = reaper._service.orphans
                assert orphans is not None
                await until(lambda orphans=orphans: orphans._listed_at >= born + _kernel.ticks_in(0.1))
            end(middle)
            await until(lambda: any(watch.orphan for watch in (*inner._service.watches, *outer._service.watches)))
        assert ours(pid)
        assert state_of(pid) == "S"
    assert drain(exits)[pid].orphan
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("order", ["first in, last out", "first in, first out"])
@on_two_hosts
async def test_subreaper_is_put_back_by_the_last_in_whatever_order(source: Any, order: str) -> None:
    """The setting is one per process: the first reaper makes it, the last one puts it back."""
    blocks = [anyreap.open_reaper(source=source, subreaper=True) for _ in range(2)]
    for block in blocks:
        await block.__aenter__()
        assert is_subreaper()
    first, last = blocks if order == "first in, first out" else reversed(blocks)
    await first.__aexit__(None, None, None)
    assert is_subreaper()
    await last.__aexit__(None, None, None)
    assert not is_subreaper()


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[3]], ids=str)
def test_subreaper_that_was_found_is_left(host: Host) -> None:
    """A process that is a subreaper already is one afterwards."""
    run_alone(
        """
        from tests.test_subreaper import is_subreaper
        from anyreap import _kernel
        async def main():
            _kernel.set_subreaper(on=True)
            async with anyreap.open_reaper(source=SOURCE, subreaper=True):
                assert is_subreaper()
            assert is_subreaper()
        run(main)
        """,
        host,
    )


@on_two_hosts
async def test_subreaper_that_somebody_cleared_is_left_with_a_warning(source: Any) -> None:
    """What somebody else has changed meanwhile is left to them, and said."""
    with pytest.warns(RuntimeWarning, match="cleared PR_SET_CHILD_SUBREAPER"):
        async with anyreap.open_reaper(source=source, subreaper=True):
            _kernel.set_subreaper(on=False)
    assert not is_subreaper()


@on_two_hosts
async def test_two_threads(source: Any, nest: Nest) -> None:
    """A subreaper in another thread collects and ends the orphans of its own children, and no others."""
    with Nest() as other:
        async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
            mine = reaper.exits()
            await nest.start(reaper, LEAVES_ONE)
            (pid,) = nest.hear()

            async def block() -> tuple[int, dict[int, anyreap.ExitStatus]]:
                async with anyreap.open_reaper(subreaper=True, shutdown=PATIENT) as there:
                    exits = there.exits()
                    await other.start(there, LEAVES_ONE)
                    (theirs,) = other.hear()
                return theirs, drain(exits)

            theirs, told = await anyio.to_thread.run_sync(anyio.run, block)
            assert told[theirs].orphan
            assert ours(pid)
            assert is_subreaper()
        assert drain(mine)[pid].orphan
    assert not is_subreaper()


@on_two_hosts
async def test_orphan_that_is_handed_in(source: Any, nest: Nest) -> None:
    """An orphan can be watched and adopted as any child, is the same one then, and says that it is an orphan."""
    async with anyreap.open_reaper(source=source, subreaper=True, shutdown=PATIENT) as reaper:
        await nest.start(reaper, f"{LEAVES_ONE}; {LEAVES_ONE}")
        first, second = nest.hear(2)
        # They are ours before the shell that left them can be collected
        await until(lambda: [watch.orphan for watch in reaper._service.watches] == [True, True])
        assert reaper.statistics().watched == 0
        child = reaper.watch(first)
        assert reaper.watch(first) is child
        assert reaper.statistics().watched == 1
        child.kill()
        status = await child.wait()
        assert (status.orphan, status.signal) == (True, signal.SIGKILL)
        adopted = reaper.adopt(second, shutdown=BRIEF)
        assert reaper.statistics().owned == 1
        adopted.terminate()
    assert adopted.status is not None
    assert adopted.status.orphan
    assert reaper.statistics().orphans_reaped == 2


# Elsewhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, -0.001, -math.inf, math.nan])
def test_orphan_grace_that_makes_no_sense(wrong: float) -> None:
    """A negative grace, or one that is no number, is refused at once."""
    with pytest.raises(ValueError, match="orphan_grace is a number of seconds, 0 or more"):
        anyreap.open_reaper(subreaper=True, orphan_grace=wrong)


def test_other_systems_have_no_subreaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no PR_SET_CHILD_SUBREAPER the error says so, before anything is opened."""
    monkeypatch.setattr(_kernel, "_LINUX", False)
    with pytest.raises(RuntimeError, match="which only Linux has"):
        anyreap.open_reaper(subreaper=True)
    anyreap.open_reaper()


@on_two_hosts
async def test_sandbox_that_refuses_leaves_nothing_installed(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel or sandbox that refuses is a RuntimeError on entering, and all is as it was."""

    def refuse(*, on: bool) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_kernel, "set_subreaper", refuse)
    before = harness.sigaction()
    with pytest.raises(RuntimeError, match=r"refused it \(.*not permitted"):
        async with anyreap.open_reaper(source=source, subreaper=True):
            pytest.fail("not reached")
    assert harness.sigaction() == before
    monkeypatch.undo()
    async with anyreap.open_reaper(source=source, subreaper=True):
        assert is_subreaper()


@on_two_hosts
async def test_kernel_without_lists_of_children(source: Any, nest: Nest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc has no lists of children (CONFIG_PROC_CHILDREN) all processes are looked at, with the same result."""
    monkeypatch.setattr(_kernel, "_children_by_thread", lambda _: {})
    listed, complete = _kernel.children()
    assert complete
    assert listed.keys() == children()
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=math.inf) as reaper:
        exits = reaper.exits()
        await nest.start(reaper, LEAVES_ONE)
        (pid,) = nest.hear()
    assert drain(exits)[pid].orphan


def test_list_of_children_is_that_of_the_kernel() -> None:
    """Each child is listed, with whether it is the main thread's; and a list that changed meanwhile is not complete."""
    mine = exits_with(0)
    stop, started = threading.Event(), threading.Event()
    theirs: list[int] = []

    def work() -> None:
        theirs.append(sleeper())
        started.set()
        stop.wait()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    await_death(mine)
    listed, complete = _kernel.children()
    assert listed == {mine: True, theirs[0]: False}
    assert complete
    stop.set()
    thread.join()
    deadline = time.monotonic() + 20  # to Python it has ended a moment before it has to the kernel
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        assert time.monotonic() < deadline
        os.sched_yield()
    assert _kernel.children() == ({mine: True, theirs[0]: True}, True)
    end(theirs[0])
    assert collect(mine) == 0


@pytest.mark.parametrize(
    ("first", "again", "complete"),
    [
        ({"1": b"5 6 "}, {"1": b"5 6 "}, True),
        ({"1": b"5 6 "}, {"1": b"5 6 7 "}, True),
        ({"1": b"5 6 "}, {"1": b"6 "}, False),
        ({"1": b"5 6 "}, {"1": b"5 61 "}, False),
        ({"1": b"5 "}, {"1": b"5 ", "2": b"6 "}, False),
        ({"1": b"5 ", "2": b"6 "}, {"1": b"5 6 "}, False),
    ],
)
def test_list_that_may_lack_somebody(
    monkeypatch: pytest.MonkeyPatch, first: dict[str, bytes], again: dict[str, bytes], complete: bool
) -> None:
    """A list is complete only if what was read first still stands in front when it is read again."""
    answers = [first, again]
    monkeypatch.setattr(_kernel, "_children_by_thread", lambda _: answers.pop(0))
    listed, found = _kernel.children()
    assert found is complete
    assert listed.keys() >= {int(pid) for line in again.values() for pid in line.split()}


# A fork, a namespace, a crowd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2], HOSTS[4]], ids=str)
def test_fork(host: Host) -> None:
    """J1, J4: a forked child is no subreaper, what it does with its parent's reaper is an error, and it may open a
    subreaper of its own; the parent's goes on.
    """
    run_alone(
        """
        from tests.test_subreaper import Nest, LEAVES_ONE, is_subreaper, ours, drain
        async def own(nest):
            async with anyreap.open_reaper(subreaper=True, source=SOURCE) as reaper:
                exits = reaper.exits()
                await nest.start(reaper, LEAVES_ONE)
                (pid,) = nest.hear()
            assert drain(exits)[pid].orphan
        async def main():
            async with anyreap.open_reaper(subreaper=True, source=SOURCE, orphan_grace=60) as reaper:
                exits = reaper.exits()
                with Nest() as nest:
                    await nest.start(reaper, LEAVES_ONE)
                    (pid,) = nest.hear()
                    child = os.fork()
                    if not child:
                        code = 1
                        try:
                            assert not is_subreaper()
                            try:
                                reaper.exits()
                            except RuntimeError as exc:
                                assert "forked child" in str(exc)
                            thread = threading.Thread(target=lambda: other.append(anyio.run(own, nest)))
                            other = []
                            thread.start()
                            thread.join()
                            code = 0 if other == [None] and not is_subreaper() else 2
                        finally:
                            os._exit(code)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                    assert ours(pid)
            assert drain(exits)[pid].orphan
            assert not is_subreaper()
        run(main)
        """,
        Host(host.backend, host.options, "pidfd"),
        flags=(),
    )


def namespace(*options: str) -> list[str]:
    """The command that makes a pid namespace, or the end of the test."""
    wrapper = ["unshare", "--pid", "--fork", "--kill-child", *options]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no pid namespace to be had here")
    return wrapper


def test_as_pid_1(host: Host) -> None:
    """L5: as PID 1 of a namespace orphans come without being asked for: they are collected, and ended, the statuses of
    our own are right, and the setting is not touched.
    """
    run_alone(
        """
        from tests.test_subreaper import Nest, LEAVES_ONE, is_subreaper, drain
        import math
        async def main():
            assert os.getpid() == 1
            async with anyreap.open_reaper(subreaper=True, source=SOURCE, orphan_grace=math.inf) as reaper:
                assert not is_subreaper()
                exits = reaper.exits()
                foreign = subprocess.Popen(["sh", "-c", "exit 4"])
                with Nest() as nest:
                    middle = await nest.start(reaper, "(sleep 0.05; exit 6) & echo $!; " + LEAVES_ONE + "; exit 5")
                    short, long = nest.hear(2)
                    await until(lambda: not os.path.exists(f"/proc/{short}"))
            told = drain(exits)
            assert {pid: (status.returncode, status.orphan) for pid, status in told.items()} == {
                middle: (5, False), short: (6, True), long: (-15, True),
            }
            assert foreign.wait() == 4
            assert not children()
        run(main)
        """,
        host,
        wrapper=namespace("--mount-proc"),
    )


@pytest.mark.parametrize("host", [HOSTS[0]], ids=str)
def test_proc_of_another_namespace(host: Host) -> None:
    """Where /proc shows the pids of another namespace, numbers would be taken for others: it is refused, and why."""
    run_alone(
        """
        try:
            anyreap.open_reaper(subreaper=True)
        except RuntimeError as exc:
            assert "unshare --mount-proc" in str(exc)
        else:
            raise SystemExit("not refused")
        """,
        host,
        wrapper=namespace(),
    )


@on_two_hosts
async def test_thousand_foreign_children_are_looked_at_once(
    source: Any, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs one reading of a list: of a foreign child that was judged nothing is read again, nor is the garbage
    collector asked for its owner.
    """
    asked: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        call = getattr(module, name)

        def counted(*args: Any) -> Any:
            asked[name] += 1
            return call(*args)

        monkeypatch.setattr(module, name, counted)

    count(_kernel, "stat_fields")
    count(_kernel, "mark_of")
    count(_kernel, "environment_of")
    count(gc, "get_referrers")
    with Gate() as gate:
        for _ in range(100):
            gate.add_cat()
        async with anyreap.open_reaper(source=source, subreaper=True, heartbeat=0.02):
            await looks.more(5)
            assert asked["mark_of"] == asked["environment_of"] == 100
            asked.clear()
            await looks.more(5)
            assert asked == {}
    for pid in gate.pids:
        assert collect(pid) == 0


# Starts orphans with the cheapest program there is, one for each lifetime, says their pids, and collects none.
MIDDLE = """
import os, sys
for life in sys.argv[1:]:
    print(os.posix_spawn("/bin/sleep", ["sleep", life], os.environ), flush=True)
"""


# Counts the zombies of its parent, but for those of some pids, until it may read to the end. Says how many there were.
COUNTER = """
import glob, os, select, sys
from contextlib import suppress
from pathlib import Path
most, parent, others = 0, os.getppid(), set(sys.argv[1:])
while not select.select([0], [], [], 0.05)[0]:
    found = 0
    for path in glob.glob(f"/proc/{parent}/task/*/children"):
        with suppress(OSError):
            for pid in set(Path(path).read_text().split()) - others:
                with suppress(OSError):
                    found += b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    most = max(most, found)
print(most)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("host", [HOSTS[0], HOSTS[4]], ids=str)
async def test_many_orphans(source: Any, nest: Nest, request: pytest.FixtureRequest) -> None:
    """L1, L2 in numbers: orphans that die at random, half of them of foreign children, are all collected; foreign
    children that die meanwhile are their owners'; and at no moment are there more zombies than the orphans of the last
    `orphan_grace` and a bit. With --all, 10,000 orphans over ten seconds.
    """
    full = request.config.getoption("--all")
    total, seconds, grace = (10_000, 10.0, 1.0) if full else (400, 1.0, 0.2)
    family = 50
    rng = random.Random(2)
    foreign = [
        subprocess.Popen(["sh", "-c", f"sleep {rng.random() * seconds:.3f}; exit {number}"]) for number in range(100)
    ]
    counter = subprocess.Popen(
        [sys.executable, "-ISc", COUNTER, *[str(popen.pid) for popen in foreign]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    # Counted, and in no sets: with so many, a number may come round again.
    orphans: list[int] = []
    others = 0
    late = 0.0
    async with anyreap.open_reaper(source=source, subreaper=True, orphan_grace=grace, heartbeat=0.5) as reaper:
        with reaper.exits() as exits:
            for number in range(total // family):
                command = ["exec", sys.executable, "-ISc", MIDDLE, *[f"{rng.random():.3f}" for _ in range(family)]]
                if number % 2:
                    await nest.start(reaper, shlex.join(command))
                else:
                    reaper.watch(nest.start_foreign(shlex.join(command)))
                due = anyio.current_time() + seconds / (total / family)
                await anyio.sleep_until(due)
                late = max(late, anyio.current_time() - due)
            with anyio.fail_after(60):
                while len(orphans) + others < total + total // family:
                    status = await exits.receive()
                    assert status.exit_code == 0
                    if status.orphan:
                        orphans.append(status.pid)
                    else:
                        others += 1
        said, _ = counter.communicate()
    assert sorted(orphans) == sorted(nest.hear(total))
    assert others == total // family
    assert reaper.statistics().orphans_reaped == total
    assert [popen.wait() for popen in foreign] == list(range(100))
    # Only those of foreign children may have to wait for the grace; and a bit. That is a number of seconds, so it says
    # something only where this loop got the processor when it wanted it: that the reaper leaves it to the loop is
    # tested elsewhere.
    if full and late < 0.1:
        assert int(said) <= total / seconds * (grace + 0.5)
