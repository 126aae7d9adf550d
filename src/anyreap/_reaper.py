"""`open_reaper` and `Reaper`: the nursery, how it is opened, and how it is left."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from typing import IO, TYPE_CHECKING, Any, Final, Literal, TypeAlias

import anyio
import anyio.lowlevel

from anyreap import _kernel
from anyreap._child import Child
from anyreap._errors import NotAChild, StillRunning
from anyreap._loop import protect_from_ki
from anyreap._process import CompletedProcess, Process, check_leads_group, options_for, run, start_process
from anyreap._registry import Link, keeper_of, registry
from anyreap._service import Service, Watch
from anyreap._shutdown import Ladder, Shutdown
from anyreap._status import ExitStatus
from anyreap._table import Record, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from multiprocessing.process import BaseProcess
    from types import TracebackType

    from anyio.streams.memory import MemoryObjectReceiveStream

    StrOrBytesPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    AnyChild: TypeAlias = int | subprocess.Popen[Any] | BaseProcess


@dataclasses.dataclass(frozen=True, slots=True)
class ReaperStatistics:
    """Counters of one reaper: what `Reaper.statistics` returns.

    Attributes:
        watched: Children that it watches now, the owned ones among them.
        owned: Children that it owns now.
        reaped: Children that were collected since it was opened, the orphans not among them.
        orphans_reaped: Orphaned descendants that were collected since it was opened; 0 without `subreaper`.
        lost: Children that ended and whose status was gone, the orphans not among them.
        wakeups: How often its source woke it.
        late: Exits that a heartbeat found although the source was silent. Above 0: somebody keeps SIGCHLD away
            (blocked, or another handler), or takes statuses.
        source: What wakes it: `"sigchld"` or `"pidfd"`.

    Example:
        ```python
        import anyreap

        def why_so_slow(reaper: anyreap.Reaper) -> None:
            if reaper.statistics().late:
                print("SIGCHLD does not arrive: open the reaper with source='pidfd'")
        ```
    """

    watched: int
    owned: int
    reaped: int
    orphans_reaped: int
    lost: int
    wakeups: int
    late: int
    source: Literal["sigchld", "pidfd"]


class Reaper:
    """A reaper nursery: what `open_reaper` yields.

    Use it in the thread and on the loop where it was opened, inside its block, from any number of tasks. Everything
    else is a `RuntimeError` that says which rule was broken; `statistics` may be read at any time.

    Example:
        ```python
        import subprocess
        import anyio
        import anyreap

        async def main() -> None:
            async with anyreap.open_reaper() as reaper:
                popen = subprocess.Popen(["sleep", "0.1"])
                print(await reaper.wait(popen))
                assert popen.returncode == 0

        anyio.run(main)
        ```
    """

    __slots__ = ("_service",)

    _service: Service

    def __init__(self) -> None:
        msg = "a Reaper is made by `async with anyreap.open_reaper() as reaper`"
        raise TypeError(msg)

    @classmethod
    def _of(cls, service: Service) -> Reaper:
        self = cls.__new__(cls)
        self._service = service
        return self

    def watch(self, child: AnyChild, *, reap: bool = True) -> Child:
        """Watch a child of this process, whoever started it. It is neither waited for nor signalled on leaving.

        A `Popen` or `Process` is collected through its own method, so its `returncode` or `exitcode` is right
        afterwards, and is kept alive until then; if its code is set already, the `Child` has ended. A bare pid whose
        `Popen` is dropped may be collected by the next `Popen()` (`subprocess` does that): hand in the `Popen`.

        Until a child is collected, every call for it returns the same `Child`, upgraded and never downgraded:
        `reap=True` beats `False`, and a `Popen` or `Process` that is given later does the collecting. Nothing is
        collected but what was handed in, and a child that has exited already is fine.

        Not a checkpoint; never blocks.

        Args:
            child: A pid, a `subprocess.Popen`, or a `multiprocessing.Process`.
            reap: Whether to collect it. False: its status is seen, and the zombie is left to its owner. Of all who
                watch a child, one who wants it collected is enough.

        Raises:
            NotAChild: The pid is not an unreaped child of this process, or too large for a pid; or the `Process` was
                started by the fork server.
            ValueError: A pid below 1, or a `Process` that was not started.
            TypeError: Something else, `bool` too.
            RuntimeError: The reaper is closed, or used in another thread or in a forked child.

        Example:
            ```python
            import os
            import anyreap

            async def run(reaper: anyreap.Reaper) -> None:
                child = reaper.watch(os.posix_spawn("/bin/true", ["true"], os.environ))
                assert (await child.wait()).success
            ```
        """
        service = self._service
        service.check_use()
        pid, keeper = keeper_of(child)
        code = keeper.told() if keeper is not None else None
        if code is not None:
            return self._over(pid, code, reap=reap)
        with registry.lock:
            try:
                record, changed = registry.enter(pid, keeper, service)
            except NotAChild:
                if keeper is None or (code := keeper.told_soon()) is None:
                    raise
                return self._over(pid, code, reap=reap)
            watch: Watch | None = registry.watch_of(record, service)
            if watch is None:
                watch = Watch(record, service, reap=reap)
                watch.child = Child._of(watch)
                service.watches.add(watch)
                registry.join(record, watch)
            elif watch.child is None and not record.ended:  # an orphan that was taken in before it is handed in
                watch.child = Child._of(watch)
            if reap and not watch.reap:
                watch.reap = True  # who waits from now on waits for the collection
                if record.state is State.OBSERVED:
                    watch.settle()  # who waits already: that another thread has seen it end may be on its way still
            if changed:
                service.finder.hand_in(record)
        if changed:
            service.kick()
        return watch.child or Child._of(watch)

    def _over(self, pid: int, code: int, *, reap: bool) -> Child:
        """A child whose own object knows how it ended, and has collected it."""
        over: Record[Link] = Record.over(pid, State.EXITED, status=ExitStatus(pid, code))
        return Child._of(Watch(over, self._service, reap=reap))

    def adopt(self, child: AnyChild, *, shutdown: Shutdown | None = None) -> Child:
        """Watch a child, and own it: the block waits for its end, and ends it when the body fails or is cancelled.

        A second call for the same child replaces the policy.

        Not a checkpoint; never blocks.

        Args:
            child: A pid, a `subprocess.Popen`, or a `multiprocessing.Process`.
            shutdown: How to end it. Default: the policy of the reaper.

        Raises:
            NotAChild: As `watch`.
            ValueError: As `watch`, and a child that leads no group is to be ended with its group.
            TypeError: As `watch`, and if `shutdown` is not a `Shutdown`.
            RuntimeError: As `watch`, and once the reaper shuts its children down.

        Example:
            ```python
            import subprocess
            import anyio
            import anyreap

            async def main() -> None:
                with anyio.move_on_after(1):
                    async with anyreap.open_reaper() as reaper:
                        reaper.adopt(subprocess.Popen(["sleep", "60"]), shutdown=anyreap.Shutdown(grace=2))
                # the block was cancelled while it waited: SIGTERM, and nothing is left

            anyio.run(main)
            ```
        """
        _check_policy(shutdown)
        self._check_owns()
        if (shutdown or self._service.shutdown).scope == "group":
            check_leads_group(keeper_of(child)[0])
        adopted = self.watch(child)
        self._service.own(adopted._watch, shutdown)
        return adopted

    async def wait(self, child: AnyChild, *, reap: bool = True) -> ExitStatus:
        """Wait for a child of this process to end, whoever started it: `watch(child, reap=reap)`, then `Child.wait()`.

        Cancel safety: always a checkpoint. If it is cancelled, the child is still watched, and collected when it ends.

        Args:
            child: A pid, a `subprocess.Popen`, or a `multiprocessing.Process`.
            reap: Whether to collect it, as for `watch`.

        Returns:
            How it ended.

        Raises:
            NotAChild: As `watch`.
            ValueError: As `watch`.
            TypeError: As `watch`.
            RuntimeError: As `watch`.
            StatusLost: As `Child.wait`.

        Example:
            ```python
            import os
            import anyreap

            async def run(reaper: anyreap.Reaper) -> None:
                pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], os.environ)
                assert str(await reaper.wait(pid)) == "exited with code 3"
            ```
        """
        return await self.watch(child, reap=reap).wait()

    async def open_process(
        self,
        command: StrOrBytesPath | Sequence[StrOrBytesPath],
        *,
        stdin: int | IO[Any] | None = subprocess.PIPE,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        cwd: StrOrBytesPath | None = None,
        env: Mapping[str, str] | None = None,
        startupinfo: None = None,
        creationflags: Literal[0] = 0,
        start_new_session: bool = False,
        process_group: int | None = None,
        pass_fds: Sequence[int] = (),
        user: str | int | None = None,
        group: str | int | None = None,
        extra_groups: Iterable[str | int] | None = None,
        umask: int = -1,
        shutdown: Shutdown | None = None,
        **popen: Any,
    ) -> Process:
        """Start a child, and own it: `anyio.open_process`, in a nursery that leaves nothing behind.

        A thread that lives as long as the reaper starts it, so that a slow exec stalls no task, and so that a child
        that sets `PR_SET_PDEATHSIG` lives as long as the reaper (`man 2 prctl`: it is tied to the thread).

        Cancel safety: if it is cancelled, it returns at once; a child that was being started is killed as soon as it
        is there, and collected before the block is left.

        Args:
            command: A string for the shell, or a program and its arguments.
            stdin: `subprocess.PIPE`, `subprocess.DEVNULL`, a file, a descriptor, or None: ours.
            stdout: The same.
            stderr: The same, or `subprocess.STDOUT`.
            cwd: The directory to start in.
            env: The environment. Default: ours.
            startupinfo: For Windows; must be None.
            creationflags: For Windows; must be 0.
            start_new_session: Whether it leads a session of its own (`man 2 setsid`), and so a group.
            process_group: The process group to put it into; 0: one of its own (`man 2 setpgid`).
            pass_fds: Descriptors that it inherits.
            user: The user to run it as.
            group: The group to run it as.
            extra_groups: Its supplementary groups.
            umask: Its umask, if not negative.
            shutdown: How to end it. Default: the policy of the reaper. With `scope="group"` it is started with
                `process_group=0`, unless `process_group` or `start_new_session` is given.
            **popen: Of the other parameters of `subprocess.Popen`: `executable`, `close_fds`, `restore_signals`,
                `pipesize`.

        Returns:
            The child, with streams for the pipes.

        Raises:
            OSError: It could not be started (ENOENT, EACCES, ENOEXEC, E2BIG, EAGAIN, EMFILE ...): what
                `subprocess.Popen` raises. No child and no descriptor is left.
            ValueError: As `subprocess.Popen` (a NUL in an argument), and for a child that is to be ended with its
                group and put into another one.
            TypeError: A parameter that is not supported; the text says why.
            RuntimeError: As `watch`, and once the reaper shuts its children down.

        Example:
            ```python
            import anyreap

            async def first_line(reaper: anyreap.Reaper) -> bytes:
                async with await reaper.open_process(["git", "log"]) as process:
                    assert process.stdout is not None
                    return await process.stdout.receive()
            ```
        """
        given = {
            "stdin": stdin,
            "stdout": stdout,
            "stderr": stderr,
            "cwd": cwd,
            "env": env,
            "startupinfo": startupinfo,
            "creationflags": creationflags,
            "start_new_session": start_new_session,
            "process_group": process_group,
            "pass_fds": pass_fds,
            "user": user,
            "group": group,
            "extra_groups": extra_groups,
            "umask": umask,
        }
        return await self._start(command, shutdown, {**given, **popen}, patient=False)

    async def _start(self, command: Any, shutdown: Shutdown | None, given: dict[str, Any], *, patient: bool) -> Process:
        _check_policy(shutdown)
        self._check_owns()
        policy = shutdown or self._service.shutdown
        return await start_process(self._service, command, policy, options_for(policy, given), patient=patient)

    async def run_process(
        self,
        command: StrOrBytesPath | Sequence[StrOrBytesPath],
        *,
        input: bytes | None = None,  # noqa: A002  (anyio's name, and subprocess.run's)
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        check: bool = True,
        shutdown: Shutdown | None = None,
        **options: Any,
    ) -> CompletedProcess:
        r"""Start a child, feed it, read all that it writes, and wait for its end: `anyio.run_process`.

        Reads to the end of the pipes, as `subprocess.run` does: a descendant that holds them open is waited for. Is
        silent about a child that does not read its input.

        Cancel safety: if it is cancelled, in whatever way, the child is ended by its policy, shielded and within a
        bound, before the cancellation goes on. What it wrote is lost.

        Args:
            command: A string for the shell, or a program and its arguments.
            input: Bytes for its standard input, as many as memory holds.
            stdin: As `open_process`; not together with `input`.
            stdout: As `open_process`.
            stderr: As `open_process`.
            check: Whether to raise if it does not exit with code 0.
            shutdown: How to end it. Default: the policy of the reaper.
            **options: The other parameters of `open_process`.

        Returns:
            What it wrote, and how it ended, with CPU time and peak memory.

        Raises:
            ChildFailed: With `check`: it did not exit with code 0. Carries the status and what it wrote.
            StatusLost: Its status was consumed by somebody else; also without `check`.
            ValueError: `input` and `stdin` are given both; and as `open_process`.
            TypeError: As `open_process`.
            OSError: As `open_process`.
            anyio.ClosedResourceError: The block was left meanwhile, by another task.
            RuntimeError: As `open_process`.

        Example:
            ```python
            import anyio
            import anyreap

            async def main() -> None:
                async with anyreap.open_reaper() as reaper:
                    done = await reaper.run_process(["sort"], input=b"b\na\n")
                    assert done.stdout == b"a\nb\n" and done.status.success

            anyio.run(main)
            ```
        """
        if input is not None:
            if stdin is not None:
                msg = "only one of stdin and input is allowed"
                raise ValueError(msg)
            memoryview(input).release()  # a TypeError for what can't be sent, before anything is started
            stdin = subprocess.PIPE
        given = {"stdin": stdin, "stdout": stdout, "stderr": stderr, **options}
        return await run(await self._start(command, shutdown, given, patient=True), input, check=check)

    def _check_owns(self) -> None:
        self._service.check_use()
        if self._service.closing:
            msg = "this reaper is shutting its children down, and takes no new ones: use it inside of its block"
            raise RuntimeError(msg)

    def exits(self) -> MemoryObjectReceiveStream[ExitStatus]:
        """Return a stream of every exit that this reaper collects from now on, in order, those of orphans too.

        Unbounded: what nobody reads stays in memory. It ends when the block ends, so iterate it in a task of its own.
        Lost statuses are not in it, nor those of children that are only observed (`reap=False`). Each call makes a new
        stream.

        Not a checkpoint.

        Raises:
            RuntimeError: The reaper is closed, or used in another thread or in a forked child.

        Example:
            ```python
            import anyio
            import anyreap

            async def log(reaper: anyreap.Reaper) -> None:
                async with reaper.exits() as exits:
                    async for status in exits:
                        print(status.pid, status)
            ```
        """
        self._service.check_use()
        send, receive = anyio.create_memory_object_stream[ExitStatus](float("inf"))
        self._service.exits.append(send)
        return receive

    def statistics(self) -> ReaperStatistics:
        """Return the counters, as they are now.

        `watched` and `owned` count now, the others since the reaper was opened.

        Example:
            ```python
            import anyreap

            def busy(reaper: anyreap.Reaper) -> bool:
                return reaper.statistics().watched > 0
            ```
        """
        service = self._service
        return ReaperStatistics(
            watched=sum(
                watch.record.state is State.RUNNING and (watch.child is not None or not watch.orphan)
                for watch in list(service.watches)
            ),
            owned=len(service.owned),
            reaped=service.reaped,
            orphans_reaped=service.orphans_reaped,
            lost=service.lost,
            wakeups=service.wakeups,
            late=service.late,
            source=service.source,
        )

    def __repr__(self) -> str:
        now = self.statistics()
        state = "closed" if self._service.closed else f"watched={now.watched} owned={now.owned}"
        return f"<anyreap.Reaper {state} source={now.source}>"


class _Block:
    """The block of one reaper. A class with two methods, because a generator can't be protected from Ctrl-C whole."""

    def __init__(
        self,
        source: Literal["auto", "sigchld", "pidfd"],
        shutdown: Shutdown,
        heartbeat: float,
        orphan_grace: float | None,
    ) -> None:
        self._source = source
        self._shutdown = shutdown
        self._heartbeat = heartbeat
        self._orphan_grace = orphan_grace
        self._service: Service | None = None

    async def __aenter__(self) -> Reaper:
        if self._service is not None:
            msg = "a reaper's block can be entered once: call open_reaper() for each"
            raise RuntimeError(msg)
        # The one checkpoint comes first: from the installation to the body there is no place to be cancelled.
        await anyio.lowlevel.checkpoint()
        service = Service(heartbeat=self._heartbeat, shutdown=self._shutdown, orphan_grace=self._orphan_grace)
        try:
            with service.loop.uninterrupted():
                service.open(self._source)
                self._service = service
        except BaseException:
            if self._service is not None:  # opened, and interrupted right after; else it undid itself
                service.release()
            raise
        return Reaper._of(service)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        service = self._service
        assert service is not None  # noqa: S101  (__aenter__ ran)
        if os.getpid() != service.pid:
            if value is None:
                service.check_use()
            return  # a forked child on its way out: nothing here is its to end
        if isinstance(value, GeneratorExit):
            service.abandon()  # the coroutine is being thrown away: nothing can be awaited any more
            return
        try:
            await self._leave(service, value)
        except BaseException:
            # Interrupted where nothing more can be awaited (GeneratorExit), or a fault of ours or of a Popen's: either
            # way no child and no handler is left.
            if not service.closed:
                service.abandon()
            raise

    async def _leave(self, service: Service, value: BaseException | None) -> None:
        leaving: BaseException | None = value
        if value is None:
            try:
                await self._drained(service)
            except GeneratorExit:
                raise
            except BaseException as exc:  # noqa: BLE001  (it leaves, once nothing is left behind)
                leaving = exc
        service.closing = True
        survivors: dict[int, str] = {}
        if service.owned or service.groups or service.starting or service.orphans is not None:
            service.close_pipes()  # nor would one that is blocked on a full pipe, politely
            ladder = Ladder(service, leaving)
            survivors = await ladder.climb()
            leaving = ladder.interrupt or leaving
            interrupted = ladder.interrupt is not None
        else:
            interrupted = False
        interrupt = await service.stop()
        if interrupt is not None:
            leaving, interrupted = interrupt, True
        if survivors:
            error = StillRunning(survivors)
            if value is None and not interrupted and isinstance(leaving, anyio.get_cancelled_exc_class()):
                # Were it but a note on a cancellation, nobody would ever read it.
                raise error from leaving
            if leaving is None:
                raise error
            leaving.add_note(str(error))
        if leaving is not None and leaving is not value:
            try:
                raise leaving
            finally:
                del leaving

    @staticmethod
    async def _drained(service: Service) -> None:
        """Wait until every owned child has ended."""
        service.returned = True
        service.close_pipes()  # a child that reads to the end of its input would never end
        while service.owned or service.starting:
            if service.failure is not None:
                break
            await service.loop.park(service.parked)
        if service.failure is not None:
            msg = "the service of this reaper has failed; the children that it owned were shut down"
            raise RuntimeError(msg) from service.failure


