"""Shutdown by group: the leader, its members, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import anyreap
from tests.harness import (
    HOSTS,
    Gate,
    Host,
    await_death,
    children,
    end,
    is_zombie,
    open_fds,
    run_alone,
    sleeper,
    state_of,
    until,
)
from tests.staging import Sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.anyio

TERM, CONT, KILL = signal.SIGTERM, signal.SIGCONT, signal.SIGKILL
BOUND = 20  # seconds; who needs them has failed
PATIENT = anyreap.Shutdown(scope="group", grace=3600)  # who waits for its end has failed
BRIEF = anyreap.Shutdown(scope="group", grace=0.1)

each_backend = pytest.mark.parametrize("host", [HOSTS[0], HOSTS[2], HOSTS[4]], ids=str, indirect=True)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, and unshare, for a pid namespace"
)

# Members say their pid when they are set up.
OBEDIENT = "sh -c 'echo $$; exec sleep 3600' &"
STUBBORN = """sh -c 'trap "" TERM; echo $$; exec sleep 3600' &"""


def gone(pid: int) -> bool:
    """Whether a process is dead. A zombie is, and who collects it is init's affair."""
    return state_of(pid) in ("", "Z")


def open_reaper(source: Any, shutdown: anyreap.Shutdown = PATIENT) -> Any:
    """Open a reaper that looks at what no signal tells of often."""
    return anyreap.open_reaper(source=source, shutdown=shutdown, heartbeat=0.05)


async def started(
    reaper: anyreap.Reaper, script: str, members: int, **options: Any
) -> tuple[anyreap.Process, list[int]]:
    """Start a shell that leads a group, and wait until its members have said their pids."""
    process = await reaper.open_process(["/bin/sh", "-c", script], **options)
    assert process.stdout is not None
    said = b""
    with anyio.fail_after(BOUND):
        while said.count(b"\n") < members:
            said += await process.stdout.receive()
    return process, [int(pid) for pid in said.split()]


