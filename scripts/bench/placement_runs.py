"""One run of a contestant: until far more was asked for than there is, or over days with departures and deaths."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from scripts.bench.placement_loads import DAY_S, Arrival, Churn, Death, Pod


class Contestant(Protocol):
    """A way to place requests, which are numbered, on nodes, which are too."""

    def take(self, number: int, pod: Pod) -> int | None:
        """Place it and give the node; None: there is no room."""

    def give_back(self, number: int) -> None:
        """What was placed has ended."""

    def die(self, node: int, time_s: float) -> None:
        """All that was there has been given back; nothing goes there."""

    def come_back(self, node: int, time_s: float) -> None:
        """It is there again."""

    def pass_day(self, time_s: float) -> None:
        """Another day of a run has gone by."""


#: Points of a curve: for each such part of the capacity that has arrived.
STEP: Final = 0.025


def allocation(contestant: Contestant, load: Iterable[Pod], whole: int) -> list[tuple[float, float]]:
    """What has arrived and what of it was placed, in parts of the capacity `whole`; the last is the end."""
    arrived = placed = 0
    curve: list[tuple[float, float]] = []
    for number, pod in enumerate(load):
        arrived += pod.gpu
        if contestant.take(number, pod) is not None:
            placed += pod.gpu
        if arrived >= STEP * (len(curve) + 1) * whole:
            curve.append((arrived / whole, placed / whole))
    return [*curve, (arrived / whole, placed / whole)]


@dataclass
class Outcome:
    """Of days with churn: GPUs (thousandths) asked for and of them not had; replicas lost on bad nodes and on others.

    A replica that is lost is asked for again at once, for the rest of its time.
    """

    asked: int = 0
    blocked: int = 0
    lost_on_bad: int = 0
    lost_on_good: int = 0
    #: Of all GPUs, on average.
    held_share: float = 0.0


_RETURN, _DEATH, _END, _ARRIVAL, _DAY = range(5)


def days(
    contestant: Contestant,
    arrivals: Sequence[Arrival],
    deaths: Sequence[Death],
    bad: frozenset[int],
    churn: Churn,
    *,
    whole: int,
) -> Outcome:
    """All that happens, in order; counted after the warm-up. `whole`: thousandths of GPUs of all nodes."""
    outcome = Outcome()
    begin_s, end_s = churn.warm_up_days * DAY_S, churn.days * DAY_S

    def held_share(number: int, from_s: float, until_s: float) -> float:
        seconds = max(0.0, min(until_s, end_s) - max(from_s, begin_s))
        return arrivals[number].pod.gpu * seconds / (whole * (end_s - begin_s))

    events: list[tuple[float, int, int]] = [(one.time_s, _ARRIVAL, number) for number, one in enumerate(arrivals)]
    events += [(one.time_s, _DEATH, number) for number, one in enumerate(deaths)]
    events += [(one.back_s, _RETURN, one.node) for one in deaths]
    events += [(day * DAY_S, _DAY, day) for day in range(1, int(churn.days))]
    heapq.heapify(events)
    #: By node: what is there, and until when; and by number where it is.
    there: dict[int, dict[int, float]] = {}
    where: dict[int, int] = {}

    def ask(number: int, now_s: float, until_s: float) -> None:
        pod = arrivals[number].pod
        counts = now_s >= begin_s
        outcome.asked += pod.gpu * counts
        node = contestant.take(number, pod)
        if node is None:
            outcome.blocked += pod.gpu * counts
            return
        there.setdefault(node, {})[number] = until_s
        where[number] = node
        heapq.heappush(events, (until_s, _END, number))
        outcome.held_share += held_share(number, now_s, until_s)

    while events and events[0][0] < end_s:
        now_s, kind, number = heapq.heappop(events)
        if kind == _ARRIVAL:
            ask(number, now_s, now_s + arrivals[number].stay_s)
        elif kind == _END:
            # One that was lost and not placed again has ended already.
            if number in where and there[where[number]][number] == now_s:
                del there[where.pop(number)][number]
                contestant.give_back(number)
        elif kind == _DEATH:
            node = deaths[number].node
            lost = there.pop(node, {})
            for each, until_s in lost.items():
                contestant.give_back(each)
                del where[each]
                outcome.held_share -= held_share(each, now_s, until_s)
            contestant.die(node, now_s)
            if now_s >= begin_s:
                if node in bad:
                    outcome.lost_on_bad += len(lost)
                else:
                    outcome.lost_on_good += len(lost)
            for each, until_s in lost.items():
                ask(each, now_s, until_s)
        elif kind == _RETURN:
            contestant.come_back(number, now_s)
        else:
            contestant.pass_day(now_s)
    return outcome
