"""Runs the tests: all of them, in four processes side by side, or, with arguments, what pytest makes of these.

With the one argument --cov: all of them, and then says what they have not covered.

Four pytests, each with every fourth test: most tests wait for a child more than they compute. The usual plugin for
that, pytest-xdist, has a second thread in each of its processes, which does not block SIGCHLD: what these tests mean to
be blocked, coalesced, or delivered to a certain thread would be delivered to that one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

PYTEST = [sys.executable, "-m", "pytest"]
COVERAGE = [sys.executable, "-m", "coverage"]
PARTS = 4


def main(arguments: list[str]) -> int:
    """Run them. Returns the exit code: that of the first part that failed."""
    covers = arguments == ["--cov"]
    pytest = [*COVERAGE, "run", "-m", "pytest"] if covers else PYTEST
    if arguments and not covers:
        return subprocess.run([*PYTEST, *arguments], check=False).returncode
    # Killed, this would leave its pytests running, and these their children: SIGTERM, which CI sends to who takes too
    # long, goes on as Ctrl-C, upon which pytest tears down what it has set up.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    running = []
    outputs = [None, *(tempfile.TemporaryFile() for _ in range(1, PARTS))]  # noqa: SIM115
    try:
        for number, output in enumerate(outputs, 1):
            part = [*pytest, f"--part={number}/{PARTS}", *(["-p", "no:cacheprovider"] if output else [])]
            running.append(subprocess.Popen(part, stdout=output, stderr=subprocess.STDOUT if output else None))
        codes = []
        for process, output in zip(running, outputs, strict=True):
            codes.append(process.wait())
            if output:
                output.seek(0)
                sys.stdout.flush()
                sys.stdout.buffer.write(output.read())
    except SystemExit:
        for process in running:
            process.send_signal(signal.SIGINT)
        raise
    finally:
        for process in running:
            process.wait()
    if covers:
        codes.append(subprocess.run([*COVERAGE, "combine", "--quiet"], check=False).returncode)
        codes.append(subprocess.run([*COVERAGE, "report"], check=False).returncode)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
