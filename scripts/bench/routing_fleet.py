"""A fleet on a virtual clock: replicas of different speeds with noisy neighbours, tasks that arrive, who routes them.

A replica runs one task at a time, in the order in which it was given them. Sizes of tasks, arrivals and neighbours are
drawn before, by seed: every router sees the same.
"""

import json
import random
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import exp, log, sqrt
from typing import Final, Protocol

#: Of lognormal service times, in seconds on a replica of speed 1: fitted to 26,000 real Stable Diffusion requests.
MU: Final = 3.20
SIGMA: Final = 0.55
MEAN_S: Final = exp(MU + SIGMA * SIGMA / 2)
REPLICAS: Final = 32
SPEEDS: Final = (1.0, 1.0, 2.0, 4.0)
#: A neighbour comes and goes, in seconds on average, and slows its replica down meanwhile.
QUIET_S: Final = 900.0
NOISY_S: Final = 180.0
SLOWDOWN: Final = 4.0
#: The share of the variance of log service times that a task's request tells.
TOLD: Final = 0.7
#: The first tasks find an empty fleet that nobody knows yet: they do not count.
WARM_UP: Final = 0.2


@dataclass(eq=False, slots=True)
class Job:
    """A task of the simulation. `seconds`: on an undisturbed replica of speed 1.

    When it was given to its replica, came there, began, was done there; and `end`, when its router knew of that.
    """

    number: int
    arrival: float
    seconds: float
    body: bytes
    given: float = 0.0
    there: float = 0.0
    begun: float = 0.0
    done: float = 0.0
    end: float = 0.0


class Machine:
    """A replica: how fast it is when."""

    def __init__(self, speed: float, chance: random.Random) -> None:
        self.speed = speed
        self._chance = chance
        noisy = chance.random() < NOISY_S / (QUIET_S + NOISY_S)
        #: From each time on, the speed, and the work done by then.
        self._since = array("d", [0.0])
        self._speeds = array("d", [speed / SLOWDOWN if noisy else speed])
        self._done = array("d", [0.0])

    def end(self, begin: float, seconds: float) -> float:
        """When work of so many seconds ends that begins then."""
        while self._since[-1] <= begin:
            self._extend()
        index = bisect_right(self._since, begin) - 1
        goal = self._done[index] + (begin - self._since[index]) * self._speeds[index] + seconds
        while self._done[-1] <= goal:
            self._extend()
        index = bisect_right(self._done, goal) - 1
        return self._since[index] + (goal - self._done[index]) / self._speeds[index]

    def _extend(self) -> None:
        quiet = self._speeds[-1] == self.speed
        lasts = self._chance.expovariate(1 / (QUIET_S if quiet else NOISY_S))
        self._done.append(self._done[-1] + lasts * self._speeds[-1])
        self._since.append(self._since[-1] + lasts)
        self._speeds.append(self.speed / SLOWDOWN if quiet else self.speed)


def capacity() -> float:
    """Seconds of work that the fleet does in a second, on average."""
    noisy = NOISY_S / (QUIET_S + NOISY_S)
    share = 1 - noisy + noisy / SLOWDOWN
    return share * sum(SPEEDS) * REPLICAS / len(SPEEDS)


def machines(seed: int) -> list[Machine]:
    """The fleet."""
    return [
        Machine(SPEEDS[i % len(SPEEDS)], random.Random(f"{seed} machine {i}"))  # noqa: S311
        for i in range(REPLICAS)
    ]


def jobs(seed: int, load: float, count: int, *, told: bool) -> list[Job]:
    """Poisson arrivals at that share of the fleet's capacity. `told`: requests tell something of their size.

    They take the same time if they do not.
    """
    chance = random.Random(f"{seed} jobs {load}")  # noqa: S311
    rate = load * capacity() / MEAN_S
    # Half of what is told is the number of steps, half the side of a square picture.
    spread = SIGMA * sqrt(TOLD / 2)
    now, made = 0.0, []
    for number in range(count):
        now += chance.expovariate(rate)
        steps = max(1, round(30 * exp(chance.gauss(0, spread))))
        side = 8 * max(1, round(64 * exp(chance.gauss(0, spread) / 2)))
        said = log(steps / 30) + 2 * log(side / 512)
        seconds = exp(MU + said + chance.gauss(0, SIGMA * sqrt(1 - TOLD)))
        body: dict[str, str | int] = {"prompt": "x" * chance.randrange(20, 200), "seed": number}
        if told:
            body |= {"steps": steps, "width": side, "height": side}
        made.append(Job(number, now, seconds, json.dumps(body).encode()))
    return made


class Router(Protocol):
    """Who decides. Gives tasks to replicas by `Fleet.give`, at once or later."""

    def arrive(self, job: Job, fleet: "Fleet", /) -> None:
        """A task has come."""

    def ended(self, index: int, job: Job, fleet: "Fleet", /) -> None:
        """A task has ended on the replica of that index, which may have begun the next one given to it."""


@dataclass
class Fleet:
    """The replicas and what they were given; the clock. `trip_s`: from router to replica and back."""

    machines: Sequence[Machine]
    trip_s: float = 0.0
    now: float = 0.0
    given: list[deque[Job]] = field(default_factory=list)
    _there: list[deque[Job]] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0
    _router: Router | None = None

    def __post_init__(self) -> None:
        self.given = [deque() for _ in self.machines]
        self._there = [deque() for _ in self.machines]

    def give(self, index: int, job: Job) -> None:
        """To the replica of that index, behind what it has."""
        job.given = self.now
        self.given[index].append(job)
        self._after_way(lambda: self._come(index, job))

    def wake_at(self, when: float, wake: Callable[[], None]) -> None:
        """Call it then."""
        self._at(when, wake)

    def run(self, jobs: Sequence[Job], router: Router) -> None:
        """All of them, to the last one's end."""
        self._router = router
        coming = iter(jobs)
        job = next(coming, None)
        while job is not None or self._events:
            if job is not None and (not self._events or job.arrival <= self._events[0][0]):
                self.now = job.arrival
                router.arrive(job, self)
                job = next(coming, None)
            else:
                self.now, _, happens = heappop(self._events)
                happens()

    def _at(self, when: float, what: Callable[[], None]) -> None:
        self._number += 1
        heappush(self._events, (when, self._number, what))

    def _after_way(self, what: Callable[[], None]) -> None:
        if self.trip_s:
            self._at(self.now + self.trip_s / 2, what)
        else:
            what()

    def _come(self, index: int, job: Job) -> None:
        job.there = self.now
        waiting = self._there[index]
        waiting.append(job)
        if len(waiting) == 1:
            self._begin(index)

    def _begin(self, index: int) -> None:
        job = self._there[index][0]
        job.begun = self.now
        self._at(self.machines[index].end(self.now, job.seconds), lambda: self._end(index))

    def _end(self, index: int) -> None:
        job = self._there[index].popleft()
        job.done = self.now
        if self._there[index]:
            self._begin(index)
        self._after_way(lambda: self._tell(index))

    def _tell(self, index: int) -> None:
        job = self.given[index].popleft()
        job.end = self.now
        assert self._router is not None
        self._router.ended(index, job, self)


def simulate(
    router: Router, *, load: float, seed: int, count: int, told: bool = False, trip: float = 0.0
) -> list[float]:
    """Response times of one run, sorted, in units of the mean service time, as `trip` is."""
    made = jobs(seed, load, count, told=told)
    Fleet(machines(seed), trip * MEAN_S).run(made, router)
    return sorted((job.end - job.arrival) / MEAN_S for job in made[int(count * WARM_UP) :])
