"""The table's written rules, one by one, and then all of them at once against a model."""

from __future__ import annotations

import dataclasses
import gc
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anyreap import ExitStatus
from anyreap._table import Record, State, Table

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


@dataclasses.dataclass(eq=False)
class Somebody:
    """Who watches: as little as the table asks of a watcher."""

    reap: bool = True


class Keeper:
    """An object that would collect its child itself."""

    def collect(self, returncode: int) -> bool:
        """Have it collected."""
        return True

    def told_soon(self) -> int | None:
        """What it will know."""
        return None

    def told(self) -> int | None:
        """What it knows."""
        return None

    def tell(self, returncode: int) -> None:
        """Tell it."""


def three_ways_to_end(table: Table[Somebody], record: Record[Somebody], how: str) -> list[Somebody]:
    """End a record in the named way."""
    if how == "exited":
        return table.exited(record, ExitStatus(record.pid, 7))
    if how == "lost":
        return table.lost(record, "stolen")
    table.observed(record, ExitStatus(record.pid, 7))
    return table.exited(record, ExitStatus(record.pid, 7))


ENDS = ("exited", "lost", "observed, then exited")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """There is nothing to leave behind: no system call is made here."""


@pytest.fixture
def table() -> Table[Somebody]:
    """A table with nobody in it."""
    return Table()


# Entering and finding -----------------------------------------------------------------------------


def test_pid_leads_to_its_record(table: Table[Somebody]) -> None:
    """A child that was entered is found by its pid, runs, and has all that was given with it."""
    record = table.add(5, 9, 1234)
    assert table.find(5) is record
    assert len(table) == 1
    assert (record.pid, record.pidfd, record.identity) == (5, 9, 1234)
    assert (record.state, record.status, record.glimpse, record.why) == (
        State.RUNNING,
        None,
        None,
        "",
    )
    assert (record.keeper, record.watchers, record.ended, record.reap) == (None, [], False, False)


def test_unknown_pid_leads_nowhere(table: Table[Somebody]) -> None:
    """A pid that was not entered leads to nothing."""
    table.add(5)
    assert table.find(6) is None


def test_pid_is_entered_once(table: Table[Somebody]) -> None:
    """A pid leads to one record at most: a second entry is refused, and the first record stays
    (B6).
    """
    record = table.add(5)
    with pytest.raises(ValueError, match="pid 5 is in the table already"):
        table.add(5)
    assert table.find(5) is record
    assert len(table) == 1


@pytest.mark.parametrize("how", ENDS)
def test_collected_pid_leads_nowhere(table: Table[Somebody], how: str) -> None:
    """Once a child has been collected, or lost, its pid is free: the next process may get the
    number.
    """
    record = table.add(5)
    table.join(record, Somebody())
    three_ways_to_end(table, record, how)
    assert table.find(5) is None
    assert len(table) == 0
    again = table.add(5)
    assert table.find(5) is again
    assert again is not record


# Watching -----------------------------------------------------------------------------------------


def test_one_who_wants_it_collected_is_enough(table: Table[Somebody]) -> None:
    """A child is to be collected if one of its watchers wants that, whoever came first, and may
    change its mind.
    """
    record = table.add(5)
    modest, greedy = Somebody(reap=False), Somebody(reap=True)
    table.join(record, modest)
    seen = [record.reap]
    table.join(record, greedy)
    seen.append(record.reap)
    assert not table.leave(record, greedy)
    seen.append(record.reap)
    modest.reap = True
    seen.append(record.reap)
    assert seen == [False, True, False, True]


def test_last_one_to_leave_takes_the_record_along(table: Table[Somebody]) -> None:
    """A child that nobody watches any more is forgotten, and not before the last one has left."""
    record = table.add(5)
    first, second = Somebody(), Somebody()
    table.join(record, first)
    table.join(record, second)
    assert table.leave(record, first) is False
    assert table.find(5) is record
    assert table.leave(record, second) is True
    assert table.find(5) is None


