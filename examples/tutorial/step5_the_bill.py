"""What each job has cost, and a line for every child that ends, whoever started it."""

import subprocess

import anyio

import anyreap

POLICY = anyreap.Shutdown(grace=0.5, scope="group")
JOBS = ["seq 50000 | sort -R | sort | tail -1", "head -c 50M /dev/zero | tail -c 1 | od -An"]


async def main() -> None:
    """Run them, and print the bill."""

    async def log() -> None:
        async with exits:
            async for status in exits:
                print(f"  {status.pid} {status}")

    async def run(job: str) -> None:
        done = await reaper.run_process(job, stdout=None, check=False)
        usage = done.status.usage
        if usage is not None:  # it is None for a status that was taken by somebody else
            cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss
            print(f"{cpu:.2f} s CPU, the biggest process had {peak / 1024:.0f} MiB: {job}")

    async with anyio.create_task_group() as logging, anyreap.open_reaper(shutdown=POLICY) as reaper:
        exits = reaper.exits()
        logging.start_soon(log)
        reaper.adopt(subprocess.Popen(["/bin/sh", "-c", "exit 7"], process_group=0))
        async with anyio.create_task_group() as tasks:
            for job in JOBS:
                tasks.start_soon(run, job)
        print(reaper.statistics())


anyio.run(main)
