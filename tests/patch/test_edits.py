"""All edits on all processes, or none on any: `commit` alone, with threads as processes and no model."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from hf_cuttlefish.patch.edits import Edit, commit
from hf_cuttlefish.processes import OtherProcessError, Processes

WAIT = 20
"""Seconds after which a thread that waits for another one gives up: nothing here takes one."""


class Injected(Exception):
    pass


class Room:
    """Where threads meet to tell each other something, in turns."""

    def __init__(self, size: int) -> None:
        self.said: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)


class Threads(Processes):
    """A thread that stands for a process: `gather` is all that `agree` and `together` need."""

    def __init__(self, room: Room, rank: int) -> None:
        super().__init__()
        self.room, self.rank, self.size = room, rank, len(room.said)

    def gather(self, value: Any) -> list[Any]:
        self.room.said[self.rank] = value
        self.room.barrier.wait(WAIT)
        everything = list(self.room.said)
        self.room.barrier.wait(WAIT)  # nobody says the next thing before all have heard this one
        return everything


class Step(Edit):
    """Appends a letter; fails where it is told to, before or after that."""

    def __init__(self, things: list[str], log: list[str], letter: str, fails: str = "", error: Any = Injected) -> None:
        self.things, self.log, self.letter, self.fails, self.error = things, log, letter, fails, error
        self.before: list[str] | None = None

    def apply(self) -> None:
        self.log.append(f"apply {self.letter}")
        if self.fails == "before":
            raise self.error(f"{self.letter} failed")
        self.before = list(self.things)
        self.things.append(self.letter)
        if self.fails == "after":
            raise self.error(f"{self.letter} failed")

    def undo(self) -> None:
        self.log.append(f"undo {self.letter}")
        if self.before is not None:
            self.things[:] = self.before

    def finish(self) -> None:
        self.log.append(f"finish {self.letter}")
        if self.fails == "finish":
            raise self.error(f"{self.letter} failed")


def committed(processes: Processes, fails: dict[str, str], error: Any = Injected) -> tuple[list[str], list[str], Any]:
    """(what the edits have left, what was called, what was raised) by three edits on one process."""
    things, log = ["old"], []
    try:
        commit([Step(things, log, letter, fails.get(letter, ""), error) for letter in "abc"], processes)
    except BaseException as raised:
        return things, log, raised
    return things, log, None


def on_threads(work: Callable[[Processes], Any], size: int = 2) -> list[Any]:
    """What a function gives on each of some threads that stand for processes."""
    room, results = Room(size), [None] * size

    def run(rank: int) -> None:
        results[rank] = work(Threads(room, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    return results


def test_all_are_made_in_order_and_then_all_finish():
    things, log, raised = committed(Processes.alone(), {})
    assert raised is None and things == ["old", "a", "b", "c"]
    assert log == ["apply a", "apply b", "apply c", "finish a", "finish b", "finish c"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("which", "abc")
def test_what_fails_is_undone_in_reverse_with_all_before_it(which, when, error):
    things, log, raised = committed(Processes.alone(), {which: when}, error)
    begun = "abc"[: "abc".index(which) + 1]
    assert things == ["old"] and type(raised) is error and f"{which} failed" in str(raised)
    assert log == [f"apply {letter}" for letter in begun] + [f"undo {letter}" for letter in reversed(begun)]


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", "abc")
def test_one_process_that_fails_undoes_all_on_all(which, when, culprit):
    found = on_threads(lambda me: committed(me, {which: when} if me.rank == culprit else {}))
    begun = "abc"[: "abc".index(which) + 1]
    for rank, (things, log, raised) in enumerate(found):
        assert things == ["old"] and f"{which} failed" in str(raised)
        assert type(raised) is (Injected if rank == culprit else OtherProcessError)
        assert log == [f"apply {letter}" for letter in begun] + [f"undo {letter}" for letter in reversed(begun)]


def test_two_that_fail_at_once_keep_their_own_errors():
    found = on_threads(lambda me: committed(me, {"b": "after"}, (Injected, ZeroDivisionError)[me.rank]))
    assert [type(raised) for *_, raised in found] == [Injected, ZeroDivisionError]
    assert [things for things, *_ in found] == [["old"], ["old"]]


def test_an_error_that_all_have_heard_of_is_not_told_again():
    """As of an edit that talks inside `apply`: another round would wait for processes that have gone on."""

    class Talks(Edit):
        def __init__(self, me: Processes) -> None:
            self.me = me

        def apply(self) -> None:
            with self.me.together():
                if self.me.rank == 1:
                    raise Injected("no memory")

    rounds = []

    def work(me: Any) -> Any:
        gather = me.gather
        me.gather = lambda value: rounds.append(me.rank) or gather(value)
        try:
            commit([Talks(me)], me)
        except Exception as error:
            return error
        return None

    one, other = on_threads(work)
    assert isinstance(one, OtherProcessError) and isinstance(other, Injected) and sorted(rounds) == [0, 1]


def test_what_fails_to_let_the_old_go_is_only_said(caplog):
    things, log, raised = committed(Processes.alone(), {"a": "finish", "b": "finish"})
    assert raised is None and things == ["old", "a", "b", "c"] and log[3:] == ["finish a", "finish b", "finish c"]
    assert caplog.text.count("Step could not let the old go") == 2 and "a failed" in caplog.text


def test_no_edits_and_an_edit_that_does_nothing():
    commit([], Processes.alone())
    commit([Edit()], Processes.alone())
    assert Edit().summary == ""


def test_nothing_that_was_not_begun_is_undone():
    log: list[str] = []

    class Never(Edit):
        def apply(self) -> None:
            raise AssertionError("an edit before this one has failed")

        def undo(self) -> None:
            raise AssertionError("it was never begun")

    with pytest.raises(Injected):
        commit([Step([], log, "a", "before"), Never()], Processes.alone())
    assert log == ["apply a", "undo a"]
