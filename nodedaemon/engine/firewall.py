"""What containers must not reach: this machine's own ports and the cloud's metadata address. By iptables, where we may.

Docker's own rules already keep containers of one network from each other (ICC off) and from other Docker networks.
"""

import os
import shutil
import subprocess

#: Link-local: 169.254.169.254 hands out the machine's cloud credentials, 169.254.170.2 the task's.
METADATA = "169.254.0.0/16"
#: A resolver on this machine stays within reach.
DNS_PORT = "53"
TIMEOUT_S = 10


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
            [iptables, "-w", "5", verb, *rule], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"iptables ended with {done.returncode}"
