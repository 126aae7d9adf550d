"""The same by policy, and for all that a job has started."""

import anyio

import anyreap

POLICY = anyreap.Shutdown(grace=0.5, scope="group")
JOBS = [
    "echo quick",
    "trap 'echo tidying up; exit 9' TERM; sleep 3600 & wait",
    "sleep 3600 & sleep 3600 & exec sleep 3600",
]


async def main() -> None:
    """Run them, half a second each."""

    async def run(job: str) -> None:
        with anyio.move_on_after(0.5) as limit:
            async with await reaper.open_process(job, stdout=None, stderr=None) as process:
                await process.wait()
        print(f"{process.status}{' (too slow)' if limit.cancelled_caught else ''}: {job}")

    async with anyreap.open_reaper(shutdown=POLICY) as reaper, anyio.create_task_group() as tasks:
        for job in JOBS:
            tasks.start_soon(run, job)


anyio.run(main)
