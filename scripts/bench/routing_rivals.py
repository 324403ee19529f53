"""Other ways to route, as others do it: most bind a task to a replica when it comes, and cannot take it back."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scripts.bench.routing_fleet import REPLICAS, Fleet, Job

#: Of the averages that some keep.
NEWEST_WEIGHT = 0.2


class AtOnce:
    """Binds each task when it comes, to the replica that `_choose` says."""

    def __init__(self) -> None:
        self._chance = random.Random(1)  # noqa: S311
        self._outstanding = [0] * REPLICAS

    def arrive(self, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        index = self._choose()
        self._outstanding[index] += 1
        fleet.give(index, job)

    def ended(self, index: int, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        del job, fleet
        self._outstanding[index] -= 1

    def _choose(self) -> int:
        raise NotImplementedError

    def _least(self, among: Sequence[int], cost: Callable[[int], float]) -> int:
        return min(among, key=lambda index: (cost(index), self._chance.random()))

    def _two(self) -> list[int]:
        return self._chance.sample(range(REPLICAS), 2)


class Random(AtOnce):
    """Any."""

    def _choose(self) -> int:
        return self._chance.randrange(REPLICAS)


class PowerOfTwo(AtOnce):
    """Of two drawn, the one with fewer tasks."""

    def _choose(self) -> int:
        return self._least(self._two(), self._outstanding.__getitem__)


class LeastOutstanding(AtOnce):
    """The one with the fewest tasks, of all: nginx's least_conn, Envoy's least request with all hosts."""

    def _choose(self) -> int:
        return self._least(range(REPLICAS), self._outstanding.__getitem__)


class PeakEwma(AtOnce):
    """Of two drawn, the one with the lower latency times tasks; peaks count at once, as in Finagle and Linkerd."""

    def __init__(self) -> None:
        super().__init__()
        self._latency_s = [0.0] * REPLICAS

    def _choose(self) -> int:
        return self._least(self._two(), lambda index: self._latency_s[index] * (self._outstanding[index] + 1))

    def ended(self, index: int, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        super().ended(index, job, fleet)
        latency_s, known_s = job.end - job.arrival, self._latency_s[index]
        self._latency_s[index] = max(latency_s, known_s + (latency_s - known_s) * NEWEST_WEIGHT)


class C3(AtOnce):
    """C3 (NSDI 2015) where one client sees all: R - 1/mu + q**3 / mu."""

    def __init__(self) -> None:
        super().__init__()
        self._response_s = [0.0] * REPLICAS
        self._service_s = [0.0] * REPLICAS

    def _choose(self) -> int:
        return self._least(range(REPLICAS), self._score)

    def _score(self, index: int) -> float:
        service_s = self._service_s[index]
        return self._response_s[index] - service_s + (self._outstanding[index] + 1) ** 3 * service_s

    def ended(self, index: int, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        super().ended(index, job, fleet)
        for known, seconds in ((self._response_s, job.end - job.arrival), (self._service_s, job.end - job.begun)):
            known[index] += (seconds - known[index]) * (NEWEST_WEIGHT if known[index] else 1.0)


class Oracle:
    """Knows what every task takes everywhere, and all neighbours that will come: where would it end first?"""

    def __init__(self) -> None:
        self._free_at = [0.0] * REPLICAS

    def arrive(self, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        ends = [
            machine.end(max(fleet.now, free_at), job.seconds)
            for machine, free_at in zip(fleet.machines, self._free_at, strict=True)
        ]
        index = ends.index(min(ends))
        self._free_at[index] = ends[index]
        fleet.give(index, job)

    def ended(self, index: int, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""


@dataclass
class CentralQueue:
    """One queue; its first task goes to the free replica whose tasks took the least on average."""

    _waiting: deque[Job] = field(default_factory=deque)
    _service_s: list[float] = field(default_factory=lambda: [0.0] * REPLICAS)

    def arrive(self, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        self._waiting.append(job)
        self._fill(fleet)

    def ended(self, index: int, job: Job, fleet: Fleet, /) -> None:
        """See routing_fleet.Router."""
        known, seconds = self._service_s[index], job.end - job.begun
        self._service_s[index] = known + (seconds - known) * (NEWEST_WEIGHT if known else 1.0)
        self._fill(fleet)

    def _fill(self, fleet: Fleet) -> None:
        while self._waiting:
            free = [index for index, given in enumerate(fleet.given) if not given]
            if not free:
                return
            fleet.give(min(free, key=self._service_s.__getitem__), self._waiting.popleft())
