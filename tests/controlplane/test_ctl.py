"""`ngpu` against a fake control plane over real gRPC: what is asked, what is printed where, and the exit code."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from ngpu.v1 import asset_pb2 as asset
from ngpu.v1 import fleet_pb2 as fleet
from ngpu.v1 import node_pb2 as node
from ngpu.v1 import workspace_pb2 as workspace

from controlplane.ctl.nodes import why
from tests.controlplane.ctl_fakes import (
    ID,
    NODE,
    TOKEN,
    FakeControlPlane,
    Ngpu,
    Refusal,
    a_node,
    a_replica,
    a_workspace,
    at,
)

READY = workspace.REPLICA_STATE_READY
PULLING = workspace.REPLICA_STATE_PULLING

TOML = 'name = "img2img"\nimage = "demo"\nports = [8080]\n'


def the_file(tmp_path: Path, text: str = TOML) -> str:
    (tmp_path / "w.toml").write_text(text)
    return str(tmp_path / "w.toml")


# --- workspaces ---


def test_create_from_a_file(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    result = ngpu("workspace", "create", the_file(tmp_path))
    assert plane.last().spec == workspace.WorkspaceSpec(name="img2img", image="demo", ports=[8080], replicas=1)
    assert ID in result.stdout
    assert "ngpu workspace show img2img --wait" in result.stderr


def test_create_from_options_alone(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    (tmp_path / "password").write_text("hunter2")
    ngpu(
        *("workspace", "create", "--name", "a", "--image", "b", "--port", "1", "--port", "2", "--replicas", "3"),
        *(
            "--command",
            "python3 'my server.py'",
            "--env",
            "A=1",
            "--env",
            "B=x=y",
            "--gpus",
            "2",
            "--gpu-model",
            "4090",
        ),
        *("--gpu-memory", "20GiB", "--memory", "8GiB", "--cpus", "1.5", "--concurrency", "4", "--ready-path", "/ok"),
        *("--registry-username", "me", "--registry-password-file", "password", "--account", "c7"),
    )
    assert plane.last().spec == workspace.WorkspaceSpec(
        name="a",
        image="b",
        ports=[1, 2],
        replicas=3,
        command=["python3", "my server.py"],
        env={"A": "1", "B": "x=y"},
        gpu=workspace.GpuNeed(count=2, model="4090", min_memory_bytes=20 << 30),
        memory_bytes=8 << 30,
        cpus=1.5,
        concurrency=4,
        readiness=workspace.Readiness(path="/ok"),
        registry=workspace.RegistryCredentials(username="me", password="hunter2"),
        account="c7",
    )


def test_create_with_a_part_of_a_gpu_and_volumes(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    ngpu("workspace", "create", "-", "--gpu-share", "0.25", "--volume", "m=/m", "--volume", "h=/h", stdin=TOML)
    spec = plane.last().spec
    assert spec.gpu.share_milli == 250
    assert [(volume.name, volume.path) for volume in spec.volumes] == [("m", "/m"), ("h", "/h")]
    wrong = ngpu("workspace", "create", "-", "--volume", "/m", stdin=TOML, code=2)
    assert wrong.stderr == "ngpu: --volume: '/m' is not NAME=VALUE\n"


def test_create_from_stdin_with_an_option_on_top(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    ngpu("workspace", "create", "-", "--replicas", "5", stdin=TOML)
    assert (plane.last().spec.name, plane.last().spec.replicas) == ("img2img", 5)


def test_create_quiet_prints_the_id_and_nothing_else(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    result = ngpu("workspace", "create", the_file(tmp_path), "--quiet")
    assert (result.stdout, result.stderr) == (f"{ID}\n", "")


def test_create_tells_all_faults_and_asks_nobody(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    file = the_file(tmp_path, 'name = "a"\nimage = 7\nmemmory = "1GiB"\n')
    result = ngpu("workspace", "create", file, code=2)
    assert result.stderr.splitlines() == [
        f'ngpu: {file}: image: must be text, such as "abc", not 7',
        f"ngpu: {file}: memmory: is not known: did you mean memory?",
        f"ngpu: {file}: ports: is missing",
    ]
    assert plane.asked == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "Give a FILE.toml"),
        (["nothing.toml"], "nothing.toml: cannot be read"),
        (["--name", "a"], "options: image: is missing"),
        (["--name", "a", "--env", "A"], "--env: 'A' is not NAME=VALUE"),
        (["--name", "a", "--command", "'unbalanced"], "--command: "),
        (["--name", "a", "--timeout", "soon"], "--timeout: 'soon' is not a duration"),
        (["--nmae", "a"], "--nmae"),
    ],
)
def test_create_wrong_usage(plane: FakeControlPlane, ngpu: Ngpu, arguments: list[str], why: str) -> None:
    assert why in ngpu("workspace", "create", *arguments, code=2).stderr
    assert plane.asked == []


def test_create_and_wait_shows_progress_line_by_line(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace(wanted=2))
    first = a_replica(READY)
    steps = [
        a_workspace(wanted=2, message="no node has enough GPU memory"),
        a_workspace(first, a_replica(PULLING, id="r-2", progress=7, message="3 of 40 MiB"), wanted=2),
        a_workspace(first, a_replica(PULLING, id="r-2", progress=8, message="4 of 40 MiB"), wanted=2),
        a_workspace(first, a_replica(PULLING, id="r-2", progress=52, message="22 of 40 MiB"), wanted=2),
        a_workspace(first, a_replica(workspace.REPLICA_STATE_STARTING, id="r-2", progress=90), wanted=2),
        a_workspace(
            first, a_replica(workspace.REPLICA_STATE_BACKOFF, id="r-2", message="exited: \x1b[2Jbang"), wanted=2
        ),
        a_workspace(first, a_replica(READY, id="r-2", progress=100), wanted=2),
    ]
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=step) for step in steps]
    result = ngpu("workspace", "create", the_file(tmp_path), "--wait")
    assert ID in result.stdout
    assert result.stderr.splitlines() == [
        "waiting for a node: no node has enough GPU memory",
        "r-0a1b2c3d4e5f on node-1: ready",
        "r-2 on node-1: pulling 7% (3 of 40 MiB)",
        "r-2 on node-1: pulling 52% (22 of 40 MiB)",
        "r-2 on node-1: starting 90%",
        "r-2 on node-1: backoff (exited: \ufffd[2Jbang)",
        "r-2 on node-1: ready",
        "img2img: 2 of 2 replicas ready",
    ]


def test_create_and_wait_in_json_is_one_answer(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=a_workspace(a_replica(READY)))]
    answer = json.loads(ngpu("workspace", "create", the_file(tmp_path), "--wait", "--json").stdout)
    assert (answer["workspace"]["id"], answer["workspace"]["ready_replicas"]) == (ID, 1)


def test_created_but_not_serving_in_json_still_tells_the_id(
    plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path
) -> None:
    plane.answers["CreateWorkspace"] = workspace.CreateWorkspaceResponse(workspace=a_workspace())
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=a_workspace())]
    result = ngpu("workspace", "create", the_file(tmp_path), "--wait", "--json", "--timeout", "100ms", code=1)
    assert json.loads(result.stdout)["workspace"]["id"] == ID


def test_waiting_in_vain_fails_and_says_why(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    backoff = a_replica(workspace.REPLICA_STATE_BACKOFF, message="image demo is not in the registry")
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=a_workspace(backoff))]
    result = ngpu("workspace", "show", "img2img", "--wait", "--timeout", "300ms", code=1)
    assert "Not serving within 300ms: 0 of 1 replica ready (node-1: image demo is not in the registry)" in result.stderr


def test_waiting_for_a_workspace_that_is_deleted_fails(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=a_workspace(delete_time=at(9)))]
    assert "has been deleted" in ngpu("workspace", "show", "img2img", "--wait", code=1).stderr


def test_show(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    shown = a_workspace(a_replica(READY), a_replica(PULLING, id="r-2", progress=40, message="2 of 5 layers"), wanted=3)
    shown.message = "1 replica has no node: too little GPU memory on 4 nodes"
    shown.spec.env["API_KEY"] = ""
    shown.spec.gpu.count, shown.spec.gpu.model, shown.spec.gpu.min_memory_bytes = 1, "RTX 4090", 20 << 30
    plane.answers["GetWorkspace"] = workspace.GetWorkspaceResponse(workspace=shown)
    text = ngpu("workspace", "show", "img2img").stdout
    assert plane.last().workspace == "img2img"
    for part in (ID, "1 of 3 replicas ready", "too little GPU memory", "API_KEY", "1 x RTX 4090, 20 GiB or more each"):
        assert part in text
    assert "r-2" in text
    assert "2 of 5 layers" in text


def test_show_says_which_part_of_a_gpu_and_what_is_kept(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    shown = a_workspace(a_replica(READY))
    shown.spec.gpu.CopyFrom(workspace.GpuNeed(count=1, share_milli=250, min_memory_bytes=6 << 30))
    shown.spec.volumes.add(name="models", path="/models")
    plane.answers["GetWorkspace"] = workspace.GetWorkspaceResponse(workspace=shown)
    text = ngpu("workspace", "show", "img2img").stdout
    assert "0.25 x any model, 6 GiB or more\n" in text
    assert "models at /models" in text


def test_show_says_how_replicas_follow_the_load(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    shown = a_workspace(wanted=0)
    scale = workspace.Scale(max_replicas=3, idle_time=Duration(seconds=900), queue_wait=Duration(seconds=10))
    shown.spec.scale.CopyFrom(scale)
    plane.answers["GetWorkspace"] = workspace.GetWorkspaceResponse(workspace=shown)
    text = ngpu("workspace", "show", "img2img").stdout
    assert "0 to 3 by load, none when idle for 15m, more when tasks wait 10s" in text


def test_show_in_json_is_the_message_of_the_api(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetWorkspace"] = workspace.GetWorkspaceResponse(workspace=a_workspace(a_replica(READY)))
    shown = json.loads(ngpu("workspace", "show", "img2img", "--json").stdout)["workspace"]
    assert shown["id"] == ID
    assert shown["replicas"][0]["state"] == "REPLICA_STATE_READY"
    assert shown["queued_tasks"] == 0  # there even if it is zero
    assert shown["create_time"] == "2026-01-31T14:00:00Z"


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
def test_list_keeps_ids_to_itself(plane: FakeControlPlane, ngpu: Ngpu, options: list[str]) -> None:
    plane.answers["ListWorkspaces"] = lambda _: workspace.ListWorkspacesResponse(workspaces=[a_workspace()])
    result = ngpu("workspace", "list", *options)
    assert "img2img" in result.stdout
    assert ID not in result.output


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_list_shows_ids_when_told(plane: FakeControlPlane, ngpu: Ngpu, options: list[str]) -> None:
    plane.answers["ListWorkspaces"] = workspace.ListWorkspacesResponse(workspaces=[a_workspace()])
    assert ID in ngpu("workspace", "list", "--ids", *options).stdout


def test_a_list_is_whole_however_many_pages_it_has(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    def page(asked: workspace.ListWorkspacesRequest) -> workspace.ListWorkspacesResponse:
        at = int(asked.cursor or 0)
        row = a_workspace()
        row.spec.name = f"w{at}"
        return workspace.ListWorkspacesResponse(workspaces=[row], cursor=str(at + 1) if at < 2 else "")

    plane.answers["ListWorkspaces"] = page
    assert ngpu("workspace", "list", "--quiet").stdout.split() == ["w0", "w1", "w2"]
    assert "cursor" not in json.loads(ngpu("workspace", "list", "--json").stdout)


def test_an_empty_list_says_what_to_do(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ListWorkspaces"] = workspace.ListWorkspacesResponse()
    assert "ngpu workspace create" in ngpu("workspace", "list").stdout
    assert json.loads(ngpu("workspace", "list", "--json").stdout) == {"workspaces": []}
    assert ngpu("workspace", "list", "--quiet").stdout == ""


def test_scale(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ScaleWorkspace"] = lambda _: workspace.ScaleWorkspaceResponse(workspace=a_workspace(wanted=3))
    result = ngpu("workspace", "scale", "img2img", "3")
    assert (plane.last().workspace, plane.last().replicas) == ("img2img", 3)
    assert "img2img: 0 of 3 replicas ready." in result.stdout
    assert ID not in ngpu("workspace", "scale", "img2img", "3", "--json").stdout
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=a_workspace(a_replica(READY)))]
    assert "1 of 1 replica ready" in ngpu("workspace", "scale", "img2img", "1", "--wait").stdout
    ngpu("workspace", "scale", "img2img", "-1", code=2)


def test_update(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    file = tmp_path / "img2img.toml"
    file.write_text('name = "img2img"\nimage = "demo:2"\nports = [8080]\n')
    updating = a_workspace(a_replica(READY, generation=1), generation=2, updated_replicas=0)
    plane.answers["UpdateWorkspace"] = lambda _: workspace.UpdateWorkspaceResponse(workspace=updating)
    result = ngpu("workspace", "update", str(file))
    assert (plane.last().workspace, plane.last().spec.image) == ("img2img", "demo:2")
    assert "img2img: 1 of 1 replica ready, 1 of them of an earlier generation." in result.stdout
    assert ID not in ngpu("workspace", "update", str(file), "--json").stdout
    through = a_workspace(a_replica(READY, generation=2), generation=2)
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=one) for one in (updating, through)]
    assert "1 of 1 replica ready.\n" in ngpu("workspace", "update", str(file), "--wait").stdout
    back = a_workspace(a_replica(READY), message="Generation 2 was taken back: it crashed.")
    plane.answers["WatchWorkspace"] = [workspace.WatchWorkspaceResponse(workspace=one) for one in (updating, back)]
    assert "Generation 2 was taken back" in ngpu("workspace", "update", str(file), "--wait", code=1).stderr
    plane.answers["GetWorkspace"] = workspace.GetWorkspaceResponse(workspace=updating)
    assert "of generation 1" in ngpu("workspace", "show", "img2img").stdout
    file.write_text("name = 1")
    ngpu("workspace", "update", str(file), code=2)


def test_delete(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["DeleteWorkspace"] = workspace.DeleteWorkspaceResponse()
    assert "Deleted" in ngpu("workspace", "delete", "img2img", "--yes").stdout
    assert plane.last().workspace == "img2img"
    assert ngpu("workspace", "delete", "img2img", "--quiet").output == ""
    assert json.loads(ngpu("workspace", "delete", "img2img", "--json").stdout) == {}


# --- routes ---


def test_routes(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    route = workspace.Route(name="img2img", workspace="img2img", path="/sdapi/v1/img2img", create_time=at())
    plane.answers["PublishRoute"] = workspace.PublishRouteResponse(route=route)
    text = ngpu("route", "publish", "img2img", "-w", "img2img", "--path", "/sdapi/v1/img2img").stdout
    assert text == "POST /user/img2img now calls /sdapi/v1/img2img of img2img.\n"
    assert plane.last().route == workspace.Route(name="img2img", workspace="img2img", path="/sdapi/v1/img2img")

    plane.answers["ListRoutes"] = workspace.ListRoutesResponse(routes=[route])
    assert "/user/img2img" in ngpu("route", "list").stdout
    assert ngpu("route", "list", "-q").stdout == "img2img\n"

    plane.answers["DeleteRoute"] = workspace.DeleteRouteResponse()
    ngpu("route", "delete", "img2img")
    assert plane.last().name == "img2img"


# --- nodes ---


def a_gpu_node() -> fleet.Node:
    gpus = [node.Gpu(id=f"GPU-{i}", model="NVIDIA GeForce RTX 4090", memory_bytes=24 << 30, index=i) for i in range(2)]
    health = [
        fleet.GpuHealth(gpu_id="GPU-0", grade=fleet.GRADE_OK),
        fleet.GpuHealth(gpu_id="GPU-1", grade=fleet.GRADE_QUARANTINED, reason="fell off the bus (Xid 79)"),
    ]
    inventory = node.Inventory(gpus=gpus, cpus=16, memory_bytes=64 << 30, engine="docker", engine_version="27.1")
    inventory.volume_limit_bytes = 64 << 30
    # Two replicas share it.
    in_use = ["GPU-0", "GPU-0"]
    return a_node(inventory=inventory, gpu_health=health, gpu_ids_in_use=in_use, replicas=1, running_tasks=3)


def test_node_list(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    away = a_node("node-2", connected=False, availability=fleet.AVAILABILITY_DRAINING, last_seen_time=at())
    gone = a_node("node-3", revoked=True)
    plane.answers["ListNodes"] = fleet.ListNodesResponse(nodes=[a_gpu_node(), away, gone])
    text = ngpu("node", "list", "--revoked").stdout
    assert plane.last().revoked
    assert "2 x RTX 4090 (1 free, 1 quarantined)" in text
    assert "away, draining" in text
    assert "revoked" in text
    assert "0xCac10F…c669" in text
    assert ngpu("node", "list", "-q").stdout == "node-1\nnode-2\nnode-3\n"


def test_node_show(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetNode"] = fleet.GetNodeResponse(node=a_gpu_node())
    text = ngpu("node", "show", "node-1").stdout
    for part in (
        NODE,
        "16 CPUs, 64 GiB, 0 B of disk free",
        "up to 64 GiB",
        "docker 27.1",
        "1 replica, 3 tasks",
        "quarantined",
        "Xid 79",
        "in use",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("command", "availability"),
    [("drain", "DRAINING"), ("cordon", "CORDONED"), ("uncordon", "OPEN")],
)
def test_node_availability(plane: FakeControlPlane, ngpu: Ngpu, command: str, availability: str) -> None:
    plane.answers["SetNodeAvailability"] = fleet.SetNodeAvailabilityResponse(node=a_node())
    assert ngpu("node", command, "node-1").stdout.startswith("node-1 ")
    assert plane.last().availability == fleet.Availability.Value(f"AVAILABILITY_{availability}")


@pytest.mark.parametrize(
    ("reason", "test", "said"),
    [
        ("Xid 79", fleet.GpuTestStanding(asked=node.GPU_TEST_STATE_RUNNING), "Xid 79"),
        (
            "",
            fleet.GpuTestStanding(last=node.GPU_TEST_STATE_PASSED, words="20 GiB", last_end_time=at()),
            "passed its test 1h ago (20 GiB)",
        ),
        ("Xid 79", fleet.GpuTestStanding(last=node.GPU_TEST_STATE_PASSED, words="20 GiB"), "Xid 79"),
        (
            "Xid 79",
            fleet.GpuTestStanding(last=node.GPU_TEST_STATE_FAILED, next_time=at(3700)),
            "Xid 79; next test in 1m 40s",
        ),
        (
            "Xid 79",
            fleet.GpuTestStanding(last=node.GPU_TEST_STATE_UNABLE, next_time=at()),
            "Xid 79; its next test is due",
        ),
    ],
)
def test_node_show_tells_how_it_stands_with_tests(reason: str, test: fleet.GpuTestStanding, said: str) -> None:
    assert why(fleet.GpuHealth(reason=reason, test=test), datetime(2026, 1, 31, 15, 0, tzinfo=UTC)) == said


def test_node_test(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["TestGpus"] = fleet.TestGpusResponse(node=a_gpu_node())
    plane.answers["GetNode"] = fleet.GetNodeResponse(node=a_gpu_node())
    assert ngpu("node", "test", "node-1").stdout == "node-1 is asked: ngpu node show node-1\n"
    assert plane.last() == fleet.TestGpusRequest(node="node-1")
    for given, asked in (("1", "GPU-1"), ("GPU-1", "GPU-1"), ("9", "9")):
        ngpu("node", "test", "node-1", given)
        assert plane.last() == fleet.TestGpusRequest(node="node-1", gpu_ids=[asked])


def test_node_revoke(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["RevokeNode"] = fleet.RevokeNodeResponse()
    assert "node-1 is revoked" in ngpu("node", "revoke", "node-1", "--yes").stdout


# --- tokens ---


def test_token_create_prints_the_secret_alone_on_stdout(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    token = fleet.Token(id="t-1", role=fleet.ROLE_NODE, name="pc", create_time=at(), expire_time=at(59))
    plane.answers["CreateToken"] = fleet.CreateTokenResponse(token=token, secret="s3cret")
    result = ngpu("token", "create", "--role", "node", "--name", "pc", "--lifetime", "2h")
    assert result.stdout == "s3cret\n"
    assert "t-1" in result.stderr
    assert "ngpu-node" in result.stderr
    assert (plane.last().role, plane.last().name, plane.last().lifetime.seconds) == (fleet.ROLE_NODE, "pc", 7200)
    assert json.loads(ngpu("token", "create", "--role", "node", "--json").stdout)["secret"] == "s3cret"
    assert not plane.last().HasField("lifetime")
    ngpu("token", "create", "--role", "god", code=2)
    ngpu("token", "create", code=2)


def test_token_list_and_revoke(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    late = Timestamp(seconds=4_000_000_000)
    tokens = [
        fleet.Token(id="t-1", role=fleet.ROLE_OPERATOR, create_time=at()),
        fleet.Token(id="t-2", role=fleet.ROLE_NODE, create_time=at(), expire_time=late, use_time=at(1)),
        fleet.Token(id="t-3", role=fleet.ROLE_SERVICE, create_time=at(), revoke_time=at(1), name="bridge"),
        fleet.Token(id="t-4", role=fleet.ROLE_NODE, create_time=at(), expire_time=at(1)),
    ]
    plane.answers["ListTokens"] = fleet.ListTokensResponse(tokens=tokens)
    lines = ngpu("token", "list").stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["t-1", "operator", "valid"],
        ["t-2", "node", "used"],
        ["t-3", "service", "revoked"],
        ["t-4", "node", "expired"],
    ]
    plane.answers["RevokeToken"] = fleet.RevokeTokenResponse()
    ngpu("token", "revoke", "t-1")
    assert plane.last().id == "t-1"


# --- explain ---


def test_explain(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    chosen = fleet.Candidate(id=NODE, name="node-1", parts={"load": 0.25, "image": 0}, cost=0.25)
    refused = fleet.Candidate(id="0x2", name="node-2", refusal="too little GPU memory")
    decision = fleet.Decision(
        time=at(),
        subject="replica r-0a1b2c3d4e5f",
        chosen=NODE,
        candidates=[chosen, refused],
        refusals={"too little GPU memory": 12, "draining": 1},
    )
    plane.answers["Explain"] = fleet.ExplainResponse(summary="1 of 1 replica runs.", decisions=[decision])
    text = ngpu("explain", "workspace", "img2img").stdout
    assert plane.last().workspace == "img2img"
    for part in ("1 of 1 replica runs.", "chosen node-1", "12 refused: too little GPU memory", "LOAD", "0.25"):
        assert part in text
    ngpu("explain", "task", "20260131")
    assert plane.last().task_id == "20260131"


# --- plan ---


def test_plan_shows_where_each_replica_would_go(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    chosen = fleet.Candidate(id=NODE, name="node-1", parts={"load": 0.25}, cost=0.25)
    decision = fleet.Decision(time=at(), subject="replica 1 of img2img", chosen=NODE, candidates=[chosen])
    placed = fleet.PlannedReplica(decision=decision, node_name="node-1", gpu_ids=["GPU-1"], pulls_image=True)
    plane.answers["PlanWorkspace"] = fleet.PlanWorkspaceResponse(
        change=fleet.WORKSPACE_CHANGE_NEW, fits=True, new_replicas=1, replicas=[placed], summary="It would be new."
    )
    text = ngpu("plan", the_file(tmp_path)).stdout
    assert plane.last().spec.name == "img2img"
    for part in ("It would be new.", "node-1", "GPU-1", "pull, of unknown size", "LOAD", "0.25"):
        assert part in text
    assert ngpu("plan", the_file(tmp_path), "-q").stdout == "node-1\n"
    assert json.loads(ngpu("plan", the_file(tmp_path), "--json").stdout)["fits"] is True


def test_plan_without_room_has_an_exit_code_of_its_own(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    decision = fleet.Decision(time=at(), subject="replica 1 of img2img", refusals={"too few free GPUs": 3})
    plane.answers["PlanWorkspace"] = fleet.PlanWorkspaceResponse(
        new_replicas=1, replicas=[fleet.PlannedReplica(decision=decision)], summary="There is room for 0 of 1 replicas."
    )
    result = ngpu("plan", the_file(tmp_path), code=6)
    assert "3 refused: too few free GPUs" in result.stdout
    assert "no room" in result.stderr
    ngpu("plan", the_file(tmp_path, "name = 1"), code=2)


# --- assets ---


def test_asset_check(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["CheckAddress"] = asset.CheckAddressResponse(holdings=[asset.Holding(ticker="AINN", balance="100.5")])
    assert ngpu("asset", "check", "bc1q").stdout == "TICKER  BALANCE\nAINN      100.5\n"
    assert plane.last().address == "bc1q"
    assert ngpu("asset", "check", "bc1q", "-q").stdout == "AINN 100.5\n"
    plane.answers["CheckAddress"] = asset.CheckAddressResponse()
    assert "none of the configured assets" in ngpu("asset", "check", "bc1q").stdout


# --- errors and exit codes ---


@pytest.mark.parametrize(
    ("refusal", "code", "text"),
    [
        (
            Refusal(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "There is no such workspace."),
            4,
            "There is no such workspace.",
        ),
        (Refusal(grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN", "Not you."), 5, "Not you."),
        (Refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "name: bad\nports: bad"), 2, "ngpu: ports: bad"),
        (Refusal(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT", "It lives."), 1, "It lives."),
        (Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "Full.", 2500), 1, "Full. Try again in 2.5s."),
        (Refusal(grpc.StatusCode.UNAVAILABLE, "ASSET_UNKNOWN", "No indexer."), 1, "No indexer."),
        (Refusal(grpc.StatusCode.UNAVAILABLE), 3, "does not answer at 127.0.0.1:"),
        (Refusal(grpc.StatusCode.DEADLINE_EXCEEDED), 3, "took too long"),
        (Refusal(grpc.StatusCode.UNIMPLEMENTED), 1, "does not know this call"),
        (Refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "\x1b[31mThe log has it."), 1, "\ufffd[31mThe log has it."),
    ],
)
def test_errors(plane: FakeControlPlane, ngpu: Ngpu, refusal: Refusal, code: int, text: str) -> None:
    plane.answers["GetWorkspace"] = refusal
    result = ngpu("workspace", "show", "img2img", code=code)
    assert result.stdout == ""
    assert text in result.stderr
    assert all(line.startswith("ngpu: ") for line in result.stderr.splitlines())


def test_nobody_there(ngpu: Ngpu) -> None:
    result = ngpu("node", "list", "--server", "127.0.0.1:1", code=3)
    assert "does not answer at 127.0.0.1:1 (Connection refused)" in result.stderr
    assert "ngpu-controlplane run" in result.stderr
    ngpu("workspace", "show", "x", "--wait", "--server", "127.0.0.1:1", code=3)


def test_a_fault_of_our_own_is_one_line(plane: FakeControlPlane, ngpu: Ngpu, monkeypatch: pytest.MonkeyPatch) -> None:
    plane.answers["ListNodes"] = fleet.ListNodesResponse(
        nodes=[a_node(last_seen_time=Timestamp(seconds=2**60), connected=False)]
    )
    result = ngpu("node", "list", code=1)
    assert "Something unforeseen: " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    ngpu("node", "list", "--json", code=1)


# --- connection ---


def test_where_the_token_comes_from(
    plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.answers["ListNodes"] = fleet.ListNodesResponse()
    (tmp_path / "wrong").write_text("wrong\n")
    (tmp_path / "right").write_text(f"{TOKEN}\n")
    ngpu("node", "list", "--token-file", "wrong", code=5)  # wins over NGPU_TOKEN
    monkeypatch.setenv("NGPU_TOKEN_FILE", "wrong")
    ngpu("node", "list")  # NGPU_TOKEN wins over it
    monkeypatch.delenv("NGPU_TOKEN")
    ngpu("node", "list", code=5)
    ngpu("node", "list", "--token-file", "right")
    monkeypatch.delenv("NGPU_TOKEN_FILE")
    assert "There is no token" in ngpu("node", "list", code=5).stderr
    user = tmp_path / ".config/ngpu/token"
    user.parent.mkdir(parents=True)
    user.write_text(TOKEN)
    ngpu("node", "list")
    local = tmp_path / ".ngpu/controlplane/operator.token"
    local.parent.mkdir(parents=True)
    local.write_text("wrong")
    ngpu("node", "list", code=5)


@pytest.mark.parametrize("content", ["", "two words", "l\u00f6ve", "a\x00b"])
def test_what_is_no_token(ngpu: Ngpu, tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    assert "token holds is not a token" in ngpu("node", "list", "--token-file", "token", code=5).stderr
    assert "cannot be read" in ngpu("node", "list", "--token-file", "missing", code=5).stderr


def test_the_token_does_not_leave_the_machine_unencrypted(ngpu: Ngpu) -> None:
    for server in ("10.0.0.1:50051", "example.org:50051", "[2001:db8::1]:50051", "localhost.example.org:1"):
        assert "unencrypted" in ngpu("node", "list", "--server", server, code=2).stderr
    assert "does not answer" in ngpu("node", "list", "--server", "localhost:1", code=3).stderr
    assert "does not answer" in ngpu("node", "list", "--server", "[::1]:1", code=3).stderr


def test_tls_with_a_ca_of_ones_own(ngpu: Ngpu, tmp_path: Path) -> None:
    assert "CA's certificate cannot be read" in ngpu("node", "list", "--tls-ca", "missing.pem", code=2).stderr
    # To a server that speaks no TLS: no token is sent.
    ngpu("node", "list", "--tls", code=3)


# --- help and version ---


def test_version(ngpu: Ngpu) -> None:
    assert ngpu("version").stdout.startswith("ngpu ")
    assert json.loads(ngpu("version", "--json").stdout)["version"]


@pytest.mark.parametrize(
    "command",
    [
        "",
        *("workspace create", "workspace show", "workspace list", "workspace scale", "workspace delete"),
        "plan",
        *("route publish", "route list", "route delete", "explain task", "explain workspace"),
        *("node list", "node show", "node drain", "node cordon", "node uncordon", "node revoke"),
        "node test",
        *("token create", "token list", "token revoke", "asset check"),
        *("task submit", "task result", "task show", "task list", "task cancel", "version"),
    ],
)
def test_help_fits_a_terminal(command: str, ngpu: Ngpu) -> None:
    text = ngpu(*command.split(), "--help").stdout
    assert "Usage: " in text
    # Examples that are broken over two lines cannot be copied.
    for line in text.splitlines():
        assert len(line) <= 80
    examples = text.partition("Examples:")[2].partition("\u256d")[0]
    assert all(
        line.strip().startswith(("ngpu", "ID=", "TASK=", "The file", "[")) or " = " in line
        for line in examples.splitlines()
        if line.strip()
    )


def test_without_a_command_the_help_is_shown(ngpu: Ngpu) -> None:
    assert "First steps:" in ngpu(code=2).output


def test_no_answer_is_left_out(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    """Every method that is not for nodes is behind some command."""
    services: list[Any] = [workspace.DESCRIPTOR, fleet.DESCRIPTOR, asset.DESCRIPTOR]
    methods = {m.name for file in services for s in file.services_by_name.values() for m in s.methods}
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "controlplane/ctl").glob("*.py"))
    assert {name for name in methods if f".{name}" not in source} == set()


def test_every_command_of_the_documentation_exists(ngpu: Ngpu) -> None:
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    documented = set(re.findall(r"ngpu ((?:workspace|route|task|explain|node|token|asset) [a-z-]+)\b", text))
    assert len(documented) >= 20
    for command in sorted(documented):
        ngpu(*command.split(), "--help")
    for command in ("workspace", "route", "task", "explain", "node", "token", "asset"):
        listed = set(re.findall(r"^\u2502 ([a-z][a-z-]*) ", ngpu(command, "--help").stdout, re.MULTILINE))
        assert {f"{command} {name}" for name in listed} <= documented
