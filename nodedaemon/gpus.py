"""The GPUs of this machine: what is built in, and how each is. The only file that imports pynvml.

A hung driver blocks every call into it for ever, so none is made from the daemon: `python -m nodedaemon.gpus` is a
child process that speaks JSON lines and is replaced when it misses its deadline. It says which GPU it is at, so that
only that one is out.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

log = structlog.get_logger()

#: How long a GPU that hung the driver is left out before it is asked again, and a missing driver is not looked for.
LEAVE_OUT_S: Final = 300.0
#: After a fault of the driver as a whole.
RETRY_S: Final = 30.0
#: A child is replaced after so many readings: a GPU that fell off the bus is missed only by a new one ...
LIFE_READINGS: Final = 120
#: ... and after so many with an error in it: one that was reset is found only by a new one.
SICK_READINGS: Final = 6
#: Children that even SIGKILL does not end, because they hang in the kernel; with so many no more are started.
STUCK_LIMIT: Final = 4
XIDS_KEPT: Final = 64
#: A stranger may hold this share of a GPU's memory (a desktop does) before nothing is started there.
FOREIGN_SHARE: Final = 0.1
LINE_BYTES: Final = 1024 * 1024
#: NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, which bindings of before 2025 do not name.
RECOVERY_ACTION: Final = 230

Owns = Callable[[int], bool | None]


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
    """What is built in. `message`: why there are none or some are missing; empty if all is well."""

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


class _Fault(Exception):
    """The child is of no more use, and why."""


class Gpus:
    """Reads the GPUs every `interval_s`: run `run()` in the daemon's TaskGroup.

    The rest are look-ups of the last reading.
    """

    def __init__(
        self,
        owns: Owns = lambda _: None,
        *,
        interval_s: float = 5.0,
        deadline_s: float = 5.0,
        start_deadline_s: float = 30.0,
    ) -> None:
        """`owns`: is this pid one of our containers'? (Engine.owns.) Deadlines.

        For one GPU, and for the driver to load.
        """
        self._owns = owns
        self._interval_s = interval_s
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        #: Every GPU ever listed, by id.
        self._known: dict[str, Gpu] = {}
        self._inventory = GpuInventory()
        self._readings: dict[str, GpuReading] = {}
        self._xids: dict[str, collections.deque[int]] = {}
        #: By index: until when it is left out, and why.
        self._left_out: dict[int, tuple[float, str]] = {}
        self._stuck: list[asyncio.subprocess.Process] = []
        self._read = asyncio.Event()

    def inventory(self) -> GpuInventory:
        """GPUs seen since the daemon started; one that has vanished since stays, with an error in its reading."""
        return self._inventory

    def readings(self) -> tuple[GpuReading, ...]:
        """The last of each GPU, with every Xid that was not yet acknowledged."""
        return tuple(
            dataclasses.replace(reading, xids=tuple(self._xids.get(gpu_id, ())))
            for gpu_id, reading in self._readings.items()
        )

    def acknowledge(self, readings: Iterable[GpuReading]) -> None:
        """The control plane has these readings: forget their Xids."""
        for reading in readings:
            pending = self._xids.get(reading.gpu_id, collections.deque())
            for xid in reading.xids:
                if pending and pending[0] == xid:
                    pending.popleft()

    def refusal(self, gpu_ids: Sequence[str]) -> str:
        """Why a container must not be started on these GPUs now, in words; "": it may."""
        if gpu_ids and not self._read.is_set():
            return "the GPUs have not been read yet"
        for gpu_id in gpu_ids:
            if gpu_id not in self._known:
                return f"there is no GPU {gpu_id} in this machine; {self._inventory.message}".removesuffix("; ")
            reading = self._readings[gpu_id]
            if reading.error:
                return f"GPU {gpu_id} cannot be used: {reading.error}"
            foreign = reading.foreign_memory_bytes or 0
            if foreign > FOREIGN_SHARE * self._known[gpu_id].memory_bytes:
                return f"{foreign / 2**30:.3g} GiB of GPU {gpu_id} are held by a process that is not ours"
        return ""

    async def read(self) -> None:
        """Returns once there is a first inventory, or the words why not: send no report before."""
        await self._read.wait()

    async def run(self) -> None:
        """Until cancelled; never raises for what a driver does."""
        while True:
            pause_s = self._interval_s
            try:
                child = await self._start()
            except OSError as error:
                self._all_out(f"the GPUs cannot be read: {error.strerror}")
                pause_s = RETRY_S
            else:
                try:
                    pause_s = await self._listen(child)
                finally:
                    await self._end(child)
            await asyncio.sleep(pause_s)

    # The child, from outside.

    async def _start(self) -> asyncio.subprocess.Process:
        self._stuck = [child for child in self._stuck if child.returncode is None]
        if len(self._stuck) >= STUCK_LIMIT:
            raise OSError(0, f"{STUCK_LIMIT} probes hang in the driver; restart the machine")
        now = time.monotonic()
        self._left_out = {index: out for index, out in self._left_out.items() if out[0] > now}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nodedaemon.gpus", *map(str, self._left_out)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LINE_BYTES,
        )

    async def _listen(self, child: asyncio.subprocess.Process) -> float:
        """Read with this child until it is to be replaced. Returns how long to wait before that."""
        answers = _Answers(child)
        try:
            first = await answers.until("inventory", self._start_deadline_s)
            self._take_inventory(first)
            if not first["gpus"]:
                return RETRY_S if self._known else LEAVE_OUT_S
            sick = 0
            for _ in range(LIFE_READINGS):
                assert child.stdin
                child.stdin.write(b"read\n")
                said = await answers.until("readings", self._deadline_s)
                self._take_readings(said)
                sick += any("error" in reading for reading in said)
                await asyncio.sleep(self._interval_s)
                over = any(until <= time.monotonic() for until, _ in self._left_out.values())
                if over or sick >= SICK_READINGS:
                    break
        except (_Fault, ConnectionError) as fault:
            log.warning("gpu_probe_failed", fault=str(fault), index=answers.at)
            if answers.at is None:
                self._all_out(str(fault))
                return RETRY_S
            self._left_out[answers.at] = (time.monotonic() + LEAVE_OUT_S, str(fault))
        return 0.0

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        try:
            async with asyncio.timeout(1):
                await child.wait()
        except TimeoutError:
            self._stuck.append(child)

    def _take_inventory(self, said: dict[str, Any]) -> None:
        listed = [Gpu(**gpu) for gpu in said["gpus"]]
        self._known.update({gpu.id: gpu for gpu in listed})
        present = {gpu.id for gpu in listed}
        indexes = {gpu.index for gpu in self._known.values()}
        words = [said["message"], *(f"GPU {i}: {why}" for i, (_, why) in self._left_out.items() if i not in indexes)]
        for gpu in self._known.values():
            if gpu.index in self._left_out:
                self._readings[gpu.id] = GpuReading(gpu.id, error=self._left_out[gpu.index][1])
            elif gpu.id not in present:
                self._readings[gpu.id] = GpuReading(gpu.id, error=said["message"] or "the driver no longer lists it")
        self._inventory = GpuInventory(
            tuple(sorted(self._known.values(), key=lambda gpu: gpu.index)),
            said["driver"] or self._inventory.driver_version,
            said["cuda"] or self._inventory.cuda_version,
            "; ".join(filter(None, words)),
        )
        if not listed:
            self._read.set()

    def _take_readings(self, said: list[dict[str, Any]]) -> None:
        for reading in said:
            gpu_id, processes = reading["gpu_id"], reading.pop("processes", None)
            kept = self._xids.setdefault(gpu_id, collections.deque(maxlen=XIDS_KEPT))
            kept.extend(reading.pop("xids"))
            foreign = None
            if processes is not None:
                foreign = sum(used or 0 for pid, used in processes if self._owns(pid) is False)
            self._readings[gpu_id] = GpuReading(**reading, foreign_memory_bytes=foreign)
        self._read.set()

    def _all_out(self, why: str) -> None:
        self._inventory = dataclasses.replace(self._inventory, message=why)
        self._readings = {gpu_id: GpuReading(gpu_id, error=why) for gpu_id in self._known}
        self._read.set()


class _Answers:
    """What the child says, line by line; `at` is the index of the GPU it is busy with."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child
        self.at: int | None = None

    async def until(self, key: str, deadline_s: float) -> Any:
        """The value of the line with that key. Raises _Fault when no line comes for that long, or the child ends."""
        assert self._child.stdout
        while True:
            try:
                async with asyncio.timeout(deadline_s):
                    line = await self._child.stdout.readline()
            except TimeoutError:
                raise _Fault(f"the NVIDIA driver does not answer within {deadline_s:g} s") from None
            if not line:
                code = await self._child.wait()
                how = f"the NVIDIA driver's library crashed (signal {-code})" if code < 0 else "the GPU probe failed"
                raise _Fault(how)
            said = json.loads(line)
            if key in said:
                return said[key]
            self.at = said["at"]


