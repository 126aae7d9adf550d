"""`open_process`, `run_process`, what they return, and the streams."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import grp
import inspect
import os
import pickle
import pwd
import resource
import signal
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

import anyreap
from anyreap import _shutdown, _spawner
from tests.harness import Gate, await_death, children, is_zombie, numbers, open_fds, state_of, until
from tests.staging import Sent, on_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from anyio.abc import ByteReceiveStream

pytestmark = pytest.mark.anyio

PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
BOUND = 20  # seconds; who needs them has failed
MIB = 1 << 20
PIPE_SIZE = 65536
PATIENT = anyreap.Shutdown(grace=3600)
SLEEP = ["/bin/sleep", "3600"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a child as somebody else")


@pytest.fixture
async def reaper(source: Any, anyio_backend: tuple[str, Any]) -> AsyncIterator[anyreap.Reaper]:
    """An open reaper. Who waits for the grace period to pass has failed."""
    async with anyreap.open_reaper(source=source, shutdown=PATIENT, heartbeat=0.05) as reaper:
        yield reaper


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A pipe to hold children at."""
    with Gate() as gate:
        yield gate


class News:
    """A pipe on which children say that they are where the test wants them."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self.say = f"echo >/dev/fd/{self.write}"  # dash knows no descriptor above 9 by its number

    async def heard(self) -> None:
        """Wait until a child has said one thing more."""
        await anyio.wait_readable(self.read)
        os.read(self.read, 1)


@pytest.fixture
def news() -> Iterator[News]:
    """What children say."""
    news = News()
    yield news
    os.close(news.read)
    os.close(news.write)


async def line(stream: ByteReceiveStream | None) -> str:
    """Receive a line, byte by byte, so that what follows it stays in the pipe."""
    assert stream is not None
    found = b""
    with anyio.fail_after(BOUND):
        while not found.endswith(b"\n"):
            found += await stream.receive(1)
    return found.decode().strip()


async def rest(stream: ByteReceiveStream | None) -> bytes:
    """Receive all that there is to come."""
    assert stream is not None
    with anyio.fail_after(BOUND):
        return b"".join([data async for data in stream])


async def shell(reaper: anyreap.Reaper, script: str, **options: Any) -> str:
    """Run a shell with a script; what it wrote to its standard output."""
    with anyio.fail_after(BOUND):
        return (await reaper.run_process(["/bin/sh", "-c", script], **options)).stdout.decode().strip()


@contextmanager
def nothing_started() -> Iterator[None]:
    """See that no child and no descriptor is there that was not there before."""
    before = children(), numbers()
    yield
    assert (children(), numbers()) == before


# The parameters -------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_anyio() -> None:
    """Every parameter of `anyio.open_process` and `anyio.run_process` is there, of the same kind and with the same
    default.
    """
    ours = inspect.signature(anyreap.Reaper.open_process).parameters
    for name, parameter in inspect.signature(anyio.open_process).parameters.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    run = inspect.signature(anyreap.Reaper.run_process).parameters
    for name, parameter in inspect.signature(anyio.run_process).parameters.items():
        found = run.get(name, ours.get(name))
        assert found is not None, name
        assert (found.kind, found.default) == (parameter.kind, parameter.default), name


async def test_is_a_process_of_anyio(reaper: anyreap.Reaper) -> None:
    """A `Process` is an `anyio.abc.Process`, its streams are byte streams of anyio, and its repr says how it is."""
    async with await reaper.open_process(["/bin/cat"]) as process:
        assert isinstance(process, anyio.abc.Process)
        assert isinstance(process.stdin, anyio.abc.ByteSendStream)
        assert isinstance(process.stdout, anyio.abc.ByteReceiveStream)
        assert isinstance(process.stderr, anyio.abc.ByteReceiveStream)
        assert process.pid in children()
        assert (process.status, process.returncode, process.lost) == (None, None, False)
        assert repr(process) == f"<anyreap.Process pid={process.pid} running ['/bin/cat']>"
    assert process.returncode == 0
    assert repr(process) == f"<anyreap.Process pid={process.pid} exited with code 0 ['/bin/cat']>"


def test_not_made_by_hand() -> None:
    """A `Process` that nobody started is a TypeError that says who makes one."""
    with pytest.raises(TypeError, match=r"Reaper\.open_process"):
        anyreap.Process()


async def test_forms_of_a_command(reaper: anyreap.Reaper) -> None:
    """A string is a command of the shell, a sequence is a program and its arguments; paths and bytes are fine."""
    for command, output in (
        ("echo $((1 + 1))", b"2\n"),
        (b"echo $((1 + 1))", b"2\n"),
        (Path("/bin/pwd"), b"/\n"),
        (["echo", "$((1 + 1))"], b"$((1 + 1))\n"),
        ((Path("/bin/echo"), b"a", "b"), b"a b\n"),
    ):
        done = await reaper.run_process(command, cwd="/")
        assert (done.args, done.stdout) == (os.fspath(command) if isinstance(command, Path) else command, output)


async def test_cwd_env_and_umask(reaper: anyreap.Reaper, tmp_path: Path) -> None:
    """The child starts in the directory, the environment and the umask that are asked for."""
    assert (
        await shell(reaper, "pwd; echo $A; umask", cwd=tmp_path, env={"A": "b"}, umask=0o27) == f"{tmp_path}\nb\n0027"
    )
    assert await shell(reaper, "/usr/bin/env", env={"A": "b", "PWD": "/"}, cwd=b"/") == "A=b\nPWD=/"
    assert await shell(reaper, "umask") == f"{_umask():04o}"


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


async def test_pass_fds(reaper: anyreap.Reaper, news: News) -> None:
    """A descriptor in `pass_fds` is inherited, and no other."""
    found = await shell(reaper, f"ls /proc/$$/fd; {news.say}", pass_fds=(news.write,))
    assert set(map(int, found.split())) == {0, 1, 2, news.write}
    await news.heard()


async def test_session_and_group(reaper: anyreap.Reaper) -> None:
    """The child is in our session and group, or leads its own, or joins another group, as is asked for."""
    get_ids = "read -r _ _ _ _ group session _ </proc/self/stat; echo $$ $group $session"
    ours = f"{os.getpgrp()} {os.getsid(0)}"
    pid, _, ids = (await shell(reaper, get_ids)).partition(" ")
    assert ids == ours
    pid, _, ids = (await shell(reaper, get_ids, start_new_session=True)).partition(" ")
    assert ids == f"{pid} {pid}"
    pid, _, ids = (await shell(reaper, get_ids, process_group=0)).partition(" ")
    assert ids == f"{pid} {os.getsid(0)}"
    leader = await reaper.open_process(["/bin/cat"], process_group=0)
    pid, _, ids = (await shell(reaper, get_ids, process_group=leader.pid)).partition(" ")
    assert ids == f"{leader.pid} {os.getsid(0)}"


@needs_root
async def test_user_group_and_extra_groups(reaper: anyreap.Reaper) -> None:
    """The child runs as the user, the group and the supplementary groups that are asked for, by name or number."""
    user, group = pwd.getpwuid(65534).pw_name, grp.getgrgid(65534).gr_name
    assert await shell(reaper, "id -u; id -g; id -G", user=65534, group=65534, extra_groups=[65534, 7]) == (
        "65534\n65534\n65534 7"
    )
    assert await shell(reaper, "id -un; id -gn; id -G", user=user, group=group, extra_groups=[]) == (
        f"{user}\n{group}\n65534"
    )


async def test_where_input_and_output_go(reaper: anyreap.Reaper, tmp_path: Path, gate: Gate) -> None:
    """The standard descriptors can be files, descriptors, DEVNULL, and each other's; then there is no stream."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with path.open("rb") as file, (tmp_path / "out").open("wb") as out:
        process = await reaper.open_process(["/bin/cat"], stdin=file, stdout=out, stderr=DEVNULL)
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
        assert await process.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"abc"
    os.write(gate.write, b"def\n")
    gate.open()
    done = await reaper.run_process("cat; echo ghi >&2", stdin=gate.read, stderr=STDOUT)
    assert _written(done) == (b"def\nghi\n", None)
    done = await reaper.run_process(["/bin/cat"], stdin=DEVNULL, stdout=DEVNULL)
    assert _written(done) == (None, b"")


