"""The works: what is done, and between which two lines the clocks run.

Each is written once, for every contender that waits in tasks. A work returns its figures by name, in the units of
`cases.UNITS`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.contenders import spawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.contenders import Contender

    Figures = dict[str, float]

TRUE = ["/bin/true"]
CAT = ["/bin/cat"]
HEAD = ["/usr/bin/head", "-c"]
SETTLE = 0.3  # seconds for started children to come to rest, before the clocks run
TICK = 0.005


class Clocks:
    """Real time, and the CPU time of this process, of all its threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        """Seconds since it was made: real, CPU."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


class Gate:
    """Children that read from one pipe, and end when it is closed."""

    def __init__(self) -> None:
        self.read, self._write = os.pipe()
        self.null = os.open(os.devnull, os.O_WRONLY)

    def open(self) -> None:
        os.close(self._write)
        self._write = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in (self.read, self._write, self.null):
            if fd >= 0:
                os.close(fd)


class Victim:
    """The pipes to a child that ends at a byte, and says when: the time is the last thing that it writes.

    Without a C compiler a shell takes its place, which can't tell the time, and the moment of the byte has to do.
    """

    def __init__(self, floor: str) -> None:
        self.stdin, self._go = os.pipe()
        self._said, self.stdout = os.pipe()
        self._tells = bool(floor)
        self.argv = [floor, "victim"] if floor else ["/bin/sh", "-c", "printf x; read x"]

    def ready(self) -> None:
        """Wait until it is there."""
        os.read(self._said, 1)

    def end(self) -> None:
        """Let it end."""
        self._at = time.monotonic_ns()
        os.write(self._go, b"\n")

    def since(self) -> float:
        """Microseconds since it ended."""
        now = time.monotonic_ns()
        return (now - (int.from_bytes(os.read(self._said, 8), sys.byteorder) if self._tells else self._at)) / 1000


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) * percent // 100, len(values) - 1)]


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def status(name: str) -> int:
    """A number of `/proc/self/status`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


# ---------------------------------------------------------------------------------------------------------------------


async def storm(contender: Contender, *, n: int, limit: int) -> Figures:
    """Start a child that ends at once, wait for it; so many, `limit` at a time."""

    async def some(count: int) -> None:
        left = iter(range(count))

        async def worker() -> None:
            for _ in left:
                await contender.wait(await contender.start(TRUE))

        await contender.all([worker] * limit)

    await some(limit)
    clocks = Clocks()
    await some(n)
    wall, cpu = clocks.stop()
    return {"CPU/exit": cpu / n * 1e6, "exits/s": n / wall}


async def burst(contender: Contender, *, k: int) -> Figures:
    """`k` children end at once; until the last of the tasks that wait for them has gone on."""
    with Gate() as warm, Gate() as gate:
        await _burst(contender, warm, 32)
        (wall, cpu), gap = await _burst(contender, gate, k)
    return {"CPU": cpu * 1e3, "wall": wall * 1e3, "gap": gap * 1e3}


async def _burst(contender: Contender, gate: Gate, k: int) -> tuple[tuple[float, float], float]:
    children = [await contender.start(CAT, gate.read, gate.null) for _ in range(k)]
    left, gap = k, 0.0
    clocks = Clocks()
    stopped = (0.0, 0.0)

    async def wait(child: Any) -> None:
        nonlocal left, stopped
        await contender.wait(child)
        left -= 1
        if not left:
            stopped = clocks.stop()

    async def release() -> None:
        nonlocal clocks, gap
        await contender.sleep(SETTLE)
        clocks = Clocks()
        gate.open()
        # The ticker: by how much the loop is late for a task that has nothing to do with children.
        while left:
            before = time.perf_counter()
            await contender.sleep(TICK)
            gap = max(gap, time.perf_counter() - before - TICK)

    await contender.all([partial(wait, child) for child in children] + [release])
    return stopped, gap


async def one(contender: Contender, *, k: int, exits: int, warm: int, floor: str, foreign: bool = False) -> Figures:
    """One of `k` watched children ends, again and again; the others idle, each with a task that waits.

    The first `warm` exits are not counted. `foreign`: this process's first child is a zombie that is somebody else's.
    """
    victim = Victim(floor)
    late: list[float] = []
    cpu = 0.0
    with Gate() as gate:
        if foreign:
            os.waitid(os.P_PID, spawn(TRUE), os.WEXITED | os.WNOWAIT)
        others = [await contender.start(CAT, gate.read, gate.null) for _ in range(k - 1)]

        async def measure() -> None:
            nonlocal cpu
            await contender.sleep(SETTLE)
            for number in range(-warm, exits):
                child = await contender.start(victim.argv, victim.stdin, victim.stdout)
                victim.ready()
                clocks = Clocks()
                victim.end()
                await contender.wait(child)
                _, spent = clocks.stop()
                microseconds = victim.since()
                if number >= 0:
                    late.append(microseconds)
                    cpu += spent
            gate.open()

        await contender.all([partial(contender.wait, child) for child in others] + [measure])
    return {"p50": percentile(late, 50), "p99": percentile(late, 99), "CPU/exit": cpu / exits * 1e6}


