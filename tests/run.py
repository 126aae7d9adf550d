"""Runs the tests: all of them, in three processes side by side, or, with arguments, what pytest makes of these.

Three pytests, each with every third test: most tests wait for a child more than they compute. The usual plugin for
that, pytest-xdist, has a second thread in each of its processes, which does not block SIGCHLD: what these tests mean to
be blocked, coalesced, or delivered to a certain thread would be delivered to that one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

PYTEST = [sys.executable, "-m", "pytest"]
PARTS = 3


def main(arguments: list[str]) -> int:
    """Run them. Returns the exit code: that of the first part that failed."""
    if arguments:
        return subprocess.run([*PYTEST, *arguments], check=False).returncode
    beside = []
    try:
        for number in range(2, PARTS + 1):
            output = tempfile.TemporaryFile()  # noqa: SIM115
            part = [*PYTEST, f"--part={number}/{PARTS}", "-p", "no:cacheprovider"]
            beside.append((subprocess.Popen(part, stdout=output, stderr=subprocess.STDOUT), output))
        codes = [subprocess.run([*PYTEST, f"--part=1/{PARTS}"], check=False).returncode]
        for process, output in beside:
            codes.append(process.wait())
            output.seek(0)
            sys.stdout.flush()
            sys.stdout.buffer.write(output.read())
    finally:
        for process, output in beside:
            process.terminate()
            process.wait()
            output.close()
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
