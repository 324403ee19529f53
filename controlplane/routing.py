"""Which slot gets the next task of a workspace, and why none does: pure functions over plain values.

Late binding, planned: a task waits until a slot is free, and then until one is free that is worth it. For each task in
turn there is the free slot on which it would end first, and the busy one, counted with when it should be free
(estimates.py). The free one is taken unless the task would take so many times longer there, its wait for the other
included; else the busy one is reserved for it, in this plan only: at the next event all is planned anew. Where no busy
replica is that much faster than the fastest free one there is nothing to plan, and the task is bound at once.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, islice
from math import inf
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from controlplane import estimates
from controlplane.report import ReplicaReport, ReplicaState

#: For so many tasks a slot may be reserved; those behind could only take what all of these leave.
LOOKAHEAD: Final = 64
#: So many of those that wait are looked at for one to be sent ahead.
AHEAD_LOOK: Final = 16
#: A free slot is taken if a task ends there within so many times what it takes with a busy one, waited for: estimates
#: err, and what is waited for may come late ...
WAIT_FACTOR: Final = 1.5
#: ... and so much more for each task before it that waits: the longer the queue, the more an idle slot costs ...
WAIT_STEP: Final = 0.1
#: ... up to this.
WAIT_MOST: Final = 3.0
#: Added to the expected finish for each failure in a row: such a replica is taken when no other is free, and so gets
#: its trial. Without it one that fails at once would look like the fastest of all and eat the queue.
FAILURE_PENALTY_S: Final = 1e6
#: Added where the task itself has failed before: "elsewhere" if there is an elsewhere.
AVOID_PENALTY_S: Final = 1e12


class Candidate(estimates.Paced, Protocol):
    """A replica as routing sees it; nothing is written."""

    @property
    def id(self) -> str:
        """Ties are broken by it."""

    @property
    def capacity(self) -> int:
        """Tasks it may run at once; 0 while it takes none."""

    @property
    def free(self) -> int:
        """How many more it could take now, never more than 0 while its node is not connected."""

    @property
    def ahead(self) -> int:
        """How many tasks it could be sent before it has a slot for them, to begin there when one is free."""

    @property
    def failures(self) -> int:
        """Attempts in a row that failed there without an answer of the container."""

    @property
    def comes_free(self) -> bool:
        """What it runs now will end and leave it a slot: it may be waited for."""

    def oldest(self) -> tuple[float, float]:
        """Of what it runs, the longest: since when, in monotonic seconds (inf: about to begin), and its work."""


class Waiting(Protocol):
    """A task as routing sees it."""

    @property
    def avoid(self) -> Collection[str]:
        """Ids of replicas on which it has failed: taken only if no other is free."""

    @property
    def work(self) -> float:
        """How much there is to do, by what is known of its size; 1: as much as in the workspace's average task."""


W = TypeVar("W", bound=Waiting)


class Binding(NamedTuple, Generic[W]):
    """This task to that replica, and why, in words."""

    task: W
    replica_id: str
    reason: str


class Plan(NamedTuple, Generic[W]):
    """Who starts now, and after how many seconds to plan again if nothing has happened by then; inf: no need."""

    bindings: list[Binding[W]]
    again_s: float = inf


def plan(waiting: Iterable[W], replicas: Collection[Candidate], *, mean_s: float, now: float) -> Plan[W]:
    """Who starts now and where. `waiting` is read in order, and only as far as there are slots; the rest waits on.

    `mean_s`: average seconds of the workspace's tasks, 0 if none was seen.
    """
    tasks = iter(waiting)
    task = next(tasks, None)
    if task is None:
        return Plan([])
    paces = estimates.paces(replicas, mean_s, now)
    frees = [replica.free for replica in replicas]
    # Flat and without a helper per replica: this runs for every task, over every replica.
    avoid = task.avoid
    best: Candidate | None = None
    best_s = best_order = best_finish = 0.0
    busy_s = inf
    free_slots = open_count = 0
    for replica, pace, free in zip(replicas, paces, frees, strict=True):
        if free <= 0:
            if pace < busy_s and replica.capacity and not replica.failures:
                busy_s = pace
            continue
        free_slots += free
        open_count += 1
        # As _sharing says.
        order = finish = pace * (2.0 - free / replica.capacity)
        if replica.failures:
            order += FAILURE_PENALTY_S * replica.failures
        if avoid and replica.id in avoid:
            order += AVOID_PENALTY_S
        if best is None or order < best_order or (order == best_order and replica.id < best.id):
            best, best_s, best_order, best_finish = replica, pace, order, finish
    if best is None:
        return Plan([])
    first: list[W] = [task]
    if best_finish <= WAIT_FACTOR * busy_s:
        second = None if free_slots == 1 else next(tasks, None)
        if second is None:
            reason = _reason(open_count, len(replicas) - open_count, mean_s and best_s * task.work)
            return Plan([Binding(task, best.id, reason)])
        first.append(second)
    return _with_reserves(chain(first, tasks), _Table(list(replicas), paces, frees, now), mean_s)


