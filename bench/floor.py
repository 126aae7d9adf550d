"""The C floor, compiled when there is a C compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
PROGRAM = SOURCE.parent.parent / "build" / "bench" / "floor"


def path() -> str:
    """Where the program is, compiled if need be; "" where that is impossible."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return str(PROGRAM)
    compiler = shutil.which("cc")
    if compiler is None:
        return ""
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    made = PROGRAM.with_suffix(f".{os.getpid()}")
    done = subprocess.run([compiler, "-O2", "-o", made, SOURCE], capture_output=True, check=False)
    if done.returncode:
        return ""
    made.replace(PROGRAM)
    return str(PROGRAM)


def measure(work: str, **parameters: int) -> dict[str, Any]:
    """Do a work in C; its arguments are the parameters in their order."""
    program = path()
    if not program:
        msg = "no C compiler, or no Linux"
        raise NotImplementedError(msg)
    arguments = [str(int(value)) for value in parameters.values()]
    done = subprocess.run([program, work, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]
