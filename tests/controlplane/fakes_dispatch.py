"""What stands around a dispatcher in its tests: a clock that is moved by hand, a fleet, nodes that obey the protocol.

The store is the real one on a SQLite file.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from math import inf
from pathlib import Path
from typing import Any, cast

from controlplane.census import Node, Replica, Workspace
from controlplane.dispatcher import Dispatcher, NewTask, TaskView
from controlplane.errors import NotFound, Unavailable
from controlplane.metrics import Metrics
from controlplane.migrations import migrate
from controlplane.model import Attempt, Cause, Delivery, State
from controlplane.receipts import Terms, TermsOf, free_of_charge
from controlplane.report import ReplicaReport, ReplicaState
from controlplane.slots import AttemptResult, Failure, Request, Response, Slots, Start
from controlplane.spec import Limits, Spec
from controlplane.store import Store

START = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
WS = "w-1"


class FakeClock:
    """Both clocks, moved together by hand."""

    def __init__(self) -> None:
        self.time = START
        self.seconds = 1000.0

    def utcnow(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        self.time += timedelta(seconds=seconds)


class FakeFleet:
    """Workspaces and replicas as a test says."""

    def __init__(self) -> None:
        self.workspaces: dict[str, Workspace] = {}
        self.replicas: dict[str, Replica] = {}
        self.reports: dict[str, ReplicaReport] = {}
        #: Workspaces that were called for, as often as they were.
        self.called: list[str] = []

    def add_workspace(self, uid: str, **limits: Any) -> None:
        spec = Spec(name=f"name-of-{uid}", image="img", ports=(80,), limits=Limits(**limits))
        self.workspaces[uid] = Workspace(uid, "1" * 24, spec, 1, START)

    def delete_workspace(self, uid: str) -> None:
        known = self.workspaces[uid]
        self.workspaces[uid] = Workspace(uid, known.id, known.spec, 1, START, delete_time=START)

    def add_replica(self, replica_id: str, uid: str, node_addr: str, state: ReplicaState = ReplicaState.READY) -> None:
        self.replicas[replica_id] = Replica(replica_id, uid, node_addr, 1, ("GPU-1",), START)
        self.reports[replica_id] = ReplicaReport(replica_id, state)

    def workspace(self, key: str) -> Workspace:
        if key not in self.workspaces:
            raise NotFound
        return self.workspaces[key]

    def replica(self, replica_id: str) -> Replica | None:
        return self.replicas.get(replica_id)

    def replicas_of(self, workspace_uid: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.workspace_uid == workspace_uid]

    def state_of(self, replica: Replica) -> ReplicaReport:
        return self.reports[replica.id]

    def node(self, key: str) -> Node:
        return Node(key, f"name-of-{key}", START)

    def call(self, workspace_uid: str) -> None:
        self.called.append(workspace_uid)


class FakeLink:
    """One Execute stream. What is put into it arrives at once, until it breaks."""

    def __init__(self, node: "FakeNode") -> None:
        self._node = node
        self.broken = False
        #: Starts that were put into it after it broke: they never arrive.
        self.unsent: list[str] = []

    def start(self, start: Start) -> None:
        if self.broken:
            self.unsent.append(start.attempt_id)
        else:
            self._node.take(start)

    def cancel(self, attempt_id: str) -> None:
        if not self.broken:
            self._node.cancelled.append(attempt_id)

    def ack(self, attempt_id: str) -> None:
        if not self.broken:
            self._node.acked.append(attempt_id)
            self._node.ended.pop(attempt_id, None)


class FakeNode:
    """A node daemon: keeps what it was given until it is acknowledged, whatever happens to its streams."""

    def __init__(self, world: "World", addr: str) -> None:
        self._world = world
        self.addr = addr
        self.link: FakeLink | None = None
        self.running: dict[str, Start] = {}
        #: Came ahead of their slot, and wait for it.
        self.ahead: dict[str, Start] = {}
        self.ended: dict[str, AttemptResult] = {}
        self.capacity: dict[str, int] = {}
        #: Everything ever given, cancelled, acknowledged; in order.
        self.given: list[str] = []
        self.cancelled: list[str] = []
        self.acked: list[str] = []
        #: Attempts that ended without a byte having reached a container.
        self.unsent: set[str] = set()
        self._news = asyncio.Event()

    @property
    def dispatcher(self) -> Dispatcher:
        return self._world.dispatcher

    def take(self, start: Start) -> None:
        if start.attempt_id in self.given:
            return
        self.given.append(start.attempt_id)
        self._news.set()
        if start.concurrency and self._at_work(start) >= start.concurrency:
            self.ahead[start.attempt_id] = start
            here = [other for other in self.ahead.values() if other.replica_id == start.replica_id]
            assert len(here) <= self.capacity[start.replica_id], "more than one ahead for each slot"
        else:
            self.running[start.attempt_id] = start
            assert self._at_work(start) <= self.capacity[start.replica_id], "more than the replica can run"

    def _at_work(self, start: Start) -> int:
        return sum(other.replica_id == start.replica_id for other in self.running.values())

    async def has(self, *attempt_ids: str) -> None:
        """Wait until it has been given these: some follow from reads, which nothing else shows the end of."""
        async with asyncio.timeout(30):
            while not set(attempt_ids) <= set(self.given):
                self._news.clear()
                await self._news.wait()

    def connect(self) -> None:
        """A new Execute stream: says all it holds, then sends the results again."""
        self.link = FakeLink(self)
        running = [*self.running, *self.ahead]
        self.dispatcher.node_up(self.addr, self.link, running, list(self.ended), node_ip="192.0.2.1")
        for result in list(self.ended.values()):
            self.dispatcher.result(self.addr, result)

    def break_link(self) -> FakeLink:
        """Nothing passes any more, and nobody has noticed yet."""
        assert self.link is not None
        self.link.broken = True
        return self.link

    def disconnect(self) -> None:
        """The stream breaks and the control plane sees it."""
        link = self.break_link()
        self.link = None
        self.dispatcher.node_down(self.addr, link, link.unsent)

    def serve(self, replica_id: str, capacity: int = 1, uid: str = WS) -> None:
        """The replica is ready there."""
        self._world.fleet.add_replica(replica_id, uid, self.addr)
        self.capacity[replica_id] = capacity
        self.dispatcher.set_capacity(replica_id, uid, self.addr, capacity, gpu_ids=("GPU-1",))

    def answer(
        self, attempt_id: str, body: bytes = b"done", *, status: int = 200, ran_us: int = 0, waited_us: int = 0
    ) -> None:
        """The container answers, after so long of its own (0: that is not told); before, it waited for its slot."""
        response = Response(status, (("content-type", b"text/plain"),), body, len(body), True)
        self._end(
            AttemptResult(
                attempt_id,
                Delivery.ANSWERED,
                response=response,
                last_byte_after_us=ran_us,
                gpu_us=10**9,
                waited_us=waited_us,
            )
        )

    def fail(
        self,
        attempt_id: str,
        reason: str = "CONNECTION_CLOSED",
        *,
        delivery: Delivery = Delivery.SENT,
        cause: Cause = Cause.PLATFORM,
    ) -> None:
        """The attempt ends without an answer."""
        self._end(
            AttemptResult(attempt_id, delivery, failure=Failure(cause, reason, f"It was {reason}."), gpu_us=10**9)
        )

    def give_back(self, attempt_id: str) -> None:
        """It has waited for its slot for too long."""
        self.unsent.add(attempt_id)
        self.fail(attempt_id, "BUSY", delivery=Delivery.NOT_SENT)

    def heed_cancels(self) -> None:
        """End what was cancelled."""
        for attempt_id in self.cancelled:
            if attempt_id in self.running:
                self.fail(attempt_id, "CANCELLED", cause=Cause.CUSTOMER)
            elif attempt_id in self.ahead:
                self.unsent.add(attempt_id)
                self.fail(attempt_id, "CANCELLED", delivery=Delivery.NOT_SENT, cause=Cause.CUSTOMER)

    def _end(self, result: AttemptResult) -> None:
        self.running.pop(result.attempt_id, None)
        self.ahead.pop(result.attempt_id, None)
        for attempt_id, start in list(self.ahead.items()):
            if self._at_work(start) < start.concurrency:
                self.running[attempt_id] = self.ahead.pop(attempt_id)
        self.ended[result.attempt_id] = result
        if self.link is not None and not self.link.broken:
            self.dispatcher.result(self.addr, result)


class FlakyStore:
    """A store whose writes can be made to fail: they are not done, though their futures cannot know."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.down = False
        #: Of the next write: it is done, and its caller is told that it may not be.
        self.unsure = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in {"add_task", "assign", "finish", "requeue", "end_queued", "put_job", "put_attempt"}:
            return method

        def write(*args: Any, **kwargs: Any) -> "asyncio.Future[Any]":
            if self.unsure:
                self.unsure = False
                method(*args, **kwargs).add_done_callback(lambda done: done.exception())
            elif not self.down:
                return method(*args, **kwargs)  # type: ignore[no-any-return]
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(Unavailable())
            return future

        return write


