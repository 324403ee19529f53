"""How to connect to a database, SQLite or PostgreSQL, and which of its errors mean that it does not answer."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import exc
from sqlmodel import SQLModel

from controlplane.errors import Unavailable

#: How long to wait for another process's lock on SQLite's file, and for PostgreSQL to accept a connection.
LOCK_WAIT_S: Final = 5
#: Of the pages that a connection to SQLite keeps.
READER_CACHE_KIB: Final = 512
WRITER_CACHE_KIB: Final = 2000
#: SQLite's log is cut back to this after a checkpoint.
_LOG_BYTES: Final = 64 * 1024 * 1024

_SQLITE_DOWN: Final = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOTADB,
}

#: A PostgreSQL that is cut off is noticed after some 10 s, not after the kernel's 15 minutes.
_POSTGRES: Final[dict[str, Any]] = {
    "connect_timeout": LOCK_WAIT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def connect_to(url: str, *, connections: int = 1, read_only: bool = False) -> sa.Engine:
    """An engine with at most that many connections. Does not connect yet. Raises ValueError for a URL that is none."""
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except exc.ArgumentError as error:
        # The library's message repeats the URL, which may have a password in it.
        raise ValueError("the database's URL begins with neither sqlite:/// nor postgresql+psycopg://") from error
    if backend not in ("sqlite", "postgresql"):
        raise ValueError(f"databases of the kind {backend!r} are not supported: use SQLite or PostgreSQL")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError("SQLite needs a file: sqlite:////absolute/path")
    if backend == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        if find_spec("psycopg") is None:
            raise ValueError("PostgreSQL needs a driver: pip install 'ngpu[postgres]'")
    engine = sa.create_engine(
        parsed,
        connect_args={"timeout": LOCK_WAIT_S} if backend == "sqlite" else _POSTGRES,
        poolclass=sa.QueuePool,
        pool_size=connections,
        max_overflow=0,
        # Parameters are bodies and credentials: not for messages and logs.
        hide_parameters=True,
        # Each read is one statement: a transaction around it would cost two more.
        **({"isolation_level": "AUTOCOMMIT"} if read_only else {}),
    )
    if backend == "sqlite":
        _prepare_sqlite(engine, read_only=read_only)
    return engine


def table_of(row: type[SQLModel]) -> sa.Table:
    """The table that a class of `model` declares."""
    return SQLModel.metadata.tables[str(row.__tablename__)]


def _prepare_sqlite(engine: sa.Engine, *, read_only: bool) -> None:
    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        # Python's module would begin transactions by rules of its own.
        connection.isolation_level = None
        for pragma in (
            "journal_mode = WAL",
            # NORMAL may lose the last commits with the power: an acknowledged task would be gone.
            "synchronous = FULL",
            "foreign_keys = ON",
            f"journal_size_limit = {_LOG_BYTES}",
            f"query_only = {int(read_only)}",
            # Readers are several, and what they read again and again is in the kernel's cache anyhow.
            f"cache_size = {-(READER_CACHE_KIB if read_only else WRITER_CACHE_KIB)}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    if read_only:
        return

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        # A transaction that begins as a reader and then writes may find that it cannot, and no waiting would help it.
        # To the driver: by way of SQLAlchemy it costs more than the commit of a small batch.
        raw: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
        raw.execute("BEGIN IMMEDIATE").close()


def wait_for_lock(connection: sa.Connection, seconds: float) -> None:
    """Of SQLite: from now on wait so long for another process's lock."""
    raw: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
    raw.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}").close()


def is_down(error: BaseException) -> bool:
    """True if the error is the database's (locked, disk full, connection lost, stopping) and not the statement's."""
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, sqlite3.Error):
        # The class tells nothing: "no such table" is an OperationalError too.
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_DOWN
    return isinstance(error, exc.OperationalError | exc.InterfaceError | exc.InternalError | exc.TimeoutError)


def is_lost(error: BaseException) -> bool:
    """True if the connection is gone, and a new one may do."""
    return isinstance(error, exc.DBAPIError) and error.connection_invalidated


def reason(error: BaseException) -> str:
    """The database's own words, for logs and operators: one line without parameters."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unavailable() -> Unavailable:
    """What callers are told; where the database lies and what ails it is the log's business."""
    return Unavailable("The control plane's database does not answer; try again soon.", retry_after_s=1.0)


@contextmanager
def answering() -> Iterator[None]:
    """For start and migration: a database that does not answer leaves the block as Unavailable with its own words."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        if is_down(error):
            raise Unavailable(f"The database does not answer: {reason(error)}", retry_after_s=1.0) from error
        raise
