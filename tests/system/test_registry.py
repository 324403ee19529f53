"""A private image registry, with and without credentials: what the customer and the operator see."""

from typing import Any

import pytest

from scripts.programs import Platform
from tests.images import PASSWORD, USERNAME, echo_image, push, registry
from tests.system.conftest import Rest, until, workspace_file

pytestmark = [pytest.mark.docker, pytest.mark.slow]


def replica(platform: Platform, name: str) -> dict[str, Any]:
    """The workspace's only replica; empty while there is none."""
    found: list[dict[str, Any]] = platform.ngpu("workspace", "show", name)["workspace"].get("replicas", [])
    return found[0] if found else {}


def test_image_is_pulled_with_credentials_and_wrong_ones_are_said_to_be_wrong(
    platform: Platform, docker_engine: Any, unique: str
) -> None:
    platform.start_node("node", "--engine", "docker", "--stop-containers")
    platform.start_bridge()
    with registry(credentials=True) as address:
        image = push(docker_engine.api, echo_image(docker_engine.api), address, f"{unique}:1", credentials=True)

        wrong = {"username": USERNAME, "password": "wrong"}
        platform.ngpu("workspace", "create", workspace_file(platform.state, "wrong", image, registry=wrong))
        said = until(lambda: (one := replica(platform, "wrong")).get("state") == "REPLICA_STATE_BACKOFF" and one)
        assert "credentials" in said["message"], said
        assert (
            "wrong" not in platform.ngpu("workspace", "show", "wrong")["workspace"]["spec"].get("registry", {}).values()
        )
        platform.ngpu("workspace", "delete", "wrong")

        right = {"username": USERNAME, "password": PASSWORD}
        file = workspace_file(platform.state, "right", image, registry=right)
        platform.ngpu("workspace", "create", file, "--wait", "--timeout", "90s")
        rest = Rest(platform.url, platform.ngpu("workspace", "show", "right")["workspace"]["id"])
        nodes = rest.ok("GET", "/user/queryNodes")["nodes"]
        assert [(node["progress"], node["status"]) for node in nodes] == [(100, 1)]
        assert rest.ok("POST", "/user/echo", {"data": "pulled"})["data"] == "pulled"

        missing = workspace_file(platform.state, "missing", f"{address}/nobody-has-this:1", registry=right)
        platform.ngpu("workspace", "create", missing)
        said = until(lambda: (one := replica(platform, "missing")).get("state") == "REPLICA_STATE_BACKOFF" and one)
        assert f"there is no image {address}/nobody-has-this:1" in said["message"], said
    docker_engine.images.remove(image, force=True)


def test_open_registry_needs_no_credentials(platform: Platform, docker_engine: Any, unique: str) -> None:
    platform.start_node("node", "--engine", "docker", "--stop-containers")
    with registry() as address:
        image = push(docker_engine.api, echo_image(docker_engine.api), address, f"{unique}:1")
        platform.ngpu(
            *("workspace", "create", workspace_file(platform.state, "open", image)), *("--wait", "--timeout", "90s")
        )
    docker_engine.images.remove(image, force=True)
