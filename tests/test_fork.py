"""A fork is safe (promise 7), and so is the end of the interpreter: each in a process of its own."""

from __future__ import annotations

import inspect
import os
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.harness import HOSTS, Host, run_alone, said

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Coroutine, Sequence

SELF_PIPE = tuple(host for host in HOSTS if host.source == "sigchld")

on_the_self_pipe = pytest.mark.parametrize("host", SELF_PIPE, ids=str)
on_plain_asyncio = pytest.mark.parametrize("host", [host for host in SELF_PIPE if host.backend == "asyncio"], ids=str)


# Helpers of the scripts.


class Forked:
    """A forked child that calls a function, tells what came of it, and stays until it is let go."""

    def __init__(self, function: Callable[[], object]) -> None:
        told, tell = os.pipe()
        hold, release = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            result = "nothing"
            try:
                os.close(told)
                os.close(release)
                result = repr(function())
            except BaseException:  # noqa: BLE001  (the parent is told)
                import traceback

                result = traceback.format_exc()
            finally:
                os.write(tell, result.encode())
                os.close(tell)
                os.read(hold, 1)
                os._exit(0)
        os.close(tell)
        os.close(hold)
        with open(told) as file:
            self.result = file.read()
        self._release = release

    def end(self) -> None:
        """Let it go, and collect it."""
        os.close(self._release)
        assert os.waitpid(self.pid, 0)[1] == 0


def error_of(function: Callable[..., object], *args: object) -> str:
    """The RuntimeError that a call raises."""
    try:
        function(*args)
    except RuntimeError as exc:
        return str(exc)
    return f"{function} raised nothing"


def at_once(coroutine: Coroutine[object, None, object]) -> None:
    """Run a coroutine that should raise before it waits."""
    try:
        coroutine.send(None)
    finally:
        coroutine.close()


FOR_SCRIPTS = "import ctypes\nfrom collections.abc import Callable, Coroutine\n" + "\n".join(
    inspect.getsource(part) for part in (Forked, error_of, at_once)
)


def alone(
    script: str,
    host: Host | None = None,
    *,
    flags: Sequence[str] = ("-X", "dev"),
    expect: int = 0,
    limit: float = 30,
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the helpers of this file; it must be silent."""
    script = FOR_SCRIPTS + textwrap.dedent(script)
    done = run_alone(script, host, flags=flags, expect=expect, limit=limit)
    # asyncio may say how slow this machine is
    assert said(done.stderr) == ""
    return done


# What a forked child may do with a reaper -------------------------------------------------------


def test_every_method_refuses_in_a_forked_child(host: Host) -> None:
    """In a forked child each method of the reaper and of its children is a RuntimeError that says so,
    nothing is signalled or collected, and the parent gets all 20 statuses (J1, field bug 46).
    """
    alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with Gate() as gate:
                    pids = [gate.add(f"exit {code}") for code in range(20)]
                    ours = [reaper.watch(pid) for pid in pids]
                    child = ours[0]

                    def use():
                        return [
                            error_of(reaper.watch, pids[0]),
                            error_of(reaper.adopt, pids[0]),
                            error_of(lambda: at_once(reaper.wait(pids[0]))),
                            error_of(reaper.exits),
                            error_of(lambda: at_once(child.wait())),
                            error_of(child.kill),
                            error_of(child.terminate),
                            error_of(child.send_signal, signal.SIGKILL),
                        ]

                    forked = Forked(use)
                    errors = eval(forked.result)
                    assert len(errors) == 8
                    for error in errors:
                        assert f"belongs to process {os.getpid()}" in error, error
                        assert f"forked child of it, {forked.pid}" in error, error
                    forked.end()
                    gate.open()
                    with anyio.fail_after(15):
                        assert [(await child.wait()).exit_code for child in ours] == [*range(20)]
                assert reaper.statistics().late == 0
        run(main)
        """,
        host,
    )


