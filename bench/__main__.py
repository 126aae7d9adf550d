"""`python -m bench`: measure, print the tables, and if it is asked for write the page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

from bench import floor, page, tables
from bench.cases import SHORT, WORKS
from bench.rounds import run

PACKAGES = ("anyreap", "trio", "anyio", "uvloop", "twisted", "gevent", "psutil")
RESULTS = floor.PROGRAM.parent / "results.json"


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(prog="bench", description="anyreap beside its peers, on the same work in one run")
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--full", action="store_true", help="all sizes and contenders; takes an hour or two")
    parser.add_argument("--rounds", type=int, help="default: 5, with --full 7")
    parser.add_argument("--only", default="", metavar="A|B", help="contenders with one of these texts in their name")
    parser.add_argument(
        "--page",
        metavar="DIRECTORY",
        help="write benchmarks.md and its plots there, of all that was"
        f" measured with --full, which is kept in {RESULTS.name}",
    )
    options = parser.parse_args()
    if unknown := set(options.works) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}")
    floor.path()
    print(machine(), end="\n\n")
    began = time.monotonic()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.works or WORKS:
        work = WORKS[name]
        chosen = [each for each in work.contenders if any(word in each for word in options.only.split("|"))]
        if not (options.full or options.only):
            chosen = [each for each in chosen if each in SHORT]
        since = time.monotonic()
        for parameters in work.full if options.full else work.short:
            measured = run(
                work.function,
                parameters,
                chosen,
                rounds=options.rounds or (7 if options.full else 5),
                limit=120 if options.full else 30,
                say=say,
            )
            say("")
            rows = tables.cells(work._replace(contenders=tuple(chosen)), measured)
            print(tables.title(work, parameters), tables.text(rows), sep="\n", end="\n\n", flush=True)
            if options.full:
                kept.setdefault(name, {})[json.dumps(parameters)] = {"machine": machine(), **vars(measured)}
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(kept))
        print(f"{name}: {time.monotonic() - since:.0f} s")
    print(f"{time.monotonic() - began:.0f} s; the load is {os.getloadavg()[0]:.1f} now")
    if options.page:
        page.write(Path(options.page), kept)


def machine() -> str:
    """What it was measured on."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return (
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, {platform.python_implementation()}"
        f" {platform.python_version()}, load {os.getloadavg()[0]:.1f}; {', '.join(versions)}"
    )


def say(line: str) -> None:
    """Show what is being done, where somebody looks on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
