"""`anyreap init`, from outside: each in a process of its own, looked at in /proc and by what its command says.

Nothing tells when a process has changed its state, so states are waited for by looking again (`until`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import pty
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
import pytest

from anyreap import __main__, _init
from tests.harness import run_alone, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

INIT = (sys.executable, "-m", "anyreap", "init")
PYTHON = (sys.executable, "-I", "-S", "-c")  # the fastest start

# A command that tells every signal that it gets, and is ended by SIGKILL only. "ready" comes after all is in place.
TELLER = """
import os, signal
every = signal.valid_signals()
signal.pthread_sigmask(signal.SIG_BLOCK, every)
os.write(1, b"ready %d\\n" % os.getpid())
while True:
    os.write(1, b"%d\\n" % signal.sigwaitinfo(every).si_signo)
"""
TELLS = (*PYTHON, TELLER)
# One that ends with 7 at a SIGTERM.
ENDS = (*PYTHON, TELLER.partition("while")[0] + "signal.sigwait({15}); os._exit(7)")

PASSED_ON = sorted(
    signal.valid_signals()
    - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
)
STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


def until(condition: Callable[[], Any], within: float = 20) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.002)


def children_of(pid: int) -> set[int]:
    """The pids of the children of a process, zombies too."""
    with contextlib.suppress(OSError):
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return set()


def signals(name: str, text: str) -> set[int]:
    """One of the sets of signals in a text like `/proc/PID/status`."""
    found = next(line for line in text.splitlines() if line.startswith(name + ":"))
    mask = int(found.split()[1], 16)
    # Without the two that the C library keeps to itself (`man 7 signal`): no program can set them.
    return {number for number in range(1, 65) if mask >> (number - 1) & 1} - {32, 33}


def end_descendants(pid: int) -> None:
    """Kill all that a process has started, and what these start meanwhile."""
    while alive := [
        each for each in psutil.Process(pid).children(recursive=True) if state_of(each.pid) not in ("", "Z")
    ]:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Started:
    """A process, and what it starts: all of it is ended at the end, by its pid."""

    def __init__(self, *command: str, **options: Any) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.popen = subprocess.Popen(command, **{**pipes, **options})
        self.pid = self.popen.pid

    def line(self) -> str:
        """The next line on its stdout."""
        assert self.popen.stdout is not None
        return str(self.popen.stdout.readline().decode().rstrip("\n"))

    def error(self) -> str:
        """The next line on its stderr."""
        assert self.popen.stderr is not None
        return str(self.popen.stderr.readline().decode().rstrip("\n"))

    def ready(self) -> int:
        """Wait for the command to be ready. Returns its pid."""
        word, pid = self.line().split()
        assert word == "ready"
        return int(pid)

    def send(self, signum: int) -> None:
        """Send a signal."""
        os.kill(self.pid, signum)

    def has_taken_all(self) -> bool:
        """Whether no signal is waiting for it to be taken."""
        return not signals("ShdPnd", Path(f"/proc/{self.pid}/status").read_text())

    def open(self) -> None:
        """End its stdin, on which something waits."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, the rest of stdout, stderr."""
        if self.popen.stdin is not None and self.popen.stdin.closed:
            self.popen.stdin = None
        out, err = self.popen.communicate(timeout=20)
        return self.popen.returncode, os.fsdecode(out or b""), os.fsdecode(err or b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.popen.poll() is None:
            self.send(signal.SIGSTOP)  # its orphans stay with it
            end_descendants(self.pid)
        self.popen.kill()
        self.finish()


def init(*args: str, **options: Any) -> Started:
    """Start an init: options, then the command."""
    return Started(*INIT, *args, **options)


def can_unshare() -> str:
    """Why there can be no pid namespace here; "" if there can."""
    if os.geteuid() != 0:
        return "a pid namespace takes root"
    if shutil.which("unshare") is None:
        return "there is no unshare here"
    tried = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    return f"unshare failed: {tried.stderr!r}" if tried.returncode else ""


@pytest.fixture(params=["subreaper", "pid-1"])
def reaping(request: pytest.FixtureRequest) -> Sequence[str]:
    """An init that is given orphans, in the one and in the other way. Its command line."""
    if request.param == "subreaper":
        return (*INIT, "-s")
    if why := can_unshare():
        pytest.skip(why)
    return ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *INIT)


