"""A node behind a home router: in a network of its own with every inbound port closed."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.programs import Platform
from tests.system.conftest import Rest, workspace_file

pytestmark = pytest.mark.netns


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run it; the caller looks at the exit status."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def router() -> Iterator[tuple[str, str, str]]:
    """Name of a network namespace, the address of this side and of that. Nothing gets in that was not asked for."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("iptables"):
        pytest.skip("needs root, iproute2 and iptables to make a network namespace")
    number = os.getpid() % 250
    name, ours, theirs = f"ngpu{os.getpid()}", f"10.213.{number}.1", f"10.213.{number}.2"
    if (made := run("ip", "netns", "add", name)).returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    inside = ("ip", "netns", "exec", name)
    veth = f"v{os.getpid()}"
    try:
        for command in (
            ("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name),
            ("ip", "addr", "add", f"{ours}/30", "dev", veth),
            ("ip", "link", "set", veth, "up"),
            (*inside, "ip", "addr", "add", f"{theirs}/30", "dev", "eth0"),
            (*inside, "ip", "link", "set", "eth0", "up"),
            (*inside, "ip", "link", "set", "lo", "up"),
            (*inside, "iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT"),
            (*inside, "iptables", "-A", "INPUT", "-m", "state", "--state", "ESTABLISHED,RELATED", "-j", "ACCEPT"),
            (*inside, "iptables", "-P", "INPUT", "DROP"),
        ):
            done = run(*command)
            assert done.returncode == 0, (command, done.stderr)
        yield name, ours, theirs
    finally:
        run("ip", "netns", "del", name)
        run("ip", "link", "del", veth)


def test_a_node_with_every_inbound_port_closed_serves(
    router: tuple[str, str, str], tmp_path: Path, images: Path
) -> None:
    name, ours, theirs = router
    settings = {f"NGPU_{program}_ALLOW_PLAINTEXT": "true" for program in ("CONTROLPLANE", "NODE", "BRIDGE")}
    with Platform(tmp_path, settings=settings, host="0.0.0.0") as platform:
        platform.start_node(
            *("behind", "--engine", "process", "--process-images", str(images), "--stop-containers"),
            prefix=("ip", "netns", "exec", name),
            server=f"{ours}:{platform.server.rpartition(':')[2]}",
        )
        platform.start_bridge()
        platform.ngpu("workspace", "create", workspace_file(tmp_path, "echo", "echo"), "--wait", "--timeout", "60s")
        rest = Rest(platform.url, platform.ngpu("workspace", "show", "echo")["workspace"]["id"])
        assert rest.ok("POST", "/user/echo", {"data": "from outside"})["data"] == "from outside"
        body = "x" * 3_000_000
        assert rest.ok("POST", "/user/echo", {"data": body})["data"] == body

        about = rest.ok("POST", "/user/about", {"data": ""})["data"]
        port = int(json.loads(about)["env"]["PORT"])
        assert run("ip", "netns", "exec", name, "curl", "-sm2", f"http://{theirs}:{port}/echo").returncode == 0
        assert run("curl", "-sm2", f"http://{theirs}:{port}/echo").returncode == 28, "the port is open to the outside"
