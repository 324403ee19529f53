"""Which of several control planes on one PostgreSQL is the active one, and how another takes over from it.

The connection that writes holds an advisory lock of its session for as long as it lives: who has the lock is the only
one who can write, at no cost to any write. Whoever takes over has the lock first, and so the last session of the one
before has ended by then, and what it had not committed is undone.

Beside that there is a row with an epoch and an expiry. The active one renews it through the queue of writes, and does
nothing more once it may have expired while somebody stands by, nor after a standstill before it knows (`Lease.check`).
Who stands by takes over when the lock has been free for FREE_S (the active one's process has ended), or when the row
has expired (it stands still, or is cut off): then its session is ended first. An active one that was only cut off for a
moment finds its own epoch and goes on.
"""

import asyncio
import selectors
import time
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final, NoReturn

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from controlplane.errors import NgpuError, Unavailable
from controlplane.store_database import connect_to, is_down, reason

#: How often it is looked whether to take over.
LOOK_S: Final = 0.1
#: How long the lock must have been free: an active one whose connection broke takes it again sooner, ...
FREE_S: Final = 0.5
#: ... because it writes at least so often.
RENEW_S: Final = 0.25
#: So long without a look at the lease is a standstill: there is one for each renewal at least.
STILL_S: Final = 2 * RENEW_S
#: How long the active one waits for the lock when it connects anew.
LOCK_WAIT_MS: Final = 2000

