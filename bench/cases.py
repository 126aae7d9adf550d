"""The table of cases: who takes part, in which works, at which sizes, and which figures count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bench import blocking, contenders as tasks, floor, works

if TYPE_CHECKING:
    from collections.abc import Callable


class Contender(NamedTuple):
    """Somebody who can do works, on a loop, or on none."""

    loop: str
    make: Callable[[], Any]

    def measure(self, work: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Do a work, in this process. Returns the figures."""
        doer = self.make()
        if isinstance(doer, str):
            return dict(works.import_(doer))
        if doer is floor:
            return floor.measure(work, **parameters)
        if work == "one":
            parameters = {**parameters, "floor": floor.path()}
        if isinstance(doer, tasks.Contender):
            return dict(works.perform(getattr(works, work), doer, parameters))
        return dict(getattr(doer, work)(**parameters))


HOSTS: Final = {
    "anyreap trio sigchld": ("trio", tasks.anyreap_on(tasks.OnTrio, "sigchld")),
    "anyreap trio pidfd": ("trio", tasks.anyreap_on(tasks.OnTrio, "pidfd")),
    "anyreap asyncio sigchld": ("asyncio", tasks.anyreap_on(tasks.OnAsyncio, "sigchld")),
    "anyreap asyncio pidfd": ("asyncio", tasks.anyreap_on(tasks.OnAsyncio, "pidfd")),
    "anyreap uvloop pidfd": ("uvloop", tasks.anyreap_on(tasks.OnUvloop, "pidfd")),
}

CONTENDERS: Final = {
    "C": Contender("", lambda: floor),
    "Python, waitpid": Contender("", blocking.Bare),
    "Python, Popen": Contender("", blocking.BarePopen),
    "Python, scan": Contender("", blocking.Scan),
    "psutil": Contender("", blocking.Psutil),
    "Twisted": Contender("", tasks.Twisted),
    "gevent": Contender("", tasks.Gevent),
    "trio": Contender("trio", tasks.TrioProcess),
    "trio.run_process": Contender("trio", tasks.TrioRunProcess),
    "trio, waiting for nothing": Contender("trio", tasks.NothingOnTrio),
    "asyncio, pidfds": Contender("asyncio", tasks.AsyncioPidfd),
    "asyncio, threads": Contender("asyncio", tasks.AsyncioThreads),
    "asyncio, by pid": Contender("asyncio", tasks.AsyncioByPid),
    "asyncio, waiting for nothing": Contender("asyncio", tasks.NothingOnAsyncio),
    "uvloop": Contender("uvloop", tasks.Uvloop),
    "anyio on trio": Contender("trio", tasks.AnyioOnTrio),
    "anyio on asyncio": Contender("asyncio", tasks.AnyioOnAsyncio),
    "anyio on uvloop": Contender("uvloop", tasks.AnyioOnUvloop),
    "anyio.run_process": Contender("asyncio", tasks.AnyioRunProcess),
    "anyio.run_process on uvloop": Contender("uvloop", tasks.AnyioRunProcessOnUvloop),
    "import asyncio": Contender("import", lambda: "asyncio"),
    "import anyio": Contender("import", lambda: "anyio"),
    "import anyreap": Contender("import", lambda: "anyreap"),
    **{name: Contender(loop, make) for name, (loop, make) in HOSTS.items()},
    **{f"{name}, open_process": Contender(loop, tasks.opening(make)) for name, (loop, make) in HOSTS.items()},
    **{f"{name}, run_process": Contender(loop, tasks.running(make)) for name, (loop, make) in HOSTS.items()},
}

# What a contender is compared with: what is native to its loop.
NATIVE: Final = {"trio": "trio", "asyncio": "asyncio, pidfds", "uvloop": "uvloop"}

# The least that can be done: the first of them that could do it.
FLOORS: Final = ("C", "Python, waitpid")

# What the figures are in.
UNITS: Final = {
    "CPU/exit": "us",
    "exits/s": "1/s",
    "CPU": "ms",
    "wall": "ms",
    "gap": "ms",
    "p50": "us",
    "p99": "us",
    "KiB/child": "",
    "fds/child": "",
    "threads/child": "",
    "idle CPU": "ms/s",
    "watch": "us",
    "wait": "us",
    "MiB/s": "",
    "CPU/MiB": "us",
    "trio": "loaded",
}


class Work(NamedTuple):
    """One work: a function of works.py, who does it, at which sizes, and which of its figures are compared."""

    title: str
    function: str
    figures: tuple[str, ...]
    compared: tuple[str, ...]
    contenders: tuple[str, ...]
    short: tuple[dict[str, Any], ...]
    full: tuple[dict[str, Any], ...]
    native: dict[str, str] = NATIVE


LOOPS: Final = (*HOSTS, "trio", "asyncio, pidfds", "uvloop")
ANYIO: Final = ("anyio on trio", "anyio on asyncio", "anyio on uvloop")
PEERS: Final = (*ANYIO, "asyncio, threads", "Twisted", "gevent")
BY_PID: Final = ("C", "Python, waitpid", "psutil")
OPEN: Final = tuple(f"{name}, open_process" for name in HOSTS)
RUN: Final = tuple(f"{name}, run_process" for name in HOSTS)
IMPORTS: Final = ("import asyncio", "import anyio", "import anyreap")
SCAN: Final = dict.fromkeys(("trio", "asyncio", "uvloop"), "Python, scan")

