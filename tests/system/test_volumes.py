"""A volume outlives its workspace's containers and its node's daemon, and goes with the workspace."""

import json
from pathlib import Path

import pytest

from scripts.programs import Platform
from tests.system.conftest import Rest, until, workspace_file


@pytest.mark.slow
def test_what_a_container_keeps_is_there_for_the_next_until_its_workspace_is_deleted(
    platform: Platform, images: Path
) -> None:
    node = ("node", "--engine", "process", "--process-images", str(images), "--stop-containers")
    platform.start_node(*node)
    platform.start_bridge()
    file = workspace_file(platform.state, "echo", "echo", volumes={"models": "/models"})
    created = platform.ngpu("workspace", "create", file, "--wait", "--timeout", "60s")
    rest = Rest(platform.url, created["workspace"]["id"])

    def volume() -> Path:
        about = json.loads(rest.ok("POST", "/user/about", {"data": ""})["data"])
        return Path(about["env"]["NGPU_VOLUME_MODELS"])

    weights = volume() / "weights"
    assert rest.ok("POST", f"/user/write?path={weights}", {"data": ""})["data"] == "ok"
    platform.nodes["node"].kill()
    platform.start_node(*node)
    until(lambda: len(platform.ngpu("workspace", "show", "echo")["workspace"].get("replicas", [])) == 1)
    platform.ngpu("workspace", "scale", "echo", "0")
    platform.ngpu("workspace", "scale", "echo", "1", "--wait", "--timeout", "60s")
    assert (volume() / "weights").exists()
    platform.ngpu("workspace", "delete", "echo", "--yes")
    until(lambda: not weights.parent.exists())
