"""`ngpu task`: submit, follow, look at, list and cancel."""

import functools
import itertools
import json
import mimetypes
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO
from urllib.parse import quote

import grpc
import typer
from ngpu import wire
from ngpu.v1 import http_pb2, workspace_pb2
from ngpu.v1 import task_pb2 as pb
from rich.console import Group, RenderableType
from rich.text import Text

from controlplane.ctl import webhooks
from controlplane.ctl.attempts import attempts_shown
from controlplane.ctl.command import connected
from controlplane.ctl.output import as_json, cell, facts, table
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.results import ENDED, check_outcome, follow, news, sink_for, state_name
from controlplane.ctl.session import Session
from controlplane.ctl.units import age_text, duration_text, moment, parse_time, size_text, time_text
from controlplane.ctl.workspaces import seconds

app = typer.Typer(no_args_is_help=True, help="Tasks: one HTTP exchange each with a container of a workspace.")

#: An upload may take as long as this.
UPLOAD_LIMIT_S = 3600.0

Workspace = Annotated[
    str,
    typer.Option("--workspace", "-w", envvar="NGPU_WORKSPACE", help="Name or id; not needed when its id is the token."),
]
Limit = Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long to wait: 90s, 10m, 1h30m.")]
OutputFile = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the answer's body there; - is stdout.")
]

_STYLES = {
    pb.TASK_STATE_QUEUED: "yellow",
    pb.TASK_STATE_RUNNING: "cyan",
    pb.TASK_STATE_COMPLETED: "green",
    pb.TASK_STATE_FAILED: "red",
    pb.TASK_STATE_CANCELLED: "dim",
}


def _state(state: pb.TaskState.ValueType) -> Text:
    return Text(state_name(state), _STYLES.get(state, ""))


def _workspace_id(session: Session, which: str) -> str:
    """The id that the task API wants, of a name or an id; empty stays empty."""
    digits = which.removeprefix("ngpu_")
    if not which or (len(digits) == 24 and digits.isdecimal()):
        return digits
    request = workspace_pb2.GetWorkspaceRequest(workspace=which)
    found = session.call(session.workspaces.GetWorkspace, request).workspace.id
    if not found:
        raise Problem("This token may not look workspaces up by name: give the id.", Exit.NOT_ALLOWED)
    return found


@app.command()
@connected
def submit(
    session: Session,
    *,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="The container's, e.g. sdapi/v1/img2img; a ?query may follow.", show_default=False
        ),
    ] = "",
    workspace: Workspace = "",
    route: Annotated[str, typer.Option(help="A published route instead of a workspace and PATH.")] = "",
    data: Annotated[str | None, typer.Option("--data", "-d", help="The body.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="File with the body; - is stdin.")
    ] = None,
    method: Annotated[str, typer.Option(help="Default: POST with a body, GET without.")] = "",
    header: Annotated[list[str] | None, typer.Option(metavar="'NAME: VALUE'", help="May be repeated.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="One of the workspace's ports; 0 is its first.")] = 0,
    btc_address: Annotated[str, typer.Option(help="Must hold a configured asset, or the task is refused.")] = "",
    idempotency_key: Annotated[str, typer.Option(help="Same key, same task: makes it safe to repeat this.")] = "",
    callback_url: Annotated[str, typer.Option(metavar="URL", help="POST the task's end there, signed.")] = "",
    priority: Annotated[
        int, typer.Option(min=-5, max=5, help="Among the tasks of the same address that wait; more: sooner.")
    ] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answer and print it.")] = False,
    output: OutputFile = None,
    timeout: Limit = "10m",
) -> None:
    """Give a workspace something to do. Prints the task's id, or with --wait the container's answer.

    \b
    Examples:
      ngpu task submit sdapi/v1/img2img -w img2img -f request.json --wait
      ngpu task submit 'search?q=cat' -w index --wait -o answer.json
      TASK=$(ngpu task submit train -w lab --data '{"epochs": 3}')
      ngpu task submit --route img2img --file request.json
    """
    limit_s = seconds(timeout)
    if data is not None and file is not None:
        raise Problem("Give --data or --file, not both.", Exit.USAGE)
    if bool(path) == bool(route) or (route and (workspace or port)):
        raise Problem(
            "Give the container's PATH, or a --route, which names workspace, port and path itself.", Exit.USAGE
        )
    workspace_id = _workspace_id(session, workspace)
    request = pb.ScheduleRequest(
        workspace_id=workspace_id,
        route=route,
        port=port,
        btc_address=btc_address,
        idempotency_key=idempotency_key,
        callback_url=callback_url,
        priority=priority,
        request=http_pb2.HttpRequest(method=method.upper(), headers=_headers(header or [])),
    )
    if path:
        target, _, query = path.partition("?")
        request.request.path = "/" + quote(target.lstrip("/"), safe="/%:@!$&'()*+,;=~")
        request.request.query = quote(query, safe="/%:@!$&'()*+,;=~?")
    has_body = data is not None or file is not None
    if has_body:
        request.request.body.CopyFrom(_body(session, data, file, workspace_id, route))
        if not any(one.name.lower() == "content-type" for one in request.request.headers):
            request.request.headers.add(name="Content-Type", value=_content_type(data, file).encode())
    request.request.method = request.request.method or ("POST" if has_body else "GET")
    answer = session.call(session.tasks.Schedule, request)
    task_id = answer.task.task_id
    if not wait:
        session.out.answer(answer, lambda: task_id, [task_id])
        if not session.out.json:
            session.out.say(f"Its answer: ngpu task result {task_id}", "dim")
        return
    session.out.say(f"task {task_id}", "dim")
    _result(session, task_id, limit_s, output)


def _headers(typed: list[str]) -> Iterator[http_pb2.Header]:
    for line in typed:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise Problem(f"--header: {line!r} is not 'NAME: VALUE'", Exit.USAGE)
        yield http_pb2.Header(name=name.strip(), value=value.strip().encode())


def _content_type(data: str | None, file: Path | None) -> str:
    if data is not None:
        try:
            json.loads(data)
        except ValueError:
            return "text/plain; charset=utf-8"
        return "application/json"
    return mimetypes.guess_type(str(file))[0] or "application/octet-stream"


def _body(session: Session, data: str | None, file: Path | None, workspace_id: str, route: str) -> http_pb2.Body:
    """The body as the API wants it: inline while it is small, else uploaded first."""
    if data is not None:
        chunks = _pieces(data.encode())
    elif str(file) == "-":
        chunks = _chunks(sys.stdin.buffer)
    else:
        chunks = _file_chunks(Path(str(file)))
    first = next(chunks, b"")
    if len(first) <= wire.INLINE_BYTES:
        return http_pb2.Body(inline=first, size=len(first))
    begin = pb.UploadRequest(workspace_id=workspace_id, route=route, data=first)
    rest = (pb.UploadRequest(data=chunk) for chunk in chunks)
    done = session.call(session.tasks.Upload, itertools.chain([begin], rest), limit_s=UPLOAD_LIMIT_S)
    return http_pb2.Body(upload_id=done.upload_id, size=done.size)


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[i : i + wire.CHUNK_BYTES] for i in range(0, len(data), wire.CHUNK_BYTES))


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(wire.CHUNK_BYTES):
        yield chunk


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as source:
            yield from _chunks(source)
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}", Exit.USAGE) from error