# Who takes part in the short form.
SHORT: Final = {"C", "Python, waitpid", "Python, scan", "anyio on asyncio", *LOOPS, *IMPORTS, *OPEN}

FEW: Final = {"exits": 100, "warm": 20}
MANY: Final = {"exits": 200, "warm": 20}

WORKS: Final = {
    "storm": Work(
        "Spawn and wait for `/bin/true`, 64 at a time",
        "storm",
        ("CPU/exit", "exits/s"),
        ("CPU/exit", "exits/s"),
        (*BY_PID, "Python, Popen", *LOOPS, *PEERS, *OPEN),
        short=({"n": 200, "limit": 64},),
        full=({"n": 1000, "limit": 64},),
    ),
    "burst": Work(
        "Watched children that all exit at once",
        "burst",
        ("CPU", "wall", "gap"),
        ("CPU", "wall"),
        (*BY_PID, "Python, scan", *LOOPS, *PEERS),
        short=({"k": 500},),
        full=({"k": 1000}, {"k": 4000}, {"k": 10000}),
    ),
    "one": Work(
        "One exit among `k` watched children",
        "one",
        ("p50", "p99", "CPU/exit"),
        ("p50", "CPU/exit"),
        (*BY_PID, "Python, scan", *LOOPS, *PEERS),
        short=({"k": 0, **FEW}, {"k": 500, **FEW}),
        full=tuple({"k": k, **MANY} for k in (0, 100, 1000, 4000, 10000)),
    ),
    "foreign": Work(
        "The same, behind a zombie of somebody else's",
        "one",
        ("p50", "p99", "CPU/exit"),
        ("p50", "CPU/exit"),
        ("C", "Python, scan", *LOOPS, "Twisted", "gevent"),
        short=(),
        full=({"k": 1000, **MANY, "foreign": True}, {"k": 10000, **MANY, "foreign": True}),
    ),
    "budget": Work(
        "One exit among `k` watched children, with 256 descriptors",
        "one",
        ("p50", "p99", "CPU/exit"),
        ("p50", "CPU/exit"),
        # Not with source="pidfd", which looks at those that have none once in a heartbeat.
        (
            "Python, scan",
            "anyreap trio sigchld",
            "anyreap asyncio sigchld",
            "trio",
            "asyncio, pidfds",
            "uvloop",
            *PEERS,
        ),
        short=({"k": 500, **FEW, "nofile": 256},),
        full=({"k": 1000, **MANY, "nofile": 256}, {"k": 10000, **FEW, "nofile": 256}),
        native=SCAN,
    ),
    "budget burst": Work(
        "Watched children that all exit at once, with 256 descriptors",
        "burst",
        ("CPU", "wall", "gap"),
        ("CPU", "wall"),
        ("Python, scan", *LOOPS, *PEERS),
        short=(),
        full=({"k": 1000, "nofile": 256}, {"k": 10000, "nofile": 256}),
        native=SCAN,
    ),
    "idle": Work(
        "`k` watched children that do nothing, each with a task that waits",
        "idle",
        ("KiB/child", "fds/child", "threads/child", "idle CPU"),
        ("KiB/child",),
        (*LOOPS, *PEERS, "trio, waiting for nothing", "asyncio, waiting for nothing"),
        short=({"k": 500, "seconds": 1.0},),
        full=({"k": 4000, "seconds": 3.0}, {"k": 4000, "seconds": 3.0, "nofile": 256}),
    ),
    "calls": Work(
        "The calls themselves: watch a pid that runs, wait for one that has ended",
        "calls",
        ("watch", "wait"),
        ("watch", "wait"),
        ("Python, waitpid", "psutil", *HOSTS, "asyncio, by pid"),
        short=(),
        full=({"k": 1000},),
        native={},
    ),
    "signals": Work(
        "SIGCHLD with nobody dead, while `k` children are watched",
        "signals",
        ("CPU", "gap"),
        ("CPU",),
        (*LOOPS, "Twisted", "gevent"),
        short=(),
        full=({"k": 100, "rate": 10000, "seconds": 3.0},),
    ),
    "read": Work(
        "Read what a child writes, `size` MiB, from the stream of its stdout",
        "read",
        ("MiB/s", "CPU/MiB"),
        ("MiB/s",),
        ("Python, waitpid", *HOSTS, "trio", "asyncio, pidfds", "uvloop", *ANYIO),
        short=({"size": 256},),
        full=({"size": 1024},),
        native={"trio": "trio", "asyncio": "anyio on asyncio", "uvloop": "anyio on uvloop"},
    ),
    "run": Work(
        "Have `run_process` read what a child writes, `size` MiB",
        "read",
        ("MiB/s", "CPU/MiB"),
        ("MiB/s",),
        ("Python, waitpid", *RUN, "trio.run_process", "anyio.run_process", "anyio.run_process on uvloop"),
        short=(),
        full=({"size": 1024},),
        native={"trio": "trio.run_process", "asyncio": "anyio.run_process", "uvloop": "anyio.run_process on uvloop"},
    ),
    "import": Work(
        "Import, in a new Python",
        "import",
        ("wall", "CPU", "trio"),
        ("wall", "CPU"),
        IMPORTS,
        short=({},),
        full=({},),
        native={"import": "import anyio"},
    ),
}
