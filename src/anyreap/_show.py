"""What `anyreap run` shows: the lines of the commands, the tables, and the one task that writes them.

What comes from the commands goes to standard output, what is said about them to standard error. A line is written
whole, or not before it is whole. And who writes never blocks: while nobody reads what we write, the commands block, as
they would on a pipe of their own, and signals, timeouts and exits are still seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
import select
import sys
import termios
import time
import unicodedata
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import anyio

if TYPE_CHECKING:
    import resource
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from rich.table import Table
    from rich.text import Text

    import anyreap

# A longer line is written in pieces, in bytes: so much of a line without an end is kept for each command.
LINE: Final = 65536

# What is kept while nobody reads our output, in bytes. The commands wait from there on.
_PENDING: Final = 1 << 18

# How often the table is drawn, in seconds: for its clock, and at most, when commands write all the time.
_TICK: Final = 0.25
_COALESCE: Final = 0.03


# Text -----------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return a text on one line, without what would move a cursor: what is in an argument may be anything."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split())) or "?"


def _cells(text: str) -> int:
    """Count the columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def fit(text: str, width: int) -> str:
    """Cut a text to a width in columns."""
    if _cells(text) <= width:
        return text
    while _cells(text) >= width:
        text = text[:-1]
    return text + "…"


def pad(texts: Iterable[str]) -> list[str]:
    """Make all as wide as the widest."""
    texts = list(texts)
    width = max(map(_cells, texts))
    return [text + " " * (width - _cells(text)) for text in texts]


def duration(seconds: float, *, runs: bool = False) -> str:
    """Return a time in words. One that runs shows no milliseconds."""
    if seconds < 0.9995 and not runs:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 999.5:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# On a terminal a command's colours stay, and nothing else that could move the cursor, clear the screen or set the