@pytest.fixture
def stray() -> Iterator[list[int]]:
    """Pids of descendants that are meant to survive, to be ended by the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, KILL)


# Ending a group -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leads", ["by default", "process_group", "start_new_session"])
async def test_group_is_ended(source: Any, pidfds: bool, leads: str) -> None:
    """A child with two descendants in its group is ended with both (K14, field bug 56)."""
    options: dict[str, dict[str, Any]] = {
        "process_group": {"process_group": 0},
        "start_new_session": {"start_new_session": True},
    }
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source) as reaper:
            process, members = await started(reaper, f"{OBEDIENT} {OBEDIENT} wait", 2, **options.get(leads, {}))
            assert os.getpgid(process.pid) == process.pid
            assert [os.getpgid(member) for member in members] == [process.pid] * 2
            assert (os.getsid(process.pid) == process.pid) == (leads == "start_new_session")
            scope.cancel()
    assert all(map(gone, members))
    assert process.returncode == -TERM


async def test_single_child_is_ended_alone(source: Any, stray: list[int]) -> None:
    """With `scope="process"` the child is ended, and its descendants are left alone (K14)."""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, anyreap.Shutdown(grace=3600)) as reaper:
            process, members = await started(reaper, f"{OBEDIENT} {OBEDIENT} wait", 2)
            stray += members
            assert os.getpgid(process.pid) == os.getpgrp()
            scope.cancel()
    assert process.returncode == -TERM
    assert not any(map(gone, members))


async def test_escalation_follows_the_group(source: Any, pidfds: bool) -> None:
    """When the leader obeys and a member does not, the member is killed at the end of the grace (field bug 57)."""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, BRIEF) as reaper:
            process, (member,) = await started(reaper, f"{STUBBORN} wait", 1)
            scope.cancel()
    assert process.returncode == -TERM
    assert gone(member)
    assert children() == set()


async def test_signals_that_a_group_gets(source: Any, monkeypatch: pytest.MonkeyPatch, pidfds: bool) -> None:
    """A group gets the signal, then SIGCONT, then, if it must be, SIGKILL; and nobody else gets any."""
    sent: list[tuple[str, int]] = []
    send, killpg = signal.pidfd_send_signal, os.killpg

    def spy_send(pidfd: int, signum: int, *args: Any) -> None:
        sent.append(("group" if args[-1:] == (4,) else "process", signum))
        send(pidfd, signum, *args)

    def spy_killpg(pgid: int, signum: int) -> None:
        sent.append(("group" if pgid == process.pid else f"group {pgid}", signum))
        killpg(pgid, signum)

    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, BRIEF) as reaper:
            process, _ = await started(reaper, f"{STUBBORN} wait", 1)
            monkeypatch.setattr(signal, "pidfd_send_signal", spy_send)
            monkeypatch.setattr(os, "killpg", spy_killpg)
            monkeypatch.setattr(os, "kill", lambda *args: pytest.fail(f"kill{args}"))
            scope.cancel()
    assert [each for each in sent if each[1]] == [("group", TERM), ("group", CONT), ("group", KILL)]


async def test_stopped_members_hear_the_signal(source: Any, pidfds: bool) -> None:
    """Members that are stopped hear the signal, because SIGCONT follows; none has to be killed (K13, field bug 60)."""
    read, write = os.pipe()
    member = f"""sh -c 'trap "echo >/dev/fd/{write}; exit 7" TERM; echo $$; kill -STOP $$' &"""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source) as reaper:
            script = f"trap 'wait; exit 3' TERM; {member} {member} wait"
            process, members = await started(reaper, script, 2, pass_fds=[write])
            await until(lambda: [state_of(member) for member in members] == ["T", "T"])
            scope.cancel()
    os.close(write)
    assert os.read(read, 10) == b"\n\n"
    os.close(read)
    assert process.returncode == 3


async def test_one_grace_for_twenty_groups(source: Any, pidfds: bool) -> None:
    """Twenty groups that don't obey are ended in one grace period, not in twenty (K17)."""
    grace = 0.5
    ended: list[int] = []
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, anyreap.Shutdown(scope="group", grace=grace)) as reaper:

            async def start_one() -> None:
                ended.extend((await started(reaper, f"{STUBBORN} wait", 1))[1])

            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(start_one)
            began = anyio.current_time()
            scope.cancel()
    assert grace <= anyio.current_time() - began < 10 * grace
    assert len(ended) == 20
    assert all(map(gone, ended))


async def test_second_cancellation_ends_the_grace_of_a_group(source: Any, pidfds: bool) -> None:
    """A second cancellation during the grace period kills the whole group at once."""
    read, write = os.pipe()
    # Of a sleep that is killed it says so on descriptor 2: were that a pipe that we close, SIGPIPE would end it.
    trap = f'exec 2>/dev/null; trap "echo >/dev/fd/{write}" TERM; echo $$; while :; do sleep 0.01; done'
    stubborn = f"sh -c '{trap}' &"

    async def again() -> None:
        await anyio.wait_readable(read)  # the grace has begun
        outer.cancel()

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again)
            with anyio.CancelScope() as outer, anyio.CancelScope() as inner:
                async with open_reaper(source) as reaper:
                    process, (member,) = await started(reaper, f"{stubborn} wait", 1, pass_fds=[write])
                    inner.cancel()
    os.close(read)
    os.close(write)
    assert process.returncode == -TERM
    assert gone(member)


async def test_grace_is_none(source: Any) -> None:
    """With `grace=0` the group gets SIGKILL and nothing else."""
    read, write = os.pipe()
    member = f"""sh -c 'trap "echo >/dev/fd/{write}" TERM; echo $$; while :; do sleep 0.01; done' &"""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, anyreap.Shutdown(scope="group", grace=0)) as reaper:
            process, (pid,) = await started(reaper, f"{member} wait", 1, pass_fds=[write])
            scope.cancel()
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)
    assert process.returncode == -KILL
    assert gone(pid)


