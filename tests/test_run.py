"""`anyreap run`, from outside: its output, its exit status, its children, and its table on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any, Self

import pytest

import anyreap
from anyreap import _run
from anyreap._show import LINE
from tests.harness import state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BOUND = 20  # seconds; who needs them has failed
LAUNCH = "import sys; from anyreap._run import main; sys.exit(main(sys.argv[1:]))"
WITHOUT_RICH = "import sys; sys.modules['rich'] = None; sys.modules['rich.console'] = None;" + LAUNCH
# The tests themselves may run under nohup(1), or in the background of a shell without job control.
HEARING = "from signal import *\nfor n in (SIGINT, SIGHUP, SIGQUIT, SIGTSTP): signal(n, SIG_DFL)\n"
ENDLESS = "sleep 3600"


def argv(*args: str, launch: str = LAUNCH) -> list[str]:
    """How to start it."""
    return [sys.executable, "-W", "error", "-c", HEARING + launch, *args]


def run(*args: str, launch: str = LAUNCH, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    # Its peak memory begins with what it was forked from (`man 2 getrusage`): from a shell, not from all the tests.
    small = ["/bin/sh", "-c", '"$@"; exit $?', "sh"]
    done = subprocess.run([*small, *argv(*args, launch=launch)], timeout=BOUND, check=False, **options)
    assert b"Traceback" not in (done.stderr or b""), done.stderr.decode()
    return done


@contextlib.contextmanager
def started(*args: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start it, with its output in a pipe, and its messages in another one."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(argv(*args), **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(BOUND)
                except subprocess.TimeoutExpired:
                    process.kill()


def until(condition: Callable[[], Any]) -> Any:
    """Wait for what no event tells of. Returns what it was when it was true."""
    end = time.monotonic() + BOUND
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    return state_of(pid) in ("", "Z")


def records(path: Path) -> list[dict[str, Any]]:
    """What `--json` has written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A FIFO to hold commands at."""
    return Gate(tmp_path / "gate")


class Gate:
    """A FIFO: a command that runs `wait` goes on once the test opens it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self.wait = f"read x < {path}"

    def open(self) -> None:
        """Let one go. Blocks until it is there."""
        self._path.write_text("\n")


# The exit status, and how commands end --------------------------------------------------------------------------------


def test_success_is_silent_about_itself_on_standard_output() -> None:
    """What commands write goes to standard output, each line with its name; what is said of them to standard error."""
    done = run("echo one; echo two >&2", "true")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [b"echo | one", b"echo | two"]
    assert b"anyreap run: 2 ok in" in done.stderr


