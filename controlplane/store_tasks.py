"""Tasks and the ledger of their attempts, as SQL: statements built once, and what is done with them in a transaction.

Fencing is in the WHERE clauses: a move from RUNNING only touches the task if that very attempt is the one running.
Every write may be given twice: the second finds its own traces and changes nothing.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from controlplane.errors import Conflict, InvalidArgument, StaleAttempt
from controlplane.model import (
    EPOCH,
    MICROSECOND,
    NEXT,
    OPEN,
    PASSED_ON,
    WITH_BODIES,
    Attempt,
    AttemptTable,
    JobTable,
    State,
    Task,
    TaskTable,
)
from controlplane.store_database import table_of
from controlplane.store_statement import Row, Statement, add_or_not

#: Tasks in a page of a list; the wire's own limit (task.proto, ListTasks).
PAGE_TASKS: Final = 1000
#: Tasks in a page of open ones, which come with their bodies.
OPEN_PAGE_TASKS: Final = 200


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended. `state` is a terminal one; the fields are those of model.Task, where nothing else is said."""

    state: State
    end_time: datetime
    response_status: int = 0
    response_headers_json: bytes = b"[]"
    response_body: bytes | None = None
    response_size: int = 0
    #: Of a connection that changed its protocol: bytes that went to the container, which count as the request's.
    passed_size: int = 0
    response_is_utf8: bool = False
    gpu_us: int = 0
    cause: int = 0
    failure_reason: str = ""
    failure_message: str = ""


class PassedOn(msgspec.Struct, frozen=True):
    """A streamed task that has ended, with the sizes of its bodies."""

    task_id: str
    #: The last attempt's number.
    attempt: int
    end_time: datetime
    request_size: int
    response_size: int


class TaskQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks of a workspace to list."""

    workspace_uid: str
    #: Inclusive; None: from the first.
    start: datetime | None = None
    #: Exclusive; None: to the last.
    end: datetime | None = None
    #: Only those whose last attempt was on this node.
    node_addr: str = ""
    #: Only those in one of these; empty: all.
    states: frozenset[State] = frozenset()
    #: At most this many; 0: all.
    limit: int = 0
    #: Go on after the page with this cursor.
    cursor: str = ""
    #: Fill `Page.tasks`.
    full: bool = False


class Page(msgspec.Struct, frozen=True):
    """At most PAGE_TASKS tasks."""

    task_ids: list[str]
    #: Only with TaskQuery.full: the same tasks, without headers and bodies.
    tasks: list[Task]
    #: To go on after this page; empty: that was the last.
    cursor: str


_task: Final = table_of(TaskTable)
_attempt: Final = table_of(AttemptTable)
_c: Final = _task.c

_ADD: Final = Statement(
    add_or_not(_task).__getitem__,
    columns=[name for name in _c.keys() if name != "number"],  # noqa: SIM118 a ColumnCollection iterates over columns
)
_ADD_ATTEMPT: Final = Statement(lambda _: sa.insert(_attempt), columns=_attempt.c.keys())

#: Which task, in which state, at which attempt. Bound names begin with "of_": a column's own name is its new value's.
_OF: Final = (_c.id == sa.bindparam("of_task")) & (_c.state == sa.bindparam("of_state"))
_OF_ATTEMPT: Final = _OF & (_c.attempt == sa.bindparam("of_attempt"))


def _set(where: sa.ColumnElement[bool], *columns: str, **values: Any) -> Statement:
    update = sa.update(_task).where(where).values({name: sa.bindparam(name) for name in columns} | values)
    return Statement(lambda _: update)


_ASSIGN: Final = _set(
    _OF_ATTEMPT,
    *("state", "attempt", "replica_id", "node_addr", "assign_time", "assign_reason"),
    start_time=sa.func.coalesce(_c.start_time, sa.bindparam("assign_time", type_=_c.assign_time.type)),
)
_ENDED_COLUMNS: Final = tuple(name for name in End.__struct_fields__ if name != "passed_size")
_FINISH: Final = _set(_OF_ATTEMPT, *_ENDED_COLUMNS, request_size=_c.request_size + sa.bindparam("passed_size"))
_REQUEUE: Final = _set(_OF_ATTEMPT, "state")
_END_QUEUED: Final = _set(_OF, *_ENDED_COLUMNS)
_EXPIRE: Final = _set(
    (_c.id == sa.bindparam("of_task")) & sa.text(WITH_BODIES),
    "expire_time",
    request_body=sa.null(),
    response_body=sa.null(),
)

_job: Final = table_of(JobTable)
_FORGET_JOBS: Final = sa.delete(_job).where(_job.c.task_id == sa.bindparam("of_task"))

_BY_ID: Final = sa.select(_task).where(_c.id == sa.bindparam("of_task"))
_BY_KEY: Final = sa.select(_task).where(
    _c.workspace_uid == sa.bindparam("of_workspace"), _c.idempotency_key == sa.bindparam("of_key")
)
_ATTEMPTS: Final = sa.select(_attempt).where(_attempt.c.task_id == sa.bindparam("of_task")).order_by(_attempt.c.number)
_OPEN_PAGE: Final = (
    sa.select(_task).where(sa.text(OPEN), _c.number > sa.bindparam("after")).order_by(_c.number).limit(OPEN_PAGE_TASKS)
)
_EXPIRABLE: Final = (
    sa.select(_c.id, _c.attempt)
    .where(sa.text(WITH_BODIES), _c.end_time < sa.bindparam("before"))
    .order_by(_c.end_time)
    .limit(sa.bindparam("count"))
)
_PASSED_ON: Final = (
    sa.select(_c.id, _c.attempt, _c.end_time, _c.request_size, _c.response_size)
    .where(sa.text(PASSED_ON), _c.end_time > sa.bindparam("since"), _c.end_time < sa.bindparam("before"))
    .order_by(_c.end_time)
    .limit(sa.bindparam("count"))
)
_KEYS: Final = (_c.id, _c.create_time, _c.number)
_HEAVY: Final = {"request_headers_json", "request_body", "response_headers_json", "response_body"}
_LIGHT: Final = tuple(column for column in _c if column.name not in _HEAVY)


def check_move(before: State, after: State) -> None:
    """Raise ValueError for a move that the table of states does not know: a bug of the caller."""
    if after not in NEXT[before]:
        raise ValueError(f"a task does not go from {before.name} to {after.name}")


# Kinds of writes (store_writer.Kind). Their items are parameters of statements.


def add(connection: sa.Connection, items: Sequence[Row]) -> Sequence[Task | None]:
    """Insert tasks. For one whose workspace has its key already: that task."""
    added = _ADD.run(connection, items)
    if added == len(items):
        return [None] * added
    (new,) = items  # one of several was there: the writer gives them one by one
    existing = _task_of(connection, _BY_ID, of_task=new["id"])
    if existing is not None:
        return [None]  # given again
    existing = _task_of(connection, _BY_KEY, of_workspace=new["workspace_uid"], of_key=new["idempotency_key"])
    if existing is None:
        raise Conflict("The task is there already under another id.")
    if existing.request_hash != new["request_hash"]:
        raise Conflict("This idempotency key was used with another request: use a new key for a new request.")
    return [existing]


def assign(connection: sa.Connection, items: Sequence[Row]) -> Sequence[None]:
    """QUEUED -> RUNNING."""
    if _ASSIGN.run(connection, items) < len(items):
        (new,) = items
        task = _task_of(connection, _BY_ID, of_task=new["of_task"])
        if task is None or any(getattr(task, name) != new[name] for name in ("attempt", "replica_id", "assign_time")):
            raise StaleAttempt
    return [None] * len(items)


def finish(connection: sa.Connection, items: Sequence[tuple[Row, Row]]) -> Sequence[None]:
    """RUNNING -> ended. Items: the task's move, the ledger's row."""
    return _leave(connection, _FINISH, items)


def add_ended(connection: sa.Connection, items: Sequence[tuple[Row, Row]]) -> Sequence[None]:
    """Insert tasks that have ended already. Items: the task, the ledger's row."""
    if _ADD.run(connection, [row for row, _ in items]) == len(items):
        _ADD_ATTEMPT.run(connection, [row for _, row in items])
    else:
        (new,) = [row for _, row in items]
        if not any(attempt.__dict__ == new for attempt in attempts(connection, new["task_id"])):
            raise Conflict("The task is there already under another id.")
    return [None] * len(items)


def requeue(connection: sa.Connection, items: Sequence[tuple[Row, Row]]) -> Sequence[None]:
    """RUNNING -> QUEUED. Items: the task's move, the ledger's row."""
    return _leave(connection, _REQUEUE, items)


def _leave(connection: sa.Connection, move: Statement, items: Sequence[tuple[Row, Row]]) -> Sequence[None]:
    ledger = [row for _, row in items]
    if move.run(connection, [row for row, _ in items]) == len(items):
        _ADD_ATTEMPT.run(connection, ledger)
    else:
        (new,) = ledger
        if not any(attempt.__dict__ == new for attempt in attempts(connection, new["task_id"])):
            raise StaleAttempt
    return [None] * len(items)


