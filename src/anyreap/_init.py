"""`anyreap init`: a process to be PID 1, or a subreaper. It starts one command, and ends as that command ends.

All that it does:

- it passes each signal on to the command, or, with `--group`, to the command's whole process group;
- it collects every child that ends: the command, and the orphans that the kernel gives to it;
- it ends with the exit code of the command, or with 128 plus the number of the signal that killed it.

A program of its own. There is no event loop in it, and it imports nothing of anyio: it is the first thing to start in
a container, and it stays in memory until the last. No signal handler either: every signal is blocked before the
command is started and taken out of the kernel one by one, so nothing can happen between two lines.

It does what nothing else in the package may, and is the home of it: it takes every signal of its process, collects
every child, and signals by number. The number is safe here: nobody but this loop collects the command, and the loop
ends with it.

The ways of tini (one child, who may be anything) and of dumb-init (`--group`: a session) are kept where they are good.
Where not, there is a comment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getopt
import os
import signal
import sys
import termios
from typing import TYPE_CHECKING, Final, NoReturn

from anyreap import _kernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

USAGE: Final = """\
usage: anyreap init [options] [--] command [argument ...]

Be the init of a command, as PID 1 or as a subreaper: pass signals on to it, collect every orphan, end as it ends.

  -s, --subreaper             be given the orphans also when this is not PID 1
  -g, --group                 give the command a session of its own: signals go to its whole process group, and what
                              is left of the group gets SIGTERM when the command ends
  -r, --rewrite FROM:TO       pass TO on when FROM comes; TO may be 0: pass nothing on (repeatable)
  -e, --expect CODE           end with 0 if the command ends with this code, 0 to 255 (repeatable)
  -p, --parent-death SIGNAL   get this signal, and pass it on, when the parent of this process ends
  -w, --warn-on-reap          tell of each orphan that was collected
  -v, --verbose               say more on stderr: the command's start and end; -vv: signals and orphans; -vvv: all
  -h, --help                  show this

Signals are names or numbers: SIGTERM, TERM, 15. The exit code is 127 if the command was not found, 126 if it could
not be started, 1 if an option is wrong.
"""

OPTIONS: Final = "sp:vwge:r:h"
LONG_OPTIONS: Final = (
    "subreaper",
    "parent-death=",
    "verbose",
    "warn-on-reap",
    "group",
    "expect=",
    "rewrite=",
    "help",
)

ANY_SIGNAL: Final = signal.valid_signals()
STOPS: Final = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # what a terminal stops a job with
TICK: Final = 1.0  # seconds: signals are hints, here too

# CPython ignores these two when it starts, and does not say how it found them.
IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


class Options:
    """What the command line asks for."""

    def __init__(self) -> None:
        self.command: list[str] = []
        self.subreaper = False
        self.group = False
        self.rewrites: dict[int, int] = {}
        self.expected: set[int] = set()
        self.parent_death = 0
        self.warn_on_reap = False
        self.verbosity = 0
        self.help = False

    def tell(self, level: int, text: str) -> None:
        """Say something, if so much was asked for."""
        if self.verbosity >= level:
            say(text)


def main(argv: list[str]) -> int:
    """Be an init. Returns the exit code."""
    if sys.platform != "linux":
        return fail("it needs Linux")
    try:
        options = parse(argv)
    except (getopt.GetoptError, ValueError) as exc:
        return fail(f"{exc}; see anyreap init --help")
    if options.help:
        sys.stdout.write(USAGE)
        return 0
    given = Given()
    try:
        if options.parent_death:
            _kernel.set_parent_death_signal(options.parent_death)
        if options.subreaper:
            _kernel.set_subreaper(on=True)
            options.tell(3, "orphans are given to this process from now on")
        elif os.getpid() != 1 and not _kernel.is_subreaper():
            say(
                "this is neither PID 1 nor a subreaper: orphans are given to another process,"
                " and zombie reaping won't work. Run it as PID 1, or with -s"
            )
        gives_terminal = leave_terminal() if options.group else in_foreground()
        if gives_terminal:
            options.tell(3, "the terminal goes to the command")
        child = os.fork()
    except OSError as exc:
        return fail(f"{options.command[0]} was not started: {exc.strerror}")
    if child == 0:
        become(options, given, gives_terminal=gives_terminal)
    with contextlib.suppress(OSError):
        os.chdir("/")  # or the directory that it was started in could not be unmounted for as long as it runs
    return Init(options, child).run()


def parse(argv: list[str]) -> Options:
    """Read the command line. Options end where the command begins: what follows is the command's."""
    options = Options()
    found, options.command = getopt.getopt(argv, OPTIONS, LONG_OPTIONS)
    for name, value in found:
        match name:
            case "-s" | "--subreaper":
                options.subreaper = True
            case "-g" | "--group":
                options.group = True
            case "-r" | "--rewrite":
                options.rewrites.update([rewrite(value)])
            case "-e" | "--expect":
                options.expected.add(exit_code(value))
            case "-p" | "--parent-death":
                options.parent_death = signal_number(value)
            case "-w" | "--warn-on-reap":
                options.warn_on_reap = True
            case "-v" | "--verbose":
                options.verbosity += 1
            case _:
                options.help = True
    if not options.command and not options.help:
        raise ValueError("there is no command to run")
    if options.group:
        # To a process group without a parent in its session, which the command's is, the kernel does not apply the
        # default action of these, so they would stop nothing (POSIX, "orphaned process group").
        options.rewrites = dict.fromkeys(STOPS, signal.SIGSTOP) | options.rewrites
    return options


