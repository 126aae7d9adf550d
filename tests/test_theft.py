"""Somebody else collects our children, and we collect nobody else's. Ids as in the scenarios,
numbers as in the field's bugs.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import threading
import warnings
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import psutil
import pytest

import anyreap
from tests.harness import (
    HOSTS,
    Gate,
    Host,
    await_death,
    children,
    collect,
    end,
    exits_with,
    is_zombie,
    leaves_with,
    run_alone,
    runs,
    sh,
    sleeper,
)
from tests.staging import strace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.anyio

FORK = multiprocessing.get_context("fork")

# A collected child's status can be read back from its pidfd since Linux 6.15.
READS_BACK = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2]) >= (6, 15)

HEARTBEAT = 0.05

THOROUGH = bool(os.environ.get("ANYREAP_THOROUGH"))


async def told(child: anyreap.Child) -> int | None:
    """What a wait says: the returncode, or None for a lost status."""
    with anyio.fail_after(10):
        try:
            return (await child.wait()).returncode
        except anyreap.StatusLost:
            assert child.lost
            assert child.status is None
            assert child.returncode is None
            return None


def left_by(code: int, *, pidfds: bool) -> int | None:
    """What can still be said of a child whose status was stolen."""
    return code if pidfds and READS_BACK else None


# Thieves ------------------------------------------------------------------------------------------
# -------------------


async def test_stolen_by_waitpid(source: Any, pidfds: bool) -> None:
    """E1, field bugs 17 and 18: the program calls `os.waitpid` for ours: every waiter hears it
    soon, the pid is forgotten.
    """
    got: list[int | None] = []

    async def wait(child: anyreap.Child) -> None:
        got.append(await told(child))

    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 7"))
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(wait, child)
                await anyio.wait_all_tasks_blocked()
                gate.open()
                assert collect(child.pid) == 7
        expected = left_by(7, pidfds=pidfds)
        assert got == [expected] * 5
        assert await told(child) == expected  # again, and always
        assert child.lost is (expected is None)
        now = reaper.statistics()
        assert (now.watched, now.lost) == (0, int(expected is None))
        with pytest.raises(anyreap.NotAChild):
            reaper.watch(child.pid)
        child.kill()  # quiet: it has ended


@pytest.mark.parametrize("script", ["exit 0", "exit 255", "kill -KILL $$", "kill -TERM $$"])
async def test_stolen_status_is_read_back_as_it_was(source: Any, script: str) -> None:
    """Promise 2: what is read back from a pidfd is the very status, 0 and 255 and signals too,
    without the usage.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add(script))
            gate.open()
            stolen = collect(child.pid)
        assert await told(child) == (stolen if READS_BACK else None)
        if READS_BACK:
            assert child.status == anyreap.ExitStatus(child.pid, stolen)


async def test_lost_status_says_why(source: Any, no_pidfds: None) -> None:
    """E1, field bug 18: a lost status raises, each time, names its cause, and is no number: not 0,
    not 255.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 7"))
            gate.open()
            collect(child.pid)
        for _ in range(3):
            with pytest.raises(anyreap.StatusLost, match="waitpid") as caught, anyio.fail_after(10):
                await child.wait()
            assert caught.value.pid == child.pid
            assert caught.value.why
            assert isinstance(caught.value, ChildProcessError)
        assert child.lost
        assert "lost" in repr(child)


async def test_stolen_by_a_thread_in_wait(source: Any, pidfds: bool) -> None:
    """E2: a thread that is blocked in `os.wait()` takes ours."""
    taken: list[tuple[int, int]] = []
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 7"))
            thread = threading.Thread(target=lambda: taken.append(os.wait()))
            thread.start()
            gate.open()
            thread.join()
        assert taken == [(child.pid, 7 << 8)]
        assert await told(child) == left_by(7, pidfds=pidfds)


async def test_races_with_a_thief(source: Any, pidfds: bool) -> None:
    """E2: a thread that collects ours, each as it ends, while the reaper does: each status is
    right, or lost, never wrong.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            watched = [reaper.watch(gate.add(f"exit {code}")) for code in range(40)]
            stolen: dict[int, int] = {}

            def steal() -> None:
                for child in watched[::2]:
                    with contextlib.suppress(ChildProcessError):  # the reaper was faster
                        stolen[child.pid] = collect(child.pid)

            thread = threading.Thread(target=steal)
            thread.start()
            await anyio.lowlevel.checkpoint()
            gate.open()
            got = [await told(child) for child in watched]
            thread.join()  # it may have taken one, and not have said so yet
            for code, child in enumerate(watched):
                if pidfds and READS_BACK:
                    assert got[code] == code
                else:
                    assert got[code] == code or (got[code] is None and stolen.get(child.pid) == code)
        now = reaper.statistics()
        assert now.lost + now.reaped == 40