def test_leaving_twice_is_harmless(table: Table[Somebody]) -> None:
    """Who leaves a second time puts nobody else out."""
    record = table.add(5)
    first, second = Somebody(), Somebody()
    table.join(record, first)
    table.join(record, second)
    table.leave(record, first)
    assert table.leave(record, first) is False
    assert record.watchers == [second]


def test_who_has_left_is_not_told(table: Table[Somebody]) -> None:
    """The end of a child is told to those who still watch it."""
    record = table.add(5)
    first, second = Somebody(), Somebody()
    table.join(record, first)
    table.join(record, second)
    table.leave(record, first)
    assert table.exited(record, ExitStatus(5, 0)) == [second]


# Ending -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ENDS)
def test_everybody_is_told_of_the_end(table: Table[Somebody], how: str) -> None:
    """What ends a record returns everybody who watches, also those who don't want it collected."""
    record = table.add(5)
    watchers = [Somebody(reap=False), Somebody(), Somebody(reap=False)]
    for watcher in watchers:
        table.join(record, watcher)
    assert three_ways_to_end(table, record, how) == watchers
    assert record.ended


def test_list_of_the_told_is_their_own(table: Table[Somebody]) -> None:
    """Who works through the list of those to be told may have them leave meanwhile."""
    record = table.add(5)
    watchers = [Somebody(), Somebody(), Somebody()]
    for watcher in watchers:
        table.join(record, watcher)
    told = []
    for watcher in table.observed(record, ExitStatus(5, 0)):
        told.append(watcher)
        table.leave(record, watcher)
    assert told == watchers


def test_observed_child_is_known_and_stays(table: Table[Somebody]) -> None:
    """A child that is left to its owner has its status, and its pid still leads to it: the zombie
    keeps the number.
    """
    record = table.add(5)
    watcher = Somebody(reap=False)
    table.join(record, watcher)
    status = ExitStatus(5, 3)
    assert table.observed(record, status) == [watcher]
    assert record.state is State.OBSERVED
    assert record.status is status
    assert not record.ended
    assert table.find(5) is record


def test_nothing_is_lost_when_the_exit_comes_before_the_second_watcher(
    table: Table[Somebody],
) -> None:
    """Who joins after the exit was observed finds the status, and is told of the collection."""
    record = table.add(5)
    early, late = Somebody(reap=False), Somebody(reap=True)
    table.join(record, early)
    status = ExitStatus(5, 3)
    table.observed(record, status)
    assert table.find(5) is record
    table.join(record, late)
    assert record.status is status
    assert record.reap
    assert table.exited(record, ExitStatus(5, 3)) == [early, late]
    assert record.state is State.EXITED


def test_status_is_written_once(table: Table[Somebody]) -> None:
    """What was seen first is what stays: not even a second, different status replaces it."""
    record = table.add(5)
    table.join(record, Somebody())
    seen, other = ExitStatus(5, 3), ExitStatus(5, 4)
    table.observed(record, seen)
    assert table.observed(record, other) == []
    assert record.status is seen
    table.exited(record, other)
    assert record.status is seen
    assert table.exited(record, other) == []
    assert table.observed(record, other) == []
    assert record.status is seen
    assert record.state is State.EXITED


def test_known_status_is_not_lost(table: Table[Somebody]) -> None:
    """A child whose status is known can't lose it any more, neither observed nor collected."""
    record = table.add(5)
    table.join(record, Somebody())
    status = ExitStatus(5, 3)
    table.observed(record, status)
    assert table.lost(record, "stolen") == []
    assert (record.state, record.status, record.why) == (State.OBSERVED, status, "")
    assert table.find(5) is record
    table.exited(record, status)
    assert table.lost(record, "stolen") == []
    assert (record.state, record.status, record.why) == (State.EXITED, status, "")


