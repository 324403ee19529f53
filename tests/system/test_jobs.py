"""Containers that are asynchronous themselves, with real processes: one that behaves as those of the original do."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.programs import Platform
from tests.images import echo_image
from tests.system.conftest import Rest, until, workspace_file

CLASSIC = Path(__file__).parent.parent / "classic.py"


def start(state: Path, *nodes: str) -> Platform:
    """A platform with process nodes that can run classic.py; to be stopped by the caller."""
    image = state / "images" / "classic"
    image.mkdir(parents=True)
    shutil.copy(CLASSIC, image / "classic.py")
    (image / "image.toml").write_text(f"command = {json.dumps([sys.executable, '-u', 'classic.py'])}\n")
    platform = Platform(state).__enter__()
    try:
        for node in nodes:
            platform.start_node(
                *(node, "--engine", "process", "--process-images", str(state / "images"), "--stop-containers")
            )
        platform.start_bridge()
    except BaseException:
        platform.stop()
        raise
    return platform


def workspace(platform: Platform, name: str = "classic", image: str = "classic", **fields: Any) -> Rest:
    rule = {"preset": "ngpu-classic", "poll": "100ms", "cancel": "DELETE {path}?taskID={id}"}
    described = workspace_file(platform.state, name, image, **{"cpus": 0.1, "async": rule, **fields})
    platform.ngpu("workspace", "create", described, "--wait", "--timeout", "90s")
    return Rest(platform.url, platform.ngpu("workspace", "show", name)["workspace"]["id"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """For what does no harm to the others."""
    platform = start(tmp_path_factory.mktemp("jobs"), "node")
    yield platform
    platform.stop()


@pytest.fixture(scope="module")
def classic(running: Platform) -> Rest:
    return workspace(running)


def detail(rest: Rest, task_id: str) -> dict[str, Any]:
    info: dict[str, Any] = rest.ok("GET", f"/user/getDetailed?taskID={task_id}")["taskInfo"]
    return info


def test_task_is_done_when_its_job_is(classic: Rest) -> None:
    began = time.monotonic()
    answer = classic.ok("POST", "/user/removeBG", {"data": {"s": 1, "echo": "hello"}})
    assert time.monotonic() - began >= 1.0, "a plain proxy would have been done at once"
    output = json.loads(answer["data"])
    assert (output["result_code"], output["echo"]) == (100, "hello")


def test_async_task_runs_until_its_job_is_done_and_keeps_its_slot(classic: Rest) -> None:
    first = classic.ok("POST", "/user/schedulingTask?paramUrl=removeBG", {"data": {"s": 1, "echo": 1}})["taskID"]
    second = classic.ok("POST", "/user/schedulingTask?paramUrl=removeBG", {"data": {"s": 0, "echo": 2}})["taskID"]
    until(lambda: classic.call("GET", f"/user/queryTask?taskID={first}")[1]["result_code"] == 101)
    assert classic.call("GET", f"/user/queryTask?taskID={second}")[1]["result_code"] == 100, "it waits for the slot"
    assert [json.loads(classic.ended(task)["data"])["echo"] for task in (first, second)] == [1, 2]


def test_raw_call_is_answered_with_the_output(classic: Rest) -> None:
    status, _, body = classic.raw("POST", "/run/removeBG", b'{"s": 0.2, "size": 300000}')
    assert (status, len(json.loads(body)["image"])) == (200, 300_000), "also one that is no inline body"


def test_answer_without_an_id_is_the_tasks_answer(classic: Rest) -> None:
    answer = classic.ok("POST", "/user/plain", {"data": "as ever"})
    assert json.loads(answer["data"])["echo"] == "as ever"


def test_failed_job_fails_its_task_once_and_says_why(classic: Rest) -> None:
    status, answer = classic.call("POST", "/user/removeBG", {"data": {"fail": "CUDA out of memory"}})
    assert (status, answer["result_code"]) == (502, 500)
    assert "CUDA out of memory" in answer["msg"]
    attempts = detail(classic, answer["taskID"])["ext"]["attempts"]
    assert [attempt["number"] for attempt in attempts] == [1]


def log_of(platform: Platform, node: str = "node", name: str = "classic") -> list[str]:
    """What the containers of a workspace on a process node have said."""
    return [line for log in (platform.state / node).rglob("*.log") for line in log.read_text().splitlines()]


def test_busy_container_gets_the_task_again_and_no_attempt_is_used(running: Platform, classic: Rest) -> None:
    classic.ok("POST", "/user/busy?n=4")
    answer = classic.ok("POST", "/user/removeBG", {"data": {"echo": "after all"}})
    assert json.loads(answer["data"])["echo"] == "after all"
    attempts = detail(classic, answer["taskID"])["ext"]["attempts"]
    reasons = [(attempt["error"] or {}).get("reason", "") for attempt in attempts]
    # Four are more than the three attempts that a task has.
    assert reasons == ["BUSY"] * 4 + [""]


def begun(rest: Rest, task_id: str) -> str:
    """The id that the container gave the job of a task."""

    def job() -> str:
        attempts = detail(rest, task_id)["ext"]["attempts"]
        return str(attempts[-1].get("job", "")) if attempts else ""

    return str(until(job))


def test_cancelled_task_ends_its_job_and_frees_the_slot(running: Platform, classic: Rest) -> None:
    task = classic.ok("POST", "/user/schedulingTask?paramUrl=removeBG", {"data": {"s": 60}})["taskID"]
    job = begun(classic, task)
    began = time.monotonic()
    classic.call("DELETE", f"/user/task?taskID={task}")
    assert json.loads(classic.ok("POST", "/user/removeBG", {"data": {"echo": 1}})["data"])["echo"] == 1
    assert time.monotonic() - began < 5
    assert f"END {job}" in log_of(running)


def test_caller_who_hangs_up_ends_the_job(running: Platform, classic: Rest) -> None:
    before = Counter(log_of(running))
    with pytest.raises(TimeoutError):
        classic.raw("POST", "/run/removeBG", b'{"s": 60}', timeout=1.5)
    until(lambda: sum(line.startswith("END ") for line in log_of(running)) > ends(before), 5)
    assert json.loads(classic.ok("POST", "/user/removeBG", {"data": {"echo": 2}})["data"])["echo"] == 2


def ends(lines: Counter[str]) -> int:
    return sum(count for line, count in lines.items() if line.startswith("END "))


def test_run_time_limit_holds_for_a_job(running: Platform) -> None:
    short = workspace(running, "short", limits={"run_time": "1s"})
    status, answer = short.call("POST", "/user/removeBG", {"data": {"s": 60}})
    assert status == 504
    assert "run time limit of 1 s" in answer["msg"]
    assert json.loads(short.ok("POST", "/user/removeBG", {"data": {"echo": 1}})["data"])["echo"] == 1


def test_callers_own_question_goes_to_the_replica_and_is_answered_from_the_record_afterwards(
    running: Platform, classic: Rest
) -> None:
    task = classic.ok("POST", "/user/schedulingTask?paramUrl=removeBG", {"data": {"s": 2, "echo": "mine"}})["taskID"]
    job = begun(classic, task)

    def ask() -> dict[str, Any]:
        status, headers, body = classic.raw("GET", f"/run/removeBG?taskID={job}")
        assert status == 200
        return {**json.loads(body), "by": headers["x-ngpu-task-id"]}

    until(lambda: ask()["result_code"] == 102, 5)
    assert ask()["by"] != task, "the container was asked, beside its only slot"
    enveloped = classic.ok("POST", f"/user/removeBG?taskID={job}", {"data": ""})
    assert json.loads(enveloped["data"])["result_code"] == 102, "it was no job of its own"
    classic.ended(task)
    told = ask()
    assert (told["result_code"], told["echo"], told["by"]) == (100, "mine", task)
    asked = log_of(running).count(f"GET /removeBG?taskID={job}")
    ask()
    assert log_of(running).count(f"GET /removeBG?taskID={job}") == asked, "nobody was asked"


def answered(rest: Rest, job: str) -> int:
    """The container's result code, if a question after a job is answered by it."""
    status, _, body = rest.raw("GET", f"/run/removeBG?taskID={job}")
    return int(json.loads(body)["result_code"]) if status == 200 else 0


