"""Usage and prices, as SQL. Usage is counted from the receipts whenever it is asked for: no counter that could drift.

A receipt is a row of the ledger; it counts for the hour in which it was recorded. Sums are exact: integers, and money
in two parts, so that no sum leaves 64 bits.
"""

import enum
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from controlplane.model import EPOCH, MICROSECOND, Attempt, AttemptTable, Cause, Price, PriceTable, WorkspaceTable
from controlplane.prices import NANOS
from controlplane.store_database import table_of

#: Rows in a page; the wire's own limit (usage.proto).
PAGE_ROWS: Final = 1000


class By(enum.IntEnum):
    """What usage is grouped by. The numbers are the wire's (usage.proto), and the order of rows is theirs."""

    DAY = 1
    HOUR = 2
    WORKSPACE = 3
    ACCOUNT = 4
    NODE = 5
    GPU_MODEL = 6


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which receipts, by when they were recorded, and how to group them."""

    #: Inclusive.
    start: datetime
    #: Exclusive.
    end: datetime
    #: None: all.
    workspace_uid: str | None = None
    account: str | None = None
    node_addr: str | None = None
    by: frozenset[By] = frozenset()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What receipts add up to. The first five are set as far as usage is grouped by them."""

    #: Of the hour or day, UTC.
    start: datetime | None = None
    workspace_uid: str = ""
    account: str = ""
    node_addr: str = ""
    gpu_model: str = ""
    attempts: int = 0
    #: Of these, those that the platform made fail: they cost nothing.
    free_attempts: int = 0
    #: Microseconds times GPUs, and what of it is charged for.
    gpu_us: int = 0
    billed_gpu_us: int = 0
    cost_nanos: int = 0


_attempt: Final = table_of(AttemptTable)
_price: Final = table_of(PriceTable)
_workspace: Final = table_of(WorkspaceTable)
_c: Final = _attempt.c

_PERIODS: Final = {By.DAY: timedelta(days=1), By.HOUR: timedelta(hours=1)}
_MICROSECONDS: Final = sa.type_coerce(_c.end_time, sa.BigInteger)


def _number(value: int) -> sa.ColumnElement[int]:
    # As text: PostgreSQL must see that what is selected is what is grouped by.
    return sa.literal_column(str(value), sa.BigInteger)


def _period(length: timedelta) -> sa.ColumnElement[int]:
    return _MICROSECONDS // _number(length // MICROSECOND)


_KEYS: Final[dict[By, sa.ColumnElement[Any]]] = {
    **{by: _period(length) for by, length in _PERIODS.items()},
    By.WORKSPACE: _c.workspace_uid,
    By.ACCOUNT: _c.account,
    By.NODE: _c.node_addr,
    By.GPU_MODEL: _c.gpu_model,
}
_FIELDS: Final = {
    By.WORKSPACE: "workspace_uid",
    By.ACCOUNT: "account",
    By.NODE: "node_addr",
    By.GPU_MODEL: "gpu_model",
}

_IS_FREE: Final = _c.cause == _number(Cause.PLATFORM.value)
_HELD: Final = _c.gpu_us * _c.gpu_count
_SUMS: Final = (
    sa.func.count().label("attempts"),
    sa.func.coalesce(sa.func.sum(sa.case((_IS_FREE, _number(1)), else_=_number(0))), 0).label("free_attempts"),
    sa.func.coalesce(sa.func.sum(_HELD), 0).label("gpu_us"),
    sa.func.coalesce(sa.func.sum(sa.case((_IS_FREE, _number(0)), else_=_HELD)), 0).label("billed_gpu_us"),
    sa.func.coalesce(sa.func.sum(_c.cost_nanos // _number(NANOS)), 0).label("units"),
    sa.func.coalesce(sa.func.sum(_c.cost_nanos % _number(NANOS)), 0).label("nanos"),
)


def usage(connection: sa.Connection, query: UsageQuery, after: Usage | None, limit: int = PAGE_ROWS) -> list[Usage]:
    """The next page of sums, in order of their keys."""
    by = sorted(query.by)
    keys = [_KEYS[one] for one in by]
    where = _where(query)
    if after is not None:
        last = [_key(after, one) for one in by]
        where.append(sa.tuple_(*keys) > sa.tuple_(*map(sa.literal, last)))
        if after.start is not None:
            # Says the same again, and is answered from the index.
            where.append(_c.end_time >= after.start)
    statement = sa.select(*(key.label(one.name) for key, one in zip(keys, by, strict=True)), *_SUMS).where(*where)
    statement = statement.group_by(*keys).order_by(*keys).limit(limit)
    return [_usage(row, by) for row in connection.execute(statement).mappings()]


def _where(query: UsageQuery) -> list[sa.ColumnElement[bool]]:
    where = [_c.end_time >= query.start, _c.end_time < query.end]
    if query.workspace_uid is not None:
        where.append(_c.workspace_uid == query.workspace_uid)
    else:
        # All of them by name: so the index of times within workspaces will do, and there need be no other.
        where.append(_c.workspace_uid.in_(sa.select(_workspace.c.uid)))
    if query.account is not None:
        where.append(_c.account == query.account)
    if query.node_addr is not None:
        where.append(_c.node_addr == query.node_addr)
    return where


def _key(usage: Usage, by: By) -> int | str:
    if by in _PERIODS:
        assert usage.start is not None
        return (usage.start - EPOCH) // _PERIODS[by]
    return str(getattr(usage, _FIELDS[by]))


def _usage(row: sa.RowMapping, by: Sequence[By]) -> Usage:
    start = None
    for one in by:
        if one in _PERIODS:
            start = EPOCH + row[one.name] * _PERIODS[one]
    names = {_FIELDS[one]: row[one.name] for one in by if one in _FIELDS}
    return Usage(
        start=start,
        **names,
        attempts=row["attempts"],
        # PostgreSQL's sums of integers are decimals.
        free_attempts=int(row["free_attempts"]),
        gpu_us=int(row["gpu_us"]),
        billed_gpu_us=int(row["billed_gpu_us"]),
        cost_nanos=int(row["units"]) * NANOS + int(row["nanos"]),
    )


def receipts(
    connection: sa.Connection, query: UsageQuery, after: Attempt | None, limit: int = PAGE_ROWS
) -> list[Attempt]:
    """The next page of receipts, by workspace and then by time."""
    order = (_c.workspace_uid, _c.end_time, _c.task_id, _c.number)
    where = _where(query)
    if after is not None:
        last = [sa.literal(getattr(after, column.name), column.type) for column in order]
        where.append(sa.tuple_(*order) > sa.tuple_(*last))
    statement = sa.select(_attempt).where(*where).order_by(*order).limit(limit)
    return [Attempt(**row) for row in connection.execute(statement).mappings()]


def put_price(connection: sa.Connection, row: Price) -> None:
    """Add it, or replace that of the same model and time."""
    same = (_price.c.gpu_model == row.gpu_model) & (_price.c.effective_time == row.effective_time)
    connection.execute(sa.delete(_price).where(same))
    connection.execute(sa.insert(_price), row.__dict__)


def prices(connection: sa.Connection) -> list[Price]:
    """All, by model and time."""
    statement = sa.select(_price).order_by(_price.c.gpu_model, _price.c.effective_time)
    return [Price(**row) for row in connection.execute(statement).mappings()]
