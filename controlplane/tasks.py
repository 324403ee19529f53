"""A task as it passes through memory: what is accepted, what callers are shown, what is kept of one that has not ended.

The row on disk says QUEUED or RUNNING; a Phase says besides what is under way between two writes. FOLLOWING is the
table of where each may go. At most one write of a task is under way at a time (besides its insert, behind which the
others line up in the store's queue), so memory never runs ahead of the disk by more than one step.
"""

import asyncio
import enum
from collections.abc import Callable
from datetime import datetime
from math import inf
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import msgspec

from controlplane.fragmentation import WHOLE
from controlplane.futures import DirectFuture
from controlplane.lineup import Lineup
from controlplane.model import ENDED, Attempt, Cause, Delivery, State, Task, Told, Webhook, made
from controlplane.prices import cost_of
from controlplane.receipts import Terms
from controlplane.retries import NO_HISTORY, History
from controlplane.sizes import Features
from controlplane.slots import AttemptResult, Failure, Headers, Request, Response
from controlplane.spec import JobRule, Limits
from controlplane.store import End

#: The most urgent priority of a task; the least is -PRIORITY.
PRIORITY: Final = 5

#: A task's turn in its workspace's queue: the round, and a running number.
Turn: TypeAlias = tuple[int, int]


class NewTask(msgspec.Struct, frozen=True):
    """A task to accept; `api` has resolved and checked everything (workspace, port, path, sizes, assets).

    `repeatable`: the caller's word; without one, true if there is an idempotency key; else the workspace's.
    """

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
    #: The response is passed on as it comes, and the caller wants its head as soon as there is one.
    streamed: bool = False
    #: The replica that is asked after a job of its own; empty: any. No other could answer, and none waits for a slot.
    pin: str = ""
    #: Where its end is to be told; empty: nowhere.
    callback_url: str = ""
    #: Against other tasks of the same caller, from -PRIORITY to PRIORITY; more: sooner.
    priority: int = 0


class TaskView(msgspec.Struct, frozen=True):
    """A task as it is on disk, for the answers of Schedule, Query and Cancel."""

    task_id: str
    workspace_uid: str
    state: State
    #: The number of the current or last attempt; 0 before the first.
    attempt: int
    create_time: datetime
    start_time: datetime | None = None
    end_time: datetime | None = None
    #: Set when FAILED or CANCELLED.
    failure: Failure | None = None
    #: Set when COMPLETED; for callers of a streamed task the head while RUNNING, once its container has answered.
    response: Response | None = None
    #: Only while QUEUED: how many tasks of the workspace are before it.
    queue_position: int = 0
    #: Only while QUEUED: why, in words.
    waiting_for: str = ""
    #: Only while QUEUED: how long it will likely wait still, in seconds; 0: not known.
    expected_wait_s: float = 0.0


class Phase(enum.Enum):
    """What is under way with a task."""

    # Enum's own is Python, and each move looks into two sets.
    __hash__ = object.__hash__

    #: QUEUED, with an idempotency key: whether it is a new task is known when its insert is on disk.
    RECORDING = enum.auto()
    #: QUEUED.
    WAITING = enum.auto()
    #: QUEUED, then RUNNING: it has a slot; its start is being written and, if need be, its request read. The node is
    #: told after that: a start that is not on disk would be forgotten in a crash, and the task of a caller who has been
    #: told that it is safe would run twice.
    ASSIGNING = enum.auto()
    #: RUNNING: the node has been told.
    RUNNING = enum.auto()
    #: RUNNING: the attempt has failed; its return to the queue is being written.
    REQUEUEING = enum.auto()
    #: Its end is being written.
    ENDING = enum.auto()
    #: Over; or never was, if its insert failed.
    ENDED = enum.auto()


#: From each phase, where a task may go.
FOLLOWING: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.RECORDING: frozenset({Phase.WAITING, Phase.ENDING, Phase.ENDED}),
    Phase.WAITING: frozenset({Phase.ASSIGNING, Phase.RUNNING, Phase.ENDING, Phase.ENDED}),
    Phase.ASSIGNING: frozenset({Phase.RUNNING, Phase.REQUEUEING, Phase.ENDING, Phase.ENDED}),
    Phase.RUNNING: frozenset({Phase.REQUEUEING, Phase.ENDING, Phase.ENDED}),
    Phase.REQUEUEING: frozenset({Phase.WAITING, Phase.ENDED}),
    Phase.ENDING: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset(),
}

#: Phases in which the task's row says QUEUED and it has no slot.
UNASSIGNED: Final = frozenset({Phase.RECORDING, Phase.WAITING})


