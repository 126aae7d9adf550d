"""Many jobs, two at a time, and one that fails disturbs no other."""

import anyio

import anyreap

JOBS = ["sleep 0.2; echo one", "echo two; exit 3", "kill -KILL $$", "echo four"]


async def main() -> None:
    """Run them all."""
    slots = anyio.CapacityLimiter(2)

    async def run(job: str) -> None:
        async with slots:
            done = await reaper.run_process(job, check=False)
        print(f"{done.status}: {job}")

    async with anyreap.open_reaper() as reaper, anyio.create_task_group() as tasks:
        for job in JOBS:
            tasks.start_soon(run, job)


anyio.run(main)
