"""Notice when a worker of a `multiprocessing.Pool` dies.

    python examples/pool_watcher.py

A pool replaces a worker that was killed (out of memory, a crash in C code), but the task that it had is lost, and
`Pool.map` waits for ever. Here the workers are watched meanwhile, and their death is an error that says how they died.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

import anyreap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.pool import Pool
    from multiprocessing.process import BaseProcess


class WorkerDied(Exception):
    """A worker has died, and its task with it."""


async def watch(reaper: anyreap.Reaper, worker: BaseProcess) -> None:
    """Fail when a worker ends."""
    status = await reaper.wait(worker, reap=False)  # the pool collects it
    raise WorkerDied(f"{worker.name}, pid {worker.pid}, {status}")


async def map_in_pool(reaper: anyreap.Reaper, pool: Pool, function: Callable[[Any], Any], items: Iterable[Any]) -> Any:
    """`Pool.map`, which does not block the loop, and fails if a worker dies before it is done."""
    async with anyio.create_task_group() as tasks:
        for worker in multiprocessing.active_children():
            tasks.start_soon(watch, reaper, worker)
        results = pool.map_async(function, items)
        while not results.ready():
            await anyio.to_thread.run_sync(results.wait, 0.1)  # not for ever: a thread can't be cancelled
        tasks.cancel_scope.cancel()
    return results.get()


def square(number: int) -> int:
    """The work: nobody knows why, but 13 is more than a worker can bear."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


async def main() -> None:
    """Do some work, and then too much of it."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        async with anyreap.open_reaper() as reaper:
            print(await map_in_pool(reaper, pool, square, range(10)))
            try:
                print(await map_in_pool(reaper, pool, square, range(20)))
            except* WorkerDied as group:
                for died in group.exceptions:
                    print(died)


if __name__ == "__main__":
    anyio.run(main)
