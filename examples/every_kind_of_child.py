"""One reaper nursery, and every kind of child under it.

    python examples/every_kind_of_child.py [trio | asyncio | uvloop]

The children are started by whatever starts children: `os.posix_spawn`, `os.fork`, `pty.fork`, `subprocess.Popen`,
`multiprocessing`. They exit, fail, dump core, are killed, ignore SIGTERM, and one has its status stolen by another
`waitpid`. Each end is printed as it happens.
"""

from __future__ import annotations

import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

import anyreap

if TYPE_CHECKING:
    import resource

BACKENDS = {
    "trio": ("trio", {}),
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
}


def sh(script: str, output: int = 1) -> int:
    """Start a shell without a word to Python's subprocess module."""
    return os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, output, 1)])


def forked() -> int:
    """Fork, and let the child use 64 MiB of memory."""
    pid = os.fork()
    if pid == 0:
        len(bytearray(b"x") * (64 << 20))
        os._exit(0)
    return pid


def on_a_terminal() -> int:
    """Fork a child on a pseudo-terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", "test -t 0 && exit 7"])  # only on a terminal it is 7
    while True:  # what it writes; EIO is how the end of it looks
        try:
            if not os.read(terminal, 1024):
                break
        except OSError:
            break
    os.close(terminal)
    return pid


def stolen() -> int:
    """Start a child that exits with code 9, and take its status away, as careless code does with waitpid(-1)."""
    pid = sh("exit 9")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def work() -> None:
    """What the multiprocessing child does: fail."""
    sys.exit(5)


def dumping_core(directory: str) -> int:
    """Start a child that aborts, where its core dump does no harm."""
    return sh(f"cd {directory} && ulimit -c unlimited; kill -ABRT $$")


async def show(what: str, child: anyreap.Child) -> None:
    """Await the end of one child, and print it."""
    try:
        status = await child.wait()
    except anyreap.StatusLost as exc:
        print(f"  {what:<32} {child.pid:>7}  lost: {exc.why}")
        return
    usage = status.usage
    cost = "(somebody else collected it)" if usage is None else spent(usage)
    print(f"  {what:<32} {child.pid:>7}  {status!s:<32} {cost}", flush=True)


def spent(usage: resource.struct_rusage) -> str:
    """What a child has used, in words."""
    mebibytes = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return f"{1000 * (usage.ru_utime + usage.ru_stime):6.1f} ms CPU, {mebibytes:5.1f} MiB at most"


def children_left() -> int:
    """Count the children of this process, zombies too, where the kernel lists them."""
    return sum(len(task.read_text().split()) for task in Path("/proc/self/task").glob("*/children"))


async def main() -> None:
    """Run all of them under one nursery."""
    with tempfile.TemporaryDirectory() as scratch:
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyreap.open_reaper(shutdown=anyreap.Shutdown(grace=0.5)) as reaper:
                    print(f"\n{reaper}")
                    print(f"  {'started by':<32} {'pid':>7}  {'how it ended':<32} what it used")
                    process = multiprocessing.get_context("fork").Process(target=work)
                    process.start()
                    popen = subprocess.Popen(["/bin/sh", "-c", "kill -KILL $$"])
                    victim = reaper.watch(stolen())
                    os.waitpid(victim.pid, 0)  # the thief
                    children = {
                        "os.posix_spawn": reaper.watch(sh("exit 0")),
                        "os.posix_spawn, 100,000 rounds": reaper.watch(
                            sh("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
                        ),
                        "os.posix_spawn, abort": reaper.watch(dumping_core(scratch)),
                        "os.posix_spawn, status stolen": victim,
                        "os.fork, 64 MiB": reaper.watch(forked()),
                        "pty.fork": reaper.watch(on_a_terminal()),
                        "subprocess.Popen, kill -KILL": reaper.watch(popen),
                        "multiprocessing.Process": reaper.watch(process),
                    }
                    for what, child in children.items():
                        tasks.start_soon(show, what, child)
                    # These two are owned: the nursery ends them. One goes on SIGTERM, the other takes SIGKILL.
                    tasks.start_soon(show, "adopted, ends on SIGTERM", reaper.adopt(sh("exec sleep 3600")))
                    ready, told = os.pipe()
                    stubborn = sh("trap '' TERM; echo; while :; do sleep 0.1; done", output=told)
                    tasks.start_soon(show, "adopted, ignores SIGTERM", reaper.adopt(stubborn))
                    os.close(told)
                    await anyio.wait_readable(ready)
                    os.close(ready)
                    for child in children.values():
                        if not child.lost:
                            await child.wait()
                    assert (popen.returncode, process.exitcode) == (-signal.SIGKILL, 5)
                    scope.cancel()  # leave: the owned ones are shut down, half a second of grace for all
    print(f"  {reaper.statistics()}")
    print(f"  {children_left()} children left")


if __name__ == "__main__":
    backend, options = BACKENDS[sys.argv[1] if len(sys.argv) > 1 else "trio"]
    anyio.run(main, backend=backend, backend_options=options)
