"""A call to a workspace without a ready replica waits, and everybody who asks is told its place and the reason."""

import asyncio

import pytest
from ngpu.v1 import node_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from tests.wire.house import DEADLINE_S, Client, House, request, seconds, until
from tests.wire.node import Node, answered, hold


class Slow(Node):
    """Its replicas are not ready before `progress` is 100."""

    progress = 0

    def report(self, sequence: int) -> node_pb2.HeartbeatRequest:
        report = super().report(sequence)
        for replica in report.replicas:
            replica.progress = self.progress
            if self.progress < 100:
                replica.state = workspace_pb2.REPLICA_STATE_PULLING
                replica.capacity = 0
        return report

    async def pull(self, house: House, progress: int) -> None:
        """As far as that; returns when the control plane knows."""
        self.progress = progress
        self.say()
        shown = -1
        async with asyncio.timeout(DEADLINE_S):
            while shown != progress:
                answer = await house.operator.workspaces.GetWorkspace(
                    workspace_pb2.GetWorkspaceRequest(workspace="echo"), metadata=house.operator.auth
                )
                shown = max((replica.progress for replica in answer.workspace.replicas), default=-1)
                await asyncio.sleep(0.01)


async def _query(client: Client, query: pb.QueryRequest) -> pb.QueryResponse:
    return await client.tasks.Query(query, metadata=client.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]


async def asked(client: Client, task_id: str) -> list[pb.Task]:
    """The task as the three methods that tell of it show it: Query, GetDetail, ListTasks."""
    query = await _query(client, pb.QueryRequest(task_id=task_id))
    detail = await client.tasks.GetDetail(pb.GetDetailRequest(task_id=task_id), metadata=client.auth)
    list_ = pb.ListTasksRequest(workspace_id=detail.workspace_id, full=True)
    listed = [
        task
        async for page in client.tasks.ListTasks(list_, metadata=client.auth, timeout=DEADLINE_S)
        for task in page.tasks
        if task.task_id == task_id
    ]
    return [query.task, detail.task, *listed]


async def test_waiting_task_shows_its_place_and_which_replica_is_the_next(there: House) -> None:
    node = Slow(there)
    await node.join()
    async with node.up():
        workspace = await there.operator.workspace(
            scale=workspace_pb2.Scale(min_replicas=0, max_replicas=1), replicas=0
        )
        owner = there.client(workspace.id)
        # Nobody has called yet, so nothing runs: these calls are what starts it.
        first, second = [(await owner.schedule(request(body=body))).task for body in (b"first", b"second")]
        query = pb.QueryRequest(task_id=first.task_id, wait=seconds(15.0))
        call = asyncio.create_task(_query(owner, query))
        await until(lambda: bool(node.assignments))
        (assignment,) = node.assignments
        await node.pull(there, 43)
        # The words are put together twice a second at most.
        async with asyncio.timeout(DEADLINE_S):
            while "43 %" not in (await asked(owner, second.task_id))[0].waiting_for:
                await asyncio.sleep(0.01)
        shown = await asked(owner, second.task_id)
        assert len(shown) == 3
        for task in shown:
            assert (task.state, task.queue_position) == (pb.TASK_STATE_QUEUED, 1)
            assert f"replica {assignment.replica_id} on node node-1, which pulls its image, 43 %" in task.waiting_for
            assert not task.HasField("expected_wait")
        assert not call.done()
        await node.pull(there, 100)
        assert (await call).response.body.inline == b"first"
        last = await _query(owner, pb.QueryRequest(task_id=second.task_id, wait=seconds(15.0)))
        assert (last.response.body.inline, last.task.waiting_for) == (b"second", "")


async def test_wait_is_bounded_and_its_end_says_what_was_waited_for(there: House) -> None:
    limits = workspace_pb2.Limits()
    limits.queue_time.FromMilliseconds(300)
    workspace = await there.operator.workspace(limits=limits)
    answer = await there.bridge.schedule(request(workspace, wait_s=10.0))
    assert (answer.task.state, answer.task.failure.reason) == (pb.TASK_STATE_FAILED, "QUEUE_TIME_LIMIT")
    assert "no replica is placed yet" in answer.task.failure.message


@pytest.mark.parametrize("queued", [1, 2])
async def test_expected_wait_is_told_once_it_is_known_how_long_tasks_take(there: House, queued: int) -> None:
    node = Node(there, answer=hold)
    await node.join()
    async with node.up():
        workspace = await there.operator.workspace()
        await there.operator.ready("echo")
        await there.bridge.schedule(request(workspace))
        (start,) = await node.started()
        await asyncio.sleep(0.05)
        result = answered(start.attempt_id)
        # None of it was the way there and back: no slot holds a task ahead.
        result.last_byte_after_us = 10_000_000
        node.end(result)
        await until(lambda: not node.ended)
        tasks = [(await there.bridge.schedule(request(workspace))).task for _ in range(1 + queued)]
        wait = (await asked(there.operator, tasks[-1].task_id))[0]
        assert wait.queue_position == queued - 1
        # Of the one that runs now, something is over already.
        assert 0.025 * queued <= wait.expected_wait.ToMilliseconds() / 1000 < 5 * queued