def test_the_first_failure_in_time_is_the_exit_status(gate: Gate) -> None:
    """The exit status is that of the command that failed first, wherever it stands; the others run on."""
    with started(f"{gate.wait}; echo late; exit 3", "exit 2") as process:
        assert process.stderr is not None
        assert b"exited with code 2" in process.stderr.readline()
        gate.open()
        out, err = process.communicate(timeout=BOUND)
    assert process.returncode == 2
    assert b"late" in out
    assert b"2 failed" in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["kill -KILL $$"], 137, "killed by SIGKILL"),
        (["nosuchprogram"], 127, "exited with code 127"),
        (["--", "nosuchprogram", "x"], 127, "can't start nosuchprogram x: No such file or directory"),
        (["--", "/etc/passwd"], 126, "can't start /etc/passwd: Permission denied"),
        (["--", "make all"], 127, "a command for the shell is written without --"),
        (["true", "--", "nosuchprogram"], 127, "1 failed, 1 ok"),
    ],
)
def test_a_failure_has_the_status_that_a_shell_has(args: list[str], code: int, said: str) -> None:
    """128+n for a signal, 127 and 126 for what can't be started, and a message that says why."""
    done = run(*args)
    assert done.returncode == code
    assert said in done.stderr.decode()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no command"),
        (["--names", "a,b", "true"], "--names has 2 for 1 commands"),
        (["--signal", "NOSUCH", "true"], "is no signal"),
        (["--grace", "-1", "true"], "is no number of seconds"),
    ],
)
def test_misuse_runs_nothing(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What can't be meant is an error of usage."""
    with pytest.raises(SystemExit) as leaving:
        _run.main(args)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


def test_fail_fast_ends_the_others() -> None:
    """With --fail-fast the others are ended when one fails, and the status is that of the failure."""
    done = run("--fail-fast", ENDLESS, "exit 7")
    assert done.returncode == 7
    assert b"sleep: stopped: killed by SIGTERM" in done.stderr


def test_a_timeout_ends_all_with_124(tmp_path: Path) -> None:
    """What runs when the time is up is ended, by the signal and grace that were asked for; 124, as of timeout(1)."""
    log = tmp_path / "log"
    done = run(
        *("--timeout", "0.5", "--grace", "0.1", "--signal", "int", "--json", str(log)),
        *("trap '' INT; while :; do sleep 0.05; done", "trap 'echo bye; exit 0' INT; while :; do sleep 0.05; done"),
    )
    assert done.returncode == 124
    assert b"bye" in done.stdout
    ended = {record["how"]: record["stopped"] for record in records(log)}
    assert ended == {"killed by SIGKILL": "timed out", "exited with code 0": "timed out"}


def test_json_tells_of_each_exit(tmp_path: Path) -> None:
    """One object for each exit: who, how, when, and what it used."""
    log = tmp_path / "log"
    before = time.time()
    hungry = "import time\nb = bytearray(b'x') * (96 << 20)\nwhile time.process_time() < 0.2: pass"
    done = run("--names", "dead,hog", "--json", str(log), "kill -TERM $$", "--", sys.executable, "-c", hungry)
    assert done.returncode == 143
    dead, hog = records(log)
    assert (dead["name"], dead["command"]) == ("dead", "kill -TERM $$")
    assert (dead["how"], dead["exit_code"], dead["signal"]) == ("killed by SIGTERM", None, "SIGTERM")
    assert (hog["name"], hog["command"]) == ("hog", [sys.executable, "-c", hungry])
    assert (hog["how"], hog["exit_code"], hog["signal"]) == ("exited with code 0", 0, None)
    assert (hog["orphan"], hog["core_dumped"], hog["stopped"]) == (False, False, None)
    assert hog["pid"] > 1
    assert before <= hog["start"] < hog["end"] <= time.time()
    assert hog["user_cpu"] + hog["system_cpu"] >= 0.2
    assert hog["peak_memory"] > 96 << 20
    assert hog["peak_memory_exact"]
    # The shell has used less than anyreap had when it started it, and the kernel doesn't tell how much less.
    assert not dead["peak_memory_exact"]


def test_a_log_that_can_not_be_written_is_a_failure() -> None:
    """When --json can't be written there is a message, the commands run on, and the run is no success.

    When it can't be opened nothing is started.
    """
    done = run("--json", "/dev/full", "echo one", "echo two")
    assert done.returncode == 1
    assert b"can't write /dev/full: No space left on device" in done.stderr
    assert sorted(done.stdout.splitlines()) == [b"echo one | one", b"echo two | two"]
    done = run("--json", "/nosuch/file", "echo one")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"anyreap run: can't write /nosuch/file: No such file or directory\n"


@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])
def test_it_runs_on_each_backend(backend: str) -> None:
    """The loop makes no difference."""
    done = run("--backend", backend, "--fail-fast", "echo one; exit 3", ENDLESS)
    assert done.returncode == 3
    assert done.stdout == b"echo  | one\n"
    assert b"stopped: killed by SIGTERM" in done.stderr


def test_trio_is_not_imported_on_asyncio() -> None:
    """The default loop is asyncio, and then nobody pays for the import of trio."""
    launch = "import sys; from anyreap._run import main; main(sys.argv[1:]); sys.exit('trio' in sys.modules)"
    assert run("true", "true", launch=launch).returncode == 0


