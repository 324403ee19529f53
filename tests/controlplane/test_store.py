"""What the store promises: recorded once, fenced, in order, repeatable, and still there after kill -9."""

import asyncio
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from controlplane.errors import Conflict, InvalidArgument, StaleAttempt, Unavailable
from controlplane.migrations import migrate
from controlplane.model import (
    Attempt,
    Delivery,
    Job,
    State,
    Task,
)
from controlplane.store import End, Page, Store, TaskQuery
from controlplane.store_database import connect_to
from controlplane.store_tasks import OPEN_PAGE_TASKS, PAGE_TASKS
from tests.controlplane.databases import fresh_database

ROOT = Path(__file__).parents[2]
NOW = datetime(2025, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def queued(task_id: str, **columns: Any) -> Task:
    values: dict[str, Any] = {
        "id": task_id,
        "workspace_uid": "w-1",
        "state": State.QUEUED,
        "create_time": NOW,
        "port": 80,
        "method": "POST",
        "path": "/run",
        "request_headers_json": b'[["a","Yg=="]]',
        "request_body": b"\x00request\xff",
        "request_size": 9,
    }
    return Task(**values | columns)


def running(task_id: str, **columns: Any) -> Task:
    return queued(
        task_id,
        **{
            "state": State.RUNNING,
            "attempt": 1,
            "start_time": NOW,
            "assign_time": NOW,
            "assign_reason": "the only one",
            "replica_id": "r-1",
            "node_addr": "0x1",
        }
        | columns,
    )


def ledger(task_id: str, number: int = 1, **columns: Any) -> Attempt:
    values: dict[str, Any] = {
        "task_id": task_id,
        "number": number,
        "replica_id": "r-1",
        "node_addr": "0x1",
        "delivery": Delivery.ANSWERED,
        "assign_time": NOW,
        "end_time": NOW + SECOND,
        "gpu_us": 10_000_000_000,
        "http_status": 200,
    }
    return Attempt(**values | columns)


def completed(**fields: Any) -> End:
    values: dict[str, Any] = {
        "state": State.COMPLETED,
        "end_time": NOW + SECOND,
        "response_status": 200,
        "response_body": b"answer",
        "response_size": 6,
        "response_is_utf8": True,
        "gpu_us": 10_000_000_000,
    }
    return End(**values | fields)


def failed(reason: str = "QUEUE_TIME_LIMIT") -> End:
    return End(state=State.FAILED, end_time=NOW + SECOND, cause=1, failure_reason=reason, failure_message="In words.")


async def known(store: Store, task_id: str) -> Task:
    task = await store.task(task_id)
    assert task is not None
    return task


async def pages(store: Store, **query: Any) -> list[Page]:
    return [page async for page in store.list_tasks(TaskQuery(**{"workspace_uid": "w-1"} | query))]


async def listed(store: Store, **query: Any) -> list[str]:
    return [task_id for page in await pages(store, **query) for task_id in page.task_ids]


# A task's life.


async def test_a_task_is_read_as_it_was_written(store: Store) -> None:
    task = running("t1", idempotency_key="k", request_hash=b"\x00h", query="a=%20", repeatable=False, user_ip="::1")
    assert await store.add_task(task) is None
    read = await known(store, "t1")
    assert read.number is not None
    assert read.model_copy(update={"number": None}) == task
    assert isinstance(read.state, State)
    assert await store.task("t2") is None


async def test_the_hot_path_need_not_await_the_insert(store: Store) -> None:
    added = store.add_task(running("t1"))
    finished = store.finish(ledger("t1"), completed())
    await asyncio.gather(added, finished)
    task = await known(store, "t1")
    assert (task.state, task.end_time, task.response_body) == (State.COMPLETED, NOW + SECOND, b"answer")
    assert (task.response_is_utf8, task.gpu_us, task.start_time) == (True, 10_000_000_000, NOW)
    assert await store.attempts("t1") == [ledger("t1")]


async def test_a_task_that_ends_soon_is_written_with_its_end(store: Store) -> None:
    added = store.add_task(running("t1"), ends_soon=True)
    finished = store.finish(ledger("t1"), completed())
    await asyncio.gather(added, finished)
    task = await known(store, "t1")
    assert (task.state, task.end_time, task.response_body) == (State.COMPLETED, NOW + SECOND, b"answer")
    assert (task.attempt, task.start_time, task.replica_id) == (1, NOW, "r-1")
    assert await store.attempts("t1") == [ledger("t1")]
    await store.finish(ledger("t1"), completed())  # given twice


async def test_a_task_that_does_not_end_soon_after_all_is_written(store: Store) -> None:
    assert await store.add_task(running("t1"), ends_soon=True) is None
    assert (await known(store, "t1")).state is State.RUNNING
    added = store.add_task(running("t2"), ends_soon=True)
    await store.requeue(ledger("t2"))
    assert added.done()
    assert (await known(store, "t2")).state is State.QUEUED


async def test_what_the_caller_does_with_its_task_afterwards_is_not_recorded(store: Store) -> None:
    task = running("t1")
    added = store.add_task(task)
    task.state = State.FAILED
    await added
    assert (await known(store, "t1")).state is State.RUNNING


async def test_through_all_states(store: Store) -> None:
    await store.add_task(queued("t1"))
    assigned = {"replica_id": "r-1", "node_addr": "0x1", "reason": "least busy"}
    await store.assign("t1", 1, assign_time=NOW + SECOND, **assigned)
    task = await known(store, "t1")
    assert (task.state, task.attempt, task.start_time) == (State.RUNNING, 1, NOW + SECOND)
    assert (task.replica_id, task.node_addr, task.assign_reason) == ("r-1", "0x1", "least busy")

    lost = ledger("t1", 1, delivery=Delivery.NOT_SENT, http_status=0, failure_reason="NODE_LOST")
    await store.requeue(lost)
    task = await known(store, "t1")
    assert (task.state, task.attempt, task.end_time) == (State.QUEUED, 1, None)

    await store.assign(
        "t1", 2, assign_time=NOW + 2 * SECOND, replica_id="r-2", node_addr="0x2", reason="the other is gone"
    )
    task = await known(store, "t1")
    assert (task.state, task.attempt, task.node_addr) == (State.RUNNING, 2, "0x2")
    assert task.start_time == NOW + SECOND  # of the first attempt
    assert task.assign_time == NOW + 2 * SECOND

    await store.finish(ledger("t1", 2), completed())
    assert (await known(store, "t1")).state is State.COMPLETED
    assert await store.attempts("t1") == [lost, ledger("t1", 2)]


async def test_a_past_attempt_changes_nothing(store: Store) -> None:
    await store.add_task(running("t1"))
    await store.requeue(ledger("t1", 1))
    await store.assign("t1", 2, replica_id="r-2", node_addr="0x2", assign_time=NOW, reason="")
    late = ledger("t1", 1, end_time=NOW + 9 * SECOND)
    for write in (store.finish(late, completed()), store.requeue(late), store.finish(ledger("t1", 3), completed())):
        with pytest.raises(StaleAttempt):
            await write
    assert (await known(store, "t1")).state is State.RUNNING
    assert len(await store.attempts("t1")) == 1


async def test_an_end_is_recorded_once(store: Store) -> None:
    await store.add_task(running("t1"))
    await store.finish(ledger("t1"), completed())
    other = ledger("t1", end_time=NOW + 2 * SECOND)
    for write in (
        store.finish(other, completed(response_body=b"another answer")),
        store.finish(other, failed("NODE_LOST")),
        store.requeue(other),
        store.end_queued("t1", failed()),
        store.assign("t1", 2, replica_id="r-2", node_addr="0x2", assign_time=NOW, reason=""),
    ):
        with pytest.raises(StaleAttempt):
            await write
    assert (await known(store, "t1")).response_body == b"answer"
    assert await store.attempts("t1") == [ledger("t1")]


async def test_a_task_that_is_not_there_is_stale(store: Store) -> None:
    for write in (
        store.finish(ledger("t1"), completed()),
        store.requeue(ledger("t1")),
        store.end_queued("t1", failed()),
        store.assign("t1", 1, replica_id="r-2", node_addr="0x2", assign_time=NOW, reason=""),
    ):
        with pytest.raises(StaleAttempt):
            await write
    assert await store.attempts("t1") == []


async def test_every_write_may_be_given_twice(store: Store) -> None:
    for _ in range(2):
        assert await store.add_task(queued("t1")) is None
    for _ in range(2):
        await store.assign("t1", 1, replica_id="r-1", node_addr="0x1", assign_time=NOW, reason="")
    for _ in range(2):
        await store.requeue(ledger("t1", 1))
    await store.assign("t1", 2, replica_id="r-1", node_addr="0x1", assign_time=NOW, reason="")
    for _ in range(2):
        await store.finish(ledger("t1", 2), completed())
    await store.add_task(queued("t2"))
    for _ in range(2):
        await store.end_queued("t2", failed())
    assert len(await store.attempts("t1")) == 2
    assert await listed(store) == ["t1", "t2"]


async def test_the_end_of_a_queued_task(store: Store) -> None:
    await store.add_task(queued("t1"))
    await store.end_queued("t1", failed())
    task = await known(store, "t1")
    assert (task.state, task.attempt, task.start_time) == (State.FAILED, 0, None)
    assert (task.cause, task.failure_reason, task.failure_message) == (1, "QUEUE_TIME_LIMIT", "In words.")
    await store.add_task(running("t2"))
    with pytest.raises(StaleAttempt):
        await store.end_queued("t2", failed())


async def test_no_words_keep_a_task_from_ending(store: Store) -> None:
    await store.add_task(running("t1"))
    words = "Segmentation\0fault \U0001f4a5"
    for _ in range(2):
        await store.finish(ledger("t1", failure_message=words), failed(words))
    task = await known(store, "t1")
    assert (task.state, task.failure_reason) == (State.FAILED, "Segmentationfault \U0001f4a5")


async def test_moves_that_the_table_of_states_does_not_know_are_refused_at_the_call(store: Store) -> None:
    for state in (State.QUEUED, State.RUNNING):
        with pytest.raises(ValueError, match="a task does not"):
            store.finish(ledger("t1"), completed(state=state))
    for state in (State.QUEUED, State.RUNNING, State.COMPLETED):
        with pytest.raises(ValueError, match="a task does not"):
            store.end_queued("t1", completed(state=state))
    for task in (queued("t1", attempt=1), running("t1", attempt=0), queued("t1", state=State.COMPLETED)):
        with pytest.raises(ValueError, match="a new task"):
            store.add_task(task)


async def test_many_at_once_and_a_few_that_fail(store: Store) -> None:
    names = [f"t{n}" for n in range(300)]
    writes: list[asyncio.Future[Any]] = [store.add_task(running(name)) for name in names]
    writes += [store.finish(ledger(name), completed()) for name in names]
    stale = store.finish(ledger("t7", end_time=NOW), completed())
    missing = store.requeue(ledger("none"))
    await asyncio.gather(*writes)
    for write in (stale, missing):
        with pytest.raises(StaleAttempt):
            await write
    assert await listed(store, states=frozenset({State.COMPLETED})) == names


# Idempotency.


async def test_same_key_same_task(store: Store) -> None:
    first = running("t1", idempotency_key="k", request_hash=b"h")
    again = running("t2", idempotency_key="k", request_hash=b"h")
    assert await store.add_task(first) is None
    existing = await store.add_task(again)
    assert existing is not None
    assert existing.id == "t1"
    assert await store.task("t2") is None


async def test_same_key_other_request_is_a_conflict(store: Store) -> None:
    await store.add_task(running("t1", idempotency_key="k", request_hash=b"h"))
    with pytest.raises(Conflict, match="idempotency key"):
        await store.add_task(running("t2", idempotency_key="k", request_hash=b"other"))


async def test_keys_are_each_workspaces_own(store: Store) -> None:
    for uid in ("w-1", "w-2"):
        task = running(f"t-{uid}", workspace_uid=uid, idempotency_key="k", request_hash=uid.encode())
        assert await store.add_task(task) is None


async def test_of_many_at_once_with_one_key_one_is_added(store: Store) -> None:
    tasks = [running(f"t{n}", idempotency_key="k", request_hash=b"h") for n in range(20)]
    others = [store.add_task(running(f"other{n}")) for n in range(20)]
    outcomes = await asyncio.gather(*map(store.add_task, tasks))
    assert outcomes[0] is None
    assert {existing.id for existing in outcomes if existing is not None} == {"t0"}
    assert outcomes.count(None) == 1
    assert await asyncio.gather(*others) == [None] * 20


# Reads.


async def test_open_tasks_come_in_order_of_acceptance(store: Store) -> None:
    names = [f"t{n}" for n in range(OPEN_PAGE_TASKS + 50)]
    await asyncio.gather(*(store.add_task(queued(name)) for name in names))
    ended, taken = "t3", "t5"
    await store.end_queued(ended, failed())
    await store.assign(taken, 1, replica_id="r-1", node_addr="0x1", assign_time=NOW, reason="")
    found = [page async for page in store.open_tasks()]
    assert [len(page) for page in found] == [OPEN_PAGE_TASKS, 49]
    assert [task.id for page in found for task in page] == [name for name in names if name != ended]
    assert found[0][0].request_body == b"\x00request\xff"


async def test_a_list_has_all_tasks_of_its_workspace_oldest_first(store: Store) -> None:
    # Accepted in the same microsecond: the running number decides.
    names = [f"t{n}" for n in range(PAGE_TASKS + 10)]
    await asyncio.gather(*(store.add_task(queued(name)) for name in names))
    await store.add_task(queued("earlier", create_time=NOW - SECOND))
    await store.add_task(queued("another's", workspace_uid="w-2"))
    found = await pages(store)
    assert [len(page.task_ids) for page in found] == [PAGE_TASKS, 11]
    assert [task_id for page in found for task_id in page.task_ids] == ["earlier", *names]
    assert found[-1].cursor == ""


async def test_a_list_goes_on_from_its_cursor(store: Store) -> None:
    names = [f"t{n}" for n in range(7)]
    await asyncio.gather(*(store.add_task(queued(name)) for name in names))
    cursor, found = "", []
    for _ in range(10):
        (page,) = await pages(store, limit=3, cursor=cursor)
        found.append(page.task_ids)
        cursor = page.cursor
        if not cursor:
            break
    assert found == [names[:3], names[3:6], names[6:]]
    (exact,) = await pages(store, limit=7)
    assert exact.cursor == ""
    assert await listed(store, workspace_uid="w-2") == []


@pytest.mark.parametrize("cursor", ["x", "1", ".", "1.x", "9" * 40 + ".1", f"1.{2**63}", "1.-1", "1.2.3"])
async def test_a_cursor_that_is_none_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidArgument, match="cursor"):
        await listed(store, cursor=cursor)


