"""`ngpu plan`: what would follow from a workspace file, without doing it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from ngpu.v1 import fleet_pb2 as pb
from rich.console import Group, RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.explain import candidates
from controlplane.ctl.output import cell, counted, table
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.session import Session
from controlplane.ctl.units import size_text
from controlplane.ctl.workspace_file import SpecFault, load, to_spec


@connected
def plan(
    session: Session,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.toml", help="As for `workspace create`; - reads it from stdin.")
    ],
) -> None:
    """Show what would follow if a workspace were created or updated from a file. Nothing is changed.

    For each replica: the node that it would go to with the fleet as it is now, what the others would cost or why they
    are refused, and what must be pulled. Lower costs are better. For a workspace that lives: whether its containers
    would have to be replaced.

    The exit code is 6 if there is not room for all.

    \b
    Examples:
      ngpu plan img2img.toml && ngpu workspace create img2img.toml --wait
      ngpu plan img2img.toml --json | jq -r '.replicas[].node_name'
    """
    try:
        spec = to_spec(load(file, sys.stdin.read() if str(file) == "-" else None))
    except SpecFault as error:
        raise Problem(str(error), Exit.USAGE) from error
    answer = session.call(session.fleet.PlanWorkspace, pb.PlanWorkspaceRequest(spec=spec))
    bare = [replica.node_name for replica in answer.replicas if replica.node_name]
    session.out.answer(answer, lambda: Group(*_parts(answer)), bare)
    if not answer.fits:
        raise Problem(f"There is no room for all replicas of {spec.name} now; nothing was changed.", Exit.NO_ROOM)


def _parts(answer: pb.PlanWorkspaceResponse) -> Iterator[RenderableType]:
    yield cell(answer.summary, "bold")
    if answer.kept_replicas:
        yield cell(f"{counted(answer.kept_replicas, 'replica')} would go on as they are.")
    if answer.replicas:
        yield ""
        columns = ("REPLICA", "NODE", "GPUS", "IMAGE", "REPLACES")
        yield table(*columns, rows=[_row(number, one) for number, one in enumerate(answer.replicas, 1)])
    before = None
    for number, replica in enumerate(answer.replicas, 1):
        decision = replica.decision
        yield ""
        chosen = replica.node_name or "no node"
        yield cell(f"{number}. {decision.subject}: {chosen}", "green" if replica.node_name else "yellow")
        # The refused are told first by reason with their number, as the list of them is cut.
        for reason, count in sorted(decision.refusals.items(), key=lambda item: (-item[1], item[0])):
            yield cell(f"  {count} refused: {reason}", "dim")
        if decision.candidates == before:
            yield cell("  as before", "dim")
        elif decision.candidates:
            yield candidates(decision)
        before = decision.candidates


def _row(number: int, replica: pb.PlannedReplica) -> list[object]:
    size = size_text(replica.image_bytes) if replica.image_bytes else "of unknown size"
    image = f"pull, {size}" if replica.pulls_image else "there"
    if not replica.node_name:
        return [number, cell("no room", "yellow"), "", "", ""]
    return [number, replica.node_name, ", ".join(replica.gpu_ids) or "none", image, replica.replaces]
