from __future__ import annotations

import functools
import re
import subprocess
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    RunPytest: TypeAlias = Callable[..., pytest.RunResult]

pytest_plugins = ["pytester"]

# Without the plugins that this project's tests happen to have, and that take their time to load.
ALONE = ("-p", "no:anyio", "-p", "no:trio", "-p", "no:hypothesispytest")


@pytest.fixture
def run_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> RunPytest:
    """Run pytest in a process of its own, which ends with all stacks if it hangs."""
    # With CI in the environment pytest says all of a failure twice.
    for name in ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    limits = ("-o", "faulthandler_timeout=30", "-o", "faulthandler_exit_on_timeout=true")
    return functools.partial(pytester.runpytest_subprocess, *limits)


# The reaper ----------------------------------------------------------------------------------------------------------

# Each test leaves a child to the fixture. The last one, which runs in the same process, looks for what is left of them.
REAPER = """
import os, signal
import pytest
import anyreap

left = []

async def use(reaper):
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 3"], os.environ)
    assert (await reaper.wait(pid)).exit_code == 3
    left.append(await reaper.open_process(["sleep", "3600"]))
    left.append(reaper.adopt(os.posix_spawn("/bin/sleep", ["sleep", "3600"], os.environ)))
"""
ON_ANYIO = """
@pytest.fixture(params=[("trio", {}), ("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})])
def anyio_backend(request):
    return request.param

@pytest.mark.anyio
async def test_on_anyio(reaper):
    await use(reaper)

@pytest.fixture
async def server(reaper):
    return await reaper.open_process(["cat"])

@pytest.mark.anyio
async def test_from_another_fixture(server):
    await server.stdin.send(b"x")
    assert await server.stdout.receive() == b"x"

@pytest.mark.anyio
@pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
async def test_that_fails(reaper):
    await use(reaper)
    1 / 0
"""
ON_TRIO = """
@pytest.mark.trio
async def test_on_trio(reaper):
    await use(reaper)

@pytest.fixture
async def trio_server(reaper):
    return await reaper.open_process(["cat"])

@pytest.mark.trio
async def test_from_another_fixture_on_trio(trio_server, nursery):
    await trio_server.stdin.send(b"x")
    assert await trio_server.stdout.receive() == b"x"

@pytest.mark.trio
@pytest.mark.xfail(raises=ExceptionGroup, strict=True)
async def test_that_fails_on_trio(reaper):
    await use(reaper)
    1 / 0
"""
LEFT = """
def test_nothing_is_left():
    assert [child.returncode for child in left] == [-signal.SIGTERM] * len(left)
    assert len(left) == {left}
"""


@pytest.mark.parametrize(
    ("tests", "args", "counts"),
    [
        pytest.param(ON_ANYIO + ON_TRIO, [], (9, 4, 16), id="both"),
        pytest.param(ON_ANYIO, ["-p", "no:trio"], (7, 3, 12), id="anyio-only"),
        pytest.param(ON_TRIO, ["-p", "no:anyio"], (3, 1, 4), id="pytest-trio-only"),
    ],
)
def test_the_reaper(
    pytester: pytest.Pytester, run_pytest: RunPytest, tests: str, args: list[str], counts: tuple[int, int, int]
) -> None:
    """The fixture works with anyio's plugin, on each loop, and with pytest-trio; either is enough. What a test leaves
    running is ended by the policy and collected before the next test, whether the test passes or fails.
    """
    passed, xfailed, left = counts
    pytester.makepyfile(REAPER + tests + LEFT.format(left=left))
    done = run_pytest("-W", "error", "--fail-on-leaked-children", *args)
    done.assert_outcomes(passed=passed, xfailed=xfailed)


