r"""Run commands, a few at a time; one that fails is tried again, later and later.

    printf '%s\n' 'make docs' 'make test' 'curl -fO https://example.org/' | python examples/job_queue.py --jobs 2

Exits with 1 if a command failed as often as it was tried. Ctrl-C ends what runs, with all that it has started.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import anyio

import anyreap

TREE = anyreap.Shutdown(grace=5, scope="group")  # a command line is a shell with children of its own


class Queue:
    """So many commands at a time, each so many times, with pauses of 1, 2, 4 ... times so many seconds."""

    def __init__(self, reaper: anyreap.Reaper, *, jobs: int, tries: int, pause: float) -> None:
        self.reaper = reaper
        self.slots = anyio.CapacityLimiter(jobs)
        self.tries = tries
        self.pause = pause
        self.failed: list[str] = []

    async def run(self, command: str) -> None:
        """Run one command to its success, or until it is given up. It holds no slot while it pauses."""
        for attempt in range(self.tries):
            if attempt:
                await anyio.sleep(self.pause * 2 ** (attempt - 1))
            async with self.slots:
                status = await self.run_once(command)
            print(f"{status}, try {attempt + 1} of {self.tries}: {command}", flush=True)
            if status.success:
                return
        self.failed.append(command)

    async def run_once(self, command: str) -> anyreap.ExitStatus:
        """Run a command once, with our output for its own."""
        done = await self.reaper.run_process(
            command, stdin=subprocess.DEVNULL, stdout=None, stderr=None, check=False, shutdown=TREE
        )
        return done.status


async def main(commands: list[str], jobs: int, tries: int, pause: float) -> int:
    """Run them all."""
    async with anyreap.open_reaper() as reaper:
        queue = Queue(reaper, jobs=jobs, tries=tries, pause=pause)
        async with anyio.create_task_group() as tasks:
            for command in commands:
                tasks.start_soon(queue.run, command)
    for command in queue.failed:
        print(f"given up: {command}")
    return 1 if queue.failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--pause", type=float, default=1.0)
    args = parser.parse_args()
    lines = [line.strip() for line in sys.stdin if line.strip()]
    sys.exit(anyio.run(main, lines, args.jobs, args.tries, args.pause))