def _written(done: Any) -> tuple[Any, Any]:
    return done.stdout, done.stderr


async def test_input_and_output_are_ours(reaper: anyreap.Reaper, capfd: pytest.CaptureFixture[str]) -> None:
    """None as a standard descriptor is ours."""
    process = await reaper.open_process("echo a; echo b >&2", stdin=None, stdout=None, stderr=None)
    assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
    assert await process.wait() == 0
    assert capfd.readouterr() == ("a\n", "b\n")


async def test_executable(reaper: anyreap.Reaper) -> None:
    """`executable` is what runs, whatever the command calls it."""
    done = await reaper.run_process(["no such program", "-c", "echo $0"], executable="/bin/sh")
    assert done.stdout == b"no such program\n"


async def test_close_fds(reaper: anyreap.Reaper, news: News) -> None:
    """`close_fds=False` lets the child inherit what is inheritable."""
    os.set_inheritable(news.write, True)
    assert str(news.write) in (await shell(reaper, "ls /proc/$$/fd", close_fds=False)).split()
    assert str(news.write) not in (await shell(reaper, "ls /proc/$$/fd")).split()


async def test_restore_signals(reaper: anyreap.Reaper) -> None:
    """The signals that Python ignores are not ignored by the child, unless that is asked for."""
    get_ignored = ["grep", "SigIgn", "/proc/self/status"]
    ignored = [
        int((await reaper.run_process(get_ignored, restore_signals=restore)).stdout.split()[1], 16)
        for restore in (True, False)
    ]
    assert [bool(each >> (signal.SIGPIPE - 1) & 1) for each in ignored] == [False, True]


async def test_pipesize(reaper: anyreap.Reaper) -> None:
    """`pipesize` is the size of the pipes, as `subprocess.Popen` makes them."""
    # BUG: it is handed to Popen, which uses it for the pipes that it makes itself; ours are made before.
    code = f"import fcntl; print([fcntl.fcntl(fd, {fcntl.F_GETPIPE_SZ}) for fd in (0, 1, 2)])"
    done = await reaper.run_process([sys.executable, "-ISc", code], input=b"", pipesize=8192)
    assert done.stdout == b"[8192, 8192, 8192]\n"


UNSUPPORTED = {
    "preexec_fn": (print, "preexec_fn is not supported: it runs Python between fork and exec"),
    "bufsize": (1, "bufsize is not supported: the streams are not buffered"),
    "text": (True, "text is not supported: the streams carry bytes"),
    "universal_newlines": (True, "universal_newlines is not supported: the streams carry bytes"),
    "encoding": ("utf-8", "encoding is not supported: the streams carry bytes"),
    "errors": ("strict", "errors is not supported: the streams carry bytes"),
    "shell": (True, "shell is not supported: a command that is a string goes to the shell"),
    "startupinfo": (object(), "Windows"),
    "creationflags": (4, "Windows"),
    "colour": ("red", "unexpected keyword argument 'colour'"),
    "capture_output": (True, "unexpected keyword argument 'capture_output'"),
    "shutdown": (3, r"shutdown is an anyreap\.Shutdown"),
}


async def test_what_is_not_supported(reaper: anyreap.Reaper) -> None:
    """A parameter that can't be supported is a TypeError that says why, and nothing is started."""
    with nothing_started():
        for name, (value, why) in UNSUPPORTED.items():
            options: dict[str, Any] = {name: value}
            with pytest.raises(TypeError, match=why):
                await reaper.open_process(["/bin/true"], **options)
            with pytest.raises(TypeError, match=why):
                await reaper.run_process(["/bin/true"], **options)


async def test_own_policy(source: Any) -> None:
    """A child is ended by the policy that it was started with, else by the reaper's."""
    polite = anyreap.Shutdown(signal=signal.SIGINT)
    with anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source, shutdown=anyreap.Shutdown(signal=signal.SIGHUP)) as reaper:
            first = await reaper.open_process(SLEEP, shutdown=polite)
            second = await reaper.open_process(SLEEP)
            scope.cancel()
    assert (first.returncode, second.returncode) == (-signal.SIGINT, -signal.SIGHUP)


# The streams ----------------------------------------------------------------------------------------------------------


