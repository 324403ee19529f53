"""`ngpu token`: who may do what."""

from datetime import datetime
from enum import Enum
from typing import Annotated

import typer
from ngpu.v1 import fleet_pb2 as pb
from rich.console import RenderableType
from rich.text import Text

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, table
from controlplane.ctl.session import Session
from controlplane.ctl.units import age_text, duration_message, moment, time_text
from controlplane.ctl.workspaces import seconds

app = typer.Typer(no_args_is_help=True, help="Tokens: who may do what.")


class Role(Enum):
    """As typed."""

    NODE = "node"
    SERVICE = "service"
    OPERATOR = "operator"


_NEXT = {
    Role.NODE: "It joins one node, once: NGPU_NODE_TOKEN=TOKEN ngpu-node run --controlplane HOST:PORT",
    Role.SERVICE: "For a bridge or another front end: ngpu-bridge --token-file FILE",
    Role.OPERATOR: "It may do everything: keep it in a file that only you can read.",
}


@app.command()
@connected
def create(
    session: Session,
    role: Annotated[
        Role, typer.Option(help="node: joins one node, once. service: tasks of any workspace. operator: all.")
    ],
    name: Annotated[str, typer.Option(help="What it is for; free text.")] = "",
    lifetime: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Default: 24h for a node, else without end.")
    ] = None,
) -> None:
    """Make a token. It is printed once, alone on stdout; only a hash of it is kept.

    \b
    Examples:
      ngpu token create --role node --name "PC in the attic"
      ngpu token create --role service --name bridge > bridge.token
      ngpu token create --role operator --lifetime 8h --json
    """
    request = pb.CreateTokenRequest(role=pb.Role.Value(f"ROLE_{role.name}"), name=name)
    if lifetime is not None:
        request.lifetime.CopyFrom(duration_message(seconds(lifetime, "--lifetime")))
    answer = session.call(session.fleet.CreateToken, request)
    session.out.answer(answer, lambda: answer.secret, [answer.secret])
    if not session.out.json:
        expiry = answer.token.expire_time
        until = f"until {time_text(expiry)}" if moment(expiry) else "without end"
        session.out.say(f"Token {answer.token.id}, {until}; it is not shown again. {_NEXT[role]}", "dim")


@app.command("list")
@connected
def list_(session: Session) -> None:
    """List tokens, without their secrets."""
    answer = session.pages(session.fleet.ListTokens, pb.ListTokensRequest())
    session.out.answer(answer, lambda: _listed(answer, session.now), [token.id for token in answer.tokens])


def _listed(answer: pb.ListTokensResponse, now: datetime) -> RenderableType:
    rows = [
        (
            token.id,
            pb.Role.Name(token.role).removeprefix("ROLE_").lower(),
            _state(token, now),
            age_text(token.create_time, now),
            age_text(token.expire_time, now) if moment(token.expire_time) else "never",
            token.name,
        )
        for token in answer.tokens
    ]
    return table("ID", "ROLE", "STATE", "CREATED", "EXPIRES", "NAME", rows=rows)


def _state(token: pb.Token, now: datetime) -> Text:
    expiry = moment(token.expire_time)
    if moment(token.revoke_time):
        return cell("revoked", "red")
    if moment(token.use_time):
        return cell("used", "dim")
    return cell("expired", "dim") if expiry and expiry <= now else cell("valid", "green")


@app.command()
@connected
def revoke(session: Session, token: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")]) -> None:
    """End a token; whoever uses it is refused from now on."""
    answer = session.call(session.fleet.RevokeToken, pb.RevokeTokenRequest(id=token))
    session.out.answer(answer, lambda: cell(f"The token {token} is revoked."))