async def test_a_list_can_be_narrowed(store: Store) -> None:
    for n in range(6):
        await store.add_task(running(f"t{n}", create_time=NOW + n * SECOND, node_addr=f"0x{n % 2}"))
    await store.finish(ledger("t2"), completed())
    await store.finish(ledger("t3"), failed("NODE_LOST"))
    assert await listed(store, start=NOW + 2 * SECOND) == ["t2", "t3", "t4", "t5"]
    assert await listed(store, end=NOW + 2 * SECOND) == ["t0", "t1"]
    assert await listed(store, start=NOW + SECOND, end=NOW + 3 * SECOND) == ["t1", "t2"]
    assert await listed(store, node_addr="0x1") == ["t1", "t3", "t5"]
    assert await listed(store, states=frozenset({State.COMPLETED, State.FAILED})) == ["t2", "t3"]
    assert await listed(store, states=frozenset({State.FAILED}), node_addr="0x0") == []


async def test_a_full_list_has_the_tasks_without_headers_and_bodies(store: Store) -> None:
    await store.add_task(running("t1"))
    await store.finish(ledger("t1"), completed())
    (page,) = await pages(store, full=True)
    (task,) = page.tasks
    assert (task.id, task.state, task.response_size, task.request_size) == ("t1", State.COMPLETED, 6, 9)
    assert (task.request_body, task.response_body, task.request_headers_json) == (None, None, b"[]")


