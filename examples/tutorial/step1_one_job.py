"""One job: run a command, and tell how it ended."""

import anyio

import anyreap


async def main() -> None:
    """Run it."""
    async with anyreap.open_reaper() as reaper:
        done = await reaper.run_process("echo hello; exit 3", check=False)
        print(done.stdout, done.status)


anyio.run(main)
