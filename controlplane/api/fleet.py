"""FleetService: who takes part, with what, how it fares, and why things are where they are."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

import structlog
from ngpu.v1 import fleet_pb2 as pb

from controlplane import explain, ids, rehearsal, standing
from controlplane.access import Access, Kind, KnownToken
from controlplane.api import translate
from controlplane.api.gate import Caller
from controlplane.api.paging import page
from controlplane.deployer import Deployer
from controlplane.dispatcher import Dispatcher
from controlplane.errors import InvalidArgument, NodeRevoked, NotFound
from controlplane.fleet import Fleet, Node
from controlplane.health import GpuTests, Memory, next_test_s
from controlplane.model import Attempt, Availability, Role, State, Task, Token
from controlplane.report import GpuTestState
from controlplane.store import Store

#: How long a node's token is good if nothing else is said.
JOIN_LIFETIME: Final = timedelta(hours=24)
NAME_CHARS: Final = 200

_log = structlog.get_logger(__name__)


class FleetApi:
    """All methods of the service."""

    def __init__(
        self,
        *,
        access: Access,
        fleet: Fleet,
        deployer: Deployer,
        dispatcher: Dispatcher,
        store: Store,
        clock: Callable[[], datetime],
    ) -> None:
        self._access = access
        self._fleet = fleet
        self._deployer = deployer
        self._dispatcher = dispatcher
        self._store = store
        self._clock = clock

    # Nodes.

    async def list_nodes(self, request: pb.ListNodesRequest, caller: Caller) -> pb.ListNodesResponse:  # noqa: ARG002
        """See fleet.proto."""
        nodes = self._fleet.nodes(revoked=request.revoked)
        rows, cursor = page(request, nodes, key=lambda node: (node.name, node.addr), row=self._node)
        return pb.ListNodesResponse(nodes=rows, cursor=cursor)

    async def get_node(self, request: pb.GetNodeRequest, caller: Caller) -> pb.GetNodeResponse:  # noqa: ARG002
        """See fleet.proto."""
        return pb.GetNodeResponse(node=self._node(self._find(request.node)))

    async def set_node_availability(
        self, request: pb.SetNodeAvailabilityRequest, caller: Caller
    ) -> pb.SetNodeAvailabilityResponse:
        """See fleet.proto."""
        try:
            availability = Availability(request.availability)
        except ValueError:
            raise InvalidArgument("availability: must be OPEN, CORDONED or DRAINING.") from None
        node = await self._fleet.set_availability(self._find(request.node).addr, availability)
        _log.info("node_availability_set", node=node.addr, availability=availability.name, by=caller.principal.id)
        return pb.SetNodeAvailabilityResponse(node=self._node(node))

    async def revoke_node(self, request: pb.RevokeNodeRequest, caller: Caller) -> pb.RevokeNodeResponse:
        """See fleet.proto."""
        node = await self._fleet.revoke_node(self._find(request.node).addr)
        self._access.end_session(node.addr, NodeRevoked())
        _log.info("node_revoked", node=node.addr, name=node.name, by=caller.principal.id)
        return pb.RevokeNodeResponse()

    async def test_gpus(self, request: pb.TestGpusRequest, caller: Caller) -> pb.TestGpusResponse:
        """See fleet.proto."""
        node = await self._fleet.test_gpus(self._find(request.node).addr, request.gpu_ids)
        _log.info("gpu_tests_called_for", node=node.addr, gpus=list(request.gpu_ids), by=caller.principal.id)
        return pb.TestGpusResponse(node=self._node(node))

    def _find(self, key: str) -> Node:
        try:
            return self._fleet.node(key)
        except NotFound:
            # Its own words are for nodes.
            raise NotFound(f"There is no node {key[:80]!r}; `ngpu node list` shows them.") from None

    def _node(self, node: Node) -> pb.Node:
        replicas = self._fleet.replicas_on(node.addr)
        return pb.Node(
            addr=node.addr,
            name=node.name,
            connected=node.connected,
            availability=int(node.availability),  # type: ignore[arg-type]
            revoked=node.revoke_time is not None,
            enroll_time=translate.timestamp(node.enroll_time),
            last_seen_time=translate.timestamp(node.last_seen_time),
            inventory=translate.inventory(node.inventory),
            gpu_health=[
                pb.GpuHealth(
                    gpu_id=gpu_id,
                    grade=int(health.grade),  # type: ignore[arg-type]
                    reason=health.reason,
                    test=self._test(node.memories[gpu_id]),
                )
                for gpu_id, health in node.health.items()
            ],
            replicas=len(replicas),
            running_tasks=sum(self._dispatcher.running_on(replica.id) for replica in replicas),
            ip=node.ip,
            # Replicas with shares may hold the same one.
            gpu_ids_in_use=dict.fromkeys(gpu_id for replica in replicas for gpu_id in replica.gpu_ids),
        )

    def _test(self, memory: Memory) -> pb.GpuTestStanding | None:
        tests = memory.tests
        if tests == GpuTests():
            return None
        asked = 0
        if tests.number:
            asked = GpuTestState.RUNNING if tests.running else GpuTestState.WAITING
        waits = memory.xids and tests.count and not tests.number
        return pb.GpuTestStanding(
            asked=int(asked),  # type: ignore[arg-type]
            last=int(tests.last or 0),  # type: ignore[arg-type]
            words=tests.words,
            last_end_time=translate.timestamp(self._fleet.time_of(tests.ended_s)) if tests.last else None,
            next_time=translate.timestamp(self._fleet.time_of(next_test_s(tests))) if waits else None,
        )

    # Tokens.

    async def create_token(self, request: pb.CreateTokenRequest, caller: Caller) -> pb.CreateTokenResponse:
        """See fleet.proto."""
        try:
            role = Role(request.role)
        except ValueError:
            raise InvalidArgument("role: must be OPERATOR, SERVICE or NODE.") from None
        if len(request.name) > NAME_CHARS:
            raise InvalidArgument(f"name: longer than {NAME_CHARS} characters.")
        lifetime = JOIN_LIFETIME if role is Role.NODE else None
        if request.HasField("lifetime"):
            lifetime = timedelta(seconds=translate.seconds_of(request.lifetime))
            if lifetime <= timedelta():
                raise InvalidArgument("lifetime: must be more than 0.")
        row, secret = new_token(role, request.name, now=self._clock(), lifetime=lifetime)
        await self._store.add_token(row)
        self._access.load([known(row)])
        _log.info("token_created", token=row.id, role=role.name, by=caller.principal.id)
        return pb.CreateTokenResponse(token=_token(row), secret=secret)

    async def list_tokens(self, request: pb.ListTokensRequest, caller: Caller) -> pb.ListTokensResponse:  # noqa: ARG002
        """See fleet.proto."""
        tokens = await self._store.tokens()
        rows, cursor = page(request, tokens, key=lambda row: (row.create_time.isoformat(), row.id), row=_token)
        return pb.ListTokensResponse(tokens=rows, cursor=cursor)

    async def revoke_token(self, request: pb.RevokeTokenRequest, caller: Caller) -> pb.RevokeTokenResponse:
        """See fleet.proto."""
        await self._store.revoke_token(request.id, self._clock())
        self._access.revoke(request.id)
        _log.info("token_revoked", token=request.id, by=caller.principal.id)
        return pb.RevokeTokenResponse()

    # Explain.

    async def explain(self, request: pb.ExplainRequest, caller: Caller) -> pb.ExplainResponse:
        """See fleet.proto."""
        subject = request.WhichOneof("subject")
        if subject is None:
            raise InvalidArgument("subject: give task_id or workspace.")
        own = caller.principal.id if caller.principal.kind is Kind.WORKSPACE else ""
        if subject == "task_id":
            row = await self._store.task(request.task_id)
            if row is None or own not in {"", row.workspace_uid}:
                raise NotFound("There is no such task, or it is not yours.")
            return await self._explain_task(row)
        workspace = self._fleet.workspace(request.workspace)
        if own not in {"", workspace.uid}:
            raise NotFound("There is no such workspace, or it is not yours.")
        summary, decisions = self._deployer.explain(workspace.uid)
        if doubt := standing.doubt(self._dispatcher.doubts(workspace.uid)):
            summary += f" {doubt}"
        return pb.ExplainResponse(summary=summary, decisions=[translate.decision(one) for one in decisions])

    async def plan_workspace(self, request: pb.PlanWorkspaceRequest, caller: Caller) -> pb.PlanWorkspaceResponse:  # noqa: ARG002
        """See fleet.proto."""
        planned = await self._deployer.rehearse(translate.spec_of(request.spec))
        answer = pb.PlanWorkspaceResponse(
            change=int(planned.change),  # type: ignore[arg-type]
            generation=planned.generation,
            wanted_replicas=planned.wanted,
            kept_replicas=planned.kept,
            new_replicas=planned.missing,
            fits=planned.fits,
            changed_fields=planned.fields,
            replacing_fields=planned.anew,
            summary=rehearsal.words(planned),
        )
        for step in planned.steps:
            chosen = step.decision.chosen
            answer.replicas.add(
                decision=translate.decision(step.decision),
                node_name=self._fleet.node(chosen).name if chosen else "",
                gpu_ids=step.gpu_ids,
                pulls_image=step.pulls,
                image_bytes=step.image_bytes or 0,
                replaces=step.replaces,
            )
        return answer

    async def _explain_task(self, row: Task) -> pb.ExplainResponse:
        """Each attempt with its slot, and why that one; newest first. Then why its last replica is where it is."""
        view = await self._dispatcher.query(row.id)
        ended = [
            (one.number, one.assign_time, one.replica_id, one.reason, explain.decode(one.decision_json), _outcome(one))
            for one in reversed(await self._store.attempts(row.id))
        ]
        placed = ended
        if row.state is State.RUNNING and row.assign_time is not None:
            decision = self._dispatcher.decision(row.id)
            placed = [(row.attempt, row.assign_time, row.replica_id, row.assign_reason, decision, ""), *ended]
        answer = pb.ExplainResponse()
        for number, time, replica_id, reason, decision, outcome in placed:
            chosen = self._fleet.replica(replica_id)
            name = self._fleet.node(chosen.node_addr).name if chosen is not None else ""
            answer.decisions.append(
                translate.decision(decision)
                if decision is not None
                else pb.Decision(
                    time=translate.timestamp(time),
                    subject=f"attempt {number}",
                    chosen=replica_id,
                    candidates=[pb.Candidate(id=replica_id, name=name)],
                )
            )
            on = f" on {name}" if name else ""
            answer.summary += f"Attempt {number} went to {replica_id}{on}: {reason}.{outcome} "
        if placed and (replica := await self._store.replica(placed[0][2])) is not None:
            there = explain.decode(replica.explanation_json)
            if there is not None:
                answer.decisions.append(translate.decision(there))
        if view.state is State.QUEUED:
            waits = f"It waits, {view.queue_position} before it: {view.waiting_for}."
            answer.summary = f"{waits} {answer.summary}"
        elif view.failure is not None:
            answer.summary = f"It {view.state.name.lower()}: {view.failure.message} {answer.summary}"
        answer.summary = answer.summary.strip() or f"It is {view.state.name.lower()}."
        return answer


def _outcome(attempt: Attempt) -> str:
    return f" It failed: {attempt.failure_message}" if attempt.failure_reason else ""


def new_token(role: Role, name: str, *, now: datetime, lifetime: timedelta | None = None) -> tuple[Token, str]:
    """A token's row, and its secret."""
    secret = ids.token_secret(role.name.lower())
    return (
        Token(
            id=ids.token_id(),
            secret_hash=ids.secret_hash(secret),
            role=role,
            name=name,
            create_time=now,
            expire_time=now + lifetime if lifetime is not None else None,
        ),
        secret,
    )


def known(row: Token) -> KnownToken:
    """What Access must know of a token."""
    return KnownToken(row.id, row.secret_hash, Role(row.role), row.expire_time, row.revoke_time)


def _token(row: Token) -> pb.Token:
    return pb.Token(
        id=row.id,
        role=int(row.role),  # type: ignore[arg-type]
        name=row.name,
        create_time=translate.timestamp(row.create_time),
        expire_time=translate.timestamp(row.expire_time),
        use_time=translate.timestamp(row.use_time),
        revoke_time=translate.timestamp(row.revoke_time),
    )
