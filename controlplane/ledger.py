"""The ledger of attempts: what is known of one when it begins, why it is where it is, and its row once it has ended."""

from collections.abc import Callable
from datetime import datetime
from typing import Final, Protocol

from controlplane import explain, ids
from controlplane.census import Node
from controlplane.explain import Decision
from controlplane.failures import CANCELLED, HEDGED
from controlplane.lineup import FRESH_S, Lineup, decision, line_up
from controlplane.model import Attempt, Delivery
from controlplane.receipts import TermsOf
from controlplane.slots import AttemptResult, Failure, Replica, Slots
from controlplane.tasks import OpenAttempt, OpenTask, ledger_row

#: An attempt is slow that takes so many times what is usual in its workspace.
SLOW_TIMES: Final = 4
#: An attempt whose task waited for so long keeps how the replicas stood.
WAITED_S: Final = 1.0


class Recorder(Protocol):
    """Who keeps what is known of attempts that failed, or ran for longer than `slow_s` and than is usual."""

    slow_s: float

    def keep(self, row: Attempt, kind: str) -> None:
        """The attempt has ended. `kind`: `failed` or `slow`."""


class Fleet(Protocol):
    """What is asked of the picture of the fleet."""

    def node(self, key: str) -> Node:
        """By address."""


class Ledger:
    """One for the control plane."""

    def __init__(
        self,
        slots: Slots,
        fleet: Fleet,
        *,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        terms: TermsOf,
        recorder: Recorder,
    ) -> None:
        self._slots = slots
        self._fleet = fleet
        self._clock = clock
        self._monotonic = monotonic
        self._terms = terms
        self._recorder = recorder

    def begin(self, task: OpenTask, replica: Replica, reason: str, number: int) -> OpenAttempt:
        """One of that number, on that replica."""
        now = self._monotonic()
        return OpenAttempt(
            id=ids.attempt_id(task.id, number),
            number=number,
            replica_id=replica.id,
            node_addr=replica.node.addr,
            node_ip=replica.node.ip,
            gpu_ids=replica.gpu_ids,
            queue_time=task.queue_time or task.create_time,
            assign_time=self._clock(),
            reason=reason,
            given_at=now,
            lineup=self._lineup(task.workspace_uid, now),
            avoided=task.avoid,
            work=task.work,
        )

    def _lineup(self, workspace_uid: str, now: float) -> Lineup:
        pool = self._slots.pool(workspace_uid)
        if len(pool.replicas) <= 1:
            return ()
        if now - pool.lined_up_at >= FRESH_S:
            pool.lineup = line_up(pool.replicas.values(), pool.mean_s, now)
            pool.lined_up_at = now
        return pool.lineup

    def slow_s(self, workspace_uid: str) -> float:
        """One there that takes so long is slow."""
        return max(self._recorder.slow_s, SLOW_TIMES * self._slots.pool(workspace_uid).mean_s)

    def decision(self, task: OpenTask) -> Decision | None:
        """Why the task's attempt is where it is; None: it has none, or there was no choice."""
        attempt = task.attempt
        if attempt is None or not attempt.lineup:
            return None
        return decision(
            attempt.lineup,
            time=attempt.assign_time,
            subject=f"attempt {attempt.number}",
            chosen=attempt.replica_id,
            work=attempt.work,
            avoid=attempt.avoided,
            name_of=lambda addr: self._fleet.node(addr).name,
        )

    def end(self, task: OpenTask, delivery: Delivery, result: AttemptResult | None, failure: Failure | None) -> Attempt:
        """The row of the task's attempt, which has ended; and the recorder hears of it if it was slow or has failed."""
        attempt = task.current
        row = self.row(task, attempt, delivery, result, failure)
        # Where somebody may ask.
        waited = attempt.number > 1 or attempt.given_at - task.accepted_at >= WAITED_S
        slow = (self._monotonic() - attempt.given_at) * 1e6 >= attempt.slow_us
        if attempt.lineup and (waited or slow or failure is not None):
            decided = self.decision(task)
            row.decision_json = None if decided is None else explain.encode(decided)
        if failure is None:
            if slow:
                self._recorder.keep(row, "slow")
        elif failure.reason not in {CANCELLED, HEDGED}:
            self._recorder.keep(row, "failed")
        return row

    def row(
        self,
        task: OpenTask,
        attempt: OpenAttempt,
        delivery: Delivery,
        result: AttemptResult | None,
        failure: Failure | None,
    ) -> Attempt:
        """Of that attempt of the task, as it stands."""
        terms = self._terms(
            task.workspace_uid, attempt.replica_id, attempt.node_addr, attempt.gpu_ids, attempt.assign_time
        )
        passed_us = max(0, int((self._monotonic() - attempt.given_at) * 1e6))
        return ledger_row(
            task, attempt, delivery, self._clock(), passed_us=passed_us, terms=terms, result=result, failure=failure
        )
