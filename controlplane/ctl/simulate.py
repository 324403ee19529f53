"""`ngpu simulate`: a fleet of simulated nodes on this machine, joined to a real control plane."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from ngpu.v1 import fleet_pb2 as pb

from controlplane.ctl.command import connected
from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.session import Session

#: The programs share nothing but the wire: the fleet is the node daemon's, run as a command.
_SIMULATE = (sys.executable, "-m", "nodedaemon", "simulate")


@connected
def simulate(
    session: Session,
    context: typer.Context,
    state_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the fleet keeps its keys.")] = Path(
        ".ngpu/simulated"
    ),
) -> None:
    """Run a fleet of simulated nodes here: real sessions and requests, without GPUs and containers.

    Makes a one-time token for each node that has not joined, then runs `ngpu-node simulate`, which has all options:
    how many nodes and GPUs, which models, how fast, which chaos. `ngpu-node simulate-fault` does something to a node.

    \b
    Examples:
      ngpu simulate --nodes 200 --gpus 4 --model "NVIDIA GeForce RTX 4090" --model "NVIDIA A100-SXM4-80GB"
      ngpu simulate --nodes 16 --chaos 6 --seed 7
      ngpu-node simulate --help
      ngpu-node simulate-fault .ngpu/simulated kill sim-007 30s
    """
    target = session.target
    command = [*_SIMULATE, "--controlplane", target.server, "--state-dir", str(state_dir), *context.args]
    command += ["--tls"] if target.tls else []
    command += ["--tls-ca", str(target.tls_ca)] if target.tls_ca else []
    command += ["--allow-plaintext"] if target.plaintext else []
    # In a process of its own, before this one speaks gRPC.
    found = subprocess.run([*command, "--addresses"], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if found.returncode:
        raise typer.Exit(found.returncode)
    addresses = found.stdout.split()
    nodes = session.pages(session.fleet.ListNodes, pb.ListNodesRequest(revoked=True)).nodes
    strangers = sorted(set(addresses) - {node.addr for node in nodes})
    request = pb.CreateTokenRequest(role=pb.ROLE_NODE, name="simulated")
    lines = [f"{address} {session.call(session.fleet.CreateToken, request).secret}\n" for address in strangers]
    tokens = state_dir / "tokens"
    try:
        tokens.unlink(missing_ok=True)
        tokens.touch(mode=0o600)
        tokens.write_text("".join(lines))
    except OSError as error:
        raise Problem(f"The tokens cannot be written: {error}", Exit.USAGE) from error
    sys.stdout.flush()
    os.execv(command[0], [*command, "--tokens", str(tokens)])  # noqa: S606