def open_reaper(
    *,
    source: Literal["auto", "sigchld", "pidfd"] = "auto",
    shutdown: Shutdown = Shutdown(),  # noqa: B008  (a frozen value)
    subreaper: bool = False,
    orphan_grace: float = 1.0,
    heartbeat: float = 1.0,
) -> AbstractAsyncContextManager[Reaper]:
    """Open a reaper nursery.

    Works under `trio.run`, and `anyio.run` on asyncio, uvloop and trio; in any thread; any number of times, nested or
    side by side.

    Leaving the block:

    1. The body returned: wait, cancellably, until every *owned* child has ended.
    2. The body raised, or the block is cancelled, also while it waits in 1: shut every owned child down, all at the
       same time, each by its policy, shielded, within a bound; then let the exception go on, as itself. A
       KeyboardInterrupt, a native cancellation of asyncio, or a second cancellation during that ends the grace at once
       (SIGKILL), does not stop the collecting, and is the exception that leaves.
    3. What outlives SIGKILL by five seconds is named: `StillRunning` if the body had returned, else a note on the
       exception that is leaving.
    4. What was found is put back: SIGCHLD's handler with its flags, the wakeup fd, the subreaper bit, the open fds. It
       is per process: the first reaper installs, the last one restores, in whatever order they close. What somebody
       else changed meanwhile is left to them, with a warning.

    A child that is only *watched* is neither waited for nor signalled.

    With `subreaper`, descendants that lose their parent while the block is open are given to this process, and none
    escapes, a daemon that has forked twice neither. A child that nobody handed in is *proven* an orphan by the tag that
    `open_process` puts into the environment (`ANYREAP_FAMILY`, after those of other reapers), by the mark that each
    owned child hands on to its descendants (a soft RLIMIT_LOCKS, which Linux doesn't use), or if it is older than a
    list of our children that lacked it. Proven orphans are collected at once, with `orphan=True` in `exits()`. They
    keep no block open: once the last owned child is gone, however the block is left, they are ended by the policy
    `shutdown`, in rounds until none is left, within a bound. Whatever is not proven is never signalled; a zombie is
    collected after `orphan_grace`. With several such reapers, each ends the orphans of its own children, and the last
    one all others.

    Args:
        source: What wakes the reaper. `"sigchld"`: a self-pipe that a SIGCHLD handler writes to. `"pidfd"`: the
            pidfds of the children; where there are none, each child is looked at once in a heartbeat. `"auto"`:
            SIGCHLD where it can work (the main thread, trio or plain asyncio, not blocked, no handler installed
            from C), else pidfds.
        shutdown: The default policy for owned children, and that for orphans.
        subreaper: Whether to collect orphaned descendants too (`man 2 PR_SET_CHILD_SUBREAPER`).
            Linux, with a /proc. The setting is put back by the last one. As PID 1, where orphans come anyway, it is not
            touched.
        orphan_grace: Seconds, 0 or more. How long a zombie that nobody handed in, and that is not proven an orphan, is
            left to whoever may have started it. Then it is collected, unless a `Popen` or `multiprocessing.Process`
            that is alive stands for it. So other code that leaves its own child, known by its pid only, uncollected
            for longer **loses the status**: hand such children in, with `reap=False` if need be, or write `math.inf`:
            never collected.
        heartbeat: Seconds, above 0. The period in which the reaper looks without having been woken: it bounds how
            late an exit is seen when the signal never comes, or a status is stolen from a child without a pidfd.

    Raises:
        SigchldUnavailable: On entering: the source can't work here, and what to write instead.
        RuntimeError: `subreaper` can't work here: not Linux, or no /proc of this pid namespace; or, on entering, the
            kernel refuses it.
        ValueError: `heartbeat` is not above 0, `orphan_grace` is below 0 or NaN, or `source` is unknown.
        TypeError: `shutdown` is not a `Shutdown`.
        OSError: On entering: no descriptors for the pipe (EMFILE). Nothing was installed.

    Cancel safety: entering is a checkpoint, before anything is installed.

    Example:
        ```python
        import os
        import trio
        import anyreap

        async def main() -> None:
            async with anyreap.open_reaper() as reaper:
                pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], os.environ)
                assert (await reaper.wait(pid)).exit_code == 3

        trio.run(main)
        ```
    """
    if source not in ("auto", "sigchld", "pidfd"):
        msg = f"source is 'auto', 'sigchld' or 'pidfd', not {source!r}"
        raise ValueError(msg)
    if not heartbeat > 0:  # NaN too
        msg = f"heartbeat is a number of seconds above 0, not {heartbeat!r}"
        raise ValueError(msg)
    if not orphan_grace >= 0:
        msg = f"orphan_grace is a number of seconds, 0 or more (math.inf: never), not {orphan_grace!r}"
        raise ValueError(msg)
    if subreaper and (why := _kernel.no_subreaper()):
        msg = f"subreaper=True can't work here: {why}"
        raise RuntimeError(msg)
    _check_policy(shutdown)
    protect_from_ki(*_PROTECTED)
    return _Block(source, shutdown, heartbeat, orphan_grace if subreaper else None)


