"""`anyreap run`: commands under one reaper nursery, shown as they run.

Each command is a task that waits for its process. To stop is to cancel the scope around all of them, and then the
policy of the nursery ends the processes; to stop at once is to cancel the scope around that one. The tasks that read
what the commands write are outside of both: their last words are heard.

Only the public names of anyreap are used here and in `_show`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import resource
import shlex
import signal
import stat
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

import anyreap
from anyreap._show import LINE, Command, Lines, Output, Screen, duration, fit, peak, plain_table, prefixes, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import TaskStatus
    from anyio.streams.memory import MemoryObjectReceiveStream

# What may still be in a pipe whose writers are gone, at most (`man 7 pipe`, pipe-max-size), in bytes.
_PIPE: Final = 1 << 20

# What of a name is shown, in columns of the terminal.
_NAME: Final = 20

# Two signals within this time are one, in seconds. Ctrl-C reaches all of a job, and a parent in the same job (npm,
# say) may send on to us what we have got already.
_ECHO: Final = 0.1

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# What timeout(1) exits with.
_TIMED_OUT: Final = 124

DESCRIPTION: Final = """\
Run commands at the same time, and leave none of them behind. Each COMMAND is one argument and goes to the shell; after
"--" comes one program with its arguments, which does not.
"""

EPILOG: Final = """\
Exit status: 0, or that of the first command that failed (128+N: killed by signal N; 127, 126: not found, not
executable); 124 after --timeout; 128+N if anyreap itself was ended by signal N: 130 for Ctrl-C.

examples:
  anyreap run "make -C api" "make -C web"
  anyreap run --fail-fast --names db,web "postgres -D data" "npm start"
  anyreap run --timeout 60 --json exits.json -- pytest -x