def test_streams_in_a_forked_child(host: Host) -> None:
    """In a forked child `aclose` of a process of the parent's refuses before it touches a stream, and a stream refuses
    to wait, and is closed without a word to the loop: its epoll is shared with the parent, whose task would wait for
    ever. It goes on waiting, and receives.
    """
    script = """
        async def main():
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                process = await reaper.open_process(["/bin/cat"])
                async def read():
                    with anyio.fail_after(10):
                        assert await process.stdout.receive() == b"said"
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await anyio.wait_all_tasks_blocked()

                    def inside():
                        number = process.stdout._fd
                        calls = process.aclose(), process.stdin.send(b"a"), process.stderr.receive()
                        errors = [error_of(at_once, call) for call in calls]
                        assert process.stdout._fd == number
                        process.stdout.close()
                        process.stdin.close()
                        return errors, number in open_fds()

                    forked = Forked(inside)
                    errors, there = eval(forked.result)
                    assert all(f"forked child of it, {forked.pid}" in error for error in errors), errors
                    assert not there
                    forked.end()
                    await process.stdin.send(b"said")
        run(main)
    """
    alone(script, host)


def test_properties_can_be_read_in_a_forked_child(host: Host) -> None:
    """What needs no kernel can be read in a forked child: statistics, status, repr (J1)."""
    alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with anyio.fail_after(15):
                    await (child := reaper.watch(exits_with(3))).wait()
                read = lambda: (child.pid, child.returncode, child.lost, repr(child), SOURCE,
                                reaper.statistics().source)
                forked = Forked(read)
                assert eval(forked.result) == read(), forked.result
                forked.end()
        run(main)
        """,
        host,
    )


def test_forked_child_has_what_was_found(host: Host) -> None:
    """A forked child has SIGCHLD's handler and flags, the wakeup fd and the mask as they were before
    the reaper, and none of its descriptors (J2, field bugs 44 and 45).
    """
    alone(
        """
        def theirs(signum, frame):
            pass

        def state():
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            return signal.getsignal(signal.SIGCHLD).__name__, sigaction(), mask

        async def main():
            signal.signal(signal.SIGCHLD, theirs)
            set_sigaction(sigaction()[0], SA_RESTART | 1)  # SA_NOCLDSTOP
            found, fds = state(), set(open_fds())
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with Gate() as gate:
                    reaper.watch(gate.add())
                    ours = {fd: what for fd, what in open_fds().items()
                            if fd not in fds and fd not in (gate.read, gate.write)}
                    assert ours

                    def look():
                        # Those of the loops are no concern of ours, and the fork server's of uvloop's.
                        wakeup = signal.set_wakeup_fd(-1) if SOURCE == "sigchld" else -1
                        same = [what for fd, what in open_fds().items() if ours.get(fd) == what
                                and "anon_inode" not in what]
                        return state(), same, wakeup in ours

                    forked = Forked(look)
                    now, left, lent = eval(forked.result)
                    assert now == found, (now, found)
                    assert not left, left
                    assert not lent
                    forked.end()
        run(main)
        """,
        host,
    )


@on_the_self_pipe
def test_forked_childs_signals_stay_out_of_our_pipe(host: Host) -> None:
    """A forked child's own SIGCHLDs, and its other signals, neither wake the parent's reaper nor write
    a byte into its pipe (J2, 0.10, field bug 44).
    """
    alone(
        """
        async def main():
            heard = []
            signal.signal(signal.SIGUSR1, lambda *args: heard.append(args))
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                def live():
                    for code in range(5):
                        assert collect(exits_with(code)) == code
                    signal.signal(signal.SIGCHLD, lambda *args: heard.append(args))
                    for _ in range(5):
                        signal.raise_signal(signal.SIGCHLD)
                        signal.raise_signal(signal.SIGUSR1)
                    return len(heard)

                await anyio.sleep(0.01)
                wakeups = reaper.statistics().wakeups
                forked = Forked(live)
                assert forked.result == "10", forked.result
                for _ in range(20):
                    await anyio.sleep(0.001)
                assert reaper.statistics().wakeups == wakeups
                assert not heard
                forked.end()
        run(main)
        """,
        host,
    )


def test_forked_childs_signals_stay_out_of_an_installed_fd() -> None:
    """A fork while `lowlevel.install_handler` is in effect: the child has the handler and the wakeup fd
    that were found before, and its signals write nothing into the parent's pipe (J2).
    """
    alone(
        """
        with anyreap.lowlevel.SelfPipe() as pipe:
            found = look()
            anyreap.lowlevel.install_handler(pipe.write_fileno())

            def live():
                now = look()
                collect(exits_with(0))
                signal.signal(signal.SIGCHLD, lambda *args: None)
                signal.raise_signal(signal.SIGCHLD)
                return (now.handler, now.action, now.wakeup) == (
                    found.handler, found.action, found.wakeup)

            forked = Forked(live)
            assert forked.result == "True", forked.result
            assert pipe.drain() == 0
            forked.end()
            assert pipe.drain() == 1
            anyreap.lowlevel.install_handler(-1)
            assert look() == found
        """
    )


def test_fork_leaves_a_foreign_wakeup_fd() -> None:
    """A wakeup fd that is somebody else's is still theirs in a forked child."""
    alone(
        """
        with anyreap.lowlevel.SelfPipe() as pipe, anyreap.lowlevel.SelfPipe() as theirs:
            anyreap.lowlevel.install_handler(pipe.write_fileno())
            signal.set_wakeup_fd(theirs.write_fileno())
            forked = Forked(lambda: signal.set_wakeup_fd(-1) == theirs.write_fileno())
            assert forked.result == "True", forked.result
            forked.end()
            assert signal.set_wakeup_fd(-1) == theirs.write_fileno()
            anyreap.lowlevel.install_handler(-1)
        """
    )


