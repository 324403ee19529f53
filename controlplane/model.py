"""The tables, and the table of task states with where each may go.

Rule of this file: a row is what must survive kill -9; everything else is derived from rows and reports. Only `store`
reads and writes the tables. Times are aware UTC datetimes, kept as microseconds since 1970 so that SQLite and
PostgreSQL compare and sort them alike.

Each row is two classes: `Task` is the plain value that the programs pass around, `TaskTable` declares its table and is
never made into an object. (An object of a table class carries the ORM's instrumentation: 85 us to make against 5.)
"""

import enum
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class State(enum.IntEnum):
    """Where a task stands. The numbers are the wire's (task.proto) and the database's."""

    QUEUED = 1
    RUNNING = 2
    COMPLETED = 3
    FAILED = 4
    CANCELLED = 5


#: From each state, where a task may go. The pair (attempt, state) only moves forward; an end is recorded once.
NEXT: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    # To QUEUED only with the next attempt's number.
    State.RUNNING: frozenset({State.QUEUED, State.COMPLETED, State.FAILED, State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

#: The terminal states.
ENDED = frozenset(state for state, following in NEXT.items() if not following)


class Delivery(enum.IntEnum):
    """How far an attempt got: known, never guessed."""

    NOT_SENT = 1
    SENT_PARTLY = 2
    SENT = 3
    ANSWERED = 4


class Cause(enum.IntEnum):
    """Whose fault a failure was."""

    CUSTOMER = 1
    PLATFORM = 2


class Role(enum.IntEnum):
    """What the holder of a token may do."""

    OPERATOR = 1
    SERVICE = 2
    NODE = 3


class Availability(enum.IntEnum):
    """What a node may take."""

    OPEN = 1
    CORDONED = 2
    DRAINING = 3


class UtcTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime as a 64-bit count of microseconds since 1970."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:  # noqa: ARG002
        """To the database."""
        return None if value is None else (value - EPOCH) // MICROSECOND

    def process_result_value(self, value: Any | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else EPOCH + timedelta(microseconds=value)


#: SQLite only gives out running numbers for INTEGER; PostgreSQL needs 64 bits.
_Serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")


class Workspace(SQLModel):
    """What a customer brought. `id` is its credential, 24 random decimal digits; `uid` is how rows refer to it."""

    uid: str = Field(primary_key=True)
    id: str = Field(unique=True, repr=False)
    name: str
    spec_json: bytes = Field(repr=False)
    generation: int = 1
    create_time: datetime = Field(sa_type=UtcTime)
    delete_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: The last explanation of replicas that could not be placed (an `explain.Decision` as JSON), or None.
    unplaced_json: bytes | None = None
    #: What is remembered of its deployment: a `census.Deployment` as JSON.
    deployment_json: bytes = Field(default=b"{}", repr=False)


class Route(SQLModel):
    """A public name for a path of a workspace."""

    name: str = Field(primary_key=True)
    workspace_uid: str
    port: int = 0
    path: str
    create_time: datetime = Field(sa_type=UtcTime)


class Node(SQLModel):
    """A machine that has enrolled. `addr` is its key's Ethereum-style address (EIP-55)."""

    addr: str = Field(primary_key=True)
    name: str = Field(unique=True)
    availability: Availability = Field(default=Availability.OPEN, sa_type=sa.Integer)
    enroll_time: datetime = Field(sa_type=UtcTime)
    last_seen_time: datetime | None = Field(default=None, sa_type=UtcTime)
    revoke_time: datetime | None = Field(default=None, sa_type=UtcTime)
    ip: str = ""
    #: The last report.Inventory as JSON.
    inventory_json: bytes = b"{}"
    #: What is remembered of its GPUs' health, of its failures and of restarts to come: a `census.Past` as JSON.
    health_json: bytes = b"{}"


class Replica(SQLModel):
    """One container of a workspace on one node, from its placement until it is known to be gone."""

    id: str = Field(primary_key=True)
    workspace_uid: str
    node_addr: str
    generation: int
    gpu_ids_json: bytes = b"[]"
    create_time: datetime = Field(sa_type=UtcTime)
    #: Takes nothing new and stops once what it runs is done.
    drain_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: No longer wanted: not in its node's list any more.
    stop_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: Known to be gone: its GPUs are free.
    gone_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: Why here: an `explain.Decision` as JSON.
    explanation_json: bytes = b""


class Token(SQLModel):
    """A secret's hash and what its holder may do."""

    id: str = Field(primary_key=True)
    #: SHA-256 of the secret; secrets are 256 random bits, so a slow hash would add nothing.
    secret_hash: bytes = Field(unique=True, repr=False)
    role: Role = Field(sa_type=sa.Integer)
    name: str = ""
    create_time: datetime = Field(sa_type=UtcTime)
    expire_time: datetime | None = Field(default=None, sa_type=UtcTime)
    revoke_time: datetime | None = Field(default=None, sa_type=UtcTime)
    use_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: The node that a one-time token enrolled.
    used_by: str = ""


class Task(SQLModel):
    """One HTTP exchange a user asked for. The columns from `attempt` on speak of its current or last attempt."""

    number: int | None = Field(default=None, sa_column=sa.Column(_Serial, primary_key=True, autoincrement=True))
    id: str = Field(unique=True)
    workspace_uid: str
    state: State = Field(sa_type=sa.Integer)
    create_time: datetime = Field(sa_type=UtcTime)
    start_time: datetime | None = Field(default=None, sa_type=UtcTime)
    end_time: datetime | None = Field(default=None, sa_type=UtcTime)

    port: int
    method: str
    path: str
    query: str = ""
    #: [[name, base64 value], ...] as JSON.
    request_headers_json: bytes = Field(default=b"[]", repr=False)
    #: The body, if it is at most wire.INLINE_BYTES; else None and it lies in the body store under the task's id.
    request_body: bytes | None = Field(default=None, repr=False)
    request_size: int = Field(default=0, sa_type=sa.BigInteger)
    repeatable: bool = True
    btc_address: str = ""
    #: None without a key: NULLs do not collide in the unique index.
    idempotency_key: str | None = None
    #: SHA-256 of what the key must always come with.
    request_hash: bytes | None = None
    user_ip: str = ""
    origin_url: str = ""
    operation: str = ""
    #: Its response was passed on as it came; its bodies are kept only up to a size.
    streamed: bool = False

    attempt: int = 0
    replica_id: str = ""
    node_addr: str = ""
    assign_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: Why this slot, in words.
    assign_reason: str = ""

    response_status: int = 0
    response_headers_json: bytes = Field(default=b"[]", repr=False)
    #: As for the request; a larger one lies in the body store under the attempt's id.
    response_body: bytes | None = Field(default=None, repr=False)
    response_size: int = Field(default=0, sa_type=sa.BigInteger)
    response_is_utf8: bool = False
    gpu_us: int = Field(default=0, sa_type=sa.BigInteger)
    cause: int = 0
    failure_reason: str = ""
    failure_message: str = ""
    #: When its bodies, past their retention, were deleted; the rest of the row outlives them.
    expire_time: datetime | None = Field(default=None, sa_type=UtcTime)


class Attempt(SQLModel):
    """An attempt that has ended: the ledger. Written once, in the transaction that ends or requeues its task."""

    task_id: str = Field(primary_key=True)
    number: int = Field(primary_key=True)
    replica_id: str
    node_addr: str
    node_ip: str = ""
    gpu_ids_json: bytes = b"[]"
    delivery: Delivery = Field(sa_type=sa.Integer)
    assign_time: datetime = Field(sa_type=UtcTime)
    end_time: datetime = Field(sa_type=UtcTime)
    sent_after_us: int = Field(default=0, sa_type=sa.BigInteger)
    first_byte_after_us: int = Field(default=0, sa_type=sa.BigInteger)
    last_byte_after_us: int = Field(default=0, sa_type=sa.BigInteger)
    gpu_us: int = Field(default=0, sa_type=sa.BigInteger)
    http_status: int = 0
    cause: int = 0
    failure_reason: str = ""
    failure_message: str = ""
    reason: str = ""


def _index(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """An index of those rows only for which `where` holds: small, whatever the table's size."""
    return sa.Index(name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


class WorkspaceTable(Workspace, table=True):
    """The table of workspaces."""

    __tablename__ = "workspace"
    __table_args__ = (_index("workspace_living", "name", unique=True, where="delete_time IS NULL"),)


class RouteTable(Route, table=True):
    """The table of routes."""

    __tablename__ = "route"


class NodeTable(Node, table=True):
    """The table of nodes."""

    __tablename__ = "node"


class ReplicaTable(Replica, table=True):
    """The table of replicas."""

    __tablename__ = "replica"


class TokenTable(Token, table=True):
    """The table of tokens."""

    __tablename__ = "token"


#: What a start must take up again, and what retention has yet to look at. A query must say it in the same words to be
#: answered from the index.
OPEN = "state < 3"
WITH_BODIES = "end_time IS NOT NULL AND expire_time IS NULL"


class TaskTable(Task, table=True):
    """The table of tasks."""

    __tablename__ = "task"
    __table_args__ = (
        sa.Index("task_of_workspace", "workspace_uid", "create_time", "number"),
        _index("task_of_key", "workspace_uid", "idempotency_key", unique=True, where="idempotency_key IS NOT NULL"),
        _index("task_open", "number", where=OPEN),
        _index("task_with_bodies", "end_time", where=WITH_BODIES),
    )


class AttemptTable(Attempt, table=True):
    """The table of ended attempts."""

    __tablename__ = "attempt"
