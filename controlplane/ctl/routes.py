"""`ngpu route`: public names for paths of workspaces."""

from typing import Annotated

import typer
from ngpu.v1 import workspace_pb2 as pb
from rich.console import RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, table
from controlplane.ctl.session import Session
from controlplane.ctl.units import age_text

app = typer.Typer(no_args_is_help=True, help="Published routes: what may be called without credentials.")


@app.command()
@connected
def publish(
    session: Session,
    name: Annotated[str, typer.Argument(help="Public name: POST /user/NAME calls it.")],
    workspace: Annotated[str, typer.Option("--workspace", "-w", help="Name of the workspace.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="One of its ports; 0 is its first.")] = 0,
    path: Annotated[str, typer.Option(help="The container's path (default /NAME).")] = "",
) -> None:
    """Give a public name to a path of a workspace; publishing a name again moves it.

    \b
    Examples:
      ngpu route publish sdapi/v1/img2img --workspace img2img
      ngpu route publish img2img --workspace img2img --path /sdapi/v1/img2img
    """
    route = pb.Route(name=name, workspace=workspace, port=port, path=path)
    answer = session.call(session.workspaces.PublishRoute, pb.PublishRouteRequest(route=route))
    session.out.answer(answer, lambda: f"POST /user/{answer.route.name} now calls {_target(answer.route)}.")


@app.command("list")
@connected
def list_(session: Session) -> None:
    """List published routes by name."""
    answer = session.pages(session.workspaces.ListRoutes, pb.ListRoutesRequest())
    session.out.answer(answer, lambda: _listed(session, answer), [route.name for route in answer.routes])


def _listed(session: Session, answer: pb.ListRoutesResponse) -> RenderableType:
    if not answer.routes:
        return cell("No routes are published. Publish one: ngpu route publish NAME --workspace WORKSPACE", "dim")
    now = session.now
    rows = [
        (f"/user/{route.name}", route.workspace, route.port or "first", _path(route), age_text(route.create_time, now))
        for route in answer.routes
    ]
    return table("CALL", "WORKSPACE", "PORT", "PATH", "PUBLISHED", rows=rows)


@app.command()
@connected
def delete(session: Session, name: Annotated[str, typer.Argument(help="The public name.")]) -> None:
    """Take a public name away; calls in progress go on."""
    answer = session.call(session.workspaces.DeleteRoute, pb.DeleteRouteRequest(name=name))
    session.out.answer(answer, lambda: f"POST /user/{name} is no longer answered.")


def _path(route: pb.Route) -> str:
    return route.path or f"/{route.name}"


def _target(route: pb.Route) -> str:
    return f"{_path(route)} of {route.workspace}" + (f", port {route.port}" if route.port else "")