# The child, from inside.


def main() -> None:
    """List the GPUs, then answer each line on stdin with their readings. Arguments: indexes to leave out."""
    # Late, so that the daemon itself never loads it.
    import pynvml as nvml

    left_out = {int(index) for index in sys.argv[1:]}
    try:
        nvml.nvmlInit()
        inventory, handles = _list(nvml, left_out)
    except nvml.NVMLError as error:
        missing = error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND
        words = "there is no NVIDIA driver on this machine (no libnvidia-ml.so.1)" if missing else f"NVML: {error}"
        _say(inventory={"gpus": [], "driver": "", "cuda": "", "message": words})
        return
    _say(inventory=inventory)
    events = _events(nvml, handles)
    for _ in sys.stdin:
        _say(at=None)
        xids = _xids(nvml, events)
        readings = []
        for index, (gpu_id, handle) in handles.items():
            _say(at=index)
            reading: dict[str, Any] = {"gpu_id": gpu_id, "xids": xids.get(gpu_id, [])}
            try:
                reading.update(_reading(nvml, handle))
            except nvml.NVMLError as error:
                reading["error"] = str(error)
            readings.append(reading)
        _say(readings=readings)


def _say(**line: Any) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def _list(nvml: Any, left_out: set[int]) -> tuple[dict[str, Any], dict[int, tuple[str, Any]]]:
    gpus, handles, faults = [], {}, []
    for index in range(nvml.nvmlDeviceGetCount()):
        if index in left_out:
            continue
        _say(at=index)
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpu = Gpu(
                nvml.nvmlDeviceGetUUID(handle),
                nvml.nvmlDeviceGetName(handle),
                nvml.nvmlDeviceGetMemoryInfo(handle).total,
                index,
                nvml.nvmlDeviceGetPciInfo(handle).busId,
            )
        except nvml.NVMLError as error:
            faults.append(f"GPU {index}: {error}")
            continue
        gpus.append(dataclasses.asdict(gpu))
        handles[index] = (gpu.id, handle)
    _say(at=None)
    if not gpus and not faults and not left_out:
        faults.append("the NVIDIA driver is here and sees no GPU")
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    inventory = {
        "gpus": gpus,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "message": "; ".join(faults),
    }
    return inventory, handles


