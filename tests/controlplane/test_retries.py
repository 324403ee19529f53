"""What follows from a failed attempt, as a table."""

import pytest

from controlplane.model import Cause, Delivery
from controlplane.retries import (
    BUDGET_S,
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    LONGEST_HOLD_S,
    NO_HISTORY,
    PLATFORM_ATTEMPTS,
    RETRIES,
    Budget,
    History,
    after,
    backoff_s,
    judge,
)
from controlplane.slots import Failure

AGAIN = "again"
CUSTOMER, PLATFORM = Cause.CUSTOMER, Cause.PLATFORM
NOT_SENT, PARTLY, SENT, ANSWERED = Delivery


@pytest.mark.parametrize(
    ("history", "repeatable", "delivery", "cause", "reason", "verdict"),
    [
        # What never reached a container runs elsewhere, always.
        (History(0, 1), True, NOT_SENT, PLATFORM, "CONNECT_FAILED", AGAIN),
        (History(0, 1), False, NOT_SENT, PLATFORM, "CONNECT_FAILED", AGAIN),
        (History(0, 1), False, NOT_SENT, CUSTOMER, "CONNECT_FAILED", AGAIN),
        # What did, if it may be repeated.
        (History(0, 1), True, SENT, PLATFORM, "NODE_LOST", AGAIN),
        (History(0, 1), True, ANSWERED, PLATFORM, "CONNECTION_CLOSED", AGAIN),
        (History(1, 0), True, SENT, CUSTOMER, "CONTAINER_EXITED", AGAIN),
        # What may not be repeated ends with what is known.
        (History(0, 1), False, PARTLY, PLATFORM, "NODE_LOST", "OUTCOME_UNKNOWN"),
        (History(0, 1), False, SENT, PLATFORM, "REPLICA_LOST", "OUTCOME_UNKNOWN"),
        (History(0, 1), False, SENT, PLATFORM, "CONNECTION_CLOSED", "CONNECTION_CLOSED"),
        # Attempts that would end the same way.
        (History(1, 0), True, SENT, CUSTOMER, "RUN_TIME_LIMIT", "RUN_TIME_LIMIT"),
        (History(1, 0), True, ANSWERED, CUSTOMER, "RESPONSE_TOO_LARGE", "RESPONSE_TOO_LARGE"),
        (History(1, 0), True, ANSWERED, CUSTOMER, "BAD_RESPONSE", "BAD_RESPONSE"),
        (History(0, 1), True, ANSWERED, PLATFORM, "BAD_RESPONSE", AGAIN),
        # The customer's attempts, and the platform's bound.
        (History(3, 0), True, SENT, CUSTOMER, "CONNECTION_CLOSED", "ATTEMPTS_USED_UP"),
        (History(3, 1), True, SENT, PLATFORM, "NODE_LOST", AGAIN),
        (History(2, 9), True, SENT, CUSTOMER, "CONNECTION_CLOSED", AGAIN),
        (History(0, PLATFORM_ATTEMPTS), True, SENT, PLATFORM, "NODE_LOST", "ATTEMPTS_USED_UP"),
        (History(0, PLATFORM_ATTEMPTS), False, NOT_SENT, PLATFORM, "NODE_LOST", "ATTEMPTS_USED_UP"),
        # A refusal is none of them.
        (History(3, PLATFORM_ATTEMPTS - 1, refusals=99), True, ANSWERED, PLATFORM, "BUSY", AGAIN),
        (History(0, 0, refusals=1), False, ANSWERED, PLATFORM, "BUSY", AGAIN),
        (History(0, 0, frozenset({"n1", "n2"}), 1), True, ANSWERED, PLATFORM, "BUSY", AGAIN),
        (History(1, 0), True, ANSWERED, CUSTOMER, "JOB_FAILED", "JOB_FAILED"),
        # Poison.
        (History(2, 0, frozenset({"n1"})), True, SENT, CUSTOMER, "CONTAINER_EXITED", AGAIN),
        (History(2, 0, frozenset({"n1", "n2"})), True, SENT, CUSTOMER, "CONTAINER_EXITED", "CONTAINER_EXITED"),
    ],
)  # fmt: skip
def test_verdicts(
    history: History, repeatable: bool, delivery: Delivery, cause: Cause, reason: str, verdict: str
) -> None:
    ended = judge(
        history, repeatable=repeatable, max_attempts=3, delivery=delivery, failure=Failure(cause, reason, "Words.")
    )
    assert (AGAIN if ended is None else ended.reason) == verdict
    assert ended is None or "Words." in ended.message


