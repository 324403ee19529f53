"""No open door: every method, every kind of caller; and what a caller is told when something is wrong."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ngpu import wire
from ngpu.v1 import asset_pb2, fleet_pb2, http_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.access import Access, Kind
from controlplane.api.gate import ROLES, Caller, Gate, Stream, ip_of
from controlplane.api.server import SERVICES, Server
from controlplane.errors import Unavailable
from tests.wire.house import DEADLINE_S, RICH, Client, House, error_of, house, refused, request
from tests.wire.node import Node

METHODS = {method.full_name: method for service in SERVICES for method in service.methods}

#: Written out once more, so that a slip in the table is a failing test: who may call what.
ALL = {"operator", "service", "workspace"}
MAY: dict[str, set[str]] = {
    "TaskService": ALL,
    "AssetService": ALL,
    "WorkspaceService": {"operator"},
    "WorkspaceService.GetWorkspace": ALL,
    "WorkspaceService.WatchWorkspace": ALL,
    "WorkspaceService.ScaleWorkspace": {"operator", "workspace"},
    "WorkspaceService.ListRoutes": {"operator", "service"},
    "NodeService": {"node"},
    "NodeService.Challenge": {"nobody", "stranger", "join", "node", *ALL},
    "NodeService.Enroll": {"nobody", "stranger", "join", "node", *ALL},
    "NodeService.Login": {"nobody", "stranger", "join", "node", *ALL},
    "FleetService": {"operator"},
    "WorkspaceService.GetWebhookSecret": {"operator", "workspace"},
    "WorkspaceService.RotateWebhookSecret": {"operator", "workspace"},
    "FleetService.ListNodes": {"operator", "service"},
    "FleetService.GetNode": {"operator", "service"},
    "FleetService.Explain": {"operator", "workspace"},
    "FleetService.PlanWorkspace": {"operator"},
    "UsageService": {"operator", "workspace"},
    "UsageService.SetPrice": {"operator"},
}
CALLERS = ("nobody", "stranger", "join", "workspace", "service", "operator", "node")


def may(method: str) -> set[str]:
    service, name = method.removeprefix("ngpu.v1.").split(".")
    return MAY.get(f"{service}.{name}", MAY[service])


def test_every_method_has_a_line_in_the_table_and_no_line_is_left_over() -> None:
    assert set(ROLES) == set(METHODS)
    assert {kind for kinds in ROLES.values() for kind in kinds} == set(Kind)


async def call(client: Client, method: str) -> grpc.aio.AioRpcError | None:
    """Call it with nothing in the request. The error, or None if it answered."""
    descriptor = METHODS[method]
    service, _, name = method.rpartition(".")
    request_class, answer_class = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
    kind = {
        (False, False): client.channel.unary_unary,
        (False, True): client.channel.unary_stream,
        (True, False): client.channel.stream_unary,
        (True, True): client.channel.stream_stream,
    }[descriptor.client_streaming, descriptor.server_streaming]
    stub: Any = kind(f"/{service}/{name}", request_class.SerializeToString, answer_class.FromString)
    try:
        if descriptor.client_streaming:
            running = stub(metadata=client.auth, timeout=DEADLINE_S)
            await running.done_writing()
        else:
            running = stub(request_class(), metadata=client.auth, timeout=DEADLINE_S)
        if descriptor.server_streaming:
            await running.read()
            running.cancel()
        else:
            await running
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_each_role_opens_what_it_should_and_nothing_else(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    node = Node(there)
    await node.join()
    await node.login()
    clients = {
        "nobody": there.client(None),
        "stranger": there.client("ngpu_operator_" + "A" * 43),
        "join": there.client(await there.operator.join_token()),
        "workspace": there.client(workspace.id),
        "service": there.bridge,
        "operator": there.operator,
        "node": node.client,
    }
    wrong = []
    for method in sorted(METHODS):
        for who in CALLERS:
            error = await call(clients[who], method)
            if who in may(method):
                # Past the gate: an answer, or a complaint about the empty request.
                passed = error is None or error_of(error).reason not in {"UNAUTHENTICATED", "FORBIDDEN"}
                # These look at a signature themselves.
                passed = passed or method.endswith(("Enroll", "Login"))
                if not passed:
                    wrong.append((method, who, "was refused", error))
            elif error is None or error.code() is not (
                grpc.StatusCode.UNAUTHENTICATED if who in {"nobody", "stranger"} else grpc.StatusCode.PERMISSION_DENIED
            ):
                wrong.append((method, who, "was let in", error))
    assert wrong == []


async def test_revoked_token_is_refused_at_once_also_on_streams_that_are_open(there: House) -> None:
    made = await there.operator.fleet.CreateToken(
        fleet_pb2.CreateTokenRequest(role=fleet_pb2.ROLE_SERVICE, name="front"), metadata=there.operator.auth
    )
    front = there.client(made.secret)
    batch = front.tasks.Batch(metadata=front.auth, timeout=DEADLINE_S)
    await batch.write(pb.BatchRequest(calls=[pb.Call(id=1, query=pb.QueryRequest(task_id="x"))]))
    assert (await batch.read()).answers[0].error.reason == "NOT_FOUND"
    revoke = fleet_pb2.RevokeTokenRequest(id=made.token.id)
    for _ in range(2):
        await there.operator.fleet.RevokeToken(revoke, metadata=there.operator.auth)
    with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "revoked"):
        await front.tasks.Query(pb.QueryRequest(task_id="x"), metadata=front.auth)
    with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "revoked"):
        await batch.write(pb.BatchRequest(calls=[pb.Call(id=2, query=pb.QueryRequest(task_id="x"))]))
        await batch.read()
    with refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"):
        await there.operator.fleet.RevokeToken(fleet_pb2.RevokeTokenRequest(id="t-0"), metadata=there.operator.auth)


async def test_operator_who_has_locked_himself_out_gets_in_after_a_restart(tmp_path: Path) -> None:
    async with house(tmp_path) as there:
        listing = await there.operator.fleet.ListTokens(fleet_pb2.ListTokensRequest(), metadata=there.operator.auth)
        old = there.operator.credential
        for token in sorted(listing.tokens, key=lambda token: token.role == fleet_pb2.ROLE_OPERATOR):
            await there.operator.fleet.RevokeToken(
                fleet_pb2.RevokeTokenRequest(id=token.id), metadata=there.operator.auth
            )
    async with house(tmp_path) as there:
        assert there.operator.credential != old
        listing = await there.operator.fleet.ListTokens(fleet_pb2.ListTokensRequest(), metadata=there.operator.auth)
        # What an operator has taken away from others stays taken away.
        assert len(listing.tokens) == 3
        with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "revoked"):
            await there.bridge.tasks.Query(pb.QueryRequest(task_id="x"), metadata=there.bridge.auth)


async def test_health_is_open_and_says_no_while_stopping(there: House) -> None:
    health: Any = health_pb2_grpc.HealthStub(there.client(None).channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "ngpu.v1.TaskService", "ngpu.v1.NodeService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
        assert answer.status == serving
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    assert (await watch.read()).status == serving
    there.stop.set()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_names_every_service(there: House) -> None:
    channel: Any = there.client(None).channel
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection.ServerReflectionInfo(timeout=DEADLINE_S)
    await asked.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
    named = {service.name for service in (await asked.read()).list_services_response.service}
    await asked.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="ngpu.v1.TaskService"))
    assert (await asked.read()).file_descriptor_response.file_descriptor_proto
    await asked.done_writing()
    assert {service.full_name for service in SERVICES} <= named
    assert "grpc.health.v1.Health" in named


async def test_message_that_is_too_large_is_refused(there: House) -> None:
    client = there.client(there.bridge.credential)
    big = request(body=b"x" * (wire.MESSAGE_BYTES + 1))
    channel = grpc.aio.insecure_channel(there.address, options=[("grpc.max_send_message_length", -1)])
    stub: Any = channel.unary_unary(
        "/ngpu.v1.TaskService/Schedule", pb.ScheduleRequest.SerializeToString, pb.ScheduleResponse.FromString
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(big, metadata=client.auth, timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await channel.close()


async def test_method_that_is_none_is_said_to_be_none(there: House) -> None:
    stub: Any = there.operator.channel.unary_unary("/ngpu.v1.TaskService/Steal", lambda _: b"", lambda data: data)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(None, metadata=there.operator.auth, timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


class Broken:
    """Serves AssetService, as a programmer with a bad day would."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def check_address(self, request: asset_pb2.CheckAddressRequest, caller: Caller) -> None:
        raise self.error