# title: the table is there.
_ESCAPES: Final = re.compile(
    r"(\x1b\[[\d;:]*m)"
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    r"|\x1b[]PX^_][^\x1b\x07\n]*(?:\x1b\\|\x07)?"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def _tame(data: bytes) -> str:
    return _ESCAPES.sub(r"\1", data.decode(errors="replace")).replace("\n", "\x1b[0m\n")


def _overwritten(line: bytes) -> bytes:
    """Return what is to be seen of a line after its carriage returns."""
    line = line.rstrip(b"\r")
    return line[line.rfind(b"\r") + 1 :]


class Lines:
    """Cuts what a command writes into lines, and puts its name before each.

    What a terminal would have overwritten by the end of a line (carriage returns: progress bars) is left out. A line of
    more than `LINE` bytes is given away in pieces, each a line of its own; all but the first have another prefix.

    Args:
        prefix: What is put before a line.
        more: What is put before the further pieces of one.
    """

    def __init__(self, prefix: str, more: str) -> None:
        self._prefixes = prefix.encode(), more.encode()
        self._prefix = self._prefixes[0]
        self._rest = b""

    @property
    def partial(self) -> bytes:
        """The line that is being written."""
        return _overwritten(self._rest)

    def feed(self, data: bytes) -> bytes:
        """Take what was written; return the lines that are whole."""
        *whole, rest = (self._rest + data).split(b"\n")
        done: list[bytes] = []
        for line in whole:
            last = self._shortened(_overwritten(line), done)
            done += (self._prefix, last, b"\n")
            self._prefix = self._prefixes[0]
        # Where it ends in a carriage return, what comes next decides: a newline, or the text that is written over it.
        over = b"\r" if rest.endswith(b"\r") else b""
        self._rest = self._shortened(_overwritten(rest), done) + over
        return b"".join(done)

    def end(self) -> bytes:
        """Return what is left when nothing more will come, with the end that it never got."""
        return self.feed(b"\n") if self._rest else b""

    def _shortened(self, line: bytes, done: list[bytes]) -> bytes:
        while len(line) > LINE:
            at = LINE
            while at > LINE - 4 and line[at] & 0xC0 == 0x80:  # not within a character of UTF-8
                at -= 1
            done += (self._prefix, line[:at], b"\n")
            line, self._prefix = line[at:], self._prefixes[1]
        return line


# A command, and what is told of it ------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, slots=True)
class Command:
    """One command: what it is, what has become of it, and how that is put into words."""

    what: str | list[str]
    text: str
    name: str
    style: str
    lines: Lines
    process: anyreap.Process | None = None
    error: OSError | None = None  # why it could not be started
    started: float = math.nan  # on time.monotonic
    ended: float = math.nan
    start_time: float = math.nan  # the same in Unix time
    floor: int = 0  # see peak
    stopped: str = ""  # why it was ended, if we ended it
    over: bool = False  # its pipe is read for what is in it, and no longer

    @property
    def status(self) -> anyreap.ExitStatus | None:
        """How its process ended; None as long as it runs, and where that is not known."""
        return None if self.process is None else self.process.status

    @property
    def state(self) -> str:
        """One of waiting, running, ok, failed, stopped."""
        if math.isnan(self.started):
            return "waiting"
        if math.isnan(self.ended):
            return "running"
        if self.stopped:
            return "failed" if self.stopped == "timed out" else "stopped"
        return "failed" if self.code else "ok"

    @property
    def code(self) -> int:
        """How it ended, as a shell has it."""
        if self.error is not None:
            return 127 if isinstance(self.error, FileNotFoundError) else 126
        return 1 if self.status is None else self.status.shell_code

    @property
    def end(self) -> str:
        """How it ended, in words."""
        if self.error is not None:
            return f"not started: {self.error.strerror}"
        if self.status is not None:
            return str(self.status)
        return "status lost" if self.process is not None and self.process.lost else "still running"

    @property
    def how(self) -> str:
        """How it ended, or what it does, for the tables."""
        if self.state == "waiting":
            return "not started" if self.stopped else "starting"
        text = {"running": "ending" if self.stopped else "running", "ok": "ok"}.get(self.state, self.end)
        return f"{self.stopped}: {text}" if self.stopped else text

    @property
    def wall(self) -> float:
        """Seconds from its start to its end, or until now."""
        return (time.monotonic() if math.isnan(self.ended) else self.ended) - self.started

    def cells(self) -> tuple[str, str, str, str, str]:
        """What the tables show, under _HEADINGS."""
        wall = "" if self.state == "waiting" else duration(self.wall, runs=self.state == "running")
        usage = None if self.status is None else self.status.usage
        if usage is None:
            return self.name, self.how, wall, "", ""
        size, exact = peak(usage, self.floor)
        cpu = duration(usage.ru_utime + usage.ru_stime)
        return self.name, self.how, wall, cpu, _size(size) if exact else f"≤ {_size(size)}"

    def __str__(self) -> str:
        name, how, wall, cpu, memory = self.cells()
        took = f" after {wall}" if wall else ""
        used = f" (CPU {cpu}, peak {memory})" if cpu else ""
        return f"{name}: {how}{took}{used}"


def peak(usage: resource.struct_rusage, floor: int) -> tuple[int, bool]:
    """Return the peak memory of a command in bytes, and whether that is exact or only a bound.

    The kernel counts what a process was before its exec, and then it was a copy of us. So `ru_maxrss` is never below
    what ours was at that time (the floor), and a value that is not above that says no more than "at most so much".
    """
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), usage.ru_maxrss > floor


_HEADINGS: Final = ("", "", "wall", "CPU", "peak")


def _counts(commands: Sequence[Command]) -> list[tuple[str, str]]:
    """How many are in which state: the words, and the state."""
    states = [command.state for command in commands]
    return [
        (f"{states.count(state)} {'not started' if state == 'waiting' else state}", state)
        for state in ("failed", "running", "stopped", "waiting", "ok")
        if state in states
    ]


def _in_words(commands: Sequence[Command]) -> str:
    return ", ".join(words for words, _ in _counts(commands))


def plain_table(commands: Sequence[Command], note: str) -> str:
    """Return the closing table for where there is no terminal; of one command, a line."""
    if len(commands) == 1:
        return f"anyreap run: {commands[0]}\n"
    rows = zip(*(_HEADINGS, *(command.cells() for command in commands)), strict=True)
    name, how, *figures = (pad(column) for column in rows)
    right = [[text.strip().rjust(len(text)) for text in column] for column in figures]
    texts = ["", *(fit(command.text, 40) for command in commands)]
    lines = ["  ".join(row).rstrip() + "\n" for row in zip(name, how, *right, texts, strict=True)]
    return "".join(lines) + f"anyreap run: {_in_words(commands)} in {note}\n"


