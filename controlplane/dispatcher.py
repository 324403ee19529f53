"""Brings queued tasks and free slots together. (Signatures; being filled in.)"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from controlplane.model import State
from controlplane.slots import AttemptResult, Failure, Link, Request, Response


class NewTask(msgspec.Struct, frozen=True):
    """A task to accept; everything already resolved and checked by `api` (workspace, port, path, sizes, assets)."""

    task_id: str
    workspace_uid: str
    port: int
    request: Request
    repeatable: bool = True
    btc_address: str = ""
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    user_ip: str = ""
    origin_url: str = ""
    operation: str = ""


class TaskView(msgspec.Struct, frozen=True):
    """A task as Schedule, Query and Cancel answer it."""

    task_id: str
    workspace_uid: str
    state: State
    attempt: int
    create_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    failure: Failure | None = None
    response: Response | None = None
    #: Only while QUEUED.
    queue_position: int = 0
    waiting_for: str = ""


class Dispatcher:
    """Accepts tasks, gives them out, takes their results."""

    def accept(self, new: NewTask, *, wait_s: float, cancel_on_hangup: bool = False) -> asyncio.Future[TaskView]:
        """The hot path, for Batch streams: no task is made. Cancelling the future is the caller's hang-up.

        The future resolves when the task's end is on disk or `wait_s` is over, but never before the task itself is on disk.
        Its errors: NotFound (workspace), QueueFull, Conflict (idempotency key with another request), Unavailable.
        """
        raise NotImplementedError

    async def submit(self, new: NewTask, *, wait_s: float, cancel_on_hangup: bool = False) -> TaskView:
        """`accept` for callers that can await; CancelledError in the awaiting caller is the hang-up."""
        return await self.accept(new, wait_s=wait_s, cancel_on_hangup=cancel_on_hangup)

    def ask(self, task_id: str, *, wait_s: float = 0.0) -> asyncio.Future[TaskView]:
        """The task as it is; with `wait_s` when it ends, at the latest after that time. Errors: NotFound, Unavailable."""
        raise NotImplementedError

    async def query(self, task_id: str, *, wait_s: float = 0.0) -> TaskView:
        """`ask` for callers that can await."""
        return await self.ask(task_id, wait_s=wait_s)

    async def cancel(self, task_id: str) -> TaskView:
        """End a task that has not ended; returns when that is on disk. An ended one is returned unchanged. Errors: NotFound."""
        raise NotImplementedError

    def position(self, task_id: str) -> int | None:
        """How many tasks of its workspace are before it; None unless it is queued."""
        raise NotImplementedError

    def queued(self, workspace_uid: str) -> int:
        """Tasks of the workspace that wait."""
        raise NotImplementedError

    def running(self, workspace_uid: str) -> int:
        """Tasks of the workspace that run."""
        raise NotImplementedError

    def running_on(self, replica_id: str) -> int:
        """Attempts the replica has in flight, given-up ones included; 0 means it may be stopped."""
        raise NotImplementedError

    def attempt_is_current(self, node_addr: str, attempt_id: str) -> bool:
        """May this node fetch the attempt's request and deliver its response? False once it is given up (fencing)."""
        raise NotImplementedError

    # -- what nodes say

    def node_up(self, node_addr: str, link: Link, running: Collection[str], ended: Collection[str], *, node_ip: str = "") -> None:
        """An Execute stream of the node is there and its Resume was read. A newer link replaces an older."""
        raise NotImplementedError

    def node_down(self, node_addr: str, link: Link, unsent: Collection[str] = ()) -> None:
        """The stream ended. `unsent`: attempts whose Start never left the outbox. No effect if `link` is not the current one."""
        raise NotImplementedError

    def node_lost(self, node_addr: str) -> None:
        """Do not wait for the node any longer (grace over, or revoked)."""
        raise NotImplementedError

    def held(self, node_addr: str, attempt_ids: Collection[str]) -> None:
        """What a heartbeat says the node holds; attempts that are missing for long are lost."""
        raise NotImplementedError

    def sent(self, node_addr: str, attempt_id: str) -> None:
        """The attempt's request has been sent whole to the container."""
        raise NotImplementedError

    def result(self, node_addr: str, result: AttemptResult) -> None:
        """An attempt has ended. Acknowledged on the node's link once that is on disk; a given-up attempt's at once."""
        raise NotImplementedError

    # -- what fleet and deployer say

    def set_capacity(
        self, replica_id: str, workspace_uid: str, node_addr: str, capacity: int, *, gpu_ids: Sequence[str] = ()
    ) -> None:
        """How many tasks the replica may run at once; 0 while it is not ready or draining."""
        raise NotImplementedError

    def replica_gone(self, replica_id: str) -> None:
        """Its container is no more: what it had in flight is lost with it."""
        raise NotImplementedError

    def workspace_changed(self, workspace_uid: str) -> None:
        """Its spec changed (limits)."""
        raise NotImplementedError

    def workspace_deleted(self, workspace_uid: str) -> None:
        """Queued tasks fail with WORKSPACE_DELETED, running ones finish."""
        raise NotImplementedError

    # -- life

    async def start(self) -> None:
        """Take up again what was open when the last process ended. Before anything else is called."""
        raise NotImplementedError

    async def run(self) -> None:
        """Enforce time limits and graces until cancelled."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Refuse new tasks, answer waiting callers with Unavailable, let what is being written reach the disk."""
        raise NotImplementedError