async def test_receive(reaper: anyreap.Reaper) -> None:
    """What there is, is received, at most so many bytes; then EndOfStream, however often one asks."""
    process = await reaper.open_process("printf abcdef; printf xyz >&2", stdin=None)
    assert process.stdout is not None
    assert process.stderr is not None
    assert await process.wait() == 0
    assert [await process.stdout.receive(4), await process.stdout.receive(4)] == [b"abcd", b"ef"]
    assert await process.stderr.receive() == b"xyz"
    for stream in (process.stdout, process.stderr) * 2:
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()


async def test_receive_nothing(reaper: anyreap.Reaper) -> None:
    """To receive less than a byte is a ValueError, and loses nothing."""
    process = await reaper.open_process(["/bin/echo", "a"])
    assert process.stdout is not None
    for max_bytes in (0, -1):
        with pytest.raises(ValueError, match="max_bytes must be a positive integer"):
            await process.stdout.receive(max_bytes)
    assert await rest(process.stdout) == b"a\n"


async def test_wrapped_streams(reaper: anyreap.Reaper) -> None:
    """Anyio's wrappers take the streams."""
    process = await reaper.open_process(["/bin/cat"])
    assert process.stdin is not None
    assert process.stdout is not None
    buffered = BufferedByteReceiveStream(process.stdout)
    await process.stdin.send(b"one\ntw")
    assert await buffered.receive_until(b"\n", 10) == b"one"
    await process.stdin.send(b"o\n")
    assert await buffered.receive_until(b"\n", 10) == b"two"


async def test_send_to_who_does_not_read(reaper: anyreap.Reaper) -> None:
    """To send to a child that has closed its input, or has ended, is a BrokenResourceError."""
    process = await reaper.open_process(["/bin/sh", "-c", "exec <&-; echo; exec sleep 3600"])
    assert process.stdin is not None
    await line(process.stdout)
    for _ in range(2):
        with pytest.raises(anyio.BrokenResourceError):
            await process.stdin.send(b"a")
    process.kill()
    await process.wait()
    with pytest.raises(anyio.BrokenResourceError):
        await process.stdin.send(b"a" * MIB)


async def test_who_waits_to_send_when_the_child_ends(reaper: anyreap.Reaper) -> None:
    """A task that waits for room in the pipe gets a BrokenResourceError when the child ends."""
    process = await reaper.open_process(SLEEP)
    assert process.stdin is not None
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_soon, process.kill)
            with pytest.raises(anyio.BrokenResourceError):
                await process.stdin.send(b"a" * MIB)
    await process.wait()


async def _soon(call: Callable[[], Any]) -> None:
    await anyio.wait_all_tasks_blocked()
    call()


@pytest.mark.parametrize("by", ["stream", "process", "block"])
async def test_who_waits_when_the_streams_are_closed(source: Any, gate: Gate, by: str) -> None:
    """Tasks that wait on a stream get a ClosedResourceError when another task closes it, or its process, or when the
    block is left; and so does who comes later (field bug 36).
    """
    got: list[str] = []

    async def waits(name: str, call: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await call(*args)
        got.append(name)

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source) as reaper:
            script = f"echo; read x </dev/fd/{gate.read}"
            process = await reaper.open_process(["/bin/sh", "-c", script], pass_fds=[gate.read])
            await line(process.stdout)
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            tasks.start_soon(waits, "stdin", process.stdin.send, b"a" * MIB)
            tasks.start_soon(waits, "stdout", process.stdout.receive)
            tasks.start_soon(waits, "stderr", process.stderr.receive)
            await anyio.wait_all_tasks_blocked()
            if by == "stream":
                for stream in (process.stdin, process.stdout, process.stderr):
                    await stream.aclose()
            elif by == "process":
                tasks.start_soon(process.aclose)
            if by != "block":
                await until(lambda: len(got) == 3)
                process.terminate()
            else:
                tasks.start_soon(_soon, process.terminate)
    assert sorted(got) == ["stderr", "stdin", "stdout"]
    assert process.returncode == -signal.SIGTERM
    assert process.stdin is not None
    with pytest.raises(anyio.ClosedResourceError):
        await process.stdin.send(b"a")
    for out in (process.stdout, process.stderr):
        assert out is not None
        with pytest.raises(anyio.ClosedResourceError):
            await out.receive()


async def test_two_tasks_on_one_stream(reaper: anyreap.Reaper) -> None:
    """A second task that receives from, or sends to, a stream that another one waits on gets a BusyResourceError, and
    disturbs nobody.
    """
    process = await reaper.open_process(["/bin/sleep", "3600"])  # it neither reads nor writes
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    got = []

    async def receive() -> None:
        got.append(await stdout.receive())

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            tasks.start_soon(stdin.send, b"b" * MIB)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await stdout.receive()
            with pytest.raises(anyio.BusyResourceError):
                await stdin.send(b"c")
            tasks.cancel_scope.cancel()
    assert got == []
    process.kill()


async def test_cancelled_while_it_waits_to_receive(reaper: anyreap.Reaper) -> None:
    """A receive that is cancelled while it waits takes nothing, and the next one gets it all."""
    process = await reaper.open_process(["/bin/cat"])
    assert process.stdin is not None
    assert process.stdout is not None
    for word in (b"one", b"two"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.stdout.receive)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await process.stdin.send(word)
        with anyio.fail_after(BOUND):
            assert await process.stdout.receive() == word


async def test_cancelled_receive_loses_nothing(reaper: anyreap.Reaper) -> None:
    """However a receive is cut short by a scope, in whatever step of the loop, no byte is lost or comes twice."""
    process = await reaper.open_process(["seq", "20000"], stdin=None)
    expected = b"".join(b"%d\n" % number for number in range(1, 20001))
    assert process.stdout is not None
    got, tries = b"", 0
    with anyio.fail_after(BOUND):
        while len(got) < len(expected):
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope:
                    tasks.start_soon(_yields, tries % 4, scope.cancel)
                    got += await process.stdout.receive(997)
            tries += 1
    assert got == expected


async def _yields(count: int, call: Callable[[], Any]) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()
    call()


@on_asyncio
async def test_natively_cancelled_receive_loses_nothing(reaper: anyreap.Reaper) -> None:
    """A native cancellation of asyncio that meets a receive in any step of the loop loses no byte either."""
    # BUG: the data is taken from the pipe before the last checkpoint, whose shield a native cancellation passes.
    for steps in range(4):
        process = await reaper.open_process(["/bin/echo", "hello"], stdin=None)
        assert process.stdout is not None
        assert await process.wait() == 0
        task = asyncio.create_task(process.stdout.receive())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        try:
            got = await task
        except asyncio.CancelledError:
            got = b""
        assert got + await rest(process.stdout) == b"hello\n"