# The terminal ---------------------------------------------------------------------------------------------------------

_STYLES: Final = ("cyan", "yellow", "magenta", "green", "bright_blue", "bright_cyan", "bright_magenta")
_MARKS: Final = {
    "failed": ("✘", "bold red"),
    "running": ("", "cyan"),
    "stopped": ("■", "yellow"),
    "waiting": ("·", "dim"),
    "ok": ("✔", "green"),
}
_SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII: Final = str.maketrans("✔✘■…≤─│┆·" + _SPINNER, "+x#~<-|:-" + r"|/-\|/-\|/")
_WIDTHS: Final = (0, 7, 6, 6, 9)  # of the columns at least, so that they don't jump about


class Screen:
    """The table below the output, on a terminal: that of standard error.

    Each change is one piece of text: to the top of the table, clear from there, the new output, the new table. rich
    lays the table out. Its `Live` would do the rest too, but for two things: it writes where a slow terminal stops the
    loop, and it loses its place when the window is made narrower, for the terminal wraps what is there already.
    """

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415  (an extra, and 40 ms that only a terminal needs)

        self._console = Console(file=sys.stderr, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._on_screen: list[int] = []  # the widths of the lines of the table
        self._found: list[Any] | None = None  # how the terminal was, while it does not echo
        self.encoding = self._console.encoding

    def prefix(self, name: str, style: str, bar: str) -> str:
        """Return what a line of a command begins with."""
        from rich.text import Text  # noqa: PLC0415

        return self._lines(Text(f"{name} {bar}", style), 1000)[0] + " "

    def _echo(self, *, on: bool) -> None:
        # An Enter that is echoed moves the cursor, and the table would be drawn anew where it is not.
        if on == (self._found is None) or not self._in_foreground():  # from the background it would stop us (SIGTTOU)
            return
        with contextlib.suppress(termios.error):
            if on:
                termios.tcsetattr(2, termios.TCSANOW, self._found or [])
                self._found = None
            else:
                self._found = termios.tcgetattr(2)
                silent = [*self._found[:3], self._found[3] & ~termios.ECHO, *self._found[4:]]
                termios.tcsetattr(2, termios.TCSANOW, silent)

    def leave(self) -> str:
        """Take the table away, and leave the terminal as it was."""
        self._echo(on=True)
        return self._erase()

    def _erase(self) -> str:
        """Go to where the table begins, and clear from there."""
        if not self._on_screen:
            return ""
        columns, _ = self._window()
        # A terminal wraps anew when it is resized, and what was one row may be two. xterm cuts off instead.
        wraps = "XTERM_VERSION" not in os.environ
        rows = sum(max(1, math.ceil(width / columns)) if wraps else 1 for width in self._on_screen[:-1])
        self._on_screen = []
        return "\r" + (f"\x1b[{rows}A" if rows else "") + "\x1b[0m\x1b[J\x1b[?25h"

    def draw(self, output: str, commands: Sequence[Command], note: str) -> str:
        """Put output above the table, and draw the table anew."""
        erased = self._erase()
        lines: list[str] = []
        if self._in_foreground():
            self._echo(on=False)
            columns, rows = self._window()
            lines = self._lines(self._live(commands, note, columns, rows), columns)
        self._on_screen = [_cells(_ESCAPES.sub("", line)) for line in lines]
        # 2026: a terminal that knows it shows all of this at once. 25: without a cursor that runs about. It is left at
        # the beginning of the last line, which is where it stays when that line is wrapped.
        table = "\x1b[?25l" + "\n".join(lines) + "\r" if lines else ""
        return "\x1b[?2026h" + erased + output + table + "\x1b[?2026l"

    def close(self, commands: Sequence[Command], note: str) -> str:
        """Put the closing table in the place of the live one."""
        from rich.console import Group  # noqa: PLC0415
        from rich.rule import Rule  # noqa: PLC0415

        erased = self.leave()
        columns, rows = self._window()
        shown = list(commands)
        if len(shown) > rows - 5:  # the end is what is seen of a long one
            shown.sort(key=lambda command: command.state == "failed")
        summary = [self._summary(commands, note)] if len(commands) > 1 else []
        lines = self._lines(Group(Rule(style="dim"), self._table(shown, commands, columns), *summary), columns)
        return erased + "".join(line + "\n" for line in lines)

    def _lines(self, what: Any, columns: int) -> list[str]:
        self._console.width = columns
        with self._console.capture() as capture:
            self._console.print(what)
        text = capture.get()
        if self._console.options.ascii_only:
            text = text.translate(_ASCII)
        return [line.rstrip() for line in text.splitlines()]

    def _live(self, commands: Sequence[Command], note: str, columns: int, rows: int) -> Any:
        from rich.console import Group  # noqa: PLC0415
        from rich.rule import Rule  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        rule = Rule(self._summary(commands, note), align="left", style="dim")
        room = rows // 2 - 2  # the upper half is the output's; then the rule, and the headings
        if room < 2:
            return rule
        if len(commands) <= room:
            return Group(rule, self._table(commands, commands, columns, live=True))
        of = {state: [command for command in commands if command.state == state] for state in _MARKS}
        mixed = [one for pair in itertools.zip_longest(of["failed"], of["running"]) for one in pair if one is not None]
        ranked = [*mixed, *of["stopped"], *of["waiting"], *of["ok"]]
        shown = [command for command in commands if command in ranked[: room - 1]]
        more = Text(f"  … and {_in_words(ranked[room - 1 :])}", "dim", no_wrap=True, overflow="ellipsis")
        return Group(rule, self._table(shown, commands, columns, live=True), more)

    def _summary(self, commands: Sequence[Command], note: str) -> Text:
        from rich.text import Text  # noqa: PLC0415

        title = Text(", ").join(Text(words, _MARKS[state][1]) for words, state in _counts(commands))
        return title.append(f" · {note}", "dim")

    def _table(
        self, shown: Sequence[Command], commands: Sequence[Command], columns: int, *, live: bool = False
    ) -> Table:
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        # The widths are those that all would take, so that the columns stay where they are when others are shown.
        every = zip(*(_HEADINGS, *(command.cells() for command in commands)), strict=True)
        widths = [max(least, *map(_cells, column)) for least, column in zip(_WIDTHS, every, strict=True)]
        widths[0] += 2  # the mark
        while len(widths) > 2 and sum(widths) + 2 * len(widths) > columns:  # a narrow window shows less
            widths.pop()
        left = columns - sum(widths) - 2 * len(widths)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=len(widths) > 2)
        for heading, width in zip(_HEADINGS, widths, strict=False):
            table.add_column(heading, width=width, no_wrap=True, justify="right" if heading else "left")
        if left >= 12:
            table.add_column("", max_width=left, no_wrap=True)
        frame = _SPINNER[int(time.monotonic() / _TICK) % len(_SPINNER)]
        for command in shown:
            mark, style = _MARKS[command.state]
            name, how, *figures = command.cells()
            who = Text.assemble((mark or frame, style), " ", (name, command.style))
            row: list[Text | str] = [who, Text(how, style), *figures[: len(widths) - 2]]
            if left >= 12:
                row.append(Text(command.text, "dim"))
                partial = _ESCAPES.sub("", _tame(command.lines.partial)).strip()
                if live and command.state == "running" and partial:
                    row[-1] = Text(partial, "italic")
            table.add_row(*row)
        return table

    @staticmethod
    def _window() -> tuple[int, int]:
        try:
            columns, rows = os.get_terminal_size(2)
        except OSError:
            columns = rows = 0
        return columns or 80, rows or 24

    @staticmethod
    def _in_foreground() -> bool:
        try:
            return os.tcgetpgrp(2) == os.getpgrp()
        except OSError:  # it is a terminal, but not the one that controls us
            return True


