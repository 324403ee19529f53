"""Nodes join, log in, say what is and are told what should be. Tasks and bodies go through execute.py."""

import asyncio
import math
import re
import time
from collections.abc import Callable
from typing import Final

import structlog
from ngpu.v1 import node_pb2 as pb

from controlplane.access import Access, Session
from controlplane.api import translate
from controlplane.api.gate import Caller, Stream
from controlplane.deployer import Deployer
from controlplane.dispatcher import Dispatcher
from controlplane.errors import InvalidArgument, NodeRevoked, NodeUnknown, NotFound, Unauthenticated, Unavailable
from controlplane.fleet import Fleet, Node
from controlplane.flights import Flights
from controlplane.report import Report

#: A change of what a node should run is told at once, others after it so much later, so that many go in one message.
DEBOUNCE_S: Final = 0.05
#: A wait that lasts so much longer than asked for says that we were stopped meanwhile.
STALL_S: Final = 2.0
#: Nodes report about so many at a time, rather than each when the processor has gone to sleep and forgotten the last:
#: a report of one in 1,000 nodes then takes half of the CPU. Twice as many would save a tenth of that; but a call that
#: comes in between waits for them.
TOGETHER: Final = 8
#: Moments of an interval at which nodes report, at least: none is asked to report much sooner or later than it would.
BEATS: Final = 16

#: Volumes of one report that are looked at; the wire's own limit (node.proto).
VOLUMES: Final = 1000
_ADDR: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_NAME: Final = re.compile(r"[a-z0-9.-]{1,63}")

_log = structlog.get_logger(__name__)