@pytest.mark.parametrize("host", [SELF_PIPE[0]], ids=str)
def test_fork_past_pythons_back(host: Host) -> None:
    """A child that C code forked, where no hook of Python's has run, doesn't write into our pipe
    either: our handler knows its process (promise 7).
    """
    alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                await anyio.sleep(0.01)
                wakeups = reaper.statistics().wakeups
                told, tell = os.pipe()
                hold, release = os.pipe()
                pid = ctypes.PyDLL(None).fork()
                if pid == 0:
                    for _ in range(5):
                        signal.raise_signal(signal.SIGCHLD)
                    os.write(tell, b"x")
                    os.close(release)
                    os.read(hold, 1)
                    os._exit(0)
                os.read(told, 1)
                for _ in range(20):
                    await anyio.sleep(0.001)
                assert reaper.statistics().wakeups == wakeups
                os.close(release)
                os.waitpid(pid, 0)
        run(main)
        """,
        host,
    )


def test_forked_child_leaves_the_block(host: Host) -> None:
    """A forked child leaves the block, normally (which is an error), by SystemExit, by an exception, or
    by its garbage collection: the parent's pipe, handler and epoll work on (J3).

    What it does to the loop itself is another matter: trio's and uvloop's don't survive one that is
    torn down in a forked child, with or without us. There the child ends when the block is left.
    """
    done = run_alone(
        FOR_SCRIPTS
        + textwrap.dedent(
            """
            parent = os.getpid()

            def leave(exc):
                if isinstance(exc, RuntimeError):
                    assert f"belongs to process {parent}" in str(exc), exc
                    os._exit(41)
                os._exit({SystemExit: 42, ZeroDivisionError: 43}[type(exc)])

            async def body(reaper, gate, way):
                child = reaper.watch(gate.add("exit 7"))
                owned = reaper.adopt(gate.add("exit 8"))
                forked = os.fork()
                if forked == 0:
                    gate.close()
                    if way == "return":
                        return
                    if way == "SystemExit":
                        raise SystemExit(0)
                    if way == "exception":
                        raise ZeroDivisionError
                    del reaper, child, owned
                    gc.collect()
                    os._exit(44)
                code = os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])
                assert code == {"return": 41, "SystemExit": 42, "exception": 43}.get(way, 44), code
                gate.open()
                with anyio.fail_after(15):
                    assert (await child.wait()).exit_code == 7
                    assert (await owned.wait()).exit_code == 8
                    assert (await reaper.wait(exits_with(9))).exit_code == 9
                assert reaper.statistics().late == 0

            async def main(way):
                try:
                    with Gate() as gate:
                        async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                            await body(reaper, gate, way)
                except BaseException as exc:
                    if os.getpid() != parent and (BACKEND == "trio" or OPTIONS["use_uvloop"]):
                        leave(exc)
                    raise

            run(anyio.sleep, 0)
            for way in ("return", "SystemExit", "exception", "collected"):
                before = look()
                try:
                    run(main, way)
                except BaseException as exc:
                    if os.getpid() != parent:
                        leave(exc)
                    raise
                assert look() == before, (look(), before)
            """
        ),
        host,
    )
    assert "anyreap" not in done.stderr, done.stderr


@pytest.mark.parametrize("host", [host for host in HOSTS if host.backend != "trio"], ids=str)
def test_forked_child_opens_a_reaper_of_its_own(host: Host) -> None:
    """A forked child starts a loop and a reaper of its own, and both processes get their statuses (J4).

    Not on trio, which refuses to run inside of a run, also in a forked child: see the next test.
    """
    alone(
        """
        import asyncio, uvloop

        async def one():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with anyio.fail_after(15):
                    return reaper.statistics().source, (await reaper.wait(exits_with(5))).exit_code

        def run_again():  # not through anyio, which remembers that a loop runs in this thread
            loop = uvloop.new_event_loop if OPTIONS["use_uvloop"] else asyncio.new_event_loop
            with asyncio.Runner(loop_factory=loop) as runner:
                return runner.run(one())

        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with Gate() as gate:
                    child = reaper.watch(gate.add("exit 7"))
                    forked = Forked(run_again)
                    assert forked.result == repr((SOURCE, 5)), forked.result
                    forked.end()
                    gate.open()
                    with anyio.fail_after(15):
                        assert (await child.wait()).exit_code == 7
                assert reaper.statistics().late == 0
        run(main)
        """,
        host,
    )


def test_fork_in_a_worker_thread(host: Host) -> None:
    """A thread forks while the loop of another one has a reaper: the old reaper refuses in the child, a
    new one works there, on every loop, and the parent's works on (J4, J5).
    """
    alone(
        """
        async def one(source):
            async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
                with anyio.fail_after(15):
                    return reaper.statistics().source, (await reaper.wait(exits_with(5))).exit_code

        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with Gate() as gate:
                    child = reaper.watch(pid := gate.add("exit 7"))
                    forked = []

                    def live():
                        if BACKEND == "trio":  # the parent's trio has set it, and the child's minds
                            signal.set_wakeup_fd(-1)
                        return error_of(reaper.watch, pid), run(one, SOURCE)

                    thread = threading.Thread(target=lambda: forked.append(Forked(live)))
                    thread.start()
                    thread.join()
                    assert forked[0].result.startswith("("), forked[0].result
                    error, of_its_own = eval(forked[0].result)
                    assert "belongs to process" in error, error
                    assert of_its_own == (SOURCE, 5), of_its_own
                    forked[0].end()
                    gate.open()
                    with anyio.fail_after(15):
                        assert (await child.wait()).exit_code == 7
                    assert reaper.statistics().late == 0
        run(main)
        """,
        host,
    )


@on_plain_asyncio
def test_fork_while_another_thread_is_inside(host: Host) -> None:
    """A fork while another thread holds the lock that all reapers share: the child, where that thread
    doesn't exist, doesn't wait for it (J5).
    """
    alone(
        """
        from anyreap._registry import registry

        async def one():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600) as reaper:
                with anyio.fail_after(15):
                    return (await reaper.wait(exits_with(5))).exit_code

        held, over = threading.Event(), threading.Event()

        def hold():
            with registry.lock:
                held.set()
                over.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(20)
        forked = Forked(lambda: run(one))
        over.set()
        thread.join()
        assert forked.result == "5", forked.result
        forked.end()
        """,
        host,
    )


def test_popen_works_in_a_forked_child(host: Host) -> None:
    """A forked child can use `subprocess` as always: no handler of ours and no SIGCHLD disposition gets
    in its way (field bug 45).
    """
    alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE, heartbeat=3600):
                forked = Forked(lambda: subprocess.run(["sh", "-c", "exit 3"]).returncode)
                assert forked.result == "3", forked.result
                forked.end()
        run(main)
        """,
        host,
    )