class Answer(DirectFuture[TaskView]):
    """What a caller waits for. That he cancels it is his hanging up."""

    #: Not a callback of the future's: nearly nobody hangs up, and the others need not pay for it.
    left: Callable[[], None] | None = None

    def cancel(self, msg: object = None) -> bool:
        """Hang up."""
        cancelled = super().cancel(msg)
        if cancelled and self.left is not None:
            # Later, as a callback would be: not within whatever cancels.
            self.get_loop().call_soon(self.left)
            self.left = None
        return cancelled


class _Open(msgspec.Struct, eq=False):
    """Made and changed on the hot path: a dataclass with so many fields takes five times as long to make."""

    # Nothing of a customer's belongs in a log.
    __repr__ = object.__repr__


class Waiter(_Open):
    """A caller who waits for a task. `seen`: the (attempt, state) of which it knows; any other is worth telling."""

    task: "OpenTask"
    future: Answer
    #: Monotonic seconds.
    deadline: float
    #: Its going away cancels the task.
    cancels: bool = False
    seen: tuple[int, State] | None = None
    #: The head of a response that is still coming is worth telling, too.
    streamed: bool = False


class Meter(_Open):
    """Bytes that have gone each way on a connection that has changed its protocol. Of the bytes nothing is kept."""

    request_bytes: int = 0
    response_bytes: int = 0


# In both of the following, names that end in `_at` are monotonic seconds, inf: never.


class OpenAttempt(_Open):
    """The attempt that a task has a slot for."""

    id: str
    number: int
    replica_id: str
    node_addr: str
    node_ip: str
    gpu_ids: tuple[str, ...]
    #: When its task entered the queue for it.
    queue_time: datetime
    assign_time: datetime
    reason: str
    #: Since when the node may be at work on it.
    given_at: float
    #: How long its start took to be written before the node was told of it, in seconds.
    written_s: float = 0.0
    #: It is sent ahead of its slot, for which it waits at the node at most so long, in seconds; 0: it has one.
    wait_limit_s: float = 0.0
    #: When the node should long have ended it.
    run_at: float = inf
    #: From how long on it is slow, in microseconds.
    slow_us: float = inf
    #: When to believe no longer that it goes on, and then why.
    lost_at: float = inf
    lost_by: Failure | None = None
    #: Its request has been sent whole, says the node.
    sent: bool = False
    #: The head of the response, if that is long or streamed and has begun to come.
    head: Response | None = None
    #: Its result has come: to be acknowledged once what follows from it is on disk.
    answered: bool = False
    #: Under which its container works on it by itself, once the node has said so.
    job_id: str = ""
    #: If its container has changed the protocol.
    meter: Meter | None = None
    #: When it is clear that nobody comes to read the response that `head` begins.
    unread_at: float = inf
    #: When to begin a second attempt elsewhere: see hedging.
    hedge_at: float = inf
    #: How the replicas stood when this one was chosen, those among them where its task had failed before, and for how
    #: much work; empty: there was no choice.
    lineup: Lineup = ()
    avoided: tuple[str, ...] = ()
    work: float = 1.0

    @property
    def delivery(self) -> Delivery:
        """What must be taken for granted of an attempt that its node has been told of, while it says nothing more."""
        return Delivery.SENT if self.sent else Delivery.SENT_PARTLY