class Ahead(NamedTuple, Generic[W]):
    """This task to that replica before it has a slot for it, which should be free after so many seconds."""

    task: W
    replica_id: str
    wait_s: float


def ahead(waiting: Iterable[W], replicas: Collection[Candidate], *, mean_s: float, now: float) -> list[Ahead[W]]:
    """Who is sent ahead of a slot, of those that the plan has left waiting, in order; see plan.

    Each only to where it would end first as things stand, so that late binding loses next to nothing.
    """
    rooms = [replica.ahead for replica in replicas]
    left = sum(rooms)
    if not left:
        return []
    table = list(replicas)
    at_s: list[float] = []
    unit_s: list[float] = []
    for replica, pace in zip(table, estimates.paces(table, mean_s, now), strict=True):
        wait_s, pace_s = (0.0, pace) if replica.free > 0 else _when_free(replica, pace, now)
        at_s.append(wait_s)
        unit_s.append(pace_s)
    sent: list[Ahead[W]] = []
    for task in islice(waiting, AHEAD_LOOK):
        best, best_s = -1, inf
        for index, wait_s in enumerate(at_s):
            ends_s = wait_s + unit_s[index] * task.work
            if ends_s < best_s and not (task.avoid and table[index].id in task.avoid):
                best, best_s = index, ends_s
        if best < 0:
            continue
        if rooms[best]:
            rooms[best] -= 1
            left -= 1
            sent.append(Ahead(task, table[best].id, at_s[best]))
            if not left:
                break
        at_s[best] += unit_s[best] * task.work / max(table[best].capacity, 1)
    return sent


def _with_reserves(tasks: Iterable[W], table: "_Table", mean_s: float) -> Plan[W]:
    """The plan where busy replicas count."""
    bindings: list[Binding[W]] = []
    again_s = inf
    usual: _Choice | None = None
    at_s, unit_s = table.at_s, table.unit_s
    factor = WAIT_FACTOR
    reserves = 0
    for task in tasks:
        if task.avoid:
            choice = table.choice(task.avoid)
        else:
            choice = usual = usual or table.choice(())
        work = task.work
        best = choice.free
        best_s = unit_s[best] * work / factor
        for index in choice.rivals:
            ends_s = at_s[index] + unit_s[index] * work
            if ends_s < best_s:
                best, best_s = index, ends_s
        if best != choice.free:
            again_s = min(again_s, at_s[best])
            factor = min(factor + WAIT_STEP, WAIT_MOST)
            at_s[best] += unit_s[best] * work / table.replicas[best].capacity
            reserves += 1
            if reserves == LOOKAHEAD:
                break
            continue
        others = len(table.replicas) - len(table.open)
        reason = _reason(len(table.open), others, mean_s and table.paces[best] * work)
        bindings.append(Binding(task, table.replicas[best].id, reason))
        table.take(best, work)
        usual = None
        if not table.open:
            return Plan(bindings)
    return Plan(bindings, again_s)


class _Choice(NamedTuple):
    """Of a table: the free replica on which a task would end first, and the busy ones where it may end far sooner."""

    free: int
    rivals: list[int]


class _Table:
    """What a plan has made of the replicas so far, by their index."""

    def __init__(self, replicas: Sequence[Candidate], paces: Sequence[float], frees: Sequence[int], now: float) -> None:
        self.replicas = replicas
        self.paces = paces
        self._frees = list(frees)
        self._now = now
        #: Those with a free slot.
        self.open = [index for index, free in enumerate(frees) if free > 0]
        #: Of each one's next slot: after how long it is free, and seconds for a unit of work there.
        self.at_s = [0.0] * len(replicas)
        self.unit_s = list(paces)
        for index in self.open:
            self.unit_s[index] *= _sharing(frees[index], replicas[index].capacity)
        self._looked_at = set(self.open)

    def choice(self, avoid: Collection[str]) -> _Choice:
        """For a task that has failed on these."""
        replicas, unit_s = self.replicas, self.unit_s

        def order(index: int) -> tuple[float, str]:
            replica = replicas[index]
            penalty_s = FAILURE_PENALTY_S * replica.failures + (AVOID_PENALTY_S if replica.id in avoid else 0.0)
            return unit_s[index] + penalty_s, replica.id

        free = min(self.open, key=order)
        limit_s = unit_s[free] / WAIT_FACTOR
        rivals = []
        for index, room in enumerate(self._frees):
            if room > 0 or unit_s[index] >= limit_s or (avoid and replicas[index].id in avoid):
                continue
            if index not in self._looked_at:
                # Not for all, since few come so far.
                self._looked_at.add(index)
                self.at_s[index], unit_s[index] = _when_free(replicas[index], self.paces[index], self._now)
                unit_s[index] *= _sharing(1, replicas[index].capacity)
            if unit_s[index] < limit_s:
                rivals.append(index)
        return _Choice(free, rivals)

    def take(self, index: int, work: float) -> None:
        """A slot of that one for so much work."""
        capacity = self.replicas[index].capacity
        self._frees[index] -= 1
        free = self._frees[index]
        if not free:
            self.open.remove(index)
            self.at_s[index] = self.unit_s[index] * work / capacity
        self.unit_s[index] = self.paces[index] * _sharing(free, capacity)