async def test_a_list_ends_though_tasks_go_on_coming(store: Store) -> None:
    await asyncio.gather(*(store.add_task(queued(f"t{n}")) for n in range(PAGE_TASKS + 1)))
    found: list[str] = []
    async for page in store.list_tasks(TaskQuery(workspace_uid="w-1")):
        found += page.task_ids
        await asyncio.gather(*(store.add_task(queued(f"later{len(found)}.{n}")) for n in range(100)))
    assert found == [f"t{n}" for n in range(PAGE_TASKS + 1)]


async def test_a_page_is_read_from_the_index(tmp_path: Path) -> None:
    """Its price must not grow with the table: nothing before the cursor is read, and nothing is sorted."""
    with fresh_database("sqlite", tmp_path) as url:
        migrate(url)
        engine = connect_to(url)
        with engine.connect() as connection:
            plans = {
                "SELECT id FROM task WHERE workspace_uid = 'w' AND (create_time, number) > (1, 2) AND create_time < 9"
                " ORDER BY create_time, number LIMIT 10": "task_of_workspace (workspace_uid=? AND create_time>",
                "SELECT * FROM task WHERE state < 3 AND number > 5 ORDER BY number LIMIT 10": "task_open",
                "SELECT id FROM task WHERE end_time IS NOT NULL AND expire_time IS NULL AND end_time < 5"
                " ORDER BY end_time LIMIT 10": "task_with_bodies",
            }
            for statement, index in plans.items():
                (plan,) = [row[3] for row in connection.execute(sa.text(f"EXPLAIN QUERY PLAN {statement}"))]
                assert index in plan
        engine.dispose()


