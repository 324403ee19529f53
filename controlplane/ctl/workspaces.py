"""`ngpu workspace`: register, look at, scale, update and delete."""

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from ngpu.v1 import workspace_pb2 as pb
from rich.console import Group, RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, counted, facts, table
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.progress import await_serving, count_text, is_serving, state_text
from controlplane.ctl.session import Session
from controlplane.ctl.units import age_text, duration_text, parse_duration, size_text, time_text
from controlplane.ctl.workspace_file import Source, SpecFault, load, to_spec

app = typer.Typer(no_args_is_help=True, help="Workspaces: what customers brought, kept running as replicas on nodes.")

Which = Annotated[str, typer.Argument(metavar="WORKSPACE", help="Its name or id.")]
Wait = Annotated[bool, typer.Option("--wait", help="Show progress until all replicas serve; the exit code says it.")]
Limit = Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long --wait waits: 90s, 10m, 1h30m.")]


def seconds(text: str, option: str = "--timeout") -> float:
    """A duration that was typed. Raises Problem."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise Problem(f"{option}: {error}", Exit.USAGE) from error


@app.command()
@connected
def create(
    session: Session,
    *,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE.toml", help="The description; - reads it from stdin.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Unique name: a-z, 0-9 and -.")] = None,
    image: Annotated[str | None, typer.Option(help="As for `docker pull`.")] = None,
    command: Annotated[str | None, typer.Option(help="Start command, split as a shell does, run without one.")] = None,
    port: Annotated[
        list[int] | None, typer.Option(help="A port of its own API; may be repeated, first is default.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Environment; may be repeated.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs per replica.")] = None,
    gpu_model: Annotated[str | None, typer.Option(help='Words of the model, e.g. "4090".')] = None,
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Least memory per GPU.")] = None,
    replicas: Annotated[int | None, typer.Option(help="How many (default 1).")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Tasks that one replica may run at once.")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPU cores per replica.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory per replica, e.g. 16GiB.")] = None,
    ready_path: Annotated[str | None, typer.Option(help="Ready once GET on it answers below 500.")] = None,
    registry_username: Annotated[str | None, typer.Option(help="For a private image.")] = None,
    registry_password_file: Annotated[Path | None, typer.Option(metavar="FILE", help="For a private image.")] = None,
    gpu_share: Annotated[float | None, typer.Option(metavar="0.001-0.999", help="Part of one GPU.")] = None,
    volume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Kept by the node for the next replica.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="For the record; free text.")] = None,
    wait: Wait = False,
    timeout: Limit = "10m",
) -> None:
    """Register a workspace from a TOML file, from options, or both (options win), and begin to deploy it.

    Its id is printed here and by `show` alone: it is the workspace's credential.

    \b
    Examples:
      ngpu workspace create img2img.toml --wait
      ngpu workspace create --name echo --image example/echo:1 --port 8080
      ngpu workspace create img2img.toml --replicas 3 --gpu-model 4090
      ID=$(ngpu workspace create img2img.toml --quiet)
    \b
    The file (only name, image and ports are needed):
      name = "img2img"
      image = "registry.example/img2img:1"
      command = ["python3", "server.py"]
      ports = [8080]
      replicas = 2
      memory = "16GiB"
      \\[gpu]
      model = "RTX 4090"
      count = 1
      \\[readiness]
      path = "/health"
    """
    limit_s = seconds(timeout)
    typed: dict[str, Any] = {
        "name": name,
        "image": image,
        "command": _words(command) if command is not None else None,
        "ports": port or None,
        "env": _pairs(env, "--env") if env else None,
        "replicas": replicas,
        "concurrency": concurrency,
        "cpus": cpus,
        "memory": memory,
        "account": account,
        "volumes": _pairs(volume, "--volume") if volume else None,
        "gpu": {"count": gpus, "model": gpu_model, "memory": gpu_memory, "share": gpu_share},
        "readiness": {"path": ready_path},
        "registry": {
            "username": registry_username,
            "password_file": str(registry_password_file) if registry_password_file else None,
        },
    }
    options = Source(_given(typed), "options")
    if file is None and not options.document:
        raise Problem("Give a FILE.toml, or at least --name, --image and --port; --help has examples.", Exit.USAGE)
    try:
        sources = [] if file is None else [load(file, sys.stdin.read() if str(file) == "-" else None)]
        spec = to_spec(*sources, options)
    except SpecFault as error:
        raise Problem(str(error), Exit.USAGE) from error
    answer = session.call(session.workspaces.CreateWorkspace, pb.CreateWorkspaceRequest(spec=spec))
    workspace = answer.workspace
    if not wait:
        session.out.answer(answer, lambda: _created(workspace), [workspace.id])
        session.out.say(f"Deploying; follow it with: ngpu workspace show {workspace.spec.name} --wait", "dim")
        return
    if not session.out.json:
        session.out.answer(answer, lambda: _created(workspace), [workspace.id])
    try:
        served = await_serving(session, spec.name, limit_s)
        served.id = workspace.id
        workspace.CopyFrom(served)
    finally:
        # However the waiting ends, the workspace has been made, and here is its id.
        if session.out.json:
            session.out.answer(answer, lambda: "")


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise Problem(f"--command: {error}", Exit.USAGE) from error


def _pairs(typed: list[str], option: str) -> dict[str, str]:
    if wrong := [pair for pair in typed if "=" not in pair]:
        raise Problem(f"{option}: {wrong[0]!r} is not NAME=VALUE", Exit.USAGE)
    return {name: value for name, _, value in (pair.partition("=") for pair in typed)}


def _given(typed: dict[str, Any]) -> dict[str, Any]:
    """Without what was not typed."""
    inner = {key: _given(value) if isinstance(value, dict) else value for key, value in typed.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def _created(workspace: pb.Workspace) -> RenderableType:
    return Group(
        facts(f"Created workspace {workspace.spec.name}.", [("id", workspace.id)]),
        cell("  Keep the id secret: whoever has it may use the workspace.", "dim"),
    )


@app.command()
@connected
def show(
    session: Session,
    workspace: Which,
    wait: Wait = False,
    timeout: Limit = "10m",
) -> None:
    """Show a workspace with its id, its replicas and, if there are fewer than wanted, why.

    \b
    Examples:
      ngpu workspace show img2img
      ngpu workspace show img2img --wait --timeout 5m && echo serving
      ngpu workspace show img2img --json | jq -r .workspace.id
    """
    if wait:
        await_serving(session, workspace, seconds(timeout))
        if not session.out.json:
            return
    answer = session.call(session.workspaces.GetWorkspace, pb.GetWorkspaceRequest(workspace=workspace))
    session.out.answer(answer, lambda: _shown(answer.workspace, session.now), [answer.workspace.id])


def _shown(workspace: pb.Workspace, now: datetime) -> RenderableType:
    spec, limits = workspace.spec, workspace.spec.limits
    count = f"{spec.gpu.share_milli / 1000:g}" if spec.gpu.share_milli else spec.gpu.count
    gpu = f"{count} x {spec.gpu.model or 'any model'}" if spec.gpu.count else "none"
    if spec.gpu.count and spec.gpu.min_memory_bytes:
        gpu += f", {size_text(spec.gpu.min_memory_bytes)} or more{'' if spec.gpu.share_milli else ' each'}"
    ready = f"GET {spec.readiness.path}" if spec.readiness.path else "the port accepts connections"
    state = cell(count_text(workspace), "green" if is_serving(workspace) else "yellow")
    lines: list[tuple[str, object]] = [
        ("id", workspace.id),
        ("state", cell("being deleted", "red") if workspace.HasField("delete_time") else state),
        ("why", cell(workspace.message, "yellow")),
        ("image", spec.image),
        ("command", shlex.join(spec.command)),
        ("replicas", _scale(spec)),
        ("environment", ", ".join(sorted(spec.env))),
        ("ports", ", ".join(map(str, spec.ports))),
        ("GPUs", gpu),
        (
            "each replica",
            f"{counted(spec.cpus, 'CPU')}, {size_text(spec.memory_bytes)}, {counted(spec.concurrency, 'task')} at once",
        ),
        ("volumes", ", ".join(f"{volume.name} at {volume.path}" for volume in spec.volumes)),
        ("ready when", ready),
        ("registry", spec.registry.username),
        ("time limits", _limits(limits)),
        (
            "body limits",
            f"request {size_text(limits.request_body_bytes)}, response {size_text(limits.response_body_bytes)}",
        ),
        ("attempts", f"up to {limits.max_attempts}{'' if spec.repeatable else ', never again once sent'}"),
        ("hedging", f"after {spec.hedge:g} times the average" if spec.hedge else ""),
        ("hang-up", "cancels" if spec.cancel_on_hangup else "does not cancel"),
        ("async", ", ".join(f"{rule.start} ({rule.preset})" if rule.preset else rule.start for rule in spec.jobs)),
        ("account", spec.account),
        ("tasks", f"{workspace.queued_tasks} queued, {workspace.running_tasks} running"),
        ("created", f"{time_text(workspace.create_time)} ({age_text(workspace.create_time, now)})"),
    ]
    head = facts(spec.name, lines)
    if not workspace.replicas:
        return head
    rows = [
        (
            replica.id,
            replica.node_name or replica.node_addr,
            state_text(replica.state),
            "" if replica.progress in (0, 100) else f"{replica.progress}%",
            replica.running_tasks,
            replica.restarts,
            age_text(replica.create_time, now),
            "; ".join(filter(None, (_former(workspace, replica), replica.message))),
        )
        for replica in workspace.replicas
    ]
    columns = ("REPLICA", "NODE", "STATE", "DONE", "TASKS", "RESTARTS", "PLACED", "MESSAGE")
    return Group(head, "", table(*columns, rows=rows, right=("DONE", "TASKS", "RESTARTS")))


def _scale(spec: pb.WorkspaceSpec) -> str:
    scale = spec.scale
    if not scale.max_replicas:
        return ""
    text = f"{scale.min_replicas} to {scale.max_replicas} by load"
    if not scale.min_replicas:
        text += f", none when idle for {duration_text(scale.idle_time.ToTimedelta().total_seconds())}"
    return f"{text}, more when tasks wait {duration_text(scale.queue_wait.ToTimedelta().total_seconds())}"


def _former(workspace: pb.Workspace, replica: pb.Replica) -> str:
    return "" if replica.generation == workspace.generation else f"of generation {replica.generation}"


def _limits(limits: pb.Limits) -> str:
    named = (("queue", limits.queue_time), ("run", limits.run_time), ("total", limits.total_time))
    return ", ".join(f"{name} {duration_text(span.ToTimedelta().total_seconds())}" for name, span in named)


@app.command("list")
@connected
def list_(
    session: Session,
    ids: Annotated[bool, typer.Option("--ids", help="Show the ids too: they are credentials.")] = False,
    deleted: Annotated[bool, typer.Option("--deleted", help="Also those being deleted.")] = False,
) -> None:
    """List workspaces by name.

    \b
    Examples:
      ngpu workspace list
      ngpu workspace list --json | jq '.workspaces[].queued_tasks'
    """
    answer = session.pages(session.workspaces.ListWorkspaces, pb.ListWorkspacesRequest(deleted=deleted))
    if not ids:
        for workspace in answer.workspaces:
            workspace.ClearField("id")
    bare = [workspace.spec.name for workspace in answer.workspaces]
    session.out.answer(answer, lambda: _listed(answer, session.now, ids=ids), bare)


def _listed(answer: pb.ListWorkspacesResponse, now: datetime, *, ids: bool) -> RenderableType:
    if not answer.workspaces:
        return cell("There are no workspaces. Make one: ngpu workspace create FILE.toml", "dim")
    rows = []
    for workspace in answer.workspaces:
        ready = f"{workspace.ready_replicas}/{workspace.wanted_replicas}"
        row = [
            workspace.spec.name,
            cell(ready, "green" if is_serving(workspace) else "yellow"),
            workspace.queued_tasks,
            workspace.running_tasks,
            workspace.spec.image,
            age_text(workspace.create_time, now),
            "being deleted" if workspace.HasField("delete_time") else workspace.message,
        ]
        rows.append([workspace.id, *row] if ids else row)
    columns = [*(["ID"] if ids else []), "NAME", "READY", "QUEUED", "RUNNING", "IMAGE", "CREATED", "MESSAGE"]
    return table(*columns, rows=rows, right=("READY", "QUEUED", "RUNNING"))


@app.command()
@connected
def scale(
    session: Session,
    workspace: Which,
    replicas: Annotated[int, typer.Argument(min=0, help="How many from now on; 0 stops it and keeps it registered.")],
    wait: Wait = False,
    timeout: Limit = "10m",
) -> None:
    """Set the number of replicas. Those beyond it finish what they run, then stop.

    \b
    Examples:
      ngpu workspace scale img2img 3 --wait
    """
    limit_s = seconds(timeout)
    request = pb.ScaleWorkspaceRequest(workspace=workspace, replicas=replicas)
    answer = session.call(session.workspaces.ScaleWorkspace, request)
    if wait:
        answer.workspace.CopyFrom(await_serving(session, workspace, limit_s))
    answer.workspace.ClearField("id")
    session.out.answer(answer, lambda: f"{answer.workspace.spec.name}: {count_text(answer.workspace)}.")


@app.command()
@connected
def update(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The whole description; - reads it from stdin.")],
    wait: Wait = False,
    timeout: Limit = "10m",
) -> None:
    """Describe a workspace anew: the file replaces all that was said of it before.

    Where that needs other containers, they come up one at a time, and an old one goes only once a new one is ready. If
    the new ones do not come up, the update is taken back; `show` says why.

    \b
    Examples:
      ngpu workspace update img2img.toml --wait
    """
    limit_s = seconds(timeout)
    try:
        spec = to_spec(load(file, sys.stdin.read() if str(file) == "-" else None))
    except SpecFault as error:
        raise Problem(str(error), Exit.USAGE) from error
    answer = session.call(session.workspaces.UpdateWorkspace, pb.UpdateWorkspaceRequest(workspace=spec.name, spec=spec))
    if wait:
        answer.workspace.CopyFrom(await_serving(session, spec.name, limit_s, generation=answer.workspace.generation))
    answer.workspace.ClearField("id")
    session.out.answer(answer, lambda: f"{spec.name}: {count_text(answer.workspace)}.")
    if not wait:
        session.out.say(f"Updating; follow it with: ngpu workspace show {spec.name} --wait", "dim")


@app.command()
@connected
def delete(
    session: Session,
    workspace: Which,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Stop a workspace's replicas and refuse its tasks from now on: queued ones fail, running ones finish.

    \b
    Examples:
      ngpu workspace delete img2img --yes
    """
    confirm(f"Delete the workspace {workspace}? Its queued tasks fail.", yes=yes)
    answer = session.call(session.workspaces.DeleteWorkspace, pb.DeleteWorkspaceRequest(workspace=workspace))
    session.out.answer(answer, lambda: "Deleted; running tasks finish first.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask, where there is somebody to ask. Raises Problem if the answer is no."""
    if not yes and sys.stdin.isatty() and sys.stdout.isatty() and not typer.confirm(question):
        raise Problem("Nothing was changed.")
