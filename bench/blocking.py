"""The contenders that have no loop: plain Python that waits in the system call, and what scans or polls in one.

They do the same works with the same clocks, but nothing else can go on meanwhile: the price of less CPU.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from bench.contenders import CHUNK, spawn
from bench.works import CAT, HEAD, SETTLE, TRUE, Clocks, Gate, Victim, percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.works import Figures


class Bare:
    """`os.posix_spawn` and `os.waitpid`, and nothing else: as little as Python can do."""

    def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return spawn(argv, stdin, stdout)

    def watch(self, pid: int) -> Any:
        return pid

    def wait(self, child: Any) -> None:
        os.waitpid(child, 0)

    def wait_all(self, children: list[Any]) -> None:
        for child in children:
            self.wait(child)

    # The works --------------------------------------------------------------------------------------------------------

    def storm(self, *, n: int, limit: int) -> Figures:
        running: deque[Any] = deque()
        for count in (limit, n):
            clocks = Clocks()
            for _ in range(count):
                if len(running) == limit:
                    self.wait(running.popleft())
                running.append(self.start(TRUE))
            while running:
                self.wait(running.popleft())
        wall, cpu = clocks.stop()
        return {"CPU/exit": cpu / n * 1e6, "exits/s": n / wall}

    def burst(self, *, k: int) -> Figures:
        with Gate() as gate:
            children = [self.start(CAT, gate.read, gate.null) for _ in range(k)]
            time.sleep(SETTLE)
            clocks = Clocks()
            gate.open()
            self.wait_all(children)
            wall, cpu = clocks.stop()
        return {"CPU": cpu * 1e3, "wall": wall * 1e3}

    def one(self, *, k: int, exits: int, warm: int, floor: str, foreign: bool = False) -> Figures:
        victim = Victim(floor)
        late: list[float] = []
        cpu = 0.0
        with Gate() as gate:
            if foreign:
                os.waitid(os.P_PID, spawn(TRUE), os.WEXITED | os.WNOWAIT)
            others = [self.start(CAT, gate.read, gate.null) for _ in range(k - 1)]
            time.sleep(SETTLE)
            for number in range(-warm, exits):
                child = self.start(victim.argv, victim.stdin, victim.stdout)
                victim.ready()
                clocks = Clocks()
                victim.end()
                self.wait(child)
                _, spent = clocks.stop()
                microseconds = victim.since()
                if number >= 0:
                    late.append(microseconds)
                    cpu += spent
            gate.open()
            self.wait_all(others)
        return {"p50": percentile(late, 50), "p99": percentile(late, 99), "CPU/exit": cpu / exits * 1e6}

    def calls(self, *, k: int) -> Figures:
        with Gate() as gate:
            pids = [spawn(CAT, gate.read, gate.null) for _ in range(k)]
            clocks = Clocks()
            watched = [self.watch(pid) for pid in pids]
            _, watching = clocks.stop()
            gate.open()
            self.wait_all(watched)
        pids = [spawn(TRUE) for _ in range(k)]
        for pid in pids:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        clocks = Clocks()
        for pid in pids:
            self.wait(self.watch(pid))
        _, waiting = clocks.stop()
        return {"watch": watching / k * 1e6, "wait": waiting / k * 1e6}

    def read(self, *, size: int) -> Figures:
        for mebibytes in (1, size):
            clocks = Clocks()
            popen = subprocess.Popen([*HEAD, f"{mebibytes}M", "/dev/zero"], stdout=subprocess.PIPE, bufsize=0)
            assert popen.stdout is not None
            left = mebibytes << 20
            while left:
                left -= len(os.read(popen.stdout.fileno(), CHUNK))
            popen.wait()
            wall, cpu = clocks.stop()
        return {"MiB/s": size / wall, "CPU/MiB": cpu / size * 1e6}


class BarePopen(Bare):
    """`subprocess.Popen` and its `wait`."""

    def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return subprocess.Popen(argv, stdin=stdin, stdout=stdout)

    def wait(self, child: Any) -> None:
        child.wait()


class Scan(Bare):
    """A self-pipe, and at each signal a `waitpid` for every child: what is left where there are no pidfds."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._running: set[int] = set()

    def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        self._running.add(pid := spawn(argv, stdin, stdout))
        return pid

    def wait(self, child: Any) -> None:
        while child in self._running:
            select.select([self._read], [], [])
            os.read(self._read, CHUNK)
            self._running -= {pid for pid in self._running if os.waitpid(pid, os.WNOHANG)[0]}


class Psutil(Bare):
    """`psutil.wait_procs`, one child at a time where one ends, all of them where all end."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil

    def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return self.watch(spawn(argv, stdin, stdout))

    def watch(self, pid: int) -> Any:
        return self._psutil.Process(pid)

    def wait(self, child: Any) -> None:
        self._psutil.wait_procs([child])

    def wait_all(self, children: list[Any]) -> None:
        self._psutil.wait_procs(children)