class OpenTask(_Open):
    """A task that has not ended."""

    id: str
    workspace_uid: str
    workspace_name: str
    #: Order of acceptance: its place in the queue, however often it returns there.
    place: int
    port: int
    #: None: to be read from the store before a start. Not kept while it runs, nor for the whole of a long queue.
    request: Request | None
    repeatable: bool
    limits: Limits
    create_time: datetime
    accepted_at: float
    total_at: float
    phase: Phase
    #: As on disk, or in its insert.
    state: State
    #: Its insert is on disk.
    recorded: bool = False
    #: Its response is passed on as it comes.
    streamed: bool = False
    #: By which rules it may become a job of its container's.
    jobs: tuple[JobRule, ...] = ()
    #: No other replica may get it.
    pin: str = ""
    #: The one caller that it is for went away, or might: that ends it, unless its workspace says otherwise.
    cancel_on_hangup: bool = False
    #: Where its end is to be told; empty: nowhere.
    callback_url: str = ""
    #: Whose task it is among its workspace's: between callers its queue is fair. See `caller_of`.
    caller: str = ""
    #: See NewTask.
    priority: int = 0
    #: That it had last.
    turn: Turn | None = None

    #: Number of the current or last attempt.
    number: int = 0
    attempt: OpenAttempt | None = None
    #: After so many times the average it gets a second attempt, 0: it does not; that attempt while there is one; and if
    #: it was answered first.
    hedge_times: float = 0.0
    hedge: OpenAttempt | None = None
    winner: OpenAttempt | None = None
    start_time: datetime | None = None
    history: History = NO_HISTORY
    #: When it entered the queue again, after an attempt.
    queue_time: datetime | None = None
    #: Replicas on which it has failed.
    avoid: tuple[str, ...] = ()
    #: How much there is to do, by what is known of its size; 1: as much as in the workspace's average task.
    work: float = 1.0
    #: What is to be learnt from how long it takes; None: nothing.
    features: "Features | None" = None
    #: GPU time of failed attempts that the customer's side caused.
    gpu_us: int = 0

    #: What it adds to the requests held in memory for queued tasks.
    held_bytes: int = 0

    #: While it waits: when it has waited for too long, and whether it may start (a backoff is over, at `ready_at`).
    queue_at: float = inf
    ready: bool = True
    ready_at: float = inf
    #: The backoff is longer than usual, since the workspace has run so much again lately.
    held: bool = False

    #: The write that is under way, what follows when it is on disk, and when to give it to the store again.
    write: "Callable[[], asyncio.Future[None]] | None" = None
    then: "Callable[[OpenTask], None] | None" = None
    writing: "asyncio.Future[None] | None" = None
    write_at: float = inf
    #: An end that came during a write which must be over first.
    wanted: Failure | None = None
    #: What the end that is being written says.
    end: End | None = None
    failure: Failure | None = None
    response: Response | None = None

    waiters: list[Waiter] = []
    #: Streams on which the caller that it is for reads its response.
    readers: int = 0
    timer: float = inf

    def move(self, phase: Phase) -> None:
        """Into its next phase."""
        if phase not in FOLLOWING[self.phase]:
            raise AssertionError(f"task {self.id} cannot go from {self.phase.name} to {phase.name}")
        self.phase = phase

    @property
    def current(self) -> OpenAttempt:
        """Its attempt, in a phase that has one."""
        assert self.attempt is not None
        return self.attempt

    def take_waiters(self) -> list[Waiter]:
        """Those who wait; it has none then."""
        waiters, self.waiters = self.waiters, []
        return waiters

    def due(self) -> float:
        """When it needs attention next."""
        phase = self.phase
        if phase is Phase.ENDED:
            return inf
        when = self.write_at
        if phase is Phase.RUNNING:
            attempt = self.current
            when = min(when, self.total_at, attempt.run_at, attempt.lost_at, attempt.unread_at, attempt.hedge_at)
        elif phase is Phase.WAITING:
            when = min(when, self.total_at, self.queue_at, self.ready_at)
        if self.recorded:
            for waiter in self.waiters:
                when = min(when, waiter.deadline)
        return when

    def view(self, position: int = 0, waiting_for: str = "", expected_wait_s: float = 0.0) -> TaskView:
        """The task as it is on disk."""
        end = self.end if self.phase is Phase.ENDED else None
        return TaskView(
            task_id=self.id,
            workspace_uid=self.workspace_uid,
            state=self.state,
            attempt=self.number,
            create_time=self.create_time,
            start_time=self.start_time,
            end_time=None if end is None else end.end_time,
            failure=None if end is None else self.failure,
            response=None if end is None else self.response,
            queue_position=position,
            waiting_for=waiting_for,
            expected_wait_s=expected_wait_s,
        )


def caller_of(btc_address: str, user_ip: str) -> str:
    """Whose task it is among those of its workspace: the user's if one is named, else whoever called from there."""
    return btc_address or user_ip


def row_of(task: OpenTask, new: NewTask) -> Task:
    """The row of a new task, with its first attempt if it has one."""
    request, attempt = new.request, task.attempt
    return made(
        Task,
        id=task.id,
        workspace_uid=task.workspace_uid,
        state=task.state,
        create_time=task.create_time,
        start_time=task.start_time,
        port=task.port,
        method=request.method,
        path=request.path,
        query=request.query,
        request_headers_json=_to_json(request.headers),
        request_body=_inline(request),
        request_size=request.size,
        repeatable=task.repeatable,
        btc_address=new.btc_address,
        idempotency_key=new.idempotency_key,
        request_hash=new.request_hash,
        user_ip=new.user_ip,
        origin_url=new.origin_url,
        operation=new.operation,
        streamed=task.streamed,
        cancel_on_hangup=task.cancel_on_hangup,
        callback_url=task.callback_url,
        priority=task.priority,
        attempt=task.number,
        replica_id="" if attempt is None else attempt.replica_id,
        node_addr="" if attempt is None else attempt.node_addr,
        assign_time=None if attempt is None else attempt.assign_time,
        assign_reason="" if attempt is None else attempt.reason,
    )


def request_of_row(row: Task) -> Request:
    """The request that a row keeps."""
    headers = _headers_of(row.request_headers_json)
    return Request(row.method, row.path, row.query, headers, row.request_body or b"", row.request_size)