def test_lost_child_has_a_reason_and_no_status(table: Table[Somebody]) -> None:
    """A lost status says why, and is never invented afterwards."""
    record = table.add(5)
    watcher = Somebody()
    table.join(record, watcher)
    assert table.lost(record, "stolen") == [watcher]
    assert (record.state, record.status, record.why) == (State.LOST, None, "stolen")
    assert table.exited(record, ExitStatus(5, 0)) == []
    assert table.observed(record, ExitStatus(5, 0)) == []
    assert table.lost(record, "stolen again") == []
    assert (record.state, record.status, record.why) == (State.LOST, None, "stolen")


@pytest.mark.parametrize("how", ENDS)
def test_keeper_is_let_go_at_the_end(table: Table[Somebody], how: str) -> None:
    """A Popen is kept alive until its child is collected, and no longer."""
    record = table.add(5)
    table.join(record, Somebody())
    keeper = record.keeper = Keeper()
    if how == "observed, then exited":
        table.observed(record, ExitStatus(5, 7))
        assert record.keeper is keeper  # the owner may yet ask for the collection
    three_ways_to_end(table, record, how)
    assert record.keeper is None


def test_dropped_pid_is_free_again(table: Table[Somebody]) -> None:
    """An observed child whose owner has collected it leaves its pid to the next, and keeps its
    status.
    """
    record = table.add(5)
    table.join(record, Somebody(reap=False))
    status = ExitStatus(5, 3)
    table.observed(record, status)
    table.drop(record)
    assert table.find(5) is None
    assert record.status is status
    assert table.find(5) is not table.add(5)


@pytest.mark.parametrize("late", ["leave", "drop", "exited", "lost", "observed"])
@pytest.mark.parametrize("first", ["drop", *ENDS])
def test_what_comes_late_hits_nobody_else(table: Table[Somebody], first: str, late: str) -> None:
    """Once the number is another child's, nothing that is done to the old record touches the new
    one (K2).
    """
    old = table.add(5)
    watcher = Somebody(reap=False)
    table.join(old, watcher)
    if first == "drop":
        table.observed(old, ExitStatus(5, 3))
        table.drop(old)
    else:
        three_ways_to_end(table, old, first)
    new = table.add(5)
    table.join(new, Somebody())
    late_calls: dict[str, Callable[[], Any]] = {
        "leave": lambda: table.leave(old, watcher),
        "drop": lambda: table.drop(old),
        "exited": lambda: table.exited(old, ExitStatus(5, 4)),
        "lost": lambda: table.lost(old, "stolen"),
        "observed": lambda: table.observed(old, ExitStatus(5, 4)),
    }
    late_calls[late]()
    assert table.find(5) is new
    assert len(table) == 1
    assert (new.state, new.status) == (State.RUNNING, None)


# All rules at once --------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Model:
    """What a child should look like."""

    record: Record[Somebody]
    state: State = State.RUNNING
    status: ExitStatus | None = None
    why: str = ""
    watchers: list[Somebody] = dataclasses.field(default_factory=list)
    heard: dict[Somebody, State] = dataclasses.field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.state in (State.EXITED, State.LOST)


# Few numbers, so that each is used again and again.
PIDS = st.integers(1, 5)
CODES = st.integers(-64, 255)