async def test_who_leaves_the_group_escapes(source: Any, stray: list[int]) -> None:
    """A descendant that went into a session of its own is not ended, and keeps no block open (K15, field bug 66)."""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source) as reaper:
            script = f"{OBEDIENT} setsid sh -c 'echo $$; exec sleep 3600' & wait"
            process, members = await started(reaper, script, 2)
            escaped = [pid for pid in members if os.getpgid(pid) != process.pid]
            stray += escaped
            scope.cancel()
    assert len(escaped) == 1
    assert [pid for pid in members if not gone(pid)] == escaped


# A leader that ends first ---------------------------------------------------------------------------------------------


async def test_leader_that_leaves_members_behind(source: Any, pidfds: bool) -> None:
    """`wait` returns when the leader ends. With pidfds it is collected at once; without, it stays a zombie, its status
    known, for as long as members live, because that keeps the number of the group from being given away. The members
    keep no block open, and are ended by the policy when it is left.
    """
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as reaper:
            process, (member,) = await started(reaper, f"{OBEDIENT} read x; exit 3", 1)
            assert process.stdin is not None
            await process.stdin.send(b"\n")
            assert await process.wait() == 3
            assert process.status is not None
            assert process.status.exit_code == 3
            assert reaper.statistics().owned == 0
            if pidfds:
                await until(lambda: process.pid not in children())
                assert process.status.usage is not None
            else:
                assert is_zombie(process.pid)
                for _ in range(3):
                    await anyio.wait_all_tasks_blocked()
                assert is_zombie(process.pid)
            assert not gone(member)
    assert gone(member)
    assert children() == set()


async def test_stubborn_members_are_killed_on_leaving(source: Any, pidfds: bool) -> None:
    """Members that a leader left behind and that ignore the signal are killed when the grace is over (field bug 57)."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source, BRIEF) as reaper:
            process, (member,) = await started(reaper, f"{STUBBORN} exit 3", 1)
            assert await process.wait() == 3
    assert gone(member)
    assert children() == set()


async def test_leader_is_collected_last(source: Any, no_pidfds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds the leader is collected when no member is alive, and not before (field bug 58)."""
    alive: list[bool] = []
    wait4 = os.wait4

    def spy(pid: int, options: int) -> Any:
        taken = wait4(pid, options)
        if taken[0] == process.pid:
            alive.append(not gone(member))
        return taken

    monkeypatch.setattr(os, "wait4", spy)
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, BRIEF) as reaper:
            process, (member,) = await started(reaper, f"{STUBBORN} wait", 1)
            scope.cancel()
    assert alive == [False]


async def test_members_that_end_by_themselves(source: Any, gate: Gate, pidfds: bool) -> None:
    """When the last member has ended by itself, nothing is kept of the group any more: no zombie, no descriptor."""
    async with open_reaper(source) as reaper:
        await reaper.run_process(["/bin/true"])
        before = set(open_fds())
        script = f"sh -c 'echo $$; read x </dev/fd/{gate.read}' & exit 3"
        process, (member,) = await started(reaper, script, 1, pass_fds=[gate.read])
        with reaper.exits() as exits, anyio.fail_after(BOUND):
            assert await process.wait() == 3
            process.close_pipes()
            await until(lambda: len(set(open_fds()) - before) == pidfds)
            assert not gone(member)
            gate.open()
            await until(lambda: (children(), set(open_fds()) - before) == (set(), set()))
            if not pidfds:
                assert (await exits.receive()).exit_code == 3
        assert reaper.statistics().reaped == 2


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A pipe to hold members at."""
    with Gate() as gate:
        yield gate


async def test_closing_ends_the_members(source: Any, pidfds: bool) -> None:
    """`aclose` ends the members that the leader left behind, by the policy."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source, BRIEF) as reaper:
            for script in (f"{OBEDIENT} exit 3", f"{STUBBORN} exit 3"):
                process, (member,) = await started(reaper, script, 1)
                await process.aclose()
                assert process.returncode == 3
                assert gone(member)
                assert children() == set()