# Under trio these, and what they call, are interrupted only where they wait. What is begun here must be finished. That
# goes for a wait too: trio's own Event.wait, interrupted between two of its lines, keeps a task that is gone, and the
# next set() of that event, which is the service's, ends the run with a TrioInternalError.
_PROTECTED: Final = (
    _Block.__aenter__,
    _Block.__aexit__,
    Reaper.watch,
    Reaper.adopt,
    Reaper.open_process,
    Reaper.run_process,
    Child.wait,
    Child.send_signal,
    Process.aclose,
)


async def wait(child: AnyChild) -> ExitStatus:
    """Wait for one child of this process to end, whoever started it.

    Opens a reaper for this one wait. Two tasks, or two threads, that wait for the same child both get its status.

    Cancel safety: always a checkpoint. If it is cancelled, the child runs on, and is not collected; wait again.

    Args:
        child: A pid, a `subprocess.Popen`, or a `multiprocessing.Process`.

    Returns:
        How it ended.

    Raises:
        NotAChild: As `Reaper.watch`.
        ValueError: As `Reaper.watch`.
        TypeError: As `Reaper.watch`.
        StatusLost: As `Child.wait`.
        SigchldUnavailable: As `open_reaper`.

    Example:
        ```python
        import os
        import anyio
        import anyreap

        async def main() -> None:
            status = await anyreap.wait(os.posix_spawn("/bin/true", ["true"], os.environ))
            assert status.success

        anyio.run(main)
        ```
    """
    async with open_reaper() as reaper:
        return await reaper.wait(child)


def _check_policy(shutdown: object) -> None:
    if shutdown is not None and not isinstance(shutdown, Shutdown):
        msg = f"shutdown is an anyreap.Shutdown, such as Shutdown(grace=10), not {shutdown!r}"
        raise TypeError(msg)
