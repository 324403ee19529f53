"""`ngpu price`: what a second of a GPU costs."""

from typing import Annotated

import typer
from ngpu.v1 import usage_pb2 as pb
from rich.console import RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, table
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.session import Session
from controlplane.ctl.units import age_text, moment, parse_time, time_text

app = typer.Typer(no_args_is_help=True, help="Prices of GPU time.")


@app.command("set")
@connected
def set_(
    session: Session,
    price: Annotated[str, typer.Argument(help="Of a second of one GPU: at most 9 decimals, in your unit of money.")],
    gpu: Annotated[str, typer.Option(help="Words of the GPU's model; without it, for every other GPU.")] = "",
    since: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="From when on; not before now (the default).")
    ] = None,
) -> None:
    """Set what a second of a GPU costs from a time on. What ran before keeps its price.

    \b
    Examples:
      ngpu price set 0.000125 --gpu "RTX 4090"
      ngpu price set 0.0008 --gpu "A100|H100" --from 2026-02-01
      ngpu price set 0.00005
    """
    message = pb.Price(gpu_model=gpu, price=price)
    if since is not None:
        try:
            message.effective_time.FromDatetime(parse_time(since, session.now))
        except ValueError as error:
            raise Problem(f"--from: {error}", Exit.USAGE) from error
    answer = session.call(session.usage.SetPrice, pb.SetPriceRequest(price=message))
    shown = answer.price
    session.out.answer(
        answer,
        lambda: f"A second of {_which(shown)} costs {shown.price} from {time_text(shown.effective_time)} on.",
        [shown.price],
    )


@app.command("list")
@connected
def list_(session: Session) -> None:
    """List all prices by model and time, those that are over too."""
    answer = session.call(session.usage.ListPrices, pb.ListPricesRequest())
    session.out.answer(
        answer, lambda: _listed(session, answer), [f"{one.gpu_model}\t{one.price}" for one in answer.prices]
    )


def _listed(session: Session, answer: pb.ListPricesResponse) -> RenderableType:
    if not answer.prices:
        return cell("GPU time costs nothing. Set a price: ngpu price set 0.000125 --gpu 4090", "dim")
    now, rows = session.now, []
    for number, one in enumerate(answer.prices):
        begin = moment(one.effective_time)
        following = answer.prices[number + 1] if number + 1 < len(answer.prices) else pb.Price()
        end = moment(following.effective_time) if following.gpu_model == one.gpu_model else None
        state = "to come" if begin and begin > now else "over" if end and end <= now else "now"
        rows.append((_which(one), one.price, state, time_text(one.effective_time), age_text(one.effective_time, now)))
    return table("GPU", "A SECOND", "HOLDS", "FROM", "", rows=rows, right=("A SECOND",))


def _which(price: pb.Price) -> str:
    return price.gpu_model or "any other GPU"