# Lines ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "names"),
    [
        (["true -C api", "true -C web"], ["true api", "true web"]),
        (["PATH=$PATH true", "/bin/false x"], ["true", "false"]),
        (["true", "true", "true"], ["true 1", "true 2", "true 3"]),
        (["true a/b; false", "true c"], ["true a/b", "true c"]),
        (["true 'open", "\x1b[2J"], ["true", "?[2J"]),
        (["true " + "x" * 50, "true " + "y" * 50], ["true xxxxxxxxxxxxxx…", "true yyyyyyyyyyyyyy…"]),
    ],
)
def test_names_are_found_in_the_words(commands: list[str], names: list[str]) -> None:
    """A command is called by its program, and by the word that tells it apart; nothing in it moves a cursor."""
    assert _run._names(commands) == names


def test_names_are_as_wide_as_they_are_on_a_terminal() -> None:
    """Wide characters take two columns, so that the lines of all begin in one column."""
    done = run("--names", "日本,a", "echo one", "true; echo two")
    assert sorted(done.stdout.decode().splitlines()) == ["a    | two", "日本 | one"]


def test_lines_of_several_commands_are_never_mixed() -> None:
    """A line comes out whole, however small the pieces are in which it was written, and whoever else writes."""
    pieces = "import os\nfor n in range(300):\n for c in b'%d-' % n * 3 + b'{}\\n': os.write(1, bytes([c]))"
    commands = [f'{sys.executable} -S -c "{pieces.format(letter)}"' for letter in "abc"]
    done = run("--names", "a,b,c", *commands)
    for letter in "abc":
        mine = [line for line in done.stdout.decode().splitlines() if line.startswith(letter)]
        assert mine == [f"{letter} | " + f"{n}-" * 3 + letter for n in range(300)]


def test_odd_bytes_come_out_as_they_went_in() -> None:
    """Bytes that are no UTF-8 are not touched, a line without an end is given one, an empty one stays."""
    done = run("--names", "a,b", r"printf '\377\376\n\n\000tail'", "true")
    assert done.stdout.split(b"\n") == [b"a | \xff\xfe", b"a | ", b"a | \0tail", b""]


def test_carriage_returns_overwrite() -> None:
    """Of a progress bar comes out what a terminal would show at the end of the line; CR LF is an end of line."""
    done = run("--names", "a,b", r"printf '10%%\r20%%\r\rdone\r\nnext\r\n\r30%%\r'; printf '\rlast\r\r'", "true")
    assert done.stdout == b"a | done\na | next\na | last\n"


def test_a_long_line_comes_in_marked_pieces() -> None:
    """A line that is too long to be kept is cut, never within a character, and each further piece is marked."""
    text = "é" * LINE  # of two bytes
    program = f"import sys; sys.stdout.buffer.write(b'x' + 'é'.encode() * {LINE}); print(); print('next')"
    done = run("--names", "a,b", "true", "--", sys.executable, "-c", program)
    first, *more, last = done.stdout.decode().splitlines()
    assert first.startswith("b | x")
    assert all(line.startswith("b + ") for line in more)
    assert len(more) == 2
    assert last == "b | next"
    assert "".join(line[4:] for line in (first, *more)) == "x" + text
    assert all(len(line.encode()) <= LINE + 4 for line in (first, *more))


@pytest.mark.parametrize("data", ["\\0", "x\\r"])
def test_a_line_that_never_ends_takes_no_memory(data: str, tmp_path: Path) -> None:
    """64 MB without a newline are written as they come, or overwritten, and not kept."""
    flood = f"import os\nb = b'{data}' * (1 << 20)\nfor _ in range(64 // (len(b) >> 20)): os.write(1, b)"
    watch = "import resource, sys; from anyreap._run import main; main(sys.argv[1:]);"
    watch += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    with (tmp_path / "out").open("wb") as out:
        done = run("true", "--", sys.executable, "-c", flood, launch=watch, stdout=out)
    assert int(done.stderr.split()[-1]) < 70_000  # KiB


