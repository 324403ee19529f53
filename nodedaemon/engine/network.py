"""The network of Docker's containers: made if it is not there, walled off, and whether it can be reached from here.

Containers must not reach each other, this machine's own ports, or the cloud's metadata address. Docker sees to the
first (ICC off, and its own rules between networks); iptables to the rest, where we may use it. Nothing here imports
docker: `api` is its APIClient.
"""

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

#: Link-local: 169.254.169.254 hands out the machine's cloud credentials, 169.254.170.2 the task's.
METADATA = "169.254.0.0/16"
#: A resolver on this machine stays within reach.
DNS_PORT = "53"
IPTABLES_S = 10

BRIDGE_NAME = "com.docker.network.bridge.name"
BRIDGE_ICC = "com.docker.network.bridge.enable_icc"


@dataclass(frozen=True, slots=True)
class Network:
    """How it was found. `reachable`: its addresses can be used from here. `open`.

    What can be reached and should not.
    """

    reachable: bool
    open: tuple[str, ...] = ()


def prepare(api: Any, name: str) -> Network:
    """See that the network of that name and its walls are there. Blocks for some 50 ms."""
    if not _listed(api, name):
        try:
            api.create_network(
                name,
                driver="bridge",
                options={BRIDGE_NAME: f"{name[:14]}0", BRIDGE_ICC: "false"},
                check_duplicate=True,
            )
        except Exception:
            # Another daemon may have been first.
            if not _listed(api, name):
                raise
    network = api.inspect_network(name)
    options = network.get("Options") or {}
    faults = []
    if fault := put_up(options.get(BRIDGE_NAME) or f"br-{network['Id'][:12]}"):
        faults.append(f"containers can reach this machine's own ports and its cloud's metadata: {fault}")
    if options.get(BRIDGE_ICC) != "false":
        faults.append(f"containers on network {name} reach each other")
    gateways = [config.get("Gateway", "") for config in network["IPAM"].get("Config") or ()]
    return Network(any(map(_is_mine, gateways)), tuple(faults))


def rules(bridge: str) -> list[list[str]]:
    """The rules for what comes in from the bridge, as iptables has them after -I: chain first."""
    new = ["-m", "conntrack", "--ctstate", "NEW"]
    return [
        ["DOCKER-USER", "-i", bridge, "-d", METADATA, "-j", "REJECT"],
        ["INPUT", "-i", bridge, "-d", METADATA, "-j", "REJECT"],
        ["INPUT", "-i", bridge, "-p", "tcp", "!", "--dport", DNS_PORT, *new, "-j", "REJECT"],
        ["INPUT", "-i", bridge, "-p", "udp", "!", "--dport", DNS_PORT, *new, "-j", "REJECT"],
    ]


def put_up(bridge: str) -> str:
    """See that the rules are there. Returns why they cannot be, in words; "": they are. Blocks for some 20 ms."""
    iptables = shutil.which("iptables", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not iptables:
        return "there is no iptables"
    if os.geteuid() != 0:
        return "the node daemon is not root"
    for rule in rules(bridge):
        if _run(iptables, "-C", rule) and (fault := _run(iptables, "-I", rule)):
            return fault
    return ""


def _run(iptables: str, verb: str, rule: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            [iptables, "-w", "5", verb, *rule], capture_output=True, text=True, timeout=IPTABLES_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"iptables ended with {done.returncode}"


def _listed(api: Any, name: str) -> bool:
    return any(network["Name"] == name for network in api.networks(names=[name]))


def _is_mine(ip: str) -> bool:
    """Is that an address of this machine, in this network namespace? Then what lies behind it can be reached."""
    with socket.socket() as probe:
        try:
            probe.bind((ip or "0.0.0.0", 0))
        except OSError:
            return False
    return bool(ip)