async def test_cancelled_close_ends_the_group(source: Any, pidfds: bool) -> None:
    """When `aclose` is cancelled, the whole group is ended by the policy, and no other."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source, BRIEF) as reaper:
            other, (others,) = await started(reaper, f"{OBEDIENT} wait", 1)
            with anyio.CancelScope() as scope:
                process, (member,) = await started(reaper, f"{STUBBORN} wait", 1)
                scope.cancel()
                await process.aclose()
            assert scope.cancelled_caught
            assert process.returncode == -TERM
            assert gone(member)
            assert other.returncode is None
            assert not gone(others)
            other.kill()
    assert gone(others)


async def test_run_process_ends_the_members(source: Any, pidfds: bool, gate: Gate) -> None:
    """`run_process` ends the members that its child left behind; when it is cancelled, the whole group."""
    read, write = os.pipe()
    member = f"sh -c 'echo $$ >/dev/fd/{write}; exec sleep 3600' &"
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as reaper:
            script = f"{member} read x </dev/fd/{gate.read}; exit 0"

            async def let_go() -> None:
                await anyio.wait_readable(read)  # the member is there
                gate.open()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(let_go)
                done = await reaper.run_process(
                    ["/bin/sh", "-c", script],
                    pass_fds=[write, gate.read],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            assert done.returncode == 0
            assert gone(int(os.read(read, 10)))

            async def cancel() -> None:
                await anyio.wait_readable(read)
                await until(lambda: reaper.statistics().owned)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                with anyio.CancelScope() as scope:
                    await reaper.run_process(["/bin/sh", "-c", f"{member} wait"], pass_fds=[write])
            assert gone(int(os.read(read, 10)))
            assert children() == set()
    os.close(read)
    os.close(write)


async def test_group_of_zombies_is_empty(source: Any, pidfds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that ends and leaves nobody delays nothing, and an empty group gets no signal (K7, field bug 59)."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as reaper:
            process = await reaper.open_process(["/bin/sh", "-c", "exit 3"])
            assert await process.wait() == 3
            sent = Sent(monkeypatch)
            monkeypatch.setattr(os, "killpg", lambda pgid, signum: signum and pytest.fail("killpg"))
            await process.aclose()
            await until(lambda: process.pid not in children())
    assert [signum for _, signum in sent.all if signum] == []


# The leader forks one that forks a member, leaves the group and never collects it: a zombie that stays.
ZOMBIE_MEMBER = """
import os, signal
if os.fork() == 0:
    member = os.fork()
    if member == 0:
        os._exit(0)
    os.setpgid(0, 0)
    os.waitid(os.P_PID, member, os.WEXITED | os.WNOWAIT)
    os.write(1, b"%d\\n%d\\n" % (os.getpid(), member))
    signal.pause()
os.read(0, 1)
"""


async def test_zombie_members_do_not_count(source: Any, pidfds: bool, stray: list[int]) -> None:
    """A member that is a zombie which nobody collects is not waited for (field bug 59)."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as reaper:
            process = await reaper.open_process([sys.executable, "-ISc", ZOMBIE_MEMBER])
            assert process.stdout is not None
            said = b""
            while said.count(b"\n") < 2:
                said += await process.stdout.receive()
            parent, member = map(int, said.split())
            stray.append(parent)
            assert is_zombie(member)
            assert os.getpgid(member) == process.pid
            assert process.stdin is not None
            await process.stdin.send(b"\n")
            assert await process.wait() == 0
            os.killpg(process.pid, 0)  # it proves nothing
            await process.aclose()
            await until(lambda: process.pid not in children())
            assert is_zombie(member)


