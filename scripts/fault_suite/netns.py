"""A network namespace with one way out, which can be cut silently: what a pulled plug or a dead router looks like."""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator


def why_no_namespaces() -> str:
    """Why none can be made here; "" if they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [tool for tool in ("ip", "iptables", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"needs {' and '.join(missing)}"
    name = f"ngpu-try{secrets.token_hex(3)}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces are not allowed here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return ""


class Namespace:
    """`prefix`: put before a command, it runs inside. `host_ip` is this side as seen from there."""

    def __init__(self) -> None:
        number = secrets.randbelow(64 * 256)
        low, high = number % 256, number // 256
        self.name = f"ngpu-f{number:x}"
        self._link = f"ngpu-f{number:x}"
        self.host_ip = f"10.{192 + high % 20}.{low}.{1 + 4 * (high // 20)}"
        self.ip = f"10.{192 + high % 20}.{low}.{2 + 4 * (high // 20)}"
        self.prefix = ("nsenter", f"--net=/run/netns/{self.name}")

    def __enter__(self) -> "Namespace":
        for line in (
            f"ip netns add {self.name}",
            f"ip link add {self._link} type veth peer name out netns {self.name}",
            f"ip address add {self.host_ip}/30 dev {self._link}",
            f"ip link set {self._link} up",
            f"ip -n {self.name} address add {self.ip}/30 dev out",
            f"ip -n {self.name} link set out up",
            f"ip -n {self.name} link set lo up",
        ):
            subprocess.run(line.split(), check=True, capture_output=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        # Of a namespace that a process still holds the link stays.
        subprocess.run(["ip", "link", "del", self._link], check=False, capture_output=True)

    @contextlib.contextmanager
    def dropping(self, way: str = "both") -> Iterator[None]:
        """Packets vanish: `up` those that leave, `down` those that come, or both."""
        chains = {"up": ("OUTPUT",), "down": ("INPUT",), "both": ("OUTPUT", "INPUT")}[way]
        flags = {"OUTPUT": "-o", "INPUT": "-i"}
        for chain in chains:
            self._iptables("-I", chain, flags[chain], "out", "-j", "DROP")
        try:
            yield
        finally:
            for chain in chains:
                self._iptables("-D", chain, flags[chain], "out", "-j", "DROP")

    def _iptables(self, *rule: str) -> None:
        subprocess.run([*self.prefix, "iptables", "-w", *rule], check=True, capture_output=True)
