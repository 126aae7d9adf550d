"""The command line: `anyreap`, and `python -m anyreap`, which is the same."""

from __future__ import annotations

import sys
from importlib import import_module

USAGE = """\
usage: anyreap init [options] [--] command [argument ...]
       anyreap run [options] command [command ...]
       anyreap --help | --version

  init   be PID 1, or a subreaper, for one command: collect every orphan, pass signals on
  run    run commands side by side, show how they do, and leave nothing of them behind

`anyreap init --help` and `anyreap run --help` tell more.
"""

# Imported only when asked for: an init is to start at once, and to stay small.
COMMANDS = {"init": "anyreap._init", "run": "anyreap._run"}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code."""
    match sys.argv[1:] if argv is None else argv:
        case [name, *rest] if name in COMMANDS:
            return int(import_module(COMMANDS[name]).main(rest))
        case ["-h" | "--help", *_]:
            sys.stdout.write(USAGE)
            return 0
        case ["-V" | "--version", *_]:
            from importlib.metadata import version  # noqa: PLC0415  (costs more than all of init)

            sys.stdout.write(f"anyreap {version('anyreap')}\n")
            return 0
        case []:
            sys.stderr.write(USAGE)
        case [name, *_]:
            sys.stderr.write(f"anyreap: {name!r} is no command of anyreap: init and run are; see anyreap --help\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
