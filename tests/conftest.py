"""Fixtures: every backend, every source, and the check that each test leaves nothing behind."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from anyreap import _kernel
from tests import broken as broken, harness

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all and --part."""
    parser.addoption("--all", action="store_true", help="every backend, with every source, with and without pidfds")
    parser.addoption(
        "--part", metavar="N/M", help="every M-th test from the N-th on: what tests/run.py runs side by side"
    )


def pytest_configure() -> None:
    """Let Ctrl-C count, where a shell started the tests in the background and had them ignore it (POSIX, 2.11); and
    let coverage not freeze Python 3.11.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.version_info < (3, 12) and threading.gettrace() is not None:
        threading.settrace(_untraced)


def _untraced(*_: object) -> None:
    # CPython 3.11: a traced thread that comes to the start of a function while a signal waits for the main thread's
    # Python handler starts it over and over, holding the GIL. A main thread that wants the GIL ends that. One that
    # waits for a lock does not: SA_RESTART, which whoever installs a SIGCHLD handler should set, has sem_wait(3) go on.
    # So does anyio's test runner wait for trio's epoll thread (guest mode), and both hang for ever. Twenty lines with
    # neither trio nor anyreap in them show it; 3.12 is free of it. So threads are not traced: what they alone run is
    # not counted.
    sys.settrace(None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, unless --all is given, what differs from another case in nothing that matters most of the time; and
    what the other parts run.

    Without pidfds both sources go the same way, but for what wakes them: the self-pipe on trio and asyncio, and the
    heartbeat on uvloop, stand for all.
    """
    left_out = set()
    if not config.getoption("--all"):
        for item in items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            if item.path.name == "test_site.py" and not any("test_site" in each for each in config.args):
                left_out.add(item)  # a minute of a browser: `make browser`
            if params.get("pidfds") == "no-pidfds" and str(params.get("host")) in ("trio-pidfd", "asyncio-pidfd"):
                left_out.add(item)
    if part := config.getoption("--part"):
        number, parts = map(int, part.split("/"))
        kept = [item for item in items if item not in left_out]
        left_out.update(set(kept).difference(kept[number - 1 :: parts]))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=harness.HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> harness.Host:
    """Each backend with each source that works on it."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def anyio_backend(host: harness.Host) -> tuple[str, dict[str, Any]]:
    """Run each async test (`@pytest.mark.anyio`) on each host."""
    return host.backend, host.options


@pytest.fixture
def source(host: harness.Host) -> Any:
    """The source to open the reaper with."""
    return host.source


@pytest.fixture(params=["pidfds", "no-pidfds"])
def pidfds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Once with pidfds, once as where there are none."""
    if request.param == "no-pidfds":
        monkeypatch.setattr(_kernel, "_usable", False)
    return bool(request.param == "pidfds")


@pytest.fixture
def no_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are no pidfds."""
    monkeypatch.setattr(_kernel, "_usable", False)


@pytest.fixture(scope="session", autouse=True)
def warmed_up() -> None:
    """Let each loop make what it makes once per process: libuv keeps a pipe for ever."""
    for backend, options in (harness.TRIO, harness.ASYNCIO, harness.UVLOOP):
        anyio.run(anyio.sleep, 0, backend=backend, backend_options=options)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a child, a descriptor, a thread, a handler, a flag, a wakeup fd or a mask behind."""
    before = harness.look()
    yield
    after = harness.look()
    if after != before:  # cycles may hold it: a collection each time would cost more than most tests
        gc.collect()
        after = harness.look()
    for pid in after.children - before.children:  # for the sake of the tests that follow
        harness.end(pid)
    for field in harness.Found._fields:
        left, found = getattr(after, field), getattr(before, field)
        if field == "threads":  # those of a pool end when they have been idle for a while
            left = {name for name in left - found if "thread" not in name.lower() and "worker" not in name.lower()}
            found = set()
        if field == "fds":
            left, found = left - found, set()
        if left != found:
            detail = f": {harness.open_fds()}" if field == "fds" else ""
            pytest.fail(f"the test changed {field}: {found!r} before, {left!r} after{detail}")
