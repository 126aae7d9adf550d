"""A web server on trio (Hypercorn) that streams what a program writes, for as long as somebody listens.

    pip install 'hypercorn[trio]'
    python examples/hypercorn_streams.py [PORT]
    curl --no-buffer http://127.0.0.1:8000/

Each request starts the program anew. When the browser goes away, or the server is stopped, it is ended, with all that
it has started.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

import anyreap

COMMAND = ["sh", "-c", "while date; do sleep 1; done"]


class Streams:
    """An ASGI application."""

    def __init__(self, reaper: anyreap.Reaper) -> None:
        self.reaper = reaper

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request, or the two questions of the server's life."""
        while scope["type"] == "lifespan":
            message = await receive()
            await send({"type": message["type"] + ".complete"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.until_gone, receive, nursery.cancel_scope)
            await self.stream(send)
            nursery.cancel_scope.cancel()

    async def until_gone(self, receive: Any, scope: trio.CancelScope) -> None:
        """Cancel the answer when nobody is there to read it."""
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def stream(self, send: Any) -> None:
        """Send what the program writes, while it writes it."""
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        async with await self.reaper.open_process(COMMAND, stdin=subprocess.DEVNULL, stderr=None) as process:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            assert process.stdout is not None
            async for piece in process.stdout:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def main(port: int) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.graceful_timeout = 1
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyreap.open_reaper(shutdown=anyreap.Shutdown(grace=1, scope="group")) as reaper:
            await serve(Streams(reaper), config, shutdown_trigger=signals.__anext__, mode="asgi")


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
