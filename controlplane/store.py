"""Every read and write of rows: one method, one transaction.

Writes are put into the writer's queue at once, in the order of the calls, and give a future that is done when they are
on disk, or refused; a caller may go on meanwhile, and need not await in order. Every write may be given twice: one that
was answered with Unavailable may or may not have happened, and may be given again as it is.

Errors of every method: Unavailable (the database does not answer, its disk is full, too much waits, or the store is
closed). Writes raise it at the call if the queue is full or closed, and through the future else.
"""

import asyncio
from asyncio import Future
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import msgspec
import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane import store_fleet, store_hedges, store_jobs, store_lease, store_tasks, store_usage, store_webhooks
from controlplane.errors import Unavailable
from controlplane.migrations import check_current
from controlplane.model import (
    ENDED,
    Attempt,
    Job,
    Node,
    Price,
    Replica,
    Route,
    State,
    Task,
    Token,
    Webhook,
    WebhookSecret,
    Workspace,
)
from controlplane.store_database import connect_to, is_down, is_lost, reason, unavailable
from controlplane.store_lease import Lease
from controlplane.store_tasks import End, Page, PassedOn, TaskQuery, check_move
from controlplane.store_usage import Usage, UsageQuery
from controlplane.store_writer import Writer

__all__ = ["End", "Page", "Store", "TaskQuery"]

#: Threads that read, each with a connection of its own.
READERS: Final = 4
#: Reads that may wait or run.
READS: Final = 1000

#: Writes that never take long: the moves of a task.
_QUICK: Final = (
    store_tasks.add,
    store_tasks.add_ended,
    store_tasks.assign,
    store_tasks.finish,
    store_tasks.requeue,
    store_tasks.end_queued,
)

log = structlog.get_logger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Row = TypeVar("Row")


