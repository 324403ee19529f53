"""Containers that are asynchronous themselves, over real gRPC: rules, jobs, questions, and the loss of one."""

import asyncio

import grpc
from ngpu.v1 import http_pb2, node_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from tests.wire.house import DEADLINE_S, House, refused, request, seconds, until
from tests.wire.node import Node, answered, echo, hold

CLASSIC = workspace_pb2.JobRule(preset="ngpu-classic")


def question(workspace: workspace_pb2.Workspace, job_id: str = "j1") -> pb.ScheduleRequest:
    """A caller asks after a job as he would ask the container."""
    return pb.ScheduleRequest(
        workspace_id=workspace.id,
        request=http_pb2.HttpRequest(method="GET", path="/removeBG", query=f"taskID={job_id}"),
        wait=seconds(10),
    )


async def detail(there: House, task_id: str) -> pb.GetDetailResponse:
    return await there.bridge.tasks.GetDetail(  # type: ignore[no-any-return]
        pb.GetDetailRequest(task_id=task_id), metadata=there.bridge.auth, timeout=DEADLINE_S
    )


async def test_rule_is_shown_with_all_that_its_preset_means(there: House) -> None:
    workspace = await there.operator.workspace(jobs=[CLASSIC])
    (rule,) = workspace.spec.jobs
    assert (rule.preset, rule.start, rule.ask) == ("ngpu-classic", "POST /*", "GET {path}?taskID={id}")
    assert (list(rule.done), list(rule.busy), rule.poll.seconds) == (["100", "200"], ["203"], 1)


async def test_every_fault_of_a_rule_is_told(there: House) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", "jobs: preset: 'modern' is not known"):
        await there.operator.workspace(jobs=[workspace_pb2.JobRule(preset="modern")])


async def test_job_is_followed_told_of_and_asked_after(there: House) -> None:
    node = Node(there, answer=hold)
    await node.join()
    workspace = await there.operator.workspace(jobs=[CLASSIC])
    async with node.up():
        await there.operator.ready("echo")
        task_id = (await there.bridge.schedule(request(workspace, "/removeBG"))).task.task_id
        (start,) = await node.started()
        assert start.job.ask == "GET {path}?taskID={id}"
        node.tell(node_pb2.ExecuteRequest(jobs=[node_pb2.Job(attempt_id=start.attempt_id, job_id="j1")]))
        while not (await detail(there, task_id)).attempts[0].job_id:
            await asyncio.sleep(0.01)
        assert (await detail(there, task_id)).attempts[0].job_id == "j1"

        # Its only slot is taken, and the question is answered all the same.
        asked = asyncio.create_task(there.bridge.schedule(question(workspace)))
        await node.started(2)
        pinned = next(other for other in node.running.values() if other.attempt_id != start.attempt_id)
        assert (pinned.replica_id, pinned.HasField("job")) == (start.replica_id, False)
        node.end(answered(pinned.attempt_id, b"running"))
        assert (await asked).response.body.inline == b"running"

        result = answered(start.attempt_id, b"output")
        result.job_id = "j1"
        node.end(result)
        await until(lambda: start.attempt_id in node.acked)
        answer = await there.bridge.schedule(question(workspace))
        assert (answer.task.task_id, answer.response.body.inline) == (task_id, b"output")
        # The id is the container's word in this workspace, and in no other.
        other = await there.operator.workspace("other", jobs=[CLASSIC], replicas=0)
        unknown = await there.bridge.schedule(
            pb.ScheduleRequest(workspace_id=other.id, request=question(other).request)
        )
        assert unknown.task.state == pb.TASK_STATE_QUEUED


async def test_lost_job_is_said_to_be_lost(there: House) -> None:
    node = Node(there, answer=hold)
    await node.join()
    workspace = await there.operator.workspace(jobs=[CLASSIC])
    async with node.up():
        await there.operator.ready("echo")
        task_id = (await there.bridge.schedule(request(workspace, "/removeBG", repeatable=False))).task.task_id
        (start,) = await node.started()
        failed = node_pb2.Result(attempt_id=start.attempt_id, delivery=pb.DELIVERY_ANSWERED, job_id="j1")
        failed.failure.CopyFrom(pb.Failure(cause=pb.CAUSE_CUSTOMER, reason="JOB_FAILED", message="No face found."))
        node.end(failed)
        await until(lambda: start.attempt_id in node.acked)
    with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", "not connected"):
        await there.bridge.schedule(question(workspace))
    async with node.up():
        await there.operator.workspaces.ScaleWorkspace(
            workspace_pb2.ScaleWorkspaceRequest(workspace="echo", replicas=0),
            metadata=there.operator.auth,
            timeout=DEADLINE_S,
        )
        # Until it is gone it may have words about its job.
        node.answer = echo
        with refused(grpc.StatusCode.NOT_FOUND, "JOB_LOST", f"task {task_id} was not completed: No face"):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await there.bridge.schedule(question(workspace))
