"""Updates and numbers that follow the load, under calls and over real processes: no caller notices."""

from pathlib import Path
from typing import Any

import pytest

from scripts.programs import Failed, Platform
from tests.images import echo_directory
from tests.system.conftest import Callers, Rest, until, workspace_file

#: Room for more of them than run, on any machine.
SMALL: dict[str, Any] = {"concurrency": 4, "replicas": 2, "cpus": 0.1, "memory": "128MiB", "shm": "1MiB"}


def file(platform: Platform, **fields: Any) -> str:
    """The workspace's description with these changes."""
    return workspace_file(platform.state, "echo", "echo", **{**SMALL, **fields})


def version(platform: Platform, number: str, **fields: Any) -> str:
    return file(platform, env={"VERSION": number}, **fields)


def shown(platform: Platform) -> dict[str, Any]:
    answer: dict[str, Any] = platform.ngpu("workspace", "show", "echo")["workspace"]
    return answer


@pytest.fixture
def rest(platform: Platform, images: Path) -> Rest:
    platform.start_node("node", "--engine", "process", "--process-images", str(images), "--stop-containers")
    platform.start_bridge()
    platform.ngpu("workspace", "create", version(platform, "1"), "--wait", "--timeout", "60s")
    return Rest(platform.url, shown(platform)["id"])


@pytest.mark.slow
def test_no_caller_notices_an_update_nor_one_that_fails(platform: Platform, rest: Rest, images: Path) -> None:
    callers = Callers(lambda n: rest.call("POST", "/user/sleep?s=0.05", {"data": str(n)}), 4)
    platform.ngpu("workspace", "update", version(platform, "2"), "--wait", "--timeout", "60s")
    until(lambda: len(shown(platform)["replicas"]) == 2)
    assert '"VERSION": "2"' in rest.ok("POST", "/user/about", {"data": ""})["data"]

    echo_directory(images, "broken", {"ECHO_EXIT": "3"})
    bad = workspace_file(platform.state, "echo", "broken", **SMALL)
    with pytest.raises(Failed, match="Generation 3 was taken back"):
        platform.ngpu("workspace", "update", bad, "--wait", "--timeout", "90s")
    assert shown(platform)["spec"]["image"] == "echo"
    assert "exited with code 3" in platform.ngpu("explain", "workspace", "echo")["summary"]
    until(lambda: {one["generation"] for one in shown(platform)["replicas"]} == {2})

    assert [answer for answer in callers.stop() if answer[0] != 200] == []


@pytest.mark.slow
def test_an_update_goes_on_after_kill_9(platform: Platform, rest: Rest) -> None:
    before = {one["id"] for one in shown(platform)["replicas"]}
    platform.ngpu("workspace", "update", version(platform, "2"))
    platform.controlplane.kill()
    platform.start_controlplane()
    platform.ngpu("workspace", "show", "echo", "--wait", "--timeout", "60s")
    until(lambda: len(shown(platform)["replicas"]) == 2)
    now = shown(platform)
    assert now["generation"] == 2
    assert not before & {one["id"] for one in now["replicas"]}
    assert now["message"] == ""


@pytest.mark.slow
def test_an_idle_workspace_sleeps_and_a_call_wakes_it(platform: Platform, rest: Rest) -> None:
    scale = {"min": 0, "max": 3, "idle": "10s", "queue_wait": "1s"}
    platform.ngpu("workspace", "update", version(platform, "1", scale=scale))
    until(lambda: not shown(platform)["replicas"])
    assert "It is idle" in shown(platform)["message"]
    assert rest.ok("POST", "/user/sleep?s=0.01", {"data": "x"})["result_code"] == 200
    assert shown(platform)["wanted_replicas"] == 1

    callers = Callers(lambda n: rest.call("POST", "/user/sleep?s=2", {"data": str(n)}), 12)
    try:
        until(lambda: shown(platform)["ready_replicas"] == 3)
    finally:
        answers = callers.stop()
    assert [answer for answer in answers if answer[0] != 200] == []