async def test_big_send(reaper: anyreap.Reaper) -> None:
    """A send of more than the pipe holds sends all of it, in order, as the child reads."""
    data = os.urandom(MIB) * 4
    process = await reaper.open_process(["/bin/cat"])
    assert process.stdin is not None
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.stdin.send, data)
            got = b""
            while len(got) < len(data):
                assert process.stdout is not None
                got += await process.stdout.receive()
    assert got == data


async def test_cancelled_send_has_sent_a_prefix(reaper: anyreap.Reaper) -> None:
    """A send that is cancelled while it waits for room has sent a part from the start, and the stream goes on."""
    process = await reaper.open_process(["/bin/sh", "-c", "read x; exec cat"])
    assert process.stdin is not None
    data = bytes(range(1, 256)).replace(b"\n", b"") * 4096
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_soon, scope.cancel)
            await process.stdin.send(b"\n" + b"a" * 5 + data)
    assert scope.cancelled_caught
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_finish, process.stdin, b"END")
            got = await rest(process.stdout)
    assert got.endswith(b"END")
    assert (b"a" * 5 + data).startswith(got.removesuffix(b"END"))


async def _finish(stream: anyio.abc.ByteSendStream, data: bytes) -> None:
    await stream.send(data)
    await stream.aclose()


async def test_closing_a_stream_twice(reaper: anyreap.Reaper) -> None:
    """Closing a stream again does nothing, not to the file either that got its number meanwhile."""
    process = await reaper.open_process(SLEEP, stderr=None)
    assert process.stdin is not None
    before = numbers()
    await process.stdin.aclose()
    (number,) = before - numbers()
    pipe = os.pipe()
    assert number in pipe
    await process.stdin.aclose()
    process.close_pipes()
    process.kill()
    await process.aclose()
    os.fstat(number)
    for fd in pipe:
        os.close(fd)


async def test_closing_a_stream_in_a_cancelled_scope(reaper: anyreap.Reaper) -> None:
    """Closing a stream is a checkpoint, and when it is cancelled the stream is closed all the same."""
    process = await reaper.open_process(["/bin/cat"])
    assert process.stdin is not None
    with anyio.CancelScope() as scope:
        scope.cancel()
        await process.stdin.aclose()
        pytest.fail("it was no checkpoint")
    with anyio.fail_after(BOUND):
        assert await process.wait() == 0


async def test_streams_in_a_cancelled_scope(reaper: anyreap.Reaper) -> None:
    """In a cancelled scope nothing is received and nothing sent."""
    process = await reaper.open_process(["/bin/sh", "-c", "echo a; exec cat"])
    assert process.stdin is not None
    assert process.stdout is not None
    await anyio.wait_readable(_fd_of(process, 1))
    for call in (process.stdout.receive, lambda: process.stdin.send(b"b\n")):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await call()
            pytest.fail("it was no checkpoint")
    await process.stdin.aclose()
    assert await rest(process.stdout) == b"a\n"


def _fd_of(process: anyreap.Process, number: int) -> int:
    """Our end of a pipe of a child: the descriptor with the same inode."""
    pipe = os.readlink(f"/proc/{process.pid}/fd/{number}")
    return next(fd for fd, name in open_fds().items() if name == pipe)


async def test_busy_stream_leaves_the_others_their_turn(reaper: anyreap.Reaper) -> None:
    """A task that receives what is there already, or sends what there is room for, lets the others run each time."""
    process = await reaper.open_process(["cat", "/dev/zero"], stderr=None)
    assert process.stdout is not None
    turns, done = 0, False

    async def count() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for _ in range(100):
            await process.stdout.receive(16)
        assert turns >= 50
        turns = 0
        cat = await reaper.open_process(["/bin/cat"], stdout=DEVNULL)
        assert cat.stdin is not None
        turns = 0
        for _ in range(100):
            await cat.stdin.send(b"a")
        assert turns >= 50
        done = True
    process.kill()


# run_process ----------------------------------------------------------------------------------------------------------


async def test_fifty_mebibytes_both_ways(reaper: anyreap.Reaper) -> None:
    """As much as memory holds goes in and comes out, at the same time."""
    data = os.urandom(MIB) * 50
    with anyio.fail_after(60):
        done = await reaper.run_process(["/bin/cat"], input=data)
    assert done.stdout == data
    assert done.stderr == b""


async def test_three_pipes_at_once(reaper: anyreap.Reaper) -> None:
    """Standard error is read at the same time as standard output."""
    data = os.urandom(MIB) * 4
    with anyio.fail_after(BOUND):
        done = await reaper.run_process(["tee", "/dev/stderr"], input=data)
    assert (done.stdout, done.stderr) == (data, data)


async def test_child_that_does_not_read_its_input(reaper: anyreap.Reaper) -> None:
    """A child that does not read its input, or not all of it, is no failure, as for `subprocess.run`."""
    for script in ("echo a", "exec <&-; echo a", "read x; echo a"):
        with anyio.fail_after(BOUND):
            done = await reaper.run_process(["/bin/sh", "-c", script], input=b"x\n" * MIB)
        assert (done.returncode, done.stdout) == (0, b"a\n")


async def test_empty_input(reaper: anyreap.Reaper, gate: Gate) -> None:
    """An empty input is an input: the child reads the end of it, and not what we read."""
    with anyio.fail_after(BOUND):
        done = await reaper.run_process(["/bin/cat"], input=b"")
        assert (done.returncode, done.stdout) == (0, b"")
        # A pipe for which there is no input is closed, or cat would never end.
        done = await reaper.run_process(["/bin/cat"], stdin=PIPE)
        assert (done.returncode, done.stdout) == (0, b"")


async def test_input_and_stdin(reaper: anyreap.Reaper) -> None:
    """To give both `input` and `stdin` is a ValueError, and nothing is started."""
    with nothing_started(), pytest.raises(ValueError, match="only one of stdin and input"):
        await reaper.run_process(["/bin/cat"], input=b"", stdin=DEVNULL)