def the_init(started: Started) -> int:
    """Its pid: unshare has it for a child."""
    if "unshare" not in str(started.popen.args):
        return started.pid
    until(lambda: children_of(started.pid))
    return next(iter(children_of(started.pid)))


# How it ends ---------------------------------------------------------------------------------------------------------


def test_every_exit_code() -> None:
    """Exit codes 0 to 255 are those of the command, each."""
    run_alone(
        """
        from anyreap import _init
        for code in range(256):
            pid = os.fork()
            if pid == 0:
                os._exit(_init.main(["-s", "--", "sh", "-c", f"exit {code}"]))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code, code
        """
    )


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMAX])
def test_a_killed_command(signum: int) -> None:
    """A command that was killed by signal n makes it end with 128+n."""
    with init("-s", "--", "sh", "-c", f"ulimit -c 0; kill -{int(signum)} $$") as started:
        assert started.finish() == (128 + signum, "", "")


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["-e", "143"], 143, 0),
        (["-e", "3", "--expect=4", "-e255"], 4, 0),
        (["-e", "3", "-e", "4", "-e", "255"], 255, 0),
        (["-e", "3"], 4, 4),
        (["-e", "0"], 0, 0),
    ],
)
def test_expected_codes(args: list[str], code: int, expected: int) -> None:
    """-e makes an exit code 0, as often as it is given; others are as they are."""
    with init("-s", *args, "sh", "-c", f"exit {code}") as started:
        assert started.finish() == (expected, "", "")


def test_a_command_that_is_not_there() -> None:
    """The exit code is 127, and the message names the command, the reason, and where it was looked for."""
    with init("-s", "--", "no-such-command", env={"PATH": "/bin:/elsewhere"}) as started:
        code, out, err = started.finish()
    assert (code, out) == (127, "")
    assert "no-such-command: No such file or directory\n" in err
    assert "PATH, which is /bin:/elsewhere" in err


def test_a_command_whose_interpreter_is_not_there(tmp_path: Path) -> None:
    """The reason is said where the kernel's is misleading: the file is there."""
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with init("-s", "--", str(script)) as started:
        code, _, err = started.finish()
    assert code == 127
    assert f"{script}: No such file or directory\n" in err
    assert "the interpreter in its first line" in err


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [("#!/bin/sh\n", 0o644, "Permission denied"), ("exit 0\n", 0o755, "Exec format error")],
)
def test_a_command_that_can_not_be_started(tmp_path: Path, content: str, mode: int, reason: str) -> None:
    """The exit code is 126, and the message names the command and the reason."""
    script = tmp_path / "script"
    script.write_text(content)
    script.chmod(mode)
    with init("-s", "--", str(script)) as started:
        code, out, err = started.finish()
    assert (code, out) == (126, "")
    assert f"{script}: {reason}\n" in err


def test_nothing_can_be_started() -> None:
    """A system call that fails before the command is there is said, with its reason, and the exit code is 1."""
    done = run_alone(
        """
        from anyreap import _init, _kernel
        def fork():
            raise BlockingIOError(11, os.strerror(11))
        os.fork = fork
        assert _init.main(["-s", "some-command"]) == 1
        _kernel._PR_SET_CHILD_SUBREAPER = 32767
        assert _init.main(["-s", "some-command"]) == 1
        """,
    )
    assert done.stderr.splitlines() == [
        "anyreap init: some-command was not started: Resource temporarily unavailable",
        "anyreap init: some-command was not started: Invalid argument (prctl 32767)",
    ]


# How the command starts ----------------------------------------------------------------------------------------------

# Starts a program with these signals ignored, and these blocked, and no others.
BEGIN = """
import os, signal, sys
ignored, blocked = ({int(n) for n in arg.split(",") if n} for arg in sys.argv[1:3])
for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
os.execv(sys.argv[3], sys.argv[3:])
"""


def begin(ignored: Iterable[int], blocked: Iterable[int]) -> list[str]:
    """A wrapper that starts a program with these signals ignored, and these blocked, and no others."""
    return [*PYTHON, BEGIN, *(",".join(str(int(signum)) for signum in each) for each in (ignored, blocked))]


