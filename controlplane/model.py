"""The tables, and the table of task states with where each may go.

Rule of this file: a row is what must survive kill -9; everything else is derived from rows and reports. Only `store`
reads and writes the tables. Times are aware UTC datetimes, kept as microseconds since 1970 so that SQLite and
PostgreSQL compare and sort them alike.

Each row is two classes: `Task` is the plain value that the programs pass around, `TaskTable` declares its table and is
never made into an object. (An object of a table class carries the ORM's instrumentation: 85 us to make against 5.)
"""

import enum
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

Row = TypeVar("Row", bound=SQLModel)

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


class Told(enum.IntEnum):
    """Where a webhook stands: whether the receiver has been told of a task's end."""

    WAITING = 1
    DELIVERED = 2
    GIVEN_UP = 3


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
    #: It has one caller, and that he goes away cancels it, unless its workspace says otherwise.
    cancel_on_hangup: bool = False
    #: Where its end is to be told; empty: nowhere.
    callback_url: str = ""
    #: Against other tasks of the same caller; more: sooner.
    priority: int = 0

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
    #: When the task entered the queue for this attempt: its acceptance, or the end of the attempt before.
    queue_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: Whose it is, and what it cost: a receipt stays as it was written, whatever becomes of workspaces and prices.
    workspace_uid: str = ""
    account: str = ""
    gpu_model: str = ""
    gpu_count: int = 0
    #: What a second of all its GPUs cost, and what came of it: in 10^-9 of the operator's unit of money.
    price_nanos: int = Field(default=0, sa_type=sa.BigInteger)
    cost_nanos: int = Field(default=0, sa_type=sa.BigInteger)
    #: Where there was a choice and somebody may ask (it failed, was slow, waited or was not the first): the replicas as
    #: they stood at `assign_time`, an explain.Decision as JSON.
    decision_json: bytes | None = None


class Price(SQLModel):
    """What a second of one GPU costs from a time on; never changed, only followed by the next."""

    #: Words of the GPU's model, as in a workspace's spec; empty: every other GPU.
    gpu_model: str = Field(primary_key=True)
    effective_time: datetime = Field(primary_key=True, sa_type=UtcTime)
    #: In 10^-9 of the operator's unit of money.
    nanos: int = Field(sa_type=sa.BigInteger)


class Webhook(SQLModel):
    """The end of a task that is to be told to its `callback_url`. Written in the transaction that ends the task."""

    task_id: str = Field(primary_key=True)
    workspace_uid: str
    #: Of the URL, lower case: so many posts at once to each.
    host: str
    state: Told = Field(default=Told.WAITING, sa_type=sa.Integer)
    #: Since when it is tried: the task's end, or when somebody asked for it once more.
    create_time: datetime = Field(sa_type=UtcTime)
    #: When to post it next; None: it is over.
    next_time: datetime | None = Field(default=None, sa_type=UtcTime)
    #: How often it was posted.
    tries: int = 0
    #: The last of these: a list of `webhooks.Try` as JSON.
    tries_json: bytes = b"[]"


class WebhookSecret(SQLModel):
    """What a workspace's webhooks are signed with. Not a hash: it takes the secret itself to sign."""

    workspace_uid: str = Field(primary_key=True)
    secret: bytes = Field(repr=False)
    create_time: datetime = Field(sa_type=UtcTime)
    #: The one before signs as well for a while, so that receivers can change over.
    previous_secret: bytes | None = Field(default=None, repr=False)


class Job(SQLModel):
    """What a container works on by itself, by the id that it gave it: where it is asked after, and which task it is.

    Of two jobs of one id, which only a container that counts can make, the later is meant. Kept as long as the bodies
    of its task.
    """

    workspace_uid: str = Field(primary_key=True)
    id: str = Field(primary_key=True)
    task_id: str
    #: The number of the task's attempt.
    attempt: int
    replica_id: str
    node_addr: str


#: What the columns of a row are without being given.
_DEFAULTS: dict[type[SQLModel], dict[str, Any]] = {
    row: {name: field.default for name, field in row.model_fields.items() if not field.is_required()}
    for row in (Task, Attempt)
}
#: All that such a row has.
_COLUMNS: dict[type[SQLModel], set[str]] = {row: set(row.model_fields) for row in _DEFAULTS}


def made(kind: type[Row], **columns: Any) -> Row:
    """A Task or an Attempt of columns that are known to be right: unchecked, in 1.5 us instead of 7."""
    # Past SQLModel's own, which is for rows that are checked.
    row: Row = object.__new__(kind)
    _put(row, "__dict__", _DEFAULTS[kind] | columns)
    # Shared, since there is nothing that it could get.
    _put(row, "__pydantic_fields_set__", _COLUMNS[kind])
    _put(row, "__pydantic_extra__", None)
    _put(row, "__pydantic_private__", None)
    return row


_put = object.__setattr__


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
#: Whose bodies lie in the body store only to be passed on. 65536: wire.INLINE_BYTES.
PASSED_ON = f"streamed AND {WITH_BODIES} AND (request_size > 65536 OR response_size > 65536)"


class TaskTable(Task, table=True):
    """The table of tasks."""

    __tablename__ = "task"
    __table_args__ = (
        sa.Index("task_of_workspace", "workspace_uid", "create_time", "number"),
        _index("task_of_key", "workspace_uid", "idempotency_key", unique=True, where="idempotency_key IS NOT NULL"),
        _index("task_open", "number", where=OPEN),
        _index("task_with_bodies", "end_time", where=WITH_BODIES),
        _index("task_passed_on", "end_time", where=PASSED_ON),
    )


class AttemptTable(Attempt, table=True):
    """The table of ended attempts."""

    __tablename__ = "attempt"
    # Usage is counted from the ledger: of one workspace after the other, in order of time.
    __table_args__ = (sa.Index("attempt_of_workspace", "workspace_uid", "end_time"),)


class PriceTable(Price, table=True):
    """The table of prices."""

    __tablename__ = "price"


class JobTable(Job, table=True):
    """The table of jobs."""

    __tablename__ = "job"
    __table_args__ = (sa.Index("job_of_task", "task_id"),)


#: Webhooks that are to be posted.
TO_TELL = "next_time IS NOT NULL"


class WebhookTable(Webhook, table=True):
    """The table of webhooks."""

    __tablename__ = "webhook"
    # Who waits is chosen from the index alone: a dead receiver's thousands are passed over without reading their rows.
    __table_args__ = (_index("webhook_waiting", "next_time", "host", "workspace_uid", where=TO_TELL),)


class WebhookSecretTable(WebhookSecret, table=True):
    """The table of webhooks' secrets."""

    __tablename__ = "webhook_secret"


class LeaseTable(SQLModel, table=True):
    """Which control plane is the active one: a single row, on PostgreSQL only. See `store_lease`."""

    __tablename__ = "lease"

    name: str = Field(primary_key=True)
    #: One more with each that took over.
    epoch: int
    #: Who that is, for people.
    holder: str
    #: Of the directory of bodies that belongs to this database.
    bodies_id: str
    expire_time: datetime = Field(sa_type=UtcTime)
