"""The init of a container: run one program, hand on its signals, collect every orphan.

    ENTRYPOINT ["python", "container_init.py"]
    CMD ["my-server", "--port", "8080"]

PID 1 is given the orphans of all others as its children, and most programs never collect them. This one does, and ends
with the exit code of the program, as a shell would show it. It works anywhere else too: as a subreaper.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import anyio

import anyreap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def hand_on(signals: AsyncIterator[signal.Signals], child: anyreap.Process) -> None:
    """Send the program what is sent here."""
    async for signum in signals:
        child.send_signal(signum)


async def main(command: list[str]) -> int:
    """Run the program to its end, and end what it leaves behind."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as signals:
        async with anyreap.open_reaper(subreaper=True) as reaper, anyio.create_task_group() as tasks:
            child = await reaper.open_process(command, stdin=None, stdout=None, stderr=None)
            tasks.start_soon(hand_on, signals, child)
            await child.wait()
            tasks.cancel_scope.cancel()
    assert child.status is not None
    return child.status.shell_code


if __name__ == "__main__":
    sys.exit(anyio.run(main, sys.argv[1:]))