async def test_bodies_past_their_retention_go_and_the_rest_stays(store: Store) -> None:
    for n in range(3):
        await store.add_task(running(f"t{n}"))
        await store.finish(ledger(f"t{n}"), completed(end_time=NOW + n * SECOND))
    await store.add_task(running("t3"))
    assert await store.expirable_tasks(NOW + 2 * SECOND) == [("t0", 1), ("t1", 1)]
    assert await store.expirable_tasks(NOW + 2 * SECOND, limit=1) == [("t0", 1)]
    for _ in range(2):
        await store.expire_bodies(["t0", "t1", "t3"], NOW + 9 * SECOND)
    assert await store.expirable_tasks(NOW + 9 * SECOND) == [("t2", 1)]
    task = await known(store, "t0")
    assert (task.request_body, task.response_body, task.expire_time) == (None, None, NOW + 9 * SECOND)
    assert (task.state, task.response_size) == (State.COMPLETED, 6)
    assert (await known(store, "t3")).request_body is not None  # it has not ended
    await store.expire_bodies([], NOW)


async def test_job_is_known_by_its_id_until_its_tasks_bodies_go(store: Store) -> None:
    def job(task_id: str, **columns: Any) -> Job:
        values: dict[str, Any] = {"workspace_uid": "w", "id": "j", "attempt": 1, "replica_id": "r", "node_addr": "n"}
        return Job(task_id=task_id, **(values | columns))

    for task_id in ("t1", "t2"):
        await store.add_task(running(task_id))
        await store.finish(ledger(task_id), completed())
    for _ in range(2):
        await store.put_job(job("t1"))
    assert await store.job("w", "j") == job("t1")
    assert (await store.job("w", "i"), await store.job("x", "j")) == (None, None)
    # A container that counts has begun anew.
    await store.put_job(job("t2", attempt=3, replica_id="r2"))
    await store.put_job(job("t2", id="i", attempt=2))
    assert await store.job("w", "j") == job("t2", attempt=3, replica_id="r2")
    assert [(known.id, known.attempt) for known in await store.jobs_of("t2")] == [("i", 2), ("j", 3)]
    await store.expire_bodies(["t1", "t2"], NOW)
    assert await store.jobs_of("t2") == []


