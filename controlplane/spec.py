"""What a customer wants run: plain frozen values, stored as JSON in the workspace's row.

Times are seconds, sizes bytes. Defaults are the documented ones (protos/ngpu/v1/workspace.proto).
"""

import msgspec

MIB = 1024 * 1024
GIB = 1024 * MIB


class GpuNeed(msgspec.Struct, frozen=True):
    """GPUs of one replica: `count` whole ones whose model contains the words of `model`, each with that much memory.

    `share`, with `count` 1: so many thousandths of one GPU, and of its memory; 0: all of it.
    """

    model: str = ""
    count: int = 0
    min_memory_bytes: int = 0
    share: int = 0


class Readiness(msgspec.Struct, frozen=True):
    """When a replica is ready: `GET path` answers below 500; without a path, `port` (0: the first) accepts."""

    path: str = ""
    port: int = 0
    start_limit_s: float = 600.0


class Volume(msgspec.Struct, frozen=True):
    """A directory that a node keeps for the workspace from one replica to the next; see Volume in workspace.proto."""

    name: str
    path: str


class Registry(msgspec.Struct, frozen=True):
    """Credentials for a private image."""

    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        """Never the password: values end up in logs and tracebacks."""
        return f"Registry(username={self.username!r})"


class Limits(msgspec.Struct, frozen=True):
    """Every limit of a workspace's tasks."""

    queue_time_s: float = 600.0
    run_time_s: float = 600.0
    total_time_s: float = 3600.0
    request_body_bytes: int = 64 * MIB
    response_body_bytes: int = 256 * MIB
    queue_length: int = 1000
    max_attempts: int = 3
    #: Tasks accepted in a second.
    rate: int = 10_000


class Scale(msgspec.Struct, frozen=True):
    """Between which numbers the replicas follow the load. `max_replicas` 0: they do not, and are `Spec.replicas`.

    `idle_time_s`: after so long without a task there are none, if `min_replicas` is 0. `queue_wait_s`: how long a task
    may wait before there should be more.
    """

    min_replicas: int = 0
    max_replicas: int = 0
    idle_time_s: float = 900.0
    queue_wait_s: float = 10.0


class JobRule(msgspec.Struct, frozen=True):
    """How to follow jobs that a container works on by itself: see JobRule in workspace.proto."""

    preset: str = ""
    start: str = ""
    id: tuple[str, ...] = ()
    ask: str = ""
    cancel: str = ""
    state: str = ""
    accepted: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    output: str = ""
    message: str = ""
    poll_s: float = 0.0
    #: 0: as the workspace's run time.
    limit_s: float = 0.0


class Spec(msgspec.Struct, frozen=True):
    """A workspace as the customer describes it."""

    name: str
    image: str
    ports: tuple[int, ...]
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    gpu: GpuNeed = GpuNeed()
    replicas: int = 1
    concurrency: int = 1
    cpus: float = 1.0
    memory_bytes: int = 4 * GIB
    shm_bytes: int = 64 * MIB
    readiness: Readiness = Readiness()
    registry: Registry = Registry()
    limits: Limits = Limits()
    repeatable: bool = True
    cancel_on_hangup: bool = True
    writable_paths: tuple[str, ...] = ()
    account: str = ""
    scale: Scale = Scale()
    jobs: tuple[JobRule, ...] = ()
    volumes: tuple[Volume, ...] = ()
    #: A task that takes so many times the average gets a second attempt elsewhere; 0: none does.
    hedge: float = 0.0

    def __repr__(self) -> str:
        """Without environment and credentials: values end up in logs and tracebacks."""
        return f"Spec(name={self.name!r}, image={self.image!r})"
