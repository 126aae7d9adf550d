"""Mixed work for a while, and every status checked: `make soak`, a minute; `SOAK_S=900 make soak`, a million children.

A third of the time on trio, on asyncio and on uvloop. As root on Linux >= 6.14, in a pid namespace that has six hundred
pids and gives them again and again. Beside it somebody sends SIGCHLD all the time. At the end descriptors, threads and
memory must be what they were when it had warmed up.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

import anyreap
from tests import harness

SECONDS = float(os.environ.get("SOAK_S", "60"))
INSIDE = "ANYREAP_SOAK_INSIDE"
PIDS = 600
WORKERS = 12
WARM = 0.25  # of the time, before it is looked at what there is
MIB = 64  # by how much memory may grow after that: the allocator's own ups and downs


class Wrong(AssertionError):
    """A status that is not what the child was told to do, or something left behind."""


def expect(found: object, wanted: object) -> None:
    """Compare, also where Python is told to skip assertions."""
    if found != wanted:
        msg = f"{found!r}, not {wanted!r}"
        raise Wrong(msg)


late: list[float] = []  # microseconds from a kill to the task that waits
done: Counter[str] = Counter()


async def by_pid(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """Any child, by its pid."""
    code = rng.randrange(256)
    expect((await reaper.wait(harness.exits_with(code))).exit_code, code)


async def killed(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """An owned child, killed at some time."""
    child = reaper.adopt(harness.sleeper())
    signum = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1))
    await anyio.sleep(rng.random() * 0.01)
    began = time.perf_counter()
    child.send_signal(signum)
    expect((await child.wait()).signal, signum)
    late.append((time.perf_counter() - began) * 1e6)
    child.kill()  # whoever has its number now must not mind: it is checked as all others are


async def output(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """`run_process`, with input and output."""
    data = rng.randbytes(rng.randrange(1, 5000))
    completed = await reaper.run_process(["cat"], input=data)
    expect((completed.stdout, completed.returncode), (data, 0))


async def shell(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """`open_process`, left by a block that ends it with its group, or after its end."""
    tree = anyreap.Shutdown(grace=0.05, scope="group")
    process = await reaper.open_process("sleep 60 & exec sleep 60", stdin=None, stdout=None, shutdown=tree)
    await anyio.sleep(rng.random() * 0.01)
    with anyio.move_on_after(0):
        await process.aclose()
    expect(await process.wait() in (-signal.SIGTERM, -signal.SIGKILL), True)


async def cancelled(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """A start, or a run, that is cancelled at some point."""
    with anyio.move_on_after(rng.random() * 0.006):
        await reaper.run_process(["sleep", "60"], shutdown=anyreap.Shutdown(grace=0))


async def stolen(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """A child whose status somebody takes."""
    code = rng.randrange(256)
    with harness.Gate() as gate:
        pid = gate.add(f"exit {code}")
        child = reaper.watch(pid)
        gate.open()
        with contextlib.suppress(ChildProcessError):  # the reaper was faster
            os.waitpid(pid, 0)
        gate.pids.clear()
    try:
        expect((await child.wait()).exit_code, code)
    except anyreap.StatusLost:
        done["lost"] += 1


async def foreign(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """A child that is none of the reaper's business."""
    code = rng.randrange(256)
    popen = subprocess.Popen(["/bin/sh", "-c", f"exit {code}"])
    expect(await anyio.to_thread.run_sync(popen.wait), code)


async def shared(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """A Popen that the reaper, another reaper and a thread wait for."""
    code = rng.randrange(256)
    popen = subprocess.Popen(["/bin/sh", "-c", f"exit {code}"])
    thread = threading.Thread(target=popen.wait)
    thread.start()
    expect((await reaper.wait(popen)).exit_code, code)
    expect((await anyreap.wait(popen)).exit_code, code)
    await anyio.to_thread.run_sync(thread.join)
    expect(popen.returncode, code)


async def forked(reaper: anyreap.Reaper, rng: random.Random) -> None:
    """A forked child of Python's, which finds the reaper closed to it."""
    code = rng.randrange(1, 256)
    pid = os.fork()
    if pid == 0:
        try:
            reaper.watch(os.getppid())
        except RuntimeError:
            os._exit(code)
        os._exit(0)
    expect((await reaper.wait(pid)).exit_code, code)


WORKS = (by_pid, by_pid, killed, killed, output, shell, cancelled, stolen, foreign, shared, forked)


async def soak(source: Any, seconds: float, seed: int) -> None:
    """All works at the same time, for so many seconds."""
    end = time.monotonic() + seconds

    def look() -> tuple[int, int, float]:
        return len(harness.open_fds()), threading.active_count(), memory()

    async def worker(number: int) -> None:
        rng = random.Random(seed + number)
        while time.monotonic() < end:
            work = rng.choice(WORKS)
            with anyio.fail_after(30):
                await work(reaper, rng)
            done[work.__name__] += 1

    async with anyreap.open_reaper(source=source) as reaper:
        now = (0, 0, 0.0)
        for until in (time.monotonic() + seconds * WARM, end):
            end = until
            async with anyio.create_task_group() as tasks:
                for number in range(WORKERS):
                    tasks.start_soon(worker, number)
            seed += WORKERS
            found, now = now, look()
        expect(now[0], found[0])
        if now[1] > found[1] + 2:  # a pool's threads come and go
            msg = f"threads: {found[1]} before, {now[1]} after"
            raise Wrong(msg)
        if now[2] > found[2] + MIB:
            msg = f"memory: {found[2]:.0f} MiB before, {now[2]:.0f} after"
            raise Wrong(msg)
        expect(reaper.statistics().owned, 0)


def memory() -> float:
    """What this process has in memory, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def storm() -> int:
    """Start somebody who sends SIGCHLD, a thousand times a second. Returns its pid."""
    code = f"import os, time\nwhile os.getppid() == {os.getpid()}: os.kill({os.getpid()}, 17); time.sleep(0.001)"
    return os.posix_spawn(sys.executable, [sys.executable, "-ISc", code], os.environ)


def main() -> int:
    """Go into a namespace if that can be had, and soak."""
    recycles = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 14)  # pid_max was everybody's before
    unshare = shutil.which("unshare")
    if os.geteuid() == 0 and recycles and unshare and INSIDE not in os.environ:
        # PID 1 there is an init, for what the ended trees leave behind.
        python = [sys.executable, "-m"]
        command = [unshare, "--pid", "--fork", "--mount-proc", "--kill-child", *python, "anyreap", "init", "--"]
        command += [*python, "tests.soak"]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode
    if INSIDE in os.environ:
        Path("/proc/sys/kernel/pid_max").write_text(str(PIDS))
    seed = random.randrange(2**32)
    say = sys.stdout.write
    say(f"seed {seed}, {PIDS if INSIDE in os.environ else 'all'} pids\n")
    before = harness.look()._replace(threads=frozenset())
    sender = storm()
    try:
        for host in (harness.HOSTS[0], harness.HOSTS[2], harness.HOSTS[4]):
            done.clear()
            late.clear()
            anyio.run(soak, host.source, SECONDS / 3, seed, backend=host.backend, backend_options=host.options)
            late.sort()
            middle, high = late[len(late) // 2], late[len(late) * 99 // 100]
            say(f"{host}: {done.total()} works, {dict(done)}; from kill to waiter {middle:.0f} us, p99 {high:.0f} us\n")
    finally:
        os.kill(sender, signal.SIGKILL)
        os.waitpid(sender, 0)
    expect(harness.look()._replace(threads=frozenset(), fds=before.fds), before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