def exit_code(text: str) -> int:
    """Read an exit code."""
    if text.isascii() and text.isdigit() and int(text) <= 255:
        return int(text)
    raise ValueError(f"an exit code is a number from 0 to 255, not {text!r}")


def signal_number(text: str) -> int:
    """Read a signal: its name, with or without SIG, or its number."""
    name = text.upper().removeprefix("SIG")
    number = int(name) if name.isascii() and name.isdigit() else signal.Signals.__members__.get(f"SIG{name}")
    if number in ANY_SIGNAL:
        return int(number)
    raise ValueError(f"a signal is a name or a number, such as SIGTERM or 15, not {text!r}")


def rewrite(text: str) -> tuple[int, int]:
    """Read FROM:TO."""
    before, colon, after = text.partition(":")
    if not colon:
        raise ValueError(f"--rewrite takes FROM:TO, such as TERM:QUIT, not {text!r}")
    found = signal_number(before)
    if found in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
        raise ValueError(f"{name_of(found)} is never passed on, so it can't be rewritten")
    return found, 0 if after == "0" else signal_number(after)


# ---------------------------------------------------------------------------------------------------------------------
# The start.


class Given:
    """How this process was started, for the command to be started likewise. All signals are blocked from here on.

    Also those that a fault raises. Sent by somebody, they are for the command like any other; raised by a fault of our
    own, the kernel delivers them all the same. And SIGTTIN and SIGTTOU: a process that blocks these may write to a
    terminal of which it is not in the foreground.
    """

    def __init__(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_SETMASK, ANY_SIGNAL)
        self._environment = given_environment()
        # Ignored, it would make the kernel throw the status of the command away, and our wait for it last for ever.
        self._child_ignored = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def restore(self) -> Mapping[bytes, bytes]:
        """Put the signals back as they were found, as far as that is known. Returns the environment."""
        for signum in IGNORED_BY_PYTHON:
            signal.signal(signum, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # one may be pending, and must not become an exception here
        if self._child_ignored:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return self._environment


def given_environment() -> Mapping[bytes, bytes]:
    """The environment that this process was started with.

    Not `os.environ`: where there is no locale CPython adds an LC_CTYPE for its children (PEP 538), and this one is to
    be as good as not there.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = file.read().split(b"\0")
    except OSError:
        return os.environb
    return dict(pair.split(b"=", 1) for pair in pairs if pair.find(b"=") > 0)


def become(options: Options, given: Given, *, gives_terminal: bool) -> NoReturn:
    """In the child: become the command."""
    code = 126
    try:
        if options.group:
            os.setsid()
            with contextlib.suppress(OSError):  # no terminal at stdin, or somebody else's
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        else:
            # A group of its own also without --group: else a Ctrl-C would reach it twice, from the terminal and from
            # us. In the foreground before it runs: it could be stopped by its first look at the terminal.
            os.setpgid(0, 0)
            if gives_terminal:
                give_terminal(os.getpid())
        environment = given.restore()
        os.execvpe(options.command[0], options.command, environment)
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            code = 127
        say(f"{options.command[0]}: {exc.strerror}")
        for hint in hints(options.command[0], exc.errno):
            say(hint)
    finally:
        os._exit(code)


def hints(command: str, reason: int | None) -> Iterable[str]:
    """What a reason leaves unsaid."""
    if reason == errno.ENOEXEC:
        yield "a script needs a first line such as #!/bin/sh, and a binary must be made for this kind of machine"
    elif reason == errno.ENOENT and "/" not in command:
        yield f"it is in no directory of PATH, which is {os.environ.get('PATH', os.defpath)}"
    elif reason == errno.ENOENT and os.path.exists(command):
        yield "it is there, but what it needs to run is not: the interpreter in its first line, or the dynamic loader"


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.


def terminal_group() -> int:
    """The process group in the foreground of our terminal; -1 if we have none. It is looked for at stdin."""
    try:
        return os.tcgetpgrp(0)
    except OSError:
        return -1


def in_foreground() -> bool:
    """Whether we are in the foreground of a terminal, so that it is ours to give."""
    return terminal_group() == os.getpgrp()


def give_terminal(pgid: int) -> None:
    """Put a process group into the foreground."""
    with contextlib.suppress(OSError):
        os.tcsetpgrp(0, pgid)


def leave_terminal() -> bool:
    """Let go of the terminal, so that the session of the command can have it. Returns whether there was one.

    Only the leader of a session can. The kernel tells its foreground that the terminal is gone: a SIGHUP and a SIGCONT,
    ours, and not for the command, which would be ended by the first.
    """
    if os.getsid(0) != os.getpid():
        return False
    try:
        fcntl.ioctl(0, termios.TIOCNOTTY)
    except OSError:
        return False
    while signal.sigtimedwait((signal.SIGHUP, signal.SIGCONT), 0):
        pass
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


class Init:
    """Pass on, collect, and end with the command."""

    def __init__(self, options: Options, child: int) -> None:
        self._options = options
        self._child = child
        self._code: int | None = None

    def run(self) -> int:
        """Until the command has ended. Returns the exit code."""
        self._options.tell(1, f"started {self._options.command[0]} as {self._child}")
        while self._code is None:
            signum = self._next_signal()
            if signum is not None:
                self._pass_on(signum)
            self._collect()
            self._stop_with_command()
        if terminal_group() == self._child:
            give_terminal(os.getpgrp())  # for whoever comes after us
        return 0 if self._code in self._options.expected else self._code

    def _next_signal(self) -> int | None:
        found = signal.sigtimedwait(ANY_SIGNAL, TICK)
        if found is None:
            return None
        if found.si_signo == signal.SIGCHLD:
            self._options.tell(3, "SIGCHLD has come")
            return None
        if found.si_signo in IGNORED_BY_PYTHON and found.si_pid == os.getpid():
            return None  # nobody reads what we say: our trouble. To be ignored is no help to a signal that is blocked
        return found.si_signo

    def _pass_on(self, signum: int) -> None:
        self._options.tell(2, f"{name_of(signum)} has come")
        if signum == signal.SIGCONT and not self._options.group and in_foreground():
            give_terminal(self._child)  # `fg` in a shell has given it to us
        if self._send(signum) and signum in STOPS:
            suspend()

    def _send(self, signum: int) -> bool:
        signum = self._options.rewrites.get(signum, signum)
        if not signum:
            return False
        self._options.tell(
            2, f"{name_of(signum)} goes to the {'group' if self._options.group else 'command'} {self._child}"
        )
        try:
            if self._options.group:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child, signum)
                    return True
            # Also where the child has not made its group yet. It has the signals blocked until it has, so nothing that
            # comes meanwhile is lost.
            os.kill(self._child, signum)
        except OSError as exc:  # EPERM: the command has become another user. That is no reason to end
            say(f"{name_of(signum)} could not be sent to {self._child}: {exc.strerror}")
        return True

    def _collect(self) -> None:
        # A look first, and then the collecting, where waitpid(-1) would do both: when the command's group gets its
        # SIGTERM its number must not be another group's yet, and that is sure while the zombie of its leader stands.
        while found := _kernel.look_any():
            pid, raw = found
            code = os.waitstatus_to_exitcode(raw)
            how = f"exited with code {code}" if code >= 0 else f"killed by {name_of(-code)}"
            if pid == self._child:
                self._code = code if code >= 0 else 128 - code
                self._options.tell(1, f"{pid}, the command: {how}")
                if self._options.group:
                    self._send(signal.SIGTERM)
            elif self._options.warn_on_reap:
                say(f"Reaped zombie process with pid={pid}")  # the words that those who filter tini's log look for
            else:
                self._options.tell(2, f"{pid}, an orphan: {how}")
            if _kernel.take(pid) is None:
                break

    def _stop_with_command(self) -> None:
        # The terminal stops the command, not us: it is in a group of its own. A shell that waits for us would then wait
        # for ever, with nobody to read what is typed. So we stop as well; its `fg` and `bg` continue us both. Not if we
        # have been continued already, and our SIGCONT is only waiting for its turn.
        if (
            self._code is None
            and not self._options.group
            and _kernel.take_stop(self._child) in STOPS
            and terminal_group() >= 0
            and signal.SIGCONT not in signal.sigpending()
        ):
            self._options.tell(2, "the command was stopped from the terminal")
            suspend()


def suspend() -> None:
    """Stop until somebody sends SIGCONT. As PID 1 it can't be done, and isn't."""
    os.kill(os.getpid(), signal.SIGSTOP)


def name_of(signum: int) -> str:
    """Name a signal."""
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


def say(text: str) -> None:
    """Write a line to stderr; stdout is the command's."""
    # With one system call, and come what may: a full disk or a closed pipe is no reason for an init to end.
    with contextlib.suppress(OSError):
        os.write(2, os.fsencode(f"anyreap init: {text}\n"))


def fail(text: str) -> int:
    """Say why it ends before it has begun."""
    say(text)
    return 1
