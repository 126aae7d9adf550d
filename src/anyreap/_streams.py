"""The pipes to a started child, as byte streams of anyio: a few lines on `wait_readable` and `wait_writable`."""

from __future__ import annotations

import contextlib
import os
from typing import Final

import anyio
import anyio.abc
import anyio.lowlevel

_CHUNK: Final = 65536  # what a pipe holds (man 7 pipe), and what anyio's other streams give at once


class _Pipe:
    """Our end of a pipe: a non-blocking descriptor that is closed once, and whose waiters are woken then."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._pid = os.getpid()
        self._busy = False

    def close(self) -> None:
        """Close it now. Tasks that wait on it get `anyio.ClosedResourceError`."""
        # The number is forgotten before it is closed: it may be another file's at once.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # In a forked child the loop's epoll is the parent's too: what is taken out of it there, no task of the
            # parent's would ever hear of again.
            if os.getpid() == self._pid:
                with contextlib.suppress(RuntimeError):  # no loop runs any more: then nobody waits either
                    anyio.notify_closing(fd)
            os.close(fd)

    async def aclose(self) -> None:
        """Close it. A checkpoint, after which it is closed also if it was cancelled."""
        self.close()
        await anyio.lowlevel.checkpoint()

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            msg = (
                f"this stream belongs to process {self._pid}, and this is a forked child of it, {os.getpid()}: close it"
                " here, and leave the reading and writing to the parent"
            )
            raise RuntimeError(msg)

    def _begin(self, action: str) -> None:
        if self._fd < 0:
            raise anyio.ClosedResourceError
        if self._busy:
            raise anyio.BusyResourceError(action)
        self._busy = True


class PipeReceiveStream(_Pipe, anyio.abc.ByteReceiveStream):
    """What the child writes."""

    async def receive(self, max_bytes: int = _CHUNK) -> bytes:
        """Receive what there is, at most so many bytes. See `anyio.abc.ByteReceiveStream.receive`."""
        if max_bytes < 1:
            msg = "max_bytes must be a positive integer"
            raise ValueError(msg)
        self._check_process()
        # The checkpoint comes first, and nothing is awaited once there is data: no cancellation can take it away.
        await anyio.lowlevel.checkpoint()
        self._begin("reading from")
        try:
            while True:
                try:
                    data = os.read(self._fd, max_bytes)
                except BlockingIOError:
                    await anyio.wait_readable(self._fd)
                    if self._fd < 0:
                        raise anyio.ClosedResourceError from None
                else:
                    break
        finally:
            self._busy = False
        if not data:
            raise anyio.EndOfStream
        return data


class PipeSendStream(_Pipe, anyio.abc.ByteSendStream):
    """What the child reads."""

    async def send(self, item: bytes) -> None:
        """Send all of it. See `anyio.abc.ByteSendStream.send`. If it is cancelled, a part may have been sent."""
        self._check_process()
        await anyio.lowlevel.checkpoint()
        self._begin("writing to")
        try:
            with memoryview(item) as whole:
                sent = 0
                while True:
                    try:
                        sent += os.write(self._fd, whole[sent : sent + _CHUNK])
                    except BlockingIOError:
                        await anyio.wait_writable(self._fd)
                        if self._fd < 0:
                            raise anyio.ClosedResourceError from None
                    except BrokenPipeError as exc:
                        raise anyio.BrokenResourceError from exc
                    if sent >= len(whole):
                        break
        finally:
            self._busy = False
