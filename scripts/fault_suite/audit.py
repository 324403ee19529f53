"""The audit: three accounts of one run compared, and every difference named.

A task that was acknowledged is in the database, has ended, and ended once: what its caller was told at its end is what
the row says, now and when asked again. Every execution that a container wrote down belongs to an attempt of the ledger
on that replica which says that bytes were sent; so a second execution has a first attempt that failed, and says why. A
completed task has an execution that came to its end. Work that must not run twice has not begun twice.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.model import ENDED, Attempt, Delivery, State
from scripts.fault_suite.callers import Call
from scripts.fault_suite.records import Execution, Recorded, token_of

#: Faults listed in full; the rest is counted.
SHOWN = 20


@dataclass
class Findings:
    """The counts of one run, and what must not be."""

    submitted: int = 0
    acknowledged: int = 0
    #: Neither accepted nor recorded: the caller was told so, or knows that it does not know.
    refused: int = 0
    #: Not acknowledged, yet recorded: the answer got lost.
    unheard: int = 0
    ended: collections.Counter[str] = field(default_factory=collections.Counter)
    not_executed: int = 0
    once: int = 0
    #: Executed more than once, each by the ledger's reason for the attempt after which it was run again.
    again: collections.Counter[str] = field(default_factory=collections.Counter)
    #: Executions of work whose caller was told 503: begun before it was on disk, which it then could not be.
    unrecorded: int = 0
    #: Tasks left out of what follows: they ran while nobody could hear their containers, an engine being dead.
    unobserved: int = 0
    executions: int = 0
    #: Attempts in all ledgers.
    attempts: int = 0
    lost: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    #: Anything else that must not be.
    wrong: list[str] = field(default_factory=list)

    @property
    def twice(self) -> int:
        """Tasks executed more than once."""
        return self.again.total()

    def check(self) -> None:
        """Raise AssertionError with every fault."""
        faults = [f"LOST {one}" for one in self.lost]
        faults += [f"UNEXPLAINED {one}" for one in self.unexplained]
        faults += [f"WRONG {one}" for one in self.wrong]
        if faults:
            rest = f"\n... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise AssertionError("\n".join(["the audit failed:", *faults[:SHOWN]]) + rest + f"\n{self.table()}")

    def table(self) -> str:
        """For people."""
        ends = ", ".join(f"{number} {name}" for name, number in sorted(self.ended.items())) or "none"
        lines = [
            ("submitted", self.submitted),
            ("acknowledged", self.acknowledged),
            ("refused", self.refused),
            ("recorded, the answer lost", self.unheard),
            ("ended", ends),
            ("executions", self.executions),
            ("never begun", self.not_executed),
            ("done once", self.once),
            ("done twice, explained", self.twice),
            *((f"    after {reason}", number) for reason, number in sorted(self.again.items())),
            ("begun for a call that was then refused", self.unrecorded),
            ("run while no container could be heard", self.unobserved),
            ("executions unexplained", len(self.unexplained)),
            ("acknowledged and lost", len(self.lost)),
            ("terminal states other than one, other faults", len(self.wrong)),
        ]
        return "\n".join(f"{name:<46} {value}" for name, value in lines)


def audit(
    calls: Sequence[Call],
    database: Mapping[str, Recorded],
    executions: Iterable[Execution],
    *,
    once_uid: str = "",
    deaf: Sequence[tuple[float, float]] = (),
) -> Findings:
    """Compare. `once_uid`: the workspace whose tasks must not run twice. `deaf`: when containers could not be heard."""
    findings = Findings()
    by_token: dict[str, list[Recorded]] = {}
    for task in database.values():
        if token := token_of(task.task):
            by_token.setdefault(token, []).append(task)
    done: dict[str, list[Execution]] = {}
    for execution in executions:
        done.setdefault(execution.token, []).append(execution)
    refusals: dict[str, int] = {}
    for call in calls:
        refusals[call.token] = len(call.refusals)
        _compare_call(findings, call, by_token.get(call.token, []))
    for token, tasks in by_token.items():
        if len(tasks) > 1:
            findings.wrong.append(f"work {token} has {len(tasks)} tasks: {', '.join(one.task.id for one in tasks)}")
            continue
        once = tasks[0].task.workspace_uid == once_uid
        runs = done.pop(token, [])
        if not any(run.end for run in runs) and _was_unheard(tasks[0], deaf):
            findings.unobserved += 1
            continue
        _check_task(findings, tasks[0], runs, refusals=refusals.get(token, 0), once=once)
    for token, strangers in done.items():
        if len(strangers) <= refusals.get(token, 0):
            findings.unrecorded += len(strangers)
        elif not token.startswith("body-of-"):
            findings.unexplained.append(f"work {token} was executed {len(strangers)} times and is no task")
    return findings


def _compare_call(findings: Findings, call: Call, tasks: Sequence[Recorded]) -> None:
    findings.submitted += 1
    if not call.acknowledged:
        findings.unheard += bool(tasks)
        findings.refused += not tasks
        return
    findings.acknowledged += 1
    mine = next((one for one in tasks if one.task.id == call.task_id), None)
    if mine is None:
        findings.lost.append(f"task {call.task_id} ({call.kind}) was acknowledged and is not in the database")
        return
    task = mine.task
    if task.state not in ENDED:
        findings.lost.append(f"task {task.id} ({call.kind}) was acknowledged and never ends: {_story(mine)}")
        return
    if not call.end:
        findings.wrong.append(f"task {task.id} has ended; its caller was never told so ({call.words})")
        return
    if (call.code == 200) != (task.state is State.COMPLETED and task.response_status < 300):
        told = f"{call.code} {call.words}"
        findings.wrong.append(f"task {task.id}: its caller was told {told}; the database says {_story(mine)}")
    elif call.code == 200 and call.data != call.token:
        findings.wrong.append(f"task {task.id}: its caller got another's answer, {call.data!r:.80}")


def _check_task(findings: Findings, mine: Recorded, runs: list[Execution], *, refusals: int, once: bool) -> None:
    task, attempts = mine.task, mine.attempts
    # What began for an earlier call under the same key, which was refused, began before this task was accepted.
    early = [run for run in runs if run.begin < task.create_time.timestamp()]
    if len(early) <= refusals:
        findings.unrecorded += len(early)
        runs = [run for run in runs if run not in early]
    state = State(task.state)
    findings.ended[
        state.name.lower() if state is State.COMPLETED else f"{state.name.lower()} {task.failure_reason}"
    ] += 1
    findings.executions += len(runs)
    findings.attempts += len(attempts)
    if state in ENDED and [one.number for one in attempts] != list(range(1, task.attempt + 1)):
        findings.wrong.append(f"task {task.id}: its ledger has holes or more than there was: {_story(mine)}")
    answered = [one for one in attempts if one.http_status]
    if len(answered) != (state is State.COMPLETED) or (answered and answered[0] is not attempts[-1]):
        findings.wrong.append(f"task {task.id}: not one accepted answer, at its end: {_story(mine)}")
    if state is State.COMPLETED and not any(run.end for run in runs):
        findings.wrong.append(f"task {task.id} is completed, and no container came to the end of it: {_story(mine)}")
    # An attempt that goes on is not in the ledger yet; `_compare_call` tells of those that never end.
    sent = collections.Counter(one.replica_id for one in attempts if one.delivery != Delivery.NOT_SENT)
    if state not in ENDED:
        sent[task.replica_id] += 1
    began = collections.Counter(run.replica_id for run in runs)
    for replica_id, number in began.items():
        if number > sent[replica_id]:
            findings.unexplained.append(
                f"task {task.id}: {number} executions on replica {replica_id}, "
                f"{sent[replica_id]} attempts that sent anything there: {_story(mine)}"
            )
    if once and len(runs) > 1:
        findings.wrong.append(f"task {task.id} must not run twice and was begun {len(runs)} times: {_story(mine)}")
    if not runs:
        findings.not_executed += 1
    elif len(runs) == 1:
        findings.once += 1
    else:
        reasons = {_why(one) for one in attempts if one.failure_reason and one.delivery != Delivery.NOT_SENT}
        findings.again[", ".join(sorted(reasons)) or "(nothing)"] += 1
        if not reasons:
            findings.unexplained.append(f"task {task.id}: executed {len(runs)} times without a failure: {_story(mine)}")


def _was_unheard(mine: Recorded, deaf: Sequence[tuple[float, float]]) -> bool:
    lives = [(one.assign_time.timestamp(), one.end_time.timestamp()) for one in mine.attempts]
    return any(begin < until and since < end for begin, end in lives for since, until in deaf)


def _why(attempt: Attempt) -> str:
    return f"{attempt.failure_reason} ({attempt.failure_message.split('.')[0]})"


def _story(mine: Recorded) -> str:
    """A task's life in a line."""
    task = mine.task
    steps = [
        f"#{one.number} on {one.replica_id} {Delivery(one.delivery).name} {one.failure_reason or one.http_status}"
        for one in mine.attempts
    ]
    state = f"{State(task.state).name} at attempt {task.attempt} {task.failure_reason}".strip()
    return f"[{state}; {'; '.join(steps) or 'no attempt ended'}]"