def test_one_command_is_as_if_it_had_been_started_without_us() -> None:
    """One command has our input and output: the very bytes, both streams apart, and no prefix."""
    done = run("--", "sh", "-c", r"cat; printf 'a\rb'; echo err >&2; exit 3", stdin=None, input=b"in\xff\n")
    assert (done.returncode, done.stdout) == (3, b"in\xff\na\rb")
    assert done.stderr.splitlines()[0] == b"err"
    assert re.fullmatch(
        rb"anyreap run: sh: exited with code 3 after \d+ ms \(CPU \d+ ms, peak .*iB\)", done.stderr.splitlines()[1]
    )
    named = run("--names", "it", "--", "sh", "-c", "echo out; echo err >&2")
    assert named.stdout == b"it | out\nit | err\n"


def test_several_commands_have_no_input() -> None:
    """Of several commands none reads what others would miss."""
    done = run("cat", "cat -", stdin=None, input=b"secret")
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_reader_that_leaves_ends_the_commands() -> None:
    """With `| head` the commands are ended as SIGPIPE would have done, and the status says so; no traceback."""
    with started("yes", "yes no") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"yes")
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(BOUND) == 128 + signal.SIGPIPE
    assert b"Traceback" not in said
    assert b"stopped: killed by SIGTERM" in said


def test_a_full_disk_ends_the_commands() -> None:
    """When output can't be written there is a message, and the run is no success."""
    with open("/dev/full", "wb") as full:
        done = run("echo one; sleep 3600", ENDLESS, stdout=full)
    assert done.returncode == 1
    assert b"can't write to standard output: No space left on device" in done.stderr


def test_a_reader_that_does_not_read_stops_neither_timeouts_nor_signals(tmp_path: Path) -> None:
    """While the output goes nowhere, time runs on, exits are seen, and a second signal ends even the waiting."""
    log = tmp_path / "log"
    with started("--timeout", "0.3", "--json", str(log), "yes", "yes no") as process:
        until(lambda: len(records(log)) == 2)  # and nobody has read a byte
        assert {record["stopped"] for record in records(log)} == {"timed out"}
        assert process.poll() is None
        interrupt_until_it_ends(process)
    assert process.returncode == 128 + signal.SIGINT


def interrupt_until_it_ends(process: subprocess.Popen[bytes]) -> None:
    """Send SIGINT again and again: two that come at the same time count as one."""
    end = time.monotonic() + BOUND
    while process.poll() is None and time.monotonic() < end:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)


def test_closed_descriptors_do_no_harm(tmp_path: Path) -> None:
    """Started without standard descriptors, it takes none of their numbers for a file of its own."""
    log = tmp_path / "log"
    closed = f"import os; os.close(1); os.close(2); {LAUNCH}"  # the next file would be 1
    done = run("--json", str(log), "echo one", "echo two; exit 5", launch=closed)
    assert (done.returncode, done.stdout, done.stderr) == (5, b"", b"")
    assert sorted(record["command"] for record in records(log)) == ["echo one", "echo two; exit 5"]


# Signals, groups, and what is left behind -----------------------------------------------------------------------------

POLITE = "trap 'echo bye; exit 0' TERM; echo $$; while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM; echo $$; while :; do sleep 0.05; done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_commands_by_the_policy(number: signal.Signals) -> None:
    """One signal: the commands get theirs, what they still write is heard, and the status is 128+n."""
    with started("--names", "a,b", POLITE, ENDLESS) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"a | ")
        process.send_signal(number)
        out, err = process.communicate(timeout=BOUND)
    assert process.returncode == 128 + number
    assert out.splitlines()[-1] == b"a | bye"
    said = f"anyreap run: {number.name}: the commands get SIGTERM, and SIGKILL in 5 s; once more: at once"
    assert said in err.decode()
    assert b"b: interrupted: killed by SIGTERM" in err
    assert b"a: interrupted: exited with code 0" in err


def test_a_second_signal_ends_them_at_once() -> None:
    """Once more: SIGKILL, whatever the grace period is."""
    with started("--grace", "3600", "--names", "a,b", STUBBORN, "true") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[-1])
        interrupt_until_it_ends(process)
        assert process.stderr is not None
        assert b"a: interrupted: killed by SIGKILL" in process.stderr.read()
    assert process.returncode == 130
    assert gone(pid)


