"""How many replicas a load calls for: each rule as a value, and whole days in simulation."""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.autoscale import DOWN_AFTER_S, Course, Load, begun, scaled
from controlplane.spec import Scale

RULES = Scale(min_replicas=0, max_replicas=10, idle_time_s=900.0, queue_wait_s=10.0)
NOW_S = 10_000.0


def busy(*, use: float = 0.0, low_s: float | None = None, peak: int = 0) -> Course:
    """So many slots in use on average; less than there is needed since `low_s` seconds, at most `peak`."""
    return Course(NOW_S - 1, use, NOW_S - 1, None if low_s is None else NOW_S - low_s, peak)


@pytest.mark.parametrize(
    ("rules", "target", "load", "course", "after"),
    [
        pytest.param(RULES, 0, Load(), busy(), 0, id="nobody calls"),
        pytest.param(RULES, 0, Load(queued=1), busy(), 1, id="a call wakes it"),
        pytest.param(replace(RULES, min_replicas=2), 0, Load(), busy(), 2, id="at least so many"),
        pytest.param(RULES, 1, Load(queued=1, running=1, ready=1, mean_s=60), busy(use=1), 2, id="who waits long"),
        pytest.param(RULES, 1, Load(queued=1, running=1, ready=1, mean_s=5), busy(use=0.5), 1, id="who does not"),
        pytest.param(RULES, 1, Load(queued=50, running=1, ready=1, mean_s=60), busy(use=1), 4, id="not all at once"),
        pytest.param(RULES, 4, Load(queued=50, running=4, ready=4, mean_s=60), busy(use=4), 8, id="then twice as many"),
        pytest.param(RULES, 8, Load(queued=50, running=8, ready=8, mean_s=60), busy(use=8), 10, id="at most so many"),
        pytest.param(RULES, 1, Load(queued=9, oldest_s=60, ready=0), busy(), 1, id="what is coming up is waited for"),
        pytest.param(RULES, 1, Load(queued=1, running=1, oldest_s=11, ready=1), busy(use=1), 2, id="an unknown pace"),
        pytest.param(RULES, 2, Load(running=2, ready=2, mean_s=1), busy(use=2), 3, id="all in use all the time"),
        pytest.param(RULES, 2, Load(running=2, ready=2, mean_s=1), busy(use=1), 2, id="all in use for a moment"),
        pytest.param(RULES, 9, Load(running=1, ready=9), busy(use=1), 9, id="little to do"),
        pytest.param(
            RULES, 9, Load(running=1, ready=9), busy(use=1, low_s=DOWN_AFTER_S, peak=4), 4, id="little for long"
        ),
        pytest.param(RULES, 9, Load(ready=9), busy(low_s=DOWN_AFTER_S, peak=1), 1, id="the last one stays"),
        pytest.param(RULES, 1, Load(ready=1), Course(NOW_S, 0, NOW_S - 899), 1, id="idle, but not for long"),
        pytest.param(RULES, 1, Load(ready=1), Course(NOW_S, 0, NOW_S - 900), 0, id="idle for long"),
        pytest.param(replace(RULES, min_replicas=1), 1, Load(ready=1), Course(NOW_S, 0, 0), 1, id="idle, one is kept"),
        pytest.param(RULES, 20, Load(running=20, ready=20), busy(use=20), 10, id="fewer are allowed now"),
    ],
)
def test_how_many(rules: Scale, target: int, load: Load, course: Course, after: int) -> None:
    number, _, why = scaled(rules, 1, target, load, course, now_s=NOW_S)
    assert number == after
    assert bool(why) is (number != target)


def test_slots_count_and_not_replicas() -> None:
    load = Load(queued=4, running=8, ready=1, mean_s=60)
    assert scaled(RULES, 8, 1, load, busy(use=8), now_s=NOW_S)[0] == 2


