"""`Process` and `CompletedProcess`: children that the reaper starts, in the shapes of anyio."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, Self

import anyio
import anyio.abc
import anyio.lowlevel

from anyreap import _kernel
from anyreap._child import Child
from anyreap._errors import ChildFailed, NotAChild, StatusLost, StillRunning
from anyreap._registry import registry
from anyreap._service import Service, Watch
from anyreap._shutdown import Ladder, Shutdown
from anyreap._spawner import Start
from anyreap._streams import PipeReceiveStream, PipeSendStream

if TYPE_CHECKING:
    from anyreap._status import ExitStatus


class Process(anyio.abc.Process):
    """A child that was started by `Reaper.open_process`: an `anyio.abc.Process`, owned by the reaper.

    `async with` closes its pipes and waits for its end, as `aclose` does. `wait` is about the process, never about its
    pipes: a descendant that holds them open delays nobody.

    Example:
        ```python
        import anyio
        import anyreap

        async def main() -> None:
            async with anyreap.open_reaper() as reaper:
                async with await reaper.open_process(["cat"]) as process:
                    await process.stdin.send(b"hello")
                    await process.stdin.aclose()
                    print(await process.stdout.receive())
                print(process.status)

        anyio.run(main)
        ```
    """

    _watch: Watch
    _child: Child
    _command: Any
    _stdin: PipeSendStream | None
    _stdout: PipeReceiveStream | None
    _stderr: PipeReceiveStream | None

    def __init__(self) -> None:
        msg = "a Process is made by Reaper.open_process()"
        raise TypeError(msg)

    @classmethod
    def _of(cls, watch: Watch, start: Start) -> Self:
        self = cls.__new__(cls)
        self._watch = watch
        self._child = Child._of(watch)
        self._command = start.command
        self._stdin = PipeSendStream(start.pipes.pop("stdin")) if "stdin" in start.pipes else None
        self._stdout = PipeReceiveStream(start.pipes.pop("stdout")) if "stdout" in start.pipes else None
        self._stderr = PipeReceiveStream(start.pipes.pop("stderr")) if "stderr" in start.pipes else None
        return self

    @property
    def pid(self) -> int:
        """The pid that the child has, or had."""
        return self._child.pid

    @property
    def status(self) -> ExitStatus | None:
        """How the child ended, with what it has used; None while it runs, and when its status is lost."""
        return self._child.status

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative signal number; None while it runs, and when its status is lost."""
        return self._child.returncode

    @property
    def lost(self) -> bool:
        """Whether the child has ended and nobody can say how: see `StatusLost`."""
        return self._child.lost

    @property
    def stdin(self) -> PipeSendStream | None:
        """The stream to its standard input, if it was started with `stdin=PIPE`."""
        return self._stdin

    @property
    def stdout(self) -> PipeReceiveStream | None:
        """The stream from its standard output, if it was started with `stdout=PIPE`."""
        return self._stdout

    @property
    def stderr(self) -> PipeReceiveStream | None:
        """The stream from its standard error, if it was started with `stderr=PIPE`."""
        return self._stderr

    async def wait(self) -> int:
        """Wait for the child to end. As `Child.wait`, with its errors and its cancel safety.

        Returns:
            The exit code, or the negative signal number; `status` has the rest.
        """
        return (await self._child.wait()).returncode

    def send_signal(self, signal: int) -> None:
        """Send a signal to the child. As `Child.send_signal`: never to another process."""
        self._child.send_signal(signal)

    def terminate(self) -> None:
        """Send SIGTERM. Does nothing once the child has ended."""
        self._child.terminate()

    def kill(self) -> None:
        """Send SIGKILL. Does nothing once the child has ended."""
        self._child.kill()

    def close_pipes(self) -> None:
        """Close our ends of the pipes now: a child that reads to the end of its input can end, and so can one that is
        blocked on a full pipe (it gets SIGPIPE). Tasks that wait on them get `anyio.ClosedResourceError`.
        """
        for stream in (self._stdin, self._stdout, self._stderr):
            if stream is not None:
                stream.close()

    async def aclose(self) -> None:
        """Close the pipes, then wait for the end; with `scope="group"` also end the members that it left behind.

        Cancel safety: if it is cancelled, the child is ended by its policy, shielded and within a bound, before the
        cancellation goes on. What outlives SIGKILL is named in a note on it.

        Raises:
            StillRunning: Members of its group outlived SIGKILL.
        """
        watch = self._watch
        watch.home.check_use(closed_is_fine=True)  # first: in a forked child the loop's epoll is the parent's too
        self.close_pipes()
        try:
            with contextlib.suppress(StatusLost):  # it has ended; how, is for `wait` to say
                await self.wait()
        except BaseException as exc:
            await self._end(exc)
            raise
        if watch in watch.home.groups and (survivors := await self._end(None)):
            raise StillRunning(survivors)

    async def _end(self, leaving: BaseException | None) -> dict[int, str]:
        """End the child by its policy; what interrupts that, leaves."""
        self.close_pipes()
        home = self._watch.home
        if home.closed or self._watch not in home.owned | home.groups:
            return {}
        ladder = Ladder(home, leaving, only=self._watch)
        survivors = await ladder.climb()
        if survivors and leaving is not None:
            (ladder.interrupt or leaving).add_note(str(StillRunning(survivors)))
        if ladder.interrupt is not None:
            raise ladder.interrupt
        return survivors

    def __repr__(self) -> str:
        state = str(self.status) if self.status is not None else self._watch.record.state.name.lower()
        return f"<anyreap.Process pid={self.pid} {state} {self._command!r}>"