class Anything:
    def __getattr__(self, name: str) -> object:
        return self


async def answer_of(error: Exception, metadata: tuple[tuple[str, str], ...] = ()) -> tuple[Gate, http_pb2.Error]:
    """What a caller hears when a method raises `error`."""
    access = Access(workspace_of={"1": "w-1"}.get)
    gate = Gate(access, new_request_id=lambda: "made-up-id")
    others: dict[str, list[object]] = {service.name: [Anything()] for service in SERVICES}
    server = Server(gate, {**others, "AssetService": [Broken(error)]})
    address = await server.start("127.0.0.1:0")
    client = Client(address, "1")
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.assets.CheckAddress(
                asset_pb2.CheckAddressRequest(address=RICH), metadata=(*client.auth, *metadata), timeout=DEADLINE_S
            )
        return gate, error_of(caught.value)
    finally:
        await client.channel.close()
        await server.stop(0)


async def test_what_nobody_foresaw_is_logged_and_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    gate, told = await answer_of(ValueError("the secret is 42"))
    assert told.reason == "INTERNAL"
    assert "made-up-id" in told.message
    assert "42" not in told.message
    assert gate.calls["CheckAddress", "INTERNAL"] == 1
    assert "the secret is 42" in "".join(capsys.readouterr())


async def test_callers_request_id_leads_to_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    _, told = await answer_of(ValueError("odd"), ((wire.REQUEST_ID, "abc-123"),))
    assert "abc-123" in told.message
    assert "abc-123" in "".join(capsys.readouterr())