def test_the_reaper_in_trio_mode(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    """In pytest-trio's `trio_mode` no test has to be marked."""
    pytester.makeini("[pytest]\ntrio_mode = true")
    pytester.makepyfile(REAPER + ON_TRIO.replace("@pytest.mark.trio\n", ""))
    run_pytest("-p", "no:anyio", "--fail-on-leaked-children").assert_outcomes(passed=2, xfailed=1)


# Leaked children -----------------------------------------------------------------------------------------------------

# The tests note the pids of what they start; the last fixture ends it, so that nothing is left on the machine.
LEAKS = """
import ctypes, os, signal, subprocess, time
from multiprocessing import resource_tracker
import pytest

pids = {}

def start(name, *command):
    pids[name] = os.posix_spawn(command[0], command, os.environ)
    with open("pids", "a") as file:
        print(name, pids[name], file=file)
    return pids[name]

def sleeper(name):
    pid = start(name, "/bin/sleep", "3600")
    while state(pid) != "S":
        pass
    return pid

def zombie(name):
    pid = start(name, "/bin/sh", "-c", "exit 3")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]

def end(name):
    pid = pids.pop(name)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

@pytest.fixture(scope="session", autouse=True)
def ended_at_last():
    yield
    for name in list(pids):
        end(name)
"""


def started(pytester: pytest.Pytester) -> dict[str, str]:
    """The pids of what the tests have started, by name."""
    return dict(line.split() for line in (pytester.path / "pids").read_text().splitlines())


def blamed(done: pytest.RunResult) -> list[str]:
    """The lines that name a test, and what it has left."""
    said = re.findall(r"^(?:\S+::(\w+) started .*:|    (pid .*))$", done.stdout.str(), re.MULTILINE)
    return [test or child for test, child in said]


def test_a_leak_is_reported_once_on_the_test_that_started_it(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    """With the option, a test that leaves a live child or a zombie has an error in its teardown, with pid, state and
    command. No later test is blamed, and nothing is killed or collected.
    """
    pytester.makepyfile(
        LEAKS
        + """
def test_innocent():
    subprocess.run(["true"])

def test_live():
    sleeper("live")

def test_zombie():
    zombie("zombie")

def test_after():
    assert (state(pids["live"]), state(pids["zombie"])) == ("S", "Z")

def test_two():
    sleeper("two")
    os.kill(sleeper("stopped"), signal.SIGSTOP)
    os.waitid(os.P_PID, pids["stopped"], os.WSTOPPED | os.WNOWAIT)

def test_that_fails():
    zombie("failed")
    assert not "this one failed"

@pytest.fixture
def failing():
    yield
    assert not "its teardown failed"

def test_with_a_failing_teardown(failing):
    zombie("torn_down")

def test_last():  # after it the session ends, and what its fixture ends is no leak
    assert len(pids) == 6
"""
    )
    done = run_pytest("--fail-on-leaked-children", *ALONE)
    done.assert_outcomes(passed=7, failed=1, errors=5)
    pids = started(pytester)
    assert blamed(done) == [
        "test_live",
        f"pid {pids['live']}, state S (sleeping): /bin/sleep 3600",
        "test_zombie",
        f"pid {pids['zombie']}, zombie, exited with code 3: [sh]",
        "test_two",
        *sorted(
            [
                f"pid {pids['two']}, state S (sleeping): /bin/sleep 3600",
                f"pid {pids['stopped']}, state T (stopped): /bin/sleep 3600",
            ]
        ),
        "test_that_fails",
        f"pid {pids['failed']}, zombie, exited with code 3: [sh]",
        "test_with_a_failing_teardown",
        f"pid {pids['torn_down']}, zombie, exited with code 3: [sh]",
    ]
    done.stdout.fnmatch_lines_random(
        ["*Nothing was killed or collected*", "*assert not 'this one failed'*", "*assert not 'its teardown failed'*"]
    )


def test_who_is_not_blamed(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    """A test is not blamed for what wider fixtures start, however they are asked for, for what its own fixtures end
    after it, for the helpers of multiprocessing, and for an orphan that was started before it.
    """
    pytester.makepyfile(
        LEAKS
        + """
@pytest.fixture(scope="session", autouse=True)
def orphan():
    # The child of a child, which comes to this process when its parent ends.
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    parent = subprocess.Popen(
        ["sh", "-c", "sleep 3600 >&2 & echo $!; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    pids["orphan"] = int(parent.stdout.readline())
    with open(f"/proc/{pids['orphan']}/stat") as file:
        born = int(file.read().rpartition(")")[2].split()[19])
    while time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") < born + 1:
        pass
    yield parent
    parent.communicate()

@pytest.fixture(scope="module")
def wide():
    return sleeper("wide")

@pytest.fixture(scope="class")
def asked_for():
    return sleeper("asked_for")

@pytest.fixture
def narrow():
    yield lambda: sleeper("narrow")
    end("narrow")

def test_wide(wide):
    assert state(wide) == "S"

def test_asks_for_wide(request):
    assert state(request.getfixturevalue("asked_for")) == "S"

def test_orphan(orphan):
    orphan.communicate()
    with open(f"/proc/{pids['orphan']}/stat") as file:
        assert int(file.read().rpartition(")")[2].split()[1]) == os.getpid()

def test_helpers():
    resource_tracker.ensure_running()
    assert state(resource_tracker._resource_tracker._pid)

@pytest.mark.parametrize("_", range(2))
def test_narrow(narrow, no_leaked_children, _):
    assert state(narrow()) == "S"
"""
    )
    done = run_pytest("--fail-on-leaked-children", *ALONE)
    done.assert_outcomes(passed=6)
    assert len(started(pytester)) == 3


def test_the_fixture(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    """Without the option only the tests that use the fixture are checked, in whatever way they ask for it."""
    pytester.makepyfile(
        LEAKS
        + """
def test_unchecked():
    zombie("unchecked")

def test_in_the_list(no_leaked_children):
    zombie("in_the_list")

@pytest.mark.usefixtures("no_leaked_children")
class TestMarked:
    def test_marked(self):
        zombie("marked")

def test_asks(request):
    zombie("before")
    request.getfixturevalue("no_leaked_children")
    zombie("asks")

def test_innocent(no_leaked_children):
    subprocess.run(["true"])
"""
    )
    done = run_pytest(*ALONE)
    done.assert_outcomes(passed=5, errors=3)
    pids = started(pytester)
    assert [line for line in blamed(done) if line.startswith("pid")] == [
        f"pid {pids[name]}, zombie, exited with code 3: [sh]" for name in ("in_the_list", "marked", "asks")
    ]


def test_where_children_are_not_listed(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    """Where the kernel does not list children, the option is refused, and the fixture fails: neither passes blindly."""
    pytester.makeconftest(
        "import anyreap.pytest_plugin; anyreap.pytest_plugin._CHILDREN = '/proc/self/task/{}/nothing'"
    )
    pytester.makepyfile("def test_it(no_leaked_children): pass")
    done = run_pytest("--fail-on-leaked-children", *ALONE)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: leaked children can't be found here: *"])
    run_pytest(*ALONE).assert_outcomes(errors=1)


# Loading -------------------------------------------------------------------------------------------------------------


def test_it_is_light() -> None:
    """What pytest loads at its start imports no loop, and nothing of anyreap but itself."""
    (entry,) = entry_points(group="pytest11", name="anyreap")
    code = f"import pytest, sys, {entry.value}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"pytest", entry.value} <= set(done.stdout.split())
    assert not {"anyio", "asyncio", "trio"} & set(done.stdout.split())
    ours = {name for name in done.stdout.split() if name.startswith("anyreap")}
    assert ours == {"anyreap", "anyreap.pytest_plugin"}


def test_it_is_left_out(pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-p no:anyreap` leaves it out, and `-p anyreap` loads it where no plugin is loaded by itself."""
    pytester.makepyfile("def test_it(no_leaked_children): pass")
    run_pytest("-p", "no:anyreap", *ALONE).assert_outcomes(errors=1)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    run_pytest().assert_outcomes(errors=1)
    run_pytest("-p", "anyreap").assert_outcomes(passed=1)
