"""Docker as our engine. The only file that imports docker.

The SDK blocks, so every call runs in a thread of a bounded pool; nothing is remembered here but what speeds up a
call. A Podman socket speaks the same and may work; it is not tested.
"""

import asyncio
import collections
import contextlib
import io
import itertools
import math
import os
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar

import docker
import docker.errors
import docker.types
import docker.utils

from nodedaemon.engine import (
    LOG_WINDOW_BYTES,
    Assignment,
    CachedImage,
    Container,
    Credentials,
    DiskFull,
    EngineDown,
    EngineError,
    EngineInfo,
    ImageMissing,
    PullFailed,
    Volume,
)
from nodedaemon.engine import volumes as docker_volumes
from nodedaemon.engine.container import (
    DIGEST,
    NOBODY,
    REPLICA,
    RESTARTS,
    config,
    digest,
    is_name,
    is_named_root,
    is_root,
    read,
)
from nodedaemon.engine.devices import devices_refused
from nodedaemon.engine.docker_words import PullProgress, pull_error, start_error
from nodedaemon.engine.network import Network, prepare
from nodedaemon.engine.private_images import PrivateImages
from nodedaemon.engine.volumes import NODE
from nodedaemon.last_use import LastUse

T = TypeVar("T")

#: An answer takes no longer, streams and stops aside.
CALL_S: Final = 60
#: A pull of which Docker says nothing for that long is given up.
PULL_SILENCE_S: Final = 300.0
QUICK_THREADS, SLOW_THREADS = 8, 16
LOG_ANSWER_BYTES: Final = 16 * 1024
#: What `log_of` looks through at most.
LOG_WINDOW_LINES: Final = 2000
IMAGES_TOLD: Final = 500
#: Of an image's /etc/passwd, each of at most 2 MiB.
PASSWD_PIECES: Final = 2

ISOLATION: Final = (
    "Docker containers: they share this machine's kernel and driver; each has a read-only file system of its own, its "
    "own processes, limits of cpu, memory and processes, and a network without ways to other containers; no "
    "capabilities, no gain of privileges."
)


LIMITS: Final = (
    "images that this daemon did not pull itself are open to every workspace",
    "volumes are measured once a minute: in between they may outgrow what is allowed",
    "replicas with shares of one GPU are not kept from each other's memory on it",
)