class Machine(RuleBasedStateMachine):
    """Anything, in any order, also to records whose pid is another child's by now; the model is a
    dictionary.
    """

    @initialize()
    def start(self) -> None:
        """Begin with an empty table."""
        self.table: Table[Somebody] = Table()
        self.live: dict[int, Model] = {}
        self.all: list[Model] = []

    def some(self, data: st.DataObject) -> Model:
        """Any child, also one that is out of the table."""
        return data.draw(st.sampled_from(self.all))

    @rule(pid=PIDS, reap=st.booleans())
    def enter(self, pid: int, reap: bool) -> None:
        """A child is handed in: entered and joined, as the registry does, or found."""
        if pid in self.live:
            with pytest.raises(ValueError, match="already"):
                self.table.add(pid)
            return
        model = Model(self.table.add(pid, pid + 100, pid + 1000))
        assert not any(model.record is other.record for other in self.all)
        self.live[pid] = model
        self.all.append(model)
        self.join_model(model, reap)

    def join_model(self, model: Model, reap: bool) -> None:
        """Let somebody new watch a child."""
        watcher = Somebody(reap)
        self.table.join(model.record, watcher)
        model.watchers.append(watcher)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), reap=st.booleans())
    def join(self, data: st.DataObject, reap: bool) -> None:
        """Somebody else watches a child that is in the table: it may have been observed already."""
        model = data.draw(st.sampled_from(list(self.live.values())))
        self.join_model(model, reap)
        if model.state is State.OBSERVED:  # nothing is lost for who comes late
            assert model.record.status is model.status

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def ask_for_collection(self, data: st.DataObject) -> None:
        """A watcher is upgraded."""
        model = data.draw(st.sampled_from(list(self.live.values())))
        data.draw(st.sampled_from(model.watchers)).reap = True

    def tell(self, model: Model, told: list[Somebody]) -> None:
        """Compare who was told with who watches."""
        assert told == model.watchers
        model.heard.update(dict.fromkeys(told, model.state))

    @precondition(lambda self: self.all)
    @rule(data=st.data(), code=CODES)
    def observe(self, data: st.DataObject, code: int) -> None:
        """An exit is seen and left to its owner."""
        model = self.some(data)
        status = ExitStatus(model.record.pid, code)
        told = self.table.observed(model.record, status)
        if model.state is State.RUNNING:
            model.state, model.status = State.OBSERVED, status
            self.tell(model, told)
        else:
            assert told == []

    @precondition(lambda self: self.all)
    @rule(data=st.data(), code=CODES)
    def exit(self, data: st.DataObject, code: int) -> None:
        """A child is collected."""
        model = self.some(data)
        status = ExitStatus(model.record.pid, code)
        told = self.table.exited(model.record, status)
        if model.ended:
            assert told == []
            return
        model.state, model.status = State.EXITED, model.status or status
        self.tell(model, told)
        self.forget(model)

    @precondition(lambda self: self.all)
    @rule(data=st.data(), why=st.sampled_from(["stolen", "ignored"]))
    def lose(self, data: st.DataObject, why: str) -> None:
        """A status is gone."""
        model = self.some(data)
        told = self.table.lost(model.record, why)
        if model.state is not State.RUNNING:
            assert told == []
            return
        model.state, model.why = State.LOST, why
        self.tell(model, told)
        self.forget(model)

    @precondition(lambda self: any(model.watchers for model in self.all))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Somebody stops watching, maybe of a record that is out of the table."""
        model = data.draw(st.sampled_from([each for each in self.all if each.watchers]))
        watcher = data.draw(st.sampled_from(model.watchers))
        model.watchers.remove(watcher)
        assert self.table.leave(model.record, watcher) is (not model.watchers)
        if not model.watchers:
            self.forget(model)

    @precondition(lambda self: any(model.state is State.OBSERVED for model in self.all))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """The owner has collected an observed child."""
        seen = [model for model in self.all if model.state is State.OBSERVED]
        model = data.draw(st.sampled_from(seen))
        self.table.drop(model.record)
        self.forget(model)

    def forget(self, model: Model) -> None:
        """Its pid leads to it no longer."""
        if self.live.get(model.record.pid) is model:
            del self.live[model.record.pid]

    @invariant()
    def pid_leads_to_one_record(self) -> None:
        """A pid leads to its one uncollected child, or to nothing."""
        assert len(self.table) == len(self.live)
        for pid in range(7):
            model = self.live.get(pid)
            assert self.table.find(pid) is (None if model is None else model.record)

    @invariant()
    def records_are_as_the_model_says(self) -> None:
        """States go forward only, and a status once written is the same object for ever."""
        for model in self.all:
            record = model.record
            assert record.state is model.state
            assert record.status is model.status
            assert record.why == model.why
            assert record.ended is model.ended
            assert record.watchers == model.watchers
            assert record.reap is any(watcher.reap for watcher in model.watchers)
            assert (record.status is None) is (record.state in (State.RUNNING, State.LOST))

    @invariant()
    def everybody_was_told(self) -> None:
        """Who watched when a child ended, and has not left, has heard of that end."""
        for model in self.all:
            if model.ended:
                assert {model.heard.get(watcher) for watcher in model.watchers} <= {model.state}


def test_all_rules_in_any_order() -> None:
    """The table does what its rules say, whatever is done to it in whatever order."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,  # a red run in CI is the same one at home
            suppress_health_check=list(HealthCheck),
        ),
    )


