"""The contenders that wait in tasks: one class each, of a few small methods, so that the works are written once.

    run(main)       run a loop, and `main(self)` in it
    start(argv)     start a child in the contender's own way, and watch it; descriptors for its stdin and stdout
    wait(child)     until it has ended
    watch(pid)      watch a child that something else started, where the contender can
    all(calls)      call them all, each in a task of its own, and wait for them
    read(argv)      start a child and read all that it writes; the number of bytes

Each uses the task that its loop has, so that nobody pays for another one's; anyreap's tasks are those of its host.
What only one contender needs is imported where it is made: a case pays for what it uses.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    Main = Callable[["Contender"], Coroutine[Any, Any, Any]]
    Calls = Sequence[Callable[[], Coroutine[Any, Any, Any]]]

CHUNK = 65536


def spawn(argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> int:
    """Start a child as cheaply as Python can. Returns its pid."""
    fds = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((stdin, stdout)) if fd is not None]
    return os.posix_spawn(argv[0], list(argv), os.environ, file_actions=fds)


class Contender:
    """What the works ask for."""

    def run(self, main: Main) -> Any:
        raise NotImplementedError

    async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return self.watch(spawn(argv, stdin, stdout))

    def watch(self, pid: int) -> Any:
        raise NotImplementedError

    async def wait(self, child: Any) -> None:
        await child.wait()

    async def all(self, calls: Calls) -> None:
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError

    async def read(self, argv: Sequence[str]) -> int:
        raise NotImplementedError


# The loops -----------------------------------------------------------------------------------------------------------


class OnTrio(Contender):
    def run(self, main: Main) -> Any:
        import trio

        self.trio = trio
        return trio.run(main, self)

    async def all(self, calls: Calls) -> None:
        async with self.trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)

    async def sleep(self, seconds: float) -> None:
        await self.trio.sleep(seconds)


class OnAsyncio(Contender):
    def run(self, main: Main) -> Any:
        with asyncio.Runner() as runner:
            return runner.run(main(self))

    async def all(self, calls: Calls) -> None:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class OnUvloop(OnAsyncio):
    def run(self, main: Main) -> Any:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main(self))


# anyreap -------------------------------------------------------------------------------------------------------------


def anyreap_on(host: type[Contender], source: Any) -> type[Contender]:
    """Anyreap on a loop, with a source: children by pid, as anything might have started them."""

    class Anyreap(host):  # type: ignore[valid-type,misc]
        def run(self, main: Main) -> Any:
            import anyreap

            async def inside(self: Any) -> Any:
                async with anyreap.open_reaper(source=source) as self.reaper:
                    return await main(self)

            return super().run(inside)

        def watch(self, pid: int) -> Any:
            return self.reaper.watch(pid)

        async def read(self, argv: Sequence[str]) -> int:
            async with await self.reaper.open_process(argv, stdin=None, stderr=None) as process:
                return await _drain(process.stdout)

    return Anyreap


def opening(contender: type[Contender]) -> type[Contender]:
    """Anyreap with children that it starts itself."""

    class Opening(contender):  # type: ignore[valid-type,misc]
        async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
            return await self.reaper.open_process(argv, stdin=stdin, stdout=stdout, stderr=None)

    return Opening


def running(contender: type[Contender]) -> type[Contender]:
    """Anyreap's `run_process`, which reads for us."""

    class Running(contender):  # type: ignore[valid-type,misc]
        async def read(self, argv: Sequence[str]) -> int:
            return len((await self.reaper.run_process(argv)).stdout)

    return Running


async def _drain(stream: Any) -> int:
    size = 0
    async for chunk in stream:
        size += len(chunk)
    return size


# The peers -----------------------------------------------------------------------------------------------------------


class TrioProcess(OnTrio):
    async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return await self.trio.lowlevel.open_process(argv, stdin=stdin, stdout=stdout)

    async def read(self, argv: Sequence[str]) -> int:
        process = await self.trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
        size = await _drain(process.stdout)
        await process.wait()
        return size


class TrioRunProcess(OnTrio):
    async def read(self, argv: Sequence[str]) -> int:
        return len((await self.trio.run_process(argv, capture_stdout=True)).stdout)


class _Watched(OnAsyncio):
    """Asyncio with one of its child watchers, which Python 3.14 has no more: there it chooses by itself."""

    watcher = "PidfdChildWatcher"

    def run(self, main: Main) -> Any:
        if sys.version_info < (3, 14):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                asyncio.get_event_loop_policy().set_child_watcher(getattr(asyncio, self.watcher)())
        elif self.watcher == "ThreadedChildWatcher":
            msg = "Python 3.14 chooses by itself"
            raise NotImplementedError(msg)
        return super().run(main)


class _AnyioProcess(Contender):
    async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        import anyio

        return await anyio.open_process(argv, stdin=stdin, stdout=stdout, stderr=None)

    async def read(self, argv: Sequence[str]) -> int:
        import anyio

        async with await anyio.open_process(argv, stdin=None, stderr=None) as process:
            return await _drain(process.stdout)