async def test_input_that_is_no_bytes(reaper: anyreap.Reaper) -> None:
    """Input that can't be sent is a TypeError, as itself, and no child is left."""
    # BUG: it comes out of the task that feeds the child, in an ExceptionGroup, when the child runs already.
    before = children()
    with pytest.raises(TypeError, match="bytes"):
        await reaper.run_process(["/bin/cat"], input="text")  # type: ignore[arg-type]
    assert children() == before


async def test_completed_process(reaper: anyreap.Reaper) -> None:
    """What `run_process` returns is a `subprocess.CompletedProcess`, with the whole status on top."""
    done = await reaper.run_process(["/bin/sh", "-c", "echo a; echo b >&2"])
    assert isinstance(done, anyreap.CompletedProcess)
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\n", b"b\n")
    assert done.args == ["/bin/sh", "-c", "echo a; echo b >&2"]
    assert done.status.success
    assert done.status.usage is not None
    done.check_returncode()


async def test_failed_child(reaper: anyreap.Reaper) -> None:
    """A child that fails raises a `ChildFailed`, a `CalledProcessError`, which carries its status and what it wrote,
    and says how it ended.
    """
    for script, code, text in (
        ("echo a; echo b >&2; exit 3", 3, "exited with code 3"),
        ("echo a; echo b >&2; exit 255", 255, "exited with code 255"),
        ("echo a; echo b >&2; kill -9 $$", -9, "was killed by SIGKILL"),
    ):
        command = ["/bin/sh", "-c", script]
        with pytest.raises(anyreap.ChildFailed) as failed:
            await reaper.run_process(command)
        error = failed.value
        assert isinstance(error, subprocess.CalledProcessError)
        assert (error.returncode, error.cmd, error.stdout, error.stderr) == (code, command, b"a\n", b"b\n")
        assert str(error) == f"command {command!r} (pid {error.status.pid}) {text}"
        assert error.status.usage is not None
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.status, copy.stderr) == (str(error), error.status, b"b\n")

        done = await reaper.run_process(command, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (code, b"a\n", b"b\n")
        with pytest.raises(anyreap.ChildFailed, match=text) as failed:
            done.check_returncode()
        assert (failed.value.cmd, failed.value.stdout, failed.value.status) == (command, b"a\n", done.status)


async def _robbed(reaper: anyreap.Reaper, **options: Any) -> anyreap.CompletedProcess:
    """Run a child that exits with code 7, and take its status before the reaper can."""
    before = children()

    async def rob() -> None:
        await until(lambda: reaper.statistics().owned)
        (pid,) = children() - before
        held.open()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

    with Gate() as held, anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rob)
            try:
                return await reaper.run_process(["/bin/sh", "-c", "read x; exit 7"], stdin=held.read, **options)
            except anyreap.StatusLost as exc:
                lost = exc
    raise lost


async def test_lost_status_is_raised(reaper: anyreap.Reaper, no_pidfds: None) -> None:
    """A status that somebody else took is `StatusLost`, also with `check=False`; never a 0 (E1, field bugs 17, 18)."""
    for check in (True, False):
        with pytest.raises(anyreap.StatusLost):
            await _robbed(reaper, check=check)
    assert reaper.statistics().lost == 2


async def test_stolen_status_is_read_back(reaper: anyreap.Reaper) -> None:
    """A status that somebody else took is read back from the pidfd, where the kernel keeps it (Linux >= 6.15; E1)."""
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 15):
        pytest.skip("this kernel does not keep the status of a child that was collected")
    done = await _robbed(reaper, check=False)
    assert done.returncode == 7


