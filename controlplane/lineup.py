"""How the replicas of a workspace stood when a task was given to one of them: what is kept to explain the choice. Pure.

To ask every replica for every task would cost more than the choice itself, so a line-up serves all choices of the next
FRESH_S, and is told in words (an explain.Decision) only where somebody may want to know: see `lifecycle`.
"""

from collections.abc import Callable, Collection
from datetime import datetime
from math import isfinite
from typing import Final, NamedTuple, Protocol

from controlplane import ejection, estimates
from controlplane.ejection import Record
from controlplane.explain import Candidate, Decision, counted
from controlplane.routing import AVOID_PENALTY_S, FAILURE_PENALTY_S

#: How old a line-up may be that stands for a choice.
FRESH_S: Final = 0.1
#: Replicas that are told of, of those that could have taken the task and of the others.
TOLD: Final = 8


class Node(Protocol):
    """Where a replica is."""

    @property
    def addr(self) -> str:
        """Its address."""

    @property
    def link(self) -> object | None:
        """None: it is not connected."""


class Paced(estimates.Paced, Protocol):
    """A replica, as far as it is told of."""

    id: str
    capacity: int
    failures: int
    record: Record

    @property
    def node(self) -> Node:
        """Where it is."""

    @property
    def free(self) -> int:
        """How many more it could take."""

    @property
    def comes_free(self) -> bool:
        """What it runs will leave it a slot."""

    def oldest(self) -> tuple[float, float]:
        """Since when the longest of what it runs does so, and its work."""


class Stood(NamedTuple):
    """One replica. `wait_s`: until a slot is free; `run_s`: for a unit of work; `refusal`: why it could not do."""

    id: str
    node_addr: str
    wait_s: float
    run_s: float
    failures: int
    refusal: str


Lineup = tuple[Stood, ...]


def line_up(replicas: Collection[Paced], mean_s: float, now: float) -> Lineup:
    """All of them, as they stand now. `mean_s`: the workspace's average seconds."""
    paces = estimates.paces(replicas, mean_s, now)
    return tuple([_stood(replica, pace, now) for replica, pace in zip(replicas, paces, strict=True)])


def _stood(replica: Paced, pace_s: float, now: float) -> Stood:
    node, record = replica.node, replica.record
    refusal, wait_s = "", 0.0
    if node.link is None:
        refusal = "its node is not connected"
    elif not replica.capacity:
        refusal = "it takes no tasks now"
    elif record.most == 0:
        refusal = ejection.words(record, now)
    elif replica.free <= 0:
        if not replica.comes_free:
            refusal = "it has no free slot"
        else:
            since, work = replica.oldest()
            wait_s = estimates.left_s(pace_s * work, now - since)
    # Tasks that share a replica share its GPU.
    run_s = pace_s * (2.0 - replica.free / replica.capacity) if replica.free > 0 else pace_s
    return Stood(replica.id, node.addr, wait_s, run_s, replica.failures, refusal)


def decision(
    lineup: Lineup,
    *,
    time: datetime,
    subject: str,
    chosen: str,
    work: float,
    avoid: Collection[str],
    name_of: Callable[[str], str],
) -> Decision:
    """In words: costs are seconds until the task would end there. `name_of`: a node's, by address."""
    able: list[Candidate] = []
    others: list[Candidate] = []
    for stood in lineup:
        if stood.refusal and stood.id != chosen:
            others.append(Candidate(stood.id, name_of(stood.node_addr), stood.refusal))
            continue
        parts = {"wait": stood.wait_s, "run": stood.run_s * work}
        if stood.failures:
            parts["doubted"] = FAILURE_PENALTY_S * stood.failures
        if stood.id in avoid:
            parts["failed_before"] = AVOID_PENALTY_S
        parts = {name: round(seconds, 6) for name, seconds in parts.items() if isfinite(seconds)}
        able.append(Candidate(stood.id, name_of(stood.node_addr), parts=parts, cost=round(sum(parts.values()), 6)))
    able.sort(key=lambda one: (one.id != chosen, one.cost, one.id))
    return Decision(time, subject, chosen, (*able[:TOLD], *others[:TOLD]), counted(others))
