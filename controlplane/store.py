"""Every read and write of rows: one method, one transaction.

Writes are put into the writer's queue at once, in the order of the calls, and give a future that is done when they are on disk (or
refused); a caller may go on meanwhile, and need not await in order. All writes are repeatable: one that was answered with
Unavailable may or may not have happened, and may be given again as it is.

Errors of every method: Unavailable (the database does not answer, its disk is full, too much waits, or the store is closed; writes
raise it at the call when the queue is full, else through the future).
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Self

import msgspec

from controlplane.model import Attempt, Node, Replica, Route, State, Task, Token, Workspace


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended. `state` is a terminal one; the fields are those of model.Task."""

    state: State
    end_time: datetime
    response_status: int = 0
    response_headers_json: bytes = b"[]"
    response_body: bytes | None = None
    response_size: int = 0
    response_is_utf8: bool = False
    gpu_us: int = 0
    cause: int = 0
    failure_reason: str = ""
    failure_message: str = ""


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


class Store:
    """The database."""

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open the database at `url` (`sqlite:////absolute/path`, `postgresql+psycopg://...`), which must have been migrated.

        Raises Unavailable if it cannot be reached, is not migrated, or is in use by another control plane.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Finish what is in the queue, refuse everything else, let go of the database."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """Writes in the queue."""
        raise NotImplementedError

    # Tasks.

    def add_task(self, task: Task) -> "asyncio.Future[Task | None]":
        """Record a new task: QUEUED with attempt 0, or RUNNING with attempt 1 and the columns of its assignment.

        Gives None; or, if the workspace has a task with this `idempotency_key`, that task (nothing is added), or Conflict if its `request_hash`
        is another. So one with a key must not be started before the future is done; one without may.
        """
        raise NotImplementedError

    def assign(
        self, task_id: str, number: int, *, replica_id: str, node_addr: str, assign_time: datetime, reason: str
    ) -> "asyncio.Future[None]":
        """QUEUED -> RUNNING with attempt `number`, which is one more than the last. Raises StaleAttempt if the task is not there."""
        raise NotImplementedError

    def finish(self, attempt: Attempt, end: End) -> "asyncio.Future[None]":
        """RUNNING -> its end, and `attempt` into the ledger.

        Raises StaleAttempt if that attempt of the task is not the one running; the same end given again is no error.
        """
        raise NotImplementedError

    def requeue(self, attempt: Attempt) -> "asyncio.Future[None]":
        """RUNNING -> QUEUED, and `attempt` into the ledger. Raises as `finish`. The task keeps the attempt's number until the next."""
        raise NotImplementedError

    def end_queued(self, task_id: str, end: End) -> "asyncio.Future[None]":
        """QUEUED -> FAILED or CANCELLED. Raises StaleAttempt if the task is not queued; the same end given again is no error."""
        raise NotImplementedError

    async def task(self, task_id: str) -> Task | None:
        """The task, with its inline bodies."""
        raise NotImplementedError

    async def attempts(self, task_id: str) -> list[Attempt]:
        """The ended attempts of a task, oldest first."""
        raise NotImplementedError

    def open_tasks(self) -> AsyncIterator[list[Task]]:
        """All tasks that have not ended, in order of acceptance, in pages."""
        raise NotImplementedError

    def list_tasks(self, query: TaskQuery) -> AsyncIterator[Page]:
        """Tasks in order of acceptance, oldest first; complete for those accepted before the call; at least one page.

        Raises InvalidArgument if the cursor is none of ours.
        """
        raise NotImplementedError

    async def expirable_tasks(self, before: datetime, limit: int = 500) -> list[tuple[str, int]]:
        """Id and last attempt's number of tasks that ended before `before` and still have their bodies; oldest first.

        Delete their bodies from the body store, then call `expire_bodies`: in this order a crash leaves nothing behind.
        """
        raise NotImplementedError

    def expire_bodies(self, task_ids: Sequence[str], now: datetime) -> "asyncio.Future[None]":
        """Delete the inline bodies of ended tasks and set their `expire_time`."""
        raise NotImplementedError

    # The fleet.

    def add_workspace(self, row: Workspace) -> "asyncio.Future[None]":
        """Raises Conflict if a living workspace has that name."""
        raise NotImplementedError

    def update_workspace(self, row: Workspace) -> "asyncio.Future[None]":
        """Write all columns of a known workspace. Raises NotFound, Conflict (the name)."""
        raise NotImplementedError

    def delete_workspace(self, uid: str, now: datetime) -> "asyncio.Future[None]":
        """Set its `delete_time` (the first call's stays) and delete its routes. Raises NotFound."""
        raise NotImplementedError

    async def workspaces(self) -> list[Workspace]:
        """All, also deleted ones, by time of creation."""
        raise NotImplementedError

    def put_route(self, row: Route) -> "asyncio.Future[None]":
        """Add the route, or replace the one of that name."""
        raise NotImplementedError

    def delete_route(self, name: str) -> "asyncio.Future[None]":
        """No error if there is none."""
        raise NotImplementedError

    async def routes(self) -> list[Route]:
        """All, by name."""
        raise NotImplementedError

    def add_node(self, row: Node) -> "asyncio.Future[None]":
        """Raises Conflict if the address or the name is known."""
        raise NotImplementedError

    def update_node(self, row: Node) -> "asyncio.Future[None]":
        """Write all columns of a known node. Raises NotFound, Conflict (the name)."""
        raise NotImplementedError

    async def nodes(self) -> list[Node]:
        """All, also revoked ones, by name."""
        raise NotImplementedError

    def add_replicas(self, rows: Sequence[Replica]) -> "asyncio.Future[None]":
        """All or none. Raises Conflict if one is known."""
        raise NotImplementedError

    def update_replicas(self, rows: Sequence[Replica]) -> "asyncio.Future[None]":
        """Write all columns of known replicas; all or none. Raises NotFound."""
        raise NotImplementedError

    async def replicas(self) -> list[Replica]:
        """Those not known to be gone, by time of creation."""
        raise NotImplementedError

    # Tokens.

    def add_token(self, row: Token) -> "asyncio.Future[None]":
        """Raises Conflict if its id or secret is known."""
        raise NotImplementedError

    async def token(self, secret_hash: bytes) -> Token | None:
        """The token with this secret, even if it is expired, used or revoked."""
        raise NotImplementedError

    async def tokens(self) -> list[Token]:
        """All, by time of creation."""
        raise NotImplementedError

    def revoke_token(self, token_id: str, now: datetime) -> "asyncio.Future[None]":
        """Set its `revoke_time` (the first call's stays). Raises NotFound."""
        raise NotImplementedError

    def use_token(self, secret_hash: bytes, node_addr: str, now: datetime) -> "asyncio.Future[None]":
        """Spend a one-time token of a node on this node; again for the same node is no error.

        Raises Unauthenticated with words that say whether it is unknown, not a node's, revoked, expired, or used by another node.
        """
        raise NotImplementedError