def test_two_signals_at_the_same_time_are_one() -> None:
    """Ctrl-C reaches the whole job, and who started us may send on what we have got: that is no second Ctrl-C."""
    slow = "trap 'sleep 0.3; echo bye; exit 0' TERM; echo; while :; do sleep 0.05; done"
    for _ in range(5):  # on a busy machine the second one may come too late to be the same
        with started("--names", "a,b", slow, slow) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.stderr.readline()  # it has been heard
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=BOUND)
        if out.count(b"bye") == 2:
            return
    pytest.fail("the second signal ended them at once")


def test_an_ignored_signal_stays_ignored(gate: Gate) -> None:
    """Under nohup(1) a SIGHUP ends nothing."""
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    command = [sys.executable, "-c", nohup + LAUNCH, f"echo $$; {gate.wait}", "true"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        gate.open()
        assert process.wait(BOUND) == 0


def test_what_a_command_leaves_in_its_group_is_ended_with_it(gate: Gate) -> None:
    """A command that has ended leaves nothing of its group behind, while others run on; with --no-group it has none."""
    with started("--names", "a,b", "sleep 3600 & echo $!", gate.wait) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[-1])
        until(lambda: gone(pid))
        gate.open()
        assert process.wait(BOUND) == 0
    done = run("--no-group", "--names", "a,b", "sleep 3600 & echo $!", "true")
    left = int(done.stdout.split()[-1])
    assert not gone(left)
    os.kill(left, signal.SIGKILL)


def escape(told: Path) -> str:
    """A command that ends when a daemon of it is in a session of its own, and writes the daemon's pid."""
    os.mkfifo(told)
    return f"setsid sh -c 'echo $$ > {told}; exec sleep 3600' & read pid < {told}; echo $pid"


def test_who_escapes_with_the_output_holds_up_nobody(tmp_path: Path) -> None:
    """A descendant that left the group lives on, as promised without --tree, and nobody waits for its output."""
    done = run("--names", "a,b", escape(tmp_path / "told"), "true")
    left = int(done.stdout.split()[-1])
    assert not gone(left)
    os.kill(left, signal.SIGKILL)


@pytest.mark.skipif("subreaper" not in inspect.signature(anyreap.open_reaper).parameters, reason="no subreaper yet")
def test_with_tree_nobody_escapes(tmp_path: Path) -> None:
    """With --tree a daemon is ended too, and told of."""
    log = tmp_path / "log"
    done = run("--tree", "--json", str(log), "--names", "a,b", escape(tmp_path / "told"), "true")
    left = int(done.stdout.split()[-1])
    assert gone(left)
    assert b"1 orphan collected" in done.stderr
    (orphan,) = [record for record in records(log) if record["orphan"]]
    assert (orphan["pid"], orphan["how"], orphan["name"]) == (left, "killed by SIGTERM", None)


def test_a_stop_stops_the_commands_too(gate: Gate) -> None:
    """Ctrl-Z stops the commands with us, though they are in sessions of their own; SIGCONT lets all go on."""
    with started("--names", "a,b", f"echo $$; {gate.wait}; exit 3", "true", process_group=0) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[-1])
        process.send_signal(signal.SIGTSTP)
        until(lambda: state_of(process.pid) == "T")
        until(lambda: state_of(pid) == "T")
        process.send_signal(signal.SIGCONT)
        gate.open()
        assert process.wait(BOUND) == 3


