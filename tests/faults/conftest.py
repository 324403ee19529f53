"""The rigs of the quick form. They suffer side by side, each in a thread; a test waits for its own fault's outcome."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from scripts.fault_suite.postgres import Postgres, why_no_postgres
from scripts.fault_suite.rig import Docker, Rig
from scripts.fault_suite.run import Run, Skipped, running
from tests.images import echo_image, why_no_images
from tests.private_docker import PrivateDocker

#: Calls a second in each rig: there are several at once.
RATE = 8.0


@contextmanager
def sqlite_rig(directory: Path) -> Iterator[Rig]:
    with Rig(directory, rate=RATE) as rig:
        yield rig


@contextmanager
def postgres_rig(directory: Path) -> Iterator[Rig]:
    if why := why_no_postgres():
        raise Skipped(why)
    with Postgres() as postgres, Rig(directory, postgres=postgres, nodes=2, rate=RATE, standby=True) as rig:
        yield rig


@contextmanager
def docker_rig(directory: Path) -> Iterator[Rig]:
    if why := why_no_images():
        raise Skipped(why)
    # Sockets lie in it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ngf", ignore_cleanup_errors=True) as short:
        try:
            with closing(docker.from_env(timeout=60)) as client:
                image = echo_image(client.api)
            own = PrivateDocker(Path(short))
        except (docker.errors.DockerException, pytest.skip.Exception) as why_not:
            raise Skipped(str(why_not)) from None
        with closing_engine(own), closing(docker.DockerClient(own.url)) as client:
            own.load(image)
            engine = Docker(own.url, client, image, own.prefix, own.host_ip, kill=own.kill, start=own.start)
            with Rig(directory, docker=engine, nodes=2, small_disks=False, rate=RATE) as rig:
                yield rig


@contextmanager
def closing_engine(own: PrivateDocker) -> Iterator[None]:
    try:
        own.start()
        yield
    finally:
        own.close()


#: By name. Two are alike and have other faults to suffer.
RIGS: dict[str, Callable[[Path], AbstractContextManager[Rig]]] = {
    "nodes": sqlite_rig,
    "controlplane": sqlite_rig,
    "postgres": postgres_rig,
    "docker": docker_rig,
}


@pytest.fixture(scope="session", autouse=True)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Of each rig that a selected test asks for, with the selected faults."""
    chosen: dict[str, list[str]] = {}
    for item in request.session.items:
        params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        if "rig" in params:
            faults = chosen.setdefault(params["rig"], [])
            faults += [params["fault"]] if "fault" in params else []
    made = {
        name: Run(lambda name=name: RIGS[name](tmp_path_factory.mktemp(name) / "state"), faults)  # type: ignore[misc]
        for name, faults in chosen.items()
    }
    with running(list(made.values())):
        yield made