async def test_dropped_popen_whose_pid_was_handed_in(source: Any, pidfds: bool) -> None:
    """E3, field bug 22: the next `Popen()` collects a Popen that was dropped: with its bare pid
    handed in, a theft.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            popen = subprocess.Popen(["/bin/sh", "-c", "read x; exit 7"], stdin=gate.read)
            child = reaper.watch(popen.pid)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del popen
                gc.collect()
            gate.open()
            await_death(child.pid)
            subprocess.Popen(["/bin/true"]).wait()
            assert child.pid not in children(), "subprocess has not stolen it"
        assert await told(child) == left_by(7, pidfds=pidfds)


async def test_dropped_popen_that_was_handed_in(source: Any, pidfds: bool) -> None:
    """E3, field bug 22: a Popen that was handed in stays referenced: dropping it steals nothing,
    and warns of nothing.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            popen = subprocess.Popen(["/bin/sh", "-c", "read x; exit 7"], stdin=gate.read)
            child = reaper.watch(popen)
            del popen
            gc.collect()
            gate.open()
            await_death(child.pid)
            subprocess.Popen(["/bin/true"]).wait()
            assert is_zombie(child.pid)
        assert await told(child) == 7


@pytest.mark.parametrize("handed_in", ["process", "pid"])
async def test_active_children(source: Any, pidfds: bool, handed_in: str) -> None:
    """E4, field bug 23: `multiprocessing.active_children()` collects: a Process tells its code, a
    bare pid can't.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            made = FORK.Process(target=leaves_with, args=(gate, 7))
            made.start()
            assert made.pid is not None
            child = reaper.watch(made if handed_in == "process" else made.pid)
            assert made in multiprocessing.active_children()
            gate.open()
            await_death(child.pid)
            assert made not in multiprocessing.active_children()
            assert made.exitcode == 7
        assert await told(child) == (7 if handed_in == "process" else left_by(7, pidfds=pidfds))
        made.close()


async def test_stolen_by_psutil(source: Any, pidfds: bool) -> None:
    """E5, finding 0.16: `psutil.Process(pid).wait()` collects ours: told as every theft, and never
    as 0.
    """
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 9"))
            thief = psutil.Process(child.pid)
            gate.open()
            assert thief.wait() == 9
        assert await told(child) == left_by(9, pidfds=pidfds)


@pytest.mark.parametrize("kind", ["popen", "process"])
async def test_stolen_from_an_object(source: Any, kind: str) -> None:
    """E1, finding 0.16: a status stolen from a Popen or a Process is read back, and told to the
    object too.
    """
    if not READS_BACK:
        pytest.skip("Linux >= 6.15")
    async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
        with Gate() as gate:
            made: Any
            if kind == "popen":
                made = subprocess.Popen(["/bin/sh", "-c", "read x; exit 9"], stdin=gate.read)
            else:
                made = FORK.Process(target=leaves_with, args=(gate, 9))
                made.start()
            child = reaper.watch(made)
            gate.open()
            assert collect(child.pid) == 9
        assert await told(child) == 9
        if kind == "popen":
            assert made.returncode == 9 == made.wait()
        else:
            assert made.exitcode == 9
            assert not made.is_alive()
            made.close()


async def test_stolen_and_no_signal_ever_again(source: Any, pidfds: bool) -> None:
    """E7: a theft whose SIGCHLD never comes, as it is blocked, is told within a few heartbeats."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
            with Gate() as gate:
                child = reaper.watch(gate.add("exit 7"))
                await anyio.wait_all_tasks_blocked()
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
                gate.open()
                collect(child.pid)
            assert await told(child) == left_by(7, pidfds=pidfds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


async def test_busy_exits_do_not_postpone_the_heartbeat(source: Any, no_pidfds: None) -> None:
    """Promise 5: the heartbeat is a period: a theft is found though exits come more often than once
    in a heartbeat.
    """
    async with anyreap.open_reaper(source=source, heartbeat=0.2) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 7"))
            await anyio.wait_all_tasks_blocked()
            gate.open()
            collect(child.pid)
        with anyio.fail_after(10):
            while not child.lost:
                signal.raise_signal(signal.SIGCHLD)
                if source == "pidfd":
                    subprocess.Popen(["/bin/true"]).wait()
                await anyio.sleep(0.01)


async def test_stolen_from_an_owner(source: Any, pidfds: bool) -> None:
    """Promise 2: an owned child whose status was stolen counts as ended: it keeps no block open,
    and raises nothing there.
    """
    with anyio.fail_after(10):
        async with anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as reaper:
            with Gate() as gate:
                child = reaper.adopt(gate.add("exit 7"))
                gate.open()
                collect(child.pid)
    assert child.returncode == left_by(7, pidfds=pidfds)
    assert child.lost is (child.status is None)


async def test_stolen_before_the_second_look(source: Any, pidfds: bool) -> None:
    """E1: a child is stolen, and handed in again before the reaper has noticed: NotAChild, and the
    theft is told.
    """
    async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
        with Gate() as gate:
            child = reaper.watch(gate.add("exit 7"))
            gate.open()
            collect(child.pid)
            with pytest.raises(anyreap.NotAChild):
                reaper.watch(child.pid)
        assert await told(child) == left_by(7, pidfds=pidfds)


@pytest.mark.parametrize("how", ["ignored", "SA_NOCLDWAIT"])
@pytest.mark.parametrize("pidfds", [True, False], ids=["pidfds", "no-pidfds"])
@pytest.mark.parametrize("host", [HOSTS[1], HOSTS[3], HOSTS[4]], ids=str)
def test_the_kernel_discards_statuses(host: Host, pidfds: bool, how: str) -> None:
    """F2, F3, field bug 19: SIGCHLD ignored, or SA_NOCLDWAIT, set from C while children run: read
    back, or lost, never 0.
    """
    run_alone(
        f"""
        from anyreap import _kernel
        if not {pidfds}:
            _kernel._usable = False
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                with Gate() as gate, anyio.fail_after(10):
                    children = [reaper.watch(gate.add("exit 7")) for _ in range(5)]
                    set_sigaction(*{(1, 0) if how == "ignored" else (0, 2)})
                    gate.open()
                    for child in children:
                        try:
                            status = await child.wait()
                        except anyreap.StatusLost as exc:
                            assert not {pidfds and READS_BACK}, exc
                            assert child.lost
                            assert {how != "ignored"} or "ignored" in str(exc), exc
                        else:
                            assert {pidfds and READS_BACK}, status
                            assert status.returncode == 7, status
        run(main)
        """,
        host,
    )


# No theft of ours ---------------------------------------------------------------------------------
# -------------------


async def test_foreign_zombies_stay(source: Any, pidfds: bool) -> None:
    """E9, field bug 20: foreign zombies, older and younger than ours, stay for the whole run, with
    their true statuses.
    """
    old = [exits_with(code) for code in (11, 12)]
    await_death(*old)
    heartbeat = 0.02
    async with anyreap.open_reaper(source=source, heartbeat=heartbeat) as reaper:
        young = [exits_with(code) for code in (13, 14)]
        await_death(*young)
        running = sleeper()
        for each in range(5):
            with Gate() as gate, anyio.fail_after(20):
                watched = [reaper.watch(gate.add(f"exit {code}")) for code in range(20)]
                if each % 2:
                    await anyio.lowlevel.checkpoint()
                gate.open()
                for code, child in enumerate(watched):
                    assert (await child.wait()).returncode == code
        assert all(is_zombie(pid) for pid in old + young)
        assert runs(running)
        assert reaper.statistics().reaped == 100
    assert [collect(pid) for pid in old + young] == [11, 12, 13, 14]
    end(running)


async def test_foreign_zombie_does_not_hide_ours(host: Host, source: Any, no_pidfds: None) -> None:
    """E9: without pidfds a foreign zombie, which hides ours from "has any child ended?", doesn't
    keep it from being found.
    """
    foreign = exits_with(9)
    await_death(foreign)
    heartbeat = 0.05 if source == "pidfd" else 3600
    async with anyreap.open_reaper(source=source, heartbeat=heartbeat) as reaper:
        with Gate() as gate, anyio.fail_after(10):
            watched = [reaper.watch(gate.add(f"exit {code}")) for code in range(20)]
            await anyio.wait_all_tasks_blocked()
            gate.open()
            for code, child in enumerate(watched):
                assert (await child.wait()).returncode == code
    assert collect(foreign) == 9


def test_foreign_children_of_all_kinds(host: Host) -> None:
    """E8: Popen, Process, ProcessPoolExecutor, fork, pty.fork, os.system, os.popen beside 100 of
    ours: all statuses true.
    """
    run_alone(
        """
        import multiprocessing, pty
        from concurrent.futures import ProcessPoolExecutor
        from anyreap import _kernel

        FORK = multiprocessing.get_context("fork")

        async def foreigners():
            popens = [subprocess.Popen(["sh", "-c", f"exit {code}"]) for code in range(10)]
            made = [FORK.Process(target=os._exit, args=(code,)) for code in range(5)]
            for process in made:
                process.start()
            forked = []
            for code in range(5):
                pid = os.fork()
                if pid == 0:
                    os._exit(code)
                forked.append(pid)
            terminal, master = pty.fork()
            if terminal == 0:
                os._exit(21)
            await anyio.sleep(0.01)
            assert os.waitstatus_to_exitcode(os.system("exit 22")) == 22
            with os.popen("echo hello; exit 23") as pipe:
                assert pipe.read() == "hello\\n"
                assert pipe.close() == 23 << 8
            assert subprocess.run(["sh", "-c", "exit 24"], check=False).returncode == 24
            await anyio.sleep(0.01)
            assert [popen.wait() for popen in popens] == list(range(10))
            for code, process in enumerate(made):
                await anyio.to_thread.run_sync(process.join)
                assert process.exitcode == code, process
                process.close()
            assert [collect(pid) for pid in forked] == list(range(5))
            assert collect(terminal) == 21
            os.close(master)

        async def ours(reaper):
            for _ in range(5):
                with Gate() as gate:
                    watched = [reaper.watch(gate.add(f"exit {code}")) for code in range(20)]
                    await anyio.sleep(0.01)
                    gate.open()
                    codes = [(await child.wait()).returncode for child in watched]
                    assert codes == list(range(20)), codes

        async def main():
            with ProcessPoolExecutor(2, mp_context=FORK) as pool:
                assert pool.submit(abs, -7).result() == 7
                async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                    with anyio.fail_after(20):
                        async with anyio.create_task_group() as tasks:
                            tasks.start_soon(foreigners)
                            tasks.start_soon(ours, reaper)
                            for number in range(20):
                                assert pool.submit(abs, -number).result() == number
                                await anyio.lowlevel.checkpoint()
                    now = reaper.statistics()
                    assert (now.reaped, now.lost) == (100, 0), now
                workers = list(pool._processes.values())
            assert [worker.exitcode for worker in workers] == [0] * len(workers)

        run(main)
        _kernel._usable = False
        run(main)
        assert not children()
        """,
        host,
        flags=(),
    )


@pytest.mark.parametrize("pidfds", [True, False], ids=["pidfds", "no-pidfds"])
def test_no_wait_for_any_child(host: Host, pidfds: bool, tmp_path: Path) -> None:
    """Promise 3, field bug 20: seen from the kernel, nothing takes "any child", nothing is
    signalled, nothing blocks.
    """
    log = tmp_path / "strace"
    calls = "wait4,waitid,kill,tkill,tgkill,pidfd_send_signal,rt_sigqueueinfo"
    done = run_alone(
        f"""
        from anyreap import _kernel
        if not {pidfds}:
            _kernel._usable = False
        async def main():
            os.kill(os.getpid(), 0)  # a mark in the log: importing has children of its own
            foreign = exits_with(9)
            running = Gate()
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                reaper.watch(running.add("exit 0"))
                with Gate() as gate, anyio.fail_after(20):
                    watched = [reaper.watch(gate.add(f"exit {{code}}")) for code in range(20)]
                    observed = reaper.watch(gate.add("exit 5"), reap=False)
                    await anyio.sleep(0.01)
                    gate.open()
                    for code, child in enumerate(watched):
                        assert (await child.wait()).returncode == code
                    await observed.wait()
            print(*(child.pid for child in watched))
            sys.stdout.flush()
            os.kill(os.getpid(), 0)
            running.open()
            assert collect(foreign) == 9
            assert collect(observed.pid) == 5
            assert collect(running.pids[0]) == 0
        run(main)
        """,
        host,
        wrapper=[strace(), "-qq", "-o", str(log), "-e", f"trace={calls}"],
        flags=(),
    )
    ours = set(done.stdout.split())
    lines = [line for line in log.read_text().splitlines() if line.startswith(calls_of(calls))]
    first, last = (index for index, line in enumerate(lines) if re.match(r"kill\(\d+, 0\)", line))
    taken = set()
    for line in lines[first + 1 : last]:
        name, _, arguments = line.partition("(")
        assert name in ("wait4", "waitid"), f"a signal was sent: {line}"
        assert "WNOHANG" in arguments, f"it may block: {line}"
        if name == "wait4":
            assert not arguments.startswith(("-", "0")), f"any child: {line}"
        if "WNOWAIT" not in arguments:
            assert name == "wait4"
            taken.add(arguments.partition(",")[0])
    assert taken == ours


def calls_of(names: str) -> tuple[str, ...]:
    """How the lines of strace begin that are calls."""
    return tuple(name + "(" for name in names.split(","))


# Recycled pids ------------------------------------------------------------------------------------
# -------------------

RECYCLE = """
    import resource
    from anyreap import _kernel
    MODE = {mode!r}
    if MODE == "no-pidfds":
        _kernel._usable = False
    CROWD = []
    if MODE == "past-the-budget":
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))

    def started(pid):
        return int(Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[19])

    def fill(reaper):
        while MODE == "past-the-budget" and len(CROWD) < 30:
            CROWD.append(sleeper())
            reaper.watch(CROWD[-1])

    def steal(pid):
        '''Kill and collect it behind the back of the reaper, and let the clock tick: two processes
        that start in the same tick can't be told apart without pidfds.'''
        began = started(pid)
        os.kill(pid, signal.SIGKILL)
        assert collect(pid) == -9
        tick(began)

    def tick(began):
        while True:
            other = sleeper()
            now = started(other)
            end(other)
            if now != began:
                return

    def recycle(pid, make=sleeper):
        '''Start a child that gets a certain pid.'''
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        innocent = make()
        assert innocent == pid, (innocent, pid)
        return innocent

    def unharmed(pid):
        # A signal that was sent to it has been acted upon before /proc answers: it is pending, or
        # it is dead.
        lines = Path(f"/proc/{{pid}}/status").read_text().splitlines()
        fields = dict(line.split(":\\t", 1) for line in lines)
        pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
        return fields["State"][0] in "RSD" and not pending

    async def told(child):
        try:
            return (await child.wait()).returncode
        except anyreap.StatusLost:
            return None

    EXPECTED = {expected!r}

    async def main():
        async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
            fill(reaper)
            with anyio.fail_after({bound}):
                await check(reaper)
        for pid in CROWD:
            end(pid)
        assert not children(), children()
"""


def recycling(script: str, host: Host, mode: str, *, limit: float = 30) -> None:
    """Run a check with pids that are given again, in a pid namespace of its own."""
    unshare = shutil.which("unshare")
    wrapper = [str(unshare), "--pid", "--fork", "--mount-proc", "--kill-child"]
    probe = [*wrapper, "sh", "-c", "echo 300 > /proc/sys/kernel/ns_last_pid"]
    if unshare is None or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("no pid namespace, or no ns_last_pid, to be had here")
    expected = -9 if mode == "pidfds" and READS_BACK else None
    head = RECYCLE.format(mode=mode, expected=expected, bound=limit / 2)
    indent = " " * 4
    body = "".join(indent + line + "\n" for line in script.strip("\n").splitlines())
    run_alone(head + body + indent + "run(main)\n", host, wrapper=wrapper, flags=(), limit=limit)


MODES = ["pidfds", "no-pidfds", "past-the-budget"]
# Which loop it is makes no difference here: two are enough.
ON = [HOSTS[0], HOSTS[3]]


def recycles(test: Callable[..., None]) -> Callable[..., None]:
    """Run it in each mode, with each source."""
    with_hosts = pytest.mark.parametrize("host", ON, ids=str)
    made: Callable[..., None] = with_hosts(pytest.mark.parametrize("mode", MODES)(test))
    return made


@recycles
def test_recycled_after_a_theft(host: Host, mode: str) -> None:
    """K5, field bug 58, finding 0.7: stolen, its pid given to our own next child: that one is
    neither hit nor collected.
    """
    recycling(
        """
async def check(reaper):
    child = reaper.watch(sleeper())
    steal(child.pid)
    innocent = recycle(child.pid)
    child.terminate()
    child.kill()
    child.send_signal(signal.SIGSTOP)
    assert unharmed(innocent)
    await anyio.sleep(0.2)  # some heartbeats
    child.kill()
    assert unharmed(innocent)
    # It ends, and is left to its owner.
    os.kill(innocent, signal.SIGUSR1)
    await_death(innocent)
    await anyio.sleep(0.2)
    assert await told(child) == EXPECTED
    child.kill()
    assert collect(innocent) == -signal.SIGUSR1
    assert reaper.statistics().lost == (EXPECTED is None)
""",
        host,
        mode,
    )


@recycles
def test_recycled_as_a_zombie(host: Host, mode: str) -> None:
    """K5: the same where the next child with the pid is dead before anybody looks: its status isn't
    taken for ours.
    """
    recycling(
        """
async def check(reaper):
    child = reaper.watch(sleeper())
    steal(child.pid)
    innocent = recycle(child.pid, lambda: exits_with(0))
    await_death(innocent)
    assert await told(child) == EXPECTED
    await anyio.sleep(0.1)
    assert collect(innocent) == 0
""",
        host,
        mode,
    )


@recycles
def test_theft_is_noticed_behind_a_recycled_pid(host: Host, mode: str) -> None:
    """K5, promise 5: a theft is told within a heartbeat also where another child lives under the
    pid by then.
    """
    recycling(
        """
async def check(reaper):
    child = reaper.watch(sleeper())
    steal(child.pid)
    innocent = recycle(child.pid)
    try:
        with anyio.fail_after(5):
            assert await told(child) == EXPECTED
        assert unharmed(innocent)
    finally:
        end(innocent)
""",
        host,
        mode,
    )


@recycles
def test_recycled_after_our_own_collection(host: Host, mode: str) -> None:
    """K2: collected by us, its pid given to our own next child: the old handle's signals do
    nothing, the new one's do.
    """
    recycling(
        """
async def check(reaper):
    child = reaper.watch(sleeper())
    began = started(child.pid)
    child.kill()
    assert (await child.wait()).returncode == -9
    tick(began)
    innocent = recycle(child.pid)
    child.kill()
    child.terminate()
    assert unharmed(innocent)
    other = reaper.watch(innocent)
    assert other is not child and other.status is None
    child.kill()
    assert unharmed(innocent)
    other.send_signal(signal.SIGUSR1)
    assert (await other.wait()).returncode == -signal.SIGUSR1
    assert child.returncode == -9
""",
        host,
        mode,
    )


@recycles
def test_recycled_and_handed_in_again(host: Host, mode: str) -> None:
    """K5: stolen, and the next child with its pid handed in before the theft was noticed: two
    children, two handles.
    """
    recycling(
        """
async def check(reaper):
    child = reaper.watch(sleeper())
    steal(child.pid)
    innocent = recycle(child.pid)
    other = reaper.watch(innocent)
    assert other is not child
    assert await told(child) == EXPECTED
    assert other.status is None and not other.lost
    child.kill()
    assert unharmed(innocent)
    other.send_signal(signal.SIGUSR1)
    assert (await other.wait()).returncode == -signal.SIGUSR1
    now = reaper.statistics()
    assert now.lost == (EXPECTED is None), now
""",
        host,
        mode,
    )


@recycles
def test_recycled_while_observed(host: Host, mode: str) -> None:
    """K3: an observed child that its owner has collected, its pid given again: the new one is no
    business of ours.
    """
    recycling(
        """
async def check(reaper):
    child = reaper.watch(sleeper(), reap=False)
    began = started(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    assert await told(child) == -9
    assert collect(child.pid) == -9
    tick(began)
    innocent = recycle(child.pid)
    child.kill()
    assert unharmed(innocent)
    other = reaper.watch(innocent)
    assert other is not child
    os.kill(innocent, signal.SIGUSR1)
    assert await told(other) == -signal.SIGUSR1
    assert await told(child) == -9
    # And a zombie: not collected through the old handle.
    child = reaper.watch(sleeper(), reap=False)
    began = started(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    assert await told(child) == -9
    assert collect(child.pid) == -9
    tick(began)
    innocent = recycle(child.pid, lambda: exits_with(4))
    await_death(innocent)
    await anyio.sleep(0.2)
    assert collect(innocent) == 4
""",
        host,
        mode,
    )


@recycles
def test_recycled_when_the_block_is_left(host: Host, mode: str) -> None:
    """K5, promise 6: an owned child was stolen, its pid given again: the shutdown of the block hits
    nobody.
    """
    recycling(
        """
async def check(reaper):
    with anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as inner:
            child = inner.adopt(sleeper(), shutdown=anyreap.Shutdown(grace=0.1))
            steal(child.pid)
            innocent = recycle(child.pid)
            scope.cancel()
    assert unharmed(innocent)
    assert await told(child) == EXPECTED
    os.kill(innocent, signal.SIGUSR1)
    assert collect(innocent) == -signal.SIGUSR1
""",
        host,
        mode,
    )


# Between reapers ----------------------------------------------------------------------------------
# -------------------


async def test_stolen_from_two_reapers(source: Any, pidfds: bool) -> None:
    """E11, E1: a theft is told to the watchers of every reaper."""
    async with (
        anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as one,
        anyreap.open_reaper(source=source, heartbeat=HEARTBEAT) as two,
    ):
        with Gate() as gate:
            pid = gate.add("exit 7")
            watched = one.watch(pid), two.watch(pid)
            gate.open()
            collect(pid)
        expected = left_by(7, pidfds=pidfds)
        for child in watched:
            assert await told(child) == expected
        assert one.statistics().lost == two.statistics().lost == int(expected is None)


async def test_everybody_else(source: Any, pidfds: bool) -> None:
    """Promise 3: a look at what isn't ours takes nothing: pids all over the machine are NotAChild,
    and live on.
    """
    foreign = {int(name) for name in os.listdir("/proc") if name.isdigit()} - children()
    async with anyreap.open_reaper(source=source) as reaper:
        for pid in foreign:
            with pytest.raises(anyreap.NotAChild):
                reaper.watch(pid)
        assert reaper.statistics().watched == 0


async def test_background_children_of_a_shell(source: Any) -> None:
    """Promise 3: what a watched shell leaves behind is not ours: it is neither waited for nor
    signalled.
    """
    read, write = os.pipe()
    try:
        async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
            with anyio.fail_after(10):
                pid = sh(f"sleep 3600 >/dev/null & echo $! >/proc/{os.getpid()}/fd/{write}; exit 7")
                assert (await reaper.wait(pid)).returncode == 7
        grandchild = int(os.read(read, 100))
        assert runs(grandchild)
        os.kill(grandchild, signal.SIGKILL)
    finally:
        os.close(read)
        os.close(write)


RACE = """
import queue, threading
TRIES = {tries}
sys.setswitchinterval(1e-5)

async def hit(wanted, ended, stop):
    '''Signal each child, as fast as it goes, from before its end until its number is somebody else's.'''
    async with anyreap.open_reaper(source="pidfd", heartbeat=0.05) as reaper:
        while (pid := wanted.get()) is not None:
            child = reaper.watch(pid)
            hits = 0
            while not stop.is_set():
                child.kill()
                hits += 1
            ended.put(hits)
            await anyio.lowlevel.checkpoint()

async def check(reaper):
    wanted, ended, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    thread = threading.Thread(target=run, args=(hit, wanted, ended, stop))
    thread.start()
    late = 0
    try:
        for _ in range(TRIES):
            stop.clear()
            child = reaper.watch(sleeper())
            began = started(child.pid)
            wanted.put(child.pid)
            assert (await child.wait()).returncode == -9
            if MODE != "pidfds":
                tick(began)
            with Gate() as gate:
                innocent = recycle(child.pid, gate.add_cat)
                stop.set()
                late += ended.get()
                gate.open()
                assert collect(innocent) == 0, "an innocent child was hit"
    finally:
        stop.set()
        wanted.put(None)
        thread.join()
    assert late > TRIES, "nobody was there to hit"
"""


@recycles
def test_kill_races_with_the_reap(host: Host, mode: str) -> None:
    """K6: one thread kills a child again and again while another one collects it and gives its number
    to the next: that one is never hit. ANYREAP_THOROUGH=1 tries it a hundred thousand times.
    """
    tries = 200 if mode == "pidfds" else 40  # without pidfds each has to wait for the clock to tick
    if THOROUGH:
        tries *= 500
    recycling(RACE.format(tries=tries), host, mode, limit=3000 if THOROUGH else 30)