# The table, on a terminal ---------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal that `anyreap run` is the foreground job of, and what would be seen on it.

    As much of a terminal as is needed: lines, wrapping (anew when it is resized), going up, clearing what follows.
    """

    def __init__(self, *args: str, columns: int = 80, rows: int = 24, launch: str = LAUNCH, **environ: str) -> None:
        self.raw = b""
        self._lines: list[tuple[str, bool]] = [("", False)]  # the text, and whether it goes on in the next line
        self._y = self._x = 0
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        take = f"import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{launch}"
        env = {name: value for name, value in os.environ.items() if not re.search("COLO|COLUMNS|LINES|TERM|TTY", name)}
        env |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environ}
        self._process = subprocess.Popen(
            argv(*args, launch=take), stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=env
        )
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        """Make the window another size, and wrap what is there anew."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.columns, self.height = columns, rows
        lines: list[tuple[str, bool]] = []
        text, y = "", 0
        for number, (part, wrapped) in enumerate(self._lines):
            if number == self._y:
                y = len(lines) + (len(text) + self._x) // columns
            text += part
            if not wrapped:
                starts = range(0, max(1, len(text)), columns)
                lines += [(text[at : at + columns], at != starts[-1]) for at in starts]
                text = ""
        self._lines, self._y = lines, y

    def write(self, data: bytes) -> None:
        """Type something."""
        os.write(self._master, data)

    def echoes(self) -> bool:
        """Whether what is typed is shown."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def rows(self) -> list[str]:
        """What is on the screen."""
        return [text.rstrip() for text, _ in self._lines[-self.height :]]

    def until(self, text: str) -> None:
        """Wait until something is on the screen, and until what is being drawn is there as a whole."""
        while not any(text in row for row in self.rows()) or self.raw.count(b"\x1b[?2026h") > self.raw.count(b"2026l"):
            assert self.read(), "\n".join(self.rows())

    def ended(self) -> int:
        """Wait for its end. Returns the exit status."""
        while self.read():
            pass
        return self._process.wait(BOUND)

    def read(self) -> bool:
        """Wait for something to be written, and show it. False when nothing more will come."""
        ready, _, _ = select.select([self._master], [], [], BOUND)
        assert ready, "\n".join(self.rows())
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has it open any more
            return False
        self.raw += data
        for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", data.decode(errors="replace"), re.DOTALL):
            self._show(token)
        return True

    def _show(self, token: str) -> None:
        text, wrapped = self._lines[self._y]
        if token == "\r":
            self._x = 0
        elif token == "\n":
            self._y += 1
            self._lines += [("", False)] * (self._y == len(self._lines))
        elif token == "\x1b[J":
            self._lines[self._y :] = [(text[: self._x], False)]
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                self._y = max(self._y - int(token[2:-1]), len(self._lines) - self.height, 0)
        elif self._x == self.columns:
            self._lines[self._y] = (text, True)
            self._x = 0
            self._show("\n")
            self._show(token)
        else:
            self._lines[self._y] = (text[: self._x].ljust(self._x) + token + text[self._x + 1 :], wrapped)
            self._x += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._process.poll() is None:  # a second signal ends it at once
            self._process.terminate()
            if select.select([self._master], [], [], 0.2)[0]:
                self.read()  # else it could not say its last words
        os.close(self._master)


def test_a_table_is_shown_while_commands_run(tmp_path: Path) -> None:
    """Below the output, what each command does; at the end, how each ended; the terminal is left as it was found."""
    first, second = Gate(tmp_path / "a"), Gate(tmp_path / "b")
    with Terminal("--names", "api,web", f"echo out; {first.wait}", f"{second.wait}; exit 3") as terminal:
        terminal.until("api │ out")
        terminal.until("2 running")
        output, rule, headings, api, web = terminal.rows()
        assert output == "api │ out"
        assert re.fullmatch(r"2 running · \d+\.\d s ─+", rule)
        assert headings.split() == ["wall", "CPU", "peak"]
        assert re.fullmatch(r". api  running +\d\.\d s +echo out; read x < .*…", api)
        assert re.fullmatch(r". web  running +\d\.\d s +read x < .*…", web)
        assert terminal.raw.rfind(b"\x1b[?25l") > terminal.raw.rfind(b"\x1b[?25h")
        assert not terminal.echoes()
        terminal.write(b"\n\n")  # an impatient Enter moves nothing
        second.open()
        terminal.until("exited with code 3")
        assert terminal.rows()[1].startswith("1 failed, 1 running · ")
        first.open()
        assert terminal.ended() == 3
        assert terminal.echoes()
    output, rule, headings, api, web, summary, prompt = terminal.rows()
    assert output == "api │ out"
    assert rule == "─" * 80
    assert re.fullmatch(r"✔ api  ok  +\d.* m?s +\d+ ms +(≤ )?\d+ MiB  echo out;.*…", api)
    assert re.fullmatch(r"✘ web  exited with code 3 +\d.* m?s +\d+ ms +(≤ )?\d+ MiB  read.*…", web)
    assert re.fullmatch(r"1 failed, 1 ok · \d.* m?s", summary)
    assert prompt == ""
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l")


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50), (40, 10), (20, 5)])
def test_many_commands_leave_room_for_their_output(columns: int, rows: int) -> None:
    """Fifty take no more than half of the screen, and no line is too wide; those that failed are among those shown."""
    names = ",".join(f"n{number}" for number in range(50))
    with Terminal("--names", names, *[f"exec {ENDLESS}"] * 49, "exit 9", columns=columns, rows=rows) as terminal:
        terminal.until("1 failed, 49")
        shown = terminal.rows()
        assert len(shown) <= rows // 2
        assert all(len(row) <= columns for row in shown)
        if rows > 8:
            assert any(row.startswith("✘ n49  exited") for row in shown)
            assert any(" n0   running" in row for row in shown)
            assert re.fullmatch(r"  … and \d+ running", shown[-1])
        terminal.write(b"\x03")
        assert terminal.ended() == 130
    assert sum("interrupted" in row for row in terminal.rows()) >= min(rows - 5, 49) * (columns > 20)


def test_the_table_finds_its_place_when_the_window_is_resized(gate: Gate) -> None:
    """A narrower window wraps what was drawn; nothing of it is left, and nothing of the output is lost."""
    with Terminal("--names", "a,b", f"echo first; {gate.wait}", ENDLESS, columns=100) as terminal:
        terminal.until("a │ first")
        for columns in (60, 130, 50):
            terminal.resize(columns, 24)
            terminal.raw = b""
            while terminal.raw.count(b"2026l") < 2:
                assert terminal.read()
            rows = terminal.rows()
            assert rows[0] == "a │ first"
            assert len(rows) == 5, rows
            assert len(rows[1]) == columns


def test_colours_but_nothing_else_come_through(gate: Gate) -> None:
    """What a command writes can colour its own line; it can neither clear the screen nor reach another line."""
    odd = r"printf '\033[31mred\033[2J\033[H\033]0;title\007\n\033c\033[?1049hplain\n'"
    with Terminal("--names", "a,b", f"{odd}; {gate.wait}", "true") as terminal:
        terminal.until("plain")
        assert terminal.rows()[:2] == ["a │ red", "a │ plain"]
        gate.open()
        assert terminal.ended() == 0
    assert b"\x1b[31mred\x1b[0m" in terminal.raw
    for sequence in (b"\x1b[2J", b"\x1b[H", b"\x1b]0", b"\x1bc", b"1049"):
        assert sequence not in terminal.raw


def test_a_line_without_its_end_is_seen_in_the_table(tmp_path: Path) -> None:
    """A progress bar, or a question, is shown where the command is, until its line is whole."""
    first, second = Gate(tmp_path / "a"), Gate(tmp_path / "b")
    bar = rf"printf '10%%\r20%%'; {first.wait}; printf ' done\nmore\r'; {second.wait}; echo new"
    with Terminal("--names", "a,b", bar, "true") as terminal:
        terminal.until("20%")
        (row,) = [row for row in terminal.rows() if row.endswith("20%")]
        assert re.match(r". a  running ", row)
        first.open()
        terminal.until("more")  # and then it is overwritten
        second.open()
        assert terminal.ended() == 0
    assert terminal.rows()[:2] == ["a │ 20% done", "a │ new"]


COLOUR = re.compile(rb"\x1b\[[\d;]*(3[0-7]|9[0-7])[\d;]*m")


def test_without_colour(gate: Gate) -> None:
    """With NO_COLOR there is a table, and no colour in it."""
    with Terminal("--names", "a,b", f"echo out; {gate.wait}", "true", NO_COLOR="1") as terminal:
        terminal.until("1 running")
        terminal.until("a │ out")
        assert not COLOUR.search(terminal.raw)
    with Terminal("echo out", "true") as terminal:
        assert terminal.ended() == 0
        assert COLOUR.search(terminal.raw)


@pytest.mark.parametrize("why", ["dumb", "plain", "without rich"])
def test_plain_lines_on_a_terminal(why: str) -> None:
    """Where a cursor can't be moved, or nobody wants it to be, there is no escape sequence at all."""
    args = ["--plain"] if why == "plain" else []
    launch = WITHOUT_RICH if why == "without rich" else LAUNCH
    with Terminal(*args, "echo out", "true", launch=launch, TERM="dumb" if why == "dumb" else "xterm") as terminal:
        assert terminal.ended() == 0
    assert "echo | out" in terminal.rows()
    assert b"\x1b" not in terminal.raw