def test_multiprocessing_beside_us() -> None:
    """Processes of multiprocessing, by fork, spawn and fork server, beside a reaper: exit codes are
    right on both sides, also of those that were handed in (J6, field bug 23).
    """
    alone(
        """
        import asyncio, multiprocessing

        def code_in_child(source):
            async def one():
                async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
                    with anyio.fail_after(15):
                        return (await reaper.wait(exits_with(5))).exit_code
            os._exit(asyncio.run(one()))

        async def main(source):
            async with anyreap.open_reaper(source=source, heartbeat=3600) as reaper:
                for method in ("fork", "spawn", "forkserver"):
                    context = multiprocessing.get_context(method)
                    beside = context.Process(target=os._exit, args=(3,))
                    beside.start()
                    handed_in = context.Process(target=os._exit, args=(4,))
                    handed_in.start()
                    with anyio.fail_after(20):
                        if method == "forkserver":
                            try:
                                reaper.watch(handed_in)
                            except anyreap.NotAChild:
                                pass
                            else:
                                raise AssertionError("watched a child of the fork server")
                        else:
                            assert (await reaper.wait(handed_in)).exit_code == 4
                    for process, code in ((beside, 3), (handed_in, 4)):
                        process.join(20)
                        assert process.exitcode == code, (method, process)
                if source == "sigchld":
                    nested = multiprocessing.get_context("fork").Process(
                        target=code_in_child, args=(source,))
                    nested.start()
                    with anyio.fail_after(20):
                        assert (await reaper.wait(nested)).exit_code == 5

        anyio.run(main, "sigchld", backend="asyncio")
        anyio.run(main, "pidfd", backend="trio")
        from multiprocessing import forkserver, resource_tracker
        forkserver._forkserver._stop()
        resource_tracker._resource_tracker._stop()
        """,
        flags=(),
    )


