"""Runs the tests: all of them in two processes side by side, or, with arguments, what pytest makes of these.

Two pytests, each with every other test, take half the time on two cores. The usual plugin for that, pytest-xdist, has
a second thread in each of its processes, which does not block SIGCHLD: what these tests mean to be blocked, coalesced,
or delivered to a certain thread would be delivered to that one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

PYTEST = [sys.executable, "-m", "pytest"]


def main(arguments: list[str]) -> int:
    """Run them. Returns the exit code."""
    if arguments:
        return subprocess.run([*PYTEST, *arguments], check=False).returncode
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen(
            [*PYTEST, "--half=second", "-p", "no:cacheprovider"], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            first = subprocess.run([*PYTEST, "--half=first"], check=False).returncode
            second.wait()
        except BaseException:
            second.terminate()
            second.wait()
            raise
        output.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(output.read())
    return first or second.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