@app.command()
@connected
def result(
    session: Session,
    task: Annotated[str, typer.Argument(help="Its id.")],
    output: OutputFile = None,
    timeout: Limit = "10m",
) -> None:
    """Wait for a task's answer and print its body. Fails unless the container answered with success.

    \b
    Examples:
      ngpu task result 20260131_14_00_09_01234567890123456789 -o picture.png
    """
    _result(session, task, seconds(timeout), output)


def _result(session: Session, task_id: str, limit_s: float, output: Path | None) -> None:
    if session.out.json and output is None:
        follow(session, task_id, limit_s, None)
        answer = session.call(session.tasks.Query, pb.QueryRequest(task_id=task_id))
        session.out.write(as_json(answer))
        check_outcome(answer.task, answer.response)
        return
    with sink_for(output) as sink:
        ended, head = follow(session, task_id, limit_s, sink)
        if ended.state != pb.TASK_STATE_COMPLETED:
            check_outcome(ended, head)
    if session.out.json:
        session.out.write(as_json(pb.QueryResponse(task=ended, response=head)))
    elif sys.stdout.isatty() and output is None:
        session.out.say("")
    check_outcome(ended, head)


@app.command()
@connected
def show(session: Session, task: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Show all that is recorded of a task: where it came from, every attempt, what came of it."""
    answer = session.call(session.tasks.GetDetail, pb.GetDetailRequest(task_id=task))
    if not session.out.json:
        session.out.answer(answer, lambda: _shown(answer, session.now), [state_name(answer.task.state)])
        return
    # The workspace's id is its credential: it is printed by `workspace` commands alone.
    answer.ClearField("workspace_id")
    session.out.write(as_json(answer))


def _shown(answer: pb.GetDetailResponse, now: datetime) -> RenderableType:
    task, request, origin = answer.task, answer.request, answer.origin
    url = request.path + (f"?{request.query}" if request.query else "")
    begun, ended = moment(task.create_time), moment(task.end_time)
    took = f"after {duration_text((ended - begun).total_seconds())}" if begun and ended else ""
    lines: list[tuple[str, object]] = [
        ("state", _state(task.state)),
        ("why", cell(task.failure.message and f"{task.failure.message} ({task.failure.reason})", "red")),
        ("waits", news(task) if task.state == pb.TASK_STATE_QUEUED else ""),
        ("workspace", answer.workspace_name),
        ("request", f"{request.method} {url} to port {answer.port}, {_body_text(request.headers, request.body)}"),
        ("BTC address", answer.btc_address),
        ("from", " ".join(filter(None, (origin.user_ip, origin.operation, origin.url)))),
        ("accepted", f"{time_text(task.create_time)} ({age_text(task.create_time, now)})"),
        ("ended", f"{time_text(task.end_time)} {took}" if ended else ""),
    ]
    if task.state == pb.TASK_STATE_COMPLETED:
        response = answer.response
        lines.append(("answer", f"status {response.status}, {_body_text(response.headers, response.body)}"))
    if answer.HasField("webhook"):
        lines.append(("webhook", webhooks.text(answer.webhook)))
    parts: list[RenderableType] = [facts(task.task_id, lines)]
    if answer.attempts:
        parts.append(attempts_shown(answer.attempts))
    if answer.webhook.log:
        parts += ["", webhooks.log(answer.webhook)]
    return Group(*parts)


def _body_text(headers: Iterable[http_pb2.Header], body: http_pb2.Body) -> str:
    kind = next((h.value.decode(errors="replace") for h in headers if h.name.lower() == "content-type"), "")
    return f"{size_text(body.size)} {kind}".strip() if body.size else "no body"


@app.command("list")
@connected
def list_(
    session: Session,
    *,
    workspace: Workspace = "",
    since: Annotated[str | None, typer.Option(metavar="TIME", help="A date, a time, or how long ago: 2h.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="The same; exclusive.")] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="queued, running, completed, failed, cancelled; repeatable.")
    ] = None,
    node: Annotated[str, typer.Option(metavar="ADDRESS", help="Only those last on this node.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 0,
) -> None:
    """List a workspace's tasks in order of acceptance, oldest first, as they come.

    \b
    Examples:
      ngpu task list -w img2img --since 1h
      ngpu task list -w img2img --state failed --json
      ngpu task list -w img2img --quiet | xargs ngpu task cancel
    """
    request = pb.ListTasksRequest(
        workspace_id=_workspace_id(session, workspace),
        node_addr=node,
        limit=limit,
        states=[_known_state(name) for name in state or ()],
        full=not session.out.quiet,
    )
    for option, text, field in (("--since", since, request.start_time), ("--until", until, request.end_time)):
        if text is not None:
            try:
                field.FromDatetime(parse_time(text, session.now))
            except ValueError as error:
                raise Problem(f"{option}: {error}", Exit.USAGE) from error
    show_header = True
    try:
        for page in session.stream(session.tasks.ListTasks, request, limit_s=None):
            if session.out.json:
                # A line a task: the list may be longer than memory.
                for one in page.tasks:
                    session.out.write(json.dumps(json.loads(as_json(one)), ensure_ascii=False))
            elif session.out.quiet:
                for task_id in page.task_ids:
                    session.out.write(task_id)
            elif page.tasks:
                session.out.show(_listed(page.tasks, session.now, header=show_header))
                show_header = False
    except grpc.RpcError as error:
        raise session.problem(error) from error
    if show_header and not (session.out.json or session.out.quiet):
        session.out.show(cell("There are no such tasks.", "dim"))


def _known_state(name: str) -> pb.TaskState.ValueType:
    known = {state_name(value): value for value in pb.TaskState.values() if value}
    if name not in known:
        raise Problem(f"--state: {name!r} is not one of {', '.join(known)}", Exit.USAGE)
    return known[name]


def _listed(tasks: Iterable[pb.Task], now: datetime, *, header: bool) -> RenderableType:
    rows = []
    for task in tasks:
        begun, ended = moment(task.create_time), moment(task.end_time)
        took = duration_text(((ended or now) - begun).total_seconds()) if begun else ""
        detail = task.failure.message or task.waiting_for
        # Padded by hand, so that pages of a long list stand below one another.
        rows.append(
            (
                task.task_id,
                Text(f"{state_name(task.state):9}", _STYLES.get(task.state, "")),
                time_text(task.create_time),
                f"{took:>9}",
                task.attempt,
                detail,
            )
        )
    made = table("TASK", "STATE", "ACCEPTED", "TOOK", "ATTEMPT", "WHY", rows=rows, right=("TOOK", "ATTEMPT"))
    made.show_header = header
    return made


@app.command()
@connected
def cancel(session: Session, tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Their ids.")]) -> None:
    """Cancel tasks: queued ones never start, of running ones the container's request is closed.

    Those that have ended stay as they are.
    """
    for task in tasks:
        answer = session.call(session.tasks.Cancel, pb.CancelRequest(task_id=task))
        session.out.answer(answer, functools.partial(_cancelled, answer.task))


@app.command()
@connected
def redeliver(
    session: Session, tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Their ids.")]
) -> None:
    """Have the end of tasks posted to their callback URLs once more: a receiver was down for too long, or lost it.

    `ngpu task show TASK` tells what came of it.
    """
    for task in tasks:
        answer = session.call(session.tasks.RedeliverWebhook, pb.RedeliverWebhookRequest(task_id=task))
        session.out.answer(answer, functools.partial(cell, f"{task}: {webhooks.text(answer.webhook)}"))


def _cancelled(task: pb.Task) -> RenderableType:
    late = task.state in ENDED and task.state != pb.TASK_STATE_CANCELLED
    return cell(f"{task.task_id}: {'had ended already, ' if late else ''}{state_name(task.state)}")
