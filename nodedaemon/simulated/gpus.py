"""The GPUs of a simulated node, and their tests: the real `Gpus` and `GpuTests`, fed with what a driver would say."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from nodedaemon.engine import GIB
from nodedaemon.gpu_tests import GpuTests, Outcome, State
from nodedaemon.gpus import Gpus

#: Memory of a GPU whose model does not say it.
USUAL_GIB: Final = 24
#: How long a test takes.
TEST_S: Final = 1.0
#: NVML's words.
LOST: Final = "GPU is lost"
#: Xids of one GPU that wait for the next reading.
XIDS: Final = 64


def memory_gib(model: str) -> int:
    """As the model's name says (`NVIDIA A100-SXM4-80GB`), else as most have."""
    said = re.search(r"(\d+) ?G(?:i?B)?\b", model)
    return int(said[1]) if said else USUAL_GIB


class SimulatedGpus(Gpus):
    """`working`: GPUs that a container has, and whether one works there. `lost`: indexes that the driver has lost."""

    def __init__(self, node_addr: str, model: str, count: int, working: Callable[[], Mapping[str, bool]]) -> None:
        super().__init__()
        self._working = working
        self._memory = memory_gib(model) * GIB
        self._built_in = [
            {
                "id": _id_of(node_addr, index),
                "model": model,
                "memory_bytes": self._memory,
                "index": index,
                "pci_bus_id": f"00000000:{index:02X}:00.0",
            }
            for index in range(count)
        ]
        self._pending: list[list[int]] = [[] for _ in range(count)]
        self._due = asyncio.Event()
        self.lost: set[int] = set()

    async def run(self) -> None:
        """Until cancelled: a reading every interval, and when something has happened."""
        words = "" if self._built_in else "there is no GPU in this machine (simulated)"
        self._take_inventory({"gpus": self._built_in, "driver": "550.54.15", "cuda": "12.4", "message": words})
        while True:
            self._due.clear()
            self._take_readings([self._reading(index) for index in range(len(self._built_in))])
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._due.wait()
            except TimeoutError:
                continue

    def xid(self, index: int, code: int) -> None:
        """The driver reports that error."""
        if len(self._pending[index]) < XIDS:
            self._pending[index].append(code)
        self._due.set()

    def id_of(self, index: int) -> str:
        """The id of the GPU of that index."""
        return str(self._built_in[index]["id"])

    def look(self) -> None:
        """Read again: something has happened."""
        self._due.set()

    def _reading(self, index: int) -> dict[str, Any]:
        gpu_id = self._built_in[index]["id"]
        xids, self._pending[index] = self._pending[index], []
        reading: dict[str, Any] = {"gpu_id": gpu_id, "xids": xids}
        if index in self.lost:
            return {**reading, "error": LOST}
        works = self._working().get(str(gpu_id))
        return {
            **reading,
            "memory_used_bytes": 0 if works is None else int(0.6 * self._memory),
            "utilization": 95 if works else 0,
            "temperature_c": 68 if works else 41,
            "power_w": 300.0 if works else 25.0,
            "clocks_event_reasons": 0,
            "ecc_uncorrected": 0,
            "row_remap_pending": False,
            "row_remap_failed": False,
            "recovery_action": 0,
            "processes": [],
        }


class SimulatedGpuTests(GpuTests):
    """`bad`: ids of GPUs that fail."""

    def __init__(self, gpus: SimulatedGpus, held: Callable[[str], bool], bad: Callable[[str], bool]) -> None:
        super().__init__(gpus, held)
        self._bad = bad

    async def _examine(self, gpu_id: str) -> Outcome:
        await asyncio.sleep(TEST_S)
        if self._bad(gpu_id):
            return State.FAILED, "its memory does not keep what is written (simulated)"
        return State.PASSED, "as a simulated GPU is"


def _id_of(node_addr: str, index: int) -> str:
    """The same for as long as the node has its key."""
    digits = hashlib.sha256(f"{node_addr}/{index}".encode()).hexdigest()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"
