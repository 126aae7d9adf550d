"""The two loops: how the service task waits for its one descriptor, on trio and on asyncio (uvloop is one).

anyio is the layer between the loops for all else. For the service it would be in the way: it must outlive every
cancellation, on asyncio a native one too, which reaches a task through any shield; and a `wait_readable` on asyncio
registers the descriptor anew each time, which costs O(children) when it is an epoll (measured: 300 us at 4,000).

How a task waits for a child is here too: `park` and `unpark` a list of tasks. An event for each child would do the
same, but it takes 0.5 KiB with trio's and 1 KiB with asyncio's, and anyio takes 2 us to find out which one it needs.

So neither is a task of the block's own nursery, which would be cancelled with it: on trio it is a system task, on
asyncio a plain task that does not take a cancellation for an answer. The block starts it, and joins it before it is
left; that is as structured as a nursery.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterator

    # What a loop calls: with True if there was a hint, with False if it is time. It returns when it will be time the
    # next time, or None if that was the last.
    Sweep = Callable[[bool], Awaitable[float | None]]


def current_loop() -> TrioLoop | AsyncioLoop:
    """Return the loop that runs the calling task.

    Raises:
        RuntimeError: None does.
    """
    # trio first: in guest mode a trio task runs inside a callback of an asyncio loop, and is a trio task.
    # Neither is imported here: whoever runs on one has done so, and asyncio alone takes longer than all of anyreap.
    trio = sys.modules.get("trio")
    lowlevel = getattr(trio, "lowlevel", None)  # it may be in the middle of its import, in another thread
    if lowlevel is not None and lowlevel.in_trio_task():
        return TrioLoop()
    running = getattr(sys.modules.get("asyncio"), "get_running_loop", None)
    with contextlib.suppress(RuntimeError):
        if running is not None:
            return AsyncioLoop(running())
    msg = "a reaper is opened in a task of trio or asyncio, and no such loop runs here: trio.run(), anyio.run() ..."
    raise RuntimeError(msg)


def protect_from_ki(*functions: Callable[..., Any]) -> None:
    """Let no KeyboardInterrupt into these functions and what they call, under trio.

    trio's decorator would do, had it not to be imported: nobody who runs on asyncio shall import trio.
    """
    lowlevel = getattr(sys.modules.get("trio"), "lowlevel", None)
    if lowlevel is not None:
        for function in functions:
            lowlevel.enable_ki_protection(function)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    # The one way to keep a KeyboardInterrupt out of a few lines where no loop does: the call that blocks raises one
    # that has come, the call that unblocks raises one that came meanwhile. In between nothing starts and nothing waits.
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs no signal handler here
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class TrioLoop:
    """The service is a system task: outside of every cancel scope of the program, and protected from Ctrl-C."""

    lends_wakeup_fd: Final = False  # trio has its own, and looking at it would flip its flags
    interrupts: Final[tuple[type[BaseException], ...]] = (KeyboardInterrupt,)

    def __init__(self) -> None:
        import trio  # noqa: PLC0415  (only who runs on trio imports it)

        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()
        self.home: object = self._token
        self._fd = -1
        self._kicked = trio.Event()  # for a wait that has no descriptor any more

    def now(self) -> float:
        """The loop's clock, in seconds."""
        return self._trio.current_time()

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """Keep a KeyboardInterrupt out of a few lines that don't wait."""
        return contextlib.nullcontext()  # trio does, see protect_from_ki

    def open(self, fd: int, drain: Callable[[], object], kick: Callable[[], None]) -> None:
        """Take a descriptor to wait on, how to empty it, and how to make it readable."""
        self._fd, self._drain, self._wake = fd, drain, kick

    def kick(self) -> None:
        """End the current or the next wait."""
        self._wake()
        self._kicked.set()

    def start(self, serve: Callable[[], Awaitable[None]], died: Callable[[], None]) -> None:
        """Start the service task."""

        async def anyreap_service() -> None:
            try:
                await serve()
            finally:
                died()

        self._trio.lowlevel.spawn_system_task(anyreap_service)

    def ended(self) -> bool:
        """Whether the service task has ended and can't have said so."""
        return False

    def in_loop(self, call: Callable[[], None]) -> None:
        """Have something called in the loop's thread, from another one; `RuntimeError` if the loop is gone."""
        self._token.run_sync_soon(call)

    async def serve(self, until: float, sweep: Sweep) -> None:
        """Sweep when the descriptor is readable, and when a time has come, over and over: see `Sweep`."""
        due: float | None = until
        while due is not None:
            # One scope for many waits, whose deadline hardly ever moves. One for each wait was a third of what Python
            # did in an exit. Its deadline can't be missed: once it has passed, the next wait does not wait.
            with self._trio.CancelScope(deadline=due) as scope:
                while True:
                    await self._wait()
                    self._drain()
                    due = await sweep(True)  # noqa: FBT003
                    if due is None:
                        return
                    if due != scope.deadline:
                        scope.deadline = due
            due = await sweep(False)  # noqa: FBT003

    async def _wait(self) -> None:
        if self._fd >= 0:
            try:
                await self._trio.lowlevel.wait_readable(self._fd)
            except (OSError, self._trio.ClosedResourceError):  # somebody closed it: the heartbeat has to do
                pass
            else:
                return
        await self._kicked.wait()
        self._kicked = self._trio.Event()

    async def checkpoint(self) -> None:
        """Let others run."""
        await self._trio.lowlevel.cancel_shielded_checkpoint()

    async def park(self, parked: list[Any]) -> None:
        """Wait until the list is unparked. To be called where no KeyboardInterrupt comes in, see `protect_from_ki`."""
        task = self._trio.lowlevel.current_task()
        parked.append(task)

        def abort(_: object) -> Any:
            parked.remove(task)
            return self._trio.lowlevel.Abort.SUCCEEDED

        await self._trio.lowlevel.wait_task_rescheduled(abort)

    def unpark(self, parked: list[Any]) -> None:
        """Wake all who wait."""
        while parked:
            self._trio.lowlevel.reschedule(parked.pop(0))

    def close(self) -> None:
        """Let go of the descriptor, which is closed next."""
        if self._fd >= 0:
            with contextlib.suppress(RuntimeError):  # trio is gone already
                self._trio.lowlevel.notify_closing(self._fd)
        self._fd = -1

    def cancelled_scopes(self) -> Callable[[], int]:
        """Return what counts the cancelled scopes around the calling task, up to the first shield.

        Once one scope is cancelled, nothing public tells of a second one. Where the private names change, a second
        cancellation is not noticed, and the grace period takes its time.
        """
        return _counter(
            getattr(self._trio.lowlevel.current_task(), "_cancel_status", None),
            parent="_parent",
            scope=lambda status: getattr(status, "_scope", None),
        )