def executions(container: Any) -> int:
    return sum(line.startswith("RUN ") for line in container.logs().decode().splitlines())


@pytest.mark.docker
@pytest.mark.slow
def test_killed_daemon_and_killed_control_plane_cost_no_second_execution(
    platform: Platform, docker_engine: Any, unique: str
) -> None:
    image = echo_image(docker_engine.api)
    node = ("node", "--engine", "docker", "--stop-containers")
    platform.start_node(*node)
    platform.start_bridge()
    command = ["/usr/bin/python3", "-u", "-c", CLASSIC.read_text()]
    rest = workspace(platform, unique, image, command=command)
    (container,) = docker_engine.containers.list(filters={"label": f"ngpu.workspace={unique}"})

    task = rest.ok("POST", "/user/schedulingTask?paramUrl=removeBG", {"data": {"s": 20, "echo": "once"}})["taskID"]
    job = begun(rest, task)
    platform.nodes["node"].kill()
    platform.start_node(*node)
    until(lambda: answered(rest, job) == 102, 10)
    platform.controlplane.kill()
    platform.start_controlplane()
    # The callers' own question finds it again, too.
    until(lambda: answered(rest, job) == 102, 10)
    platform.nodes["node"].kill()
    platform.controlplane.kill()
    platform.start_controlplane()
    platform.start_node(*node)
    assert json.loads(rest.ended(task)["data"])["echo"] == "once"
    attempts = detail(rest, task)["ext"]["attempts"]
    assert [(attempt["number"], attempt["job"]) for attempt in attempts] == [(1, job)]
    assert executions(container) == 1


def test_busy_task_goes_to_another_replica_and_lost_jobs_are_said_to_be_lost(tmp_path: Path) -> None:
    platform = start(tmp_path, "one", "two")
    try:
        rest = workspace(platform, replicas=2)
        placed = {
            replica["id"]: replica["node_name"]
            for replica in platform.ngpu("workspace", "show", "classic")["workspace"]["replicas"]
        }
        task = rest.ok("POST", "/user/schedulingTask?paramUrl=removeBG", {"data": {"s": 3, "echo": 1}})["taskID"]
        job = begun(rest, task)
        node = placed[detail(rest, task)["ext"]["attempts"][0]["replica"]]
        platform.nodes[node].kill()
        platform.nodes[node].process.wait()
        status, _, body = rest.raw("GET", f"/run/removeBG?taskID={job}")
        assert status == 503, body
        assert json.loads(body)["msg"].startswith("The node that")
        assert json.loads(rest.ended(task, 120)["data"])["echo"] == 1
        status, headers, body = rest.raw("GET", f"/run/removeBG?taskID={job}")
        assert (status, json.loads(body)["echo"], headers["x-ngpu-task-id"]) == (200, 1, task)
    finally:
        platform.stop()
