"""A Docker engine of a test's own, to kill, restart, and fill up: containerd and dockerd on sockets of their own.

It lives in a network namespace of its own, with a way to and from this one, because two engines in one namespace
take each other's bridges and rules away. Needs root.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

START_S = 30


class PrivateDocker:
    """Not running until `start`. `disk_bytes`: its data is on a disk of that size."""

    def __init__(self, directory: Path, *, disk_bytes: int = 0) -> None:
        for tool in ("dockerd", "containerd"):
            if not shutil.which(tool):
                pytest.skip(f"needs {tool}, to run an engine of the test's own")
        if os.geteuid() != 0:
            pytest.skip("needs root, to run an engine of the test's own")
        self._directory = directory
        self.url = f"unix://{directory}/docker.sock"
        self.data = directory / "data"
        self.data.mkdir()
        number = secrets.randbelow(256)
        self._namespace = f"ngpu-own{number}"
        self._link, self._host_ip, self.ip = f"ngpu-o{number}", f"10.214.{number}.1", f"10.214.{number}.2"
        self._networks = f"10.213.{number}.0/24"
        self._containerd: subprocess.Popen[bytes] | None = None
        self._dockerd: subprocess.Popen[bytes] | None = None
        if disk_bytes:
            image = directory / "disk.img"
            with image.open("wb") as file:
                file.truncate(disk_bytes)
            self._run("mkfs.ext4", "-q", "-F", str(image))
            if subprocess.run(["mount", "-o", "loop", str(image), str(self.data)], check=False).returncode:
                pytest.skip("needs loop devices, for a small disk")

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command, it runs in the engine's network: there, ports that it publishes are to be found."""
        return ("nsenter", f"--net=/run/netns/{self._namespace}")

    @property
    def host_ip(self) -> str:
        """This side, as seen from there."""
        return self._host_ip

    @property
    def api(self) -> docker.APIClient:
        return docker.APIClient(self.url, version="auto")

    def start(self) -> None:
        """Returns once it answers."""
        if self._containerd is None:
            self._make_namespace()
            config = self._directory / "containerd.toml"
            config.write_text(
                f'version = 2\nroot = "{self.data}/containerd"\nstate = "{self._directory}/containerd-state"\n'
                'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
                f'[grpc]\naddress = "{self._directory}/containerd.sock"\n'
            )
            self._containerd = self.run_inside("containerd", "--config", str(config))
        self._dockerd = self.run_inside(
            *("dockerd", "--host", self.url, "--containerd", f"{self._directory}/containerd.sock"),
            *("--data-root", str(self.data / "docker"), "--exec-root", str(self._directory / "exec")),
            *("--pidfile", str(self._directory / "pid"), "--ip-masq=false"),
            *("--default-address-pool", f"base={self._networks},size=28"),
        )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            # Not by the SDK: it leaves the socket of a connection that is refused to the garbage collector.
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as door:
                door.connect(self.url.removeprefix("unix://"))
                break
            time.sleep(0.05)
        else:
            raise RuntimeError((self._directory / "dockerd.log").read_text()[-2000:])
        # Its containers are to be reached from out here.
        self.run_inside("iptables", "-I", "FORWARD", "-i", "out", "-j", "ACCEPT").wait()

    def kill(self) -> None:
        """As a crash does it: containers go on."""
        assert self._dockerd
        self._dockerd.kill()
        self._dockerd.wait()

    def load(self, image: str) -> None:
        """Have an image of the machine's own engine."""
        source = docker.APIClient(version="auto")
        target = self.api
        with contextlib.closing(source), contextlib.closing(target):
            for _ in target.load_image(b"".join(source.get_image(image))):  # type: ignore[no-untyped-call]
                pass

    def close(self) -> None:
        """Leave nothing behind."""
        try:
            if self._containerd:
                if self._dockerd is None or self._dockerd.poll() is not None:
                    self.start()
                with contextlib.closing(self.api) as api:
                    for container in api.containers(all=True):
                        api.remove_container(container["Id"], force=True, v=True)
                    for network in api.networks():
                        if network["Driver"] == "bridge" and network["Name"] != "bridge":
                            api.remove_network(network["Id"])
        finally:
            for process in (self._dockerd, self._containerd):
                if process:
                    process.send_signal(signal.SIGTERM)
                    process.wait(20)
            subprocess.run(["ip", "netns", "del", self._namespace], check=False, capture_output=True)
            mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
            for mount in sorted((m for m in mounts if m.startswith(f"{self._directory}/")), reverse=True):
                subprocess.run(["umount", mount], check=False)

    def run_inside(self, *argv: str) -> subprocess.Popen[bytes]:
        """A program in its network namespace."""
        with (self._directory / f"{argv[0]}.log").open("ab") as log:
            inside = ["nsenter", f"--net=/run/netns/{self._namespace}", *argv]
            return subprocess.Popen(inside, stdout=log, stderr=log)

    def _make_namespace(self) -> None:
        for line in (
            f"ip netns add {self._namespace}",
            f"ip link add {self._link} type veth peer name out netns {self._namespace}",
            f"ip address add {self._host_ip}/30 dev {self._link}",
            f"ip link set {self._link} up",
            f"ip route add {self._networks} via {self.ip}",
            f"ip -n {self._namespace} address add {self.ip}/30 dev out",
            f"ip -n {self._namespace} link set out up",
            f"ip -n {self._namespace} link set lo up",
            f"ip -n {self._namespace} route add default via {self._host_ip}",
        ):
            self._run(*line.split())

    @staticmethod
    def _run(*argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True)


@contextlib.contextmanager
def private_docker(directory: Path, *, disk_bytes: int = 0) -> Iterator[PrivateDocker]:
    """Running; gone afterwards. The directory's path must be short: sockets lie in it."""
    engine = PrivateDocker(directory, disk_bytes=disk_bytes)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
