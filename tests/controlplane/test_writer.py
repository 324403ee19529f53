"""Group commit: what waits is committed together, in order, and what fails fails alone."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from controlplane.errors import Conflict, Unavailable
from controlplane.store_database import connect_to
from controlplane.store_writer import QUICK_BYTES, Writer

#: No pause after a failure: nothing here depends on time.
AT_ONCE = (0.0, 0.0)


class Database:
    """A SQLite file with one table, and a count of what is done to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = connect_to(f"sqlite:///{path}")
        self.commits = 0
        with self.engine.begin() as connection:
            connection.execute(
                sa.text("CREATE TABLE line (number INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT UNIQUE)")
            )
        sa.event.listen(self.engine, "commit", self._committed)

    def _committed(self, _connection: sa.Connection) -> None:
        self.commits += 1

    def lines(self) -> list[str]:
        with sqlite3.connect(self.path) as connection:
            return [text for (text,) in connection.execute("SELECT text FROM line ORDER BY number")]


INSERT = sa.text("INSERT INTO line (text) VALUES (:text)")


def insert(connection: sa.Connection, items: Sequence[str]) -> Sequence[str]:
    """A kind of write; its items' results are the items."""
    if "refused" in items:
        raise Conflict
    for item in items:
        connection.execute(INSERT, {"text": item})
    return items


def insert_upper(connection: sa.Connection, items: Sequence[str]) -> Sequence[str]:
    """Another kind."""
    return insert(connection, [item.upper() for item in items])


def insert_both(connection: sa.Connection, items: Sequence[str]) -> Sequence[str]:
    """What does a held write as well as its own."""
    return insert(connection, items)


QUICK = (insert, insert_upper, insert_both)