@pytest.mark.parametrize("group", [[], ["-g"]])
def test_mask_and_dispositions(group: list[str]) -> None:
    """The command starts with the mask and the ignored signals that init was started with, and with no others."""
    ignored = {signal.SIGINT, signal.SIGSEGV, signal.SIGTTOU, signal.SIGCHLD, signal.SIGHUP, signal.SIGRTMIN}
    blocked = {signal.SIGILL, signal.SIGTERM, signal.SIGTTIN, signal.SIGCHLD, signal.SIGRTMAX}
    for given in ((ignored, blocked), (set(), set())):
        with Started(*begin(*given), *INIT, "-s", *group, "cat", "/proc/self/status") as started:
            code, out, err = started.finish()
        assert (code, err) == (0, "")
        assert (signals("SigIgn", out), signals("SigBlk", out)) == given
        assert signals("SigPnd", out) == set()


def test_ignored_sigchld() -> None:
    """A SIGCHLD that it finds ignored, for which the kernel would throw statuses away, costs no status."""
    with Started(*begin({signal.SIGCHLD}, set()), *INIT, "-s", "sh", "-c", "exit 7") as started:
        assert started.finish() == (7, "", "")


def test_environment_and_arguments() -> None:
    """The environment and the arguments are the given ones, byte by byte; no LC_CTYPE is added, as Python does."""
    given = {b"A": b"\xff\xfe", b"B": b"x=y\nz", b"LC_CTYPE": b"POSIX"}
    for environment in (given, {b"A": b"1"}):
        with init("-s", "/usr/bin/env", "-0", env=environment) as started:
            assert os.fsencode(started.finish()[1]) == b"".join(b"%s=%s\0" % pair for pair in environment.items())
    with init("-s", "printf", "%s|", os.fsdecode(b"\xff"), "--", "-s", "") as started:
        assert os.fsencode(started.finish()[1]) == b"\xff|--|-s||"


def test_working_directory(tmp_path: Path) -> None:
    """The command starts where init was started, but init itself holds no directory."""
    with init("-s", "sh", "-c", "echo ready $$; read x", cwd=tmp_path) as started:
        command = started.ready()
        assert Path(f"/proc/{command}/cwd").readlink() == tmp_path
        until(lambda: Path(f"/proc/{started.pid}/cwd").readlink() == Path("/"))
        started.open()
        started.finish()


def test_descriptors() -> None:
    """The command has the descriptors that init was given, and no others."""
    read, write = os.pipe()
    try:
        command = ("ls", "-1", "/proc/self/fd")
        with Started(*command, pass_fds=[write]) as plain, init("-s", *command, pass_fds=[write]) as started:
            assert started.finish() == plain.finish()
    finally:
        os.close(read)
        os.close(write)


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [[], ["-g"]])
def test_every_signal_is_passed_on(group: list[str]) -> None:
    """Every signal that can be caught, but for SIGCHLD, goes to the command. Also those of faults, sent by somebody."""
    with init("-s", *group, "--", *TELLS) as started:
        started.ready()
        for signum in PASSED_ON:
            started.send(signum)
            assert started.line() == str(int(signum))
        started.send(signal.SIGCHLD)
        started.send(signal.SIGUSR1)
        assert started.line() == "10"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_command_without_a_handler(signum: int) -> None:
    """The default action of a signal is the command's: it ends by it, and init with 128+n."""
    with Started(*begin([], []), *INIT, "-s", "sh", "-c", "echo ready $$; exec sleep 3600") as started:
        started.ready()
        started.send(signum)
        assert started.finish() == (128 + signum, "", "")


def test_rewritten_signals() -> None:
    """--rewrite FROM:TO passes TO on for FROM, by names or numbers, both ways at once; 0 drops it."""
    rewrites = ["-r", "TERM:SIGQUIT", "--rewrite=SIGQUIT:15", "-r", "1:31", "-r", "31:1", "-r", "INT:0"]
    with init("-s", *rewrites, *TELLS) as started:
        started.ready()
        for sent, told in ((15, 3), (3, 15), (1, 31), (31, 1)):
            started.send(sent)
            assert started.line() == str(told)
        started.send(signal.SIGINT)
        started.send(signal.SIGUSR2)
        assert started.line() == "12"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_group_is_there(signum: int) -> None:
    """With -g, a signal that comes before the command's group is there reaches the command once it is."""
    script = """
        import os, sys
        from anyreap import _init
        real = os.setsid
        def late():
            sys.stdin.read()
            real()
        os.setsid = late
        sys.exit(_init.main(["-sgvv", "--", "sleep", "3600"]))
    """
    with Started(*begin([], []), sys.executable, "-c", textwrap.dedent(script)) as started:
        assert "started sleep" in started.error()
        started.send(signum)
        assert "has come" in started.error()
        assert "goes to the group" in started.error()
        started.open()
        assert started.finish()[0] == 128 + signum


