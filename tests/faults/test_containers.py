"""What containers do wrong: each a distinct, true error, restarts with backoff, and the last words kept."""

from collections.abc import Iterator
from typing import Any

import pytest

from controlplane.model import Cause, Task
from scripts.fault_suite.audit import audit
from scripts.fault_suite.records import executions, recorded
from scripts.fault_suite.rig import Rig, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

#: A container that has ended begins anew within this time.
RESTART_LIMIT_S = 30.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("containers") / "state", nodes=2, small_disks=False) as rig:
        rig.create("hurt", concurrency=2, cpus=0.1, limits={"max_attempts": 1, "run_time": "8s"})
        yield rig


def ended(rig: Rig, task_id: str) -> Task:
    return recorded(rig.database_url)[task_id].task


def ready(rig: Rig, workspace: str) -> bool:
    replicas = rig.workspace(workspace).get("replicas", [])
    return any(one["state"] == "REPLICA_STATE_READY" for one in replicas)


@pytest.mark.parametrize(
    ("do", "reason", "cause", "words"),
    [
        ("cut", "CONNECTION_CLOSED", Cause.CUSTOMER, "after 10 of 1000 bytes"),
        ("reset", "CONNECTION_CLOSED", Cause.CUSTOMER, "without an answer"),
        ("garbage", "BAD_RESPONSE", Cause.CUSTOMER, "HTTP"),
        ("hang", "RUN_TIME_LIMIT", Cause.CUSTOMER, "8 s"),
        ("exit", "CONTAINER_EXITED", Cause.CUSTOMER, "3"),
    ],
)
def test_each_failure_of_a_container_has_its_own_true_name(
    rig: Rig, do: str, reason: str, cause: Cause, words: str
) -> None:
    until(lambda: ready(rig, "hurt"), RESTART_LIMIT_S, "the container to be back")
    answer = rig.api("hurt").run(do)
    task = ended(rig, answer["task_id"])
    assert (task.failure_reason, Cause(task.cause)) == (reason, cause), task.failure_message
    assert words in task.failure_message
    assert task.failure_message in answer["msg"]


def test_after_its_container_has_exited_work_goes_on(rig: Rig) -> None:
    until(lambda: ready(rig, "hurt"), RESTART_LIMIT_S, "the container to be back")
    answer = rig.api("hurt").run()
    assert (answer["result_code"], answer["data"]) == (200, answer["token"])


def test_work_that_kills_its_container_on_two_nodes_takes_no_third(rig: Rig) -> None:
    answer = rig.work.run("exit", limit_s=60)
    task = ended(rig, answer["task_id"])
    assert task.failure_reason == "CONTAINER_EXITED"
    assert "died under it on 2 nodes" in task.failure_message
    runs = [one for one in executions(rig.worker_logs) if one.token == answer["token"]]
    assert len({one.replica_id for one in runs}) == len(runs) == 2


def test_a_container_that_never_listens_is_given_up_with_its_last_words(rig: Rig) -> None:
    rig.make_image("deaf", WORKER_DEAF="1", WORKER_SAY="loading the model")
    rig.create("deaf", image="deaf", cpus=0.1, readiness={"start_limit": "2s"}, wait=False)
    said = until(lambda: says(rig, "deaf", "never opened within 2 s"), RESTART_LIMIT_S, "the verdict")
    assert "loading the model" in said["message"]


def test_a_crash_loop_slows_down_and_its_last_words_are_kept(rig: Rig) -> None:
    rig.make_image("crash", WORKER_EXIT="7", WORKER_SAY="no such model: sd-9")
    rig.create("crash", image="crash", cpus=0.1, wait=False)
    said = until(lambda: says(rig, "crash", "next start after 4 s"), RESTART_LIMIT_S, "the third failure")
    assert "exited with code 7" in said["message"]
    assert "no such model: sd-9" in said["message"]


def test_an_image_that_is_not_there_is_named_and_its_coming_mends_it(rig: Rig) -> None:
    rig.create("late", image="late", cpus=0.1, wait=False)
    why = until(lambda: rig.workspace("late").get("message"), RESTART_LIMIT_S, "the missing image to be named")
    assert "without a directory for the image" in why
    rig.make_image("late")
    until(lambda: ready(rig, "late"), RESTART_LIMIT_S, "the replica to come up")


def test_no_execution_is_unexplained(rig: Rig) -> None:
    findings = audit([], recorded(rig.database_url), executions(rig.worker_logs), once_uid=rig.once_uid)
    findings.check()


def says(rig: Rig, workspace: str, words: str) -> dict[str, Any] | None:
    """The replica whose message has these words."""
    replicas = rig.workspace(workspace).get("replicas", [])
    return next((one for one in replicas if words in one.get("message", "")), None)