def prefixes(names: Sequence[str], screen: Screen | None) -> list[tuple[str, str, str]]:
    """Return for each name its style, what a line begins with, and what a further piece of a long one begins with."""
    found = []
    for name, style in zip(pad(names), itertools.cycle(_STYLES), strict=False):
        if screen is None:
            found.append((style, f"{name} | ", f"{name} + "))
        else:
            found.append((style, screen.prefix(name, style, "│"), screen.prefix(name, style, "┆")))
    return found


# Writing --------------------------------------------------------------------------------------------------------------


class Output:
    """All that is written, by one task: on descriptor 1 for the commands, on descriptor 2 for us.

    Args:
        screen: The table, if there is one.
        table: What the table shows: the commands, and a note.
        broken: What is called when nothing can be written for the commands any more.
    """

    def __init__(
        self,
        screen: Screen | None,
        table: Callable[[], tuple[Sequence[Command], str]],
        broken: Callable[[OSError], None],
    ) -> None:
        self._screen = screen
        self._table = table
        self._broken = broken
        # Whether the commands' lines are on the terminal where the table is.
        self._shared = screen is not None and os.isatty(1) and os.fstat(1).st_rdev == os.fstat(2).st_rdev
        self._encoding = "utf-8" if screen is None else screen.encoding
        self._pending: list[tuple[int, bytes]] = []
        self._held = 0  # bytes, those that are being written too
        self._news = anyio.Event()
        self._room = anyio.Event()
        self._written = anyio.Event()
        self._lock = anyio.Lock()
        self._waiting = anyio.CancelScope()
        self._dead: set[int] = set()
        self._dropping = self._closing = False

    def add(self, fd: int, data: bytes) -> None:
        """Have something written."""
        if data:
            self._pending.append((fd, data))
            self._held += len(data)
            self._news.set()

    async def put(self, data: bytes) -> None:
        """Have a command's output written, and wait while there is too much of it."""
        self.add(1, data)
        while self._held > _PENDING and not self._dropping:
            await self._room.wait()

    def drop(self) -> None:
        """From now on wait for nobody who doesn't read what is written."""
        self._dropping = True
        self._waiting.cancel()
        self._room.set()

    async def close(self, closing: Callable[[], str]) -> None:
        """Write what there is, and a last word."""
        self._closing = True
        self._news.set()
        await self._written.wait()
        await self._write(2, closing())

    async def write(self) -> None:
        """Write what there is, until it is closed."""
        while self._pending or not self._closing:
            with anyio.move_on_after(math.inf if self._screen is None else _TICK):
                await self._news.wait()
            self._news = anyio.Event()
            async with self._lock:
                pending, self._pending = self._pending, []
                await self._write_all(pending)
            self._held -= sum(len(data) for _, data in pending)
            self._room.set()
            self._room = anyio.Event()
            if self._screen is not None:
                await anyio.sleep(_COALESCE)
        self._written.set()

    async def _write_all(self, pending: list[tuple[int, bytes]]) -> None:
        if self._screen is None:
            for fd, group in itertools.groupby(pending, key=itemgetter(0)):
                await self._write(fd, b"".join(data for _, data in group))
            return
        if not self._shared:
            await self._write(1, b"".join(data for fd, data in pending if fd == 1))
        above = _tame(b"".join(data for fd, data in pending if fd == 2 or self._shared))
        await self._write(2, self._screen.draw(above, *self._table()))

    async def _write(self, fd: int, data: str | bytes) -> None:
        # O_NONBLOCK would be everybody's who has this terminal or pipe open, the shell's too. A thread that is blocked
        # in a write would keep us from ending. So: ask whether there is room, and write no more than what a pipe that
        # has room takes at once (`man 7 pipe`, PIPE_BUF).
        rest = memoryview(data.encode(self._encoding, "replace") if isinstance(data, str) else data)
        ready = select.poll()
        ready.register(fd, select.POLLOUT)
        while rest and fd not in self._dead:
            try:
                if ready.poll(0):
                    rest = rest[os.write(fd, rest[: select.PIPE_BUF]) :]
                elif self._dropping:
                    return
                else:
                    with anyio.CancelScope() as self._waiting:
                        await anyio.wait_writable(fd)
            except OSError as exc:
                self._dead.add(fd)
                if fd == 1:
                    self._broken(exc)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Take the table away while the process is stopped."""
        if self._screen is None:
            yield
            return
        async with self._lock:
            await self._write(2, self._screen.leave())
            yield
