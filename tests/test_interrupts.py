"""Ctrl-C at any moment, and coroutines that are thrown away. Each in a process of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.harness import HOSTS, Host, run_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

# Where the source makes no difference.
LOOPS = (HOSTS[0], HOSTS[3], HOSTS[4])

# A longer run tries every point and more rounds: ANYREAP_THOROUGH=1
THOROUGH = bool(os.environ.get("ANYREAP_THOROUGH"))


def alone(script: str, host: Host, *, limit: float = 60, flags: Sequence[str] = ()) -> str:
    """Run a script that prints what it has seen."""
    return run_alone(f"LIMIT = {limit}\n" + script, host, limit=limit, flags=flags).stdout


# What the scripts share. A child that was started and not handed in yet is nobody's but the program's, so the two are
# one step: on trio no KeyboardInterrupt gets in between; elsewhere `handing` tells that one did.
COMMON = """
import logging, random, time

# A child that is left behind must not keep the pipes open by which the test hears of it.
sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w") for fd in (1, 2))
for fd in (1, 2):
    os.dup2(os.open("/dev/null", os.O_WRONLY), fd)
faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.stderr)

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")  # of what an interruption leaves unawaited

handing = False

def hand(reaper, start, *args):
    global handing
    handing = True
    child = reaper.adopt(start(*args))
    handing = False
    return child

if BACKEND == "trio":
    import trio
    trio.lowlevel.enable_ki_protection(hand)

def quick():
    return os.posix_spawn("/bin/true", ["true"], os.environ)

def leaves(exc):
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for each in exc.exceptions for leaf in leaves(each)]
    return [exc]

def changed(before):
    # What is left in reference cycles of the loop that was interrupted goes with the collector.
    after = look()
    if after != before:
        gc.collect()
        after = look()
    return {
        name: (getattr(before, name), getattr(after, name))
        for name in Found._fields
        if getattr(before, name) != getattr(after, name)
    }

run(anyio.sleep, 0)  # what a loop makes once per process
"""

ROUNDS = (
    COMMON
    + """
rng = random.Random(SEED)
gap = None
inside = False
hits = 0

def fire(signum, frame):
    global gap, hits
    if hits and not inside:
        return  # the loop's own way out is not what is tested here
    hits += 1
    again, gap = gap, None
    if again is not None:
        signal.setitimer(signal.ITIMER_REAL, again)
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGALRM, fire)

def start(reaper, how, *args):
    # On trio the hand-in keeps interrupts off by itself, elsewhere the program has to.
    if BACKEND == "trio":
        return hand(reaper, how, *args)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGALRM})
        return hand(reaper, how, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGALRM})

async def churn(reaper, rng):
    live = []
    while True:
        kind = rng.randrange(4)
        if kind == 0:
            await start(reaper, quick).wait()
        elif kind == 1:
            child = start(reaper, subprocess.Popen, ["/bin/true"])
            reaper.watch(child.pid)
            await child.wait()
        elif kind == 2:
            live.append(start(reaper, sleeper))
        elif live:
            child = live.pop()
            child.terminate()
            with move_on_after(rng.random() / 500):
                await child.wait()
        if len(live) > 3:
            await anyio.sleep(0.001)
            live.pop().kill()

async def main(delay, nursery, seed):
    rng = random.Random(seed)
    global inside
    signal.setitimer(signal.ITIMER_REAL, delay)
    inside = True
    try:
        await block(rng, nursery)
    finally:
        inside = False

def start_all(tasks, reaper, rng):
    for _ in range(5):
        tasks.start_soon(churn, reaper, rng)

# An interrupted start_soon is a TrioInternalError later, and anyio's cover of trio's scopes lets interrupts in.
move_on_after, open_group = anyio.move_on_after, anyio.create_task_group
if BACKEND == "trio":
    trio.lowlevel.enable_ki_protection(start_all)
    move_on_after, open_group = trio.move_on_after, trio.open_nursery

async def block(rng, nursery):
    async with anyreap.open_reaper(source=SOURCE, shutdown=anyreap.Shutdown(grace=0.2)) as reaper:
        if nursery:
            async with open_group() as tasks:
                start_all(tasks, reaper, rng)
        else:
            await churn(reaper, rng)

def one(delay, second, nursery, seed):
    global gap, hits, inside
    hits, gap, inside = 0, second, False
    caught = None
    try:
        try:
            run(main, delay, nursery, seed)
        except BaseException as exc:
            caught = exc
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as exc:  # the second one came after the loop
        caught = exc
    signal.setitimer(signal.ITIMER_REAL, 0)
    return caught