async def test_stolen_before_it_is_known(reaper: anyreap.Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child whose status is taken before the loop has even heard that it runs is lost, and nothing else: its output
    is there, its wait raises, the reaper goes on.
    """

    class Robbed(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            os.waitpid(self.pid, 0)

    robbing = types.SimpleNamespace(Popen=Robbed, PIPE=PIPE)
    with monkeypatch.context() as patched, anyio.fail_after(BOUND):
        patched.setattr(_spawner, "subprocess", robbing)
        process = await reaper.open_process(["/bin/echo", "a"], stdin=None)
        with pytest.raises(anyreap.StatusLost):
            await process.wait()
        assert process.lost
        assert await rest(process.stdout) == b"a\n"
        await process.aclose()
        with pytest.raises(anyreap.StatusLost):
            await reaper.run_process(["/bin/echo", "a"], check=False)
    assert await shell(reaper, "echo b") == "b"
    assert reaper.statistics().lost == 2


async def test_cancelled_run_process(reaper: anyreap.Reaper, gate: Gate, news: News) -> None:
    """A cancelled `run_process` ends its child by the policy, and returns when it is gone (field bug 56)."""
    before = children()
    with reaper.exits() as exits:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_running, reaper, news, scope.cancel)
                await reaper.run_process(
                    ["/bin/sh", "-c", f"trap 'exit 7' INT; {news.say}; while :; do sleep 0.01; done"],
                    stdin=gate.read,
                    pass_fds=[news.write],
                    shutdown=anyreap.Shutdown(signal=signal.SIGINT, grace=3600),
                )
        assert scope.cancelled_caught
        assert children() == before
        assert exits.receive_nowait().exit_code == 7


async def _running(reaper: anyreap.Reaper, news: News, call: Callable[[], Any]) -> None:
    """Call when the child of a `run_process` runs, has said that it is ready, and is known to run."""
    await news.heard()
    await until(lambda: reaper.statistics().owned)
    await anyio.wait_all_tasks_blocked()
    call()


@on_asyncio
@pytest.mark.parametrize("way", ["cancel", "timeout"])
async def test_natively_cancelled_run_process(reaper: anyreap.Reaper, gate: Gate, news: News, way: str) -> None:
    """A native cancellation of asyncio (`Task.cancel`, `asyncio.timeout`) ends the child of a `run_process` by the
    policy too, before it goes on.
    """
    before = children()
    command = ["/bin/sh", "-c", f"trap 'exit 7' TERM; {news.say}; while :; do sleep 0.01; done"]

    async def run() -> None:
        await reaper.run_process(command, stdin=gate.read, pass_fds=[news.write])

    async def timed() -> None:
        async with asyncio.timeout(None) as timeout, anyio.create_task_group() as tasks:
            tasks.start_soon(_running, reaper, news, lambda: timeout.reschedule(0))
            await run()

    with reaper.exits() as exits, anyio.fail_after(BOUND):
        task = asyncio.create_task(run() if way == "cancel" else timed())
        if way == "cancel":
            await _running(reaper, news, task.cancel)
        with pytest.raises(asyncio.CancelledError if way == "cancel" else TimeoutError):
            await task
        assert children() == before
        assert exits.receive_nowait().exit_code == 7


async def test_cancelled_run_process_of_a_stubborn_child(reaper: anyreap.Reaper, news: News) -> None:
    """A child that ignores the first signal is killed when the grace period is over."""
    before = children()
    script = f"trap '' TERM; {news.say}; exec sleep 3600"
    with reaper.exits() as exits, anyio.fail_after(BOUND):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_running, reaper, news, scope.cancel)
                await reaper.run_process(script, pass_fds=[news.write], shutdown=anyreap.Shutdown(grace=0.1))
        assert children() == before
        assert exits.receive_nowait().signal == signal.SIGKILL


async def test_run_process_when_the_block_is_left(source: Any, news: News) -> None:
    """A `run_process` in an outer task whose child ends when the block is left gets ClosedResourceError as itself."""
    got: list[BaseException] = []

    async def run(reaper: anyreap.Reaper) -> None:
        try:
            await reaper.run_process(["/bin/sh", "-c", f"{news.say}; exec sleep 3600"], pass_fds=[news.write])
        except anyio.ClosedResourceError as exc:
            got.append(exc)

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyreap.open_reaper(source=source) as reaper:
                    tasks.start_soon(run, reaper)
                    await _running(reaper, news, scope.cancel)
    assert len(got) == 1


async def test_run_process_reads_to_the_end(reaper: anyreap.Reaper, gate: Gate) -> None:
    """`run_process` reads to the end of the pipes, as `subprocess.run` does, also what a descendant writes."""
    script = "exec 3<&0; (read x <&3; echo late) & echo early"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_soon_after_exit, reaper, gate)
        assert await shell(reaper, script, stdin=gate.read) == "early\nlate"


async def _soon_after_exit(reaper: anyreap.Reaper, gate: Gate) -> None:
    await until(lambda: reaper.statistics().reaped == 1)
    await anyio.wait_all_tasks_blocked()
    gate.open()


# wait, status, signals ------------------------------------------------------------------------------------------------


async def test_grandchild_that_holds_the_pipes(reaper: anyreap.Reaper, pidfds: bool) -> None:
    """`wait` is about the process: a descendant that holds its pipes open delays nobody (K16, field bug 70)."""
    process = await reaper.open_process(["/bin/sh", "-c", "exec 3<&0; (read x <&3; echo end) & echo $!; exit 3"])
    grandchild = int(await line(process.stdout))
    with anyio.fail_after(BOUND):
        assert await process.wait() == 3
    assert state_of(grandchild) not in ("", "Z")
    assert process.stdin is not None
    await process.stdin.send(b"\n")
    assert await rest(process.stdout) == b"end\n"


async def test_grandchild_that_holds_the_pipes_delays_no_close(reaper: anyreap.Reaper) -> None:
    """Nor is `aclose` delayed, or the leaving of the block."""
    process = await reaper.open_process(["/bin/sh", "-c", "exec 3<&0; (read x <&3; read x <&3) & echo $!; exit 3"])
    grandchild = int(await line(process.stdout))
    with anyio.fail_after(BOUND):
        await process.aclose()
    assert process.returncode == 3
    await until(lambda: state_of(grandchild) in ("", "Z"))


async def test_waiters(reaper: anyreap.Reaper, gate: Gate, pidfds: bool) -> None:
    """Any number of tasks wait, any number of times; cancelling one disturbs nobody (C1, C2, C6)."""
    # Without pipes: a cancelled scope of asyncio's holds on to the frame of this test, and what is in it, for a while.
    process = await reaper.open_process("read x; exit 7", stdin=gate.read, stdout=None, stderr=None)
    got: list[int] = []

    async def wait() -> None:
        got.append(await process.wait())

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            cancelled = anyio.CancelScope()

            async def wait_in_vain() -> None:
                with cancelled:
                    await wait()

            for call in (wait, wait_in_vain, wait):
                tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel()
            await anyio.wait_all_tasks_blocked()
            assert got == []
            gate.open()
        await wait()
    assert got == [7, 7, 7]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await process.wait()
    assert scope.cancelled_caught, "a wait is always a checkpoint"


async def test_status(reaper: anyreap.Reaper) -> None:
    """The status has CPU time and peak memory, of this child and no other, its signal, and the core flag (D4, D5)."""
    burn = f"import resource; {'resource.setrlimit(resource.RLIMIT_CORE, (0, 0));'} x = bytearray(50 << 20)"
    code = f"{burn}\nwhile sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) < 0.2: pass"
    big = await reaper.open_process([sys.executable, "-ISc", code])
    small = await reaper.open_process(["/bin/sh", "-c", "kill -SEGV $$"])
    with anyio.fail_after(BOUND):
        assert await big.wait() == 0
        assert await small.wait() == -signal.SIGSEGV
    assert big.status is not None
    assert small.status is not None
    assert isinstance(big.status.usage, resource.struct_rusage)
    assert small.status.usage is not None
    assert big.status.usage.ru_utime + big.status.usage.ru_stime >= 0.2
    assert big.status.usage.ru_maxrss > 50 << 10  # KiB, on Linux
    assert small.status.usage.ru_utime + small.status.usage.ru_stime < 0.2
    assert small.status.signal is signal.SIGSEGV
    assert small.status.pid == small.pid
    assert not small.status.orphan


async def test_core_flag(reaper: anyreap.Reaper, tmp_path: Path) -> None:
    """Whether a core was dumped is what the kernel says, and the shell may write one (D4)."""
    limited = await reaper.run_process(["/bin/sh", "-c", "ulimit -c 0; kill -SEGV $$"], check=False, cwd=tmp_path)
    assert (limited.status.core_dumped, str(limited.status)) == (False, "killed by SIGSEGV")


async def test_lost_process(reaper: anyreap.Reaper, no_pidfds: None) -> None:
    """A process whose status was stolen counts as ended: `wait` raises, nothing shows 0, `aclose` returns (E1)."""
    process = await reaper.open_process(SLEEP)
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)
    with anyio.fail_after(BOUND):
        for _ in range(2):
            with pytest.raises(anyreap.StatusLost):
                await process.wait()
        await process.aclose()
    assert (process.lost, process.status, process.returncode) == (True, None, None)
    assert "lost" in repr(process)


async def test_signals(reaper: anyreap.Reaper, monkeypatch: pytest.MonkeyPatch, pidfds: bool) -> None:
    """A signal goes to the child; once it has ended that is a quiet no-op, and nothing is sent (K1, field bug 69)."""
    sends: dict[int, Callable[[anyreap.Process], None]] = {
        signal.SIGTERM: anyreap.Process.terminate,
        signal.SIGKILL: anyreap.Process.kill,
        signal.SIGUSR1: lambda process: process.send_signal(signal.SIGUSR1),
    }
    for number, send in sends.items():
        process = await reaper.open_process(SLEEP)
        send(process)
        with anyio.fail_after(BOUND):
            assert await process.wait() == -number
        with monkeypatch.context() as patched:
            sent = Sent(patched)
            send(process)
            assert sent.all == []


# What trio's own tests ask of a process -------------------------------------------------------------------------------


TWICE = "data=$(cat); echo $data; echo $data again >&2"


async def test_conversation(reaper: anyreap.Reaper) -> None:
    """A child that answers each line on both pipes is talked to: a line in two pieces, two lines at once, an answer of
    nothing, one that a cancelled reader was too early for, and one longer than a pipe.
    """
    answer = 'n=0; while read c; do printf "%0${c}d\n" $n; printf "%0${c}d\n" $((n + 1)) >&2; n=$((n + 2)); done'
    process = await reaper.open_process(["/bin/sh", "-c", answer])
    assert process.stdin is not None

    async def expect(number: int, width: int) -> None:
        for stream, text in ((process.stdout, number), (process.stderr, number + 1)):
            assert await line(stream) == f"{text:0{width}d}"

    with anyio.fail_after(BOUND):
        await process.stdin.send(b"1")
        with anyio.move_on_after(0.05) as early:
            await expect(0, 1)
        assert early.cancelled_caught
        await process.stdin.send(b"2\n")
        await expect(0, 12)
        await process.stdin.send(b"10\n20\n")
        await expect(2, 10)
        await expect(4, 20)
        await process.stdin.send(b"4000\n")
        await expect(6, 4000)
        await process.stdin.aclose()
        assert await rest(process.stdout) == await rest(process.stderr) == b""
        assert await process.wait() == 0


async def test_one_pipe_for_both(reaper: anyreap.Reaper, gate: Gate) -> None:
    """`stderr=STDOUT` goes where stdout goes: to a pipe of ours, to one of the program's, into the result of
    `run_process`; and there is no stream of its own.
    """
    read, write = os.pipe()
    try:
        for stdout in (PIPE, write):
            process = await reaper.open_process(TWICE, stdout=stdout, stderr=STDOUT)
            assert process.stdin is not None
            assert process.stderr is None
            assert (process.stdout is None) == (stdout == write)
            await process.stdin.send(b"1234")
            await process.stdin.aclose()
            if stdout == PIPE:
                assert await rest(process.stdout) == b"1234\n1234 again\n"
            with anyio.fail_after(BOUND):
                assert await process.wait() == 0
        os.close(write)
        write = -1
        assert os.read(read, 100) == b"1234\n1234 again\n"
        assert os.read(read, 100) == b""
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    done = await reaper.run_process(TWICE, input=b"1234", stderr=STDOUT)
    assert _written(done) == (b"1234\n1234 again\n", None)
    process = await reaper.open_process(["/bin/cat"], stdout=gate.write, stderr=STDOUT)
    assert process.stdin is not None
    assert process.stdout is process.stderr is None
    await process.stdin.aclose()
    with anyio.fail_after(BOUND):
        assert await process.wait() == 0


async def test_returncode_without_a_wait(reaper: anyreap.Reaper, pidfds: bool) -> None:
    """A child that has ended says so to who never waits, once the loop has had its turn; and its text does."""
    process = await reaper.open_process(SLEEP)
    assert "running" in repr(process)
    process.kill()
    await until(lambda: process.returncode is not None)
    assert process.returncode == -signal.SIGKILL
    assert "SIGKILL" in repr(process)


async def test_ended_and_collected_before_the_loop_hears_of_it(reaper: anyreap.Reaper) -> None:
    """Somebody collects the child while the loop stands still, and a task waits for it: the task is woken (trio's issue
    2209), and gets the status, which the kernel still has, or the error that it is lost; never a made-up 0.
    """
    process = await reaper.open_process(SLEEP)
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                try:
                    assert await process.wait() == -signal.SIGKILL
                except anyreap.StatusLost:
                    assert process.returncode is None

            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            process.kill()
            os.waitpid(process.pid, 0)


async def test_no_descriptor_is_left_by_any_way_to_run(reaper: anyreap.Reaper) -> None:
    """A run that ends well, one that fails, and one that can't start leave the descriptors as they were."""
    await reaper.run_process(["/bin/true"])
    with nothing_started():
        await reaper.run_process(["/bin/true"])
        with pytest.raises(subprocess.CalledProcessError):
            await reaper.run_process(["/bin/false"])
        with pytest.raises(PermissionError):
            await reaper.run_process(["/dev/null"])


# Closing a process, and leaving the block -----------------------------------------------------------------------------


async def test_closing_ends_who_reads(reaper: anyreap.Reaper) -> None:
    """`aclose` closes the pipes, then waits: a child that reads to the end of its input ends by itself."""
    with anyio.fail_after(BOUND):
        async with await reaper.open_process(["/bin/cat"]) as process:
            pass
        await process.aclose()
    assert process.returncode == 0


async def test_closing_ends_who_writes(reaper: anyreap.Reaper) -> None:
    """`aclose` closes the pipes before it waits: a child that is blocked on a full pipe can die (field bug 64)."""
    process = await reaper.open_process(["head", "-c", "10M", "/dev/zero"])
    await until(lambda: _held_by(process, 1) == PIPE_SIZE)
    with anyio.fail_after(BOUND):
        await process.aclose()
    assert process.returncode == -signal.SIGPIPE


def _held_by(process: anyreap.Process, number: int) -> int:
    """How many bytes wait in a pipe of a child."""
    from array import array

    count = array("i", [0])
    fcntl.ioctl(_fd_of(process, number), 0x541B, count)  # FIONREAD
    return count[0]


async def test_two_tasks_close_one_process(reaper: anyreap.Reaper) -> None:
    """Two tasks may close the same process, and both wait for its end."""
    process = await reaper.open_process(["/bin/sh", "-c", "cat; exit 3"])
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(process.aclose)
    assert process.returncode == 3


async def test_cancelled_close(reaper: anyreap.Reaper) -> None:
    """When `aclose` is cancelled, it ends the child by its policy, shielded, before the cancellation goes on."""
    process = await reaper.open_process(
        ["/bin/sh", "-c", "trap 'exit 7' HUP; echo; while :; do sleep 0.01; done"],
        shutdown=anyreap.Shutdown(signal=signal.SIGHUP, grace=3600),
    )
    await line(process.stdout)
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_soon, scope.cancel)
            await process.aclose()
    assert scope.cancelled_caught
    assert process.returncode == 7
    assert process.pid not in children()


