"""The pytest plugin: fixtures `reaper` and `no_leaked_children`, option `--fail-on-leaked-children`.

pytest loads it in every run of everybody who has anyreap installed (`-p no:anyreap` leaves it out). So nothing is
imported here but pytest; anyreap is, when a fixture needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    import anyreap

__all__ = ("no_leaked_children", "reaper")


# An async generator and no more. pytest-trio runs it in a test that is marked trio, anyio's plugin in one that uses
# anyio. Their own decorators would bind it to one of them, and so would a request for `anyio_backend`.
@pytest.fixture
async def reaper() -> AsyncIterator[anyreap.Reaper]:
    """A reaper nursery for the time of one async test, under pytest-trio or the plugin of anyio.

    When the test is over its block is cancelled: what it owns and still runs is shut down and collected.

    Example:
        ```python
        import pytest
        import anyreap

        @pytest.mark.anyio  # or pytest.mark.trio
        async def test_my_server(reaper: anyreap.Reaper) -> None:
            server = await reaper.open_process(["my-server"])
            ...
        ```
    """
    import anyio  # noqa: PLC0415  (not before a test needs it)

    import anyreap  # noqa: PLC0415

    # Left by its end the block would wait for its children, for ever if a test has failed before it ended them. As with
    # pytest-trio's `nursery`: a test that wants to wait does so itself.
    with anyio.CancelScope() as scope:
        async with anyreap.open_reaper() as reaper:
            yield reaper
            scope.cancel()


# Leaked children -----------------------------------------------------------------------------------------------------

_CHILDREN = "/proc/self/task/{}/children"

_Child: TypeAlias = tuple[int, int]
"""A pid, and when it was started, in clock ticks since boot: it tells a process from the next one with its pid."""


class _Begun(NamedTuple):
    """The beginning of a test: when it was, and the children that are not its own."""

    tick: int
    known: set[_Child]


_BEGUN = pytest.StashKey[_Begun]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("anyreap").addoption(
        "--fail-on-leaked-children",
        action="store_true",
        help="fail each test that leaves a child process of the test process behind, running or as a zombie",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Say at once if the option can't be served."""
    if config.getoption("fail_on_leaked_children") and (why := _unavailable()):
        raise pytest.UsageError(why)


@pytest.fixture
def no_leaked_children(request: pytest.FixtureRequest) -> None:
    """Fail the test if it leaves a child process of this process behind, running or as a zombie.

    What existed before it is not blamed on it, nor what a fixture of wider scope has started. Its own fixtures have
    been torn down when the children are counted, wherever in the list this one stands. Nothing is killed or collected.

    Example:
        ```python
        import subprocess
        import pytest

        @pytest.mark.usefixtures("no_leaked_children")
        def test_my_server() -> None:
            with subprocess.Popen(["sleep", "60"]) as server:
                server.kill()
        ```
    """
    if why := _unavailable():
        pytest.fail(why, pytrace=False)
    if _BEGUN not in request.config.stash:  # it was not in the list: request.getfixturevalue()
        _begin(request.config)


# Where the check stands: around the whole setup and teardown of a test, not in the fixture, which would be set up and
# torn down in the midst of the others, and blame a test for children that a fixture is about to end.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note the children that were there before the test."""
    wanted = item.config.getoption("fail_on_leaked_children")
    if wanted or ("no_leaked_children" in getattr(item, "fixturenames", ()) and not _unavailable()):
        _begin(item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Note the children that a fixture of wider scope starts: they outlive the test, as they should."""
    begun = request.config.stash.get(_BEGUN, None)
    if begun is None or fixturedef.scope == "function":
        return (yield)
    before = _children()
    try:
        return (yield)
    finally:
        begun.known.update(_children() - before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a test that has left children behind, after its last fixture."""
    try:
        return (yield)
    finally:
        begun = item.config.stash.get(_BEGUN, None)
        if begun is not None:
            del item.config.stash[_BEGUN]
            if left := list(_described(begun)):
                pytest.fail(_blame(item.nodeid, left), pytrace=False)


def _begin(config: pytest.Config) -> None:
    tick = time.clock_gettime_ns(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") // 10**9
    config.stash[_BEGUN] = _Begun(tick, _children())


def _unavailable() -> str:
    if os.path.exists(_CHILDREN.format(os.getpid())):
        return ""
    return (
        "leaked children can't be found here: the kernel does not list the children of a process in"
        f" {_CHILDREN.format('*')} (Linux with CONFIG_PROC_CHILDREN does, and its /proc must be mounted). Run without"
        " --fail-on-leaked-children and the fixture no_leaked_children"
    )


def _children() -> set[_Child]:
    from anyreap._kernel import children_of, stat_fields  # noqa: PLC0415

    found = set()
    for pid in children_of(os.getpid()):
        if fields := stat_fields(pid):
            found.add((pid, int(fields[19])))
    return found


def _helpers() -> set[int | None]:
    # The two processes that multiprocessing starts when it first needs them, and ends with this one.
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    return {getattr(tracker, "_pid", None), getattr(server, "_forkserver_pid", None)}


_STATES: Final = {"R": "running", "S": "sleeping", "D": "in a system call", "T": "stopped", "t": "traced"}


def _described(begun: _Begun) -> Iterator[str]:
    """The children that the test has started and left, a line each."""
    from anyreap import NotAChild, lowlevel  # noqa: PLC0415
    from anyreap._kernel import stat_fields  # noqa: PLC0415

    helpers = _helpers()
    for pid, start in sorted(_children() - begun.known):
        # Older than the test: an orphan that an earlier one has started, and that this process was given just now, as
        # a container's PID 1 is. (Or the kernel has left a child out of the list when another one was collected at that
        # moment, `man 5 proc_pid_task`.)
        if pid in helpers or start < begun.tick:
            continue
        with contextlib.suppress(NotAChild, OSError):  # some thread has collected it meanwhile
            status = lowlevel.peek(pid)
            state = (stat_fields(pid) or ["?"])[0]
            seen = f"zombie, {status}" if status else f"state {state} ({_STATES.get(state, 'ending')})"
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")
            with open(f"/proc/{pid}/comm") as file:  # all that a zombie keeps of its command line
                command = " ".join(words).strip() or f"[{file.read().strip()}]"
            yield f"    pid {pid}, {seen}: {command[:200]}"


def _blame(test: str, left: list[str]) -> str:
    what = "a child process" if len(left) == 1 else f"{len(left)} child processes"
    return (
        f"{test} started {what}, and left this behind:\n"
        + "\n".join(left)
        + "\nNothing was killed or collected, and no later test is blamed for it.\nA test waits for what it starts"
        " (popen.wait(), await reaper.wait(pid)), or has it owned:\nwhat the fixture `reaper` opens or adopts is ended"
        " and collected after the test.\nWhat is meant to outlive a test is started by a fixture of wider scope."
    )
