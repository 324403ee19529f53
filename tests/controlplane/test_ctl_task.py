"""`ngpu task` against a fake control plane: bodies up and down, streams that break, lists that come in pages."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.ctl.output import Output
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.progress import await_serving
from controlplane.ctl.results import _Stdout, follow, sink_for
from controlplane.ctl.session import Session, Target
from tests.controlplane.ctl_fakes import (
    ID,
    NODE,
    TASK,
    TOKEN,
    FakeControlPlane,
    Ngpu,
    Refusal,
    a_replica,
    a_task,
    a_workspace,
    at,
)

QUEUED, RUNNING = pb.TASK_STATE_QUEUED, pb.TASK_STATE_RUNNING
COMPLETED, FAILED = pb.TASK_STATE_COMPLETED, pb.TASK_STATE_FAILED

Event = pb.WatchResponse


@pytest.fixture
def plane(plane: FakeControlPlane) -> FakeControlPlane:
    plane.answers["Schedule"] = pb.ScheduleResponse(task=a_task(QUEUED, attempt=0))
    return plane


@pytest.fixture
def session(plane: FakeControlPlane, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setenv("NGPU_TOKEN", TOKEN)
    with Session(Target(plane.address), Output(json=False, quiet=True)) as made:
        yield made


def head(status: int = 200, size: int = 6) -> Event:
    kind = http_pb2.Header(name="Content-Type", value=b"text/plain")
    return Event(head=http_pb2.HttpResponse(status=status, headers=[kind], body=http_pb2.Body(size=size)))


def answered(*chunks: bytes, status: int = 200, attempt: int = 1) -> list[Event]:
    events, offset = [Event(task=a_task(RUNNING, attempt=attempt)), head(status)], 0
    for chunk in chunks:
        events.append(Event(data=chunk, offset=offset))
        offset += len(chunk)
    return [*events, Event(task=a_task(COMPLETED, attempt=attempt))]


# --- submit ---


def test_submit_prints_the_id_alone_on_stdout(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    result = ngpu("task", "submit", "sdapi/v1/img2img?x=1", "-w", ID, "--data", '{"a": 1}', "--port", "8080")
    assert result.stdout == f"{TASK}\n"
    assert f"ngpu task result {TASK}" in result.stderr
    asked = plane.last()
    assert asked.request == http_pb2.HttpRequest(
        method="POST",
        path="/sdapi/v1/img2img",
        query="x=1",
        headers=[http_pb2.Header(name="Content-Type", value=b"application/json")],
        body=http_pb2.Body(inline=b'{"a": 1}', size=8),
    )
    assert (asked.workspace_id, asked.port, asked.route) == (ID, 8080, "")


def test_submit_without_body_is_a_get(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    ngpu("task", "submit", "/a b/ü%20?q=c d", "-w", ID, "--header", "X-A: 1", "--header", "x-a:2")
    request = plane.last().request
    assert (request.method, request.path, request.query) == ("GET", "/a%20b/%C3%BC%20", "q=c%20d")
    assert [(h.name, h.value) for h in request.headers] == [("X-A", b"1"), ("x-a", b"2")]
    assert not request.HasField("body")


def test_submit_everything_else_that_can_be_said(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    ngpu(
        *("task", "submit", "--route", "img2img", "-d", "plain", "--method", "put", "--btc-address", "bc1p"),
        *("--idempotency-key", "k", "--header", "content-type: text/x", "--priority", "-5"),
    )
    asked = plane.last()
    assert (asked.route, asked.workspace_id, asked.request.path) == ("img2img", "", "")
    assert (asked.btc_address, asked.idempotency_key, asked.request.method) == ("bc1p", "k", "PUT")
    assert asked.priority == -5
    assert [(h.name, h.value) for h in asked.request.headers] == [("content-type", b"text/x")]


def test_submit_finds_the_id_of_a_name(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["GetWorkspace"] = workspace_pb2.GetWorkspaceResponse(workspace=a_workspace())
    assert ID not in ngpu("task", "submit", "p", "-w", "img2img").output
    assert plane.last().workspace_id == ID
    ngpu("task", "submit", "p", "-w", f"ngpu_{ID}")
    assert plane.last().workspace_id == ID
    ngpu("task", "submit", "p")
    assert plane.last().workspace_id == ""
    hidden = a_workspace()
    hidden.id = ""
    plane.answers["GetWorkspace"] = workspace_pb2.GetWorkspaceResponse(workspace=hidden)
    assert "give the id" in ngpu("task", "submit", "p", "-w", "img2img", code=5).stderr


@pytest.mark.parametrize("stdin", [True, False])
def test_a_large_body_is_uploaded_in_chunks(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path, stdin: bool) -> None:
    body = bytes(range(256)) * 5000
    (tmp_path / "in.png").write_bytes(body)
    plane.answers["Upload"] = lambda sent: pb.UploadResponse(upload_id="upload-1", size=sum(len(m.data) for m in sent))
    ngpu("task", "submit", "p", "-w", ID, "--file", "-" if stdin else "in.png", stdin=body if stdin else None)
    sent, asked = plane.asked
    assert b"".join(message.data for message in sent) == body
    assert max(len(message.data) for message in sent) <= wire.CHUNK_BYTES
    assert [message.workspace_id for message in sent] == [ID, "", ""]
    assert asked.request.body == http_pb2.Body(upload_id="upload-1", size=len(body))
    kind = b"application/octet-stream" if stdin else b"image/png"
    assert asked.request.headers[0].value == kind


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["p", "--data", "x", "--file", "y"], "not both"),
        ([], "Give the container's PATH, or a --route"),
        (["p", "--route", "r"], "Give the container's PATH, or a --route"),
        (["--route", "r", "-w", ID], "names workspace, port and path itself"),
        (["p", "--file", "missing"], "missing cannot be read: No such file"),
        (["p", "--header", "nocolon"], "--header: 'nocolon' is not 'NAME: VALUE'"),
        (["p", "--timeout", "x"], "--timeout: 'x' is not a duration"),
    ],
)
def test_submit_wrong_usage(plane: FakeControlPlane, ngpu: Ngpu, arguments: list[str], why: str) -> None:
    assert why in ngpu("task", "submit", *arguments, code=2).stderr
    assert plane.asked == []


# --- answers ---


def test_submit_and_wait_prints_the_body_as_it_is(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["Watch"] = answered(b"\x00\xff\n", b"abc")
    result = ngpu("task", "submit", "p", "-w", ID, "--wait")
    assert result.stdout_bytes == b"\x00\xff\nabc"
    assert result.stderr == f"task {TASK}\n"


def test_result_into_a_file(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    plane.answers["Watch"] = answered(b"abc", b"def")
    assert ngpu("task", "result", TASK, "-o", "out").output == ""
    assert (tmp_path / "out").read_bytes() == b"abcdef"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "cannot be written" in ngpu("task", "result", TASK, "-o", "no/out", code=1).stderr


def test_the_containers_own_error_fails_and_its_body_is_kept(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["Watch"] = answered(b"no such model", status=404)
    result = ngpu("task", "result", TASK, code=1)
    assert result.stdout == "no such model"
    assert result.stderr == "ngpu: The container answered with status 404.\n"


def test_a_task_that_failed(plane: FakeControlPlane, ngpu: Ngpu, tmp_path: Path) -> None:
    failure = pb.Failure(reason="NODE_LOST", message="The node was lost.")
    plane.answers["Watch"] = [Event(task=a_task(FAILED, failure=failure))]
    result = ngpu("task", "result", TASK, "-o", "out", code=1)
    assert result.stderr == "ngpu: The task failed: The node was lost. (NODE_LOST)\n"
    assert list(tmp_path.iterdir()) == []


def test_the_time_is_up_and_the_task_goes_on(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["Watch"] = [Event(task=a_task(QUEUED, attempt=0))]
    result = ngpu("task", "submit", "p", "-w", ID, "--wait", "--timeout", "200ms", code=1)
    assert f"Not ended within 200ms (queued). It goes on: ngpu task result {TASK}" in result.stderr


def test_result_in_json(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["Watch"] = answered()
    response = http_pb2.HttpResponse(status=200, body=http_pb2.Body(inline=b"abc", size=3))
    plane.answers["Query"] = pb.QueryResponse(task=a_task(COMPLETED), response=response)
    answer = json.loads(ngpu("task", "submit", "p", "-w", ID, "--wait", "--json").stdout)
    assert (answer["task"]["state"], answer["response"]["body"]["inline"]) == ("TASK_STATE_COMPLETED", "YWJj")
    plane.answers["Query"] = pb.QueryResponse(task=a_task(COMPLETED), response=http_pb2.HttpResponse(status=500))
    assert json.loads(ngpu("task", "result", TASK, "--json", code=1).stdout)["response"]["status"] == 500


def test_an_unknown_task(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["Watch"] = [Refusal(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "There is no such task.")]
    assert ngpu("task", "result", TASK, code=4).stderr == "ngpu: There is no such task.\n"


# --- streams that break ---

BROKEN = Refusal(grpc.StatusCode.UNAVAILABLE)


def quick(_: float) -> None:
    """Does not wait."""


def test_a_broken_stream_goes_on_where_it_broke(plane: FakeControlPlane, session: Session, tmp_path: Path) -> None:
    plane.answers["Watch"] = [
        [Event(task=a_task(RUNNING)), head(), Event(data=b"abc"), BROKEN],
        [Event(task=a_task(RUNNING)), Event(data=b"def", offset=3), Event(task=a_task(COMPLETED))],
    ]
    with sink_for(tmp_path / "out") as sink:
        task, response = follow(session, TASK, 5.0, sink, sleep=quick)
    assert (task.state, response.status) == (COMPLETED, 200)
    assert [request.offset for request in plane.asked] == [0, 3]
    assert (tmp_path / "out").read_bytes() == b"abcdef"


def test_another_attempt_begins_anew(plane: FakeControlPlane, session: Session, tmp_path: Path) -> None:
    plane.answers["Watch"] = [
        [Event(task=a_task(RUNNING)), head(), Event(data=b"abc"), BROKEN],
        [Event(task=a_task(RUNNING, attempt=2)), Event(data=b"WRONG", offset=3)],
        answered(b"xyz", attempt=2),
    ]
    with sink_for(tmp_path / "out") as sink:
        follow(session, TASK, 5.0, sink, sleep=quick)
    assert [request.offset for request in plane.asked] == [0, 3, 0]
    assert (tmp_path / "out").read_bytes() == b"xyz"


def test_another_attempt_that_has_ended_begins_anew(plane: FakeControlPlane, session: Session, tmp_path: Path) -> None:
    plane.answers["Watch"] = [
        [Event(task=a_task(RUNNING)), head(), Event(data=b"abc"), BROKEN],
        [head(), Event(data=b"WRONG", offset=3), Event(task=a_task(COMPLETED, attempt=2))],
        answered(b"xyz", attempt=2),
    ]
    with sink_for(tmp_path / "out") as sink:
        follow(session, TASK, 5.0, sink, sleep=quick)
    assert (tmp_path / "out").read_bytes() == b"xyz"


def test_what_is_printed_cannot_be_taken_back(plane: FakeControlPlane, session: Session) -> None:
    plane.answers["Watch"] = [
        [Event(task=a_task(RUNNING)), head(), Event(data=b"abc"), BROKEN],
        [Event(task=a_task(RUNNING, attempt=2))],
    ]
    with pytest.raises(Problem, match="runs anew"):
        follow(session, TASK, 5.0, _Stdout(BytesIO(), to_terminal=False), sleep=quick)


def test_a_terminal_gets_text_only() -> None:
    written = BytesIO()
    sink = _Stdout(written, to_terminal=True)
    sink.write("täxt\n".encode())
    with pytest.raises(Problem, match="--output FILE") as caught:
        sink.write(b"\x1b[2J")
    assert caught.value.code == Exit.USAGE
    assert written.getvalue() == "täxt\n".encode()


def test_waiting_for_a_workspace_outlives_a_restart_of_the_control_plane(
    plane: FakeControlPlane, session: Session
) -> None:
    starting = workspace_pb2.WatchWorkspaceResponse(workspace=a_workspace())
    ready = workspace_pb2.WatchWorkspaceResponse(workspace=a_workspace(a_replica(workspace_pb2.REPLICA_STATE_READY)))
    stopping = Refusal(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", "The control plane stops.")
    plane.answers["WatchWorkspace"] = [[starting, stopping], [BROKEN], [ready]]
    assert await_serving(session, "img2img", 5.0, sleep=quick).ready_replicas == 1
    assert len(plane.asked) == 3


# --- show, list, cancel ---


def test_show(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    lost = pb.Failure(cause=pb.CAUSE_PLATFORM, reason="NODE_LOST", message="The node was lost.")
    plane.answers["GetDetail"] = pb.GetDetailResponse(
        task=a_task(COMPLETED, attempt=2, end_time=at(8)),
        workspace_id=ID,
        workspace_name="img2img",
        port=8080,
        request=http_pb2.HttpRequest(method="POST", path="/p", query="x=1", body=http_pb2.Body(size=2048)),
        response=http_pb2.HttpResponse(status=200, body=http_pb2.Body(size=3)),
        origin=pb.Origin(user_ip="192.0.2.1", operation="schedulingTask"),
        attempts=[
            pb.Attempt(
                number=1,
                node_addr=NODE,
                replica_id="r-1",
                delivery=pb.DELIVERY_SENT,
                failure=lost,
                queue_time=at(),
                assign_time=at(2),
                end_time=at(5),
            ),
            pb.Attempt(
                number=2,
                node_addr=NODE,
                replica_id="r-2",
                delivery=pb.DELIVERY_ANSWERED,
                http_status=200,
                last_byte_after_us=1_500_000,
                gpu_us=1_400_000,
                gpu_ids=["GPU-0"],
                gpu_model="RTX 4090",
                price="0.100000000",
                cost="0.140000000",
                end_time=at(8),
                reason="fewest tasks",
            ),
        ],
    )
    text = ngpu("task", "show", TASK).stdout
    for part in (
        "completed",
        "POST /p?x=1 to port 8080, 2 KiB",
        "after 8s",
        "The node was lost. (NODE_LOST)",
        "on the platform's side: free of charge",
        "the container has had the whole request",
        "waited       2s",
        "3s after its assignment",
        "last byte after 1.5s",
        "1.4s of 1 GPU RTX 4090: GPU-0",
        "0.140000000 at 0.100000000 a second",
        "fewest tasks",
    ):
        assert part in text
    assert "192.0.2.1" in text
    # The credential of the workspace is not for show here.
    assert ID not in text
    shown = ngpu("task", "show", TASK, "--json").stdout
    assert ID not in shown
    assert len(json.loads(shown)["attempts"]) == 2


def pages() -> list[pb.ListTasksResponse]:
    late = "20260131_15_00_00_99999999999999999999"
    return [
        pb.ListTasksResponse(task_ids=[TASK], tasks=[a_task(COMPLETED, end_time=at(8))], cursor="c"),
        pb.ListTasksResponse(
            task_ids=[late], tasks=[pb.Task(task_id=late, state=QUEUED, waiting_for="no replica is ready")]
        ),
    ]


def test_list_comes_page_by_page_below_one_header(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ListTasks"] = pages()
    lines = ngpu(
        "task", "list", "-w", ID, "--limit", "5", "--state", "queued", "--state", "completed"
    ).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["TASK", TASK, "20260131_15_00_00_99999999999999999999"]
    assert "no replica is ready" in lines[2]
    assert len({line.index(word) for line, word in zip(lines, ("STATE", "completed", "queued"), strict=True)}) == 1
    assert plane.last() == pb.ListTasksRequest(workspace_id=ID, limit=5, states=[QUEUED, COMPLETED], full=True)


def test_list_in_json_is_a_line_a_task(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ListTasks"] = pages()
    lines = ngpu("task", "list", "-w", ID, "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["TASK_STATE_COMPLETED", "TASK_STATE_QUEUED"]


def test_list_quiet_for_the_next_command(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ListTasks"] = pages()
    result = ngpu("task", "list", "-w", ID, "-q", "--since", "2026-01-31T00:00:00Z", "--until", "2026-02-01T00:00:00Z")
    assert result.stdout.splitlines()[0] == TASK
    assert not plane.last().full
    assert (plane.last().end_time.seconds - plane.last().start_time.seconds) == 86400


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--since", "yesterday"], "--since: 'yesterday' is not a time"),
        (["--state", "done"], "--state: 'done' is not one of queued, running, completed, failed, cancelled"),
    ],
)
def test_list_wrong_usage(ngpu: Ngpu, arguments: list[str], why: str) -> None:
    assert why in ngpu("task", "list", "-w", ID, *arguments, code=2).stderr


def test_list_refused(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ListTasks"] = [Refusal(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "There is no such workspace.")]
    assert "no such workspace" in ngpu("task", "list", "-w", ID, code=4).stderr


def test_cancel(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    states: dict[str, Any] = {"a": pb.TASK_STATE_CANCELLED, "b": COMPLETED}
    plane.answers["Cancel"] = lambda request: pb.CancelResponse(
        task=pb.Task(task_id=request.task_id, state=states[request.task_id])
    )
    assert ngpu("task", "cancel", "a", "b").stdout == "a: cancelled\nb: had ended already, completed\n"
    ngpu("task", "cancel", code=2)


def test_redeliver(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    webhook = pb.Webhook(url="https://lab.example/ended", state=pb.WEBHOOK_STATE_WAITING, tries=3)
    plane.answers["RedeliverWebhook"] = lambda request: pb.RedeliverWebhookResponse(webhook=webhook)
    assert ngpu("task", "redeliver", "a").stdout == "a: waiting, to https://lab.example/ended, posted 3 times\n"
    plane.answers["RedeliverWebhook"] = Refusal(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "The task has no callback_url.")
    assert "no callback_url" in ngpu("task", "redeliver", "a", code=4).stderr
