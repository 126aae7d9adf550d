"""Run the jobs of a pipeline, each within limits of time, CPU and memory, and leave none of their processes behind.

    python examples/ci_runner.py pipeline.toml

    [[job]]
    name = "test"
    run = "make test"
    seconds = 600       # of the clock; the others are limits of each of its processes
    cpu_seconds = 300
    mebibytes = 2048

The output of a job goes to NAME.log. A server that a job has left in the background ends with it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import anyio

import anyreap

# The shell sets the limits on itself (RLIMIT_AS in KiB, RLIMIT_CPU in seconds), and becomes the job.
LIMITED = 'ulimit -v "$1" && ulimit -t "$2" && exec /bin/sh -ec "$3"'


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run, and its limits."""

    name: str
    run: str
    seconds: float = 600
    cpu_seconds: int = 600
    mebibytes: int = 4096

    @property
    def command(self) -> list[str]:
        """The command with its limits."""
        return ["/bin/sh", "-c", LIMITED, self.name, str(self.mebibytes * 1024), str(self.cpu_seconds), self.run]


async def run(reaper: anyreap.Reaper, job: Job) -> bool:
    """Run one job, and print how it ended and what it used. True if it succeeded."""
    with open(f"{job.name}.log", "wb") as log, anyio.move_on_after(job.seconds) as limit:
        # Left in whatever way, the process is ended with its group: by SIGTERM, and SIGKILL two seconds later.
        async with await reaper.open_process(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            shutdown=anyreap.Shutdown(grace=2, scope="group"),
        ) as process:
            await process.wait()
    status = process.status
    assert status is not None
    how = f"took longer than {job.seconds:g} s" if limit.cancelled_caught else str(status)
    if status.usage is not None:
        cpu, peak = status.usage.ru_utime + status.usage.ru_stime, status.usage.ru_maxrss / 1024
        how += f" ({cpu:.2f} s CPU, {peak:.0f} MiB)"
    print(f"{job.name}: {how}", flush=True)
    return status.success and not limit.cancelled_caught


async def main(pipeline: Path) -> int:
    """Run one job after the other, up to the first that fails."""
    async with anyreap.open_reaper() as reaper:
        for table in tomllib.loads(pipeline.read_text())["job"]:
            if not await run(reaper, Job(**table)):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(anyio.run(main, Path(sys.argv[1])))