class AsyncioLoop:
    """The service is a plain task, woken by one lasting `add_reader`."""

    lends_wakeup_fd: Final = True

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio  # noqa: PLC0415  (only who runs on asyncio imports it)

        self._asyncio = asyncio
        self.interrupts: Final[tuple[type[BaseException], ...]] = (KeyboardInterrupt, asyncio.CancelledError)
        self.home: object = loop
        self._loop = loop
        self._fd = -1
        self._readable = False
        self._timed = False
        self._waiter: asyncio.Future[None] | None = None
        opener = asyncio.current_task(loop)
        self._opener = None if opener is None else weakref.ref(opener)

    def now(self) -> float:
        """The loop's clock, in seconds."""
        return self._loop.time()

    def uninterrupted(self) -> contextlib.AbstractContextManager[None]:
        """Keep a KeyboardInterrupt out of a few lines that don't wait."""
        return _uninterrupted()

    def open(self, fd: int, drain: Callable[[], object], kick: Callable[[], None]) -> None:  # noqa: ARG002
        """Take a descriptor to wait on, and how to empty it."""
        self._fd, self._drain = fd, drain
        self._loop.add_reader(fd, self._on_readable)

    def _on_readable(self) -> None:
        # Emptied here, not by the service: else it would be reported once more before the service has run.
        self._drain()
        self._readable = True
        self._wake()

    def kick(self) -> None:
        """End the current or the next wait."""
        self._readable = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def start(self, serve: Callable[[], Awaitable[None]], died: Callable[[], None]) -> None:
        """Start the service task, and start it again if something kills it that is not its own failure.

        It swallows cancellations, but one that comes before its first step never reaches it; and a KeyboardInterrupt
        that lands in one of its steps ends it, and the loop (which runs once more, to clean up).
        """

        async def anyreap_service() -> None:
            await serve()

        def done(task: asyncio.Task[None]) -> None:
            again = False
            try:
                killed = task.cancelled() or isinstance(task.exception(), (KeyboardInterrupt, SystemExit))
                again = killed and not self._orphaned()
                if again:
                    self.start(serve, died)
            except BaseException:
                again = False
                raise
            finally:
                if not again:
                    died()

        self._service = self._loop.create_task(anyreap_service(), name="anyreap service")
        self._service.add_done_callback(done)

    def ended(self) -> bool:
        """Whether the service task has ended, also where a KeyboardInterrupt kept it from saying so."""
        return self._service.done()

    def _orphaned(self) -> bool:
        # The task that opened the block has ended and left it open: an interrupt tore it down. Nobody will stop the
        # service, and asyncio.run() waits for all tasks.
        if self._opener is None:
            return False
        opener = self._opener()
        return opener is None or opener.done()

    def in_loop(self, call: Callable[[], None]) -> None:
        """Have something called in the loop's thread, from another one; `RuntimeError` if the loop is gone."""
        self._loop.call_soon_threadsafe(call)

    async def serve(self, until: float, sweep: Sweep) -> None:
        """Sweep when the descriptor is readable, and when a time has come, over and over: see `Sweep`."""
        due: float | None = until
        armed, timer = math.inf, None
        try:
            while due is not None:
                if due != armed:
                    if timer is not None:
                        timer.cancel()
                    armed, timer = due, None if due == math.inf else self._loop.call_at(due, self._on_time)
                if self._readable or self._timed:
                    await self.checkpoint()
                else:
                    self._waiter = self._loop.create_future()
                    await self._undisturbed(self._waiter)
                    self._waiter = None
                if self._timed:  # first: however many hints there are, they don't put it off
                    self._timed, armed = False, math.inf
                    due = await sweep(False)  # noqa: FBT003
                else:
                    readable, self._readable = self._readable, False
                    due = await sweep(readable)
        finally:
            if timer is not None:
                timer.cancel()

    def _on_time(self) -> None:
        self._timed = True
        self._wake()

    async def checkpoint(self) -> None:
        """Let others run."""
        await self._undisturbed(self._asyncio.sleep(0))

    async def park(self, parked: list[Any]) -> None:
        """Wait until the list is unparked."""
        future = self._loop.create_future()
        parked.append(future)
        try:
            await future
        except BaseException:
            if future in parked:  # cancelled or interrupted
                parked.remove(future)
            raise

    def unpark(self, parked: list[Any]) -> None:
        """Wake all who wait."""
        for future in parked:  # can be done twice: an interruption forgets nobody
            if not future.done():
                future.set_result(None)
        parked.clear()

    async def _undisturbed(self, awaitable: Awaitable[None]) -> None:
        # asyncio.run() cancels all tasks at its end, and so do programs, and then the block needs the service most.
        try:
            await awaitable
        except self._asyncio.CancelledError:
            if self._orphaned():
                raise

    def close(self) -> None:
        """Let go of the descriptor, which is closed next."""
        if self._fd >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._fd = -1

    def cancelled_scopes(self) -> Callable[[], int]:
        """Return what counts the cancelled scopes of anyio around the calling task, up to the first shield."""
        backend = sys.modules.get("anyio._backends._asyncio")
        states = getattr(backend, "_task_states", {})
        task = self._asyncio.current_task()
        state = states.get(task) if task is not None else None
        return _counter(getattr(state, "cancel_scope", None), parent="_parent_scope", scope=lambda scope: scope)


def _counter(innermost: Any, *, parent: str, scope: Callable[[Any], Any]) -> Callable[[], int]:
    def around() -> Iterator[Any]:
        link = innermost
        while link is not None:
            yield scope(link)
            if getattr(scope(link), "shield", True):
                return
            link = getattr(link, parent, None)

    return lambda: sum(bool(getattr(each, "cancel_called", False)) for each in around())
