"""A server with several workers on one listening socket; one that dies is replaced.

    python examples/prefork_server.py [--port 8000] [--workers 4]

The parent listens, starts the workers and waits for them; which of them answers is the kernel's choice. Ctrl-C or
SIGTERM ends all of them, and nothing is left, also where a worker hangs.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys

import anyio

import anyreap

PAUSE = 1.0  # seconds from one start of a worker to the next: one that dies at once is not started in a rush


def work(listener: socket.socket) -> None:
    """Answer one connection after the other. This is where your application goes."""
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nworker %d\n" % os.getpid())


async def keep_one(reaper: anyreap.Reaper, fd: int) -> None:
    """Start a worker, and another one each time that it ends."""
    while True:
        next_start = anyio.current_time() + PAUSE
        worker = await reaper.open_process(
            [sys.executable, __file__, "--worker", str(fd)],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=None,
            stderr=None,
            process_group=0,  # a Ctrl-C of the terminal goes to the parent alone, who ends them one way for all
        )
        await worker.wait()
        print(f"worker {worker.pid} {worker.status}", flush=True)
        await anyio.sleep_until(next_start)


async def stop_on_signal(scope: anyio.CancelScope) -> None:
    """Cancel everything at the first SIGTERM or SIGINT."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def main(port: int, workers: int) -> None:
    """Listen, and keep so many workers."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_on_signal, tasks.cancel_scope)
            async with anyreap.open_reaper() as reaper, anyio.create_task_group() as keepers:
                for _ in range(workers):
                    keepers.start_soon(keep_one, reaper, listener.fileno())
                print(f"listening on port {listener.getsockname()[1]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--worker", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(socket.socket(fileno=args.worker))
    else:
        anyio.run(main, args.port, args.workers)