def view_of_row(row: Task, position: int = 0, waiting_for: str = "") -> TaskView:
    """The task as its row has it."""
    response = failure = None
    state = State(row.state)
    if state is State.COMPLETED:
        headers = _headers_of(row.response_headers_json)
        body = row.response_body or b""
        response = Response(row.response_status, headers, body, row.response_size, row.response_is_utf8)
    elif state in ENDED:
        failure = Failure(Cause(row.cause), row.failure_reason, row.failure_message)
    return TaskView(
        task_id=row.id,
        workspace_uid=row.workspace_uid,
        state=state,
        attempt=row.attempt,
        create_time=row.create_time,
        start_time=row.start_time,
        end_time=row.end_time,
        failure=failure,
        response=response,
        queue_position=position,
        waiting_for=waiting_for,
    )


def ledger_row(
    task: OpenTask,
    attempt: OpenAttempt,
    delivery: Delivery,
    end_time: datetime,
    *,
    passed_us: int,
    terms: Terms,
    result: AttemptResult | None,
    failure: Failure | None,
) -> Attempt:
    """The receipt of an attempt that has ended, with what its node said of it, if it did.

    Nothing in it took longer than `passed_us`, the time that has passed here, whatever the node's clock says. What the
    platform caused is shown and costs nothing.
    """
    response = None if result is None else result.response
    gpu_us = 0
    if attempt.gpu_ids:
        if result is not None:
            gpu_us = min(result.gpu_us, passed_us)
        elif failure is not None and failure.cause is Cause.CUSTOMER and delivery is not Delivery.NOT_SENT:
            # Nobody has measured it, and others may have shared the GPUs: its least share of them until now.
            gpu_us = passed_us // terms.concurrency
        gpu_us = gpu_us * terms.share // WHOLE
    is_free = failure is not None and failure.cause is Cause.PLATFORM
    return made(
        Attempt,
        task_id=task.id,
        number=attempt.number,
        replica_id=attempt.replica_id,
        node_addr=attempt.node_addr,
        node_ip=attempt.node_ip,
        gpu_ids_json=_to_json(attempt.gpu_ids),
        delivery=delivery,
        assign_time=attempt.assign_time,
        end_time=end_time,
        sent_after_us=0 if result is None else min(result.sent_after_us, passed_us),
        first_byte_after_us=0 if result is None else min(result.first_byte_after_us, passed_us),
        last_byte_after_us=0 if result is None else min(result.last_byte_after_us, passed_us),
        gpu_us=gpu_us,
        http_status=0 if response is None else response.status,
        cause=0 if failure is None else failure.cause,
        failure_reason="" if failure is None else failure.reason,
        failure_message="" if failure is None else failure.message,
        reason=attempt.reason,
        queue_time=attempt.queue_time,
        workspace_uid=task.workspace_uid,
        account=terms.account,
        gpu_model=terms.gpu_model,
        gpu_count=len(attempt.gpu_ids),
        price_nanos=terms.price_nanos,
        cost_nanos=0 if is_free else cost_of(gpu_us, terms.price_nanos),
    )


def end_of(
    state: State,
    end_time: datetime,
    gpu_us: int,
    response: Response | None,
    failure: Failure | None,
    *,
    meter: Meter | None = None,
) -> End:
    """What a task's row says of its end."""
    passed = Meter() if meter is None else meter
    if response is not None:
        return End(
            state=state,
            end_time=end_time,
            response_status=response.status,
            response_headers_json=_to_json(response.headers),
            response_body=_inline(response),
            response_size=response.size,
            passed_size=passed.request_bytes,
            response_is_utf8=response.is_utf8,
            gpu_us=gpu_us,
        )
    assert failure is not None
    return End(
        state=state,
        end_time=end_time,
        response_size=passed.response_bytes,
        passed_size=passed.request_bytes,
        gpu_us=gpu_us,
        cause=failure.cause,
        failure_reason=failure.reason,
        failure_message=failure.message,
    )


def content_type_of(row: Task) -> str:
    """The Content-Type of a row's response; empty: it has none."""
    headers = _headers_of(row.response_headers_json)
    return next((value.decode("latin-1") for name, value in headers if name.lower() == "content-type"), "")


def webhook_of(task: OpenTask, end: End) -> Webhook | None:
    """The webhook that is to tell of the task's end, if anybody is to be told."""
    if not task.callback_url:
        return None
    return Webhook(
        task_id=task.id,
        workspace_uid=task.workspace_uid,
        host=(urlsplit(task.callback_url).hostname or "").lower(),
        state=Told.WAITING,
        create_time=end.end_time,
        next_time=end.end_time,
    )


def _inline(message: Request | Response) -> bytes | None:
    """The body as a row keeps it: not if it lies in the body store."""
    return None if message.size > len(message.body) else message.body


#: Writes bytes as base64, which is how rows keep header values: HTTP does not promise UTF-8.
_to_json = msgspec.json.Encoder().encode
_headers_of = msgspec.json.Decoder(Headers).decode
