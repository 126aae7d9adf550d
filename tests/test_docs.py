"""Every code block of the README, of the pages under docs/ and of the docstrings is run, and so are the examples."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import anyreap
from tests.harness import said

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [ROOT / "examples" / name for name in ("demo.py", "every_kind_of_child.py")]  # the others: test_examples.py

SNIPPET = re.compile(r'^--8<-- "(?P<path>[^"]+)"$', re.MULTILINE)
BLOCK = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


def blocks(name: str, text: str | None) -> Iterator[Any]:
    """The Python blocks of a text, as parameters of a test."""
    text = SNIPPET.sub(lambda found: (ROOT / found["path"]).read_text(), text or "")
    for number, found in enumerate(BLOCK.finditer(text), 1):
        yield pytest.param(textwrap.dedent(found["code"]), id=f"{name}-{number}")


def documented() -> Iterator[tuple[str, Any]]:
    """Every public name, and every public member of the public classes."""
    for module in (anyreap, anyreap.lowlevel):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                continue
            yield name, thing
            if inspect.isclass(thing):
                for member, value in vars(thing).items():
                    if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                        yield f"{name}.{member}", value


IN_PAGES = [block for page in PAGES for block in blocks(page.name, page.read_text())]
IN_DOCSTRINGS = [block for name, thing in documented() for block in blocks(name, inspect.getdoc(thing))]


@pytest.mark.parametrize("code", IN_PAGES + IN_DOCSTRINGS)
def test_code_in_the_documentation_runs(code: str) -> None:
    """A code block that readers copy runs as it stands, in a Python of its own in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert said(done.stderr) == ""


@pytest.mark.parametrize(("name", "thing"), list(documented()))
def test_every_public_name_is_documented(name: str, thing: Any) -> None:
    """Every public name has a docstring; every class and function among them has an example."""
    doc = inspect.getdoc(thing)
    assert doc, name
    if "." not in name:
        assert list(blocks(name, doc)), f"{name} has no example"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path) -> None:
    """Each example runs to its end, is silent on stderr, and leaves no child."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert said(done.stderr) == ""


@pytest.mark.parametrize("backend", ["trio", "asyncio", "uvloop"])
def test_the_demo_shows_every_end(backend: str) -> None:
    """The demo names each kind of child with the way it ended, and finds no child left, on each backend."""
    example = ROOT / "examples" / "every_kind_of_child.py"
    done = subprocess.run(
        [sys.executable, str(example), backend],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    lines = done.stdout.splitlines()

    def row(start: str) -> str:
        return next(line for line in lines if line.strip().startswith(start))

    assert "exited with code 7" in row("pty.fork")
    assert "killed by SIGKILL" in row("subprocess.Popen")
    assert "exited with code 5" in row("multiprocessing.Process")
    assert "killed by SIGABRT" in row("os.posix_spawn, abort")
    assert "killed by SIGTERM" in row("adopted, ends on SIGTERM")
    assert "killed by SIGKILL" in row("adopted, ignores SIGTERM")
    assert "exited with code 9" in row("os.posix_spawn, status stolen") or "lost" in row("os.posix_spawn, status")
    assert lines[-1].strip() == "0 children left"


def test_threat_model_names_tests_that_exist() -> None:
    """Each line of the threat model names the test that shows it: it is there, under that name."""
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "docs" / "threats.md").read_text())
    assert len(named) > 10
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text() or not name, (file, name)


def test_a_block_is_found() -> None:
    """The search for blocks finds those that are there: it would pass for ever on none."""
    assert len(IN_PAGES) >= 2
    assert len(IN_DOCSTRINGS) >= 20
