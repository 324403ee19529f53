"""WorkspaceService and the operators' side of FleetService."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from ngpu.v1 import fleet_pb2
from ngpu.v1 import workspace_pb2 as pb

from tests.wire.house import DEADLINE_S, Client, House, error_of, refused, request
from tests.wire.node import Node, hold

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def get(client: Client, key: str) -> pb.Workspace:
    message = pb.GetWorkspaceRequest(workspace=key)
    answer = await client.workspaces.GetWorkspace(message, metadata=client.auth, timeout=DEADLINE_S)
    return answer.workspace  # type: ignore[no-any-return]


async def scale(client: Client, key: str, replicas: int) -> pb.Workspace:
    message = pb.ScaleWorkspaceRequest(workspace=key, replicas=replicas)
    answer = await client.workspaces.ScaleWorkspace(message, metadata=client.auth, timeout=DEADLINE_S)
    return answer.workspace  # type: ignore[no-any-return]


async def test_workspace_is_made_with_an_id_that_nobody_can_guess(there: House) -> None:
    first = await there.operator.workspace("one", replicas=0)
    second = await there.operator.workspace("two", replicas=0)
    assert first.id.isdecimal()
    assert len(first.id) == 24
    assert first.id != second.id
    with refused(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT", "one"):
        await there.operator.workspace("one")


async def test_every_fault_of_a_spec_is_told_at_once(there: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await there.operator.workspace("Bad Name", image="", ports=[0, 70_000], cpus=-1)
    error = error_of(caught.value)
    assert error.reason == "INVALID_ARGUMENT"
    for field in ("name", "image", "ports", "cpus"):
        assert field in error.message


async def test_error_with_very_many_words_still_arrives(there: House) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await there.operator.workspace(ports=list(range(70_000, 75_000)))
    assert error_of(caught.value).reason == "INVALID_ARGUMENT"


async def test_secrets_are_write_only(there: House) -> None:
    made = await there.operator.workspace(
        env={"TOKEN": "hush"}, registry=pb.RegistryCredentials(username="u", password="hush"), replicas=0
    )
    listing = await there.operator.workspaces.ListWorkspaces(pb.ListWorkspacesRequest(), metadata=there.operator.auth)
    for shown in (made, await get(there.operator, "echo"), await get(there.client(made.id), ""), listing.workspaces[0]):
        assert "hush" not in str(shown)
        assert dict(shown.spec.env) == {"TOKEN": ""}
        assert shown.spec.registry.username == "u"


async def test_who_finds_which_workspace_by_what(there: House) -> None:
    mine, other = (
        await there.operator.workspace("mine", replicas=0),
        await there.operator.workspace("other", replicas=0),
    )
    me = there.client(f"ngpu_{mine.id}")
    for client, keys in (
        (there.operator, ("mine", mine.id, f"ngpu_{mine.id}")),
        (me, ("", "mine", mine.id, f"ngpu_{mine.id}")),
    ):
        for key in keys:
            found = await get(client, key)
            assert (found.id, found.spec.name) == (mine.id, "mine")
    # A bridge passes on what its callers send: names are not enough, and the credential is not told.
    found = await get(there.bridge, mine.id)
    assert (found.id, found.spec.name) == ("", "mine")
    for client, key in (
        (there.bridge, "mine"),
        (there.bridge, ""),
        (me, "other"),
        (me, other.id),
        (there.operator, "x"),
    ):
        with refused(*NOT_FOUND):
            await get(client, key)
    with refused(*NOT_FOUND):
        await scale(me, other.id, 1)


async def test_workspace_grows_shrinks_and_is_watched(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(concurrency=2)
    me = there.client(workspace.id)
    watching = me.workspaces.WatchWorkspace(pb.WatchWorkspaceRequest(), metadata=me.auth, timeout=DEADLINE_S)
    seen: list[pb.Workspace] = []

    async def watch_until(true: Any) -> pb.Workspace:
        while True:
            seen.append((await watching.read()).workspace)
            if true(seen[-1]):
                return seen[-1]

    ready = await watch_until(lambda shown: shown.ready_replicas == 1)
    (replica,) = ready.replicas
    assert (replica.state, replica.node_addr, replica.node_name) == (pb.REPLICA_STATE_READY, node.addr, "node-1")
    assert (await scale(me, "", 2)).spec.replicas == 2
    assert (await scale(me, "", 2)).spec.replicas == 2
    await watch_until(lambda shown: shown.ready_replicas == 2)
    for _ in range(5):
        await there.bridge.schedule(request(workspace))
    await node.started(4)
    busy = await get(there.operator, "echo")
    assert (busy.running_tasks, busy.queued_tasks) == (4, 1)
    assert [replica.running_tasks for replica in busy.replicas] == [2, 2]
    await scale(there.operator, "echo", 0)
    await watch_until(lambda shown: shown.spec.replicas == 0)
    with refused(*INVALID):
        await scale(there.operator, "echo", 1_000_000)
    watching.cancel()


async def test_update_replaces_one_replica_after_another(there: House, node: Node) -> None:
    made = await there.operator.workspace(image="echo:1", replicas=2)
    await there.operator.ready("echo", 2)
    spec = pb.WorkspaceSpec()
    spec.CopyFrom(made.spec)
    spec.image = "echo:2"

    async def update(**changes: Any) -> pb.Workspace:
        message = pb.UpdateWorkspaceRequest(workspace="echo", spec=spec)
        message.spec.MergeFrom(pb.WorkspaceSpec(**changes))
        answer = await there.operator.workspaces.UpdateWorkspace(message, metadata=there.operator.auth)
        return answer.workspace  # type: ignore[no-any-return]

    assert (await update()).generation == 2
    watching = there.operator.workspaces.WatchWorkspace(
        pb.WatchWorkspaceRequest(workspace="echo"), metadata=there.operator.auth, timeout=DEADLINE_S
    )
    while (shown := (await watching.read()).workspace).updated_replicas < 2 or len(shown.replicas) > 2:
        assert shown.ready_replicas >= 2
    watching.cancel()
    assert {one.spec.image for one in node.assignments} == {"echo:2"}
    assert {replica.generation for replica in shown.replicas} == {2}
    with refused(*INVALID, "keeps its name"):
        await update(name="other")
    with refused(*NOT_FOUND):
        await there.operator.workspaces.UpdateWorkspace(
            pb.UpdateWorkspaceRequest(workspace="none", spec=spec), metadata=there.operator.auth
        )


async def test_a_call_wakes_a_sleeping_workspace(there: House, node: Node) -> None:
    made = await there.operator.workspace(replicas=0, scale=pb.Scale(max_replicas=2))
    assert made.wanted_replicas == 0
    assert "It is idle" in made.message
    queued = (await there.bridge.schedule(request(made))).task
    assert "the workspace was idle; one is being called for" in queued.waiting_for
    answered = await there.bridge.schedule(request(made, wait_s=10))
    assert answered.response.status == 200
    shown = await get(there.operator, "echo")
    assert (shown.wanted_replicas, shown.ready_replicas, shown.message) == (1, 1, "")


async def test_missing_replicas_are_explained(there: House, node: Node) -> None:
    await there.operator.workspace(gpu=pb.GpuNeed(model="H100", count=1))
    watching = there.operator.workspaces.WatchWorkspace(
        pb.WatchWorkspaceRequest(workspace="echo"), metadata=there.operator.auth, timeout=DEADLINE_S
    )
    while not (shown := (await watching.read()).workspace).message:
        pass
    watching.cancel()
    answer = await there.operator.fleet.Explain(
        fleet_pb2.ExplainRequest(workspace="echo"), metadata=there.operator.auth
    )
    assert shown.message in answer.summary
    assert sum(answer.decisions[0].refusals.values()) == 1
    assert answer.decisions[0].candidates[0].name == "node-1"
    assert answer.decisions[0].chosen == ""


async def test_placement_and_route_of_a_task_are_explained(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    other = await there.operator.workspace("other", replicas=0)
    await there.operator.ready("echo")
    me = there.client(workspace.id)

    async def explain(client: Client, **subject: str) -> fleet_pb2.ExplainResponse:
        message = fleet_pb2.ExplainRequest(**subject)
        return await client.fleet.Explain(message, metadata=client.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]

    for client, key in ((there.operator, "echo"), (me, workspace.id)):
        placed = await explain(client, workspace=key)
        assert placed.decisions[0].chosen == node.addr
        assert "1 of 1" in placed.summary
    done = (await there.bridge.schedule(request(workspace, wait_s=10))).task.task_id
    why = await explain(me, task_id=done)
    assert why.decisions[0].chosen == node.assignments[0].replica_id
    assert "node-1" in why.summary
    waits = (await there.bridge.schedule(request(other))).task.task_id
    assert "waits" in (await explain(there.operator, task_id=waits)).summary
    for client, subject in (
        (me, {"task_id": waits}),
        (me, {"workspace": "other"}),
        (there.operator, {"task_id": "none"}),
        (there.operator, {"workspace": "none"}),
    ):
        with refused(*NOT_FOUND):
            await explain(client, **subject)
    with refused(*INVALID, "subject"):
        await explain(there.operator)


async def test_dry_run_says_where_replicas_would_go_and_changes_nothing(there: House, node: Node) -> None:
    operator = there.operator

    async def plan(**fields: Any) -> fleet_pb2.PlanWorkspaceResponse:
        spec = pb.WorkspaceSpec(**{"name": "echo", "image": "img", "ports": [8080], "replicas": 2, **fields})
        message = fleet_pb2.PlanWorkspaceRequest(spec=spec)
        return await operator.fleet.PlanWorkspace(message, metadata=operator.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]

    async with asyncio.timeout(DEADLINE_S):
        # Until the node has said what it has.
        while not (fresh := await plan()).fits:
            pass
    assert (fresh.change, fresh.fits, fresh.new_replicas) == (fleet_pb2.WORKSPACE_CHANGE_NEW, True, 2)
    assert [one.node_name for one in fresh.replicas] == ["node-1", "node-1"]
    assert fresh.replicas[0].decision.candidates[0].parts
    listed = await operator.workspaces.ListWorkspaces(pb.ListWorkspacesRequest(), metadata=operator.auth)
    assert not listed.workspaces
    unfit = await plan(gpu=pb.GpuNeed(model="H100", count=1))
    assert not unfit.fits
    assert "There is room for 0 of 2 replicas" in unfit.summary
    with refused(*INVALID, "image"):
        await plan(image="")
    await operator.workspace(replicas=2)
    await operator.ready("echo", 2)
    assert (await plan()).change == fleet_pb2.WORKSPACE_CHANGE_NONE
    other = await plan(image="other")
    assert (other.change, other.generation) == (fleet_pb2.WORKSPACE_CHANGE_GENERATION, 2)
    assert list(other.replacing_fields) == ["image"]
    assert {one.replaces for one in other.replicas} == {one.replica_id for one in node.assignments}
    assert (await get(operator, "echo")).generation == 1


async def test_routes_are_published_moved_and_taken_away(there: House) -> None:
    await there.operator.workspace(replicas=0, ports=[80, 90])
    auth = there.operator.auth

    async def publish(**route: Any) -> pb.Route:
        message = pb.PublishRouteRequest(route=pb.Route(**{"workspace": "echo", **route}))
        return (await there.operator.workspaces.PublishRoute(message, metadata=auth)).route  # type: ignore[no-any-return]

    first = await publish(name="sdapi/v1/img2img")
    assert (first.port, first.path, first.workspace) == (80, "/sdapi/v1/img2img", "echo")
    moved = await publish(name="sdapi/v1/img2img", port=90, path="/x")
    assert (moved.port, moved.path) == (90, "/x")
    listing = await there.bridge.workspaces.ListRoutes(pb.ListRoutesRequest(), metadata=there.bridge.auth)
    assert list(listing.routes) == [moved]
    for bad in ({"name": "queryTask"}, {"name": "/x"}, {"name": "a b"}, {"name": "x", "port": 22}, {"name": ""}):
        with refused(*INVALID):
            await publish(**bad)
    with refused(*NOT_FOUND):
        await publish(name="x", workspace="none")
    for _ in range(2):
        await there.operator.workspaces.DeleteRoute(pb.DeleteRouteRequest(name="sdapi/v1/img2img"), metadata=auth)
    listing = await there.bridge.workspaces.ListRoutes(pb.ListRoutesRequest(), metadata=there.bridge.auth)
    assert list(listing.routes) == []


async def test_deleted_workspace_is_gone_from_lists_and_its_name_free(there: House) -> None:
    first = await there.operator.workspace(replicas=0)
    for _ in range(2):
        await there.operator.workspaces.DeleteWorkspace(
            pb.DeleteWorkspaceRequest(workspace=first.id), metadata=there.operator.auth
        )
    second = await there.operator.workspace(replicas=0)

    async def listed(deleted: bool) -> list[str]:
        answer = await there.operator.workspaces.ListWorkspaces(
            pb.ListWorkspacesRequest(deleted=deleted), metadata=there.operator.auth
        )
        return [workspace.id for workspace in answer.workspaces]

    assert await listed(False) == [second.id]
    assert await listed(True) == [first.id, second.id]
    first_page = pb.ListWorkspacesRequest(deleted=True, limit=1)
    page = await there.operator.workspaces.ListWorkspaces(first_page, metadata=there.operator.auth)
    assert [workspace.id for workspace in page.workspaces] == [first.id]
    rest = pb.ListWorkspacesRequest(deleted=True, cursor=page.cursor)
    page = await there.operator.workspaces.ListWorkspaces(rest, metadata=there.operator.auth)
    assert [workspace.id for workspace in page.workspaces] == [second.id]
    assert not page.cursor
    with refused(*INVALID, "cursor"):
        bad = pb.ListWorkspacesRequest(cursor="x")
        await there.operator.workspaces.ListWorkspaces(bad, metadata=there.operator.auth)
    assert (await get(there.operator, first.id)).HasField("delete_time")
    with refused(*NOT_FOUND):
        await there.operator.workspaces.DeleteWorkspace(
            pb.DeleteWorkspaceRequest(workspace="none"), metadata=there.operator.auth
        )


async def test_tokens_are_made_listed_and_never_shown_again(there: House) -> None:
    auth = there.operator.auth

    async def make(role: Any, **fields: Any) -> fleet_pb2.CreateTokenResponse:
        message = fleet_pb2.CreateTokenRequest(role=role, **fields)
        return await there.operator.fleet.CreateToken(message, metadata=auth)  # type: ignore[no-any-return]

    service = await make(fleet_pb2.ROLE_SERVICE, name="front")
    join = await make(fleet_pb2.ROLE_NODE, name="rack 7")
    assert not service.token.HasField("expire_time")
    lifetime = join.token.expire_time.ToDatetime(UTC) - join.token.create_time.ToDatetime(UTC)
    assert lifetime.total_seconds() == 86400
    node = Node(there)
    await node.join(join.secret)
    listing = await there.operator.fleet.ListTokens(fleet_pb2.ListTokensRequest(), metadata=auth)
    named = {token.name: token for token in listing.tokens}
    assert {"front", "rack 7"} < set(named)
    assert named["rack 7"].use_time.ToDatetime(UTC) <= datetime.now(UTC)
    for secret in (service.secret, join.secret):
        assert secret not in str(listing)
    with refused(*INVALID, "role"):
        await make(fleet_pb2.ROLE_UNSPECIFIED)
    with refused(*INVALID, "lifetime"):
        await make(fleet_pb2.ROLE_NODE, lifetime=Duration(seconds=0))
    short = await make(fleet_pb2.ROLE_SERVICE, lifetime=Duration(nanos=1000))
    await asyncio.sleep(0)
    with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "expired"):
        client = there.client(short.secret)
        await client.workspaces.ListRoutes(pb.ListRoutesRequest(), metadata=client.auth)
