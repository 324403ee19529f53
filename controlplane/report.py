"""What a node says of itself: plain frozen values, as of its last report. Times are seconds, sizes bytes."""

import enum

import msgspec


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as built in; `id` is NVML's UUID."""

    id: str
    model: str
    memory_bytes: int
    index: int = 0
    pci_bus_id: str = ""


class GpuReading(msgspec.Struct, frozen=True, gc=False):
    """One GPU as it is now; None: the driver does not offer that reading."""

    # Of a thousand nodes 200,000 are kept, and 1,600 are made a second: the garbage collector need not look at each
    # for a cycle that it cannot be part of, which took a tenth of what a report costs.

    gpu_id: str
    memory_used_bytes: int | None = None
    utilization: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    clocks_event_reasons: int | None = None
    ecc_uncorrected: int | None = None
    row_remap_pending: bool | None = None
    row_remap_failed: bool | None = None
    recovery_action: int | None = None
    xids: tuple[int, ...] = ()
    error: str = ""
    foreign_memory_bytes: int | None = None


class GpuTestState(enum.IntEnum):
    """Where the test of a GPU is. The numbers are the wire's (node.proto) and the database's."""

    WAITING = 1
    RUNNING = 2
    PASSED = 3
    FAILED = 4
    UNABLE = 5


class GpuTest(msgspec.Struct, frozen=True):
    """How the test of a GPU stands that was asked for under that number."""

    gpu_id: str
    number: int
    state: GpuTestState
    words: str = ""


class Inventory(msgspec.Struct, frozen=True):
    """What the machine has."""

    gpus: tuple[Gpu, ...] = ()
    cpus: float = 0.0
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    engine: str = ""
    engine_version: str = ""
    driver_version: str = ""
    cuda_version: str = ""
    os: str = ""
    daemon_version: str = ""
    gpu_message: str = ""
    volume_limit_bytes: int = 0
    allowed_images: tuple[str, ...] = ()


class ReplicaState(enum.IntEnum):
    """Where a replica stands. The numbers are the wire's (workspace.proto) and the database's."""

    ASSIGNED = 1
    PULLING = 2
    STARTING = 3
    READY = 4
    BACKOFF = 5
    STOPPING = 6
    LOST = 7


class ReplicaReport(msgspec.Struct, frozen=True):
    """One replica as its node sees it."""

    replica_id: str
    state: ReplicaState
    progress: int = 0
    message: str = ""
    capacity: int = 0
    restarts: int = 0
    spec_hash: str = ""
    image_digest: str = ""


class CachedImage(msgspec.Struct, frozen=True):
    """An image in the node's cache."""

    reference: str
    size_bytes: int


class KeptVolume(msgspec.Struct, frozen=True):
    """A workspace's volume on the node."""

    workspace_uid: str
    name: str
    size_bytes: int = 0


class Report(msgspec.Struct, frozen=True):
    """All that is on a node: one Heartbeat message."""

    inventory: Inventory
    readings: tuple[GpuReading, ...] = ()
    replicas: tuple[ReplicaReport, ...] = ()
    images: tuple[CachedImage, ...] = ()
    attempt_ids: tuple[str, ...] = ()
    goodbye: bool = False
    volumes: tuple[KeptVolume, ...] = ()
    gpu_tests: tuple[GpuTest, ...] = ()