# The first thread of a process may end before the others: then its state is Z, and it is as alive as ever.
HEADLESS = """
import ctypes, os, signal, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    threading.Thread(target=lambda: (os.write(1, b"%d\\n" % os.getpid()), time.sleep(3600))).start()
    ctypes.CDLL(None).syscall(60, 0)  # exit, of this thread alone
os.read(0, 1)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of a system call")
async def test_member_without_its_first_thread(source: Any, pidfds: bool, stray: list[int]) -> None:
    """A member whose first thread has ended, and whose others run, looks like a zombie, and is ended all the same."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source, BRIEF) as reaper:
            process = await reaper.open_process([sys.executable, "-ISc", HEADLESS])
            assert process.stdout is not None
            member = int(await process.stdout.receive())
            stray.append(member)
            await until(lambda: state_of(member) == "Z")
            assert process.stdin is not None
            await process.stdin.send(b"\n")
            assert await process.wait() == 0
    await until(
        lambda: not os.path.exists(f"/proc/{member}/task") or len(os.listdir(f"/proc/{member}/task")) < 2, within=2
    )


# Theft, reuse, rights -------------------------------------------------------------------------------------------------


async def test_leader_that_somebody_else_collects(source: Any, pidfds: bool, stray: list[int]) -> None:
    """When somebody else collects the leader, its members are ended through its pidfd; without one nothing proves whose
    they are, and they are left alone (K5, field bug 58).
    """
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, BRIEF) as reaper:
            process, (member,) = await started(reaper, f"{STUBBORN} wait", 1)
            stray.append(member)
            os.kill(process.pid, KILL)
            assert os.waitpid(process.pid, 0)[0] == process.pid
            with contextlib.suppress(anyreap.StatusLost):
                await process.wait()
            assert process.lost or process.returncode == -KILL
            assert not gone(member)
            scope.cancel()
    assert gone(member) == pidfds


REUSE = """
import time
anyreap._kernel._usable = USABLE
GROUP = anyreap.Shutdown(scope="group", grace=0.05)

def reuse(pid):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(pid - 1))
    victim = subprocess.Popen(["sleep", "3600"], process_group=0)
    assert victim.pid == pid == os.getpgid(pid), (victim.pid, pid)
    return victim

def ticks():  # a start time is told apart by the tick
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    while time.clock_gettime(time.CLOCK_BOOTTIME) < began + 0.03:
        pass

async def main():
    with anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=SOURCE, shutdown=GROUP, heartbeat=0.05) as reaper:
            one = await reaper.open_process(["/bin/cat"])
            two = await reaper.open_process(["/bin/cat"])
            ticks()
            await one.stdin.aclose()
            assert await one.wait() == 0
            await until(lambda: one.pid not in children())
            victims = [reuse(one.pid)]
            os.kill(two.pid, signal.SIGKILL)
            os.waitpid(two.pid, 0)  # before the reaper has seen it
            victims.append(reuse(two.pid))
            one.terminate()
            await one.aclose()
            with anyio.CancelScope() as closing:
                closing.cancel()
                await two.aclose()
            scope.cancel()
    for victim in victims:
        assert victim.poll() is None, victim.returncode
        victim.kill()
        victim.wait()
run(main)
"""


@needs_namespaces
@pytest.mark.parametrize("usable", [True, False], ids=["pidfds", "no-pidfds"])
def test_group_whose_number_is_reused(host: Host, usable: bool) -> None:
    """When a leader was collected, by us or by a thief, its group is empty, and another group got the number, nothing
    is sent to that one (K7, K5, field bug 58).
    """
    wrapper = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*wrapper, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no pid namespaces here")
    run_alone(REUSE.replace("USABLE", str(usable)), host, wrapper=wrapper)


