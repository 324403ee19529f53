"""Usage is the sum of receipts, exactly, however it is grouped, filtered and paged, on both databases."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane import store_usage
from controlplane.migrations import migrate
from controlplane.model import EPOCH, Attempt, AttemptTable, Cause, Delivery, Price, WorkspaceTable
from controlplane.store_database import connect_to, table_of
from controlplane.store_usage import By, Usage, UsageQuery
from tests.controlplane.databases import KINDS, fresh_database

BEGIN = datetime(2025, 3, 1, 22, 30, tzinfo=UTC)
END = BEGIN + timedelta(days=3)
WORKSPACES = ("w-1", "w-2", "w-3")
LENGTHS = {By.DAY: timedelta(days=1), By.HOUR: timedelta(hours=1)}


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    with fresh_database(request.param, Path(tmp_path_factory.mktemp("usage"))) as url:
        migrate(url)
        engine = connect_to(url)
        with engine.begin() as connection:
            for uid in WORKSPACES:
                columns = {"uid": uid, "id": uid, "name": uid, "spec_json": b"{}", "generation": 1}
                new = {"create_time": BEGIN, "deployment_json": b"{}"}
                connection.execute(sa.insert(table_of(WorkspaceTable)), columns | new)
        yield engine
        engine.dispose()


def receipt(number: int, after_us: int, **columns: Any) -> Attempt:
    end = BEGIN + timedelta(microseconds=after_us)
    return Attempt(
        task_id=f"t{number}", number=1, replica_id="r", delivery=Delivery.SENT, assign_time=end, end_time=end, **columns
    )


#: A ledger with many of the same keys, ends on the very edges of hours, and the largest amounts there can be.
RECEIPTS: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    after_us=st.integers(0, 3 * 86_400_000_000)
    | st.builds(lambda hours: hours * 3_600_000_000 - 1_800_000_000, st.integers(1, 71)),
    workspace_uid=st.sampled_from(WORKSPACES),
    account=st.sampled_from(("", "acme", "Ärger", "acme ")),
    node_addr=st.sampled_from(("0xA", "0xB")),
    gpu_model=st.sampled_from(("", "RTX 4090", "A100 + RTX 4090")),
    gpu_count=st.integers(0, 8),
    gpu_us=st.integers(0, 86_400_000_000),
    cause=st.sampled_from((0, Cause.CUSTOMER, Cause.PLATFORM)),
    cost_nanos=st.integers(0, 2**63 - 1) | st.integers(0, 10**6),
)
QUERIES = st.builds(
    UsageQuery,
    start=st.integers(-10, 71).map(lambda hours: BEGIN + timedelta(hours=hours)),
    end=st.integers(0, 80).map(lambda hours: BEGIN + timedelta(hours=hours)),
    workspace_uid=st.none() | st.sampled_from((*WORKSPACES, "w-none")),
    account=st.none() | st.sampled_from(("", "acme")),
    node_addr=st.none() | st.just("0xA"),
    by=st.frozensets(st.sampled_from(By)).filter(lambda by: not {By.DAY, By.HOUR} <= by),
)


def matches(row: Attempt, query: UsageQuery) -> bool:
    return (
        query.start <= row.end_time < query.end
        and query.workspace_uid in {None, row.workspace_uid}
        and query.account in {None, row.account}
        and query.node_addr in {None, row.node_addr}
    )


def key_of(row: Attempt, by: frozenset[By]) -> tuple[object, ...]:
    start = None
    for one, length in LENGTHS.items():
        if one in by:
            start = EPOCH + (row.end_time - EPOCH) // length * length
    names = {By.WORKSPACE: "workspace_uid", By.ACCOUNT: "account", By.NODE: "node_addr", By.GPU_MODEL: "gpu_model"}
    return start, *(getattr(row, name) if one in by else "" for one, name in names.items())


def sums_of(ledger: list[Attempt], by: frozenset[By]) -> dict[tuple[object, ...], tuple[int, ...]]:
    groups: dict[tuple[object, ...], list[Attempt]] = defaultdict(list)
    if not by:
        groups[None, "", "", "", ""] = []
    for row in ledger:
        groups[key_of(row, by)].append(row)
    return {
        key: (
            len(rows),
            sum(row.cause == Cause.PLATFORM for row in rows),
            sum(row.gpu_us * row.gpu_count for row in rows),
            sum(row.gpu_us * row.gpu_count for row in rows if row.cause != Cause.PLATFORM),
            sum(row.cost_nanos for row in rows),
        )
        for key, rows in groups.items()
    }


def paged_usage(connection: sa.Connection, query: UsageQuery, limit: int) -> list[Usage]:
    rows = page = store_usage.usage(connection, query, None, limit)
    while query.by and len(page) == limit:
        page = store_usage.usage(connection, query, page[-1], limit)
        rows = rows + page
    return rows


def paged_receipts(connection: sa.Connection, query: UsageQuery, limit: int) -> list[Attempt]:
    rows = page = store_usage.receipts(connection, query, None, limit)
    while len(page) == limit:
        page = store_usage.receipts(connection, query, page[-1], limit)
        rows = rows + page
    return rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ledger=st.lists(RECEIPTS, max_size=40), query=QUERIES, limit=st.integers(1, 12))
def test_usage_is_the_sum_of_receipts(
    engine: sa.Engine, ledger: list[dict[str, Any]], query: UsageQuery, limit: int
) -> None:
    rows = [receipt(number, **columns) for number, columns in enumerate(ledger)]
    with engine.connect() as connection, connection.begin() as transaction:
        if rows:
            connection.execute(sa.insert(table_of(AttemptTable)), [row.__dict__ for row in rows])
        expected = [row for row in rows if matches(row, query)]
        found = paged_receipts(connection, query, limit)
        usage = paged_usage(connection, query, limit)
        transaction.rollback()
    assert sorted(row.task_id for row in found) == sorted(row.task_id for row in expected)
    by_key = {(one.start, one.workspace_uid, one.account, one.node_addr, one.gpu_model): one for one in usage}
    assert len(by_key) == len(usage), "a group came twice"
    assert {
        key: (one.attempts, one.free_attempts, one.gpu_us, one.billed_gpu_us, one.cost_nanos)
        for key, one in by_key.items()
    } == sums_of(expected, query.by)


def test_a_workspaces_usage_is_answered_from_the_index(engine: sa.Engine) -> None:
    """Both a workspace's own, which it may ask for as often as it likes, and that of all."""
    if engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL plans by what is in the table, which is empty")
    plans: list[str] = []
    with engine.connect() as connection:

        def explain(_c: Any, cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
            if not statement.startswith("SELECT"):
                return
            plan = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.append("; ".join(str(line[-1]) for line in plan))

        sa.event.listen(engine, "before_cursor_execute", explain)
        for uid in ("w-1", None):
            query = UsageQuery(start=BEGIN, end=END, workspace_uid=uid, by=frozenset({By.HOUR}))
            store_usage.usage(connection, query, None)
            store_usage.receipts(connection, query, None)
        sa.event.remove(engine, "before_cursor_execute", explain)
    assert len(plans) == 4
    for plan in plans:
        assert "attempt_of_workspace (workspace_uid=? AND end_time>? AND end_time<?)" in plan


def test_prices_are_read_as_they_were_written(engine: sa.Engine) -> None:
    later = BEGIN + timedelta(days=1)
    rows = [
        Price(gpu_model="", effective_time=BEGIN, nanos=0),
        Price(gpu_model="RTX 4090", effective_time=BEGIN, nanos=10**12),
        Price(gpu_model="RTX 4090", effective_time=later, nanos=3),
    ]
    with engine.begin() as connection:
        for row in reversed(rows):
            store_usage.put_price(connection, row)
            store_usage.put_price(connection, row)
        assert store_usage.prices(connection) == rows
