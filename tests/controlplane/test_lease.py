"""Of several control planes on one PostgreSQL one is active, and no other writes or answers."""

import asyncio
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import grpc
import pytest
import sqlalchemy as sa
from ngpu.v1 import task_pb2 as pb

from controlplane.errors import NgpuError
from controlplane.migrations import migrate
from controlplane.store import Store
from controlplane.store_lease import FREE_S, Lease, LeaseLost, checked_loop, renew
from tests.controlplane.databases import fresh_database
from tests.controlplane.test_main import DEADLINE_S, running
from tests.wire.house import request, until

LEASE_S: Final = 5.0
RENEWED_US: Final = 5_000_000


class Lost(Exception):
    """Where a control plane would end."""


class Clock:
    """Stands still but for the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Several:
    """Control planes on one database, as far as the lease is concerned."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clock = Clock()
        self._made: list[Lease] = []
        self._connections: list[sa.Connection] = []
        self._engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def lease(self, holder: str, *, bodies_id: str = "shared") -> Lease:
        def lost(why: str) -> NoReturn:
            raise Lost(why)

        lease = Lease(self.url, holder=holder, bodies_id=bodies_id, lease_s=LEASE_S, lost=lost, clock=self.clock)
        self._made.append(lease)
        return lease

    def active(self, holder: str) -> tuple[Lease, sa.Connection]:
        """The first one, and what it writes with."""
        lease = self.lease(holder)
        assert lease.look().taken
        return lease, self.connect(lease)

    def connect(self, lease: Lease) -> sa.Connection:
        """Closed at the end of the test, if not before."""
        self._connections.append(lease.connect())
        return self._connections[-1]

    def standby(self, holder: str) -> Lease:
        """One more, which has looked once."""
        lease = self.lease(holder)
        assert not lease.look().taken
        return lease

    def execute(self, statement: str) -> sa.Row[tuple[int]] | None:
        with self._engine.connect() as connection:
            done = connection.execute(sa.text(statement))
            return done.one_or_none() if done.returns_rows else None

    def expire(self) -> None:
        """As if nobody had renewed it for so long."""
        self.execute("UPDATE lease SET expire_time = 0")

    def close(self) -> None:
        for connection in self._connections:
            if not connection.closed:
                end(connection)
        for lease in self._made:
            lease.close()
            lease.engine.dispose()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fresh_database("postgresql", tmp_path_factory.mktemp("lease")) as url:
        migrate(url)
        yield url


@pytest.fixture
def several(database: str) -> Iterator[Several]:
    several = Several(database)
    several.execute("DELETE FROM lease")
    yield several
    several.close()


def end(connection: sa.Connection) -> None:
    """As the server sees it when the process has ended."""
    connection.invalidate()
    connection.close()


def test_the_first_is_active_and_the_second_knows_who_that_is(several: Several) -> None:
    several.active("one")
    two = several.lease("two")
    assert (two.look().taken, two.look().holder) == (False, "one")


def test_of_one_that_has_ended_another_takes_over_soon(several: Several) -> None:
    one, connection = several.active("one")
    two = several.standby("two")
    end(connection)
    until_free(two)
    several.clock.now += FREE_S - 0.01
    assert not two.look().taken
    several.clock.now += 0.02
    assert two.look().taken
    assert two.epoch == one.epoch + 1


def until_free(standby: Lease) -> None:
    """The server notices the end of a session in a moment."""
    for _ in range(1000):
        standby.look()
        if standby._free_since is not None:
            return
    raise AssertionError("the lock is not let go")


def test_one_whose_connection_broke_stays_active(several: Several) -> None:
    one, connection = several.active("one")
    two = several.standby("two")
    several.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1")
    until_free(two)
    end(connection)
    again = several.connect(one)
    several.clock.now += FREE_S + 1
    assert not two.look().taken
    assert renew(again, [(one.epoch, RENEWED_US)]) == [1]


def test_one_whose_last_session_the_server_believes_alive_writes_on(several: Several) -> None:
    one, connection = several.active("one")
    # Its pool has a single connection, which we keep to see what becomes of it.
    one.engine = sa.create_engine(several.url, poolclass=sa.NullPool)
    assert renew(several.connect(one), [(one.epoch, RENEWED_US)]) == [0]
    with pytest.raises(sa.exc.OperationalError):
        connection.execute(sa.text("SELECT 1"))


def test_one_that_stands_still_is_taken_over_from_and_what_it_had_not_committed_is_undone(several: Several) -> None:
    one, connection = several.active("one")
    two = several.standby("two")
    several.expire()
    writing = connection.begin()
    connection.execute(sa.text("INSERT INTO route VALUES ('late', 'uid', 0, '', 0)"))
    while not two.look().taken:
        pass
    with pytest.raises(sa.exc.OperationalError):
        writing.commit()
    assert two.epoch == one.epoch + 1
    assert several.execute("SELECT 1 FROM route") is None
    # And it will never write again.
    end(connection)
    with pytest.raises(Lost):
        one.connect()


