"""The Docker engine with a real Docker, images built here, and registries of the test's own."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
import pytest_asyncio

from nodedaemon.engine import (
    MIB,
    Address,
    Assignment,
    Container,
    Credentials,
    CredentialsRefused,
    DiskFull,
    EngineDown,
    EngineError,
    GpuMissing,
    ImageMissing,
    Mount,
    PullFailed,
    Readiness,
    RegistryUnreachable,
    StartFailed,
    Volume,
)
from nodedaemon.engine.docker import DockerEngine
from nodedaemon.engine.network import put_up, rules
from nodedaemon.readiness import probe
from nodedaemon.replicas import ReplicaReport, Replicas, State
from tests import images
from tests.engine import connected
from tests.nodedaemon.fake_engine import assignment as small
from tests.private_docker import private_docker

pytestmark = pytest.mark.docker

GOOD = Credentials(images.USERNAME, images.PASSWORD)
WRONG = Credentials(images.USERNAME, "wrong")


@pytest.fixture(scope="module")
def api() -> Iterator[docker.APIClient]:
    if why := images.why_no_images():
        pytest.skip(why)
    with contextlib.closing(connected()) as client:
        yield client.api


@pytest.fixture(scope="module")
def echo(api: docker.APIClient) -> str:
    return images.echo_image(api)


@pytest.fixture
def new_replica() -> Callable[[], str]:
    return lambda: f"r-test{secrets.token_hex(4)}"


class Node:
    """One node on the machine's Docker, with names of its own, and nothing left of it in the end."""

    def __init__(self, api: docker.APIClient, state_dir: Path) -> None:
        self.api = api
        self.suffix = secrets.token_hex(3)
        self.addr = f"0xtest{self.suffix}"
        self.network = f"ngpu-t{self.suffix}"
        self.state_dir = state_dir
        self.engines: list[DockerEngine] = []
        self.images: list[str] = []
        self._count = 0

    def engine(self, **options: Any) -> DockerEngine:
        options = {"state_dir": self.state_dir, "network": self.network, **options}
        self.engines.append(DockerEngine(self.addr, **options))
        return self.engines[-1]

    def assignment(self, image: str, **more: Any) -> Assignment:
        self._count += 1
        more = {"memory_bytes": 256 * MIB, "image": image, **more}
        return small(f"r-{self.suffix}{self._count}", **more)

    async def end(self) -> None:
        for engine in self.engines:
            await engine.close()
        for container in self.api.containers(all=True, filters={"label": f"ngpu.node={self.addr}"}):
            self.api.remove_container(container["Id"], force=True, v=True)
        for image in self.images:
            with contextlib.suppress(docker.errors.NotFound):
                self.api.remove_image(image, force=True)
        for volume in self.api.volumes(filters={"label": f"ngpu.node={self.addr}"})["Volumes"] or ():
            self.api.remove_volume(volume["Name"])
        with contextlib.suppress(docker.errors.NotFound):
            self.api.remove_network(self.network)
        for rule in rules(f"{self.network}0"):
            subprocess.run(["iptables", "-w", "5", "-D", *rule], check=False, capture_output=True)


