"""The node's session with the control plane: join, log in, say what is, take what should be, and begin anew for ever.

Containers know nothing of it: a lost session changes nothing here but the log. Any failure of one of its streams ends
the whole session, and the next begins with all that is.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Final, Protocol, TypeAlias

import grpc
import structlog
from ngpu.v1 import node_pb2

from nodedaemon import statement
from nodedaemon.bulk import Bulk
from nodedaemon.dial import (
    CALL_LIMIT_S,
    Backoff,
    Dialler,
    LinkLost,
    Stub,
    ask,
    bearer,
    read,
    reason_of,
    stub_of,
    words_of,
    write,
)
from nodedaemon.engine import Assignment, Volume
from nodedaemon.errors import EnrolRefused, NotEnrolled, Revoked, Superseded
from nodedaemon.execute import Executor
from nodedaemon.gpu_tests import GpuTest
from nodedaemon.gpus import GpuInventory, GpuReading
from nodedaemon.identity import Identity
from nodedaemon.machine import Machine
from nodedaemon.replicas import ReplicaReport

HeartbeatCall: TypeAlias = "grpc.aio.StreamStreamCall[node_pb2.HeartbeatRequest, node_pb2.HeartbeatResponse]"

log = structlog.get_logger()

#: Least time between two reports, whatever changes, but for so many in a row: a replica that comes up has news thrice.
REPORT_INTERVAL_S: Final = 0.25
REPORTS_IN_A_ROW: Final = 8
#: When to report before the control plane has said so, and the most it may ask for.
REPORT_AFTER_S: Final = 5.0
REPORT_AFTER_CAP_S: Final = 60.0
#: A control plane that has not answered a report for so long is gone, whatever TCP says.
ANSWER_LIMIT_S: Final = 20.0
#: Waits between sessions: well below the 10 s that a control plane gives a node to come back with what it runs. After a
#: session that lasted STEADY_S they begin anew.
FIRST_RETRY_S: Final = 0.1
RETRY_CAP_S: Final = 3.0
STEADY_S: Final = 30.0
#: For the control plane to hear a goodbye.
GOODBYE_LIMIT_S: Final = 2.0


class Replicas(Protocol):
    """What a session needs of the replicas of this node."""

    @property
    def version(self) -> int:
        """Counts changes."""

    def apply(self, assignments: Iterable[Assignment]) -> None:
        """All that should be."""

    def reports(self) -> tuple[ReplicaReport, ...]:
        """All that is."""

    async def changed(self, seen: int) -> int:
        """Wait for a change."""


class Gpus(Protocol):
    """What a session needs of the GPUs of this node."""

    def inventory(self) -> GpuInventory:
        """What is built in."""

    def readings(self) -> tuple[GpuReading, ...]:
        """How each is."""

    def acknowledge(self, readings: Iterable[GpuReading]) -> None:
        """The control plane has these."""


class GpuTests(Protocol):
    """What a session needs of the tests of GPUs."""

    def on_change(self, tell: Callable[[], None]) -> None:
        """Who hears of every change of what is reported."""

    def apply(self, orders: Iterable[tuple[str, int]]) -> None:
        """All that are asked for: GPU ids and numbers."""

    def reports(self) -> tuple[GpuTest, ...]:
        """As they stand."""


class Caches(Protocol):
    """What a session needs of the volumes of this node."""

    #: What its operator allows; 0: none.
    volume_limit_bytes: int

    def volumes(self) -> Sequence[Volume]:
        """All that are kept."""

    def bury(self, workspace_uids: Iterable[str]) -> None:
        """These workspaces are no more."""


class Pace:
    """One per `interval_s` in the long run, but up to `in_a_row` at once by whoever was below that before."""

    def __init__(self, interval_s: float, in_a_row: int) -> None:
        self._interval_s = interval_s
        self._in_a_row = in_a_row
        self._due_at = -inf

    def pause_s(self, now: float) -> float:
        """One was done: how long to wait, at most `interval_s`, until the next may be. Takes it that this is heeded."""
        earliest = now - self._in_a_row * self._interval_s
        self._due_at = max(self._due_at, earliest) + self._interval_s
        return max(0.0, self._due_at - now)


async def enroll(stub: Stub, identity: Identity, token: str, name: str) -> str:
    """Make the node known, with a one-time token; the name it was given.

    Raises EnrolRefused, Revoked, AioRpcError, LinkLost.
    """
    challenge = node_pb2.ChallengeRequest(node_addr=identity.address)
    nonce = (await ask(stub.Challenge(challenge, timeout=CALL_LIMIT_S))).nonce
    request = node_pb2.EnrollRequest(proof=identity.prove("enroll", nonce), token=token, name=name)
    try:
        return (await ask(stub.Enroll(request, timeout=CALL_LIMIT_S))).name
    except grpc.aio.AioRpcError as fault:
        reason, message = reason_of(fault)
        if reason == "NODE_REVOKED":
            raise Revoked from None
        if fault.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT):
            raise EnrolRefused(f"The control plane did not let this node join: {message}") from None
        raise


class Session:
    """Holds a session with the control plane. `token` is used only if the control plane does not know this node.

    `up`: a session is up now. `sessions` counts logins.
    """

    def __init__(
        self,
        *,
        dialler: Dialler,
        identity: Identity,
        boot_id: str,
        name: str,
        token: str,
        executor: Executor,
        bulk: Bulk,
        replicas: Replicas,
        gpus: Gpus,
        machine: Machine,
        caches: Caches | None = None,
        gpu_tests: GpuTests | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        self._dialler = dialler
        self._target = dialler.target
        self._identity = identity
        self._boot_id = boot_id
        self._name = name
        self._token = token
        self._executor = executor
        self._bulk = bulk
        self._replicas = replicas
        self._gpus = gpus
        self._machine = machine
        self._caches = caches
        self._gpu_tests = gpu_tests
        self._monotonic = monotonic
        self._backoff = Backoff(FIRST_RETRY_S, RETRY_CAP_S, chance=chance)
        self._answer_limit_s = answer_limit_s
        # When the next report is due if nothing happens.
        self._next_report: asyncio.TimerHandle | None = None
        # Reports that were not answered: sequence, when sent, readings in it.
        self._unanswered: deque[tuple[int, float, tuple[GpuReading, ...]]] = deque()
        # What the last report of this stream said, but for its readings; empty: there was none.
        self._said = node_pb2.HeartbeatRequest()
        # A report is due.
        self._news = asyncio.Event()
        self._leaving = asyncio.Event()
        if gpu_tests:
            gpu_tests.on_change(self.report_soon)
        self.up = False
        self.sessions = 0

    async def run(self) -> None:
        """One session after the other, until `leave`. Raises Superseded, Revoked, NotEnrolled, EnrolRefused."""
        watcher = asyncio.create_task(self._watch_replicas(), name="session: watch replicas")
        try:
            while not self._leaving.is_set():
                began = self._monotonic()
                reason = await self._once()
                if self._leaving.is_set():
                    break
                if self._monotonic() - began >= STEADY_S:
                    self._backoff.reset()
                wait_s = self._backoff.next()
                log.warning("session_lost", reason=reason, next_try_in_s=round(wait_s, 1))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._leaving.wait()
        finally:
            watcher.cancel()

    def report_soon(self) -> None:
        """Something has changed that the control plane should hear of."""
        self._news.set()

    def leave(self) -> None:
        """Say goodbye, and have `run` return."""
        self._leaving.set()
        self._news.set()

    async def _watch_replicas(self) -> None:
        seen = self._replicas.version
        while True:
            seen = await self._replicas.changed(seen)
            self._news.set()

    async def _once(self) -> str:
        """One session, from login to its end; why it ended."""
        channel = await self._dialler.reach()
        try:
            if self._dialler.target != self._target:
                self._target = self._dialler.target
                log.info("control_plane_elsewhere", address=self._target)
                await self._bulk.move(self._dialler.channel())
            stub = stub_of(channel)
            login = await self._login(stub)
            log.info("session_begun", node=self._identity.address, name=login.name)
            self.up, self.sessions = True, self.sessions + 1
            self._bulk.open(login.session_token)
            metadata = bearer(login.session_token)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._heartbeat(stub.Heartbeat(metadata=metadata)), name="session: heartbeat")
                group.create_task(self._executor.attend(stub.Execute(metadata=metadata)), name="session: execute")
        except (grpc.aio.AioRpcError, LinkLost) as fault:
            return _why([fault])
        except BaseExceptionGroup as faults:
            return _why(_leaves(faults))
        finally:
            self.up = False
            self._bulk.close()
            await channel.close()
        raise AssertionError("streams end with an error")

    async def _login(self, stub: Stub) -> node_pb2.LoginResponse:
        """Log in; join first if need be."""
        try:
            return await self._log_in(stub)
        except grpc.aio.AioRpcError as fault:
            if reason_of(fault)[0] != "NODE_UNKNOWN":
                raise
        if not self._token:
            raise NotEnrolled
        name = await enroll(stub, self._identity, self._token, self._name)
        log.info("node_joined", node=self._identity.address, name=name)
        return await self._log_in(stub)

    async def _log_in(self, stub: Stub) -> node_pb2.LoginResponse:
        challenge = node_pb2.ChallengeRequest(node_addr=self._identity.address)
        nonce = (await ask(stub.Challenge(challenge, timeout=CALL_LIMIT_S))).nonce
        request = node_pb2.LoginRequest(
            proof=self._identity.prove("login", nonce), boot_id=self._boot_id, version=self._machine.daemon_version
        )
        return await ask(stub.Login(request, timeout=CALL_LIMIT_S))

    async def _heartbeat(self, call: HeartbeatCall) -> None:
        self._unanswered.clear()
        self._said = node_pb2.HeartbeatRequest()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear(call), name="heartbeat: hear")
            group.create_task(self._tell(call), name="heartbeat: tell")

    def _report_in(self, after_s: float) -> None:
        """At the latest. An answer that is overdue is to be seen, too."""
        if self._next_report is not None:
            self._next_report.cancel()
        loop = asyncio.get_running_loop()
        self._next_report = loop.call_later(min(after_s, self._answer_limit_s), self._news.set)

    async def _tell(self, call: HeartbeatCall) -> None:
        """Report at the control plane's pace, and at once when something has changed."""
        sequence = 0
        pace = Pace(REPORT_INTERVAL_S, REPORTS_IN_A_ROW)
        while not self._leaving.is_set():
            self._news.clear()
            sequence += 1
            readings = self._gpus.readings()
            self._unanswered.append((sequence, self._monotonic(), readings))
            # Its answer will say when.
            self._report_in(REPORT_AFTER_S)
            await write(call, self._report(sequence, readings))
            await asyncio.sleep(pace.pause_s(self._monotonic()))
            await self._news.wait()
            if self._unanswered and self._monotonic() - self._unanswered[0][1] >= self._answer_limit_s:
                raise LinkLost(f"the control plane has not answered for {self._answer_limit_s:g} s")
        report = self._report(sequence + 1, self._gpus.readings())
        report.goodbye = True
        await write(call, report)
        with contextlib.suppress(asyncio.InvalidStateError):
            await call.done_writing()
        # It ends the stream when it has heard; if not, so do we.
        await asyncio.sleep(GOODBYE_LIMIT_S)
        raise LinkLost("the control plane has not said goodbye")

    async def _hear(self, call: HeartbeatCall) -> None:
        while True:
            answer = await read(call)
            if answer.sequence:
                # What else it says, as often as it likes, must not put the next report off.
                after_s = answer.report_after_ms / 1000 or REPORT_AFTER_S
                self._report_in(min(max(after_s, REPORT_INTERVAL_S), REPORT_AFTER_CAP_S))
            while self._unanswered and self._unanswered[0][0] <= answer.sequence:
                self._gpus.acknowledge(self._unanswered.popleft()[2])
            if self._caches and answer.sequence:
                self._caches.bury(answer.dead_workspaces)
            if self._gpu_tests:
                self._gpu_tests.apply((order.gpu_id, order.number) for order in answer.gpu_tests)
            if not self._leaving.is_set():
                self._replicas.apply([statement.assignment(message) for message in answer.assignments])

    def _report(self, sequence: int, readings: tuple[GpuReading, ...]) -> node_pb2.HeartbeatRequest:
        """All that is; but for readings, what is as it was said in the report before is not said again."""
        report = node_pb2.HeartbeatRequest(sequence=sequence, readings=map(statement.reading, readings))
        standing = self._standing()
        if standing == self._said:
            report.same = True
        else:
            report.MergeFrom(standing)
            self._said = standing
        return report

    def _standing(self) -> node_pb2.HeartbeatRequest:
        """What is for longer: all but readings."""
        taking = self._executor.taking
        limit = self._caches.volume_limit_bytes if self._caches else 0
        return node_pb2.HeartbeatRequest(
            inventory=statement.inventory(self._machine, self._gpus.inventory(), volume_limit_bytes=limit),
            replicas=[statement.replica(report, taking=taking) for report in self._replicas.reports()],
            images=statement.images(self._machine.images),
            attempt_ids=self._executor.held(),
            volumes=statement.volumes(self._caches.volumes() if self._caches else ()),
            gpu_tests=map(statement.gpu_test, self._gpu_tests.reports() if self._gpu_tests else ()),
        )


def _leaves(faults: BaseExceptionGroup[BaseException]) -> list[grpc.aio.AioRpcError | LinkLost]:
    """What the streams of a session ended with. Raises what is no lost link."""
    leaves: list[grpc.aio.AioRpcError | LinkLost] = []
    for fault in faults.exceptions:
        if isinstance(fault, BaseExceptionGroup):
            leaves += _leaves(fault)
        elif isinstance(fault, grpc.aio.AioRpcError | LinkLost):
            leaves.append(fault)
        else:
            raise fault
    return leaves


def _why(faults: list[grpc.aio.AioRpcError | LinkLost]) -> str:
    """Why a session ended. Raises what no further session can mend."""
    reasons = [reason_of(fault)[0] for fault in faults if isinstance(fault, grpc.aio.AioRpcError)]
    if "SUPERSEDED" in reasons:
        raise Superseded
    if "NODE_REVOKED" in reasons:
        raise Revoked
    return words_of(faults[0])
