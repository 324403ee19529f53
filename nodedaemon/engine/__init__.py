"""What we ask of whatever runs containers: plain values in, plain values out, one class per thing that can go wrong.

`docker.py` means it; `process.py` does as much of it as plain processes can. Everything here is level-triggered:
`containers()` says all that is, `watch` only says when to look again, so a lost event loses nothing.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from nodedaemon.errors import NodeError
from nodedaemon.last_use import LastUse

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB

#: Of what `Engine.log_of` gives.
LOG_WINDOW_BYTES: Final = 128 * 1024

#: (host, port) under which a port of a container is reached from this machine.
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to pull a private image."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Readiness:
    """When a replica is ready: `GET path` on `port` answers below 500; without a path, `port` accepts a connection."""

    port: int
    path: str = ""
    start_limit_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume of the workspace (`name`), and where the container finds it."""

    name: str
    path: str

    @property
    def variable(self) -> str:
        """In which variable the container is told where."""
        return f"NGPU_VOLUME_{self.name.upper().replace('-', '_')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One replica that should run here, every default resolved. Sizes in bytes.

    `workspace_uid` tells the workspace from another one of the same name. `gpu_share`: thousandths of its one GPU; 0:
    all of its GPUs.

    `spec_hash` is of everything that makes the container what it is: same hash, same container. `draining` is not
    part of it.
    """

    replica_id: str
    workspace: str
    generation: int = 1
    spec_hash: str
    image: str
    ports: tuple[int, ...]
    readiness: Readiness
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    concurrency: int = 1
    cpus: float = 1.0
    memory_bytes: int = 4 * GIB
    shm_bytes: int = 64 * MIB
    writable_paths: tuple[str, ...] = ()
    workspace_uid: str = ""
    mounts: tuple[Mount, ...] = ()
    gpu_ids: tuple[str, ...] = ()
    gpu_share: int = 0
    registry: Credentials | None = None
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume kept here. `size_bytes`: None if it cannot be told now. `in_use`: a container has it."""

    workspace_uid: str
    name: str
    size_bytes: int | None = None
    in_use: bool = False


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended. `code` as a shell has it: 128 + n for signal n; None: it was removed, nobody knows.

    `memory_bytes` is its limit (0: none). `at`: the daemon's monotonic clock when it learnt of it. `why`: this daemon
    ended it, for that reason; `customers`: one of the customer's making.
    """

    replica_id: str
    code: int | None
    out_of_memory: bool = False
    ran_s: float = 0.0
    memory_bytes: int = 0
    engine_was_down: bool = False
    at: float = 0.0
    why: str = ""
    customers: bool = False

    @property
    def from_outside(self) -> bool:
        """Was it ended by somebody else than itself: the engine, the machine's operator?

        Then it is no fault of the customer's.
        """
        if self.why:
            return not self.customers
        if self.engine_was_down or self.code is None:
            return True
        return not self.out_of_memory and self.code in (128 + signal.SIGKILL, 128 + signal.SIGTERM)

    @property
    def words(self) -> str:
        """What happened, to go on from "the container"."""
        if self.why:
            return f"was ended by this daemon: {self.why}"
        if self.engine_was_down:
            return f"ended while the engine was down (code {self.code})"
        if self.out_of_memory:
            return f"ran out of memory (its limit is {self.memory_bytes / GIB:.3g} GiB)"
        if self.code is None:
            return "was removed by somebody else than this daemon"
        if self.code - 128 not in set(signal.Signals):
            return f"exited with code {self.code}"
        return f"was ended by {signal.Signals(self.code - 128).name}" + (" from outside" if self.from_outside else "")


@dataclass(frozen=True, slots=True)
class Container:
    """One container of this node, running or ended.

    `addresses` has each declared port while it runs. `restarts` is what its start was given, kept with the container
    so that it survives the daemon. `started` is false for one that was made and never ran. `memory_kills`: how
    often, as far as this daemon saw, the kernel killed one of its processes for lack of memory while it went on.
    """

    replica_id: str
    container_id: str
    spec_hash: str
    image_digest: str = ""
    restarts: int = 0
    addresses: Mapping[int, Address] = field(default_factory=dict)
    started: bool = True
    exit: Exit | None = None
    memory_kills: int = 0


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image that need not be pulled."""

    reference: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What runs containers here.

    `isolation` says in words what it keeps apart, `limits` what it does not, one sentence each.
    """

    name: str
    version: str = ""
    disk_free_bytes: int = 0
    isolation: str = ""
    limits: tuple[str, ...] = ()


class EngineError(NodeError):
    """The engine could not do that."""


class EngineDown(EngineError):
    """The engine does not answer."""


class ImageMissing(EngineError):
    """There is no such image, or it may not be pulled without credentials."""


class CredentialsRefused(EngineError):
    """The registry refuses these credentials."""


class RegistryUnreachable(EngineError):
    """The registry does not answer."""


class DiskFull(EngineError):
    """The disk where images and containers are kept is full."""


class GpuMissing(EngineError):
    """There is no such GPU, or the engine cannot give it to a container."""


class OutOfMemory(EngineError):
    """The container ran out of memory while it started."""


class NotNow(EngineError):
    """The node does not let it start now."""


class PullFailed(EngineError):
    """The image could not be pulled."""


class StartFailed(EngineError):
    """The container could not be started."""


class NeverReady(EngineError):
    """The container runs and did not become ready in time."""


class Engine(Protocol):
    """Nine verbs. Every order can be given twice. All raise EngineDown when nothing answers.

    No call blocks the event loop.
    """

    async def info(self) -> EngineInfo:
        """Name, version, room, and what is and is not isolated."""
        ...

    async def pull(self, image: str, credentials: Credentials | None, progress: Callable[[int], None]) -> str:
        """Have the image here and return its digest; at once if it is here already. `progress` hears 0 to 100, rising.

        Errors: ImageMissing, CredentialsRefused, RegistryUnreachable, DiskFull, PullFailed. Cancelling stops the pull.
        """
        ...

    async def start(self, assignment: Assignment, *, restarts: int) -> Container:
        """Make and start its container, in place of one that was there under the same replica id.

        Errors: ImageMissing, DiskFull, GpuMissing, OutOfMemory, StartFailed.
        """
        ...

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """Ask it to end, kill it after the grace, and remove it. No error if there is none."""
        ...

    async def containers(self) -> list[Container]:
        """All of this node, running and ended."""
        ...

    async def watch(self, look: Callable[[], None]) -> None:
        """Call `look` once watching has begun and whenever `containers()` may have changed.

        Ends only by EngineDown or cancellation.
        """
        ...

    async def logs(self, replica_id: str, *, lines: int) -> str:
        """The last lines its container wrote, at most 16 KiB; "" if there are none."""
        ...

    async def log_of(self, replica_id: str, *, since: float, until: float) -> tuple[str, str]:
        """What its container wrote between these (Unix seconds), each line with its time; at most LOG_WINDOW_BYTES.

        The second says why it is empty, or not of just that time; "": it is.
        """
        ...

    async def images(self) -> list[CachedImage]:
        """What is in the cache, largest first, at most 500."""
        ...

    def owns(self, pid: int) -> bool | None:
        """Does this process belong to one of our containers? None: there is no such process here (any more)."""
        ...

    async def close(self) -> None:
        """Let go of threads and sockets. Containers go on; the processes of `process.py` end."""
        ...


class Storage(Protocol):
    """What is kept on disk, as the same engine has it. All raise EngineError."""

    #: The images that it pulled itself. Those that were there before are somebody else's.
    pulled: LastUse

    async def info(self) -> EngineInfo:
        """As Engine."""
        ...

    async def has_image(self, reference: str) -> bool:
        """Is it in the cache?"""
        ...

    async def remove_image(self, reference: str) -> bool:
        """Take that name of an image from the cache. False: a container has it. No error if there is none."""
        ...

    async def volumes(self) -> list[Volume]:
        """All of this node, measured."""
        ...

    async def remove_volume(self, volume: Volume) -> bool:
        """With all that is in it. False: a container has it. No error if there is none."""
        ...