class DockerEngine:
    """Containers of one node (`node_addr`) on one Docker engine; see Engine.

    Made without contact: an engine that is down is EngineDown at each call. `url` as in DOCKER_HOST; None: as the
    environment says. `allow_root`: containers may run as root if their image says so; otherwise such an image runs
    as user 65534. `publish`: reach containers through ports published on 127.0.0.1; None: only where the bridge is
    not reachable. `state_dir` keeps which cached images were pulled here, when they were used last, and with whose
    credentials.
    """

    def __init__(
        self,
        node_addr: str,
        *,
        state_dir: Path,
        url: str | None = None,
        network: str = "ngpu",
        allow_root: bool = False,
        publish: bool | None = None,
    ) -> None:
        self._node = node_addr
        self._url = url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        self._network_name = network
        self._allow_root = allow_root
        self._publish = publish
        self._private = PrivateImages(state_dir / "private-images.json")
        self.pulled = LastUse(state_dir / "pulled-images.json")
        self._quick = ThreadPoolExecutor(QUICK_THREADS, "docker")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, "docker-slow")
        self._events = ThreadPoolExecutor(1, "docker-events")
        self._lock = threading.Lock()
        self._client: docker.APIClient | None = None
        self._network_lock = threading.Lock()
        #: None: not looked at, or Docker has been away since.
        self._network: Network | None = None
        #: Of our containers; None: not known yet.
        self._ids: frozenset[str] | None = None
        #: By container id, of those still there.
        self._memory_kills: collections.Counter[str] = collections.Counter()

    # The protocol.

    async def info(self) -> EngineInfo:
        """As Engine."""

        def ask(api: docker.APIClient) -> EngineInfo:
            network = self._prepare(api)
            info = api.info()
            root = Path(info.get("DockerRootDir") or "/")
            limits = [*network.open, *LIMITS]
            if self._allow_root:
                limits.append("containers run as root where their image says so")
            return EngineInfo(
                "docker",
                version=info.get("ServerVersion", ""),
                disk_free_bytes=shutil.disk_usage(root if root.exists() else "/").free,
                isolation=ISOLATION,
                limits=tuple(limits),
            )

        return await self._call(ask)

    async def pull(self, image: str, credentials: Credentials | None, progress: Callable[[int], None]) -> str:
        """As Engine. A tag that is in the cache is used as it is: a new version needs a new tag, or a digest.

        An image that was opened with credentials is in the cache only for those who have them too; others must open
        it themselves.
        """
        cached = await self._call(lambda api: _inspect_image(api, image))
        if cached and self._private.open_to(credentials, image, cached["Id"]):
            progress(100)
            return digest(cached)
        if credentials:
            # Before the pull: a daemon that dies in its midst leaves no private image open to all.
            await asyncio.to_thread(self._private.opened, credentials, image)
        if not cached:
            # Before it, too: or what a daemon that dies has pulled would stay for ever.
            try:
                await asyncio.to_thread(self.pulled.touch, [image])
            except OSError as error:
                raise DiskFull(f"the node's state directory cannot be written: {error.strerror}") from error
        try:
            pulled = await self._pull(image, credentials, progress)
        except EngineError:
            await asyncio.to_thread(self._private.refused, credentials, image)
            if not cached:
                await asyncio.to_thread(self.pulled.forget, [image])
            raise
        await asyncio.to_thread(self._private.opened, credentials, image, pulled["Id"])
        progress(100)
        return digest(pulled)

    async def start(self, assignment: Assignment, *, restarts: int) -> Container:
        """As Engine."""

        def start(api: docker.APIClient) -> Container:
            reachable = self._prepare(api).reachable
            publish = not reachable if self._publish is None else self._publish
            try:
                container_id = self._create(api, assignment, restarts, publish=publish)
                # Before it can hold memory of a GPU that another replica is about to share.
                if self._ids is not None:
                    self._ids |= {container_id}
                api.start(container_id)
                return self._inspect(api, container_id)
            except docker.errors.APIError as error:
                # The network may be what is missing.
                self._network = None
                with contextlib.suppress(docker.errors.APIError):
                    self._remove(api, assignment.replica_id)
                raise start_error(_said(error), memory_bytes=assignment.memory_bytes) from error

        return await self._call(start)

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """As Engine."""

        def stop(api: docker.APIClient) -> None:
            for container_id in self._find(api, replica_id):
                with contextlib.suppress(docker.errors.NotFound):
                    api.stop(container_id, timeout=math.ceil(grace_s))
            self._remove(api, replica_id)

        await self._call(stop, self._slow)

    async def containers(self) -> list[Container]:
        """As Engine."""

        def ask(api: docker.APIClient) -> list[Container]:
            containers = []
            for container_id in self._find(api):
                with contextlib.suppress(docker.errors.NotFound):
                    containers.append(self._inspect(api, container_id))
            self._ids = frozenset(c.container_id for c in containers)
            for gone in set(self._memory_kills).difference(self._ids):
                del self._memory_kills[gone]
            return containers

        return await self._call(ask)

    async def watch(self, look: Callable[[], None]) -> None:
        """As Engine."""
        loop = asyncio.get_running_loop()
        filters = {"type": "container", "label": f"{NODE}={self._node}", "event": ["start", "die", "oom", "destroy"]}
        # Docker answers before it listens: what happens in between comes with `since`.
        since = int(time.time()) - 1

        stream = _Stream(self._url)

        def pump(_: docker.APIClient) -> None:
            with stream.of(lambda api: api.events(decode=True, since=since, filters=filters)) as events:
                loop.call_soon_threadsafe(look)
                for event in events:
                    if event.get("Action") == "oom":
                        self._memory_kills[event["Actor"]["ID"]] += 1
                    loop.call_soon_threadsafe(look)

        try:
            await asyncio.shield(loop.run_in_executor(self._events, self._guarded, pump))
        finally:
            stream.stop()
        raise EngineDown(f"Docker at {self._url} has closed its stream of events")

    async def logs(self, replica_id: str, *, lines: int) -> str:
        """As Engine."""

        def ask(api: docker.APIClient) -> bytes:
            with contextlib.suppress(docker.errors.NotFound):
                for container_id in self._find(api, replica_id):
                    return bytes(api.logs(container_id, tail=lines))
            return b""

        return (await self._call(ask))[-LOG_ANSWER_BYTES:].decode(errors="replace")

    async def log_of(self, replica_id: str, *, since: float, until: float) -> tuple[str, str]:
        """As Engine."""

        def ask(api: docker.APIClient) -> tuple[bytes, str]:
            with contextlib.suppress(docker.errors.NotFound):
                for container_id in self._find(api, replica_id):
                    kept = b""
                    # Piece by piece: there may be much of it, and only the end is wanted.
                    for piece in api.logs(
                        container_id, since=since, until=until, tail=LOG_WINDOW_LINES, timestamps=True, stream=True
                    ):
                        kept = (kept + piece)[-LOG_WINDOW_BYTES:]
                    return kept, "" if kept else "it wrote nothing in that time"
            return b"", "its container is gone"

        log, why = await self._call(ask)
        return log.decode(errors="replace"), why

    async def images(self) -> list[CachedImage]:
        """As Engine."""
        found = await self._call(lambda api: api.images())
        cached = [CachedImage(tag, i["Size"]) for i in found for tag in i["RepoTags"] or () if tag != "<none>:<none>"]
        return sorted(cached, key=lambda image: (-image.size_bytes, image.reference))[:IMAGES_TOLD]

    async def has_image(self, reference: str) -> bool:
        """As Storage."""
        return await self._call(lambda api: _inspect_image(api, reference)) is not None

    async def remove_image(self, reference: str) -> bool:
        """As Storage. Never by force: Docker refuses it for an image that a container has, running or not."""
        return await self._call(lambda api: _removed(lambda: api.remove_image(reference)), self._slow)

    async def volumes(self) -> list[Volume]:
        """As Storage."""
        return await self._call(lambda api: docker_volumes.listed(api, self._node), self._slow)

    async def remove_volume(self, volume: Volume) -> bool:
        """As Storage."""
        return await self._call(
            lambda api: _removed(lambda: docker_volumes.remove(api, self._node, volume)), self._slow
        )

    async def blind(self) -> dict[str, str]:
        """Replicas whose container has lost sight of GPUs that it was given, and how that shows.

        As far as it can be told: see devices.py. Raises EngineError.
        """

        def ask(api: docker.APIClient) -> dict[str, str]:
            running = {}
            for container_id in self._find(api):
                with contextlib.suppress(docker.errors.NotFound):
                    found = api.inspect_container(container_id)
                    if pid := found["State"]["Pid"]:
                        running[str(pid)] = found["Config"]["Labels"][REPLICA]
            return running

        running = await self._call(ask)
        return {running[pid]: words for pid, words in (await devices_refused(list(running))).items() if pid in running}

    def owns(self, pid: int) -> bool | None:
        """As Engine: a container's id is in the control groups of its processes."""
        if self._ids is None:
            return None
        try:
            groups = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            return None
        return any(container_id in groups for container_id in self._ids)

    async def close(self) -> None:
        """As Engine."""
        for pool in (self._quick, self._slow, self._events):
            pool.shutdown(wait=False, cancel_futures=True)
        self._forget()

    # Threads.

    async def _call(self, ask: Callable[[docker.APIClient], T], pool: Executor | None = None) -> T:
        future = asyncio.get_running_loop().run_in_executor(pool or self._quick, self._guarded, ask)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # A thread cannot be stopped. Who is cancelled waits for it, or a container might be made after its
            # replica was stopped.
            await asyncio.wait({future})
            raise

    def _guarded(self, ask: Callable[[docker.APIClient], T]) -> T:
        try:
            return ask(self._api())
        except EngineError:
            raise
        except docker.errors.APIError as error:
            raise EngineError(f"Docker refuses: {_said(error)}") from error
        except Exception as error:
            # The SDK lets errors of its HTTP library through, which is no dependency of ours to import.
            ours = not isinstance(error, OSError | docker.errors.DockerException)
            if ours and not type(error).__module__.startswith("urllib3"):
                raise
            # The next call negotiates anew: it may be another version that comes back.
            self._forget()
            raise EngineDown(f"Docker at {self._url} does not answer: {str(error)[:200]}") from error

    def _api(self) -> docker.APIClient:
        with self._lock:
            if self._client is None:
                self._knock()
                threads = QUICK_THREADS + SLOW_THREADS + 1
                self._client = docker.APIClient(self._url, version="auto", timeout=CALL_S, max_pool_size=threads)
            return self._client

    def _forget(self) -> None:
        with self._lock:
            client, self._client, self._network = self._client, None, None
        if client:
            client.close()

    def _knock(self) -> None:
        """The SDK's errors do not tell these apart, and it leaves the socket open."""
        path = self._url.removeprefix("unix://")
        if path == self._url:
            return
        try:
            with socket.socket(socket.AF_UNIX) as door:
                door.settimeout(CALL_S)
                door.connect(path)
        except PermissionError as error:
            words = f"no right to use Docker at {self._url}: run the daemon as root or in group docker"
            raise EngineDown(words) from error
        except FileNotFoundError as error:
            words = f"there is no Docker at {self._url}: install it, start it, or use --engine process"
            raise EngineDown(words) from error
        except OSError as error:
            raise EngineDown(f"Docker at {self._url} is not running: start it ({error.strerror})") from error

    # Pull.

    async def _pull(
        self, image: str, credentials: Credentials | None, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        heard = loop.time()
        stream = _Stream(self._url)

        def hear(percent: int) -> None:
            nonlocal heard
            heard = loop.time()
            progress(percent)

        def pull(main: docker.APIClient) -> dict[str, Any]:
            told = PullProgress()
            repository, tag = docker.utils.parse_repository_tag(image)
            # Never the machine's own login (an empty mapping says so): it is the operator's.
            auth = {"username": credentials.username, "password": credentials.password} if credentials else {}

            def ask(api: docker.APIClient) -> Iterator[dict[str, Any]]:
                events: Iterator[dict[str, Any]] = api.pull(
                    repository, tag or "latest", stream=True, decode=True, auth_config=auth
                )
                return events

            try:
                with stream.of(ask) as events:
                    for event in events:
                        if "error" in event:
                            raise pull_error(event["error"], image, credentials=bool(credentials))
                        loop.call_soon_threadsafe(hear, told.feed(event))
            except docker.errors.APIError as error:
                raise pull_error(_said(error), image, credentials=bool(credentials)) from error
            except docker.errors.InvalidRepository as error:
                raise ImageMissing(f"{image} is not the name of an image: {error}") from error
            found = _inspect_image(main, image)
            if found is None:
                raise PullFailed(f"the pull of {image} broke off")
            return found

        future = loop.run_in_executor(self._slow, self._guarded, pull)
        try:
            while not future.done():
                silence_s = loop.time() - heard
                if silence_s >= PULL_SILENCE_S:
                    raise PullFailed(f"nothing was heard of the pull of {image} for {PULL_SILENCE_S:.0f} s")
                await asyncio.wait({future}, timeout=PULL_SILENCE_S - silence_s)
            return future.result()
        finally:
            if not future.done():
                # Docker stops a pull when nobody listens.
                future.add_done_callback(lambda done: done.exception())
                stream.stop()

    # Containers.

    def _create(self, api: docker.APIClient, assignment: Assignment, restarts: int, *, publish: bool) -> str:
        image = _inspect_image(api, assignment.image)
        if image is None:
            raise ImageMissing(f"{assignment.image} is no longer in Docker's cache")
        docker_volumes.prepare(api, self._node, assignment)
        labels = {NODE: self._node, RESTARTS: str(restarts), DIGEST: digest(image)}
        said = image["Config"].get("User") or ""

        def create(user: str) -> str:
            self._remove(api, assignment.replica_id)
            made = api.create_container_from_config(  # type: ignore[no-untyped-call]
                config(
                    assignment, image["Config"], labels=labels, network=self._network_name, publish=publish, user=user
                ),
                f"ngpu-{assignment.replica_id}",
            )
            container_id: str = made["Id"]
            return container_id

        if not self._allow_root and is_root(said):
            return create(NOBODY)
        container_id = create("")
        if not self._allow_root and is_name(said) and is_named_root(said, self._passwd(container_id)):
            return create(NOBODY)
        return container_id

    def _passwd(self, container_id: str) -> str | None:
        """None if it is no plain file of sensible size: what it says is then unknown."""
        try:
            with _Stream(self._url).of(lambda api: api.get_archive(container_id, "/etc/passwd")[0]) as pieces:
                archive = io.BytesIO(b"".join(itertools.islice(pieces, PASSWD_PIECES)))
            with tarfile.open(fileobj=archive) as tar:
                file = tar.extractfile("passwd")
                return file.read().decode(errors="replace") if file else None
        except (docker.errors.NotFound, tarfile.TarError, KeyError):
            return None

    def _find(self, api: docker.APIClient, replica_id: str = "") -> list[str]:
        labels = [f"{NODE}={self._node}", f"{REPLICA}={replica_id}" if replica_id else REPLICA]
        return [c["Id"] for c in api.containers(all=True, filters={"label": labels})]

    def _remove(self, api: docker.APIClient, replica_id: str) -> None:
        for container_id in self._find(api, replica_id):
            with contextlib.suppress(docker.errors.NotFound):
                api.remove_container(container_id, force=True, v=True)

    def _inspect(self, api: docker.APIClient, container_id: str) -> Container:
        found = api.inspect_container(container_id)
        return read(found, network=self._network_name, memory_kills=self._memory_kills[container_id])

    def _prepare(self, api: docker.APIClient) -> Network:
        """See to the network, once per contact with Docker."""
        with self._network_lock:
            network = self._network = self._network or prepare(api, self._network_name)
            return network


class _Stream:
    """A long answer of Docker, on a connection of its own, that another thread can stop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._answer: Any = None
        self._over = False

    @contextlib.contextmanager
    def of(self, ask: Callable[[docker.APIClient], Iterator[Any]]) -> Iterator[Iterator[Any]]:
        """The pieces of the answer to that; none when it is stopped."""
        with contextlib.closing(docker.APIClient(self._url, version="auto", timeout=CALL_S)) as api:
            # The SDK keeps the answer to itself, but a hook sees it.
            answers: list[Any] = []
            api.hooks["response"].append(lambda answer, **_: answers.append(answer))
            pieces = iter(ask(api))
            with contextlib.closing(answers[-1]) as self._answer:
                yield iter(()) if self._over else pieces

    def stop(self) -> None:
        """From another thread."""
        self._over = True
        with contextlib.suppress(OSError, AttributeError, docker.errors.DockerException):
            docker.types.CancellableStream(iter(()), self._answer).close()


def _removed(remove: Callable[[], object]) -> bool:
    """False: it is in use."""
    try:
        remove()
    except docker.errors.NotFound:
        pass
    except docker.errors.APIError as error:
        if error.status_code != HTTPStatus.CONFLICT:
            raise
        return False
    return True


def _said(error: docker.errors.APIError) -> str:
    said = error.explanation
    return (said.decode(errors="replace") if isinstance(said, bytes) else str(said or error))[:2000]


def _inspect_image(api: docker.APIClient, image: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = api.inspect_image(image)  # type: ignore[no-untyped-call]
    except (docker.errors.NotFound, docker.errors.NullResource):
        return None
    except docker.errors.APIError as error:
        if "invalid reference" in _said(error):
            return None
        raise
    return found
