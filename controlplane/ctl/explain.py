"""`ngpu explain`: why something is where it is, or is not."""

from collections.abc import Iterator
from typing import Annotated

import typer
from ngpu.v1 import fleet_pb2 as pb
from rich.console import Group, RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, table
from controlplane.ctl.session import Session
from controlplane.ctl.units import time_text

app = typer.Typer(no_args_is_help=True, help="Why a workspace's replicas or a task are where they are, or wait.")


@app.command()
@connected
def workspace(
    session: Session, which: Annotated[str, typer.Argument(metavar="WORKSPACE", help="Its name or id.")]
) -> None:
    """Why its replicas are on the nodes where they are, or on none: every candidate with its cost or refusal."""
    _explain(session, pb.ExplainRequest(workspace=which))


@app.command()
@connected
def task(session: Session, which: Annotated[str, typer.Argument(metavar="TASK", help="Its id.")]) -> None:
    """Why it went to the replica it went to, or what it waits for."""
    _explain(session, pb.ExplainRequest(task_id=which))


def _explain(session: Session, request: pb.ExplainRequest) -> None:
    answer = session.call(session.fleet.Explain, request)
    session.out.answer(answer, lambda: Group(*_parts(answer)), [answer.summary])


def _parts(answer: pb.ExplainResponse) -> Iterator[RenderableType]:
    yield cell(answer.summary, "bold")
    for decision in answer.decisions:
        yield ""
        names = {candidate.id: candidate.name for candidate in decision.candidates}
        chosen = names.get(decision.chosen) or decision.chosen
        outcome = f"chosen {chosen}" if chosen else "nothing chosen"
        yield cell(f"{time_text(decision.time)}  {decision.subject}: {outcome}", "green" if chosen else "yellow")
        # The refused are told first by reason with their number, as the list of them is cut.
        for reason, count in sorted(decision.refusals.items(), key=lambda item: (-item[1], item[0])):
            yield cell(f"  {count} refused: {reason}", "dim")
        if decision.candidates:
            yield candidates(decision)


def candidates(decision: pb.Decision) -> RenderableType:
    """A table of them, each part of each cost in a column."""
    # A part that is zero for all of them decided nothing.
    parts = sorted({name for one in decision.candidates for name, cost in one.parts.items() if cost})
    rows = []
    for one in decision.candidates:
        mark = cell("  *", "green") if one.id == decision.chosen else cell("")
        costs = [f"{one.parts[name]:.3g}" if name in one.parts else "" for name in parts]
        total = "" if one.refusal else f"{one.cost:.3g}"
        rows.append([mark, one.name or one.id, total, *costs, one.refusal])
    return table("", "CANDIDATE", "COST", *(p.upper() for p in parts), "REFUSED BECAUSE", rows=rows)