async def test_first_error_of_a_group_is_the_one_told() -> None:
    group = ExceptionGroup("g", [ExceptionGroup("h", [Unavailable("Try again.", retry_after_s=1.5)])])
    _, told = await answer_of(group)
    assert (told.reason, told.message, told.retry_after_ms) == ("UNAVAILABLE", "Try again.", 1500)


class Torn:
    """Answers a Batch stream, and fails while its first answer is being sent."""

    async def batch(self, stream: Stream[pb.BatchRequest, pb.BatchResponse], caller: Caller) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(stream.write(pb.BatchResponse()))
            await asyncio.sleep(0)
            raise Unavailable("Try again.")


async def test_stream_that_fails_while_its_first_answer_is_sent_ends_all_the_same() -> None:
    gate = Gate(Access(workspace_of={"1": "w-1"}.get))
    others: dict[str, list[object]] = {service.name: [Anything()] for service in SERVICES}
    server = Server(gate, {**others, "TaskService": [Torn(), Anything()]})
    client = Client(await server.start("127.0.0.1:0"), "1")
    try:
        for _ in range(50):
            stream = client.tasks.Batch(metadata=client.auth, timeout=DEADLINE_S)
            await stream.write(pb.BatchRequest())
            with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"):
                while await stream.read() is not grpc.aio.EOF:
                    pass
    finally:
        await client.channel.close()
        await server.stop(0)


def test_method_that_nobody_serves_stops_the_start() -> None:
    gate = Gate(Access(workspace_of=lambda _: None))
    with pytest.raises(AttributeError, match="CheckAddress"):
        gate.guard(asset_pb2.DESCRIPTOR.services_by_name["AssetService"], [object()])


@pytest.mark.parametrize(
    ("peer", "ip"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:[::1]:5000", "::1"),
        ("unix:/run/ngpu.sock", ""),
        ("", ""),
    ],
)
def test_peer_is_read(peer: str, ip: str) -> None:
    assert ip_of(peer) == ip