def test_nobody_reads_what_it_says() -> None:
    """The SIGPIPE that its own message raises is not passed on: the command goes on, and so does init."""
    read, write = os.pipe()
    with init("-svvv", "sh", "-c", "echo ready $$; read x; exit 5", stderr=write) as started:
        os.close(write)
        os.close(read)
        started.ready()
        started.send(signal.SIGWINCH)  # one thing more to say
        started.open()
        assert started.finish()[0] == 5


def test_a_sigpipe_of_somebody_else() -> None:
    """A SIGPIPE that somebody sends to it is passed on like any other."""
    with init("-s", *TELLS) as started:
        started.ready()
        started.send(signal.SIGPIPE)
        assert started.line() == str(int(signal.SIGPIPE))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")
def test_a_command_that_it_may_not_signal() -> None:
    """A command that has become another user can't be signalled. That is said, and no reason to end."""
    script = """
        import os, sys
        from anyreap import _init
        real = os.fork
        def fork():
            pid = real()
            if pid:
                os.setresuid(65534, 65534, 65534)
            return pid
        os.fork = fork
        sys.exit(_init.main(["-s", "--", "sh", "-c", "echo ready $$; read x; exit 5"]))
    """
    with Started(sys.executable, "-c", textwrap.dedent(script)) as started:
        command = started.ready()
        started.send(signal.SIGUSR1)
        said = f"anyreap init: SIGUSR1 could not be sent to {command}: Operation not permitted"
        assert started.error() == said
        started.open()
        assert started.finish() == (5, "", "")


def test_parent_death() -> None:
    """-p SIGNAL is passed on when the parent of init ends."""
    parent = '"$@" & read x'
    script = 'sh -c "$0" sh "$@"; exec sleep 3600'
    inner = (*INIT, "-s", "-p", "USR1", "--", *TELLS)
    with init("-s", "sh", "-c", script, parent, *inner) as outer:  # which collects the inner one
        outer.ready()
        outer.open()
        assert outer.line() == "10"


def test_a_stopped_command() -> None:
    """A command that is stopped by somebody else, without a terminal, does not stop init: it may have orphans."""
    with Started(*begin([], []), *INIT, "-s", "sh", "-c", "echo ready $$; exec sleep 3600") as started:
        command = started.ready()
        os.kill(command, signal.SIGTSTP)
        until(lambda: state_of(command) == "T")
        started.send(signal.SIGTERM)
        os.kill(command, signal.SIGCONT)
        assert started.finish() == (128 + signal.SIGTERM, "", "")


# Groups --------------------------------------------------------------------------------------------------------------

PAIR = '"$@" & read x; exit 4'
TWINS = '"$@" & exec "$@"'


def test_the_group_gets_the_signal() -> None:
    """With -g the command leads a session, and a signal goes to each process of its group; without, to it alone."""
    with init("-s", "-g", "sh", "-c", TWINS, "sh", *TELLS) as started:
        twins = {started.ready(), started.ready()}
        (command,) = children_of(started.pid)
        assert {os.getsid(pid) for pid in twins} == {os.getpgid(pid) for pid in twins} == {command}
        started.send(signal.SIGUSR1)
        assert [started.line(), started.line()] == ["10", "10"]
    with init("-s", "sh", "-c", TWINS, "sh", *TELLS) as started:
        twins = {started.ready(), started.ready()}
        (command,) = children_of(started.pid)
        assert {os.getsid(pid) for pid in twins} == {os.getsid(0)}
        started.send(signal.SIGUSR1)
        assert started.line() == "10"
        os.kill((twins - {command}).pop(), signal.SIGUSR2)
        assert started.line() == "12"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["-g"], signal.SIGTERM),
        (["-g", "-r", "TERM:QUIT"], signal.SIGQUIT),
        (["-g", "-r", "TERM:0"], signal.SIGUSR1),
        ([], signal.SIGUSR1),
    ],
)
def test_what_is_left_of_the_group(args: list[str], told: int) -> None:
    """With -g what is left of the group gets SIGTERM, or what that was rewritten to, when the command ends."""
    with init(*args, "sh", "-c", "exec 3<&0;" + PAIR, "sh", *TELLS) as started:
        other = started.ready()
        try:
            started.open()
            until(lambda: state_of(started.pid) == "Z")
            os.kill(other, signal.SIGUSR1)  # the first thing that it would hear
            assert started.line() == str(int(told))
            assert started.popen.wait() == 4
        finally:
            os.kill(other, signal.SIGKILL)


