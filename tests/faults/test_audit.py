"""The audit finds what must not be: it is only worth what it would have found."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from controlplane.model import Attempt, Delivery, State, Task
from scripts.fault_suite.audit import Findings, audit
from scripts.fault_suite.callers import Call
from scripts.fault_suite.records import Execution, Recorded

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
S = NOW.timestamp()


def a_call(**values: object) -> Call:
    done = Call("w", "async", S, acknowledged=S, task_id="t", end=S + 1, code=200, data="w")
    return replace(done, **values)  # type: ignore[arg-type]


def an_attempt(
    number: int = 1, replica: str = "r1", reason: str = "", delivery: Delivery = Delivery.ANSWERED
) -> Attempt:
    return Attempt(
        task_id="t",
        number=number,
        replica_id=replica,
        node_addr="n",
        delivery=delivery,
        assign_time=NOW,
        end_time=NOW,
        http_status=0 if reason else 200,
        failure_reason=reason,
        failure_message=f"{reason}.",
    )


def a_task(*attempts: Attempt, state: State = State.COMPLETED) -> dict[str, Recorded]:
    task = Task(
        id="t",
        workspace_uid="w-1",
        state=state,
        create_time=NOW,
        port=80,
        method="POST",
        path="/work",
        request_body=json.dumps({"token": "w"}).encode(),
        attempt=len(attempts),
        response_status=200 if state is State.COMPLETED else 0,
    )
    return {"t": Recorded(task, list(attempts))}


def ran(number: int = 1, replica: str = "r1", *, ended: bool = True) -> Execution:
    return Execution(f"x{number}", "w", replica, S + number, S + number + 0.5 if ended else 0.0)


def of(call: Call, tasks: dict[str, Recorded], *runs: Execution, once: bool = False) -> Findings:
    return audit([call], tasks, runs, once_uid="w-1" if once else "")


LOST = an_attempt(1, "r1", "NODE_LOST", Delivery.SENT)
NEVER_SENT = an_attempt(1, "r1", "NODE_LOST", Delivery.NOT_SENT)


def test_work_done_once_is_well() -> None:
    findings = of(a_call(), a_task(an_attempt()), ran())
    findings.check()
    assert (findings.acknowledged, findings.once, findings.twice) == (1, 1, 0)


def test_work_done_twice_is_well_if_the_ledger_says_why() -> None:
    findings = of(a_call(), a_task(LOST, an_attempt(2, "r2")), ran(1), ran(2, "r2"))
    findings.check()
    assert findings.again == {"NODE_LOST (NODE_LOST)": 1}


def test_an_execution_that_was_refused_is_counted_and_not_held_against_anyone() -> None:
    refused = a_call(acknowledged=0.0, task_id="", code=0, refusals=["503"])
    findings = of(refused, {}, ran())
    findings.check()
    assert (findings.refused, findings.unrecorded) == (1, 1)


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        (of(a_call(), {}), "LOST task t"),
        (of(a_call(), a_task(state=State.QUEUED)), "never ends"),
        (of(a_call(end=0.0, code=0), a_task(an_attempt()), ran()), "never told"),
        (of(a_call(code=500, data=""), a_task(an_attempt()), ran()), "was told 500"),
        (of(a_call(data="another's"), a_task(an_attempt()), ran()), "another's answer"),
        (of(a_call(), a_task(an_attempt()), ran(1), ran(2)), "2 executions on replica r1, 1 attempts"),
        (of(a_call(), a_task(an_attempt(1, "r2")), ran(1, "r1"), ran(2, "r2")), "executions on replica r1"),
        (of(a_call(), a_task(an_attempt()), ran(ended=False)), "no container came to the end"),
        (of(a_call(), a_task(an_attempt(), an_attempt(2)), ran(1), ran(2)), "not one accepted answer"),
        (of(a_call(), a_task(an_attempt(2)), ran()), "its ledger has holes"),
        (of(a_call(), a_task(LOST, an_attempt(2, "r2")), ran(1), ran(2, "r2"), once=True), "must not run twice"),
        (audit([], {}, [ran()]), "is no task"),
        (of(a_call(), a_task(NEVER_SENT, an_attempt(2, "r2")), ran(1), ran(2, "r2")), "0 attempts that sent anything"),
    ],
)
def test_what_must_not_be_is_found(findings: Findings, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        findings.check()