# The end of the interpreter ----------------------------------------------------------------------


def test_exit_with_live_children(host: Host) -> None:
    """`sys.exit(5)` in the body, with a watched and an owned child: the owned one is ended, the watched
    one lives on, the exit code is 5, and nothing is printed (J8).
    """
    read, write = os.pipe()
    os.set_inheritable(write, True)
    done = alone(
        """
        async def main():
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                gate = Gate()
                reaper.watch(watched := gate.add("exit 0"))
                reaper.adopt(owned := sleeper())
                print(watched, owned, flush=True)
                try:
                    sys.exit(5)
                finally:
                    sys.stdout.flush()
        try:
            run(main)
        finally:
            print(*children())
        """,
        host,
        expect=5,
    )
    os.close(read)
    os.close(write)
    first, left = done.stdout.splitlines()
    assert left == first.split()[0]


def test_block_that_is_never_left(host: Host) -> None:
    """A block that is entered and never left: the run ends, nothing hangs, all is put back, and the exit
    code is unchanged (J8, field bug 49).
    """
    alone(
        """
        kept = []

        async def main():
            block = anyreap.open_reaper(source=SOURCE)
            kept.append(block)
            reaper = await block.__aenter__()
            kept.append(reaper)
            gate = Gate()
            kept.append(gate)
            reaper.watch(gate.add("exit 0"))

        run(anyio.sleep, 0)
        before = look()
        run(main)
        kept[2].close()
        os.waitpid(kept[2].pids[0], 0)
        assert look() == before, (look(), before)
        try:
            kept[1].watch(os.getppid())
        except RuntimeError as exc:
            assert "closed" in str(exc), exc
        sys.exit(6)
        """,
        host,
        expect=6,
        limit=15,
    )


def test_exit_while_a_reaper_is_open_in_a_thread(host: Host) -> None:
    """The interpreter exits while a daemon thread's loop has a reaper with live children: no hang, no
    traceback, and the exit code is unchanged (J8).
    """
    alone(
        """
        opened = threading.Event()
        gate = Gate()

        async def main():
            async with anyreap.open_reaper(heartbeat=3600) as reaper:
                child = reaper.watch(gate.add("exit 0"))
                opened.set()
                await child.wait()

        threading.Thread(target=run, args=(main,), daemon=True).start()
        assert opened.wait(20)
        sys.exit(6)
        """,
        host,
        expect=6,
    )


def test_loop_that_is_stopped_under_an_open_block() -> None:
    """A plain asyncio loop that is stopped and closed under an open block: no hang, and the interpreter
    exits with its own code (J8, I11).
    """
    done = run_alone(
        """
        import asyncio
        loop = asyncio.new_event_loop()
        gate = Gate()

        async def main():
            async with anyreap.open_reaper(source="sigchld", heartbeat=3600) as reaper:
                child = reaper.watch(gate.add("exit 0"))
                loop.call_soon(loop.stop)
                await child.wait()

        task = loop.create_task(main())
        loop.run_forever()
        loop.close()
        del task
        gc.collect()
        gate.open()
        os.waitpid(gate.pids[0], 0)
        signal.raise_signal(signal.SIGCHLD)
        gate.close()
        sys.exit(6)
        """,
        flags=(),
        expect=6,
    )
    assert "Traceback" not in done.stderr.replace("Task was destroyed", ""), done.stderr