def test_the_group_is_signalled_while_its_number_is_taken() -> None:
    """The last SIGTERM to the group goes out while the zombie of its leader keeps the number from all others."""
    done = run_alone(
        """
        from anyreap import _init
        real = os.killpg
        def killpg(pgid, signum):
            print(state_of(pgid), signal.Signals(signum).name)
            real(pgid, signum)
        os.killpg = killpg
        assert _init.main(["-s", "-g", "true"]) == 0
        os.killpg = real
        """
    )
    assert done.stdout.splitlines() == ["Z SIGTERM"]


@pytest.mark.parametrize("signum", STOPS)
def test_stopping_and_continuing_a_group(signum: int) -> None:
    """With -g a stop signal stops the group and init; SIGCONT continues both."""
    with init("-s", "-g", *TELLS) as started:
        command = started.ready()
        started.send(signum)
        until(lambda: state_of(started.pid) == "T" == state_of(command))
        started.send(signal.SIGCONT)
        assert started.line() == str(int(signal.SIGCONT))
        assert state_of(started.pid) != "T"
        assert state_of(command) != "T"


@pytest.mark.parametrize("group", [[], ["-g"]])
def test_stop_signals_as_they_come(group: list[str]) -> None:
    """Without -g, or rewritten, the command gets the signal and may go on; init is stopped. Dropped, nothing is."""
    rewrites = [arg for signum in STOPS for arg in ("-r", f"{int(signum)}:{int(signum)}")] if group else []
    with init("-s", *group, *rewrites, *TELLS) as started:
        started.ready()
        for signum in STOPS:
            started.send(signum)
            assert started.line() == str(int(signum))
            until(lambda: state_of(started.pid) == "T")
            started.send(signal.SIGCONT)
            assert started.line() == str(int(signal.SIGCONT))
            assert state_of(started.pid) != "T"
    with init("-s", *group, "-r", "TSTP:0", *TELLS) as started:
        started.ready()
        started.send(signal.SIGTSTP)
        until(started.has_taken_all)
        started.send(signal.SIGUSR1)
        assert started.line() == "10"


# Orphans -------------------------------------------------------------------------------------------------------------

ORPHANS = """
exec 3<&0
for i in $(seq 100); do (sh -c 'read x <&3; exit 9' &) ; done
exec "$@"
"""


def test_orphans_are_collected(reaping: Sequence[str]) -> None:
    """A hundred orphans are given to it, and collected when they end. As PID 1 it hears SIGTERM, too (L5, L6)."""
    with Started(*reaping, "sh", "-c", ORPHANS, "sh", *ENDS) as started:
        started.ready()
        pid = the_init(started)
        until(lambda: len(children_of(pid)) == 101)
        started.open()
        until(lambda: len(children_of(pid)) == 1)
        os.kill(pid, signal.SIGTERM)
        code, out, err = started.finish()
        assert (code, out, err) == (7, "", "")


def test_orphans_that_die_at_random(reaping: Sequence[str]) -> None:
    """Orphans that end while others are being made are all collected, and the status of the command is its own (L1)."""
    script = "for i in $(seq 100); do (sh -c 'exit 9' &) ; done; echo ready $$; read x; exit 3"
    with Started(*reaping, "sh", "-c", script) as started:
        started.ready()
        pid = the_init(started)
        until(lambda: len(children_of(pid)) == 1)
        started.open()
        assert started.finish() == (3, "", "")


@pytest.mark.parametrize("option", ["-sw", "-s"])
def test_orphans_are_told(option: str) -> None:
    """-w tells of each orphan that was collected, and not of the command; without it that is not worth a word."""
    with init(option, "sh", "-c", "(sh -c 'echo $$; exit 9' &); read x; exit 3") as started:
        orphan = started.line()
        until(lambda: not state_of(int(orphan)))
        started.open()
        code, _, err = started.finish()
    assert code == 3
    assert err == (f"anyreap init: Reaped zombie process with pid={orphan}\n" if option == "-sw" else "")