def test_output_that_goes_elsewhere_is_plain(tmp_path: Path, gate: Gate) -> None:
    """With `> file` the table is on the terminal, and the lines in the file are plain; before a pipe there is none."""
    out = tmp_path / "out"
    there = f"import os; os.dup2(os.open({str(out)!r}, os.O_WRONLY | os.O_CREAT), 1); {LAUNCH}"
    with Terminal("--names", "a,b", f"echo out; {gate.wait}", "true", launch=there) as terminal:
        terminal.until("1 running, 1 ok")
        gate.open()
        assert terminal.ended() == 0
    assert out.read_text() == "a | out\n"
    with Terminal("echo a", "echo b", launch=f"import os; r, w = os.pipe(); os.dup2(w, 1); {LAUNCH}") as terminal:
        assert terminal.ended() == 0
    assert b"\x1b" not in terminal.raw
    assert any("2 ok in" in row for row in terminal.rows())


def test_ctrl_c_on_a_terminal(gate: Gate) -> None:
    """Ctrl-C: the table says what happens, and when; the last words are above it; the status is 130."""
    polite = f"trap 'echo bye; {gate.wait}; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    with Terminal("--names", "a,b", "--grace", "1000", polite, f"exec {ENDLESS}") as terminal:
        terminal.until("a │ ready")
        terminal.write(b"\x03")
        terminal.until("b  interrupted: killed by SIGTERM")
        terminal.until("a │ bye")
        terminal.until("a  interrupted: ending")
        (rule,) = [row for row in terminal.rows() if "running" in row]
        assert re.match(r"1 running, 1 stopped · \d+\.\d s · SIGKILL in \d+ s · Ctrl-C again: at once ─", rule)
        gate.open()
        assert terminal.ended() == 130
    rows = [row for row in terminal.rows() if row != "a │ Terminated"]  # the sleep, which has got it too
    assert rows[:3] == ["a │ ready", "a │ bye", "─" * 80]