@needs_root
@each_backend
@pytest.mark.parametrize("usable", [True, False], ids=["pidfds", "no-pidfds"])
def test_members_that_may_not_be_signalled(host: Host, usable: bool) -> None:
    """Members that outlive SIGKILL are named in the `StillRunning`, with their pid and why (K9, K18)."""
    done = run_alone(
        """
        anyreap._kernel._usable = USABLE
        anyreap._shutdown.KILL_BOUND = 0.05
        async def main():
            group = anyreap.Shutdown(scope="group", grace=0.05)
            try:
                async with anyreap.open_reaper(source=SOURCE, shutdown=group, heartbeat=0.05) as reaper:
                    process = await reaper.open_process("sh -c 'echo $$; exec sleep 3600' & exit 3")
                    member = int(await process.stdout.receive())
                    print(member, flush=True)
                    assert await process.wait() == 3
                    os.setresuid(65534, 65534, 65534)
            except anyreap.StillRunning as exc:
                assert exc.pids == (member,), (exc, process)
                assert "state S" in str(exc) and "could not be sent" in str(exc), exc
            else:
                raise AssertionError("nothing was said")
            assert not children(), children()
        run(main)
        """.replace("USABLE", str(usable)),
        host,
    )
    member = int(done.stdout.split()[0])
    assert not gone(member)
    os.kill(member, KILL)


# What can't be had ----------------------------------------------------------------------------------------------------


async def test_adopted_child_that_leads_no_group(source: Any) -> None:
    """To adopt a child that leads no group, to be ended with its group, is a ValueError that says what to do instead;
    nothing is watched, and the child is left alone.
    """
    pid = sleeper()
    async with open_reaper(source) as reaper:
        for options in ({}, {"shutdown": PATIENT}):
            with pytest.raises(ValueError, match=r"leads no process group.*process_group=0.*scope='process'"):
                reaper.adopt(pid, **options)
        assert (reaper.statistics().watched, reaper.statistics().owned) == (0, 0)
        with pytest.raises(anyreap.NotAChild):
            reaper.adopt(1)
    assert not gone(pid)
    end(pid)


@pytest.mark.parametrize("form", ["pid", "Popen"])
async def test_adopted_leader(source: Any, pidfds: bool, form: str) -> None:
    """An adopted leader is ended with its group, and a `Popen` knows its code afterwards."""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source, BRIEF) as reaper:
            popen = subprocess.Popen(
                ["/bin/sh", "-c", f"{STUBBORN} wait"], stdout=subprocess.PIPE, process_group=0, bufsize=0
            )
            assert popen.stdout is not None
            member = int(popen.stdout.readline())
            child = reaper.adopt(popen.pid if form == "pid" else popen)
            scope.cancel()
    assert popen.stdout is not None
    popen.stdout.close()
    assert gone(member)
    assert child.returncode == -TERM
    if form == "pid":
        popen.returncode = -TERM
    assert popen.returncode == -TERM


async def test_adopted_leader_that_has_ended(source: Any, pidfds: bool) -> None:
    """A leader that had ended before it was adopted brings the members that it left behind."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source, BRIEF) as reaper:
            popen = subprocess.Popen(
                ["/bin/sh", "-c", f"{STUBBORN} read x; exit 3"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,
                bufsize=0,
            )
            assert popen.stdin is not None
            assert popen.stdout is not None
            member = int(popen.stdout.readline())
            popen.stdin.close()
            popen.stdout.close()
            await_death(popen.pid)
            child = reaper.adopt(popen)
            assert (await child.wait()).exit_code == 3
            assert not gone(member)
    assert gone(member)
    assert popen.returncode == 3


async def test_policy_that_is_replaced(source: Any, pidfds: bool, stray: list[int]) -> None:
    """A second `adopt` replaces the policy of a group: the child is ended alone then; and the other way round."""
    alone = anyreap.Shutdown(grace=3600)
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with open_reaper(source) as reaper:
            one, (first,) = await started(reaper, f"{OBEDIENT} wait", 1)
            two, (second,) = await started(reaper, f"{OBEDIENT} wait", 1, shutdown=alone, process_group=0)
            reaper.adopt(one.pid, shutdown=alone)
            reaper.adopt(two.pid, shutdown=PATIENT)
            stray.append(first)
            scope.cancel()
    assert (one.returncode, two.returncode) == (-TERM, -TERM)
    assert (gone(first), gone(second)) == (False, True)
    assert children() == set()


async def test_leader_that_was_observed_before(source: Any, pidfds: bool) -> None:
    """Adopting a leader that was seen to end before, and is a zombie still, keeps no block open: its group is empty."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as reaper:
            popen = subprocess.Popen(["/bin/sh", "-c", "exit 3"], process_group=0)
            child = reaper.watch(popen, reap=False)
            await child.wait()
            assert reaper.adopt(popen, shutdown=PATIENT) is child
        assert popen.returncode == 3
        assert children() == set()