def test_neither_pid_1_nor_a_subreaper() -> None:
    """It warns, in the words of the remedy, where no orphan would be given to it. -s and a set bit are silent."""
    with init("true") as started:
        code, _, err = started.finish()
    assert code == 0
    assert "neither PID 1 nor a subreaper" in err
    assert "zombie reaping won't work" in err
    assert "Run it as PID 1, or with -s" in err
    with init("-s", "true") as started:
        assert started.finish() == (0, "", "")
    become = "from anyreap import _kernel; _kernel.set_subreaper(on=True); os.execv(sys.argv[1], sys.argv[1:])"
    with Started(sys.executable, "-c", "import os, sys; " + become, *INIT, "true") as started:
        assert started.finish() == (0, "", "")


def test_an_orphan_outlives_it() -> None:
    """It ends with its command, not with the last orphan."""
    with init("-s", "sh", "-c", "exec 3<&0;" + PAIR, "sh", *TELLS) as started:
        orphan = started.ready()
        try:
            started.open()
            assert started.popen.wait(20) == 4
            assert state_of(orphan) == "S"
        finally:
            os.kill(orphan, signal.SIGKILL)


# The terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """A process that leads a session on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.execvp(command[0], command)
            finally:
                os._exit(127)
        self._seen = b""

    def foreground(self) -> int:
        """The process group in the foreground."""
        return os.tcgetpgrp(self.fd)

    def write(self, text: str) -> None:
        """Type something."""
        os.write(self.fd, text.encode())

    def read_until(self, text: str) -> str:
        """Read what is shown, to a text and with it."""
        while text.encode() not in self._seen:
            self._seen += os.read(self.fd, 1024)
        before, found, self._seen = self._seen.partition(text.encode())
        return (before + found).decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        end_descendants(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


def test_ctrl_c_once() -> None:
    """On a terminal the command is in the foreground, and a Ctrl-C reaches it once."""
    with Terminal(*INIT, "-s", *TELLS) as terminal:
        terminal.read_until("ready ")
        command = int(terminal.read_until("\n"))
        assert terminal.foreground() == command
        terminal.write("\x03")
        terminal.read_until("2\r\n")
        os.kill(terminal.pid, signal.SIGUSR1)
        assert "2" not in terminal.read_until("10\r\n")


def test_a_session_with_the_terminal() -> None:
    """With -g the command leads a session that has the terminal, and is not told that init's has lost it."""
    with Terminal(*INIT, "-s", "-g", *TELLS) as terminal:
        terminal.read_until("ready ")
        command = int(terminal.read_until("\n"))
        assert os.getsid(command) == command == terminal.foreground()
        os.kill(terminal.pid, signal.SIGUSR1)
        assert terminal.read_until("\n") == "10\r\n"  # not 1, SIGHUP
        os.kill(terminal.pid, signal.SIGHUP)
        assert terminal.read_until("\n") == "1\r\n"


def test_job_control() -> None:
    """A shell can start it in the background, have it in the foreground, stop it with Ctrl-Z, and have it back."""
    with Terminal("sh", "-im") as shell:
        shell.write(" ".join([*INIT, "-s", "cat", "&\n"]))
        until(lambda: children_of(shell.pid))
        (pid,) = children_of(shell.pid)
        until(lambda: children_of(pid))
        (cat,) = children_of(pid)
        # cat reads from a terminal that is not its own, and is stopped. The shell must learn of that.
        until(lambda: state_of(cat) == "T" == state_of(pid))
        assert shell.foreground() == shell.pid
        ctrl_z = functools.partial(shell.write, "\x1a")
        for stop in (ctrl_z, functools.partial(os.kill, pid, signal.SIGTSTP), ctrl_z):
            shell.write("fg\n")
            until(lambda: shell.foreground() == cat and "T" not in state_of(cat) + state_of(pid))
            stop()
            until(lambda: state_of(cat) == "T" == state_of(pid) and shell.foreground() == shell.pid)
        shell.write("fg\n")
        until(lambda: shell.foreground() == cat)
        shell.write("\x04")
        until(lambda: not state_of(pid) and shell.foreground() == shell.pid)


def test_the_terminal_is_given_back() -> None:
    """When it has ended, the terminal is its starter's again, also where that is no shell with job control."""
    with Terminal("sh", "-c", " ".join([*INIT, "-s", "true;", "echo done;", "exec cat"])) as terminal:
        terminal.read_until("done\r\n")
        assert terminal.foreground() == terminal.pid
        terminal.write("hello\n")
        terminal.read_until("hello\r\nhello\r\n")


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "no command"),
        (["-s"], "no command"),
        (["--yolo", "true"], "--yolo"),
        (["-e", "256", "true"], "'256'"),
        (["-e", "-1", "true"], "'-1'"),
        (["-e", "x", "true"], "'x'"),
        (["-p", "SIGNOTHING", "true"], "'SIGNOTHING'"),
        (["-p", "0", "true"], "'0'"),
        (["-p", "_UNBLOCK", "true"], "'_UNBLOCK'"),
        (["-r", "", "true"], "''"),
        (["-r", "herp", "true"], "'herp'"),
        (["-r", "herp:derp", "true"], "'herp'"),
        (["-r", "15", "true"], "'15'"),
        (["-r", "15::12", "true"], "':12'"),
        (["-r", "15:derp", "true"], "'derp'"),
        (["-r", "15:12", "-r", "1:32", "true"], "'32'"),
        (["-r", "0:15", "true"], "'0'"),
        (["-r", "KILL:TERM", "true"], "SIGKILL"),
        (["-r", "CHLD:TERM", "true"], "SIGCHLD"),
        (["-r"], "-r"),
    ],
)
def test_bad_options(args: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What is wrong is named, nothing is started, and the exit code is 1."""
    assert _init.main(args) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("anyreap init: ")
    assert named in err
    assert err.endswith("; see anyreap init --help\n")


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["true"], ["true"]),
        (["--", "true"], ["true"]),
        (["-s", "sh", "-c", "x", "--", "-g"], ["sh", "-c", "x", "--", "-g"]),
        (["-sg", "--", "-x"], ["-x"]),
    ],
)
def test_options_end_where_the_command_begins(args: list[str], command: list[str]) -> None:
    """Everything from the command on is the command's, with -- before it or without."""
    options = _init.parse(args)
    assert options.command == command
    assert options.group is ("g" in args[0])


@pytest.mark.parametrize("text", ["TERM", "SIGTERM", "term", "15"])
def test_signals_by_name_and_number(text: str) -> None:
    """A signal is given by its name, with or without SIG, or by its number."""
    assert _init.parse(["-p", text, "true"]).parent_death == signal.SIGTERM


@pytest.mark.parametrize("option", ["-sv", "-svv"])
def test_verbosity(option: str) -> None:
    """-v tells of the command's start and end, -vv of signals and orphans too."""
    with init(option, "sh", "-c", "echo ready $$; read x; exit 3") as started:
        command = started.ready()
        started.send(signal.SIGWINCH)
        until(started.has_taken_all)
        started.open()
        code, _, err = started.finish()
    assert code == 3
    said = [
        f"anyreap init: started sh as {command}\n",
        "anyreap init: SIGWINCH has come\n",
        f"anyreap init: SIGWINCH goes to the command {command}\n",
        f"anyreap init: {command}, the command: exited with code 3\n",
    ]
    assert err == "".join(said if option == "-svv" else said[::3])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Help goes to stdout, and tells of every option."""
    assert _init.main(["--help"]) == 0
    text = capsys.readouterr().out
    for option in _init.LONG_OPTIONS:
        assert f"--{option.rstrip('=')}" in text
    for letter in _init.OPTIONS.replace(":", ""):
        assert f"  -{letter}, " in text


def test_nothing_heavy_is_imported() -> None:
    """An init stays in memory for good, and starts first: it imports no event loop, and nothing that needs one."""
    code = "import sys; from anyreap.__main__ import main; main(['init', '-s', 'true']); print(*sys.modules)"
    with Started(sys.executable, "-c", code) as started:
        imported = set(started.finish()[1].split())
    assert "anyreap._init" in imported
    assert not imported & {"trio", "anyio", "asyncio", "subprocess", "anyreap._reaper", "anyreap._run"}


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """`anyreap` and `python -m anyreap` are one; its help names what there is, and errors name it too."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="anyreap")
    assert script.load() is __main__.main
    assert __main__.main(["--help"]) == 0
    assert "anyreap init" in capsys.readouterr().out
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"anyreap {importlib.metadata.version('anyreap')}\n"
    assert __main__.main([]) == 2
    assert "usage: anyreap" in capsys.readouterr().err
    assert __main__.main(["fly"]) == 2
    assert "'fly'" in capsys.readouterr().err
    assert __main__.main(["init", "--help"]) == 0
    assert "--rewrite FROM:TO" in capsys.readouterr().out
