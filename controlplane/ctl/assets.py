"""`ngpu asset`: what BTC addresses hold, as the configured indexers say."""

from typing import Annotated

import typer
from ngpu.v1 import asset_pb2 as pb
from rich.console import RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, table
from controlplane.ctl.session import Session

app = typer.Typer(no_args_is_help=True, help="BRC-20 assets that tasks may be made to depend on.")


@app.command()
@connected
def check(session: Session, address: Annotated[str, typer.Argument(help="A BTC address.")]) -> None:
    """Ask the configured indexers what an address holds, as is done for a task with a BTC address.

    \b
    Examples:
      ngpu asset check bc1q...
    """
    answer = session.call(session.assets.CheckAddress, pb.CheckAddressRequest(address=address))
    bare = [f"{holding.ticker} {holding.balance}" for holding in answer.holdings]
    session.out.answer(answer, lambda: _held(answer), bare)


def _held(answer: pb.CheckAddressResponse) -> RenderableType:
    if not answer.holdings:
        return cell("It holds none of the configured assets: its tasks are refused.")
    return table("TICKER", "BALANCE", rows=((one.ticker, one.balance) for one in answer.holdings), right=("BALANCE",))