# Its own life.


async def test_what_was_acknowledged_is_there_after_a_restart(url: str) -> None:
    store = await Store.open(url)
    await store.add_task(running("t1"))
    left = store.finish(ledger("t1"), completed())
    await store.close()
    assert left.done()
    store = await Store.open(url)
    assert (await known(store, "t1")).state is State.COMPLETED
    await store.close()


async def test_a_closed_store_is_unavailable(url: str) -> None:
    store = await Store.open(url)
    await store.close()
    with pytest.raises(Unavailable):
        store.add_task(running("t1"))
    with pytest.raises(Unavailable):
        await store.task("t1")


async def test_a_database_that_was_not_migrated_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="migrate"):
        await Store.open(f"sqlite:///{tmp_path}/ngpu.db")


async def test_too_many_reads_are_refused(store: Store) -> None:
    outcomes = await asyncio.gather(*(store.task("t") for _ in range(1200)), return_exceptions=True)
    assert outcomes.count(None) == 1000
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes if outcome is not None)
    assert await store.task("t") is None


async def test_lost_connections_are_made_anew(url: str, store: Store) -> None:
    if not url.startswith("postgresql"):
        pytest.skip("SQLite has no connections to lose")
    await store.add_task(running("t1"))
    await store.task("t1")
    admin = connect_to(url)
    with admin.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    admin.dispose()
    await store.finish(ledger("t1"), completed())
    assert (await known(store, "t1")).state is State.COMPLETED


def say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


async def acknowledge(url: str) -> None:
    """In a process of its own: add and end tasks, and say so of each once the store has."""
    store = await Store.open(url)

    async def call(caller: int) -> None:
        for n in range(1_000_000):
            name = f"t{caller}.{n}"
            await store.add_task(running(name))
            say("added", name)
            await store.finish(ledger(name), completed())
            say("ended", name)

    await asyncio.gather(*map(call, range(16)))


async def test_what_was_acknowledged_is_there_after_kill_9(url: str) -> None:
    code = f"import asyncio, {__name__} as test; asyncio.run(test.acknowledge({url!r}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(2000)]
        child.send_signal(signal.SIGKILL)
        # What it had said before it died counts too; a line that was cut does not.
        lines += [line for line in child.stdout if line.endswith("\n")]
    assert child.returncode == -signal.SIGKILL
    said = [line.split() for line in lines]
    added = {name for word, name in said if word == "added"}
    ended = {name for word, name in said if word == "ended"}
    assert len(ended) > 500

    store = await Store.open(url)
    try:
        assert added <= set(await listed(store))
        assert ended <= set(await listed(store, states=frozenset({State.COMPLETED})))
        for name in sorted(ended)[:100]:
            assert await store.attempts(name) == [ledger(name)]
    finally:
        await store.close()