@pytest_asyncio.fixture
async def node(api: docker.APIClient, tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(api, tmp_path)
    yield node
    await node.end()


@pytest.fixture
def engine(node: Node) -> DockerEngine:
    return node.engine()


async def until_ready(container: Container, port: int = 8080) -> Container:
    async with asyncio.timeout(30):
        while await probe(Readiness(port), container.addresses[port]):
            await asyncio.sleep(0.02)
    return container


async def get(address: Address, path: str) -> str:
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    return answer.partition(b"\r\n\r\n")[2].decode()


async def started(engine: DockerEngine, assignment: Assignment) -> Container:
    return await until_ready(await engine.start(assignment, restarts=0))


async def until_ended(engine: DockerEngine, replica_id: str) -> Container:
    look = asyncio.Event()
    watching = asyncio.create_task(engine.watch(look.set))
    try:
        async with asyncio.timeout(30):
            while True:
                look.clear()
                for container in await engine.containers():
                    if container.replica_id == replica_id and container.exit:
                        return container
                await look.wait()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


# What a container may and may not.


async def test_a_container_is_hardened(node: Node, engine: DockerEngine, echo: str) -> None:
    image = images.variant(node.api, "volume", "VOLUME /data")
    wanted = node.assignment(image, ports=(8080, 9000), writable_paths=("/cache/models",), cpus=0.5, env={"A": "b"})
    container = await started(engine, wanted)
    address = container.addresses[9000]
    about = json.loads(await get(address, "/about"))
    assert about["uid"] == 65534
    expected = {"A": "b", "PORT": "8080", "NGPU_PORT_9000": "9000", "HOME": "/tmp", "NVIDIA_VISIBLE_DEVICES": "void"}
    assert expected.items() <= about["env"].items()
    for path, answer in {
        "/x": "Read-only",
        "/srv/x": "Read-only",
        "/tmp/x": "ok",
        "/cache/models/x": "ok",
        "/data/x": "ok",
    }.items():
        assert answer in await get(address, f"/write?path={path}"), path
    found = node.api.inspect_container(container.container_id)
    assert [m for m in found["Mounts"] if m["Type"] != "tmpfs"] == []
    status = Path(f"/proc/{found['State']['Pid']}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "CapBnd:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (256 * MIB, 256 * MIB, 500_000_000)
    assert (host["PidsLimit"], host["OomScoreAdj"], host["PortBindings"]) == (4096, 500, {})
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}
    assert not [bind for bind in host["Binds"] or () if "docker.sock" in bind]
    assert found["Name"] == f"/ngpu-{wanted.replica_id}"
    labels = {k: v for k, v in found["Config"]["Labels"].items() if k.startswith("ngpu.")}
    assert labels == {
        "ngpu.node": node.addr,
        "ngpu.replica": wanted.replica_id,
        "ngpu.workspace": "demo",
        "ngpu.spec": "h1",
        "ngpu.generation": "1",
        "ngpu.restarts": "0",
        "ngpu.ports": "8080,9000",
        "ngpu.digest": container.image_digest,
    }


async def test_a_customer_cannot_open_gpus_by_environment(node: Node, engine: DockerEngine, echo: str) -> None:
    wanted = node.assignment(echo, env={"NVIDIA_VISIBLE_DEVICES": "all"})
    container = await started(engine, wanted)
    about = json.loads(await get(container.addresses[8080], "/about"))
    assert about["env"]["NVIDIA_VISIBLE_DEVICES"] == "void"


@pytest.mark.parametrize(
    ("changes", "allow_root", "uid"),
    [
        ((), False, 65534),
        (("USER 0:0",), False, 65534),
        (("USER 1000:1000",), False, 1000),
        (("RUN echo app:x:1234:1::/:/bin/sh > /etc/passwd", "USER app"), False, 1234),
        (("RUN echo toor:x:0:0::/:/bin/sh > /etc/passwd", "USER toor"), False, 65534),
        (("RUN echo toor:x:0:0::/:/bin/sh > /x; ln -sf /x /etc/passwd", "USER toor"), False, 65534),
        (("USER 0",), True, 0),
    ],
)
async def test_no_container_runs_as_root_unless_the_node_allows_it(
    node: Node, changes: tuple[str, ...], allow_root: bool, uid: int
) -> None:
    image = images.variant(node.api, "user", *changes)
    engine = node.engine(allow_root=allow_root)
    container = await started(engine, node.assignment(image))
    assert json.loads(await get(container.addresses[8080], "/about"))["uid"] == uid
    assert ("containers run as root where their image says so" in (await engine.info()).limits) is allow_root


async def test_containers_reach_neither_each_other_nor_this_machine_nor_its_metadata(
    node: Node, engine: DockerEngine, echo: str
) -> None:
    if put_up(f"{node.network}0"):
        pytest.skip("needs root and iptables")
    one = await started(engine, node.assignment(echo))
    two = await started(engine, node.assignment(echo))
    ask = one.addresses[8080]
    ip = two.addresses[8080][0]
    assert await get(ask, f"/connect?host={ip}&port=8080") != "ok"
    # As the metadata address, but no other's: two runs of this test may be under way.
    metadata = f"169.254.{secrets.randbelow(250)}.{1 + secrets.randbelow(250)}"
    gateway = node.api.inspect_network(node.network)["IPAM"]["Config"][0]["Gateway"]
    subprocess.run(["ip", "address", "add", f"{metadata}/32", "dev", "lo"], check=True)
    try:
        with socket.create_server(("0.0.0.0", 0)) as server:
            port = server.getsockname()[1]
            for host in (gateway, metadata):
                # It is there for others.
                socket.create_connection((host, port), timeout=2).close()
                assert await get(ask, f"/connect?host={host}&port={port}") not in ("ok", ""), host
    finally:
        subprocess.run(["ip", "address", "del", f"{metadata}/32", "dev", "lo"], check=True)
    assert "reach" not in " ".join((await engine.info()).limits)


async def test_it_says_when_containers_are_not_walled_off(node: Node) -> None:
    # A network that is there already, made by somebody else.
    node.api.create_network(node.network, driver="bridge")
    limits = (await node.engine().info()).limits
    assert f"containers on network {node.network} reach each other" in limits
    bridge = f"br-{node.api.inspect_network(node.network)['Id'][:12]}"
    for rule in rules(bridge):
        subprocess.run(["iptables", "-w", "5", "-D", *rule], check=False, capture_output=True)


async def test_a_start_command_is_the_whole_argv(node: Node, engine: DockerEngine) -> None:
    image = images.variant(node.api, "entry", 'ENTRYPOINT ["/bin/sh", "-c"]', 'CMD ["exit 9"]')
    await engine.start(wanted := node.assignment(image, command=("/bin/ls", "/srv; exit 8")), restarts=0)
    ended = await until_ended(engine, wanted.replica_id)
    assert ended.exit
    assert ended.exit.code == 1
    assert "/srv; exit 8: No such file" in await engine.logs(wanted.replica_id, lines=5)


async def test_ports_are_published_on_loopback_where_the_bridge_is_out_of_reach(node: Node, echo: str) -> None:
    engine = node.engine(publish=True)
    container = await engine.start(node.assignment(echo, ports=(8080, 9000)), restarts=0)
    assert {host for host, _ in container.addresses.values()} == {"127.0.0.1"}
    await until_ready(container)
    assert json.loads(await get(container.addresses[9000], "/about"))["uid"] == 65534
    # Docker's proxy listens where the container does not: that must not pass for ready.
    deaf = await engine.start(node.assignment(echo, env={"ECHO_DEAF": "1"}), restarts=0)
    assert await probe(Readiness(8080), deaf.addresses[8080]) == "port 8080 closes at once"


# Lives and deaths.


@pytest.mark.parametrize(
    ("env", "path", "code", "oom"),
    [
        ({"ECHO_EXIT": "3", "ECHO_SAY": "bye"}, "", 3, False),
        ({}, "/exit?code=7", 7, False),
        ({}, "/oom", 137, True),
        ({"ECHO_EAT": "1"}, "", 137, True),
    ],
)
async def test_how_it_ended_is_known(
    node: Node, engine: DockerEngine, echo: str, env: dict[str, str], path: str, code: int, oom: bool
) -> None:
    wanted = node.assignment(echo, env=env, memory_bytes=64 * MIB)
    container = await engine.start(wanted, restarts=4)
    if path:
        await until_ready(container)
        await get(container.addresses[8080], path)
    ended = await until_ended(engine, wanted.replica_id)
    assert ended.exit
    assert (ended.exit.code, ended.exit.out_of_memory, ended.restarts) == (code, oom, 4)
    assert 0 < ended.exit.ran_s < 30
    assert ended.addresses == {}
    if oom:
        assert ended.exit.words == "ran out of memory (its limit is 0.0625 GiB)"
    if "ECHO_SAY" in env:
        assert await engine.logs(wanted.replica_id, lines=1) == "bye\n"


async def test_the_log_of_a_time_is_that_time_s_alone(node: Node, engine: DockerEngine, echo: str) -> None:
    begin = time.time()
    wanted = node.assignment(echo, env={"ECHO_EXIT": "3", "ECHO_SAY": "bye"})
    await engine.start(wanted, restarts=0)
    await until_ended(engine, wanted.replica_id)
    end = time.time() + 1
    log, why = await engine.log_of(wanted.replica_id, since=begin - 1, until=end)
    # Each line with its time.
    assert (log.endswith("Z bye\n"), why) == (True, ""), (log, why)
    for since, until in ((begin - 60, begin - 30), (end + 30, end + 60)):
        assert await engine.log_of(wanted.replica_id, since=since, until=until) == ("", "it wrote nothing in that time")
    assert await engine.log_of("r-none", since=begin, until=end) == ("", "its container is gone")


async def test_a_process_killed_for_memory_is_noticed_while_its_container_goes_on(
    node: Node, engine: DockerEngine, echo: str
) -> None:
    looks = asyncio.Event()
    watching = asyncio.create_task(engine.watch(looks.set))
    container = await started(engine, node.assignment(echo, memory_bytes=64 * MIB))
    assert await get(container.addresses[8080], "/oomchild") == "-9"
    async with asyncio.timeout(10):
        while not (await engine.containers())[0].memory_kills:
            looks.clear()
            await looks.wait()
    assert (await engine.containers())[0].exit is None
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_stop_asks_then_kills_and_can_be_given_twice(node: Node, engine: DockerEngine, echo: str) -> None:
    polite, stubborn = node.assignment(echo), node.assignment(echo, env={"ECHO_STUBBORN": "1"})
    await asyncio.gather(started(engine, polite), started(engine, stubborn))
    begin = time.monotonic()
    await engine.stop(polite.replica_id, grace_s=20)
    assert time.monotonic() - begin < 10
    await engine.stop(stubborn.replica_id, grace_s=1)
    assert await engine.containers() == []
    await engine.stop(polite.replica_id, grace_s=1)


async def test_a_start_replaces_what_was_there(node: Node, engine: DockerEngine, echo: str) -> None:
    wanted = node.assignment(echo)
    first = await engine.start(wanted, restarts=0)
    second = await engine.start(wanted, restarts=1)
    assert [c.container_id for c in await engine.containers()] == [second.container_id]
    assert first.container_id != second.container_id


async def test_only_its_own_containers_are_seen(node: Node, engine: DockerEngine, echo: str) -> None:
    await engine.start(node.assignment(echo), restarts=0)
    other = DockerEngine("0xother" + node.suffix, state_dir=node.state_dir, network=node.network)
    assert await other.containers() == []
    assert await other.logs("r-none", lines=3) == ""
    await other.close()


# Volumes.


async def test_a_volume_outlives_its_containers_and_is_nobody_elses(
    node: Node, engine: DockerEngine, echo: str
) -> None:
    image = images.variant(node.api, "volume", "VOLUME /data")
    mine = {"workspace_uid": "w-1", "mounts": (Mount("models", "/data"), Mount("hub", "/var/cache/hub"))}
    first = node.assignment(image, **mine)
    container = await started(engine, first)
    about = json.loads(await get(container.addresses[8080], "/about"))
    assert (about["uid"], about["env"]["NGPU_VOLUME_MODELS"]) == (65534, "/data")
    for path in ("/data/weights", "/var/cache/hub/x"):
        assert "ok" in await get(container.addresses[8080], f"/write?path={path}")
    assert {(one.workspace_uid, one.name, one.in_use) for one in await engine.volumes()} == {
        ("w-1", "models", True),
        ("w-1", "hub", True),
    }
    assert not await engine.remove_volume(Volume("w-1", "models")), "a container has it"
    await engine.stop(first.replica_id, grace_s=0)
    assert [one.in_use for one in await engine.volumes()] == [False, False]
    # The next replica finds it; another workspace, another node on this machine, and one without volumes do not.
    other = DockerEngine(f"{node.addr}x", state_dir=node.state_dir, network=node.network)
    theirs = [
        (engine, node.assignment(echo, **mine), "weights"),
        (engine, node.assignment(echo, **{**mine, "workspace_uid": "w-2"}), ""),
        (other, node.assignment(echo, **mine), ""),
        (engine, node.assignment(echo), ""),
    ]
    for whose, wanted, found in theirs:
        command = ("/bin/sh", "-c", "echo found: $(ls /data 2>/dev/null)")
        await whose.start(replace(wanted, command=command), restarts=0)
        await until_ended(whose, wanted.replica_id)
        assert (await whose.logs(wanted.replica_id, lines=9)).split() == ["found:", *found.split()]
    await other.stop(theirs[2][1].replica_id, grace_s=0)
    for volume in await other.volumes():
        assert await other.remove_volume(volume)
    await other.close()
    for _, wanted, _ in theirs:
        await engine.stop(wanted.replica_id, grace_s=0)
    for volume in await engine.volumes():
        assert await engine.remove_volume(volume)
        assert await engine.remove_volume(volume), "given twice"
    assert await engine.volumes() == []


# GPUs in containers.


async def test_a_container_that_may_no_longer_use_its_gpu_is_told_of(
    node: Node, engine: DockerEngine, echo: str
) -> None:
    """With a device of this machine in the place of a GPU's, taken away as a reload of systemd does."""
    devices = Path("/sys/fs/cgroup/devices/docker")
    if os.geteuid() != 0 or not devices.is_dir() or not Path("/dev/fuse").exists():
        pytest.skip("needs root, control groups of version 1, and /dev/fuse")
    pids = {}
    for name in ("nvidia0", "other0"):
        wanted = node.assignment(echo)
        device = {"PathOnHost": "/dev/fuse", "PathInContainer": f"/dev/{name}", "CgroupPermissions": "rwm"}
        made = node.api.create_container_from_config(  # type: ignore[no-untyped-call]
            {
                "Image": echo,
                "Labels": {"ngpu.node": node.addr, "ngpu.replica": wanted.replica_id},
                "HostConfig": {"Devices": [device]},
            }
        )["Id"]
        node.api.start(made)
        pids[name] = (made, wanted.replica_id)
    assert await engine.blind() == {}
    for container_id, _ in pids.values():
        (devices / container_id / "devices.deny").write_text("c 10:229 rwm")
    container_id, replica_id = pids["nvidia0"]
    assert await engine.blind() == {replica_id: "it may no longer use nvidia0"}
    # It looked from within, and has left nothing there.
    assert len((devices / container_id / "cgroup.procs").read_text().split()) == 1


async def test_processes_of_containers_are_known_by_pid(node: Node, engine: DockerEngine, echo: str) -> None:
    assert engine.owns(1) is None, "nobody knows yet what runs here"
    await engine.containers()
    container = await engine.start(node.assignment(echo), restarts=0)
    # At once: what it holds of a GPU that it shares must not be taken for a stranger's.
    pid = node.api.inspect_container(container.container_id)["State"]["Pid"]
    assert engine.owns(pid) is True
    assert engine.owns(1) is False
    assert engine.owns(2**22 + 1) is None


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"command": ("no-such-program",)}, StartFailed, "the start command is not in the image"),
        ({"command": ("/srv/echo.py",)}, StartFailed, "permission denied"),
        ({"memory_bytes": 1 * MIB}, StartFailed, "[Mm]inimum memory limit"),
        ({"cpus": 1000.0}, StartFailed, "Range of CPUs"),
        ({"writable_paths": ("relative",)}, StartFailed, "cannot be a writable path"),
        ({"image": "ngpu-test-none:1"}, ImageMissing, "no longer in Docker's cache"),
    ],
)
async def test_what_cannot_be_started_says_why_and_leaves_nothing(
    node: Node, engine: DockerEngine, echo: str, more: dict[str, Any], error: type[EngineError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await engine.start(replace(node.assignment(echo), **more), restarts=0)
    assert await engine.containers() == []


async def test_gpus_that_this_docker_cannot_give_are_said_to_be_missing(
    node: Node, engine: DockerEngine, echo: str
) -> None:
    if "nvidia" in node.api.info().get("Runtimes", {}):
        pytest.skip("this machine's Docker can give GPUs")
    with pytest.raises(GpuMissing, match="install the NVIDIA container toolkit"):
        await engine.start(node.assignment(echo, gpu_ids=("GPU-0",)), restarts=0)
    assert await engine.containers() == []


async def test_a_network_that_vanished_is_made_again(node: Node, engine: DockerEngine, echo: str) -> None:
    await engine.info()
    node.api.remove_network(node.network)
    with pytest.raises(StartFailed, match="not found"):
        await engine.start(wanted := node.assignment(echo), restarts=0)
    await started(engine, wanted)


async def test_a_cancelled_start_leaves_what_a_stop_can_find(node: Node, engine: DockerEngine, echo: str) -> None:
    wanted = node.assignment(echo)
    await engine.info()
    starting = asyncio.create_task(engine.start(wanted, restarts=0))
    await asyncio.sleep(0.05)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await engine.stop(wanted.replica_id, grace_s=0)
    await asyncio.sleep(0.3)
    assert await engine.containers() == []


# Images and registries.


@pytest.fixture
def registry_tools() -> None:
    if not shutil.which("docker-registry"):
        pytest.skip("needs Debian's docker-registry")


@pytest.fixture
def big(node: Node, registry_tools: None) -> Callable[..., str]:
    """Makes an image that is in a registry and not in the cache."""

    def make(address: str, credentials: bool = False, name: str = "private/big:1") -> str:
        local = images.variant(node.api, f"big{node.suffix}", extra_bytes=20 * MIB)
        reference = images.push(node.api, local, address, name, credentials=credentials)
        node.api.remove_image(local)
        node.images.append(reference)
        return reference

    return make


async def test_a_pull_tells_its_progress(engine: DockerEngine, big: Callable[[str], str]) -> None:
    with images.registry() as address:
        reference = big(address)
        heard: list[int] = []
        digest = await engine.pull(reference, None, heard.append)
        assert digest.startswith("sha256:")
        assert heard == sorted(heard)
        assert heard[-1] == 100
        assert len(set(heard)) > 2
    # It is in the cache now; the registry is not needed any more.
    assert await engine.pull(reference, None, heard.append) == digest
    cached = {image.reference: image.size_bytes for image in await engine.images()}
    assert cached[reference] > 20 * MIB


async def test_every_way_a_pull_fails_has_its_own_error(engine: DockerEngine, big: Callable[..., str]) -> None:
    with images.registry(credentials=True) as address:
        reference = big(address, credentials=True)
        cases: list[tuple[str, Credentials | None, type[EngineError], str]] = [
            (reference, None, CredentialsRefused, "needs credentials, and the workspace gives none"),
            (reference, WRONG, CredentialsRefused, "refuses the workspace's credentials"),
            (f"{address}/private/none:1", GOOD, ImageMissing, "there is no image"),
            (f"{address}/private/big:none", GOOD, ImageMissing, "there is no image"),
            (f"{address}/UPPER:1", None, ImageMissing, "is not the name of an image"),
            ("127.0.0.1:1/none:1", None, RegistryUnreachable, "cannot be reached"),
            ("no-such-registry.invalid/none:1", None, RegistryUnreachable, "cannot be reached"),
        ]
        for image, credentials, error, words in cases:
            with pytest.raises(error, match=words):
                await engine.pull(image, credentials, lambda _: None)
        await engine.pull(reference, GOOD, lambda _: None)


async def test_a_private_image_in_the_cache_is_not_for_everybody(
    node: Node, engine: DockerEngine, big: Callable[..., str]
) -> None:
    with images.registry(credentials=True) as address:
        reference = big(address, credentials=True)
        await engine.pull(reference, GOOD, lambda _: None)
        # Also after a restart of the daemon, and by another name.
        again = node.engine()
        node.api.tag(reference, f"{address}/alias", "1")
        for image in (reference, f"{address}/alias:1"):
            with pytest.raises(EngineError):
                await again.pull(image, None, lambda _: None)
            with pytest.raises(EngineError):
                await again.pull(image, WRONG, lambda _: None)
        node.api.remove_image(f"{address}/alias:1")
    # Who has opened it needs no registry.
    await again.pull(reference, GOOD, lambda _: None)
    kept = node.state_dir / "private-images.json"
    assert images.PASSWORD not in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600


async def test_only_images_that_it_pulled_itself_are_its_to_remove(
    node: Node, engine: DockerEngine, big: Callable[..., str]
) -> None:
    with images.registry() as address:
        pulled, there_before, failed = big(address), big(address, name="other/big:1"), f"{address}/none:1"
        node.api.pull(there_before)
        for image in (pulled, there_before):
            await engine.pull(image, None, lambda _: None)
        with pytest.raises(ImageMissing):
            await engine.pull(failed, None, lambda _: None)
    assert engine.pulled.oldest() == [pulled]
    # A daemon that comes back knows it still.
    assert node.engine().pulled.oldest() == [pulled]
    assert await engine.has_image(pulled)
    container = node.api.create_container(pulled, "/none")["Id"]
    assert not await engine.remove_image(pulled), "somebody has a container of it"
    node.api.remove_container(container)
    assert await engine.remove_image(pulled)
    assert await engine.remove_image(pulled), "given twice"
    assert not await engine.has_image(pulled)


async def test_a_local_image_that_came_from_no_registry_is_taken_as_it_is(engine: DockerEngine, echo: str) -> None:
    assert (await engine.pull(echo, None, lambda _: None)).startswith("sha256:")
    assert (await engine.pull(echo, WRONG, lambda _: None)).startswith("sha256:")


class Silent:
    """A registry that accepts and never answers."""

    def __enter__(self) -> str:
        self._server = socket.create_server(("127.0.0.1", 0))
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.close()


async def test_a_pull_can_be_cancelled_at_once(engine: DockerEngine) -> None:
    with Silent() as address:
        pulling = asyncio.create_task(engine.pull(f"{address}/x:1", None, lambda _: None))
        await asyncio.sleep(0.3)
        begin = time.monotonic()
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert time.monotonic() - begin < 1


async def test_a_pull_of_which_nothing_is_heard_is_given_up(
    engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodedaemon.engine.docker.PULL_SILENCE_S", 0.5)
    with Silent() as address, pytest.raises(PullFailed, match="nothing was heard of the pull"):
        await engine.pull(f"{address}/x:1", None, lambda _: None)


# Replicas on Docker.


class Daemon:
    """Replicas at work on an engine."""

    def __init__(self, engine: DockerEngine) -> None:
        self.replicas = Replicas(engine, stop_grace_s=2)
        self.task = asyncio.create_task(self.replicas.run())

    async def until(self, true: Callable[[dict[str, ReplicaReport]], bool]) -> dict[str, ReplicaReport]:
        seen = -1
        async with asyncio.timeout(60):
            while True:
                reports = {r.replica_id: r for r in self.replicas.reports()}
                if true(reports):
                    return reports
                seen = await self.replicas.changed(seen)

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def all_in(state: State, count: int = 1) -> Callable[[dict[str, ReplicaReport]], bool]:
    return lambda reports: len(reports) == count and all(r.state is state for r in reports.values())


async def test_replicas_from_registry_to_ready_through_crash_and_restart_of_the_daemon(
    node: Node, big: Callable[..., str]
) -> None:
    with images.registry(credentials=True) as address:
        reference = big(address, credentials=True)
        one, two = (node.assignment(reference, registry=GOOD, readiness=Readiness(8080, "/about")) for _ in "12")
        daemon = Daemon(node.engine())
        progress: list[int] = []

        def ready(reports: dict[str, ReplicaReport]) -> bool:
            if report := reports.get(one.replica_id):
                progress.append(report.progress)
            return all_in(State.READY, 2)(reports)

        daemon.replicas.apply([one, two])
        await daemon.until(ready)
        assert progress == sorted(progress)
        assert progress[-1] == 100
    at = daemon.replicas.address(one.replica_id, 8080)
    assert at
    # The end of a container is known soon after its connection breaks.
    since = time.monotonic()
    await get(at, "/exit?code=5")
    known = await daemon.replicas.exited(one.replica_id, since=since, within_s=5)
    assert known
    assert known.code == 5
    reports = await daemon.until(lambda r: "its last lines" in r[one.replica_id].message)
    assert "the container exited with code 5" in reports[one.replica_id].message
    assert "GET /exit?code=5" in reports[one.replica_id].message
    reports = await daemon.until(all_in(State.READY, 2))
    assert (reports[one.replica_id].restarts, reports[two.replica_id].restarts) == (1, 0)
    # The daemon is killed and comes back: what runs is adopted, as it is.
    await daemon.end()
    before = json.loads(await get(at := daemon.replicas.address(two.replica_id, 8080) or at, "/about"))["start"]
    daemon = Daemon(node.engine())
    await daemon.replicas.listed()
    assert {r.state for r in daemon.replicas.reports()} == {State.STARTING}
    # One is no longer wanted.
    daemon.replicas.apply([two])
    reports = await daemon.until(all_in(State.READY))
    assert daemon.replicas.address(two.replica_id, 8080) == at
    assert json.loads(await get(at, "/about"))["start"] == before
    daemon.replicas.apply([])
    await daemon.until(lambda reports: not reports)
    assert node.api.containers(all=True, filters={"label": f"ngpu.node={node.addr}"}) == []
    await daemon.end()


async def test_each_trouble_is_one_replicas_and_has_its_own_words(node: Node, echo: str) -> None:
    good = node.assignment(echo)
    troubles = {
        "there is no image": node.assignment("127.0.0.1:1/x:1", spec_hash="a"),
        "the container exited with code 3": node.assignment(echo, env={"ECHO_EXIT": "3"}),
        "the container ran out of memory (its limit is 0.0625 GiB)": node.assignment(
            echo, env={"ECHO_EAT": "1"}, memory_bytes=64 * MIB
        ),
        "port 8080 never opened within 1 s": node.assignment(
            echo, env={"ECHO_DEAF": "1"}, readiness=Readiness(8080, "", 1)
        ),
        "GET /status?code=503 on port 8080 was never answered below 500": node.assignment(
            echo, readiness=Readiness(8080, "/status?code=503", 1)
        ),
        "the start command is not in the image": node.assignment(echo, command=("nothing",)),
        "install the NVIDIA container toolkit": node.assignment(echo, gpu_ids=("GPU-0",)),
    }
    troubles["the registry of 127.0.0.1:1/x:1 cannot be reached"] = troubles.pop("there is no image")
    heard: dict[str, set[str]] = {a.replica_id: set() for a in troubles.values()}

    def all_heard(reports: dict[str, ReplicaReport]) -> bool:
        for replica_id, report in reports.items():
            if report.state is State.BACKOFF:
                heard.setdefault(replica_id, set()).add(report.message)
        told = all(any(words in m for m in heard[a.replica_id]) for words, a in troubles.items())
        return told and reports[good.replica_id].state is State.READY

    daemon = Daemon(node.engine())
    daemon.replicas.apply([good, *troubles.values()])
    await daemon.until(all_heard)
    assert good.replica_id not in heard
    daemon.replicas.apply([])
    await daemon.until(lambda reports: not reports)
    await daemon.end()


async def test_no_docker_is_said_in_words_that_help(node: Node, tmp_path: Path) -> None:
    engine = node.engine(url=f"unix://{tmp_path}/none.sock")
    with pytest.raises(EngineDown, match=r"there is no Docker at .* use --engine process"):
        await engine.info()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/dead.sock")
    engine = node.engine(url=f"unix://{tmp_path}/dead.sock")
    with pytest.raises(EngineDown, match="is not running: start it"):
        await engine.containers()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Sockets have room for a hundred characters only."""
    with tempfile.TemporaryDirectory(prefix="ngpu-") as directory:
        yield Path(directory)


# The SDK leaves the socket of a connection that is refused to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_an_engine_that_dies_is_waited_for(node: Node, echo: str, short_path: Path) -> None:
    with private_docker(short_path) as own:
        own.load(echo)
        daemon = Daemon(node.engine(url=own.url, publish=False))
        one, two = node.assignment(echo), node.assignment(echo)
        daemon.replicas.apply([one])
        await daemon.until(all_in(State.READY))
        at = daemon.replicas.address(one.replica_id, 8080)
        assert at
        own.kill()
        reports = await daemon.until(lambda r: "not running" in r[one.replica_id].message)
        # Its container goes on. But when the engine is back the address may be another's: nothing new is sent there.
        assert json.loads(await get(at, "/about"))
        assert (reports[one.replica_id].state, reports[one.replica_id].capacity) == (State.BACKOFF, 0)
        assert daemon.replicas.address(one.replica_id, 8080) is None
        daemon.replicas.apply([one, two])
        await daemon.until(lambda r: "not running" in r[two.replica_id].message)
        await asyncio.to_thread(own.start)
        reports = await daemon.until(lambda r: all_in(State.READY, 2)(r) and "not running" not in str(r))
        # This engine ends containers when it starts; that is its doing and said so.
        assert reports[one.replica_id].restarts == 1
        daemon.replicas.apply([])
        await daemon.until(lambda reports: not reports)
        await daemon.end()


async def test_a_full_disk_is_said_and_recovered_from(
    node: Node, tmp_path: Path, short_path: Path, big: Callable[..., str]
) -> None:
    with private_docker(short_path, disk_bytes=128 * MIB) as own:
        data = tmp_path / "registry"
        with images.registry(data=data) as address:
            big(address)
        filler = own.data / "filler"
        filler.write_bytes(b"\0" * (shutil.disk_usage(own.data).free - 24 * MIB))
        with images.registry(data=data, spawn=(own.run_inside, own.ip)) as address:
            daemon = Daemon(node.engine(url=own.url, publish=False))
            wanted = node.assignment(f"{address}/private/big:1")
            daemon.replicas.apply([wanted])
            reports = await daemon.until(all_in(State.BACKOFF))
            assert "the disk where Docker keeps its images is full" in reports[wanted.replica_id].message
            with pytest.raises(DiskFull):
                await node.engines[-1].pull(wanted.image, None, lambda _: None)
            filler.unlink()
            await daemon.until(all_in(State.READY))
            await daemon.end()