class CompletedProcess(subprocess.CompletedProcess[bytes]):
    """What `Reaper.run_process` returns: a `subprocess.CompletedProcess` with the whole status.

    Attributes:
        args: The command.
        returncode: The exit code, or the negative signal number.
        stdout: What it wrote to its standard output, if that was a pipe, else None.
        stderr: What it wrote to its standard error, if that was a pipe, else None.
        status: How it ended, with CPU time and peak memory (`status.usage`).

    Example:
        ```python
        import anyreap

        async def peak(reaper: anyreap.Reaper) -> int:
            done = await reaper.run_process(["sort", "/etc/passwd"])
            assert done.status.usage is not None
            return done.status.usage.ru_maxrss
        ```
    """

    status: ExitStatus

    def __init__(self, args: Any, status: ExitStatus, stdout: Any = None, stderr: Any = None) -> None:
        super().__init__(args, status.returncode, stdout, stderr)
        self.status = status

    def check_returncode(self) -> None:
        """Raise `ChildFailed`, a `subprocess.CalledProcessError`, if it did not exit with code 0."""
        if not self.status.success:
            raise ChildFailed(self.status, self.args, self.stdout, self.stderr)


# What Popen takes and we can't give, and why.
_UNSUPPORTED: Final = {
    "preexec_fn": "it runs Python between fork and exec, where another thread's lock can stop it for ever; write what"
    " it does as start_new_session, process_group, user, group, umask, or in a program that execs yours",
    "bufsize": "the streams are not buffered",
    "universal_newlines": "the streams carry bytes: wrap them in anyio.streams.text.TextReceiveStream",
    "text": "the streams carry bytes: wrap them in anyio.streams.text.TextReceiveStream",
    "encoding": "the streams carry bytes: wrap them in anyio.streams.text.TextReceiveStream",
    "errors": "the streams carry bytes: wrap them in anyio.streams.text.TextReceiveStream",
    "shell": "a command that is a string goes to the shell, one that is a sequence does not",
}

# What it takes beyond the parameters of anyio.open_process, and is passed on.
_PASSED: Final = frozenset({"executable", "close_fds", "restore_signals", "pipesize"})


# The parameters of open_process, and what they are if they are not given.
_DEFAULTS: Final[dict[str, Any]] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "cwd": None,
    "env": None,
    "startupinfo": None,
    "creationflags": 0,
    "start_new_session": False,
    "process_group": None,
    "pass_fds": (),
    "user": None,
    "group": None,
    "extra_groups": None,
    "umask": -1,
}


def options_for(shutdown: Shutdown, given: dict[str, Any]) -> dict[str, Any]:
    """Turn the parameters of `open_process` into those of `subprocess.Popen`.

    Raises:
        TypeError: One that can't be supported, or that nobody knows.
        ValueError: A group is to be shut down, and the child would not lead one.
    """
    for name in given:
        if name in _UNSUPPORTED:
            msg = f"{name} is not supported: {_UNSUPPORTED[name]}"
            raise TypeError(msg)
        if name not in _PASSED and name not in _DEFAULTS:
            msg = f"got an unexpected keyword argument {name!r}"
            raise TypeError(msg)
    options = {**_DEFAULTS, **given}
    if options.pop("startupinfo") is not None or options.pop("creationflags"):
        msg = "startupinfo and creationflags are for Windows, where anyreap does not run"
        raise TypeError(msg)
    if shutdown.scope == "group" and options["process_group"] is None and not options["start_new_session"]:
        options["process_group"] = 0
    if shutdown.scope == "group" and options["process_group"]:
        msg = (
            f"with scope='group' the child leads the group that is ended, and process_group={options['process_group']}"
            " puts it into another one: leave it out, or write process_group=0"
        )
        raise ValueError(msg)
    return options