def test_one_that_was_taken_over_from_cannot_renew(several: Several) -> None:
    one, connection = several.active("one")
    several.execute("UPDATE lease SET epoch = epoch + 1")
    with pytest.raises(LeaseLost):
        renew(connection, [(one.epoch, RENEWED_US)])


def test_after_a_standstill_it_is_looked_first_whether_the_lease_still_holds(several: Several) -> None:
    one, _ = several.active("one")
    one.check()
    several.expire()
    several.clock.now += LEASE_S + 1
    one.check()
    assert several.execute("SELECT 1 FROM lease WHERE expire_time > 0") is not None
    several.execute("UPDATE lease SET epoch = epoch + 1")
    one.check()
    several.clock.now += LEASE_S + 1
    with pytest.raises(Lost):
        one.check()


class Writes:
    """Takes renewals and answers them as a test says: how many stand by, or why it failed."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[int | NgpuError] = asyncio.Queue()
        self.asked = 0

    def put(self, _: tuple[int, int]) -> "asyncio.Future[int]":
        self.asked += 1
        return asyncio.ensure_future(self._answer())

    async def _answer(self) -> int:
        answer = await self.answers.get()
        if isinstance(answer, NgpuError):
            raise answer
        return answer


@pytest.mark.parametrize("standbys", [0, 1])
async def test_lease_that_cannot_be_renewed_ends_it_only_if_another_stands_by(
    several: Several, standbys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = several.active("one")
    one.check()
    writes = Writes()
    monkeypatch.setattr("controlplane.store_lease.RENEW_S", 0)
    keeping = asyncio.create_task(one.keep(writes.put))
    writes.answers.put_nowait(standbys)
    await until(lambda: writes.asked == 2)
    # It goes on, and the writes do not come back.
    for _ in range(24):
        several.clock.now += LEASE_S / 24
        if standbys and several.clock.now >= 1000 + LEASE_S:
            with pytest.raises(Lost):
                one.check()
        else:
            one.check()
    keeping.cancel()


def test_bodies_that_are_elsewhere_are_said_to_be(several: Several) -> None:
    several.active("one")
    with pytest.raises(NgpuError, match=re.escape("it should be shared. Set bodies_dir")):
        several.lease("two", bodies_id="mine alone").look()


async def test_open_store_keeps_its_lease(several: Several) -> None:
    one = several.lease("one")
    assert one.look().taken
    store = await Store.open(several.url, one)
    several.expire()
    await until(lambda: several.execute("SELECT 1 FROM lease WHERE expire_time > 0") is not None)
    await store.close()


def test_check_comes_before_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    near, far = socket.socketpair()
    loop = checked_loop(lambda: handled.append("check"))
    loop.add_reader(near, handled.append, "event")
    loop.call_later(0.01, loop.stop)
    far.send(b"x")
    loop.run_forever()
    loop.close()
    near.close()
    far.close()
    assert handled[:2] == ["check", "event"]


async def test_frozen_one_that_goes_on_neither_answers_nor_writes(database: str, tmp_path: Path) -> None:
    """Two real ones. What was asked of the first while it stood still is refused when it goes on."""
    migrate(database)
    for row in ("lease", "token", "workspace"):
        execute(database, f"DELETE FROM {row}")
    bodies = tmp_path / "bodies"
    settings = tmp_path / "settings.toml"
    settings.write_text(f'bodies_dir = "{bodies}"\nlease = "1s"\n')
    shared = ("--config", str(settings), "--database-url", database)
    async with running(tmp_path / "one", *shared) as one, running(tmp_path / "two", *shared) as two:
        assert (await two.get("/readyz"))[0] == 503
        assert "ngpu_controlplane_active 0.0" in (await two.get("/metrics"))[1]
        operator, bridge = one.operator, one.bridge
        workspace = await operator.workspace()
        acknowledged = (await bridge.schedule(request(workspace))).task.task_id
        one.process.send_signal(signal.SIGSTOP)
        await until(lambda: stands_still(one.process.pid))
        late = request(workspace)
        late.idempotency_key = "late"
        asked = [
            asyncio.ensure_future(bridge.schedule(late)),
            asyncio.ensure_future(bridge.tasks.Query(pb.QueryRequest(task_id=acknowledged), metadata=bridge.auth)),
        ]
        await until((two.state_dir / "address").exists)
        one.process.send_signal(signal.SIGCONT)
        for call in asked:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(DEADLINE_S):
            assert await one.process.wait() == 75
        assert count(database, "task") == 1
        client = two.client((one.state_dir / "bridge.token").read_text().strip())
        answer = await client.tasks.Query(pb.QueryRequest(task_id=acknowledged), metadata=client.auth)
        assert answer.task.state == pb.TASK_STATE_QUEUED
        for one_of in (operator, bridge, client):
            await one_of.channel.close()


def stands_still(pid: int) -> bool:
    """All threads of a stopped process do: the signal takes a moment."""
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}


def execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))


def count(url: str, table: str) -> int:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        return int(connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one())
