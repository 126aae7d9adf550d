"""A time limit for each job; one that runs into it may tidy up first."""

import anyio

import anyreap

POLITE = "trap 'echo tidying up; exit 9' TERM; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; while :; do sleep 0.05; done"


async def main() -> None:
    """Run them, half a second each, and half a second more to tidy up."""

    async def run(job: str) -> None:
        process = await reaper.open_process(job, stdout=None, stderr=None)
        with anyio.move_on_after(0.5) as limit:
            await process.wait()
        if limit.cancelled_caught:
            process.terminate()
            with anyio.move_on_after(0.5):
                await process.wait()
            process.kill()  # nothing is sent if it has ended
        await process.wait()
        print(f"{process.status}{' (too slow)' if limit.cancelled_caught else ''}: {job}")

    async with anyreap.open_reaper() as reaper, anyio.create_task_group() as tasks:
        for job in ("echo quick", POLITE, DEAF):
            tasks.start_soon(run, job)


anyio.run(main)