class Sim:
    """Tasks that arrive, replicas that take `start_s` to come up, one look a second."""

    def __init__(self, rules: Scale, task_s: float, *, start_s: float = 60.0, concurrency: int = 1) -> None:
        self.rules, self.task_s, self.start_s, self.concurrency = rules, task_s, start_s, concurrency
        self.now_s = 0.0
        self.target = rules.min_replicas
        self.course = begun(0.0)
        self.replicas: list[float] = []
        self.queue: deque[float] = deque()
        self.ends: list[float] = []
        self.waits: list[float] = []
        self.targets: list[int] = []

    def second(self, arrivals: int) -> None:
        self.now_s += 1
        self.ends = [end for end in self.ends if end > self.now_s]
        self.queue.extend([self.now_s] * arrivals)
        self.replicas = self.replicas[: self.target]
        self.replicas += [self.now_s + self.start_s] * (self.target - len(self.replicas))
        ready = sum(up <= self.now_s for up in self.replicas)
        while self.queue and len(self.ends) < ready * self.concurrency:
            self.waits.append(self.now_s - self.queue.popleft())
            self.ends.append(self.now_s + self.task_s)
        oldest_s = self.now_s - self.queue[0] if self.queue else 0.0
        load = Load(len(self.queue), len(self.ends), oldest_s, ready, self.task_s if self.waits else 0.0)
        self.target, self.course, _ = scaled(
            self.rules, self.concurrency, self.target, load, self.course, now_s=self.now_s
        )
        self.targets.append(self.target)

    def run(self, seconds: int, rate: Callable[[float], float], seed: int = 1) -> None:
        chance, owed = random.Random(seed), 0.0
        for _ in range(seconds):
            owed += chance.expovariate(1.0) * rate(self.now_s)
            self.second(int(owed))
            owed -= int(owed)

    def changes(self, last_s: int) -> int:
        recent = self.targets[-last_s:]
        return sum(before != after for before, after in itertools.pairwise(recent))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("load", [0.7, 2.5, 3.2, 5.0, 7.9])
def test_a_steady_load_gets_a_steady_number(load: float, seed: int) -> None:
    sim = Sim(RULES, 20.0)
    sim.run(4 * 3600, lambda _: load / 20.0, seed)
    assert load <= sim.target <= math.ceil(load / 0.5) + 1
    assert sim.changes(2 * 3600) <= 8
    recent = sorted(sim.waits[-200:])
    assert recent[len(recent) * 9 // 10] <= 30


def test_waves_do_not_make_replicas_come_and_go() -> None:
    sim = Sim(RULES, 10.0, start_s=30.0)
    sim.run(2 * 3600, lambda now_s: 0.35 + 0.3 * math.sin(now_s / 60 * 2 * math.pi))
    assert sim.changes(3600) <= 4


def test_a_day_with_a_night() -> None:
    sim = Sim(RULES, 20.0)
    sim.run(7200, lambda _: 4 / 20)
    by_day = sim.target
    sim.run(DOWN_AFTER_S.__trunc__() * 3 + 900 + 120, lambda _: 0.0)
    assert (by_day >= 4, sim.target) == (True, 0)
    sim.second(1)
    assert sim.target == 1
    sim.run(300, lambda _: 0.0)
    assert sim.queue == deque()
    assert sim.waits[-1] <= sim.start_s + 2


def test_a_burst_is_met_and_forgotten() -> None:
    sim = Sim(RULES, 30.0, start_s=20.0)
    sim.second(60)
    sim.run(300, lambda _: 0.0)
    assert max(sim.targets) == 10
    assert not sim.queue
    sim.run(2000, lambda _: 0.0)
    assert sim.target == 0


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.floats(0, 100), st.integers(0, 20)), max_size=30),
    st.integers(0, 3),
    st.integers(1, 8),
    st.integers(1, 4),
)
def test_never_outside_the_bounds(
    loads: list[tuple[int, int, float, int]], least: int, more: int, concurrency: int
) -> None:
    rules = Scale(least, least + more)
    target, course, now_s = 0, begun(0.0), 0.0
    for queued, running, oldest_s, ready in loads:
        now_s += 30
        target, course, _ = scaled(
            rules, concurrency, target, Load(queued, running, oldest_s, ready, 5.0), course, now_s=now_s
        )
        assert least <= target <= rules.max_replicas
        assert target or not queued