async def test_policy_that_is_replaced_when_the_leader_has_ended(
    source: Any, no_pidfds: None, stray: list[int]
) -> None:
    """A leader that stands for its group is collected once it is to be ended alone; the block waits for nobody then."""
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as reaper:
            process, (member,) = await started(reaper, f"{OBEDIENT} read x; exit 3", 1)
            stray.append(member)
            assert process.stdin is not None
            await process.stdin.send(b"\n")
            assert await process.wait() == 3
            assert is_zombie(process.pid)
            reaper.adopt(process.pid, shutdown=anyreap.Shutdown(grace=3600))
        assert children() == set()
        assert not gone(member)


def test_no_descriptor_left(host: Host) -> None:
    """A program that has run out of descriptors has its groups looked at all the same, and its service goes on."""
    script = """
        import resource
        async def main():
            shutdown = anyreap.Shutdown(scope="group", grace=3600)
            async with anyreap.open_reaper(source=SOURCE, heartbeat=0.05) as reaper:
                other = await reaper.open_process(["/bin/cat"])
                leader = await reaper.open_process("sleep 3600 & echo $!; read x; exit 3", shutdown=shutdown)
                member = int(await leader.stdout.receive())
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
                taken = []
                try:
                    while True:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    pass
                await leader.stdin.send(b"x\\n")
                assert await leader.wait() == 3
                await anyio.sleep(0.2)  # heartbeats
                os.close(taken.pop())
                assert state_of(member) not in ("", "Z")
                other.kill()
                assert await other.wait() == -9
            assert children() == set()
            for fd in taken:
                os.close(fd)
            assert state_of(member) in ("", "Z")
        run(main)
    """
    run_alone(script, host)


@pytest.mark.parametrize("first", ["group", "process"])
async def test_two_reapers_with_two_policies(source: Any, pidfds: bool, first: str, stray: list[int]) -> None:
    """Of two nested reapers one owns a leader alone, the other with its group: each goes by its own policy. The inner
    block is left at once when the leader has ended, and the outer one ends the member.
    """
    popen = subprocess.Popen(
        ["/bin/sh", "-c", f"{OBEDIENT} read x; exit 3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
        bufsize=0,
    )
    assert popen.stdin is not None
    assert popen.stdout is not None
    member = int(popen.stdout.readline())
    stray.append(member)
    alone = anyreap.Shutdown(grace=3600)
    with anyio.fail_after(BOUND):
        async with open_reaper(source) as outer:
            async with open_reaper(source) as inner:
                if first == "group":
                    outer.adopt(popen)
                    inner.adopt(popen, shutdown=alone)
                else:
                    inner.adopt(popen, shutdown=alone)
                    outer.adopt(popen)
                popen.stdin.close()
                popen.stdout.close()
            assert not gone(member)
        assert gone(member)
    assert popen.returncode == 3
    assert children() == set()


async def test_group_of_another(source: Any) -> None:
    """A child that is to be ended with its group, and put into that of another, is a ValueError; nothing is started."""
    async with open_reaper(source) as reaper:
        leader = await reaper.open_process(["/bin/cat"])
        before = children()
        starts: tuple[Callable[..., Any], ...] = (reaper.open_process, reaper.run_process)
        for start in starts:
            with pytest.raises(ValueError, match=rf"process_group={leader.pid} puts it into another"):
                await start(["/bin/true"], process_group=leader.pid)
        assert children() == before
        alone = anyreap.Shutdown()
        done = await reaper.run_process(["/bin/true"], process_group=leader.pid, shutdown=alone)
        assert done.returncode == 0
