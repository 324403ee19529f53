"""`ngpu-node simulate` and `ngpu-node simulate-fault`: what is typed, and how it ends.

Parts are imported when they are needed: a real node's daemon has no use for them in its memory.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from nodedaemon import log
from nodedaemon.command import alone, fail, raise_open_files, settings_of, told
from nodedaemon.simulated.faults import usage

if TYPE_CHECKING:
    from nodedaemon.config import Config
    from nodedaemon.simulated.fleet import Fleet, Plan

#: Of one process: each node has its connections, streams and loops.
NODES_LIMIT: Final = 2000
GPUS_LIMIT: Final = 64
SEED_LIMIT: Final = 10**6

_PANEL: Final = "The fleet"
_PACE: Final = "How fast it is"


def simulate(  # noqa: PLR0917, typer takes them by name
    controlplane: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The control plane's gRPC port.")
    ] = None,
    state_dir: Annotated[Path, typer.Option(metavar="DIR", help="Keys, spools and the door for faults.")] = Path(
        ".ngpu/simulated"
    ),
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For nodes that have not joined yet: lines of address and one-time token."),
    ] = None,
    addresses: Annotated[
        bool, typer.Option("--addresses", help="Print the nodes' addresses, a line each, and end: they need tokens.")
    ] = False,
    tls: Annotated[bool | None, typer.Option("--tls", help="Speak TLS to the control plane.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Roots to trust, PEM; implies --tls.")] = None,
    allow_plaintext: Annotated[
        bool | None, typer.Option("--allow-plaintext", help="No TLS to another machine.")
    ] = None,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="info tells of each node's sessions and replicas.")
    ] = "error",
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, max=NODES_LIMIT, help="Simulated nodes.", rich_help_panel=_PANEL)
    ] = 8,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=0,
            max=GPUS_LIMIT,
            help="GPUs of a node; given several times: nodes take them in turn. [4]",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help='GPU model of a node; given several times: nodes take them in turn. ["NVIDIA GeForce RTX 4090"]',
            rich_help_panel=_PANEL,
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(metavar="NAME", help="Nodes are NAME-001 ...", rich_help_panel=_PANEL)] = "sim",
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of all chance. [a new one, printed]", rich_help_panel=_PANEL)
    ] = None,
    chaos: Annotated[
        float,
        typer.Option(metavar="RATE", min=0, help="Faults by chance: so many a minute.", rich_help_panel=_PANEL),
    ] = 0.0,
    speed: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X",
            min=0.01,
            help="Speed of a node; given several times: each has one of them by chance. [1]",
            rich_help_panel=_PACE,
        ),
    ] = None,
    service: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Median time of a request.", rich_help_panel=_PACE)
    ] = 1.0,
    spread: Annotated[
        float, typer.Option(metavar="SIGMA", min=0, max=3, help="Of its lognormal.", rich_help_panel=_PACE)
    ] = 0.55,
    pull: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="To pull an image of 10 GiB.", rich_help_panel=_PACE)
    ] = 10.0,
    start: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Until a container listens.", rich_help_panel=_PACE)
    ] = 2.0,
) -> None:
    """Run a fleet of simulated nodes in this process, until SIGTERM or SIGINT.

    Each has a key of its own and runs the daemon's real code against a real control plane: it joins, reports, takes
    replicas, and passes requests to their containers, which are small HTTP servers in this process and answer with
    node, replica and GPUs. Simulated are pulls, containers and GPUs. Started again with the same state directory they
    are the same nodes.

    Each node needs a one-time token to join: `ngpu simulate`, with the same options, makes them and then runs this.
    `ngpu-node simulate-fault` does something to a node while it runs.

    \b
    Examples:
      ngpu simulate --nodes 200 --gpus 4 --model "NVIDIA GeForce RTX 4090" --model "NVIDIA A100-SXM4-80GB"
      ngpu simulate --nodes 16 --gpus 8 --gpus 2 --speed 1 --speed 2 --service 3.2 --chaos 6
      ngpu-node simulate-fault .ngpu/simulated kill sim-007 30s
    """
    from nodedaemon.simulated.containers import Pace
    from nodedaemon.simulated.fleet import Plan

    options: dict[str, Any] = {"controlplane": controlplane, "tls": tls, "tls_ca": tls_ca}
    options |= {"allow_plaintext": allow_plaintext, "log_level": log_level}
    settings = settings_of(None, options)
    log.set_up(settings.log_level, settings.log_format)
    plan = Plan(
        nodes=nodes,
        models=tuple(model or ["NVIDIA GeForce RTX 4090"]),
        gpus=tuple(gpus or [4]),
        speeds=tuple(speed or [1.0]),
        prefix=prefix,
        seed=int.from_bytes(os.urandom(4)) % SEED_LIMIT if seed is None else seed,
        pace=Pace(pull_s=pull, start_s=start, service_s=service, spread=spread),
    )
    raise_open_files()
    with told(), alone(state_dir):
        if addresses:
            typer.echo("\n".join(_addresses(plan.names(), state_dir)))
            return
        total = sum(plan.hardware(number).gpus for number in range(nodes))
        typer.echo(f"{nodes} simulated nodes, {total} GPUs, seed {plan.seed}; Ctrl-C ends them.")
        asyncio.run(_run(settings, plan, state_dir, _tokens(tokens), chaos))


def _addresses(names: list[str], state_dir: Path) -> list[str]:
    from nodedaemon.identity import Identity
    from nodedaemon.simulated.node import home_of

    return [Identity.load(home_of(state_dir, name) / "node.key").address for name in names]


def _tokens(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    if any(len(words) != 2 for words in lines):
        fail(f"{file}: each line must be an address and a token", 2)
    return dict(lines)


async def _run(settings: "Config", plan: "Plan", state_dir: Path, tokens: dict[str, str], chaos: float) -> None:
    from ngpu import heap

    from nodedaemon.simulated.door import open_door
    from nodedaemon.simulated.fleet import Fleet
    from nodedaemon.simulated.line import LineDialler

    fleet = Fleet(
        plan,
        state_dir,
        lambda line: LineDialler(settings.controlplane, tls=settings.with_tls, tls_ca=settings.tls_ca, line=line),
        tell=typer.echo,
    )
    heap.settle()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop, number)
    async with open_door(fleet, state_dir):
        await _without_groups(fleet, tokens, stop, chaos)


async def _without_groups(fleet: "Fleet", tokens: dict[str, str], stop: asyncio.Event, chaos: float) -> None:
    """The first fault of a node that ends all, without the group that it comes in."""
    try:
        await fleet.run(tokens, stop, faults_a_minute=chaos)
    except BaseExceptionGroup as faults:
        raise faults.exceptions[0] from None


def _on_signal(stop: asyncio.Event, number: int) -> None:
    if stop.is_set():
        os._exit(128 + number)
    stop.set()


def simulate_fault(
    state_dir: Annotated[Path, typer.Argument(help="The simulation's state directory.")],
    words: Annotated[
        list[str], typer.Argument(metavar="FAULT...", help="What shall happen, to which node; or status.")
    ],
) -> None:
    """Do something to a simulated node, while the simulation runs."""
    from nodedaemon.simulated import door

    with told():
        answer = door.ask(state_dir, " ".join(words))
    sys.stdout.write(f"{answer['done']}\n" if "done" in answer else json.dumps(answer, indent=2) + "\n")


simulate_fault.__doc__ = """Do something to a simulated node, while the simulation runs. NODE is a name, or `any`.

TIME (30s, 5m) is how long it lasts; without it: until `return` or `heal`. `status` prints all nodes as JSON.

\b
Examples:
  ngpu-node simulate-fault .ngpu/simulated kill sim-017 30s
  ngpu-node simulate-fault .ngpu/simulated silence any 30s
  ngpu-node simulate-fault .ngpu/simulated gpu-xid sim-017 0 79
  ngpu-node simulate-fault .ngpu/simulated slow sim-017 4x
  ngpu-node simulate-fault .ngpu/simulated status

\b
Faults:
  """ + "\n  ".join(usage())