before = look()
handler = signal.getsignal(signal.SIGINT)
twice = 0
for number in range(ROUNDS):
    delay = 1e-6 + rng.random() ** 2 * 0.03
    second = rng.random() ** 2 * 0.005 + 1e-6 if TWICE else None
    nursery = bool(number % 2)
    what = f"round {number}: {delay=} {nursery=} {second=}"
    caught = one(delay, second, nursery, number)
    twice += hits > 1
    kinds = {type(leaf) for leaf in leaves(caught)}
    if kinds != {KeyboardInterrupt} or not (nursery or hits > 1 or type(caught) is KeyboardInterrupt):
        print(what, file=sys.stderr)
        raise caught or AssertionError
    caught = None
    left = changed(before)
    assert not left, (what, left, open_fds(), [state_of(pid) for pid in children()])
    assert signal.getsignal(signal.SIGINT) is handler, what
assert twice > ROUNDS / 8 if TWICE else not twice, twice
print("fine")
"""
)


def rounds(host: Host, number: int, *, twice: bool) -> str:
    """Run a number of rounds for each loop, shared among its sources."""
    if not host.options.get("use_uvloop"):
        number //= 2
    if THOROUGH:
        number *= 20
    script = f"ROUNDS, SEED, TWICE = {number}, 1, {twice}\n" + ROUNDS
    return alone(script, host, limit=900 if THOROUGH else 45)


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_interrupted_at_random(host: Host) -> None:
    """Ctrl-C at a random moment of a busy block, two hundred times: each time it leaves as itself, and nothing is left
    behind: no child, no descriptor, no handler (promise 1, H1, H2).
    """
    assert rounds(host, 200, twice=False) == "fine\n"


# Not on asyncio: the second one is a bare KeyboardInterrupt there, which may land between two lines of asyncio itself.
# That drops the next step of a task, and asyncio.run() waits for it for ever, whoever runs on it. What a bare one does
# inside of anyreap is tested point by point, below.
@pytest.mark.parametrize("host", [host for host in HOSTS if host.backend == "trio"], ids=str)
def test_interrupted_twice_at_random(host: Host) -> None:
    """A second Ctrl-C soon after the first, in most cases while the block shuts down, leaves nothing behind either
    (promise 1, field bug 50).
    """
    assert rounds(host, 100, twice=True) == "fine\n"


# CPython runs signal handlers at certain places only (the "eval breaker"): where a function starts, where a loop goes
# round, and after a call of a function in C. A tracer that is called at each opcode finds these places, and sends
# SIGINT at the n-th of those that lie in anyreap. So the test needs no luck: n goes through all of them.
POINTS = (
    COMMON
    + """
import dis, json
HOMES = (os.path.dirname(anyreap.__file__),)
if BACKEND == "trio":
    HOMES += (trio._sync.__file__,)  # its Event.wait, interrupted, is a TrioInternalError at the next set()