# Scale --------------------------------------------------------------------------------------------


class CountingDict(dict[int, Any]):
    """A dictionary that counts what is done to single keys, and refuses what takes longer the more
    it holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __getitem__(self, key: int) -> Any:
        self.operations += 1
        return super().__getitem__(key)

    def get(self, key: int, default: Any = None) -> Any:
        """Count it."""
        self.operations += 1
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.operations += 1
        return super().__contains__(key)

    def __setitem__(self, key: int, value: Any) -> None:
        self.operations += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: int) -> None:
        self.operations += 1
        super().__delitem__(key)

    def refuse(self, *args: Any) -> Any:
        """Nothing that is done to a child takes this."""
        pytest.fail("the table looked at all its records")

    __iter__ = keys = values = items = copy = popitem = __reversed__ = refuse


def lines_of(function: Callable[[], Any]) -> int:
    """How many lines of Python a call executes: a loop over records would show in it."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # what others have to clean up is no cost of ours
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def cost_of_a_life(table: Table[Somebody], records: CountingDict, pid: int) -> tuple[int, ...]:
    """The cost of each step in the life of three children: lines executed and dictionary
    operations.
    """
    costs: list[int] = []

    def measured(function: Callable[[], Any]) -> None:
        before = records.operations
        costs.append(lines_of(function))
        costs.append(records.operations - before)

    for life in ("exited", "lost", "dropped", "left"):
        watcher, other, status = Somebody(reap=False), Somebody(), ExitStatus(pid, 0)
        measured(partial(table.add, pid, 3, 4))
        record = table.find(pid)
        assert record is not None
        measured(partial(table.find, pid))
        measured(partial(table.join, record, watcher))
        measured(partial(table.join, record, other))
        measured(partial(getattr, record, "reap"))
        measured(partial(table.leave, record, other))
        if life == "exited":
            measured(partial(table.observed, record, status))
            measured(partial(table.exited, record, status))
        elif life == "lost":
            measured(partial(table.lost, record, "stolen"))
        elif life == "dropped":
            measured(partial(table.observed, record, status))
            measured(partial(table.drop, record))
        else:
            measured(partial(table.leave, record, watcher))
        assert table.find(pid) is None
    measured(lambda: len(table))
    return tuple(costs)


def test_cost_of_a_child_does_not_grow_with_the_table(table: Table[Somebody]) -> None:
    """With 200,000 records each step costs what it costs in an empty table: counted, not timed
    (A11, G9).
    """
    records = CountingDict()
    table._records = records
    alone = cost_of_a_life(table, records, 7)
    somebody = Somebody()
    for pid in range(1_000, 201_000):
        table.join(table.add(pid), somebody)
    assert len(table) == 200_000
    assert cost_of_a_life(table, records, 7) == alone
    for pid in range(1_000, 201_000):
        record = table.find(pid)
        assert record is not None
        table.exited(record, ExitStatus(pid, 0))
    assert len(table) == 0