def _reading(nvml: Any, handle: Any) -> dict[str, Any]:
    absent = (
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_NO_PERMISSION,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    )

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, name)(handle, *arguments)
        except nvml.NVMLError as error:
            if error.value in absent:
                return None
            raise

    memory, utilization = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetUtilizationRates")
    power, remapped = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetRemappedRows")
    compute, graphics = ask("nvmlDeviceGetComputeRunningProcesses"), ask("nvmlDeviceGetGraphicsRunningProcesses")
    recovery = ask("nvmlDeviceGetFieldValues", [RECOVERY_ACTION])
    clocks = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if clocks is None:
        # Its name before driver 530.
        clocks = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return {
        "memory_used_bytes": memory and memory.used,
        "utilization": utilization and utilization.gpu,
        "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power is None else power / 1000,
        "clocks_event_reasons": clocks,
        "ecc_uncorrected": ask(
            "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "row_remap_pending": None if remapped is None else bool(remapped[2]),
        "row_remap_failed": None if remapped is None else bool(remapped[3]),
        "recovery_action": recovery[0].value.uiVal if recovery and recovery[0].nvmlReturn == 0 else None,
        "processes": None
        if compute is None
        else sorted({p.pid: p.usedGpuMemory for p in [*compute, *(graphics or ())]}.items()),
    }


def _events(nvml: Any, handles: dict[int, tuple[str, Any]]) -> Any:
    with contextlib.suppress(nvml.NVMLError):
        events = nvml.nvmlEventSetCreate()
        for _, handle in handles.values():
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        return events
    return None


def _xids(nvml: Any, events: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    if events is None:
        return found
    # Ends with NVML_ERROR_TIMEOUT when there are no more.
    with contextlib.suppress(nvml.NVMLError):
        for _ in range(XIDS_KEPT):
            event = nvml.nvmlEventSetWait_v2(events, 0)
            found.setdefault(nvml.nvmlDeviceGetUUID(event.device), []).append(event.eventData)
    return found


if __name__ == "__main__":
    main()