class Store:
    """The database, opened with `Store.open`."""

    @classmethod
    async def open(cls, url: str, lease: Lease | None = None) -> Self:
        """Open the database at `url` (`sqlite:////absolute/path`, `postgresql+psycopg://...`), which must be migrated.

        `lease`: taken; what is written is written with it, and it is renewed as long as the store is open.

        Raises Unavailable if it cannot be reached or is not migrated, ValueError for a URL that is none.
        """
        await asyncio.to_thread(check_current, url)
        return cls(url, lease)

    def __init__(self, url: str, lease: Lease | None = None) -> None:
        self._writing = connect_to(url) if lease is None else lease.engine
        self._reading = connect_to(url, connections=READERS, read_only=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._reads = 0
        self._reads_fail = False
        self._closed = False
        #: Set when a webhook has been written.
        self.webhook_news = asyncio.Event()
        in_process = self._writing.dialect.name == "sqlite"
        self._writer = Writer(
            self._writing.connect if lease is None else lease.connect, quick=_QUICK if in_process else ()
        )
        self._keeping = asyncio.create_task(lease.keep(self._renew), name="lease") if lease else None

    async def close(self) -> None:
        """Finish what is in the queue, refuse everything else, let go of the database."""
        self._closed = True
        await self._writer.close()
        if self._keeping is not None:
            self._keeping.cancel()
        await asyncio.to_thread(self._readers.shutdown)
        self._writing.dispose()
        self._reading.dispose()

    @property
    def waiting(self) -> int:
        """Writes that are not answered yet."""
        return self._writer.waiting

    # Tasks.

    def add_task(self, task: Task, *, ends_soon: bool = False) -> Future[Task | None]:
        """Record a new task: QUEUED with attempt 0, or RUNNING with attempt 1 and the columns of its assignment.

        Gives None; or, if the workspace has a task with this `idempotency_key`, that task (nothing is added), or
        Conflict if its `request_hash` is another. So a task with a key must not be started before the future is done;
        one without may. If its end is likely to come in a moment (`ends_soon`) both are written at once, which costs
        little more than one of them; at the latest the task is written HOLD_S later.
        """
        if (task.state, task.attempt) not in ((State.QUEUED, 0), (State.RUNNING, 1)):
            raise ValueError(f"a new task is not {task.state!r} with attempt {task.attempt}")
        # A copy: the caller may change its task before the writer comes to it.
        row = task.__dict__.copy()
        del row["number"]
        put = self._writer.hold if ends_soon else self._writer.put
        return put(store_tasks.add, row, key=task.id, size_bytes=len(task.request_body or b""))

    def assign(
        self, task_id: str, number: int, *, replica_id: str, node_addr: str, assign_time: datetime, reason: str
    ) -> Future[None]:
        """QUEUED -> RUNNING with attempt `number`, one more than the last. Raises StaleAttempt if it is not there."""
        move = _move(task_id, State.QUEUED, State.RUNNING) | {
            "of_attempt": number - 1,
            "attempt": number,
            "replica_id": replica_id,
            "node_addr": node_addr,
            "assign_time": assign_time,
            "assign_reason": reason,
        }
        return self._writer.put(store_tasks.assign, move, key=task_id)

    def finish(
        self, attempt: Attempt, end: End, webhook: Webhook | None = None, *, hedge: Attempt | None = None
    ) -> Future[None]:
        """RUNNING -> its end, `attempt` into the ledger, and the webhook that is to tell of it.

        `hedge`: a second attempt that was answered instead, into the ledger as well.
        Raises StaleAttempt if that attempt of the task is not the one running; the same end given again is no error.
        """
        move = _end(attempt.task_id, State.RUNNING, end) | {"of_attempt": attempt.number}
        item = move, _without_nul(attempt)
        size_bytes = len(end.response_body or b"")
        if hedge is not None:
            both = item, None if webhook is None else webhook.__dict__.copy(), _without_nul(hedge)
            writing = self._writer.put(store_hedges.finish, both, key=attempt.task_id, size_bytes=size_bytes)
            if webhook is not None:
                writing.add_done_callback(self._say_webhook)
            return writing
        if webhook is not None:
            told = item, webhook.__dict__.copy()
            writing = self._writer.put(store_webhooks.finish, told, key=attempt.task_id, size_bytes=size_bytes)
            writing.add_done_callback(self._say_webhook)
            return writing
        held = self._writer.held(attempt.task_id)
        if held is not None:
            # `passed_size` would not be counted, but is of streamed tasks only, and they are never held.
            new = {**held.item, **move}
            return self._writer.put(
                store_tasks.add_ended, (new, item[1]), key=attempt.task_id, size_bytes=size_bytes, first=held
            )
        return self._writer.put(store_tasks.finish, item, key=attempt.task_id, size_bytes=size_bytes)

    def requeue(self, attempt: Attempt) -> Future[None]:
        """RUNNING -> QUEUED, and `attempt` into the ledger. The task keeps the attempt's number until the next.

        Raises as `finish`.
        """
        move = _move(attempt.task_id, State.RUNNING, State.QUEUED) | {"of_attempt": attempt.number}
        return self._writer.put(store_tasks.requeue, (move, _without_nul(attempt)), key=attempt.task_id)

    def end_queued(self, task_id: str, end: End, webhook: Webhook | None = None) -> Future[None]:
        """QUEUED -> FAILED or CANCELLED. Raises StaleAttempt if it is not queued; the same end again is no error."""
        move = _end(task_id, State.QUEUED, end)
        if webhook is not None:
            writing = self._writer.put(store_webhooks.end_queued, (move, webhook.__dict__.copy()), key=task_id)
            writing.add_done_callback(self._say_webhook)
            return writing
        return self._writer.put(store_tasks.end_queued, move, key=task_id)

    def _say_webhook(self, _: Future[None]) -> None:
        self.webhook_news.set()

    async def task(self, task_id: str) -> Task | None:
        """The task, with its inline bodies."""
        return await self._read(store_tasks.task, task_id)

    async def attempts(self, task_id: str) -> list[Attempt]:
        """The ended attempts of a task, oldest first."""
        return await self._read(store_tasks.attempts, task_id)

    async def open_tasks(self) -> AsyncGenerator[list[Task], None]:
        """All tasks that have not ended, in order of acceptance, in pages."""
        after = 0
        while page := await self._read(store_tasks.open_page, after):
            yield page
            after = page[-1].number or 0

    async def list_tasks(self, query: TaskQuery) -> AsyncGenerator[Page, None]:
        """Tasks in order of acceptance, oldest first; complete for those accepted before the call; at least one page.

        Raises InvalidArgument if the cursor is none of ours.
        """
        last = await self._read(store_tasks.last_number)
        left = query.limit
        while True:
            page = await self._read(store_tasks.page, query, last)
            yield page
            left -= len(page.task_ids)
            if not page.cursor or left == 0:
                return
            query = msgspec.structs.replace(query, cursor=page.cursor, limit=max(left, 0))

    async def expirable_tasks(self, before: datetime, limit: int = 500) -> list[tuple[str, int]]:
        """Id and last attempt's number of tasks that ended before `before` and have their bodies still; oldest first.

        Delete their bodies from the body store, then call `expire_bodies`: in this order a crash leaves nothing behind.
        """
        return await self._read(store_tasks.expirable, before, limit)

    async def tasks_passed_on(self, since: datetime, before: datetime, limit: int = 500) -> list[PassedOn]:
        """Streamed tasks that ended between these and have, or had, bodies in the body store; oldest first."""
        return await self._read(store_tasks.passed_on, since, before, limit)

    def put_attempt(self, attempt: Attempt) -> Future[None]:
        """A second attempt into the ledger, in the place of what was said of it before."""
        return self._write(store_hedges.put, _without_nul(attempt))

    def put_job(self, row: Job) -> Future[None]:
        """Remember under which id a container works on a task. A later job of the same id takes its place."""
        return self._write(store_jobs.put, row.model_copy())

    async def job(self, workspace_uid: str, job_id: str) -> Job | None:
        """What a container of the workspace knows by that id, as long as its task's bodies are kept."""
        return await self._read(store_jobs.job, workspace_uid, job_id)

    async def jobs_of(self, task_id: str) -> list[Job]:
        """The jobs that the task has become, by attempt."""
        return await self._read(store_jobs.jobs_of, task_id)

    def expire_bodies(self, task_ids: Sequence[str], now: datetime) -> Future[None]:
        """Delete the inline bodies and the jobs of ended tasks, and set their `expire_time`."""
        return self._write(store_tasks.expire, tuple(task_ids), now)

    # Usage.

    def usage(self, query: UsageQuery) -> AsyncGenerator[list[Usage], None]:
        """What the receipts asked for add up to, in order of `query.by`, in pages; the sum of nothing is one page."""
        return self._pages(store_usage.usage, query)

    def receipts(self, query: UsageQuery) -> AsyncGenerator[list[Attempt], None]:
        """The receipts asked for, by workspace and then in order of their recording, in pages; at least one."""
        return self._pages(store_usage.receipts, query)

    async def _pages(
        self, read: Callable[[sa.Connection, UsageQuery, Row | None], list[Row]], query: UsageQuery
    ) -> AsyncGenerator[list[Row], None]:
        after: Row | None = None
        while True:
            page = await self._read(read, query, after)
            yield page
            if len(page) < store_usage.PAGE_ROWS:
                return
            after = page[-1]

    def put_price(self, row: Price) -> Future[None]:
        """Add the price, or replace that of the same model and time."""
        return self._write(store_usage.put_price, row.model_copy())

    async def prices(self) -> list[Price]:
        """All, by model and time."""
        return await self._read(store_usage.prices)

    # Webhooks.

    def keep_webhook(self, row: Webhook) -> Future[None]:
        """What came of a try. Nothing happens if a later one is known."""
        return self._writer.put(store_webhooks.keep, row.__dict__.copy(), key=row.task_id)

    def redeliver_webhook(self, task_id: str, now: datetime) -> Future[None]:
        """Have it posted once more, whatever came of it. Raises NotFound: the task has not ended, or nobody is told."""
        writing = self._write(store_webhooks.redeliver, task_id, now)
        writing.add_done_callback(self._say_webhook)
        return writing

    async def webhook(self, task_id: str) -> Webhook | None:
        """The webhook of a task that has ended, if it has one."""
        return await self._read(store_webhooks.webhook, task_id)

    async def webhooks_due(
        self,
        before: datetime,
        limit: int,
        *,
        tasks: Collection[str] = (),
        hosts: Collection[str] = (),
        workspaces: Collection[str] = (),
    ) -> list[Webhook]:
        """Webhooks to be posted before then, the longest due first; not of these tasks, hosts and workspaces."""
        read = partial(store_webhooks.due, tasks=tasks, hosts=hosts, workspaces=workspaces)
        return await self._read(read, before, limit)

    async def next_webhook_time(self, after: datetime) -> datetime | None:
        """When the first is due of those due after then."""
        return await self._read(store_webhooks.next_time, after)

    async def waiting_webhooks(self, limit: int) -> int:
        """How many are to be posted; counted up to a limit."""
        return await self._read(store_webhooks.waiting, limit)

    async def webhook_secret(self, workspace_uid: str) -> WebhookSecret | None:
        """What the workspace's webhooks are signed with, if that has been made."""
        return await self._read(store_webhooks.secret, workspace_uid)

    def add_webhook_secret(self, row: WebhookSecret) -> Future[WebhookSecret]:
        """The workspace's secret: this one, if it had none."""
        return self._write(store_webhooks.add_secret, row.model_copy())

    def put_webhook_secret(self, row: WebhookSecret) -> Future[None]:
        """Replace the workspace's secret, which it has."""
        return self._write(store_webhooks.put_secret, row.model_copy())

    # The fleet.

    def add_workspace(self, row: Workspace) -> Future[None]:
        """Raises Conflict if a living workspace has that name."""
        return self._write(store_fleet.add, [row.model_copy()])

    def update_workspace(self, row: Workspace) -> Future[None]:
        """Write all columns of a known workspace. Raises NotFound, Conflict (the name)."""
        return self._write(store_fleet.update, [row.model_copy()])

    def delete_workspace(self, uid: str, now: datetime) -> Future[None]:
        """Set its `delete_time` (the first call's stays) and delete its routes. Raises NotFound."""
        return self._write(store_fleet.delete_workspace, uid, now)

    async def workspaces(self) -> list[Workspace]:
        """All, also deleted ones, by time of creation."""
        return await self._read(store_fleet.read, Workspace, "create_time", "uid")

    def put_route(self, row: Route) -> Future[None]:
        """Add the route, or replace the one of that name."""
        return self._write(store_fleet.put_route, row.model_copy())

    def delete_route(self, name: str) -> Future[None]:
        """No error if there is none."""
        return self._write(store_fleet.delete_route, name)

    async def routes(self) -> list[Route]:
        """All, by name."""
        return await self._read(store_fleet.read, Route, "name")

    def enroll_node(self, row: Node, token_id: str) -> Future[None]:
        """Spend a node's one-time token on this node and add it, in one transaction.

        Raises Conflict if the address or the name is known; Unauthenticated, saying whether the token is unknown, not a
        node's, revoked, expired (by the node's `enroll_time`), or used by another node.
        """
        return self._write(store_fleet.enroll_node, row.model_copy(), token_id)

    def update_node(self, row: Node) -> Future[None]:
        """Write all columns of a known node. Raises NotFound, Conflict (the name)."""
        return self._write(store_fleet.update, [row.model_copy()])

    async def nodes(self) -> list[Node]:
        """All, also revoked ones, by name."""
        return await self._read(store_fleet.read, Node, "name")

    def add_replicas(self, rows: Sequence[Replica]) -> Future[None]:
        """All or none. Raises Conflict if one is known."""
        return self._write(store_fleet.add, [row.model_copy() for row in rows])

    def update_replicas(self, rows: Sequence[Replica]) -> Future[None]:
        """Write all columns of known replicas; all or none. Raises NotFound."""
        return self._write(store_fleet.update, [row.model_copy() for row in rows])

    async def replicas(self) -> list[Replica]:
        """Those not known to be gone, by time of creation."""
        return await self._read(store_fleet.replicas_there)

    async def replica(self, replica_id: str) -> Replica | None:
        """The one with that id, also if it is gone."""
        return await self._read(store_fleet.replica, replica_id)

    # Tokens.

    def add_token(self, row: Token) -> Future[None]:
        """Raises Conflict if its id or secret is known."""
        return self._write(store_fleet.add, [row.model_copy()])

    async def tokens(self) -> list[Token]:
        """All, by time of creation."""
        return await self._read(store_fleet.read, Token, "create_time", "id")

    def revoke_token(self, token_id: str, now: datetime) -> Future[None]:
        """Set its `revoke_time` (the first call's stays). Raises NotFound."""
        return self._write(store_fleet.revoke_token, token_id, now)

    # How.

    def _renew(self, renewal: store_lease.Renewal) -> Future[int]:
        # A key of its own, so that it is no barrier among the others.
        return self._writer.put(store_lease.renew, renewal, key="lease")

    def _write(
        self,
        function: Callable[Concatenate[sa.Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Future[Result]:
        def kind(connection: sa.Connection, _items: Sequence[None]) -> Sequence[Result]:
            return [function(connection, *args, **kwargs)]

        return self._writer.put(kind, None)

    async def _read(
        self,
        function: Callable[Concatenate[sa.Connection, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        if self._closed:
            raise Unavailable("The control plane is stopping.", retry_after_s=1.0)
        if self._reads >= READS:
            raise Unavailable("The database is slower than what is asked of it; try again soon.", retry_after_s=1.0)

        def read() -> Result:
            with self._reading.connect() as connection:
                return function(connection, *args, **kwargs)

        self._reads += 1
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._readers, _read_again, read)
        except SQLAlchemyError as error:
            if not is_down(error):
                raise
            if not self._reads_fail:
                log.warning("store_reads_fail", error=reason(error))
            self._reads_fail = True
            raise unavailable() from error
        finally:
            self._reads -= 1
        if self._reads_fail:
            log.info("store_reads_work_again")
            self._reads_fail = False
        return result


def _read_again(read: Callable[[], Result]) -> Result:
    """Read; once more if the connection turns out to be lost: it may have been so since the last read."""
    try:
        return read()
    except SQLAlchemyError as error:
        if not is_lost(error):
            raise
    return read()


def _move(task_id: str, before: State, after: State) -> dict[str, Any]:
    check_move(before, after)
    return {"of_task": task_id, "of_state": before, "state": after}


def _end(task_id: str, before: State, end: End) -> dict[str, Any]:
    if end.state not in ENDED:
        raise ValueError(f"a task does not end as {end.state.name}")
    return _move(task_id, before, end.state) | _without_nul(end)


def _without_nul(ending: End | Attempt) -> dict[str, Any]:
    """Its columns. PostgreSQL refuses NUL in text, and no words of a node may keep a task from ending."""
    row = msgspec.structs.asdict(ending) if isinstance(ending, End) else ending.__dict__.copy()
    for name in ("failure_reason", "failure_message"):
        row[name] = row[name].replace("\0", "")
    return row
