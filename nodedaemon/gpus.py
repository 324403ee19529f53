"""The GPUs of this machine: what is built in, and how each is. The only file that imports pynvml.

A hung driver blocks every call into it for ever, so none is made from the daemon: `python -m nodedaemon.gpus` is a child process that
speaks JSON lines and is replaced when it misses its deadline.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as built in; `id` is NVML's UUID."""

    id: str
    model: str
    memory_bytes: int
    index: int = 0
    pci_bus_id: str = ""


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """What is built in. `message`: why there are none or some are missing; empty if all is well or there are none to expect."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    cuda_version: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU as it is now; fields and units as in node.proto. None: the driver does not offer that reading."""

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


class Gpus:
    """Reads the GPUs every `interval_s`. Run `run()` in the daemon's TaskGroup; the rest are plain look-ups of the last reading."""

    def __init__(
        self,
        owns: Callable[[int], bool | None] = lambda _: None,
        *,
        interval_s: float = 5.0,
        deadline_s: float = 5.0,
        start_deadline_s: float = 30.0,
    ) -> None:
        """`owns`: is this pid one of our containers'? (Engine.owns)"""
        raise NotImplementedError

    async def run(self) -> None:
        """Until cancelled; never raises for what a driver does."""
        raise NotImplementedError

    async def read(self) -> None:
        """Returns once there is a first inventory, or the words why not: send no report before."""
        raise NotImplementedError

    def inventory(self) -> GpuInventory:
        """GPUs seen since the daemon started; one that has vanished since stays, with an error in its reading."""
        raise NotImplementedError

    def readings(self) -> tuple[GpuReading, ...]:
        """The last of each GPU, with every Xid that was not yet acknowledged."""
        raise NotImplementedError

    def acknowledge(self, readings: Iterable[GpuReading]) -> None:
        """The control plane has these readings: forget their Xids."""
        raise NotImplementedError

    def refusal(self, gpu_ids: Sequence[str]) -> str:
        """Why a container must not be started on these GPUs now, in words: no such GPU, unreadable, or full of a stranger's memory. "": it may."""
        raise NotImplementedError
