"""The job runner for those who outgrow one machine: Dask hands out the commands, each worker has a reaper.

    pip install distributed
    python examples/dask_jobs.py 'make test' 'make docs'       # workers are three processes on this machine
    python examples/dask_jobs.py --scheduler tcp://10.0.0.1:8786 'make test' 'make docs'

What comes back is the `ExitStatus` of each, with what it used. When a worker is killed, its commands are too, and are
begun anew on another one.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from typing import Any

from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

import anyreap

# A worker that is killed can't end its commands. The kernel does, if they ask for it (Linux, `man 2 prctl`); what they
# have started in turn it leaves alone.
UNTIL_WE_DIE = ["setpriv", "--pdeathsig", "KILL", "--"]


class WithReaper(WorkerPlugin):
    """Opens a reaper in a worker's loop, and closes it with the worker."""

    async def setup(self, worker: Worker) -> None:
        """Open it. A block is left by the task that entered it, so it has one of its own."""
        opened = asyncio.Event()
        self.task = asyncio.create_task(self.hold(worker, opened))
        await opened.wait()

    async def hold(self, worker: Worker, opened: asyncio.Event) -> None:
        """Keep it open."""
        async with anyreap.open_reaper(shutdown=anyreap.Shutdown(scope="group")) as reaper:
            worker.reaper = reaper
            opened.set()
            await asyncio.Event().wait()

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        """Close it: what still runs is shut down."""
        self.task.cancel()
        await asyncio.wait([self.task])


async def run(command: str) -> tuple[anyreap.ExitStatus, str]:
    """In a worker: run a command. Its status, and what it wrote."""
    done = await get_worker().reaper.run_process(
        [*UNTIL_WE_DIE, "sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.status, done.stdout.decode(errors="replace")


def main(commands: list[str], scheduler: str | None) -> int:
    """Run all commands, and print what comes back in the order in which they end."""
    failed = 0
    cluster: Any = scheduler or LocalCluster(n_workers=3, threads_per_worker=2, dashboard_address=None)
    with Client(cluster) as client:
        client.register_plugin(WithReaper())
        jobs = {client.submit(run, command, pure=False): command for command in commands}
        for job, (status, output) in as_completed(jobs, with_results=True):
            failed += not status.success
            print(f"{status}, {status.usage.ru_maxrss} KiB: {jobs[job]}\n{output}", end="", flush=True)
    if not scheduler:
        cluster.close()
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--scheduler")
    parser.add_argument("commands", nargs="+")
    args = parser.parse_args()
    sys.exit(main(args.commands, args.scheduler))
