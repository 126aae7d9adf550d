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
"""

from __future__ import annotations

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

# Tracebacks and pickles name what users import, not the file that it happens to be in.
for _name in __all__:
    if _name != "lowlevel":
        globals()[_name].__module__ = __name__
for _name in lowlevel.__all__:
    getattr(lowlevel, _name).__module__ = lowlevel.__name__
del _name