class FakeRecorder:
    """Remembers what was to be kept: (attempt, kind)."""

    def __init__(self) -> None:
        self.slow_s = inf
        self.kept: list[tuple[str, str]] = []

    def keep(self, row: Attempt, kind: str) -> None:
        self.kept.append((f"{row.task_id}.{row.number}", kind))


class World:
    """A control plane's dispatcher and all around it; `restart` is kill -9 and a new start."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.clock = FakeClock()
        self.fleet = FakeFleet()
        self.fleet.add_workspace(WS)
        self.nodes: dict[str, FakeNode] = {}
        self.numbers = 0
        #: How much of queued tasks' requests is kept in memory, from the next start on.
        self.held_bytes = 1 << 20
        #: On which terms attempts run, for their receipts.
        self.terms: TermsOf = free_of_charge
        self.recorder = FakeRecorder()
        self.metrics = Metrics()
        self.store: Store
        self.flaky: FlakyStore
        self.dispatcher: Dispatcher
        self._runner: asyncio.Task[None]

    async def begin(self) -> None:
        self.store = await Store.open(self._url)
        self.flaky = FlakyStore(self.store)
        self.dispatcher = Dispatcher(
            cast(Store, self.flaky),
            Slots(),
            self.fleet,
            clock=self.clock.utcnow,
            monotonic=self.clock.monotonic,
            jitter=lambda: 0.0,
            terms=self._terms,
            held_bytes=self.held_bytes,
            recorder=self.recorder,
            metrics=self.metrics,
            account_queue_length=10,
        )
        await self.dispatcher.start()
        self._runner = asyncio.create_task(self.dispatcher.run(), name="dispatcher")

    def _terms(self, *asked: Any) -> Terms:
        return self.terms(*asked)

    async def kill(self) -> None:
        """The process is gone; nodes do not know it yet. What it wrote is on disk, what it had in mind is lost."""
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)
        for node in self.nodes.values():
            if node.link is not None:
                node.link.broken = True
                node.link = None
        await self.store.close()

    async def restart(self) -> None:
        await self.kill()
        await self.begin()
        for node in self.nodes.values():
            for replica_id, capacity in node.capacity.items():
                uid = self.fleet.replicas[replica_id].workspace_uid
                self.dispatcher.set_capacity(replica_id, uid, node.addr, capacity, gpu_ids=("GPU-1",))

    def node(self, addr: str, **replicas: int) -> FakeNode:
        """A connected node with replicas of WS: id=capacity."""
        node = self.nodes[addr] = FakeNode(self, addr)
        node.connect()
        for replica_id, capacity in replicas.items():
            node.serve(replica_id, capacity)
        return node

    def new(self, *, uid: str = WS, body: bytes = b"body", **fields: Any) -> NewTask:
        self.numbers += 1
        request = Request("POST", "/run", "", (("x", b"\xff"),), body, len(body))
        return NewTask(f"t{self.numbers}", uid, 80, request, **fields)

    def submit(self, new: NewTask | None = None, *, wait_s: float = 1e9, **options: Any) -> "asyncio.Future[TaskView]":
        return self.dispatcher.accept(new or self.new(), wait_s=wait_s, **options)

    async def settle(self) -> None:
        """Until everything that was written is on disk and what follows from it was done."""
        while True:
            # In its turn behind all that was written before.
            await self.store.expire_bodies((), START)
            await asyncio.sleep(0)
            if not self.store.waiting:
                return

    async def advance(self, seconds: float) -> None:
        """Time passes, and what follows from it is on disk."""
        self.clock.advance(seconds)
        self.dispatcher.tick()
        await self.settle()

    async def state(self, task_id: str) -> State:
        row = await self.store.task(task_id)
        assert row is not None
        return State(row.state)


@asynccontextmanager
async def a_world(template: Path, directory: Path) -> AsyncIterator[World]:
    """On a copy of a migrated database."""
    path = directory / "ngpu.db"
    shutil.copy(template, path)
    world = World(f"sqlite:///{path}")
    await world.begin()
    yield world
    await world.kill()


def migrated(directory: Path) -> Path:
    """A migrated database to make copies of: migrating takes longer than most tests."""
    path = directory / "ngpu.db"
    migrate(f"sqlite:///{path}")
    return path