def end_queued(connection: sa.Connection, items: Sequence[Row]) -> Sequence[None]:
    """QUEUED -> FAILED or CANCELLED."""
    if _END_QUEUED.run(connection, items) < len(items):
        (new,) = items
        task = _task_of(connection, _BY_ID, of_task=new["of_task"])
        if task is None or any(getattr(task, name) != new[name] for name in _ENDED_COLUMNS):
            raise StaleAttempt("The task is not queued any more.")
    return [None] * len(items)


def expire(connection: sa.Connection, task_ids: Sequence[str], now: datetime) -> None:
    """Delete the inline bodies of ended tasks, and by which ids their containers knew them."""
    if task_ids:
        connection.execute(_FORGET_JOBS, [{"of_task": task_id} for task_id in task_ids])
        _EXPIRE.run(connection, [{"of_task": task_id, "expire_time": now} for task_id in task_ids])


# Reads.


def task(connection: sa.Connection, task_id: str) -> Task | None:
    """The task with that id."""
    return _task_of(connection, _BY_ID, of_task=task_id)


def _task_of(connection: sa.Connection, statement: sa.Select[Any], **which: str) -> Task | None:
    row = connection.execute(statement, which).mappings().first()
    return None if row is None else Task(**row)


def attempts(connection: sa.Connection, task_id: str) -> list[Attempt]:
    """The ended attempts of a task, oldest first."""
    return [Attempt(**row) for row in connection.execute(_ATTEMPTS, {"of_task": task_id}).mappings()]


def open_page(connection: sa.Connection, after: int) -> list[Task]:
    """The next tasks that have not ended, by number."""
    return [Task(**row) for row in connection.execute(_OPEN_PAGE, {"after": after}).mappings()]


def last_number(connection: sa.Connection) -> int:
    """The number of the task accepted last; 0: none was."""
    return connection.scalar(sa.select(sa.func.max(_c.number))) or 0


def expirable(connection: sa.Connection, before: datetime, limit: int) -> list[tuple[str, int]]:
    """Ended tasks that still have their bodies, oldest first: id, last attempt's number."""
    rows = connection.execute(_EXPIRABLE, {"before": before, "count": limit})
    return [(task_id, number) for task_id, number in rows]


def passed_on(connection: sa.Connection, since: datetime, before: datetime, limit: int) -> list[PassedOn]:
    """Streamed tasks that ended between these and have, or had, a body in the body store, oldest first."""
    rows = connection.execute(_PASSED_ON, {"since": since, "before": before, "count": limit})
    return [PassedOn(*row) for row in rows]


def page(connection: sa.Connection, query: TaskQuery, last: int) -> Page:
    """The tasks after the query's cursor, up to the one numbered `last`. Raises InvalidArgument for a bad cursor."""
    count = min(query.limit or PAGE_TASKS, PAGE_TASKS)
    after = _position(query.cursor) if query.cursor else (query.start or datetime.min.replace(tzinfo=UTC), -1)
    # One comparison of pairs: this is what both databases answer from the index without reading what went before.
    where = [
        _c.workspace_uid == query.workspace_uid,
        sa.tuple_(_c.create_time, _c.number)
        > sa.tuple_(*(sa.literal(v, c.type) for v, c in zip(after, _KEYS[1:], strict=True))),
        _c.number <= last,
    ]
    if query.end is not None:
        where.append(_c.create_time < query.end)
    if query.node_addr:
        where.append(_c.node_addr == query.node_addr)
    if query.states:
        where.append(_c.state.in_(sorted(query.states)))
    columns = _LIGHT if query.full else _KEYS
    # One more than wanted tells whether another page follows.
    statement = sa.select(*columns).where(*where).order_by(_c.create_time, _c.number).limit(count + 1)
    rows = connection.execute(statement).mappings().all()
    cursor = ""
    if len(rows) > count:
        rows = rows[:count]
        cursor = f"{(rows[-1]['create_time'] - EPOCH) // MICROSECOND}.{rows[-1]['number']}"
    return Page([row["id"] for row in rows], [Task(**row) for row in rows] if query.full else [], cursor)


def _position(cursor: str) -> tuple[datetime, int]:
    try:
        microseconds, number = map(int, cursor.split("."))
        time = EPOCH + microseconds * MICROSECOND
    except (ValueError, OverflowError):
        number = -1
    if not 0 <= number < 2**63:  # what has room in the column
        raise InvalidArgument("The cursor is none that this list gave: begin without one.")
    return time, number
