"""The GPUs of this machine: what is built in, and how each is.

A hung driver blocks every call into it for ever, so none is made from the daemon: gpu_probe.py runs as a child process
that is replaced when it misses its deadline. It says which GPU it is at, so that only that one is out.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
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
#: A child that SIGKILL does not end in that time hangs in the kernel; with so many of them no more are started.
KILL_S, STUCK_LIMIT = 1.0, 4
XIDS_KEPT: Final = 64
#: A stranger may hold this share of a GPU's memory (a desktop does) before nothing is started there.
FOREIGN_SHARE: Final = 0.1
LINE_BYTES: Final = 1024 * 1024

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
        """`owns`: is this pid one of our containers'? (Engine.owns.) Deadlines are for one GPU, and for the start."""
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
        #: The ends awaited of children that SIGKILL did not end.
        self._stuck: list[asyncio.Future[int]] = []
        self._read = asyncio.Event()
        self._next_read = asyncio.Event()
        #: GPUs that are being tested, by id, and the process that does so; 0: it is about to start.
        self.tested: dict[str, int] = {}

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
            if gpu_id in self.tested:
                return f"GPU {gpu_id} is being tested"
            if gpu_id not in self._known:
                return f"there is no GPU {gpu_id} in this machine; {self._inventory.message}".removesuffix("; ")
            reading = self._readings.get(gpu_id, GpuReading(gpu_id, error="it has not been read yet"))
            if reading.error:
                return f"GPU {gpu_id} cannot be used: {reading.error}"
            foreign = reading.foreign_memory_bytes or 0
            if foreign > FOREIGN_SHARE * self._known[gpu_id].memory_bytes:
                return f"{foreign / 2**30:.3g} GiB of GPU {gpu_id} are held by a process that is not ours"
        return ""

    async def read(self) -> None:
        """Returns once there is a first inventory, or the words why not: send no report before."""
        await self._read.wait()

    async def read_again(self) -> None:
        """Returns once a reading of the GPUs that is begun from now on has ended."""
        for _ in range(2):
            # The first may have begun before.
            await self._next_read.wait()

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
                    await end(child, self._stuck.append)
            await asyncio.sleep(pause_s)

    # The child.

    async def _start(self) -> asyncio.subprocess.Process:
        self._stuck = [ending for ending in self._stuck if not ending.done()]
        if len(self._stuck) >= STUCK_LIMIT:
            raise OSError(0, f"{STUCK_LIMIT} probes hang in the driver; restart the machine")
        for index in self._forgiven():
            del self._left_out[index]
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nodedaemon.gpu_probe", *map(str, self._left_out)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )

    def _forgiven(self) -> list[int]:
        """Who may be asked again. Nobody, when one more child that gets stuck would take the other GPUs out."""
        if len(self._stuck) >= STUCK_LIMIT - 1:
            return []
        return [index for index, (until, _) in self._left_out.items() if until <= time.monotonic()]

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
                if sick >= SICK_READINGS or self._forgiven():
                    break
        except (_Fault, ConnectionError) as fault:
            log.warning("gpu_probe_failed", fault=str(fault), index=answers.at)
            if answers.at is None:
                self._all_out(str(fault))
                return RETRY_S
            self._left_out[answers.at] = (time.monotonic() + LEAVE_OUT_S, str(fault))
        return 0.0

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
                tests = self.tested.values()
                foreign = sum(used or 0 for pid, used in processes if pid not in tests and self._owns(pid) is False)
            self._readings[gpu_id] = GpuReading(**reading, foreign_memory_bytes=foreign)
        self._read.set()
        self._next_read.set()
        self._next_read = asyncio.Event()

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
            self.at = said.get("at")
            if key in said:
                return said[key]


async def end(child: asyncio.subprocess.Process, stuck: Callable[[asyncio.Future[int]], None]) -> None:
    """Kill a process that may hang in the driver; one that does not end by that is `stuck`: its end, still awaited."""
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    ending = asyncio.ensure_future(child.wait())
    try:
        await asyncio.wait({ending}, timeout=KILL_S)
    except asyncio.CancelledError:
        await asyncio.wait({ending}, timeout=KILL_S)
        raise
    finally:
        if not ending.done():
            stuck(ending)
