"""Replicas that share a GPU: placed together until it is given out, and each pays for its part."""

import pytest

from scripts.programs import BIN, Platform
from tests.system.conftest import Rest, until, workspace_file

SMALL = {"cpus": 1, "memory": "1GiB"}


@pytest.mark.slow
def test_replicas_with_shares_live_on_one_gpu_and_pay_their_part(platform: Platform) -> None:
    fleet = ("--state-dir", str(platform.state / "simulated"), "--nodes", "1", "--gpus", "1")
    platform.launch([str(BIN / "ngpu"), "simulate", *fleet], "simulated")
    until(lambda: platform.node("sim-001").get("connected"))
    shared = workspace_file(platform.state, "small", "demo:1", replicas=2, gpu={"share": 0.4}, **SMALL)
    created = platform.ngpu("workspace", "create", shared, "--wait", "--timeout", "60s")["workspace"]
    assert len({replica["gpu_ids"][0] for replica in created["replicas"]}) == 1

    # Neither a third of them fits on it, nor anybody who wants all of it.
    platform.ngpu("workspace", "scale", "small", "3")
    whole = workspace_file(platform.state, "whole", "demo:1", gpu={"count": 1}, **SMALL)
    platform.ngpu("workspace", "create", whole)
    until(lambda: "400/1000 free" in platform.ngpu("workspace", "show", "small")["workspace"]["message"])
    until(lambda: "no free healthy GPU" in platform.ngpu("workspace", "show", "whole")["workspace"]["message"])

    platform.start_bridge()
    rest = Rest(platform.url, created["id"])
    task = rest.ok("POST", "/user/x?seconds=1", {"data": ""})["taskID"]
    detail = rest.ok("GET", f"/user/getDetailed?taskID={task}")["taskInfo"]["ext"]
    assert 0.4 <= detail["gpuSeconds"] < 0.45