class Nodes:
    """Challenge, Enroll, Login and Heartbeat.

    `stopping`: whether the control plane is about to end; a session begun then would only break again.
    `report_every_s`: how often nodes are to report; `timeout_s`: one that has said nothing for so long is lost.
    """

    def __init__(
        self,
        *,
        access: Access,
        fleet: Fleet,
        deployer: Deployer,
        dispatcher: Dispatcher,
        flights: Flights,
        report_every_s: float = 5.0,
        timeout_s: float = 15.0,
        stopping: Callable[[], bool] = lambda: False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access
        self._fleet = fleet
        self._deployer = deployer
        self._dispatcher = dispatcher
        self._flights = flights
        self._report_every_s = report_every_s
        #: Heartbeat streams that are up.
        self._hearts = 0
        self._timeout_s = timeout_s
        self._stopping = stopping
        self._monotonic = monotonic

    async def challenge(self, request: pb.ChallengeRequest, caller: Caller) -> pb.ChallengeResponse:  # noqa: ARG002
        """See node.proto."""
        return pb.ChallengeResponse(nonce=self._access.challenge(_addr_of(request.node_addr)))

    async def enroll(self, request: pb.EnrollRequest, caller: Caller) -> pb.EnrollResponse:
        """See node.proto."""
        if not _NAME.fullmatch(request.name):
            raise InvalidArgument("name: must be 1 to 63 of a-z, 0-9, - and dots.")
        proof = request.proof
        addr = self._access.prove("enroll", _addr_of(proof.node_addr), proof.nonce, proof.signature)
        token = self._access.join_token(request.token)
        known = self._known(addr)
        if known is not None and known.revoke_time is not None:
            raise NodeRevoked
        node = await self._fleet.enroll_node(addr, request.name, token_id=token.id, ip=caller.ip)
        _log.info("node_enrolled", node=addr, name=node.name, token=token.id)
        return pb.EnrollResponse(name=node.name)

    async def login(self, request: pb.LoginRequest, caller: Caller) -> pb.LoginResponse:
        """See node.proto."""
        if self._stopping():
            raise Unavailable("The control plane is stopping; try again soon.", retry_after_s=1.0)
        proof = request.proof
        addr = self._access.prove("login", _addr_of(proof.node_addr), proof.nonce, proof.signature)
        node = self._known(addr)
        if node is None:
            raise NodeUnknown
        if node.revoke_time is not None:
            raise NodeRevoked
        older = self._access.session_of(addr)
        if older is not None and older.boot_id != request.boot_id:
            # A daemon that was started again; if it goes on, two daemons share one key (a cloned disk).
            _log.warning("node_session_taken_over", node=addr, ip=caller.ip)
        token = self._access.begin_session(addr, request.boot_id)
        _log.info("node_logged_in", node=addr, name=node.name, ip=caller.ip, version=request.version[:64])
        return pb.LoginResponse(session_token=token, name=node.name)

    def _known(self, addr: str) -> Node | None:
        try:
            return self._fleet.node(addr)
        except NotFound:
            return None

    async def heartbeat(self, stream: Stream[pb.HeartbeatRequest, pb.HeartbeatResponse], caller: Caller) -> None:
        """See node.proto."""
        session = session_of(caller)
        addr = session.node_addr
        with session.stream("heartbeat") as ending:
            number = self._deployer.session_up(addr, caller.ip)
            self._hearts += 1
            heart = _Heart(self, session, stream)
            try:
                async with asyncio.TaskGroup() as group:
                    helpers = [
                        group.create_task(ending.wait(), name=f"heartbeat-ending-{addr}"),
                        group.create_task(heart.answer_all(), name=f"heartbeat-writer-{addr}"),
                        group.create_task(heart.watch_desired(), name=f"heartbeat-desired-{addr}"),
                        group.create_task(heart.watch_silence(), name=f"heartbeat-silence-{addr}"),
                    ]
                    await heart.read_all()
                    for helper in helpers:
                        helper.cancel()
            finally:
                self._hearts -= 1
                self._deployer.session_down(addr, heart.goodbye, number)
                _log.info("node_heartbeat_ended", node=addr, goodbye=heart.goodbye)

    def hear(self, addr: str, report: Report) -> None:
        """Take a report in."""
        self._deployer.report(addr, report)
        self._flights.hear(addr, report.readings)
        self._dispatcher.held(addr, report.attempt_ids)

    def desired(self, addr: str) -> pb.HeartbeatResponse:
        """All that should be on a node."""
        return pb.HeartbeatResponse(
            assignments=[translate.assignment(one) for one in self._deployer.desired(addr)],
            gpu_tests=[
                pb.GpuTestOrder(gpu_id=gpu_id, number=number)
                for gpu_id, number in self._fleet.node(addr).gpu_tests.items()
            ],
        )

    def report_after_ms(self) -> int:
        """When a node that is answered now is to report next."""
        return report_after_ms(self._monotonic(), self._report_every_s, self._hearts)

    def dead(self, report: Report) -> list[str]:
        """Of the workspaces whose volumes a report names, those that are deleted or not known."""
        uids = dict.fromkeys(one.workspace_uid for one in report.volumes[:VOLUMES])
        return [uid for uid in uids if not self._lives(uid)]

    def _lives(self, workspace_uid: str) -> bool:
        try:
            workspace = self._fleet.workspace(workspace_uid)
        except NotFound:
            return False
        # By its uid only: a node must not find out what names and ids there are.
        return workspace.uid == workspace_uid and not workspace.deleted

    def desired_version(self, addr: str) -> int:
        """Changes when `desired` may have."""
        return self._fleet.node_changes.version(addr)

    async def newer_desired(self, addr: str, than: int) -> int:
        """The next version."""
        return await self._fleet.node_changes.newer(addr, than)

    def silent_for(self, since: float) -> float:
        """How much longer a node last heard at `since` may be silent, in seconds."""
        return since + self._timeout_s - self._monotonic()

    def now(self) -> float:
        """By the clock of `silent_for`."""
        return self._monotonic()

    def give_up(self, addr: str) -> None:
        """A node went silent: its session is over, and it must log in again."""
        _log.warning("node_silent", node=addr, timeout_s=self._timeout_s)
        self._access.end_session(
            addr,
            Unauthenticated(f"The session ended because nothing was heard for {self._timeout_s:g} s: log in again."),
        )


class _Heart:
    """One Heartbeat stream."""

    def __init__(
        self, nodes: Nodes, session: Session, stream: Stream[pb.HeartbeatRequest, pb.HeartbeatResponse]
    ) -> None:
        self._nodes = nodes
        self._addr = session.node_addr
        self._stream = stream
        self._heard = nodes.now()
        #: The last one.
        self._report: Report | None = None
        self._due = asyncio.Event()
        self._sequence = 0
        self._dead: list[str] = []
        self.goodbye = False

    async def read_all(self) -> None:
        """Take reports in until there are no more."""
        while (message := await self._stream.read()) is not None:
            self._heard = self._nodes.now()
            report = self._report = _report_of(message, self._report)
            self._nodes.hear(self._addr, report)
            if report.goodbye:
                self.goodbye = True
                return
            self._sequence, self._dead = message.sequence, self._nodes.dead(report)
            self._due.set()

    async def answer_all(self) -> None:
        """Answer reports, the newest where several wait, and changes of what should be."""
        answer, version = pb.HeartbeatResponse(), -1
        while True:
            await self._due.wait()
            self._due.clear()
            if version != (newest := self._nodes.desired_version(self._addr)):
                answer, version = self._nodes.desired(self._addr), newest
            answer.sequence, self._sequence = self._sequence, 0
            answer.dead_workspaces[:] = self._dead
            answer.report_after_ms = self._nodes.report_after_ms()
            await self._stream.write(answer)

    async def watch_desired(self) -> None:
        """Say anew what should be whenever it changes."""
        version = self._nodes.desired_version(self._addr)
        while True:
            version = await self._nodes.newer_desired(self._addr, version)
            self._due.set()
            await asyncio.sleep(DEBOUNCE_S)

    async def watch_silence(self) -> None:
        """Give the node up once it has been silent for too long."""
        while (left := self._nodes.silent_for(self._heard)) > 0:
            begun = self._nodes.now()
            await asyncio.sleep(left)
            if self._nodes.now() - begun > left + STALL_S:
                # It was us who stood still: what it has said meanwhile is yet to be read.
                self._heard = self._nodes.now()
        self._nodes.give_up(self._addr)


def report_after_ms(now_s: float, every_s: float, nodes: int) -> int:
    """When one of so many nodes that is answered at `now_s` is to report next.

    That is in `every_s`, a little sooner or later the first time, so that it comes with others: see TOGETHER.
    """
    beat_s = every_s / max(BEATS, nodes // TOGETHER)
    return round((every_s - math.remainder(now_s, beat_s)) * 1000)


def session_of(caller: Caller) -> Session:
    """The session of a node that calls."""
    session = caller.principal.session
    assert session is not None, "the gate lets only nodes with a session in"
    return session


def _report_of(message: pb.HeartbeatRequest, before: Report | None) -> Report:
    if message.same and before is None:
        raise InvalidArgument("same: the first report of a stream must say all.")
    try:
        return translate.report_of(message, before)
    except ValueError as error:
        raise InvalidArgument(f"The report has a value that this version does not know: {error}.") from error


def _addr_of(text: str) -> str:
    if not _ADDR.fullmatch(text):
        raise InvalidArgument("node_addr: must be 0x and 40 hex digits.")
    return text
