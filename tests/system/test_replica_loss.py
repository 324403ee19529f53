"""A daemon is killed under calls: the calls go on and a replacement appears, explained."""

from typing import Any

import pytest

from scripts.programs import Platform
from tests.images import echo_image
from tests.system.conftest import Callers, Rest, until, workspace_file


def replicas(platform: Platform, state: str = "READY") -> dict[str, str]:
    """Ready replicas by id: the name of the node of each."""
    workspace = platform.ngpu("workspace", "show", "echo")["workspace"]
    found = [r for r in workspace.get("replicas", []) if r["state"] == f"REPLICA_STATE_{state}"]
    return {replica["id"]: replica["node_name"] for replica in found}


@pytest.mark.docker
@pytest.mark.slow
def test_calls_go_on_when_a_daemon_is_killed_and_a_replacement_appears(
    platform: Platform, docker_engine: Any, unique: str
) -> None:
    image = echo_image(docker_engine.api)
    for name in ("alpha", "beta"):
        platform.start_node(name, "--engine", "docker", "--stop-containers")
    platform.start_bridge()
    platform.ngpu(
        *("workspace", "create", workspace_file(platform.state, "echo", image, replicas=2, concurrency=4)),
        *("--wait", "--timeout", "90s"),
    )
    before = replicas(platform)
    assert sorted(before.values()) == ["alpha", "beta"], "two replicas are spread over two nodes"
    rest = Rest(platform.url, platform.ngpu("workspace", "show", "echo")["workspace"]["id"])

    callers = Callers(lambda n: rest.call("POST", "/user/sleep?s=0.05", {"data": str(n)}), 4)
    until(lambda: len(callers.answers) > 40)
    platform.nodes["alpha"].kill()
    so_far = len(callers.answers)

    after = until(lambda: (now := replicas(platform)) and len(now) == 2 and now, 90)
    assert set(after.values()) == {"beta"}
    until(lambda: len(callers.answers) > so_far + 40)
    answers = callers.stop()
    assert [a for a in answers if a[0] != 200] == [], "no caller noticed"

    new = next(iter(set(after) - set(before)))
    decisions = platform.ngpu("explain", "workspace", "echo")["decisions"]
    decision = next(d for d in decisions if new in d["subject"])
    assert decision["chosen"] == platform.node("beta")["addr"]
    assert "not connected" in str(decision["refusals"]), decision

    # The dead daemon's container lives on without it; when the daemon is back it is told to stop it.
    platform.start_node("alpha", "--engine", "docker", "--stop-containers")
    lost = next(replica for replica, node in before.items() if node == "alpha")
    until(
        lambda: (
            not docker_engine.containers.list(all=True, ignore_removed=True, filters={"label": f"ngpu.replica={lost}"})
        )
    )