async def start_process(
    service: Service, command: Any, policy: Shutdown, options: dict[str, Any], *, patient: bool
) -> Process:
    """Start a child, and own it.

    If it is cancelled, a child that is being started is killed when it is there. A patient one waits for that child,
    and ends it by its policy, before it lets the cancellation go on.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    if isinstance(command, os.PathLike):
        command = os.fspath(command)
    options = {**options, "shell": isinstance(command, (str, bytes))}
    made: list[Process] = []
    number = service.begin_start(options)
    late = service.returned  # whoever starts one then closes its pipes

    def taken(start: Start) -> None:
        service.starting.discard(start)
        if start.pid > 0 and service.closed:
            start.undo()
        elif start.pid > 0:
            made.append(_own(service, start, policy))
            if start.abandoned:
                _kill(made[0])
            elif service.returned and not late:
                made[0].close_pipes()  # as those that were there when the body returned
        service.end_start(number)
        if start.late and service.orphans is not None and not service.closed:
            # What it left behind before it was marked has only its tag, which goes when it dies. So it is looked for
            # before anybody is told of the start. Out of turn: it is rare, for it takes a thread that was put aside.
            deque(service.orphans.look(), maxlen=0)

    start = Start(command, options, taken, service.orphans)
    service.starting.add(start)
    try:
        service.spawner.submit(start)
    except BaseException:
        service.starting.discard(start)
        raise
    try:
        await start.done.wait()
    except BaseException as exc:
        if patient:
            with anyio.CancelScope(shield=True), contextlib.suppress(*service.loop.interrupts):
                await start.done.wait()
                if made:
                    await made[0]._end(exc)
                raise
        # A start can't be called back. Whoever comes last kills the child: the loop when it takes it over, or we here.
        # The reaper owns it, collects it, and is not left before.
        start.abandoned = True
        if made:
            _kill(made[0])
        raise
    if start.error is not None:
        raise start.error
    if not made:  # the block was left without it
        raise anyio.ClosedResourceError
    return made[0]


def _kill(process: Process) -> None:
    process.close_pipes()
    watch = process._watch
    send = registry.send_group if watch.policy.scope == "group" else registry.send
    with contextlib.suppress(OSError):
        send(watch.record, signal.SIGKILL)


def _own(service: Service, start: Start, policy: Shutdown) -> Process:
    with registry.lock:
        try:
            record, ended = registry.enter(start.pid, None, service)
        except NotAChild:
            # It ran, it has ended, and somebody took its status already: a thief, or a kernel that was told to.
            service.lost += 1
            return Process._of(Watch(registry.stolen(start.pid), service, reap=True), start)
        watch = Watch(record, service, reap=True)
        service.watches.add(watch)
        registry.join(record, watch)
        process = Process._of(watch, start)
        watch.child = process._child
        service.own(watch, policy)
        service.processes[watch] = process
        if ended:
            service.finder.hand_in(record)
            service.kick()
    return process


async def run(process: Process, data: bytes | None, *, check: bool) -> CompletedProcess:
    """Feed a process, read all that it writes, and wait for it; end it if anything of that fails."""
    contents: dict[str, bytes] = {}
    closed: list[anyio.ClosedResourceError] = []

    async def drain(name: str, stream: PipeReceiveStream) -> None:
        buffer = BytesIO()
        try:
            while True:
                buffer.write(await stream.receive(_READ))
        except anyio.EndOfStream:
            contents[name] = buffer.getvalue()
        except anyio.ClosedResourceError as exc:  # the block of the reaper is being left: no group around it, please
            closed.append(exc)

    async def feed(stream: PipeSendStream) -> None:
        # A child that does not read its input is no failure: subprocess.run() is silent about it too.
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            if data:
                await stream.send(data)
        stream.close()

    try:
        async with anyio.create_task_group() as tasks:
            if process.stdout is not None:
                tasks.start_soon(drain, "stdout", process.stdout)
            if process.stderr is not None:
                tasks.start_soon(drain, "stderr", process.stderr)
            if process.stdin is not None:
                tasks.start_soon(feed, process.stdin)
        await process.aclose()
    except BaseException as exc:
        await process._end(exc)
        raise
    if closed:
        raise closed[0]
    status = await process._child.wait()
    done = CompletedProcess(process._command, status, contents.get("stdout"), contents.get("stderr"))
    if check:
        done.check_returncode()
    return done


_READ: Final = 1 << 18


def check_leads_group(pid: int) -> None:
    """Refuse to end the group of a child that leads none.

    Raises:
        ValueError: It leads none.
    """
    with contextlib.suppress(ChildProcessError):  # no child of ours: that is for `watch` to say
        _kernel.look(pid)
        if not _kernel.leads_group(pid):
            msg = (
                f"child {pid} leads no process group, so there is none to end: start it with process_group=0 or"
                " start_new_session=True, or adopt it with scope='process'"
            )
            raise ValueError(msg)