def test_in_the_background_there_is_no_table(gate: Gate) -> None:
    """A job in the background does not draw over what the shell does in the foreground."""
    child = "import os, sys\nif os.fork():\n  sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\nos.setpgid(0, 0)\n"
    with Terminal("--names", "a,b", f"echo out; {gate.wait}; exit 4", "true", launch=child + LAUNCH) as terminal:
        terminal.until("a │ out")
        gate.open()
        assert terminal.ended() == 4
    assert b"running" not in terminal.raw


def test_a_terminal_is_out_of_the_reach_of_a_group_of_its_own() -> None:
    """A command that asks for a password on the terminal is told that there is none: else it would be stopped."""
    with Terminal("--", "sh", "-c", "test -t 0; echo $?; exec 2>&1; cat /dev/tty") as terminal:
        assert terminal.ended() == 1
    assert terminal.rows()[0] == "1"
    assert "/dev/tty" in terminal.rows()[1]


def test_one_command_without_a_group_has_the_terminal() -> None:
    """With --no-group one command may talk with a person: there is no table, and it has the terminal itself."""
    ask = "test -t 0 && test -t 1 && printf 'name? ' && read x && echo $x"
    with Terminal("--no-group", "--", "sh", "-c", ask) as terminal:
        terminal.until("name?")
        terminal.write(b"anna\n")
        assert terminal.ended() == 0
    assert terminal.rows()[1] == "anna"
    assert b"\x1b" not in terminal.raw