class AnyioOnTrio(_AnyioProcess, OnTrio):
    pass


class AnyioOnAsyncio(_AnyioProcess, _Watched):
    pass


class AnyioOnUvloop(_AnyioProcess, OnUvloop):
    pass


class _AnyioRunProcess(Contender):
    async def read(self, argv: Sequence[str]) -> int:
        import anyio

        return len((await anyio.run_process(argv)).stdout)


class AnyioRunProcess(_AnyioRunProcess, _Watched):
    pass


class AnyioRunProcessOnUvloop(_AnyioRunProcess, OnUvloop):
    pass


class _Native(OnAsyncio):
    async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return await asyncio.create_subprocess_exec(*argv, stdin=stdin, stdout=stdout)

    async def read(self, argv: Sequence[str]) -> int:
        process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        size = 0
        assert process.stdout is not None
        while chunk := await process.stdout.read(CHUNK):
            size += len(chunk)
        await process.wait()
        return size


class AsyncioPidfd(_Native, _Watched):
    pass


class AsyncioThreads(_Native, _Watched):
    watcher = "ThreadedChildWatcher"


class Uvloop(_Native, OnUvloop):
    pass


class AsyncioByPid(_Watched):
    """Asyncio's child watcher itself, with a pid: gone with Python 3.14."""

    def watch(self, pid: int) -> Any:
        done = asyncio.get_running_loop().create_future()

        def ended(*_: object) -> None:
            done.set_result(None)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            asyncio.get_child_watcher().add_child_handler(pid, ended)
        return done

    async def wait(self, child: Any) -> None:
        await child


class Twisted(Contender):
    """The ancestor: a SIGCHLD handler writes to a pipe, and then each child is asked for."""

    def run(self, main: Main) -> Any:
        from twisted.internet import defer, reactor, task
        from twisted.internet.protocol import ProcessProtocol
        from twisted.python import failure

        class Protocol(ProcessProtocol):  # type: ignore[misc]
            def __init__(self) -> None:
                self.ended = defer.Deferred()

            def processExited(self, reason: Any) -> None:  # noqa: N802  (Twisted's)
                del reason
                self.ended.callback(None)

        self._defer, self._reactor, self._task, self._protocol = defer, reactor, task, Protocol
        results: list[Any] = []

        def ended(result: Any) -> None:
            results.append(result)
            reactor.stop()

        reactor.callWhenRunning(lambda: defer.Deferred.fromCoroutine(main(self)).addBoth(ended))
        reactor.run()
        if isinstance(results[0], failure.Failure):
            results[0].raiseException()
        return results[0]

    async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        protocol = self._protocol()
        fds = {0: 0 if stdin is None else stdin, 1: 1 if stdout is None else stdout, 2: 2}
        self._reactor.spawnProcess(protocol, argv[0], argv, env=os.environ, childFDs=fds)
        return protocol

    async def wait(self, child: Any) -> None:
        await child.ended

    async def all(self, calls: Calls) -> None:
        await self._defer.gatherResults([self._defer.Deferred.fromCoroutine(call()) for call in calls])

    async def sleep(self, seconds: float) -> None:
        await self._task.deferLater(self._reactor, seconds)


class Gevent(Contender):
    """Greenlets wait where tasks would: each coroutine runs to its end in one step of a greenlet."""

    def run(self, main: Main) -> Any:
        import gevent
        import gevent.subprocess

        self._gevent = gevent
        return gevent.spawn(self._drive, lambda: main(self)).get()

    @staticmethod
    def _drive(call: Callable[[], Any]) -> Any:
        try:
            call().send(None)
        except StopIteration as stop:
            return stop.value
        msg = "a coroutine waited for something that is not gevent's"
        raise RuntimeError(msg)

    async def start(self, argv: Sequence[str], stdin: int | None = None, stdout: int | None = None) -> Any:
        return self._gevent.subprocess.Popen(argv, stdin=stdin, stdout=stdout)

    async def wait(self, child: Any) -> None:
        child.wait()

    async def all(self, calls: Calls) -> None:
        self._gevent.joinall([self._gevent.spawn(self._drive, call) for call in calls], raise_error=True)

    async def sleep(self, seconds: float) -> None:
        self._gevent.sleep(seconds)


# What the numbers are to be seen against: a task that waits for nothing ----------------------------------------------


class _Nothing(Contender):
    def __init__(self) -> None:
        self._events: list[Any] = []

    def watch(self, pid: int) -> Any:
        del pid
        self._events.append(self.event())
        return self._events[-1]

    def event(self) -> Any:
        return asyncio.Event()

    async def all(self, calls: Calls) -> None:
        async def last() -> None:
            await calls[-1]()
            for event in self._events:
                event.set()

        await super().all([*calls[:-1], last])


class NothingOnTrio(_Nothing, OnTrio):
    def event(self) -> Any:
        return self.trio.Event()


class NothingOnAsyncio(_Nothing, OnAsyncio):
    pass