CALLS = {dis.opmap[name] for name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX") if name in dis.opmap}
BACK = {dis.opmap["JUMP_BACKWARD"]}
RESUME = dis.opmap["RESUME"]

class Points:
    def __init__(self, at):
        self.at, self.count, self.before, self.where = at, 0, {}, None

    def enter(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(HOMES):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.before[frame] = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        return self.step

    def step(self, frame, event, arg):
        if event == "return":
            self.before.pop(frame, None)
            self.before.pop(frame.f_back, None)  # a call of a function in Python has no such place behind it
        elif event == "opcode":
            before = self.before.get(frame)
            self.before[frame] = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
            # After a `yield from` and an `await` there is none either: the argument of RESUME is 2 or 3.
            if before and (before[0] in CALLS | BACK or (before[0] == RESUME and before[1] & 3 < 2)):
                self.count += 1
                if self.count == self.at:
                    file = os.path.basename(frame.f_code.co_filename)
                    self.where = f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
                    signal.raise_signal(signal.SIGINT)
        return self.step

async def main():
    async with anyreap.open_reaper(
        source=SOURCE, shutdown=anyreap.Shutdown(grace=0.05), heartbeat=0.1
    ) as reaper:
        first = hand(reaper, sleeper)
        await hand(reaper, quick).wait()
        popen = hand(reaper, subprocess.Popen, ["/bin/true"])
        await popen.wait()
        if MODE == "return":
            first.terminate()
        elif MODE == "raise":
            raise ZeroDivisionError

def attempt(at):
    points = Points(at)
    sys.settrace(points.enter)
    try:
        run(main)
    except BaseException as exc:
        sys.settrace(None)
        return points, exc
    finally:
        sys.settrace(None)
    return points, None

def report(at):
    faulthandler.dump_traceback_later(10, exit=True, file=sys.stderr)
    before = look()
    points, caught = attempt(at)
    kind = type(caught).__name__
    caught = None
    left = changed(before)
    if handing and len(children()) <= 1:
        left.pop("children", None)
    if BACKEND != "trio":
        # The one place where a descriptor is lost for certain: between the return of the call that made it and the
        # assignment. Where nothing keeps an interrupt off, nobody can mend that.
        left.pop("fds", None)
    for pid in children():
        end(pid)
    return points.count, points.where, kind, sorted(left)

def apart(at):
    # Each attempt in a fork: what one has left behind must not become the fault of the next one.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(report(at)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return json.loads(said) if said else (0, "it hung", "", ["time"])

if BACKEND != "trio":
    # The second Ctrl-C under asyncio.run, and each one under another SIGINT handler than Python's own.
    def interrupt(signum, frame):
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)

faulthandler.cancel_dump_traceback_later()  # its lock, held by a thread, would be held for ever in a fork
total, *_ = apart(0)
assert total > 300, total
tried = 0
faults = []
for at in range(1, total + 1, STRIDE):
    _, where, kind, left = apart(at)
    if where is None:
        continue
    tried += 1
    if left or kind != "KeyboardInterrupt":
        faults.append(f"{at} at {where}: {kind}, changed: {left}")
assert tried > total / STRIDE / 2, (tried, total)
if faults:
    print(f"{len(faults)} of {tried}")
    print(*faults, sep=chr(10))
else:
    print("fine")
"""
)


@pytest.mark.parametrize("mode", ["return", "raise"])
@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_interrupted_at_every_point(host: Host, mode: str) -> None:
    """Ctrl-C at each place where it can come inside of anyreap: KeyboardInterrupt leaves, and no child, no handler and
    no wakeup fd is left behind (promise 1). A usual run tries a sample of the places.
    """
    stride = 1 if THOROUGH else 31
    script = f"MODE, STRIDE = {mode!r}, {stride}\n" + POINTS
    assert alone(script, host, limit=900 if THOROUGH else 45) == "fine\n"


# At a moment that the child chooses: its trap sends SIGINT to this process, and it goes on.
PRESSED = """
from tests.staging import Sent, Stage, handling
import pytest

async def main(first):
    patch = pytest.MonkeyPatch()
    sent = Sent(patch)
    with Stage() as stage, patch.context():
        pid = stage.start(handling("kill -INT $PPID"))
        scope = anyio.CancelScope()
        try:
            with scope:
                async with anyreap.open_reaper(
                    source=SOURCE, shutdown=anyreap.Shutdown(grace=3600)
                ) as reaper:
                    child = reaper.adopt(pid)
                    if first == "raised":
                        raise ZeroDivisionError
                    scope.cancel()
                    if first == "body":
                        await anyio.sleep_forever()
        except BaseException as exc:
            print(type(exc).__name__)
            raise
        finally:
            print(child.status, *sent.to(pid), reaper.statistics().owned)
            patch.undo()

run(anyio.sleep, 0)
before = look()
for first in ("raised", "body", "waiting"):
    try:
        run(main, first)
    except KeyboardInterrupt:
        print("interrupted")
    gc.collect()
    assert look() == before, (look(), before)
"""


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_interrupted_in_the_grace(host: Host) -> None:
    """Ctrl-C during the grace ends it with SIGKILL, does not stop the collecting, and is what leaves (H2)."""
    kind = "KeyboardInterrupt" if host.backend == "trio" else "CancelledError"
    TERM, CONT, KILL = 15, 18, 9  # noqa: N806
    one = f"{kind}\nkilled by SIGKILL {TERM} {CONT} {KILL} 0\ninterrupted\n"
    assert run_alone(PRESSED, host).stdout == one * 3


NATIVE = """
from tests.staging import Stage, handling

async def main():
    with Stage() as stage:
        pid = stage.start(handling("kill -INT $PPID", "USR1"))
        try:
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                child = reaper.adopt(pid)
                child.send_signal(signal.SIGUSR1)
        finally:
            print(child.status)

run(anyio.sleep, 0)
before = look()
try:
    run(main)
except KeyboardInterrupt as exc:
    print(getattr(exc, "__notes__", "interrupted"))
gc.collect()
assert look() == before, (look(), before)
"""


@pytest.mark.parametrize("host", LOOPS, ids=str)
def test_interrupted_while_the_block_waits(host: Host) -> None:
    """Ctrl-C while the block waits for its children ends them by their policy, and leaves."""
    assert run_alone(NATIVE, host).stdout == "killed by SIGTERM\ninterrupted\n"


OTHER_TASK = """
from tests.staging import Stage, handling

async def block():
    with Stage() as stage:
        pid = stage.start(handling("kill -INT $PPID", "USR1"))
        try:
            async with anyreap.open_reaper(source=SOURCE) as reaper:
                child = reaper.adopt(pid)
                child.send_signal(signal.SIGUSR1)
                await child.wait()
        finally:
            print(child.status)

async def main():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(block)

run(anyio.sleep, 0)
before = look()
try:
    run(main)
except* KeyboardInterrupt as exc:
    print("interrupted")
gc.collect()
assert look() == before, (look(), before)
"""


@pytest.mark.parametrize("host", LOOPS, ids=str)
def test_interrupted_in_another_task_than_the_block_s(host: Host) -> None:
    """Ctrl-C, which loops hand to the main task, cancels a block in another task, which ends its children."""
    assert run_alone(OTHER_TASK, host).stdout == "killed by SIGTERM\ninterrupted\n"


TERMINATED = """
from tests.staging import Sent, Stage
import pytest

async def main():
    patch = pytest.MonkeyPatch()
    sent = Sent(patch)
    with Stage() as stage:
        pid = stage.start("trap 'kill -TERM $PPID' TERM; echo >&3; read x; echo >&3; read x; exit 6")
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            heard = 0

            async def listen(*, task_status):
                nonlocal heard
                with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                    task_status.started()
                    async for _ in signals:
                        heard += 1
                        scope.cancel()
                        if heard == 2:
                            stage.open()
                            return

            await tasks.start(listen)
            with scope:
                async with anyreap.open_reaper(
                    source=SOURCE, shutdown=anyreap.Shutdown(grace=3600)
                ) as reaper:
                    child = reaper.adopt(pid)
                    os.kill(os.getpid(), signal.SIGTERM)
        patch.undo()
        print(heard, child.status, *sent.to(pid))

run(main)
"""


@pytest.mark.parametrize("host", LOOPS, ids=str)
def test_terminated_twice_is_one_shutdown(host: Host) -> None:
    """A program that cancels its block at SIGTERM, and gets another one meanwhile, shuts down once (H4, promise 11)."""
    assert run_alone(TERMINATED, host).stdout == "2 exited with code 6 15 18\n"


# Coroutines that are thrown away ------------------------------------------------------------------

CLOSED = """
import types

class Drive:
    # Runs a coroutine to its n-th await inside the body, then closes it.
    def __init__(self, coro, ready):
        self.coro, self.ready = coro, ready

    def __await__(self):
        value = None
        while True:
            trap = self.coro.send(value)
            if self.ready():
                self.coro.close()
                return
            value = yield trap

async def main():
    owned = []

    async def block():
        async with anyreap.open_reaper(source=SOURCE) as reaper:
            owned.append(reaper.adopt(sleeper()))
            owned.append(reaper.adopt(exits_with(3)))
            await owned[1].wait()
            watched.append(reaper.watch(sleeper()))
            owned.append(reaper.adopt(subprocess.Popen(["sleep", "3600"])))
            await anyio.sleep_forever()

    watched = []
    await Drive(block(), lambda: len(owned) == 3)
    print(*(child.status for child in owned), sep=", ")
    assert children() == {watched[0].pid}
    end(watched[0].pid)
    for child in owned:
        await child.wait()
    try:
        await watched[0].wait()
    except anyio.ClosedResourceError:
        print("closed")

run(anyio.sleep, 0)
before = look()
run(main)
assert look() == before, (look(), before)
"""


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_closed_coroutine_leaves_no_child(host: Host) -> None:
    """A coroutine that is closed inside of its block (GeneratorExit) can't wait, and still leaves no owned child."""
    done = run_alone(CLOSED, host)
    expected = "killed by SIGKILL, exited with code 3, killed by SIGKILL\nclosed\n"
    assert done.stdout == expected
    assert done.stderr == ""


FORSAKEN = """
import asyncio

async def block(ready):
    async with anyreap.open_reaper(source=SOURCE) as reaper:
        reaper.adopt(sleeper())
        reaper.adopt(sleeper())
        ready.set()
        await asyncio.sleep(3600)

async def main():
    ready = asyncio.Event()
    task = asyncio.get_running_loop().create_task(block(ready))
    await ready.wait()
    return task

def new_loop():
    if OPTIONS.get("use_uvloop"):
        import uvloop
        return uvloop.new_event_loop()
    return asyncio.new_event_loop()

loop = new_loop()
loop.run_until_complete(asyncio.sleep(0))
loop.close()
del loop
gc.collect()
before = look()
loop = new_loop()
task = loop.run_until_complete(main())
assert len(children() - before.children) == 2
loop.close()
task._log_destroy_pending = False
del task, loop
gc.collect()
after = look()
for pid in children():
    end(pid)
assert after == before, (after, before)
print("fine")
"""


@pytest.mark.parametrize("host", [host for host in HOSTS if host.backend == "asyncio"], ids=str)
def test_closed_loop_leaves_no_child(host: Host) -> None:
    """A loop that was closed under an open block (I11, field bug 49): when its task is collected, no child is left."""
    assert run_alone(FORSAKEN, host).stdout == "fine\n"
