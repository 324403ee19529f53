"""A container dies under a request, and its daemon is killed: what happened is readable all the same."""

from typing import Any

import pytest

from scripts.programs import Platform
from tests.images import echo_image
from tests.system.conftest import Rest, until, workspace_file


@pytest.mark.docker
@pytest.mark.slow
def test_what_happened_is_readable_after_container_and_node_are_gone(
    platform: Platform, docker_engine: Any, unique: str
) -> None:
    image = echo_image(docker_engine.api)
    platform.start_node("alpha", "--engine", "docker", "--stop-containers")
    platform.start_bridge()
    secret = f"hunter2-{unique}"
    description = workspace_file(
        platform.state, "echo", image, limits={"max_attempts": 1}, env={"API_KEY": secret, "MODEL": "v2"}
    )
    platform.ngpu("workspace", "create", description, "--wait", "--timeout", "90s")
    rest = Rest(platform.url, platform.ngpu("workspace", "show", "echo")["workspace"]["id"])
    status, answer = rest.call("POST", f"/user/exit?code=7&key={secret}", {})
    assert status != 200, answer
    task = platform.ngpu("task", "list", "-w", "echo")["task_id"]

    flight = until(lambda: "node" in (now := platform.ngpu("task", "record", task)) and now, 30)
    platform.nodes["alpha"].kill()
    assert flight["attempt"]["failure"]["reason"] == "CONTAINER_EXITED"
    assert "alpha" in flight["placement"]
    assert flight["plane"]["kind"] == "failed"
    assert flight["node"]["image_digest"].startswith("sha256:")
    events = [(event["state"], event["message"]) for event in flight["node"]["events"] if "message" in event]
    assert any(state == "backoff" and "exited with code 7" in message for state, message in events), events
    # Each line with its time; what is named like a secret is not in it.
    assert "Z POST /exit?code=7&key=[API_KEY]" in flight["node"]["log"], flight["node"]
    assert secret not in str(flight)
    assert platform.ngpu("task", "record", task) == flight
    # The dead daemon's next container lives on without it; back, it stops it at the end.
    platform.start_node("alpha", "--engine", "docker", "--stop-containers")