#: PostgreSQL's advisory locks of the active one, and shared by those who stand by; any numbers that are ours alone.
_KEYS: Final = {"ours": 0x6E677075, "active": 1, "standby": 2}
_NOW: Final = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)"
_LOCKS: Final = """FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = :ours AND objsubid = 2
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""

_ROW: Final = sa.text(f"SELECT epoch, holder, bodies_id, expire_time <= {_NOW} AS expired FROM lease")  # noqa: S608
_EPOCH: Final = sa.text("SELECT epoch FROM lease")
_STAND_BY: Final = sa.text("SELECT pg_advisory_lock_shared(:ours, :standby)")
_STAND_BY_NO_MORE: Final = sa.text("SELECT pg_advisory_unlock_shared(:ours, :standby)")
_WAIT: Final = sa.text("SELECT set_config('lock_timeout', :ms, true)")
_LOCK: Final = sa.text("SELECT pg_advisory_lock(:ours, :active)")
_TRY: Final = sa.text("SELECT pg_try_advisory_lock(:ours, :active)")
_LET_GO: Final = sa.text("SELECT pg_advisory_unlock(:ours, :active)")
_END_HOLDER: Final = sa.text(
    f"SELECT pg_terminate_backend(pid) {_LOCKS} AND objid = :active AND pid <> pg_backend_pid()"
)
_TAKE: Final = sa.text(
    f"""INSERT INTO lease (name, epoch, holder, bodies_id, expire_time)
    VALUES ('controlplane', 1, :holder, :bodies_id, {_NOW} + :us)
    ON CONFLICT (name) DO UPDATE
    SET epoch = lease.epoch + 1, holder = excluded.holder, expire_time = excluded.expire_time RETURNING epoch"""  # noqa: S608
)
_RENEW: Final = sa.text(
    f"""UPDATE lease SET expire_time = {_NOW} + :us WHERE epoch = :epoch
    RETURNING (SELECT count(*) {_LOCKS} AND objid = :standby)"""  # noqa: S608
)

#: (epoch, microseconds); the result is how many stand by.
Renewal = tuple[int, int]

log = structlog.get_logger(__name__)


class LeaseLost(NgpuError):
    """Another control plane has taken over from this one."""


def boottime() -> float:
    """Seconds that go on while this process, or its machine, stands still."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def renew(connection: sa.Connection, items: Sequence[Renewal]) -> list[int]:
    """A kind of write: the lease holds on from now. Raises LeaseLost if the row is another's."""
    ((epoch, us),) = items
    standbys = connection.execute(_RENEW, {**_KEYS, "epoch": epoch, "us": us}).scalar()
    if standbys is None:
        raise LeaseLost
    return [standbys]


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen: whether we are the active one now, and if not who is or was; empty: nobody yet."""

    taken: bool
    holder: str = ""


class Lease:
    """One control plane's part in it: `take` first, then `connect` for the writer, and `keep` all the while.

    `lost` is told why we are no longer the active one, in any thread, and does not return. `bodies_id`: of our
    directory of bodies.
    """

    def __init__(
        self,
        url: str,
        *,
        holder: str,
        bodies_id: str,
        lease_s: float,
        lost: Callable[[str], NoReturn],
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._url = url
        self.engine = connect_to(url)
        self._holder = holder
        self._bodies_id = bodies_id
        self._lease_s = lease_s
        self._us = round(lease_s * 1e6)
        self._lost = lost
        self._clock = clock
        self._connection: sa.Connection | None = None
        self._free_since: float | None = None
        #: 0: we have never been the active one.
        self.epoch = 0
        # By our clock, when the row may have expired; infinite while nobody stands by who could take over then.
        self._until = inf
        # When it was renewed last; when `check` was asked last.
        self._renewed = 0.0
        self._checked = 0.0

    def check(self) -> None:
        """`lost` if another may be the active one by now. Costs next to nothing: to be asked before anything is done.

        Blocks after a standstill, until it is known whether the lease still holds.
        """
        now = self._clock()
        # One of whom we do not know yet may stand by, too.
        if self.epoch and now - self._checked > STILL_S and now - self._renewed >= self._lease_s:
            self._renew_now(now)
        self._checked = now
        if now >= self._until:
            self._lost("the lease could not be renewed in time, and another control plane stands by")

    def _renew_now(self, now: float) -> None:
        engine = connect_to(self._url)
        try:
            # Not in a transaction: should we stand still again just now, it must not keep others from the row.
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                renew(connection, [(self.epoch, self._us)])
        except SQLAlchemyError as error:
            if not is_down(error):
                raise
        except LeaseLost as error:
            self._lost(str(error))
        else:
            self._renewed = now
            if self._until < inf:
                self._until = now + self._lease_s
        finally:
            engine.dispose()

    async def take(self, stop: asyncio.Event, waits: Callable[[str], Awaitable[None]]) -> bool:
        """Wait until we are the active one; False if `stop` was set first. `waits` is told who is or was, if any.

        Raises NgpuError if we could not do its work (the bodies are elsewhere).
        """
        holder: str | None = None
        down = False
        while not stop.is_set():
            try:
                look = await asyncio.to_thread(self.look)
                if down:
                    log.info("standby_database_is_back")
                down = False
                if look.taken:
                    return True
                if look.holder != holder:
                    await waits(holder := look.holder)
            except SQLAlchemyError as error:
                if not is_down(error):
                    raise
                if not down:
                    log.warning("standby_database_down", error=reason(error))
                down = True
            try:
                async with asyncio.timeout(LOOK_S):
                    await stop.wait()
            except TimeoutError:
                pass
        return False

    def look(self) -> Look:
        """One look, which takes over if it is time to. Blocks. Raises NgpuError if we may not, SQLAlchemyError."""
        try:
            return self._look()
        except BaseException as error:
            self._free_since = None
            self.close()
            if isinstance(error, ProgrammingError):
                words = f"The lease cannot be taken: {reason(error)}. Use one database user for all control planes."
                raise NgpuError(words) from error
            raise

    def _look(self) -> Look:
        if self._connection is None:
            self._connection = self.engine.connect()
            with self._connection.begin():
                self._connection.execute(_STAND_BY, _KEYS)
        connection, now = self._connection, self._clock()
        with connection.begin():
            row = connection.execute(_ROW).one_or_none()
            if row is not None and row.bodies_id != self._bodies_id:
                raise NgpuError(
                    f"This database's bodies are not in our bodies_dir: its file `identity` says "
                    f"{self._bodies_id}, and it should be {row.bodies_id}. Set bodies_dir to the directory "
                    "that all control planes on this database share; if that one is lost for good, write the latter "
                    "into the file."
                )
            holder = row.holder if row is not None else ""
            if row is not None and row.expired:
                connection.execute(_END_HOLDER, _KEYS)
            if not connection.execute(_TRY, _KEYS).scalar():
                self._free_since = None
                return Look(taken=False, holder=holder)
            if self._free_since is None:
                self._free_since = now
            if row is not None and not row.expired and now - self._free_since < FREE_S:
                connection.execute(_LET_GO, _KEYS)
                return Look(taken=False, holder=holder)
            taking = {"holder": self._holder, "bodies_id": self._bodies_id, "us": self._us}
            self.epoch = connection.execute(_TAKE, taking).scalar_one()
            connection.execute(_STAND_BY_NO_MORE, _KEYS)
        # Until the first renewal tells whether somebody stands by we believe so.
        self._until = now + self._lease_s
        self._renewed = now
        return Look(taken=True)

    def connect(self) -> sa.Connection:
        """A connection that writes as the active one. For the writer's thread; blocks."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            return connection
        connection = self.engine.connect()
        try:
            with connection.begin():
                self._prove(connection)
                # Our last session, of whose end the server may not know yet; or one that takes over, a moment too late.
                connection.execute(_END_HOLDER, _KEYS)
                connection.execute(_WAIT, {"ms": str(LOCK_WAIT_MS)})
                connection.execute(_LOCK, _KEYS)
                self._prove(connection)
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        return connection

    def _prove(self, connection: sa.Connection) -> None:
        if connection.execute(_EPOCH).scalar() != self.epoch:
            self._lost("another control plane has taken over")

    async def keep(self, put: Callable[[Renewal], "Future[int]"]) -> None:
        """Renew for ever; `put` gives a renewal to the writer."""
        while True:
            began = self._clock()
            try:
                standbys = await put((self.epoch, self._us))
            except Unavailable:
                pass
            except LeaseLost as error:
                self._lost(str(error))
            else:
                self._renewed = began
                self._until = began + self._lease_s if standbys else inf
            await asyncio.sleep(RENEW_S)

    def close(self) -> None:
        """Let go of what `take` left, if the writer has not taken it. Blocks."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()


def checked_loop(check: Callable[[], None]) -> asyncio.AbstractEventLoop:
    """An event loop that calls `check` each time before it handles anything that has come: after a standstill, too."""

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[Any]:
            ready: list[Any] = super().select(timeout)
            check()
            return ready

    return asyncio.SelectorEventLoop(Selector())
