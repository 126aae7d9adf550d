r"""anyreap: open a reaper nursery, hand in any child process, await its end on trio, asyncio or uvloop, and leave the
block knowing that nothing is left behind.

The layout. Data flows one way, and every dangerous call has one home:

    kernel --SIGCHLD--> _sigchld     the self-pipe, the one handler, the wakeup fd
                           |
                        _service     the one loop: wait (_loop), drain, sweep (_finder: who may have changed?), wake
                           |         (_orphans: who was given to us, if it is a subreaper?)
                        _registry    the lock, and the way from a look at the kernel to everybody who waits
                        /      \
                  _kernel      _table    the only wait calls; pure state
                           |
    _child, _reaper, _shutdown           what a program holds, how a block is left

A module imports only from those further down its way, and from `_status` and `_errors`, which import nothing.
`__main__`, the command line, and `_init` stand apart.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, to type checkers too, without the time that typing takes to import
if TYPE_CHECKING:
    from anyreap import lowlevel as lowlevel
    from anyreap._child import Child as Child
    from anyreap._errors import (
        ChildFailed as ChildFailed,
        NotAChild as NotAChild,
        SigchldUnavailable as SigchldUnavailable,
        StatusLost as StatusLost,
        StillRunning as StillRunning,
    )
    from anyreap._process import CompletedProcess as CompletedProcess, Process as Process
    from anyreap._reaper import (
        Reaper as Reaper,
        ReaperStatistics as ReaperStatistics,
        open_reaper as open_reaper,
        wait as wait,
    )
    from anyreap._shutdown import Shutdown as Shutdown
    from anyreap._status import ExitStatus as ExitStatus

__all__ = (
    "Child",
    "ChildFailed",
    "CompletedProcess",
    "ExitStatus",
    "NotAChild",
    "Process",
    "Reaper",
    "ReaperStatistics",
    "Shutdown",
    "SigchldUnavailable",
    "StatusLost",
    "StillRunning",
    "lowlevel",
    "open_reaper",
    "wait",
)

if not TYPE_CHECKING:
    # The names are put in place when one of them is first used, all at once. `anyreap init` has to go through this file
    # too, as every module of a package, and needs nothing of it. Importing all of it here would triple the time that
    # a container takes to start, and the memory that its PID 1 keeps for good.
    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module  # noqa: PLC0415  (or it would be a name of ours)

        for home in ("lowlevel", "_child", "_errors", "_process", "_reaper", "_shutdown", "_status"):
            module = import_module(f"{__name__}.{home}")
            for public, thing in list(vars(module).items()):
                if public in __all__ and thing.__module__ == module.__name__:
                    globals()[public] = thing
                    # Tracebacks and pickles name what users import, not the file that it happens to be in.
                    thing.__module__ = __name__
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


del TYPE_CHECKING  # no name of ours
