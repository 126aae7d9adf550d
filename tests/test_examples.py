"""Each example is run as its docstring says, and watched from outside: what it prints, and what it leaves."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import anyreap
from tests.harness import state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write files where they are started."""
    monkeypatch.chdir(tmp_path)


def command(name: str, *args: str) -> list[str]:
    """The command line of an example."""
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *args]


def run(name: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example to its end."""
    return subprocess.run(command(name, *args), capture_output=True, text=True, timeout=50, check=False, input=stdin)


@contextlib.contextmanager
def started(words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start an example that does not end by itself, and kill it at the end if it is there still."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], Any]) -> Any:
    """Ask until the answer is yes: for what is seen in /proc only, or on a port."""
    deadline = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)
    return found


def children_of(pid: int) -> list[int]:
    """The children of any process."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it, or one of its threads, has ended
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended, and been collected by its parent, or waits for that."""
    return state_of(pid) in ("", "Z")


def get(url: str, data: bytes | None = None) -> tuple[int, bytes]:
    """Ask a server: the code of its answer, and the answer; (0, b"") if it does not listen yet."""
    try:
        with urllib.request.urlopen(url, data, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except urllib.error.URLError:
        return 0, b""


def listens(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_every_example_is_run() -> None:
    """No example is forgotten: each is named in the tests."""
    tests = "".join(Path(__file__).with_name(name).read_text() for name in ("test_examples.py", "test_docs.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in tests, path.name


def test_prefork_server() -> None:
    """Workers answer; one that is killed is named and replaced; SIGTERM ends all of them."""
    with started(command("prefork_server.py", "--port", "0", "--workers", "2"), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split()[-1]
        before = set(until(lambda: len(pids := children_of(server.pid)) == 2 and pids))
        code, answer = get(f"http://127.0.0.1:{port}/")
        victim = int(answer.split()[-1])
        assert (code, victim in before) == (200, True)
        os.kill(victim, signal.SIGKILL)
        assert server.stdout.readline() == f"worker {victim} killed by SIGKILL\n"
        assert int(get(f"http://127.0.0.1:{port}/")[1].split()[-1]) in before - {victim}
        after = until(lambda: len(pids := children_of(server.pid)) == 2 and pids)
        server.terminate()
        assert server.wait() == 0
    assert all(gone(pid) for pid in after)


def test_job_queue() -> None:
    """A command that fails is tried again; what fails each time is given up, and the exit code says so."""
    commands = ["echo hello", "test -e flag || { touch flag; exit 3; }", "kill -KILL $$"]
    done = run("job_queue.py", "--jobs", "2", "--tries", "3", "--pause", "0.01", stdin="\n".join(commands))
    assert (done.returncode, done.stderr) == (1, "")
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            "hello",
            f"exited with code 0, try 1 of 3: {commands[0]}",
            f"exited with code 3, try 1 of 3: {commands[1]}",
            f"exited with code 0, try 2 of 3: {commands[1]}",
            *(f"killed by SIGKILL, try {number} of 3: {commands[2]}" for number in (1, 2, 3)),
            f"given up: {commands[2]}",
        ]
    )


def test_ci_runner(tmp_path: Path) -> None:
    """A job that succeeds leaves nothing in the background; the first one that does not succeed is the last one."""
    Path("pipeline.toml").write_text(
        """
        [[job]]
        name = "serve"
        run = "sleep 3600 & echo $!"
        [[job]]
        name = "slow"
        run = "sleep 3600 & echo $!; wait"
        seconds = 0.3
        [[job]]
        name = "never"
        run = "touch never"
        """
    )
    done = run("ci_runner.py", "pipeline.toml")
    assert (done.returncode, done.stderr) == (1, "")
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"serve: exited with code 0 \([\d.]+ s CPU, \d+ MiB\)", first)
    assert second.startswith("slow: took longer than 0.3 s (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline.toml", "serve.log", "slow.log"]
    for log in ("serve.log", "slow.log"):
        assert gone(int(Path(log).read_text()))


@pytest.mark.parametrize(
    ("limit", "script", "how"),
    [
        ("mebibytes = 200", "'bytearray(1 << 30)'", "exited with code 1"),
        ("cpu_seconds = 1", "'while True: pass'", "killed by SIGKILL"),
    ],
    ids=["memory", "cpu"],
)
def test_ci_runner_limits(limit: str, script: str, how: str) -> None:
    """A job that wants more memory does not get it, and one that wants more CPU time is killed."""
    Path("pipeline.toml").write_text(f'[[job]]\nname = "greedy"\nrun = "exec {sys.executable} -Sc {script}"\n{limit}\n')
    done = run("ci_runner.py", "pipeline.toml")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"greedy: {how} (")


def test_pty_recorder() -> None:
    """The program has a terminal of its own, and what it shows is recorded; its exit code is handed on."""
    done = run("pty_recorder.py", "session.cast", "sh", "-c", "tty >/dev/null && stty size; exit 3")
    assert (done.returncode, done.stderr, done.stdout) == (3, "", "24 80\n")
    header, *events = map(json.loads, Path("session.cast").read_text().splitlines())
    assert (header["version"], header["width"], header["height"]) == (2, 80, 24)
    assert "".join(text for _, kind, text in events if kind == "o") == "24 80\r\n"


def test_pty_recorder_on_a_terminal() -> None:
    """On a terminal it hands on the size and the keys, and leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(ours, (40, 100))
        before = termios.tcgetattr(theirs)
        words = command("pty_recorder.py", "session.cast", "sh", "-c", "stty size; read word; exit $word")
        with subprocess.Popen(words, stdin=theirs, stdout=theirs, start_new_session=True) as recorder:
            seen = b""
            while b"40 100\r\n" not in seen:
                assert select.select([ours], [], [], 30)[0], seen
                seen += os.read(ours, 1024)
            assert termios.tcgetattr(theirs) != before
            os.write(ours, b"5\r")
            assert recorder.wait(30) == 5
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_pool_watcher() -> None:
    """While the workers live the results come; when one is killed there is an error that says so, and no hang."""
    done = run("pool_watcher.py")
    assert (done.returncode, done.stderr) == (0, "")
    results, died = done.stdout.splitlines()
    assert json.loads(results) == [number**2 for number in range(10)]
    assert re.fullmatch(r"SpawnPoolWorker-\d+, pid \d+, killed by SIGKILL", died)


on_subreaper = pytest.mark.skipif(
    "subreaper" not in inspect.signature(anyreap.open_reaper).parameters, reason="open_reaper has no subreaper yet"
)


@on_subreaper
def test_container_init() -> None:
    """Its exit code is that of the program; orphans are collected, and ended if they run on."""
    orphans = "(setsid sh -c 'echo $$ >&9; exit 7' &); (setsid sh -c 'echo $$ >&9; exec sleep 3600' &)"
    script = f"mkfifo pids; exec 9<>pids; {orphans}; read a <&9; read b <&9; echo $a $b; exit 3"
    done = run("container_init.py", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (3, "")
    assert [state_of(int(pid)) for pid in done.stdout.split()] == ["", ""]


@on_subreaper
def test_container_init_hands_on_signals() -> None:
    """What it is sent the program gets."""
    words = command("container_init.py", "sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
    with started(words, stdout=subprocess.PIPE) as init:
        assert init.stdout is not None
        assert init.stdout.readline() == "ready\n"
        init.terminate()
        assert init.wait() == 7


# Those that stand on other people's servers --------------------------------------------------------------------------


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skip a test where packages are missing: `make examples` has them."""
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: run `make examples`")


@needs("fastapi", "uvicorn")
def test_fastapi_converters(free_tcp_port: int) -> None:
    """A converter's output is the answer, its failure a 422, its slowness a 504; nothing of it is left, either then or
    when the server is stopped meanwhile.
    """
    url = f"http://127.0.0.1:{free_tcp_port}/convert/"
    with started([sys.executable, str(EXAMPLES / "fastapi_converters.py"), str(free_tcp_port)]) as server:

        def slow() -> tuple[threading.Thread, list[tuple[int, bytes]], int]:
            """Start a slow request: its thread, its answer, and the pid of its converter's child."""
            answers: list[tuple[int, bytes]] = []
            thread = threading.Thread(target=lambda: answers.append(get(url + "slow", b"x")))
            thread.start()
            shell = until(lambda: children_of(server.pid))[0]
            return thread, answers, until(lambda: children_of(shell))[0]

        assert until(lambda: get(url + "sort", b"b\na\n")[0]) == 200
        assert get(url + "sort", b"b\na\n") == (200, b"a\nb\n")
        code, answer = get(url + "gzip", b"x" * 1_000_000)
        assert (code, len(answer) < 10_000) == (200, True)
        assert get(url + "gunzip", answer) == (200, b"x" * 1_000_000)
        code, answer = get(url + "gunzip", b"no gzip")
        assert (code, b"exited with code 1" in answer) == (422, True)
        assert get(url + "nothing", b"")[0] == 404

        thread, answers, sleep = slow()
        thread.join()
        assert answers[0][0] == 504
        until(lambda: gone(sleep))
        assert children_of(server.pid) == []

        thread, _, sleep = slow()
        server.terminate()
        assert server.wait() == -signal.SIGTERM  # uvicorn raises it again when all is done
        thread.join()
        until(lambda: gone(sleep))


@needs("hypercorn")
def test_hypercorn_streams(free_tcp_port: int) -> None:
    """What the program writes comes while it writes; it is ended when the client goes away, and by SIGTERM."""

    def listen() -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", free_tcp_port, timeout=30)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline()
        return contextlib.closing(connection)

    with started([sys.executable, str(EXAMPLES / "hypercorn_streams.py"), str(free_tcp_port)]) as server:
        until(lambda: listens(free_tcp_port))
        with listen():
            (first,) = children_of(server.pid)
        until(lambda: not children_of(server.pid))
        assert gone(first)
        with listen():
            (second,) = children_of(server.pid)
            server.terminate()
            assert server.wait() == 0
        assert gone(second)


@needs("distributed")
def test_dask_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each `ExitStatus` comes back from a worker process; one that is killed takes its command with it, which is begun
    anew on another one.
    """
    monkeypatch.setenv("DASK_TEMPORARY_DIRECTORY", str(tmp_path))
    killing = "test -e pid || { echo $$ >pid; kill -KILL $PPID; exec sleep 3600; }; echo begun anew"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "dask_jobs.py"), "echo hello", "exit 3", "kill -SEGV $$", killing],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1, done.stderr
    assert sorted(re.sub(r"\d+ KiB", "KiB", done.stdout).splitlines()) == sorted(
        [
            "exited with code 0, KiB: echo hello",
            "hello",
            "exited with code 3, KiB: exit 3",
            "killed by SIGSEGV, KiB: kill -SEGV $$",
            f"exited with code 0, KiB: {killing}",
            "begun anew",
        ]
    )
    assert gone(int(Path("pid").read_text()))