class Gate:
    """Keeps the writer busy until it is opened, so that what is put meanwhile is one batch."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._open = threading.Event()

    def _pass(self, _connection: sa.Connection, items: Sequence[None]) -> Sequence[None]:
        self._reached.set()
        assert self._open.wait(10)
        return items

    async def close(self, writer: Writer) -> None:
        """Returns when the writer stands at the gate."""
        writer.put(self._pass, None)
        assert await asyncio.to_thread(self._reached.wait, 10)

    async def open(self, *writes: asyncio.Future[str]) -> list[str | BaseException]:
        """Gives the outcomes of what was put meanwhile."""
        self._open.set()
        return await asyncio.gather(*writes, return_exceptions=True)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "ngpu.db")


@pytest.fixture(params=[False, True], ids=["", "quick"])
async def writer(database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Writer]:
    quick = QUICK if request.param else ()
    writer = Writer(database.engine.connect, quick=quick, backoff_s=AT_ONCE)
    yield writer
    await writer.close()
    database.engine.dispose()


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def test_what_waits_is_committed_together(database: Database, writer: Writer, gate: Gate) -> None:
    await writer.put(insert, "first")
    assert database.commits == 1
    await gate.close(writer)
    before = database.commits
    results = await gate.open(*(writer.put(insert, f"{n}", key=f"{n}") for n in range(200)))
    assert results == [f"{n}" for n in range(200)]
    assert database.commits - before == 2  # the gate's own, and one for all
    assert database.lines() == ["first", *results]


async def test_a_future_is_done_only_when_its_write_is_on_disk(database: Database, writer: Writer) -> None:
    for n in range(20):
        await writer.put(insert, f"{n}", key=f"{n}")
        assert database.lines()[-1] == f"{n}"


async def test_one_that_fails_fails_alone(database: Database, writer: Writer, gate: Gate) -> None:
    await gate.close(writer)
    texts = ["a", "refused", "b", "a", "c"]
    a, refused, b, again, c = await gate.open(*(writer.put(insert, text, key=text) for text in texts))
    assert (a, b, c) == ("a", "b", "c")
    assert isinstance(refused, Conflict)
    assert isinstance(again, sa.exc.IntegrityError)
    assert database.lines() == ["a", "b", "c"]


async def test_a_write_that_fails_half_way_leaves_nothing(database: Database, writer: Writer) -> None:
    def half(connection: sa.Connection, items: Sequence[str]) -> Sequence[str]:
        insert(connection, items)
        raise Conflict

    with pytest.raises(Conflict):
        await writer.put(half, "half")
    await writer.put(insert, "whole")
    assert database.lines() == ["whole"]


async def test_kinds_are_brought_together_and_order_is_kept_for_each_key(
    database: Database, writer: Writer, gate: Gate
) -> None:
    await gate.close(writer)
    await gate.open(
        writer.put(insert, "a1", key="a"),
        writer.put(insert_upper, "a2", key="a"),
        writer.put(insert, "b1", key="b"),  # joins a1
        writer.put(insert_upper, "b2", key="b"),  # joins a2
        writer.put(insert, "a3", key="a"),  # must not join a1: a2 is before it
        writer.put(insert, "fence"),
        writer.put(insert, "c1", key="c"),  # must not pass the fence
    )
    assert database.lines() == ["a1", "b1", "A2", "B2", "a3", "fence", "c1"]


async def test_a_full_queue_refuses(database: Database, gate: Gate) -> None:
    writer = Writer(database.engine.connect, queue_writes=3, queue_bytes=100)
    await gate.close(writer)
    with pytest.raises(Unavailable):
        writer.put(insert, "too many bytes", size_bytes=101)
    writer.put(insert, "a", size_bytes=100)
    with pytest.raises(Unavailable):
        writer.put(insert, "too many bytes", size_bytes=1)
    last = writer.put(insert, "b")
    with pytest.raises(Unavailable):
        writer.put(insert, "too many")
    assert writer.waiting == 3
    await gate.open(last)
    assert writer.waiting == 0
    await writer.put(insert, "c", size_bytes=100)
    await writer.close()
    assert database.lines() == ["a", "b", "c"]


async def test_close_commits_what_waits_and_refuses_what_comes(database: Database, writer: Writer, gate: Gate) -> None:
    await gate.close(writer)
    writes = [writer.put(insert, f"{n}", key=f"{n}") for n in range(50)]
    closing = asyncio.create_task(writer.close())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        writer.put(insert, "late")
    await gate.open()
    await closing
    assert all(write.done() for write in writes)
    assert len(database.lines()) == 50


async def test_a_caller_that_goes_away_leaves_its_write(database: Database, writer: Writer, gate: Gate) -> None:
    await gate.close(writer)
    gone = writer.put(insert, "gone", key="gone")
    kept = writer.put(insert, "kept", key="kept")
    gone.cancel()
    await gate.open(kept)
    assert database.lines() == ["gone", "kept"]


def connecting(database: Database, *pragmas: str) -> Callable[[], sa.Connection]:
    """Connect, with settings of the connection that make it fail early."""

    def connect() -> sa.Connection:
        connection = database.engine.connect()
        for pragma in pragmas:
            connection.exec_driver_sql(f"PRAGMA {pragma}")
        connection.rollback()
        return connection

    return connect


async def test_a_locked_database_is_unavailable_and_recovers(database: Database) -> None:
    writer = Writer(connecting(database, "busy_timeout = 1"), backoff_s=AT_ONCE)
    await writer.put(insert, "before")
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="database does not answer"):
        await writer.put(insert, "meanwhile")
    other.execute("ROLLBACK")
    other.close()
    await writer.put(insert, "after")
    await writer.close()
    assert database.lines() == ["before", "after"]


@pytest.mark.parametrize("quick", [(), QUICK], ids=["", "quick"])
async def test_a_full_disk_is_unavailable_and_recovers(database: Database, quick: tuple[Any, ...]) -> None:
    limits = ["max_page_count = 40"]

    def connect() -> sa.Connection:
        return connecting(database, *limits)()

    writer = Writer(connect, quick=quick, backoff_s=AT_ONCE)
    await writer.put(insert, "before")
    with pytest.raises(Unavailable):
        await writer.put(insert, "x" * 1_000_000)
    limits.clear()
    await writer.put(insert, "after")
    await writer.close()
    assert database.lines() == ["before", "after"]


async def test_a_database_that_is_away_is_tried_again(database: Database) -> None:
    failures = 3

    def connect() -> sa.Connection:
        nonlocal failures
        if failures:
            failures -= 1
            raise sa.exc.OperationalError("connect", {}, OSError("refused"))
        return database.engine.connect()

    writer = Writer(connect, backoff_s=AT_ONCE)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await writer.put(insert, "away")
    await writer.put(insert, "back")
    await writer.close()
    assert database.lines() == ["back"]


async def test_close_does_not_wait_for_a_database_that_is_away(database: Database) -> None:
    def connect() -> sa.Connection:
        raise sa.exc.OperationalError("connect", {}, OSError("refused"))

    writer = Writer(connect, backoff_s=(60.0, 60.0))
    with pytest.raises(Unavailable):
        await writer.put(insert, "a")  # from now on it pauses for a minute
    writes = [writer.put(insert, f"{n}") for n in range(2500)]
    await writer.close()
    assert all(isinstance(write.exception(), Unavailable) for write in writes)


async def test_a_bug_in_a_write_does_not_end_the_writer(database: Database, writer: Writer) -> None:
    def wrong(_connection: sa.Connection, _items: Sequence[None]) -> Sequence[None]:
        return []  # no result for its item

    with pytest.raises(ValueError, match="not enough values"):
        await writer.put(wrong, None)
    await writer.put(insert, "after")
    assert database.lines() == ["after"]


async def test_a_held_write_is_done_with_the_one_that_takes_it_in(database: Database, writer: Writer) -> None:
    first = writer.hold(insert, "a", key="k")
    held = writer.held("k")
    assert held is not None
    both = writer.put(insert_both, f"{held.item}+b", key="k", first=held)
    assert await first == await both == "a+b"
    assert (database.lines(), database.commits, writer.waiting) == (["a+b"], 1, 0)
    assert writer.held("k") is None


async def test_a_held_write_shares_a_failure(writer: Writer) -> None:
    first = writer.hold(insert, "a", key="k")
    both = writer.put(insert_both, "refused", key="k", first=writer.held("k"))
    for outcome in await asyncio.gather(first, both, return_exceptions=True):
        assert isinstance(outcome, Conflict)


async def test_a_held_write_waits_for_nobody_long(database: Database, writer: Writer) -> None:
    assert await writer.hold(insert, "a", key="k") == "a"
    assert (database.lines(), writer.waiting) == (["a"], 0)


@pytest.mark.parametrize("key", ["k", None])
async def test_no_write_passes_a_held_one_of_its_key(database: Database, writer: Writer, key: str | None) -> None:
    first = writer.hold(insert, "a", key="k")
    await writer.put(insert, "b", key=key)
    assert first.done()
    assert database.lines() == ["a", "b"]


async def test_close_commits_what_is_held(database: Database, writer: Writer) -> None:
    first = writer.hold(insert, "a", key="k")
    await writer.close()
    assert await first == "a"
    with pytest.raises(Unavailable):
        writer.hold(insert, "b", key="k")
    assert database.lines() == ["a"]


async def test_a_held_write_stays_where_the_one_after_it_is_refused(database: Database, gate: Gate) -> None:
    writer = Writer(database.engine.connect, queue_writes=2)
    try:
        await gate.close(writer)
        first = writer.hold(insert, "a", key="k")
        with pytest.raises(Unavailable):
            writer.put(insert_both, "a+b", key="k", first=writer.held("k"))
        assert await gate.open(first) == ["a"]
    finally:
        await writer.close()


# Quick ones.


async def test_quick_statements_are_run_where_they_are_put_and_committed_in_the_thread(database: Database) -> None:
    threads: list[int] = []

    def look(connection: sa.Connection, items: Sequence[str]) -> Sequence[str]:
        threads.append(threading.get_ident())
        return insert(connection, items)

    sa.event.listen(database.engine, "commit", lambda _: threads.append(threading.get_ident()))
    writer = Writer(database.engine.connect, quick=(look,))
    await writer.put(look, "first: there is no connection yet")
    here, there = threading.get_ident(), threads[0]
    assert threads == [there, there] != [here, here]
    del threads[:]
    await writer.put(look, "quick")
    assert threads == [here, there]
    del threads[:]
    await writer.put(look, "large", size_bytes=QUICK_BYTES + 1)
    assert threads == [there, there]
    await writer.close()
    assert len(database.lines()) == 3


async def test_a_lock_is_not_waited_for_in_the_loop(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlplane.store_writer.LOCK_WAIT_S", 30)
    writer = Writer(database.engine.connect, quick=QUICK)
    await writer.put(insert, "before")
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    write = writer.put(insert, "meanwhile")
    # Were the loop to wait for the lock, it would wait for itself.
    await asyncio.sleep(0.05)
    assert not write.done()
    other.execute("ROLLBACK")
    other.close()
    await write
    await writer.put(insert, "after")
    await writer.close()
    assert database.lines() == ["before", "meanwhile", "after"]


async def test_a_commit_that_fails_is_nobodys_success(database: Database) -> None:
    writer = Writer(database.engine.connect, quick=QUICK, backoff_s=AT_ONCE)
    await writer.put(insert, "before")
    fails = True

    @sa.event.listens_for(database.engine, "commit")
    def fail(_: sa.Connection) -> None:
        if fails:
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3_full())

    outcomes = await asyncio.gather(*(writer.put(insert, f"{n}", key=f"{n}") for n in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
    fails = False
    await writer.put(insert, "after")
    await writer.close()
    assert database.lines() == ["before", "after"]


def sqlite3_full() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error
