"""Which slot gets the next task: tables of replicas in, a choice and its words out."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest

from controlplane.estimates import RELAX_S, RELAX_TASKS, left_s, paces, renewed
from controlplane.report import ReplicaReport, ReplicaState
from controlplane.routing import LOOKAHEAD, ahead, outlook, plan, waiting_for

NOW = 1000.0


@dataclass
class Slot:
    id: str
    free: int = 1
    capacity: int = 1
    pace_s: float = 0.0
    pace_time: float = NOW
    failures: int = 0
    usual: float | None = None
    crowding: float = 1.0
    comes_free: bool = True
    ahead: int = 0
    since: float = NOW
    work: float = 1.0

    @property
    def usual_s(self) -> float:
        return self.pace_s if self.usual is None else self.usual

    def oldest(self) -> tuple[float, float]:
        return self.since, self.work


@dataclass(eq=False)
class Waits:
    avoid: tuple[str, ...] = ()
    work: float = 1.0


def busy(replica_id: str, pace_s: float, ran_s: float = 0.0, **fields: Any) -> Slot:
    return Slot(replica_id, free=0, pace_s=pace_s, since=NOW - ran_s, **fields)


def chosen(slots: Iterable[Slot], *, avoid: tuple[str, ...] = (), mean_s: float = 0.0, now: float = NOW) -> str | None:
    bindings = plan([Waits(avoid)], list(slots), mean_s=mean_s, now=now).bindings
    return bindings[0].replica_id if bindings else None


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([], None),
        ([Slot("a", free=0)], None),
        ([Slot("a", free=-1)], None),
        ([Slot("b"), Slot("a")], "a"),  # nothing known: by id
        ([Slot("a", pace_s=4.0), Slot("b", pace_s=2.0)], "b"),
        ([Slot("a", pace_s=7.0, free=0), Slot("b", pace_s=9.0)], "b"),  # not worth waiting for
        ([Slot("a", pace_s=1.0, free=0), Slot("b", pace_s=9.0)], None),  # worth it
        ([Slot("a", pace_s=1.0, free=0, comes_free=False), Slot("b", pace_s=9.0)], "b"),  # but it does not come free
        ([Slot("a", pace_s=1.0, free=0, capacity=0), Slot("b", pace_s=9.0)], "b"),
        ([Slot("a", pace_s=1.0, free=0, failures=1), Slot("b", pace_s=9.0)], "b"),  # and who fails is not waited for
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
    slow, fair = Slot("a", pace_s=10.0, usual=2.0), Slot("b", pace_s=3.5)
    assert chosen([slow, fair], mean_s=3.0) == "b"
    fair.pace_time = later = NOW + 10 * RELAX_TASKS * 3.0
    assert chosen([slow, fair], mean_s=3.0, now=later) == "a"


def test_replica_that_was_always_slow_is_tried_again_much_later() -> None:
    slow = Slot("a", pace_s=10.0)
    soon_s = RELAX_TASKS * 3.0
    assert soon_s > RELAX_S
    assert paces([slow], 3.0, NOW) == [10.0]
    assert paces([slow], 3.0, NOW + 10 * soon_s)[0] > 8.0
    assert paces([slow], 3.0, NOW + 1000 * soon_s)[0] < 3.5


def test_new_replica_is_expected_to_be_as_all_are() -> None:
    assert paces([Slot("a")], 3.0, NOW) == [3.0]
    assert paces([Slot("a")], 0.0, NOW) == [1.0]


def test_busy_neighbour_on_its_gpu_makes_a_replica_slower() -> None:
    assert chosen([Slot("a", pace_s=2.0, crowding=2.0), Slot("b", pace_s=3.0)], mean_s=2.5) == "b"


def test_what_is_left_shrinks_with_time_and_grows_when_overdue() -> None:
    left = [left_s(10.0, passed_s) for passed_s in (-1e9, 0.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)]
    assert left[0] == left[1] == 10.0
    assert left[1] > left[2] > left[3]
    assert left[5] < left[6] < left[7]
    assert min(left) > 5.0


def test_overdue_task_makes_its_slot_look_slower() -> None:
    slow = Slot("b", pace_s=5.0)
    assert chosen([busy("a", 1.0), slow], mean_s=2.0) is None
    assert chosen([busy("a", 1.0, ran_s=5.0), slow], mean_s=2.0) == "b"
    # One that is large is not late.
    assert chosen([busy("a", 1.0, ran_s=5.0, work=8.0), Slot("b", pace_s=20.0)], mean_s=2.0) is None


def test_wait_has_an_end_even_if_nothing_happens() -> None:
    fast, slow, now = busy("a", 1.0), Slot("b", pace_s=9.0), NOW
    looks = 0
    while not (made := plan([Waits()], [fast, slow], mean_s=3.0, now=now)).bindings:
        assert 0.0 < made.again_s < 10.0
        now += made.again_s
        looks += 1
    assert now - NOW < 20.0
    assert looks < 20


def test_what_binds_all_it_can_need_not_be_planned_again() -> None:
    assert plan([Waits()], [Slot("a")], mean_s=1.0, now=NOW).again_s == inf
    assert plan([Waits()], [busy("a", 1.0)], mean_s=1.0, now=NOW).again_s == inf
    assert plan([], [Slot("a")], mean_s=1.0, now=NOW) == ([], inf)


def test_fast_slot_is_reserved_for_one_task_and_the_slow_one_goes_to_another() -> None:
    tasks = [Waits() for _ in range(12)]
    made = plan(tasks, [busy("a", 1.0), Slot("b", pace_s=4.0)], mean_s=2.0, now=NOW)
    ((task, replica_id, _),) = made.bindings
    assert replica_id == "b"
    # Those before it wait for the fast one, and would end there sooner.
    assert 0 < tasks.index(task) < 4


def test_long_queue_leaves_no_slot_idle() -> None:
    replicas = [busy("a", 1.0), Slot("b", pace_s=20.0)]
    assert not plan([Waits() for _ in range(3)], replicas, mean_s=2.0, now=NOW).bindings
    assert plan([Waits() for _ in range(LOOKAHEAD)], replicas, mean_s=2.0, now=NOW).bindings


def test_all_free_slots_are_given_however_many() -> None:
    tasks = [Waits() for _ in range(500)]
    slots = [Slot("a", free=200, capacity=200, pace_s=1.0), Slot("b", free=200, capacity=200, pace_s=1.5)]
    assert len(plan(tasks, slots, mean_s=1.0, now=NOW).bindings) == 400


def test_tasks_far_behind_are_not_planned() -> None:
    def endless() -> Iterator[Waits]:
        while True:
            yield Waits()

    assert not plan(endless(), [busy("a", 1.0), Slot("b", pace_s=1000.0)], mean_s=2.0, now=NOW).bindings


def test_small_task_takes_the_slow_slot_before_a_large_one() -> None:
    large, small = Waits(work=4.0), Waits(work=0.2)
    made = plan([large, small], [busy("a", 1.0, work=2.0), Slot("b", pace_s=3.0)], mean_s=2.0, now=NOW)
    assert [(binding.task, binding.replica_id) for binding in made.bindings] == [(small, "b")]


def test_task_waits_for_no_replica_on_which_it_has_failed() -> None:
    replicas = [busy("a", 1.0), Slot("b", pace_s=9.0)]
    assert chosen(replicas, mean_s=3.0) is None
    assert chosen(replicas, mean_s=3.0, avoid=("a",)) == "b"


def test_who_is_draining_is_not_waited_for() -> None:
    draining = busy("a", 0.5, capacity=0)
    assert chosen([draining, busy("b", 1.0), Slot("c", pace_s=9.0)], mean_s=3.0) is None
    assert chosen([draining, busy("b", 8.0), Slot("c", pace_s=9.0)], mean_s=3.0) == "c"


def test_second_task_waits_for_the_replica_that_the_first_has_just_taken() -> None:
    first, second = Waits(), Waits()
    made = plan([first, second], [Slot("a", pace_s=1.0), Slot("b", pace_s=9.0)], mean_s=3.0, now=NOW)
    assert [(binding.task, binding.replica_id) for binding in made.bindings] == [(first, "a")]
    assert made.again_s == 1.0


def test_slots_of_a_plan_are_given_once_and_in_order() -> None:
    first, second, third, fourth = (Waits() for _ in range(4))
    slots = [Slot("a"), Slot("b", free=2, capacity=2)]
    bindings = plan([first, second, third, fourth], slots, mean_s=0, now=NOW).bindings
    assert [(binding.task, binding.replica_id) for binding in bindings] == [(first, "a"), (second, "b"), (third, "b")]


def test_plan_reads_no_further_than_there_are_slots() -> None:
    def endless() -> Iterable[Waits]:
        while True:
            yield Waits()

    assert len(plan(endless(), [Slot("a", free=3, capacity=3)], mean_s=0, now=NOW).bindings) == 3


def test_outlook_follows_what_is_left_and_how_fast_each_is() -> None:
    one = outlook([busy("a", 4.0, ran_s=2.0)], mean_s=4.0, now=NOW)
    first_s = left_s(4.0, 2.0)
    assert [one.start_s(place) for place in range(3)] == pytest.approx([first_s, first_s + 4.0, first_s + 8.0])
    both = outlook([busy("a", 4.0), busy("b", 1.0)], mean_s=2.0, now=NOW)
    assert 0.9 < both.start_s(0) < both.start_s(4) < both.start_s(9) < 10 / 1.25 + 1
    assert outlook([Slot("a", free=1)], mean_s=2.0, now=NOW).start_s(0) == 0.0


def test_outlook_says_nothing_where_nothing_is_known() -> None:
    assert outlook([busy("a", 0.0)], mean_s=0.0, now=NOW).start_s(3) == 0.0
    assert outlook([], mean_s=5.0, now=NOW).start_s(3) == 0.0
    assert outlook([busy("a", 2.0, comes_free=False)], mean_s=5.0, now=NOW).start_s(3) == 0.0


def test_choice_says_why() -> None:
    slots = [Slot("a", pace_s=1.5), Slot("b", pace_s=9.0), Slot("c", free=0, pace_s=5.0)]
    (binding,) = plan([Waits()], slots, mean_s=2.0, now=NOW).bindings
    assert binding.reason == "the fastest of 2 with a free slot, 1 busy or not ready; 1.5 s expected"
    (binding,) = plan([Waits()], slots[:1], mean_s=2.0, now=NOW).bindings
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


def cost_s(tasks: list[Waits], slots: list[Slot]) -> float:
    rounds = []
    for _ in range(20):
        begin = time.process_time()
        for _ in range(50):
            plan(tasks, slots, mean_s=5.0, now=NOW + 1)
        rounds.append((time.process_time() - begin) / 50)
    return min(rounds)


def test_choice_among_32_replicas_costs_microseconds() -> None:
    # About 12 us; the bounds leave room for a machine that is busy with other things.
    slots = [Slot(f"r{number}", free=number % 3, capacity=2, pace_s=4.0 + number / 10) for number in range(32)]
    assert cost_s([Waits()], slots) < 60e-6


def test_plan_of_a_whole_queue_costs_less_than_100_us() -> None:
    slots = [busy(f"r{number:02}", (10.0, 10.0, 5.0, 2.5)[number % 4], number / 32) for number in range(31)]
    slots.append(Slot("slow", pace_s=200.0))
    tasks = [Waits() for _ in range(LOOKAHEAD)]
    assert not plan(tasks, slots, mean_s=5.0, now=NOW + 1).bindings
    assert cost_s(tasks, slots) < 400e-6


def sent_ahead(slots: Iterable[Slot], *tasks: Waits) -> list[str]:
    return [replica_id for _, replica_id, _ in ahead(tasks, list(slots), mean_s=1.0, now=NOW)]


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([busy("a", 1.0)], []),  # the way there is short
        ([busy("a", 1.0, ahead=1)], ["a"]),
        ([busy("a", 1.0, ahead=2, capacity=2)], ["a", "a"]),
        ([busy("a", 2.0, ahead=1), busy("b", 1.0, ahead=1)], ["b", "a"]),  # where it ends first, in order
        ([busy("a", 1.0, ahead=1), busy("b", 0.1)], []),  # it will be taken sooner by one that is near
        ([busy("a", 1.0, ahead=1), busy("b", 0.6)], ["a"]),  # the second task, that is
        ([busy("a", 1.0, ran_s=9.0, ahead=1), busy("b", 1.0, ahead=1)], ["b"]),  # who is late is not trusted
        ([busy("a", 1.0, ahead=1, comes_free=False)], []),
        ([busy("a", 1.0, ahead=1, failures=1)], []),
    ],
)
def test_task_is_sent_ahead_only_to_where_it_will_end_first(slots: list[Slot], expected: list[str]) -> None:
    assert sent_ahead(slots, Waits(), Waits(), Waits()) == expected


def test_task_is_not_sent_ahead_to_where_it_has_failed() -> None:
    slots = [busy("a", 1.0, ahead=1), busy("b", 5.0, ahead=1)]
    assert sent_ahead(slots, Waits(avoid=("a",)), Waits()) == ["b", "a"]


def test_what_is_held_ahead_is_waited_for() -> None:
    one_ahead = Slot("a", free=-1, pace_s=1.0, since=NOW)
    assert chosen([one_ahead, Slot("b", pace_s=2.4)], mean_s=1.0) == "b"
    assert chosen([busy("a", 1.0), Slot("b", pace_s=3.1)], mean_s=1.0) is None
