"""One measured case, in a process of its own: `python -m bench.case WORK CONTENDER PARAMETERS` prints its figures.

A failure is a result too: it is printed with its reason, and the process ends well.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any


def main(work: str, contender: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Measure. Returns the figures, or `{"failed": why}`."""
    _limit_descriptors(parameters.pop("nofile", 0))
    try:
        from bench.cases import CONTENDERS

        return CONTENDERS[contender].measure(work, parameters)
    except BaseException as exc:  # noqa: BLE001  (whatever a peer raises)
        while isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        return {"failed": f"{type(exc).__name__}: {exc}"}


def _limit_descriptors(wanted: int) -> None:
    # As many as are allowed, so that nobody fails for a shell's default; or as few as the work is about.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted or hard, hard))


if __name__ == "__main__":
    result = main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # what a peer's threads or atexit handlers would do now is not measured