async def test_close_in_a_cancelled_scope(reaper: anyreap.Reaper) -> None:
    """A child that ignores its signal is killed after the grace when its `async with` is cancelled (K11)."""
    with anyio.fail_after(BOUND), anyio.CancelScope() as scope:
        async with await reaper.open_process(
            ["/bin/sh", "-c", "trap '' TERM; echo; exec sleep 3600"], shutdown=anyreap.Shutdown(grace=0.1)
        ) as process:
            await line(process.stdout)
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert process.returncode == -signal.SIGKILL


@on_asyncio
async def test_natively_cancelled_close(reaper: anyreap.Reaper) -> None:
    """A native cancellation of `aclose` ends the child by its policy; a second one ends the grace at once."""
    process = await reaper.open_process(["/bin/sh", "-c", "trap 'echo >&2' TERM; echo; while :; do sleep 0.01; done"])
    await line(process.stdout)
    heard = os.dup(_fd_of(process, 2))
    task = asyncio.create_task(process.aclose())
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    with anyio.fail_after(BOUND):
        await anyio.wait_readable(heard)  # it got the first signal, and goes on
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    anyio.notify_closing(heard)
    os.close(heard)
    assert process.returncode == -signal.SIGKILL


async def test_close_names_what_outlives_sigkill(reaper: anyreap.Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be ended when `aclose` is cancelled is named in a note on the cancellation."""
    monkeypatch.setattr(_shutdown, "KILL_BOUND", 0.05)
    process = await reaper.open_process(SLEEP, shutdown=anyreap.Shutdown(grace=0))
    caught: list[BaseException] = []
    with monkeypatch.context() as deaf, anyio.CancelScope() as scope:
        deaf.setattr(signal, "pidfd_send_signal", lambda *_: None)
        scope.cancel()
        try:
            await process.aclose()
        except anyio.get_cancelled_exc_class() as exc:
            caught.append(exc)
            raise
    assert any(str(process.pid) in note for note in caught[0].__notes__)
    assert process.returncode is None
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def test_block_is_left_while_cat_runs(source: Any) -> None:
    """When the body has returned, the pipes are closed: a child that reads to the end ends, and the block with it."""
    with anyio.fail_after(BOUND):
        async with anyreap.open_reaper(source=source) as reaper:
            reader = await reaper.open_process(["/bin/cat"])
            writer = await reaper.open_process(["cat", "/dev/zero"], stdin=None)
    assert (reader.returncode, writer.returncode) == (0, -signal.SIGPIPE)


async def test_block_waits_for_who_does_not_care(source: Any, gate: Gate) -> None:
    """A started child keeps the block open until it ends by itself."""
    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks, anyreap.open_reaper(source=source) as reaper:
            process = await reaper.open_process(["/bin/sh", "-c", "read x; exit 3"], stdin=gate.read)
            tasks.start_soon(_soon, gate.open)
    assert process.returncode == 3


async def test_dropped_handle(source: Any) -> None:
    """Dropping the handle closes no pipe of a child that runs, and it is still owned (field bug 53)."""
    with anyio.fail_after(BOUND):
        async with anyreap.open_reaper(source=source) as reaper:
            exits = reaper.exits()
            pid = (await reaper.open_process(["/bin/sh", "-c", "cat; exit 3"])).pid
            gc.collect()
            for _ in range(5):
                await anyio.wait_all_tasks_blocked()
            assert state_of(pid) in ("S", "R")
            assert reaper.statistics().owned == 1
    assert exits.receive_nowait().exit_code == 3
    exits.close()


async def test_dropped_handle_of_an_ended_child(reaper: anyreap.Reaper) -> None:
    """The pipes of a child that has ended go with the handle, without a word."""
    before = numbers()
    process = await reaper.open_process(["/bin/true"])
    await process.wait()
    del process
    gc.collect()
    # The collector does nothing while it runs in another thread, which starts children, and lets go of the lock there
    # in the middle of closing them.
    await until(lambda: numbers() == before)


async def test_descriptors_of_a_process(reaper: anyreap.Reaper, pidfds: bool) -> None:
    """A running child costs its pipes and one pidfd, an ended one its pipes, a closed one nothing."""
    await shell(reaper, "exit 0")  # whatever is made once
    before = numbers()
    process = await reaper.open_process(["/bin/cat"])
    assert len(numbers() - before) == 3 + pidfds
    process.kill()
    await process.wait()
    assert len(numbers() - before) == 3
    await process.aclose()
    assert numbers() == before


async def test_process_after_the_block(source: Any) -> None:
    """After the block a `Process` tells what is known, and can be closed."""
    async with anyreap.open_reaper(source=source) as reaper:
        process = await reaper.open_process(["/bin/sh", "-c", "exit 3"])
    assert await process.wait() == 3
    await process.aclose()
    process.kill()
    with pytest.raises(RuntimeError, match="closed"):
        await reaper.open_process(["/bin/true"])
    with pytest.raises(RuntimeError, match="closed"):
        await reaper.run_process(["/bin/true"])


async def test_dead_child_is_collected_without_a_wait(reaper: anyreap.Reaper) -> None:
    """A started child that nobody waits for is collected all the same (field bug 53)."""
    process = await reaper.open_process(SLEEP)
    os.kill(process.pid, signal.SIGKILL)
    await_death(process.pid)
    assert is_zombie(process.pid)
    await until(lambda: process.pid not in children())
    assert process.returncode == -signal.SIGKILL