def test_only_attempt_allowed_ends_with_its_own_failure() -> None:
    failure = Failure(CUSTOMER, "CONTAINER_EXITED", "It exited with 1.")
    assert judge(History(1, 0), repeatable=True, max_attempts=1, delivery=SENT, failure=failure) == failure


def test_history_counts_by_cause_and_remembers_where_containers_died() -> None:
    history = after(NO_HISTORY, delivery=SENT, cause=CUSTOMER, reason="CONTAINER_EXITED", node_addr="n1")
    history = after(history, delivery=SENT, cause=PLATFORM, reason="NODE_LOST", node_addr="n2")
    # It did not reach a container: whoever is to blame, it used none of the customer's attempts.
    history = after(history, delivery=NOT_SENT, cause=CUSTOMER, reason="CONNECT_FAILED", node_addr="n3")
    assert history == History(1, 2, frozenset({"n1"}))
    assert history.failures == 3
    history = after(history, delivery=ANSWERED, cause=PLATFORM, reason="BUSY", node_addr="n1")
    assert history == History(1, 2, frozenset({"n1"}), refusals=1)
    assert history.failures == 4


def test_backoff_doubles_up_to_a_limit_and_jitter_takes_up_to_half() -> None:
    assert [backoff_s(failures, 0.0) for failures in (1, 2, 3)] == [
        FIRST_BACKOFF_S,
        2 * FIRST_BACKOFF_S,
        4 * FIRST_BACKOFF_S,
    ]
    assert backoff_s(1000, 0.0) == LONGEST_BACKOFF_S
    assert backoff_s(1000, 1.0) == LONGEST_BACKOFF_S / 2


def held(budget: Budget, retries: int, *, now: float = 0.0, left_s: float = 1e9) -> list[float]:
    return [budget.hold_s(now, left_s) for _ in range(retries)]


@pytest.mark.parametrize(
    ("tasks", "free"), [(0, RETRIES), (5, RETRIES + 1), (100, RETRIES + 20), (1000, RETRIES + 200)]
)
def test_a_fifth_of_recent_tasks_and_a_few_more_may_run_again_at_once(tasks: int, free: int) -> None:
    budget = Budget()
    for _ in range(tasks):
        budget.begin(0.0)
    holds = held(budget, free + 2)
    assert holds[:free] == [0.0] * free
    assert 0.0 < holds[free] < holds[free + 1]


def test_what_is_over_the_budget_follows_as_fast_as_that_grows() -> None:
    holds = held(Budget(), 2 * RETRIES)
    assert holds[-1] == pytest.approx(BUDGET_S)
    gaps = {round(later - sooner, 6) for sooner, later in zip(holds[RETRIES:], holds[RETRIES + 1 :], strict=False)}
    assert gaps == {BUDGET_S / RETRIES}


def test_budget_bends_before_a_limit_of_the_task_would_end_it() -> None:
    assert max(held(Budget(), 1000)) == LONGEST_HOLD_S
    assert max(held(Budget(), 1000, left_s=8.0)) == 2.0
    assert max(held(Budget(), 1000, left_s=-1.0)) == 0.0


@pytest.mark.parametrize(
    ("after_s", "free"),
    # Of what was half a window ago, or a whole one; and much longer ago nothing counts.
    [(BUDGET_S * 1.5, RETRIES // 2), (BUDGET_S * 2, RETRIES), (BUDGET_S * 100, RETRIES)],
)
def test_budget_is_there_again_with_time(after_s: float, free: int) -> None:
    budget = Budget()
    held(budget, RETRIES)
    assert held(budget, RETRIES, now=after_s).count(0.0) == free
