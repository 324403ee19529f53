"""Which slot gets the next task: tables of replicas in, a choice and its words out."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from controlplane.report import ReplicaReport, ReplicaState
from controlplane.routing import RELAX_S, plan, renewed, waiting_for

NOW = 1000.0


@dataclass
class Slot:
    id: str
    free: int = 1
    capacity: int = 1
    pace_s: float = 0.0
    pace_time: float = NOW
    failures: int = 0


@dataclass
class Waits:
    avoid: tuple[str, ...] = ()


def chosen(slots: Iterable[Slot], *, avoid: tuple[str, ...] = (), mean_s: float = 0.0, now: float = NOW) -> str | None:
    bindings = plan([Waits(avoid)], list(slots), mean_s=mean_s, now=now)
    return bindings[0].replica_id if bindings else None


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([], None),
        ([Slot("a", free=0)], None),
        ([Slot("a", free=-1)], None),
        ([Slot("b"), Slot("a")], "a"),  # nothing known: by id
        ([Slot("a", pace_s=4.0), Slot("b", pace_s=2.0)], "b"),
        ([Slot("a", pace_s=1.0, free=0), Slot("b", pace_s=9.0)], "b"),  # late binding, first form: a free one
        ([Slot("a", free=1, capacity=4), Slot("b", free=3, capacity=4)], "b"),  # less loaded
        ([Slot("a", pace_s=1.0, failures=1), Slot("b", pace_s=9.0)], "b"),  # one that fails at once is not fast
        ([Slot("a", failures=2), Slot("b", free=0)], "a"),  # and gets its trial
    ],
)
def test_fastest_free_slot_gets_the_task(slots: list[Slot], expected: str | None) -> None:
    assert chosen(slots, mean_s=3.0) == expected


def test_task_goes_elsewhere_if_there_is_an_elsewhere() -> None:
    slots = [Slot("a", pace_s=1.0), Slot("b", pace_s=9.0, failures=5)]
    assert chosen(slots, avoid=("a",)) == "b"
    assert chosen(slots[:1], avoid=("a",)) == "a"


def test_replica_that_was_slow_once_is_tried_again() -> None:
    slow, fair = Slot("a", pace_s=10.0), Slot("b", pace_s=3.5)
    assert chosen([slow, fair], mean_s=3.0) == "b"
    fair.pace_time = later = NOW + 10 * RELAX_S
    assert chosen([slow, fair], mean_s=3.0, now=later) == "a"


def test_slots_of_a_plan_are_given_once_and_in_order() -> None:
    first, second, third, fourth = (Waits() for _ in range(4))
    bindings = plan([first, second, third, fourth], [Slot("a"), Slot("b", free=2, capacity=2)], mean_s=0, now=NOW)
    assert [(binding.task, binding.replica_id) for binding in bindings] == [(first, "a"), (second, "b"), (third, "b")]


def test_plan_reads_no_further_than_there_are_slots() -> None:
    def endless() -> Iterable[Waits]:
        while True:
            yield Waits()

    assert len(plan(endless(), [Slot("a", free=3, capacity=3)], mean_s=0, now=NOW)) == 3


def test_choice_says_why() -> None:
    slots = [Slot("a", pace_s=1.5), Slot("b", pace_s=9.0), Slot("c", free=0)]
    (binding,) = plan([Waits()], slots, mean_s=2.0, now=NOW)
    assert binding.reason == "the fastest of 2 with a free slot, 1 busy or not ready; 1.5 s expected"
    (binding,) = plan([Waits()], slots[:1], mean_s=2.0, now=NOW)
    assert binding.reason == "the only replica with a free slot; 1.5 s expected"


def test_average_follows_the_newest() -> None:
    assert renewed(0.0, 5.0, 0.2) == 5.0
    assert renewed(5.0, 10.0, 0.2) == 6.0


@pytest.mark.parametrize(
    ("slots", "reports", "words"),
    [
        ([], [], "no replica is placed yet"),
        ([Slot("a", free=0)], [], "the only replica is busy"),
        ([Slot("a", free=0), Slot("b", free=0)], [], "2 replicas, all busy"),
        (
            [Slot("a", free=0), Slot("b", free=0, capacity=0)],
            [ReplicaReport("a", ReplicaState.READY), ReplicaReport("b", ReplicaState.PULLING, progress=40)],
            "the only replica is busy; besides 1 pulling (40 %)",
        ),
        (
            [],
            [ReplicaReport("a", ReplicaState.STARTING, progress=90), ReplicaReport("b", ReplicaState.LOST)],
            "no replica is ready: 1 on a node that is not connected, 1 starting (90 %)",
        ),
        (
            [Slot("a", free=0, capacity=0)],
            [ReplicaReport("a", ReplicaState.BACKOFF, message="no such image")],
            "no replica is ready: 1 failed and to be tried again (no such image)",
        ),
        (
            [Slot("a", free=0, capacity=0)],
            [ReplicaReport("a", ReplicaState.READY)],
            "no replica is ready: 1 taking no new tasks",
        ),
    ],
)  # fmt: skip
def test_refusal_says_what_the_replicas_do(slots: list[Slot], reports: list[ReplicaReport], words: str) -> None:
    assert waiting_for(slots, reports) == words


def test_choice_among_32_replicas_costs_microseconds() -> None:
    slots = [Slot(f"r{number}", free=number % 3, capacity=2, pace_s=1.0 + number) for number in range(32)]
    task = [Waits()]
    rounds = []
    for _ in range(20):
        begin = time.process_time()
        for _ in range(100):
            plan(task, slots, mean_s=5.0, now=NOW + 1)
        rounds.append((time.process_time() - begin) / 100)
    # The budget is 20 us; the bound leaves room for a machine that is busy with other things.
    assert min(rounds) < 60e-6
