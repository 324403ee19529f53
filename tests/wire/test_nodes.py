"""Nodes join, log in, report and are told: sessions begin, are superseded, go silent and end."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from ngpu.v1 import fleet_pb2, node_pb2, workspace_pb2

from controlplane import access as access_module
from controlplane.api.nodes import Nodes, report_after_ms
from controlplane.errors import Unavailable
from tests.wire.house import DEADLINE_S, House, error_of, house, refused, until
from tests.wire.node import GIB, Node

UNAUTHENTICATED = (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
SUPERSEDED = (grpc.StatusCode.ABORTED, "SUPERSEDED")
REVOKED = (grpc.StatusCode.PERMISSION_DENIED, "NODE_REVOKED")
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


async def seen(there: House, key: str) -> fleet_pb2.Node:
    answer = await there.operator.fleet.GetNode(fleet_pb2.GetNodeRequest(node=key), metadata=there.operator.auth)
    return answer.node  # type: ignore[no-any-return]


async def test_node_joins_once_with_a_token(there: House) -> None:
    token = await there.operator.join_token()
    node = Node(there, 1)
    assert await node.join(token) == "node-1"
    # Again by the same key: an answer that was lost on the way must not shut it out.
    assert await node.join(token) == "node-1"
    with refused(*UNAUTHENTICATED, "used"):
        await Node(there, 2).join(token)
    known = await seen(there, node.addr)
    assert (known.addr, known.name, known.connected, known.ip) == (node.addr, "node-1", False, "127.0.0.1")
    assert (await seen(there, node.addr.lower())).name == "node-1"


async def test_name_that_is_taken_is_made_another(there: House) -> None:
    first, second = Node(there, 1), Node(there, 2)
    second.name = first.name
    await first.join()
    assert await second.join() == "node-1-2"


@pytest.mark.parametrize("name", ["", "Upper", "a b", "x" * 64, "ü", "a/b"])
async def test_name_must_be_one(there: House, name: str) -> None:
    node = Node(there)
    node.name = name
    with refused(*INVALID, "name"):
        await node.join()


async def test_token_that_will_not_do(there: House) -> None:
    node = Node(there)
    for token in ("", "nonsense", there.operator.credential or "", there.bridge.credential or ""):
        with refused(*UNAUTHENTICATED, "token"):
            await node.join(token)
    answer = await there.operator.fleet.CreateToken(
        fleet_pb2.CreateTokenRequest(role=fleet_pb2.ROLE_NODE), metadata=there.operator.auth
    )
    await there.operator.fleet.RevokeToken(
        fleet_pb2.RevokeTokenRequest(id=answer.token.id), metadata=there.operator.auth
    )
    with refused(*UNAUTHENTICATED, "revoked"):
        await node.join(answer.secret)


async def test_stopping_control_plane_begins_no_session() -> None:
    unused: Any = None
    nodes = Nodes(
        access=unused, fleet=unused, deployer=unused, dispatcher=unused, flights=unused, stopping=lambda: True
    )
    with pytest.raises(Unavailable, match="is stopping"):
        await nodes.login(node_pb2.LoginRequest(), unused)


async def test_proof_must_hold(there: House) -> None:
    node, other = Node(there, 1), Node(there, 2)
    await node.join()

    async def login(proof: node_pb2.KeyProof) -> None:
        await node.client.nodes.Login(node_pb2.LoginRequest(proof=proof, boot_id="b"), timeout=DEADLINE_S)

    good = await node.proof("login")
    await login(good)
    with refused(*UNAUTHENTICATED, "nonce"):
        await login(good)
    with refused(*UNAUTHENTICATED, "signature"):
        await login(await node.proof("enroll"))
    stolen = await other.proof("login")
    stolen.node_addr = node.addr
    with refused(*UNAUTHENTICATED, "nonce"):
        await login(stolen)
    for addr in ("", "0x12", node.addr + "0", "x" * 1000):
        with refused(*INVALID, "node_addr"):
            await node.client.nodes.Challenge(node_pb2.ChallengeRequest(node_addr=addr))
        with refused(*INVALID, "node_addr"):
            await login(node_pb2.KeyProof(node_addr=addr))


async def test_stranger_is_told_to_enrol(there: House) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "NODE_UNKNOWN", "ngpu-node join"):
        await Node(there).login()


async def test_too_many_challenges_are_refused(there: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "NONCES", 3)
    node = Node(there)
    for _ in range(3):
        await node.proof("login")
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"):
        await node.proof("login")


async def test_report_is_shown(there: House) -> None:
    node = Node(there, gpus=2)
    await node.join()
    async with node.up():
        await until_connected(there, node)
        known = await seen(there, "node-1")
        assert [gpu.model for gpu in known.inventory.gpus] == ["NVIDIA A100"] * 2
        assert [health.grade for health in known.gpu_health] == [fleet_pb2.GRADE_OK] * 2
        assert known.inventory.memory_bytes == 512 * GIB
        assert known.ip == "127.0.0.1"
        assert known.last_seen_time.seconds


async def until_connected(there: House, node: Node, connected: bool = True) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            known = await seen(there, node.addr)
            if known.connected is connected and (known.inventory.cpus or not connected):
                return


async def test_node_is_told_what_to_run_whenever_it_changes(there: House) -> None:
    node = Node(there, gpus=1)
    await node.join()
    spec: dict[str, Any] = {
        "env": {"TOKEN": "secret"},
        "registry": workspace_pb2.RegistryCredentials(username="u", password="p"),
        "gpu": workspace_pb2.GpuNeed(model="a100", count=1),
    }
    async with node.up():
        workspace = await there.operator.workspace("sd", **spec)
        await there.operator.ready("sd")
        (assignment,) = node.assignments
        assert assignment.workspace_name == "sd"
        assert list(assignment.gpu_ids) == ["GPU-node-1-0"]
        assert (assignment.spec.env["TOKEN"], assignment.spec.registry.password) == ("secret", "p")
        assert assignment.spec_hash
        # The credential stays here.
        assert workspace.id not in str(assignment)
        await there.operator.workspaces.ScaleWorkspace(
            workspace_pb2.ScaleWorkspaceRequest(workspace="sd", replicas=0), metadata=there.operator.auth
        )
        await until(lambda: not node.assignments)


async def test_reports_are_answered_by_their_number(there: House) -> None:
    node = Node(there)
    await node.join()
    await node.login()
    call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
    for sequence in (1, 7):
        await call.write(node.report(sequence))
        answer = await call.read()
        assert answer.sequence == sequence
        assert answer.report_after_ms == pytest.approx(5000, rel=0.04)
    call.cancel()


@pytest.mark.parametrize(("nodes", "moments"), [(100, 16), (400, 50), (10_000, 1250)])
def test_nodes_report_some_at_a_time_each_as_often_as_it_should(nodes: int, moments: int) -> None:
    heard_s = []
    for number in range(nodes):
        joined_s = 1000 + 5.0 * number / nodes
        first_ms = report_after_ms(joined_s, 5.0, nodes)
        assert first_ms == pytest.approx(5000, rel=0.04)
        heard_s.append(joined_s + first_ms / 1000)
        # From then on every 5 s, though neither its line nor its clock is always the same.
        assert report_after_ms(heard_s[-1] + 0.001, 5.0, nodes) == pytest.approx(4999, abs=1)
        assert report_after_ms(heard_s[-1] - 0.001, 5.0, nodes) == pytest.approx(5001, abs=1)
    pauses = [after - before for before, after in pairwise(sorted(heard_s)) if after - before > 0.002]
    assert len(pauses) in (moments - 1, moments)
    assert pauses == pytest.approx([5.0 / moments] * len(pauses), abs=0.002)


async def test_report_may_leave_out_what_is_as_before(there: House) -> None:
    node = Node(there, gpus=2)
    await node.join()
    await node.login()
    call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
    await call.write(node.report(1))
    await call.read()
    # What it says is heeded at once, the rest is as it was.
    brief = node_pb2.HeartbeatRequest(sequence=2, readings=node.report(2).readings, same=True)
    brief.readings[0].xids.append(79)
    await call.write(brief)
    assert (await call.read()).sequence == 2
    known = await seen(there, "node-1")
    assert [gpu.model for gpu in known.inventory.gpus] == ["NVIDIA A100"] * 2
    assert [health.grade for health in known.gpu_health] == [fleet_pb2.GRADE_QUARANTINED, fleet_pb2.GRADE_OK]
    call.cancel()


async def test_first_report_of_a_stream_must_say_all(there: House) -> None:
    node = Node(there)
    await node.join()
    await node.login()
    call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
    with refused(*INVALID, "first report"):
        await call.write(node_pb2.HeartbeatRequest(sequence=1, same=True))
        await call.read()


async def test_node_is_told_whose_volumes_are_to_go(there: House) -> None:
    node = Node(there)
    await node.join()
    async with node.up():
        await there.operator.workspace("lives", volumes=[workspace_pb2.Volume(name="models", path="/models")])
        await there.operator.workspace("dies", volumes=[workspace_pb2.Volume(name="models", path="/models")])
        await until(lambda: len(node.assignments) == 2)
        uids = {one.workspace_name: one.workspace_uid for one in node.assignments}
        assert [list(one.spec.volumes) for one in node.assignments] == [
            [workspace_pb2.Volume(name="models", path="/models")]
        ] * 2
    await there.operator.workspaces.DeleteWorkspace(
        workspace_pb2.DeleteWorkspaceRequest(workspace="dies"), metadata=there.operator.auth
    )
    await node.login()
    call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
    # Names and ids are not asked about: only a uid is.
    named = [*uids.values(), "w-000000000000", "lives"]
    for sequence, told in enumerate((named, [], named), 1):
        report = node.report(sequence)
        report.inventory.volume_limit_bytes = 7
        report.volumes.extend(node_pb2.KeptVolume(workspace_uid=uid, name="models") for uid in told)
        await call.write(report)
        while (answer := await call.read()).sequence != sequence:
            pass
        assert list(answer.dead_workspaces) == ([uids["dies"], "w-000000000000", "lives"] if told else [])
    assert (await seen(there, node.addr)).inventory.volume_limit_bytes == 7
    call.cancel()


async def test_report_from_the_future_is_refused(there: House) -> None:
    node = Node(there)
    await node.join()
    await node.login()
    call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
    report = node.report(1)
    report.replicas.add(replica_id="r-1", state=99)
    with refused(*INVALID, "99"):
        await call.write(report)
        await call.read()


async def test_newer_session_ends_the_streams_of_the_older(there: House) -> None:
    older, newer = Node(there, 1), Node(there, 1)
    newer.boot_id = "another"
    await older.join()
    async with older.up():
        await until_connected(there, older)
        async with newer.up():
            await until(lambda: len(older.errors) == 2)
            for error in older.errors:
                assert (error.code(), error_of(error).reason) == SUPERSEDED
            with refused(*SUPERSEDED):
                await older.heartbeat()
            # The end of the older one does not take the node down.
            await until_connected(there, newer)
            await there.operator.workspace()
            await there.operator.ready("echo")
            assert newer.errors == []


async def test_newer_stream_of_a_session_takes_the_olders_place(there: House) -> None:
    node = Node(there)
    await node.join()
    await node.login()
    for open_stream, first in (
        (node.client.nodes.Execute, node_pb2.ExecuteRequest(resume=node_pb2.Resume())),
        (node.client.nodes.Heartbeat, node.report(1)),
    ):
        older = open_stream(metadata=node.client.auth, timeout=DEADLINE_S)
        await older.write(first)
        newer = open_stream(metadata=node.client.auth, timeout=DEADLINE_S)
        await newer.write(first)
        with refused(*SUPERSEDED):
            while await older.read() is not grpc.aio.EOF:
                pass
        newer.cancel()


async def test_revoked_node_is_cut_off_at_once_and_stays_out(there: House) -> None:
    node = Node(there)
    await node.join()
    async with node.up():
        await until_connected(there, node)
        await there.operator.fleet.RevokeNode(fleet_pb2.RevokeNodeRequest(node="node-1"), metadata=there.operator.auth)
        await until(lambda: len(node.errors) == 2)
        for error in node.errors:
            assert (error.code(), error_of(error).reason) == REVOKED
        with refused(*REVOKED):
            await node.client.nodes.Fetch(node_pb2.FetchRequest(attempt_id="x.1"), metadata=node.client.auth).read()
    for attempt in (node.login, node.join):
        with refused(*REVOKED):
            await attempt()
    listed = await there.operator.fleet.ListNodes(fleet_pb2.ListNodesRequest(), metadata=there.operator.auth)
    assert list(listed.nodes) == []
    assert (await seen(there, node.addr)).revoked


async def test_goodbye_is_a_clean_end(there: House) -> None:
    node = Node(there)
    await node.join()
    await node.login()
    node.goodbye = True
    call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
    await call.write(node.report(1))
    while await call.read() is not grpc.aio.EOF:
        pass
    assert await call.code() is grpc.StatusCode.OK
    await until_connected(there, node, False)


async def test_silent_node_must_log_in_again(tmp_path: Path) -> None:
    async with house(tmp_path, node_timeout="300ms", heartbeat_interval="50ms") as there:
        node = Node(there)
        await node.join()
        async with node.up(heartbeat=False):
            call: Any = node.client.nodes.Heartbeat(metadata=node.client.auth, timeout=DEADLINE_S)
            await call.write(node.report(1))
            with refused(*UNAUTHENTICATED, "nothing was heard"):
                while await call.read() is not grpc.aio.EOF:
                    pass
            await until(lambda: len(node.errors) == 1)
            assert error_of(node.errors[0]).reason == "UNAUTHENTICATED"
            with refused(*UNAUTHENTICATED, "log in again"):
                await node.execute()
        # One that reports as it is told to is not silent.
        async with node.up():
            await asyncio.sleep(0.6)
            assert len(node.errors) == 1


async def test_cordoned_node_gets_nothing_new_and_a_drained_one_gives_up_what_it_has(there: House) -> None:
    first, second = Node(there, 1), Node(there, 2)
    await first.join()
    await second.join()

    async def set_availability(name: str, availability: fleet_pb2.Availability.ValueType) -> fleet_pb2.Node:
        answer = await there.operator.fleet.SetNodeAvailability(
            fleet_pb2.SetNodeAvailabilityRequest(node=name, availability=availability), metadata=there.operator.auth
        )
        return answer.node  # type: ignore[no-any-return]

    async with first.up(), second.up():
        await until_connected(there, first)
        await until_connected(there, second)
        node = await set_availability("node-2", fleet_pb2.AVAILABILITY_CORDONED)
        assert node.availability == fleet_pb2.AVAILABILITY_CORDONED
        await there.operator.workspace()
        await there.operator.ready("echo")
        assert (len(first.assignments), len(second.assignments)) == (1, 0)
        await set_availability("node-2", fleet_pb2.AVAILABILITY_OPEN)
        await set_availability("node-1", fleet_pb2.AVAILABILITY_DRAINING)
        await until(lambda: (len(first.assignments), len(second.assignments)) == (0, 1))
        with refused(*INVALID, "availability"):
            await set_availability("node-1", fleet_pb2.AVAILABILITY_UNSPECIFIED)
        with refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "nobody"):
            await set_availability("nobody", fleet_pb2.AVAILABILITY_OPEN)