"""


# The command line -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Options:
    commands: tuple[str | list[str], ...]
    names: tuple[str, ...] | None
    shutdown: anyreap.Shutdown
    fail_fast: bool
    tree: bool
    timeout: float
    plain: bool
    backend: str
    json: str | None


def _signal(text: str) -> int:
    name = text.upper().removeprefix("SIG")
    number = int(text) if text.isdecimal() else getattr(signal, "SIG" + name, -1)
    if number not in signal.valid_signals():
        raise argparse.ArgumentTypeError(f"{text!r} is no signal: write a name such as INT, or a number")
    return int(number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if seconds >= 0:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")


def _parse(argv: Sequence[str]) -> _Options:
    parser = argparse.ArgumentParser(
        prog="anyreap run",
        usage='anyreap run [options] "COMMAND" ["COMMAND" ...]\n       anyreap run [options] -- PROGRAM [ARG ...]',
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("commands", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    add("--names", metavar="A,B,...", help="what to call the commands; default: found in their words")
    add("--fail-fast", action="store_true", help="end the others when one fails")
    add("--keep-going", action="store_false", dest="fail_fast", help="let the others run on (default)")
    add("--timeout", type=_seconds, default=math.inf, metavar="S", help="end what still runs after S seconds")
    add("--signal", type=_signal, default=signal.SIGTERM, metavar="SIG", help="how to end it (default: TERM)")
    add("--grace", type=_seconds, default=5.0, metavar="S", help="seconds from there to SIGKILL (default: 5)")
    add("--group", action=flag, default=True, help="give each command a session and process group of its own, and end"
        " all of the group (default)")  # fmt: skip
    add("--tree", action="store_true", help="end what escaped from its group, too (Linux)")
    add("--json", metavar="FILE", help="write an object for each exit, one a line")
    add("--plain", action="store_true", help="no table while the commands run, also on a terminal")
    add("--backend", choices=("asyncio", "uvloop", "trio"), default="asyncio", help=argparse.SUPPRESS)
    words = list(argv)
    program: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, program = words[:at], words[at + 1 :]
    given = parser.parse_intermixed_args(words)
    commands = (*given.commands, *([program] if program else []))
    if not commands:
        parser.error("no command: write each as one argument, or one program with its arguments after --")
    names = None if given.names is None else tuple(printable(name) for name in given.names.split(","))
    if given.tree and sys.platform != "linux":
        parser.error("--tree needs Linux (man 2 PR_SET_CHILD_SUBREAPER)")
    if names is not None and len(names) != len(commands):
        parser.error(f"--names has {len(names)} for {len(commands)} commands: one for each, with commas in between")
    return _Options(
        commands=commands,
        names=names,
        shutdown=anyreap.Shutdown(given.signal, given.grace, "group" if given.group else "process"),
        fail_fast=given.fail_fast,
        tree=given.tree,
        timeout=given.timeout or math.inf,
        plain=given.plain,
        backend=given.backend,
        json=given.json,
    )


# Names ----------------------------------------------------------------------------------------------------------------


def _text(command: str | list[str]) -> str:
    return printable(command if isinstance(command, str) else shlex.join(command))


def _words(command: str | list[str]) -> list[str]:
    if isinstance(command, str):
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            words = [word for word in lexer if word.strip("();<>|&")]
        except ValueError:  # an open quote: the shell will say so
            words = command.split()
    else:
        words = command
    words = [printable(word) for word in words]
    while len(words) > 1 and re.match(r"\w+=", words[0]):
        del words[0]
    return words or ["?"]


def _names(commands: Sequence[str | list[str]]) -> list[str]:
    """Find a short name for each command: its program, and where that is not enough a word that tells it apart.

    "make -C api" and "make -C web" are "make api" and "make web". What no word tells apart is numbered.
    """
    split = [_words(command) for command in commands]
    names = []
    for words in split:
        name = _base(words)
        alike = [other for other in split if _base(other) == name]
        for at in range(1, max(map(len, alike)) if len(alike) > 1 else 0):
            if len({tuple(other[at : at + 1]) for other in alike}) == len(alike):
                name = " ".join([name, *words[at : at + 1]])
                break
        names.append(fit(name, _NAME))
    return [
        name if names.count(name) == 1 else f"{fit(name, _NAME - 4)} {names[: at + 1].count(name)}"
        for at, name in enumerate(names)
    ]


def _base(words: list[str]) -> str:
    return os.path.basename(words[0]) or words[0]


def _record(status: anyreap.ExitStatus | None, command: Command | None) -> dict[str, Any]:
    """What `--json` has of an exit. No command: an orphan. No status: it was not started, or is not known."""
    usage = None if status is None else status.usage
    size, exact = (None, False) if usage is None else peak(usage, 0 if command is None else command.floor)
    number = None if status is None else status.signal
    process = None if command is None else command.process
    return {
        "name": None if command is None else command.name,
        "command": None if command is None else command.what,
        "pid": process.pid if process is not None else None if status is None else status.pid,
        "how": str(status) if command is None else command.end,
        "exit_code": None if status is None else status.exit_code,
        "signal": None if number is None else _signal_name(number),
        "core_dumped": status is not None and status.core_dumped,
        "stopped": (None if command is None else command.stopped) or None,
        "start": None if command is None else command.start_time,
        "end": time.time() if command is None else command.start_time + command.wall,
        "user_cpu": None if usage is None else usage.ru_utime,
        "system_cpu": None if usage is None else usage.ru_stime,
        "peak_memory": size,
        "peak_memory_exact": exact,
        "orphan": command is None,
    }


# The run --------------------------------------------------------------------------------------------------------------


class _Run:
    """The commands, and all that happens to them."""

    def __init__(self, options: _Options, log: IO[bytes] | None) -> None:
        self._options = options
        self._log = log
        self._first_failure = 0
        self._ended_by = 0  # the signal that ended all
        self._orphans = 0
        self._hurried = False
        self._kill_at = math.inf
        self.screen = _screen(options)
        # One command without a table is as if it had been started without us: it has our descriptors, and may even
        # talk with a person.
        prefixed = len(options.commands) > 1 or options.names is not None
        self._piped = prefixed or self.screen is not None
        names = options.names or _names(options.commands)
        self._commands = [
            Command(what, _text(what), name, style, Lines(first, more) if prefixed else Lines("", ""))
            for what, name, (style, first, more) in zip(
                options.commands, names, prefixes(names, self.screen if os.isatty(1) else None), strict=True
            )
        ]

    @property
    def code(self) -> int:
        """The exit status."""
        return 128 + self._ended_by if self._ended_by else self._first_failure

    async def run(self) -> None:
        """Run the commands to their end."""
        self._began = time.monotonic()
        self._output = Output(self.screen, lambda: (self._commands, self._note()), self._unheard)
        self._stop = anyio.CancelScope()
        self._at_once = anyio.CancelScope()
        subreaper: dict[str, Any] = {"subreaper": True} if self._options.tree else {}
        async with anyio.create_task_group() as self._around:
            self._around.start_soon(self._output.write)
            await self._around.start(self._heed_signals)
            self._around.start_soon(self._stop_with_the_job)
            if self._options.timeout < math.inf:
                self._around.start_soon(self._end_in_time)
            followed = anyio.Event()
            try:
                with self._at_once, self._stop:
                    async with anyreap.open_reaper(shutdown=self._options.shutdown, **subreaper) as reaper:
                        self._around.start_soon(self._follow, reaper.exits(), followed)
                        async with anyio.create_task_group() as running:
                            for command in self._commands:
                                running.start_soon(self._run_one, reaper, command)
            except anyreap.StillRunning as exc:
                self._say(str(exc))
            await followed.wait()
            await self._output.close(self._closing)
            # All is said, and the process ends next: one Ctrl-C too many shall not end it with a traceback.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            self._around.cancel_scope.cancel()

    def _note(self) -> str:
        note = duration(time.monotonic() - self._began, runs=True)
        running = any(command.state == "running" for command in self._commands)
        if self._options.tree and not running:
            note += " · ending what has escaped"
        if self._stop.cancel_called and running:
            left = math.inf if self._hurried else self._kill_at - time.monotonic()
            note += f" · SIGKILL in {max(0, math.ceil(left))} s" if left < math.inf else ""
            note += " · Ctrl-C again: at once" if self._ended_by and not self._hurried else ""
        return note

    def _closing(self) -> str:
        note = duration(time.monotonic() - self._began)
        if self._orphans:
            note += f", {self._orphans} {'orphan' if self._orphans == 1 else 'orphans'} collected"
        return plain_table(self._commands, note) if self.screen is None else self.screen.close(self._commands, note)

    def _say(self, text: str) -> None:
        self._output.add(2, f"anyreap run: {text}\n".encode(errors="replace"))

    # One command ------------------------------------------------------------------------------------------------------

    async def _run_one(self, reaper: anyreap.Reaper, command: Command) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        # Shielded: a start that is cancelled goes on in its thread, with a descriptor that we would have closed.
        with anyio.CancelScope(shield=True):
            fd = await self._start(reaper, command)
        process = command.process
        if process is None:
            self._ended(command)
            return
        read_out = anyio.Event()
        if fd >= 0:
            self._around.start_soon(self._read, command, fd, read_out)
        try:
            if self._hurried:
                process.kill()
            with contextlib.suppress(anyreap.StatusLost):
                async with process:  # ends what it left behind in its group, too
                    await process.wait()
                    self._ended(command)
        except anyreap.StillRunning as exc:
            self._say(f"{command.name}: {exc}")
        finally:
            self._ended(command)
            if process.status is None and not process.lost:
                self._say(f"{command.name}: {anyreap.StillRunning([process.pid])}")
            command.over = True
            if fd >= 0 and not read_out.is_set():
                anyio.notify_closing(fd)
                with anyio.CancelScope(shield=True):
                    await read_out.wait()
            if self.screen is None and len(self._commands) > 1:
                self._say(str(command))

    async def _start(self, reaper: anyreap.Reaper, command: Command) -> int:
        """Start it. Returns where its output is to be read, or -1."""
        alone, group = len(self._commands) == 1, self._options.shutdown.scope == "group"
        read = write = -1
        command.started, command.start_time = time.monotonic(), time.time()
        try:
            if self._piped:
                read, write = os.pipe()
                os.set_blocking(read, False)
            command.process = await reaper.open_process(
                command.what,
                # Several can't share an input. Nor can one in another group than ours read a terminal: it would be
                # stopped (SIGTTIN, `man 7 credentials`), which looks like a hang.
                stdin=None if alone and not (group and os.isatty(0)) else subprocess.DEVNULL,
                stdout=write if self._piped else None,
                stderr=subprocess.STDOUT if self._piped else None,
                # A session, rather than a group in ours: who opens /dev/tty there, for a password or to draw on it, is
                # told that there is none, instead of being stopped, or of drawing over the table.
                start_new_session=group,
            )
            command.floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        except OSError as exc:
            command.error = exc
            hint = ""
            if not isinstance(command.what, str) and " " in command.what[0]:
                hint = "; a command for the shell is written without --"
            self._say(f"can't start {command.text}: {exc.strerror}{hint}")
            if read >= 0:
                os.close(read)
            return -1
        finally:
            if write >= 0:
                os.close(write)
        return read

    async def _read(self, command: Command, fd: int, read_out: anyio.Event) -> None:
        """Read what a command writes, to the end; once it is over, no more than what the pipe holds.

        What holds the pipe open then has escaped from the group, and may do so for ever.
        """
        left = _PIPE
        try:
            while left > 0:
                try:
                    data = os.read(fd, LINE)
                except BlockingIOError:
                    if command.over:
                        break
                    with contextlib.suppress(anyio.ClosedResourceError):  # it is over
                        await anyio.wait_readable(fd)
                    continue
                if not data:
                    break
                if command.over:
                    left -= len(data)
                await self._output.put(command.lines.feed(data))
                await anyio.lowlevel.checkpoint()
            await self._output.put(command.lines.end())
        finally:
            os.close(fd)
            read_out.set()

    def _ended(self, command: Command) -> None:
        if not math.isnan(command.ended):
            return
        command.ended = time.monotonic()
        self._record(_record(command.status, command))
        if command.code and not command.stopped:
            self._first_failure = self._first_failure or command.code
            if self._options.fail_fast:
                self._end_all("stopped")

    async def _follow(self, exits: MemoryObjectReceiveStream[anyreap.ExitStatus], followed: anyio.Event) -> None:
        async with exits:
            async for status in exits:
                if status.orphan:
                    self._orphans += 1
                    self._record(_record(status, None))
        followed.set()

    def _record(self, record: dict[str, Any]) -> None:
        if self._log is None:
            return
        try:
            self._log.write(json.dumps(record).encode() + b"\n")
        except OSError as exc:
            self._log = None
            self._say(f"can't write {self._options.json}: {exc.strerror}")
            self._first_failure = self._first_failure or 1

    # All of them ------------------------------------------------------------------------------------------------------

    def _end_all(self, why: str) -> None:
        """End what runs, by the policy."""
        if self._stop.cancel_called:
            return
        for command in self._commands:
            if math.isnan(command.ended) and command.status is None:
                command.stopped = why
        self._kill_at = time.monotonic() + self._options.shutdown.grace
        self._stop.cancel()

    def _end_at_once(self) -> None:
        self._hurried = True
        self._at_once.cancel()
        self._output.drop()

    def _unheard(self, exc: OSError) -> None:
        """Nobody can read what the commands write: end them, as SIGPIPE would have done."""
        if exc.errno != errno.EPIPE:
            self._say(f"can't write to standard output: {exc.strerror}")
        self._first_failure = self._first_failure or (128 + signal.SIGPIPE if exc.errno == errno.EPIPE else 1)
        self._end_all("stopped")

    async def _end_in_time(self) -> None:
        await anyio.sleep(self._options.timeout)
        if any(math.isnan(command.ended) for command in self._commands):
            self._first_failure = self._first_failure or _TIMED_OUT
            self._end_all("timed out")

    async def _heed_signals(self, *, task_status: TaskStatus[None]) -> None:
        # What was ignored when we were started stays so: nohup(1), and a shell without job control, mean it.
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        with anyio.open_signal_receiver(*heeded) as signals:
            task_status.started()
            at = math.nan
            async for number in signals:
                if math.isnan(at):
                    at = time.monotonic()
                    self._ended_by = self._ended_by or number
                    self._end_all("interrupted")
                    self._say_what_now(number)
                elif time.monotonic() - at > _ECHO:
                    self._end_at_once()

    def _say_what_now(self, number: signal.Signals) -> None:
        policy = self._options.shutdown
        if self.screen is None and any(command.state == "running" for command in self._commands):
            kill = f", and SIGKILL in {policy.grace:g} s" if policy.grace < math.inf else ""
            self._say(f"{number.name}: the commands get {_signal_name(policy.signal)}{kill}; once more: at once")

    async def _stop_with_the_job(self) -> None:
        """At Ctrl-Z stop the commands too, for they are in no job of this terminal; go on with them at `fg`."""
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN:
            return
        while True:
            with anyio.open_signal_receiver(signal.SIGTSTP) as signals:
                async for _ in signals:
                    break
            # Its disposition is the default one again, and that is what we want now.
            async with self._output.paused():
                self._signal_groups(signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGTSTP)
                self._signal_groups(signal.SIGCONT)

    def _signal_groups(self, number: signal.Signals) -> None:
        if self._options.shutdown.scope == "process":
            return  # they are in our group
        for command in self._commands:
            process = command.process
            # It is not collected, nor will it be in the middle of this, for that happens in this thread. So the number
            # is still its own.
            if process is not None and process.status is None and not process.lost:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)


def _screen(options: _Options) -> Screen | None:
    """Return the table, where it can be shown."""
    if options.plain or os.environ.get("TERM", "") in ("", "dumb") or not os.isatty(2):
        return None
    if len(options.commands) == 1 and not os.isatty(1):
        return None  # what reads it shall get its very bytes
    if len(options.commands) == 1 and options.shutdown.scope == "process" and os.isatty(0):
        return None  # it may want to talk with a person
    output = os.fstat(1)
    quiet = stat.S_ISREG(output.st_mode) or output.st_rdev == os.stat(os.devnull).st_rdev
    if not quiet and not os.isatty(1):
        return None  # a pipe: what is behind it may well write on this terminal
    try:
        return Screen()
    except ImportError:  # no rich, which comes with anyreap[cli]
        return None


def _open_standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2: a pipe of ours must not get one of these numbers."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def main(argv: list[str]) -> int:
    """Run `anyreap run`.

    Args:
        argv: The arguments, without the program and without "run".

    Returns:
        The exit status, as EPILOG has it.
    """
    _open_standard_descriptors()
    options = _parse(argv)
    with contextlib.ExitStack() as stack:
        log: IO[bytes] | None = None
        if options.json is not None:
            try:
                log = stack.enter_context(open(options.json, "wb", buffering=0))
            except OSError as exc:
                os.write(2, f"anyreap run: can't write {options.json}: {exc.strerror}\n".encode(errors="replace"))
                return 2
        run = _Run(options, log)
        try:
            anyio.run(
                run.run,
                backend="trio" if options.backend == "trio" else "asyncio",
                backend_options={"use_uvloop": True} if options.backend == "uvloop" else None,
            )
        except KeyboardInterrupt:  # it came before our own handler was there, or after
            return 128 + signal.SIGINT
        finally:
            if run.screen is not None:  # a fault of ours must not leave a terminal without cursor and echo
                os.write(2, run.screen.leave().encode())
        return run.code