def _sharing(free: int, capacity: int) -> float:
    """By how much longer a task takes where only so many slots are free: those that share a replica share its GPU."""
    return 2.0 - max(free, 1) / max(capacity, 1)


def _when_free(replica: Candidate, pace: float, now: float) -> tuple[float, float]:
    """Of a busy replica: after how long a slot should be free, and seconds for a unit of work there."""
    if not (replica.capacity and replica.comes_free) or replica.failures:
        return inf, inf
    since, work = replica.oldest()
    passed_s = now - since
    # Who is late is slow.
    pace_s = max(pace, passed_s / work)
    # What it holds ahead comes first.
    return estimates.left_s(pace * work, passed_s) - min(replica.free, 0) * pace_s / replica.capacity, pace_s


class Outlook(NamedTuple):
    """When the tasks of a queue will likely start: slots come free at that rate, in slots a second."""

    #: When the first one does, in seconds.
    first_s: float = 0.0
    rate: float = 0.0
    #: How many are or come free before the others follow at that rate.
    ahead: float = 0.0

    def start_s(self, position: int) -> float:
        """After how long the task at that position starts; 0: not known."""
        return max(self.first_s, (position - self.ahead) / self.rate) if self.rate else 0.0


def outlook(replicas: Collection[Candidate], *, mean_s: float, now: float) -> Outlook:
    """By what the plan goes by, as if each slot took the next task when it is free, and none that is too slow."""
    if not mean_s:
        return Outlook()
    first_s, rate, ahead = inf, 0.0, 0.0
    stands = [
        (replica, *((0.0, pace) if replica.free > 0 else _when_free(replica, pace, now)))
        for replica, pace in zip(replicas, estimates.paces(replicas, mean_s, now), strict=True)
    ]
    limit_s = WAIT_FACTOR * min((wait_s + unit_s for _, wait_s, unit_s in stands), default=inf)
    for replica, wait_s, unit_s in stands:
        if unit_s < inf and (replica.free <= 0 or unit_s <= limit_s):
            first_s = min(first_s, wait_s)
            rate += replica.capacity / unit_s
            # Its slots come free evenly spread; a task starts on each of them, then every `unit_s`.
            ahead += 1 - wait_s * replica.capacity / unit_s if replica.free <= 0 else replica.free
    return Outlook(first_s, rate, ahead - 1) if rate else Outlook()


def _reason(open_count: int, others: int, seconds: float) -> str:
    which = "the only replica with a free slot" if open_count == 1 else f"the fastest of {open_count} with a free slot"
    reason = f"{which}, {others} busy or not ready" if others else which
    return f"{reason}; {seconds:.3g} s expected" if seconds else reason


_STATE_WORDS: Final = {
    ReplicaState.ASSIGNED: "placed, its node has not begun with it",
    ReplicaState.PULLING: "pulling",
    ReplicaState.STARTING: "starting",
    ReplicaState.READY: "taking no new tasks",
    ReplicaState.BACKOFF: "failed and to be tried again",
    ReplicaState.STOPPING: "stopping",
    ReplicaState.LOST: "on a node that is not connected",
}


def waiting_for(replicas: Collection[Candidate], reports: Iterable[ReplicaReport], *, reserved: bool = False) -> str:
    """Why no slot is free, in words. `reports`: how all replicas of the workspace stand, ready or not.

    `reserved`: the plan lets tasks wait for busy replicas.
    """
    able = sum(1 for replica in replicas if replica.capacity)
    free = sum(1 for replica in replicas if replica.free > 0)
    if free and reserved:
        slower = "the free one is so much slower" if free == 1 else f"the {free} free ones are so much slower"
        return f"a busy replica will have done it sooner: {slower}"
    if free:
        return "a slot is free; it is next"
    stands = Counter(_stand(report) for report in reports if report.state is not ReplicaState.READY or not able)
    others = ", ".join(
        f"{count} {words}" for words, count in sorted(stands.items(), key=lambda item: (-item[1], item[0]))
    )
    if able:
        busy = "the only replica is busy" if able == 1 else f"{able} replicas, all busy"
        return f"{busy}; besides {others}" if others else busy
    return f"no replica is ready: {others}" if others else "no replica is placed yet"


def _stand(report: ReplicaReport) -> str:
    words = _STATE_WORDS[report.state]
    if report.state in {ReplicaState.PULLING, ReplicaState.STARTING}:
        words += f" ({report.progress} %)"
    if report.state is ReplicaState.BACKOFF and report.message:
        words += f" ({report.message[:200]})"
    return words
