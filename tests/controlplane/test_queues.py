"""Who is served next: fair between callers, by priority and age among one's own; places told are had."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from math import inf

from controlplane.model import State
from controlplane.queues import PRIORITY_S, Queue, Queues
from controlplane.slots import Request
from controlplane.spec import Limits
from controlplane.tasks import OpenTask, Phase

NUMBERS: Iterator[int] = iter(range(1, 1_000_000))


def task(caller: str = "", *, at: float = 0.0, priority: int = 0, ready: bool = True) -> OpenTask:
    number = next(NUMBERS)
    return OpenTask(
        id=f"t{number}",
        workspace_uid="w-1",
        workspace_name="ws",
        place=number,
        port=80,
        request=None,
        repeatable=True,
        limits=Limits(),
        create_time=datetime(2025, 1, 2, tzinfo=UTC),
        accepted_at=at,
        total_at=inf,
        phase=Phase.WAITING,
        state=State.QUEUED,
        caller=caller,
        priority=priority,
        ready=ready,
    )


def queue_of(*tasks: OpenTask) -> Queue:
    queue = Queue("w-1")
    for one in tasks:
        queue.add(one)
    return queue


def serve(queue: Queue) -> OpenTask:
    first = next(queue.ready())
    queue.remove(first, served=True)
    return first


def served(queue: Queue) -> list[OpenTask]:
    order = []
    while queue:
        order.append(serve(queue))
    return order


def test_one_caller_is_served_in_order_of_arrival() -> None:
    tasks = [task() for _ in range(5)]
    assert served(queue_of(*reversed(tasks))) == tasks


def test_one_task_does_not_wait_behind_a_thousand_of_another() -> None:
    many, few = [task("many") for _ in range(1000)], [task("few") for _ in range(2)]
    queue = queue_of(*many)
    assert serve(queue) is many[0]
    for one in few:
        queue.add(one)
    assert [queue.position(one) for one in few] == [1, 3]
    assert served(queue)[:5] == [many[1], few[0], many[2], few[1], many[3]]


def test_who_asks_again_at_once_gets_no_more_than_his_share() -> None:
    queue = queue_of(*[task("many") for _ in range(100)])
    queue.add(task("again"))
    counts = {"many": 0, "again": 0}
    for _ in range(60):
        first = serve(queue)
        counts[first.caller] += 1
        if first.caller == "again":
            queue.add(task("again"))
    assert counts["many"] == counts["again"] == 30


def test_a_crowd_of_new_callers_does_not_starve_those_who_wait() -> None:
    waiting = [task("first") for _ in range(3)]
    queue = queue_of(*waiting)
    served_at = []
    for turn in range(60):
        # More come than are served.
        queue.add(task(f"new {turn}"))
        queue.add(task(f"newer {turn}"))
        if serve(queue) in waiting:
            served_at.append(turn)
    # Those who came within a round are served before its next one, and none that came later.
    assert served_at == [0, 3, 10]


def test_cancelled_tasks_cost_their_caller_no_turns() -> None:
    many, one = [task("many") for _ in range(100)], task("one")
    queue = queue_of(*many, one)
    for cancelled in many[:99]:
        queue.remove(cancelled)
    assert served(queue) == [many[99], one]


def test_priority_orders_a_callers_own_tasks_and_nobody_elses() -> None:
    plain, urgent, other = task("a"), task("a", priority=5), task("b")
    queue = queue_of(plain, other, urgent)
    assert [queue.position(one) for one in (urgent, other, plain)] == [0, 1, 2]
    assert served(queue) == [urgent, other, plain]


def test_nothing_waits_for_ever_behind_what_is_more_urgent() -> None:
    old = task(priority=-1, at=0.0)
    later, much_later = task(priority=1, at=1.9 * PRIORITY_S), task(priority=1, at=2.1 * PRIORITY_S)
    assert served(queue_of(old, later, much_later)) == [later, old, much_later]


def test_failed_attempt_returns_to_its_old_turn() -> None:
    tasks = [task("a") for _ in range(3)]
    other = task("b")
    queue = queue_of(*tasks, other)
    first = serve(queue)
    queue.add(first)
    assert queue.position(first) == 0
    assert served(queue) == [tasks[0], other, tasks[1], tasks[2]]


def test_who_may_not_start_yet_gives_up_no_turn_of_its_caller() -> None:
    backing_off, next_one, other = task("a", ready=False), task("a"), task("b")
    queue = queue_of(backing_off, next_one, other)
    assert list(queue.ready()) == [next_one, other]
    assert list(queue) == [backing_off, other, next_one]


def test_oldest_is_who_came_first_whatever_the_order() -> None:
    old, urgent = task(), task(priority=5)
    queue = queue_of(old, urgent)
    assert queue.oldest is old
    queue.remove(old)
    queue.remove(urgent)
    assert len(queue) == 0
    assert queue.oldest is None


def test_places_told_are_places_had_whatever_happens() -> None:
    chance = random.Random(7)
    queue = Queue("w-1")
    waiting: list[OpenTask] = []
    was_served: list[OpenTask] = []
    for step in range(2000):
        what = chance.random()
        if what < 0.5 or not waiting:
            waiting.append(task(chance.choice("abcde"), at=float(step), priority=chance.randint(-5, 5)))
            queue.add(waiting[-1])
        elif what < 0.8:
            one = chance.choice(waiting[:8])
            waiting.remove(one)
            queue.remove(one, served=True)
            was_served.append(one)
        elif what < 0.9:
            one = chance.choice(waiting)
            waiting.remove(one)
            queue.remove(one)
        elif was_served:
            waiting.append(was_served.pop())
            queue.add(waiting[-1])
        assert len(queue) == len(waiting)
        if step % 20 == 0:
            assert [queue.position(one) for one in queue] == list(range(len(queue)))
            assert sorted(one.place for one in queue) == sorted(one.place for one in waiting)
    order = list(queue)
    assert served(queue) == order


def test_memory_for_requests_is_bounded_and_given_back() -> None:
    queues = Queues(held_bytes=5000)
    kept, read_later = task(), task()
    for one in (kept, read_later):
        one.request = Request("POST", "/", body=b"x" * 3000, size=3000)
        queues.enter(one, 0.0)
    assert kept.request is not None
    assert read_later.request is None
    queues.leave(kept, served=True)
    assert kept.held_bytes == 0
    again = task()
    again.request = Request("POST", "/", body=b"x" * 3000, size=3000)
    queues.enter(again, 0.0)
    assert again.request is not None
