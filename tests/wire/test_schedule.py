"""Schedule, Query, Cancel and Upload: what a caller gives and gets."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from tests.wire.house import DEADLINE_S, POOR, RICH, Client, House, error_of, house, refused, request, seconds, until
from tests.wire.node import Node, answered, hold

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")


async def query(client: Client, task_id: str, wait_s: float = 0.0, **fields: Any) -> pb.QueryResponse:
    message = pb.QueryRequest(task_id=task_id, wait=seconds(wait_s), **fields)
    return await client.tasks.Query(message, metadata=client.auth, timeout=DEADLINE_S)  # type: ignore[no-any-return]


async def cancel(client: Client, task_id: str, **fields: Any) -> pb.Task:
    message = pb.CancelRequest(task_id=task_id, **fields)
    answer = await client.tasks.Cancel(message, metadata=client.auth, timeout=DEADLINE_S)
    return answer.task  # type: ignore[no-any-return]


async def upload(client: Client, chunks: list[bytes], **first: Any) -> pb.UploadResponse:
    call = client.tasks.Upload(metadata=client.auth, timeout=DEADLINE_S)
    for number, chunk in enumerate(chunks):
        await call.write(pb.UploadRequest(data=chunk, **first if number == 0 else {}))
    await call.done_writing()
    return await call  # type: ignore[no-any-return]


async def test_answer_of_the_container_comes_back(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    answer = await there.bridge.schedule(request(workspace, "/a/b", b"hello", wait_s=10))
    assert re.fullmatch(r"\d{8}_\d\d_\d\d_\d\d_\d{20}", answer.task.task_id)
    assert (answer.task.state, answer.task.attempt) == (pb.TASK_STATE_COMPLETED, 1)
    assert answer.task.create_time.ToMicroseconds() <= answer.task.end_time.ToMicroseconds()
    assert answer.response.status == 200
    assert answer.response.body == http_pb2.Body(inline=b"hello", size=5, is_utf8=True)
    assert list(answer.response.headers) == [http_pb2.Header(name="X-Path", value=b"/a/b")]
    # What was told is on disk, and the node was told to forget.
    assert (await query(there.bridge, answer.task.task_id)).response == answer.response
    await until(lambda: node.acked == [f"{answer.task.task_id}.1"])


async def test_container_gets_what_was_sent_and_no_more(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(ports=[8080, 9090], concurrency=2, limits=limits(run_time=seconds(7)))
    await there.operator.ready("echo")
    sent = request(workspace, "/p%20q/x", b"\x00\xff", port=9090)
    sent.request.method, sent.request.query = "PUT", "a=1&b=%C3%A4"
    for name, value in (
        ("Content-Type", b"image/png"),
        ("X-Twice", b"1"),
        ("x-twice", b"\xe4"),
        ("Authorization", b"Bearer secret"),
        ("X-NGPU-Port", b"1"),
        ("Host", b"evil"),
        ("Content-Length", b"9999"),
        ("Transfer-Encoding", b"chunked"),
        ("Connection", b"close, X-Hop"),
        ("X-Hop", b"1"),
        ("Upgrade", b"websocket"),
    ):
        sent.request.headers.add(name=name, value=value)
    await there.bridge.schedule(sent)
    (start,) = await node.started()
    assert start.request == http_pb2.HttpRequest(
        method="PUT",
        path="/p%20q/x",
        query="a=1&b=%C3%A4",
        headers=[
            http_pb2.Header(name="Content-Type", value=b"image/png"),
            http_pb2.Header(name="X-Twice", value=b"1"),
            http_pb2.Header(name="x-twice", value=b"\xe4"),
        ],
        body=http_pb2.Body(inline=b"\x00\xff", size=2),
    )
    assert (start.port, start.run_time_limit_ms) == (9090, 7000)
    assert start.replica_id == node.assignments[0].replica_id


def limits(**fields: Any) -> workspace_pb2.Limits:
    return workspace_pb2.Limits(**fields)


async def test_async_task_is_accepted_at_once_and_asked_after(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    first = (await there.bridge.schedule(request(workspace))).task
    second = (await there.bridge.schedule(request(workspace))).task
    assert (second.state, second.queue_position) == (pb.TASK_STATE_QUEUED, 0)
    assert second.waiting_for
    await node.started()
    assert (await query(there.bridge, first.task_id)).task.state == pb.TASK_STATE_RUNNING
    waiting = asyncio.create_task(query(there.bridge, first.task_id, 10))
    node.end(answered(f"{first.task_id}.1", b"one"))
    assert (await waiting).response.body.inline == b"one"
    node.end(answered((await node.started())[0].attempt_id, b"two", 500))
    ended = await query(there.bridge, second.task_id, 10)
    # An answer of the container is an answer, whatever its status.
    assert (ended.task.state, ended.response.status) == (pb.TASK_STATE_COMPLETED, 500)


async def test_wait_that_is_over_leaves_the_task_running(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    answer = await there.bridge.schedule(request(workspace, wait_s=0.05))
    assert answer.task.state == pb.TASK_STATE_RUNNING
    assert not answer.HasField("response")
    assert (await query(there.bridge, answer.task.task_id, 0.05)).task.state == pb.TASK_STATE_RUNNING


async def test_failure_is_told_with_its_cause(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    call = asyncio.create_task(there.bridge.schedule(request(workspace, wait_s=10, repeatable=False)))
    (start,) = await node.started()
    node.end(
        node_pb2.Result(
            attempt_id=start.attempt_id,
            delivery=pb.DELIVERY_SENT,
            failure=pb.Failure(cause=pb.CAUSE_CUSTOMER, reason="RUN_TIME_LIMIT", message="It ran for 10 minutes."),
        )
    )
    answer = await call
    assert answer.task.state == pb.TASK_STATE_FAILED
    assert answer.task.failure.reason == "RUN_TIME_LIMIT"
    assert answer.task.failure.cause == pb.CAUSE_CUSTOMER
    assert not answer.HasField("response")


#: What is done to a good request, and what its refusal speaks of.
BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda r: setattr(r.request, "method", "get"), "request.method"),
    (lambda r: setattr(r.request, "method", "CONNECT"), "request.method"),
    (lambda r: setattr(r.request, "method", ""), "request.method"),
    (lambda r: setattr(r.request, "path", ""), "request.path"),
    (lambda r: setattr(r.request, "path", "a"), "request.path"),
    (lambda r: setattr(r.request, "path", "http://evil/"), "request.path"),
    (lambda r: setattr(r.request, "path", "//evil"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a//b"), "request.path"),
    (lambda r: setattr(r.request, "path", "/%2fevil"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a/../b"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a/%2e%2E"), "request.path"),
    (lambda r: setattr(r.request, "path", "/..;/b"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a\\b"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a%5Cb"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a\r\nX: 1"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a%0d%0aX:%201"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a%00"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a b"), "request.path"),
    (lambda r: setattr(r.request, "path", "/a?b"), "request.path"),
    (lambda r: setattr(r.request, "path", "/ä"), "request.path"),
    (lambda r: setattr(r.request, "path", "/%zz"), "request.path"),
    (lambda r: setattr(r.request, "path", "/" + "a" * 20_000), "longer"),
    (lambda r: setattr(r.request, "query", "a b"), "request.query"),
    (lambda r: setattr(r.request, "query", "a\nb"), "request.query"),
    (lambda r: setattr(r.request, "query", "a#b"), "request.query"),
    (lambda r: r.request.headers.add(name="Bad Name", value=b"1"), "request.headers"),
    (lambda r: r.request.headers.add(name="", value=b"1"), "request.headers"),
    (lambda r: r.request.headers.add(name="X", value=b"1\r\nY: 2"), "request.headers"),
    (lambda r: r.request.headers.add(name="X", value=b"1" * 40_000), "request.headers"),
    (lambda r: [r.request.headers.add(name="X", value=b"1") for _ in range(101)], "request.headers"),
    (lambda r: setattr(r.request.body, "inline", b"x" * (wire.INLINE_BYTES + 1)), "request.body"),
    (lambda r: setattr(r, "port", 22), "port"),
    (lambda r: setattr(r, "idempotency_key", "k" * 256), "idempotency_key"),
    (lambda r: setattr(r, "btc_address", "not an address"), "BTC address"),
    (lambda r: r.wait.CopyFrom(seconds(3601)), "wait"),
    (lambda r: r.wait.FromSeconds(-1), "wait"),
    (lambda r: setattr(r, "route", "img2img"), "workspace_id and route"),
    (lambda r: setattr(r, "workspace_id", ""), "workspace_id"),
]


async def test_bad_input_is_refused_in_words_and_nothing_is_made(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    for change, words in BAD:
        bad = request(workspace)
        change(bad)
        with refused(*INVALID, words):
            await there.bridge.schedule(bad)
    detail = await there.operator.workspaces.GetWorkspace(
        workspace_pb2.GetWorkspaceRequest(workspace="echo"), metadata=there.operator.auth
    )
    assert detail.workspace.queued_tasks == 0


async def test_unknown_workspaces_routes_and_tasks_are_not_found(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    bridge = there.bridge
    # Names and uids are no credentials: a bridge passes on what its callers send.
    for credential in ("0" * 24, "echo", "w-000000000000", " "):
        unknown = request()
        unknown.workspace_id = credential
        with refused(*NOT_FOUND):
            await bridge.schedule(unknown)
    with refused(*NOT_FOUND):
        await bridge.schedule(request(route="img2img"))
    for task_id in ("", "x", "20260101_00_00_00_" + "0" * 20, "x" * 5000, "'; drop table task"):
        with refused(*NOT_FOUND):
            await query(bridge, task_id)
        with refused(*NOT_FOUND):
            await cancel(bridge, task_id)
    await there.operator.workspaces.DeleteWorkspace(
        workspace_pb2.DeleteWorkspaceRequest(workspace="echo"), metadata=there.operator.auth
    )
    with refused(*NOT_FOUND, "deleted"):
        await bridge.schedule(request(workspace))


async def test_workspace_sees_only_its_own(there: House, node: Node) -> None:
    mine, other = await there.operator.workspace("mine"), await there.operator.workspace("other")
    await there.operator.ready("mine")
    me = there.client(mine.id)
    done = await me.schedule(request(wait_s=10))
    assert done.task.state == pb.TASK_STATE_COMPLETED
    assert (await me.schedule(request(mine))).task.task_id
    with refused(*NOT_FOUND):
        await me.schedule(request(other))
    theirs = (await there.bridge.schedule(request(other))).task.task_id
    for ask in (
        lambda: query(me, theirs),
        lambda: query(me, theirs, 5),
        lambda: query(me, theirs, workspace_id=mine.id),
        lambda: query(me, theirs, workspace_id=other.id),
        lambda: query(there.bridge, theirs, workspace_id=mine.id),
        lambda: query(there.bridge, theirs, workspace_id="0" * 24),
        lambda: cancel(me, theirs),
        lambda: cancel(there.bridge, theirs, workspace_id=mine.id),
    ):
        with refused(*NOT_FOUND):
            await ask()
    # The id of a task alone opens it for a bridge; with the right workspace too.
    assert (await query(there.bridge, theirs)).task.task_id == theirs
    assert (await query(there.bridge, theirs, workspace_id=other.id)).task.task_id == theirs


async def test_route_gives_workspace_port_and_path(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(ports=[8080, 9090])
    await there.operator.ready("echo")
    for name, port, path in (("img2img", 9090, "/sdapi/v1/img2img"), ("plain", 0, "")):
        await there.operator.workspaces.PublishRoute(
            workspace_pb2.PublishRouteRequest(
                route=workspace_pb2.Route(name=name, workspace="echo", port=port, path=path)
            ),
            metadata=there.operator.auth,
        )
    await there.bridge.schedule(request(route="img2img", path="/ignored"))
    (start,) = await node.started()
    assert (start.port, start.request.path) == (9090, "/sdapi/v1/img2img")
    node.end(answered(start.attempt_id))
    # The workspace itself may use it too; another may not tell that it exists.
    await there.client(workspace.id).schedule(request(route="plain"))
    (start,) = await node.started()
    assert (start.port, start.request.path) == (8080, "/plain")
    stranger = await there.operator.workspace("stranger", replicas=0)
    with refused(*NOT_FOUND):
        await there.client(stranger.id).schedule(request(route="img2img"))


async def test_address_must_hold_an_asset(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    assert (await there.bridge.schedule(request(workspace, btc_address=RICH, wait_s=10))).response.status == 200
    with refused(grpc.StatusCode.PERMISSION_DENIED, "ASSET_MISSING"):
        await there.bridge.schedule(request(workspace, btc_address=POOR))


async def test_address_that_cannot_be_checked_is_refused_unless_the_operator_says_otherwise(tmp_path: Path) -> None:
    nobody: dict[str, Any] = {"providers": []}
    async with house(tmp_path, assets=nobody) as there:
        workspace = await there.operator.workspace(replicas=0)
        with refused(grpc.StatusCode.UNAVAILABLE, "ASSET_UNKNOWN"):
            await there.bridge.schedule(request(workspace, btc_address=RICH))
    async with house(tmp_path, assets=nobody, asset_check_on_error="allow") as there:
        assert (await there.bridge.schedule(request(workspace, btc_address=RICH))).task.task_id
        with refused(*INVALID):
            await there.bridge.schedule(request(workspace, btc_address="nonsense"))


async def test_priority_has_bounds(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    for priority in (-6, 6):
        with refused(*INVALID):
            await there.bridge.schedule(request(workspace, priority=priority))
    first = await there.bridge.schedule(request(workspace))
    await there.bridge.schedule(request(workspace, priority=5))
    await there.bridge.schedule(request(workspace, priority=-5))
    assert (await query(there.bridge, first.task.task_id)).task.queue_position == 1


async def test_same_key_is_the_same_task(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    same = request(workspace, body=b"1", idempotency_key="k", wait_s=10)
    answers = await asyncio.gather(*(there.bridge.schedule(same) for _ in range(5)))
    assert len({answer.task.task_id for answer in answers}) == 1
    assert {answer.response.body.inline for answer in answers} == {b"1"}
    assert len(node.acked) + len(node.ended) <= 1
    for path, body in (("/echo", b"2"), ("/other", b"1")):
        with refused(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT"):
            await there.bridge.schedule(request(workspace, path, body, idempotency_key="k"))
    other = await there.bridge.schedule(request(workspace, body=b"1", idempotency_key="k2", wait_s=10))
    assert other.task.task_id != answers[0].task.task_id


async def test_queue_has_an_end(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0, limits=limits(queue_length=2))
    for _ in range(2):
        await there.bridge.schedule(request(workspace))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"):
        await there.bridge.schedule(request(workspace))


async def test_body_over_the_workspaces_limit_is_refused(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0, limits=limits(request_body_bytes=100))
    await there.bridge.schedule(request(workspace, body=b"x" * 100))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", "100"):
        await there.bridge.schedule(request(workspace, body=b"x" * 101))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE", "100"):
        await upload(there.bridge, [b"x" * 60, b"x" * 60], workspace_id=workspace.id)


async def test_hang_up_cancels_where_it_should(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace(concurrency=2)
    await there.operator.ready("echo")
    for cancels in (True, False):
        call = there.bridge.tasks.Schedule(
            request(workspace, cancel_on_hangup=cancels, wait_s=15), metadata=there.bridge.auth
        )
        # The call is only sent once somebody waits for it.
        waiting = asyncio.ensure_future(call.wait_for_connection())
        await node.started(1 if cancels else 2)
        call.cancel()
        waiting.cancel()
    first, second = node.running
    await until(lambda: node.cancelled == [first])
    assert (await query(there.bridge, first.rpartition(".")[0], 5)).task.state == pb.TASK_STATE_CANCELLED
    assert (await query(there.bridge, second.rpartition(".")[0])).task.state == pb.TASK_STATE_RUNNING


async def test_cancel_ends_a_task_and_does_nothing_to_an_ended_one(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    running = (await there.bridge.schedule(request(workspace))).task.task_id
    queued = (await there.bridge.schedule(request(workspace))).task.task_id
    await node.started()
    for task_id in (queued, running, running):
        task = await cancel(there.client(workspace.id), task_id)
        assert (task.state, task.failure.reason) == (pb.TASK_STATE_CANCELLED, "CANCELLED")
    await until(lambda: node.cancelled == [f"{running}.1"])
    node.end(answered(f"{running}.1", b"late"))
    await until(lambda: f"{running}.1" in node.acked)
    assert (await query(there.bridge, running)).task.state == pb.TASK_STATE_CANCELLED


async def test_upload_in_pieces_becomes_the_body(there: House, node: Node) -> None:
    node.answer = hold
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    first = await upload(there.bridge, [b"a" * wire.CHUNK_BYTES, b"b" * 10], workspace_id=workspace.id)
    assert first.size == wire.CHUNK_BYTES + 10
    with refused(grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE", str(first.size)):
        await upload(there.bridge, [b"c"], workspace_id=workspace.id, upload_id=first.upload_id, offset=3)
    whole = await upload(
        there.bridge, [b"c" * 5], workspace_id=workspace.id, upload_id=first.upload_id, offset=first.size
    )
    assert (whole.upload_id, whole.size) == (first.upload_id, first.size + 5)
    sent = request(workspace)
    sent.request.body.upload_id = first.upload_id
    await there.bridge.schedule(sent)
    (start,) = await node.started()
    assert start.request.body == http_pb2.Body(size=whole.size)
    fetched = [
        chunk.data
        async for chunk in node.client.nodes.Fetch(
            node_pb2.FetchRequest(attempt_id=start.attempt_id, offset=10), metadata=node.client.auth
        )
    ]
    assert b"".join(fetched) == (b"a" * wire.CHUNK_BYTES + b"b" * 10 + b"c" * 5)[10:]
    # An upload is for one task.
    with refused(*NOT_FOUND, "upload"):
        await there.bridge.schedule(sent)


async def test_of_two_tasks_at_once_one_has_the_upload(there: House) -> None:
    workspace = await there.operator.workspace()
    body = [b"x" * wire.CHUNK_BYTES]
    sent = request(workspace)
    sent.request.body.upload_id = (await upload(there.bridge, body, workspace_id=workspace.id)).upload_id

    said = await asyncio.gather(*(there.bridge.schedule(sent) for _ in range(4)), return_exceptions=True)
    refusals = [error_of(one).message for one in said if isinstance(one, grpc.aio.AioRpcError)]
    assert refusals == ["request.body.upload_id: there is no such upload, or a task has taken it."] * 3


async def test_upload_of_another_size_than_said_is_refused(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    stored = await upload(there.bridge, [b"x" * 100], workspace_id=workspace.id)
    sent = request(workspace)
    sent.request.body.upload_id, sent.request.body.size = stored.upload_id, 99
    with refused(*INVALID, "100"):
        await there.bridge.schedule(sent)
    sent.request.body.size = 100
    await there.bridge.schedule(sent)


async def test_small_upload_rides_with_the_start(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    for chunks in ([b"small"], [b""]):
        stored = await upload(there.client(workspace.id), chunks)
        sent = request(workspace, wait_s=10)
        sent.request.body.upload_id = stored.upload_id
        assert (await there.bridge.schedule(sent)).response.body.inline == chunks[0]


async def test_upload_under_an_idempotency_key(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    tasks = []
    for number, data in enumerate((b"x", b"x", b"y")):
        body = [data * wire.CHUNK_BYTES]
        sent = request(workspace, idempotency_key="k")
        sent.request.body.upload_id = (await upload(there.bridge, body, workspace_id=workspace.id)).upload_id
        if number < 2:
            tasks.append((await there.bridge.schedule(sent)).task.task_id)
        else:
            with refused(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT"):
                await there.bridge.schedule(sent)
    assert tasks[0] == tasks[1]
    stored = [file.name for file in (there.state_dir / "bodies").rglob("*") if file.is_file()]
    assert stored == [f"{tasks[0]}.request"]


@pytest.mark.parametrize(
    ("first", "refusal"),
    [
        ({"upload_id": "upload-" + "0" * 32}, NOT_FOUND),
        ({"upload_id": "../../etc/passwd"}, NOT_FOUND),
        ({"workspace_id": "0" * 24}, NOT_FOUND),
        ({"workspace_id": "", "route": "none"}, NOT_FOUND),
        ({"workspace_id": ""}, INVALID),
        ({"data": b"x" * (wire.CHUNK_BYTES + 1)}, INVALID),
        ({"offset": 5}, (grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE")),
    ],
)
async def test_bad_upload_is_refused(there: House, first: dict[str, Any], refusal: tuple[grpc.StatusCode, str]) -> None:
    workspace = await there.operator.workspace(replicas=0)
    data = first.pop("data", b"x")
    with refused(*refusal):
        await upload(there.bridge, [data], **{"workspace_id": workspace.id, **first})


async def test_bad_upload_id_in_a_task_is_not_found(there: House) -> None:
    workspace = await there.operator.workspace(replicas=0)
    for upload_id in ("upload-" + "0" * 32, "../operator.token", "20260101_00_00_00_" + "0" * 20 + ".request"):
        sent = request(workspace)
        sent.request.body.upload_id = upload_id
        with refused(*NOT_FOUND, "upload"):
            await there.bridge.schedule(sent)


async def test_long_answer_is_cut_where_the_caller_says(there: House, node: Node) -> None:
    workspace = await there.operator.workspace()
    await there.operator.ready("echo")
    answer = await there.bridge.schedule(request(workspace, body=b"x" * 100, wait_s=10, max_inline_bytes=99))
    assert answer.response.body == http_pb2.Body(size=100, is_utf8=True)
    whole = await query(there.bridge, answer.task.task_id, max_inline_bytes=100)
    assert whole.response.body.inline == b"x" * 100


async def test_first_start_makes_tokens_for_the_owners_eyes(there: House) -> None:
    for name in ("operator.token", "bridge.token"):
        file = there.state_dir / name
        assert file.stat().st_mode & 0o777 == 0o600
        rows = (there.state_dir / "ngpu.db").read_bytes() + (there.state_dir / "ngpu.db-wal").read_bytes()
        assert file.read_bytes().strip() not in rows
