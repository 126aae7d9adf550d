"""Record what a program shows on a terminal, with the time of each piece, as asciinema does.

    python examples/pty_recorder.py session.cast top

The program runs on a pseudo-terminal of its own, which is told the keys that are pressed here. The exit code is the
one that a shell would show.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pty
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING, TextIO

import anyio

import anyreap

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def raw_terminal() -> Iterator[bool]:
    """Hand each key on as it is pressed, if there is a terminal here."""
    if not os.isatty(0):
        yield False
        return
    found = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield True
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, found)


async def record(terminal: int, cast: TextIO) -> None:
    """Show what the program writes, and note it, up to the end."""
    began, decoder = time.monotonic(), codecs.getincrementaldecoder("utf-8")("replace")
    with contextlib.suppress(OSError):  # EIO: how the end of a terminal looks on Linux
        while True:
            await anyio.wait_readable(terminal)
            if not (data := os.read(terminal, 65536)):
                return
            os.write(1, data)
            cast.write(json.dumps([round(time.monotonic() - began, 6), "o", decoder.decode(data)]) + "\n")


async def hand_on_keys(terminal: int) -> None:
    """Hand on what is typed."""
    while True:
        await anyio.wait_readable(0)
        os.write(terminal, os.read(0, 65536))


async def main(path: str, command: list[str]) -> int:
    """Run the program, and wait for it."""
    columns, rows = os.get_terminal_size(0) if os.isatty(0) else (80, 24)
    with open(path, "w") as cast, raw_terminal() as typed:
        cast.write(json.dumps({"version": 2, "width": columns, "height": rows, "command": " ".join(command)}) + "\n")
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (rows, columns))
        async with anyreap.open_reaper() as reaper:
            child = await reaper.open_process(
                ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(theirs), *command],  # who opens it controls it
                stdin=theirs,
                start_new_session=True,
                shutdown=anyreap.Shutdown(scope="group"),
            )
            os.close(theirs)
            async with anyio.create_task_group() as tasks:
                if typed:
                    tasks.start_soon(hand_on_keys, ours)
                await record(ours, cast)
                tasks.cancel_scope.cancel()
            os.close(ours)
    assert child.status is not None
    return child.status.shell_code


if __name__ == "__main__":
    sys.exit(anyio.run(main, sys.argv[1], sys.argv[2:]))
