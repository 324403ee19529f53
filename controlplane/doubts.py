"""Keeps the record of every replica (see ejection) by how its attempts end, and lets go of doubts in time.

What follows for routing is written on the replica: `record`, `penalty`, `most`.
"""

from collections.abc import Callable, Iterable
from math import inf
from statistics import median
from typing import Final

import structlog

from controlplane import ejection
from controlplane.ejection import CLEAN, Peers, Record, Trust
from controlplane.failures import BUSY, CANCELLED, JOB_FAILED, RESPONSE_TOO_LARGE, RUN_TIME_LIMIT
from controlplane.model import Cause
from controlplane.slots import Failure, Replica, Slots

#: Ends of attempts that say nothing of the replica.
NO_SIGN: Final = frozenset({BUSY, CANCELLED, JOB_FAILED, RESPONSE_TOO_LARGE})
#: Who has answered within this time shows how peers fare.
LATELY_S: Final = 120.0
#: How often it is looked whether somebody ejected is needed after all.
LOOK_S: Final = 1.0

log = structlog.get_logger(__name__)


class Doubts:
    """One for all replicas. `wake`: called when it is to be looked sooner than `next` said."""

    def __init__(self, slots: Slots, *, wake: Callable[[], None]) -> None:
        self._slots = slots
        self._wake = wake
        #: Replicas whose trust is not full, by id.
        self._doubted: dict[str, Replica] = {}

    def answered(self, replica: Replica, seconds: float, status: int, now: float) -> None:
        """An attempt was answered after so long. The hot path ends at the first `return`."""
        replica.answered_at = now
        good = status < 500
        past_s, answers = replica.past_s, replica.answers
        if good and replica.record is CLEAN and seconds <= ejection.SLOW_TIMES * past_s and answers >= ejection.SEEN:
            replica.past_s = past_s + (seconds - past_s) * ejection.PAST_WEIGHT
            return
        # Who does well need not be compared.
        peers = Peers() if good and seconds <= ejection.SLOW_TIMES * past_s else self._peers(replica, now)
        slow = ejection.is_slow(seconds, past_s, answers, peers)
        if good and not slow:
            # What was slow does not count: it would become usual within a few tasks.
            replica.answers = min(answers, ejection.SEEN) + 1
            replica.past_s += (seconds - past_s) * (
                1.0 / replica.answers if answers < ejection.SEEN else ejection.PAST_WEIGHT
            )
            if replica.record is CLEAN:
                return
        self._put(replica, ejection.answered(replica.record, good=good, slow=slow, peers=peers, now=now), now)

    def failed(self, replica: Replica, failure: Failure, given_at: float, now: float) -> None:
        """An attempt, given to the node at that time, has ended without an answer, by word of its node."""
        if failure.reason in NO_SIGN:
            return
        peers = self._peers(replica, now)
        timed_out = failure.reason == RUN_TIME_LIMIT
        record = ejection.failed(
            replica.record,
            failure.message,
            platform=failure.cause is Cause.PLATFORM,
            timed_out=timed_out and ejection.is_slow(now - given_at, replica.past_s, replica.answers, peers),
            given_at=given_at,
            peers=peers,
            now=now,
        )
        self._put(replica, record, now)

    def look(self, now: float) -> set[str]:
        """Change what time changes. Gives the workspaces that may have got a free slot by that."""
        changed: set[str] = set()
        for replica in list(self._doubted.values()):
            if self._slots.replica(replica.id) is not replica:
                del self._doubted[replica.id]
                continue
            record = ejection.passed(replica.record, now)
            if record.trust is Trust.EJECTED and not self._peers(replica, now).serving:
                # Nobody else is there any more.
                record = ejection.passed(record, inf)
            if record is not replica.record:
                self._put(replica, record, now)
                changed.add(replica.workspace_uid)
        return changed

    def next(self, now: float) -> float:
        """When to look again; inf: not before somebody is doubted."""
        when = min([replica.record.until for replica in self._doubted.values()], default=inf)
        needed = any(replica.record.trust is Trust.EJECTED for replica in self._doubted.values())
        return min(when, now + LOOK_S) if needed else when

    def words(self, workspace_uid: str, now: float) -> dict[str, str]:
        """By id, of the workspace's replicas, those that take less than they could or are taken last: why, in words."""
        pool = self._slots.pool(workspace_uid).replicas.values()
        return {replica.id: said for replica in pool if (said := ejection.words(replica.record, now))}

    def ejected(self, workspace_uid: str) -> tuple[int, int]:
        """How many of its replicas are ejected now; and how often one was, as long as there were any."""
        pool = self._slots.pool(workspace_uid)
        now = sum(replica.record.trust is Trust.EJECTED for replica in pool.replicas.values())
        return now, pool.ejections

    def _peers(self, replica: Replica, now: float) -> Peers:
        others = [
            other
            for other in self._slots.pool(replica.workspace_uid).replicas.values()
            if other is not replica and other.capacity and other.node.link is not None
        ]
        serving = [other for other in others if other.record.trust is not Trust.EJECTED]
        lately = [other for other in serving if now - other.answered_at < LATELY_S]
        return Peers(
            serving=len(serving),
            ejected=len(others) - len(serving),
            share=median([other.record.share for other in lately]) if lately else None,
            pace_s=_median([other.pace_s for other in lately if other.pace_s]),
        )

    def _put(self, replica: Replica, record: Record, now: float) -> None:
        before = replica.record
        replica.record = record
        replica.failures = record.penalty
        replica.most = record.most
        if record.trust is Trust.FULL:
            self._doubted.pop(replica.id, None)
        else:
            self._doubted[replica.id] = replica
            self._wake()
        if record.trust is before.trust:
            return
        if record.trust is Trust.EJECTED:
            self._slots.pool(replica.workspace_uid).ejections += 1
        if record.trust >= Trust.PAUSED or before.trust >= Trust.TRIAL:
            trust = record.trust.name.lower()
            words = ejection.words(record, now)
            log.info("replica_trust", replica=replica.id, node=replica.node.addr, trust=trust, why=words)


def _median(values: Iterable[float]) -> float:
    values = list(values)
    return median(values) if values else 0.0