async def idle(contender: Contender, *, k: int, seconds: float) -> Figures:
    """`k` children that do nothing, each with a task that waits: what each costs, and the CPU of doing nothing."""
    figures: Figures = {}
    with Gate() as warm, Gate() as gate:
        await _idle(contender, warm, 64, 0.0, {})
        await _idle(contender, gate, k, seconds, figures)
    return figures


async def _idle(contender: Contender, gate: Gate, k: int, seconds: float, figures: Figures) -> None:
    def look() -> tuple[int, int, int]:
        gc.collect()
        return status("VmRSS"), fds(), status("Threads")

    before = look()
    children = [await contender.start(CAT, gate.read, gate.null) for _ in range(k)]

    async def measure() -> None:
        await contender.sleep(SETTLE)
        after = look()
        figures.update(
            (name, (now - then) / k)
            for name, then, now in zip(("KiB/child", "fds/child", "threads/child"), before, after, strict=True)
        )
        clocks = Clocks()
        await contender.sleep(seconds)
        wall, cpu = clocks.stop()
        figures["idle CPU"] = cpu / wall * 1e3
        gate.open()

    await contender.all([partial(contender.wait, child) for child in children] + [measure])


async def calls(contender: Contender, *, k: int) -> Figures:
    """The calls themselves, on pids: to watch one that runs, and to wait for one that has ended before the call."""
    with Gate() as gate:
        pids = [spawn(CAT, gate.read, gate.null) for _ in range(k)]
        clocks = Clocks()
        watched = [contender.watch(pid) for pid in pids]
        _, watching = clocks.stop()
        gate.open()
        for child in watched:
            await contender.wait(child)
    pids = [spawn(TRUE) for _ in range(k)]
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    clocks = Clocks()
    for pid in pids:
        await contender.wait(contender.watch(pid))
    _, waiting = clocks.stop()
    return {"watch": watching / k * 1e6, "wait": waiting / k * 1e6}


async def signals(contender: Contender, *, k: int, rate: int, seconds: float) -> Figures:
    """SIGCHLD, `rate` times a second, while nobody has died."""
    with Gate() as gate:
        children = [await contender.start(CAT, gate.read, gate.null) for _ in range(k)]
        figures: Figures = {}

        async def measure() -> None:
            await contender.sleep(SETTLE)
            code = SENDER.format(pid=os.getpid(), signum=int(signal.SIGCHLD), n=int(rate * seconds), every=1 / rate)
            sender = spawn([sys.executable, "-I", "-S", "-c", code])
            gap = 0.0
            await contender.sleep(SETTLE)
            clocks = Clocks()
            while clocks.stop()[0] < seconds:
                before = time.perf_counter()
                await contender.sleep(TICK)
                gap = max(gap, time.perf_counter() - before - TICK)
            wall, cpu = clocks.stop()
            figures.update({"CPU": cpu / wall * 1e3, "gap": gap * 1e3})
            with contextlib.suppress(ChildProcessError):  # gevent collects every child, whosever it is
                while os.waitpid(sender, os.WNOHANG)[0] == 0:
                    await contender.sleep(TICK)
            gate.open()

        await contender.all([partial(contender.wait, child) for child in children] + [measure])
    return figures


# It starts before the clocks do, and goes on a little longer than they run.
SENDER = """
import os, time
at = time.monotonic()
for _ in range({n} + int(0.6 / {every})):
    os.kill({pid}, {signum})
    at += {every}
    time.sleep(max(0, at - time.monotonic()))
"""


async def read(contender: Contender, *, size: int) -> Figures:
    """A child writes so many MiB; until all has been read, and the child has ended."""
    await contender.read([*HEAD, "1M", "/dev/zero"])
    clocks = Clocks()
    assert await contender.read([*HEAD, f"{size}M", "/dev/zero"]) == size << 20
    wall, cpu = clocks.stop()
    return {"MiB/s": size / wall, "CPU/MiB": cpu / size * 1e6}


def import_(module: str) -> Figures:
    """Import a module in a new Python; and whether trio is there after a run on asyncio."""
    code = IMPORT.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    wall, cpu, trio = done.stdout.split()
    return {"wall": float(wall) * 1e3, "CPU": float(cpu) * 1e3, "trio": float(trio)}


IMPORT = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
import anyio, os
async def main():
    if "{module}" == "anyreap":
        async with {module}.open_reaper() as reaper:
            await reaper.wait(os.posix_spawn("/bin/true", ["true"], os.environ))
print(wall, cpu, int("trio" in sys.modules or bool(anyio.run(main)) or "trio" in sys.modules))
"""


def perform(work: Callable[..., Any], contender: Contender, parameters: dict[str, Any]) -> Figures:
    """Run a work on the contender's loop."""
    figures: Figures = contender.run(lambda self: work(self, **parameters))
    return figures
