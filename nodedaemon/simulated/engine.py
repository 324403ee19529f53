"""An engine that runs nothing: pulls take their time, containers are HTTP servers of this process.

It keeps the promises of `nodedaemon.engine` as Docker does. That more was started on a GPU than there is of it is not
prevented, because a real engine does not either: it is written down (`overcommitted`), and audits read it.
"""

import asyncio
import dataclasses
import hashlib
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from nodedaemon.engine import (
    GIB,
    Assignment,
    CachedImage,
    Container,
    Credentials,
    DiskFull,
    EngineError,
    EngineInfo,
    Exit,
    RegistryUnreachable,
)
from nodedaemon.simulated.containers import Pace, Served

DISK_BYTES: Final = 2000 * GIB
#: An image is as large as its name says: any size between these.
IMAGE_GIB: Final = (2, 20)
#: What `Pace.pull_s` is for.
USUAL_GIB: Final = 10
PULL_STEPS: Final = 20
IMAGES_TOLD: Final = 500
#: Times that too much was started on a GPU: those that are remembered.
OVERCOMMITTED_KEPT: Final = 100
#: Thousandths of a GPU.
WHOLE: Final = 1000

PULL_FAULTS: Final[dict[str, Callable[[str], EngineError]]] = {
    "pull-fail": lambda image: RegistryUnreachable(f"the registry of {image} does not answer (simulated)"),
    "disk-full": lambda image: DiskFull(f"no room on the disk for {image} (simulated)"),
}


@dataclass
class _Running:
    container: Container
    assignment: Assignment
    served: Served
    begun: float
    loading: asyncio.Task[None]


class SimulatedEngine:
    """Engine. `pull_fault`: how every pull fails just now, a key of PULL_FAULTS; empty: none does."""

    def __init__(
        self,
        node: str,
        pace: Pace,
        chance: random.Random,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.node = node
        self.pace = pace
        self.pull_fault = ""
        self.overcommitted: deque[str] = deque(maxlen=OVERCOMMITTED_KEPT)
        #: By containers that are gone.
        self._answered_before = 0
        self._chance = chance
        self._monotonic = monotonic
        self._sleep = sleep
        self._there: dict[str, _Running] = {}
        self._cached: dict[str, int] = {}
        self._looks: list[Callable[[], None]] = []
        self._starts = 0

    # Engine.

    async def info(self) -> EngineInfo:
        """As Engine."""
        free = max(0, DISK_BYTES - sum(self._cached.values()))
        return EngineInfo("simulated", "1", free, "nothing runs here", ("GPUs and containers are simulated.",))

    async def pull(self, image: str, credentials: Credentials | None, progress: Callable[[int], None]) -> str:  # noqa: ARG002
        """As Engine: a large image takes longer."""
        digest = "sha256:" + hashlib.sha256(image.encode()).hexdigest()
        size = _size_of(image)
        if image not in self._cached:
            seconds = self.pace.takes(self.pace.pull_s * size / (USUAL_GIB * GIB)) * self._chance.uniform(0.7, 1.3)
            for step in range(PULL_STEPS):
                self._refuse(image)
                progress(100 * step // PULL_STEPS)
                await self._sleep(seconds / PULL_STEPS)
            self._refuse(image)
            self._cached[image] = size
        progress(100)
        return digest

    def _refuse(self, image: str) -> None:
        if self.pull_fault:
            raise PULL_FAULTS[self.pull_fault](image)

    async def start(self, assignment: Assignment, *, restarts: int) -> Container:
        """As Engine. It runs at once, and listens when it has loaded."""
        await self.stop(assignment.replica_id, grace_s=0)
        self._starts += 1
        served = Served(self.node, assignment, self.pace, self._chance)
        container = Container(
            replica_id=assignment.replica_id,
            container_id=f"{self.node}-{self._starts}",
            spec_hash=assignment.spec_hash,
            image_digest="sha256:" + hashlib.sha256(assignment.image.encode()).hexdigest(),
            restarts=restarts,
            addresses=served.addresses,
        )
        loading = asyncio.create_task(self._load(served), name=f"load {assignment.replica_id}")
        self._there[assignment.replica_id] = _Running(container, assignment, served, self._monotonic(), loading)
        self._note_overcommitted(assignment)
        self._look()
        return container

    async def _load(self, served: Served) -> None:
        await self._sleep(self.pace.takes(self.pace.start_s) * self._chance.uniform(0.7, 1.3))
        await served.listen()

    async def stop(self, replica_id: str, *, grace_s: float) -> None:  # noqa: ARG002, what it works on is cut
        """As Engine."""
        running = self._there.pop(replica_id, None)
        if running is not None:
            await self._end(running)
            self._look()

    async def containers(self) -> list[Container]:
        """As Engine."""
        return [running.container for running in self._there.values()]

    async def watch(self, look: Callable[[], None]) -> None:
        """As Engine."""
        self._looks.append(look)
        try:
            look()
            await asyncio.Event().wait()
        finally:
            self._looks.remove(look)

    async def logs(self, replica_id: str, *, lines: int) -> str:  # noqa: ARG002
        """As Engine: simulated containers write nothing."""
        return ""

    async def log_of(self, replica_id: str, *, since: float, until: float) -> tuple[str, str]:  # noqa: ARG002
        """As Engine."""
        return "", "simulated containers write nothing"

    async def images(self) -> list[CachedImage]:
        """As Engine."""
        cached = sorted(self._cached.items(), key=lambda one: (-one[1], one[0]))
        return [CachedImage(reference, size) for reference, size in cached[:IMAGES_TOLD]]

    def owns(self, pid: int) -> bool | None:  # noqa: ARG002
        """As Engine: there are no processes."""
        return None

    async def close(self) -> None:
        """Containers end, as those of a machine that is switched off."""
        there, self._there = self._there, {}
        await asyncio.gather(*(self._end(running) for running in there.values()))

    # What happens to its containers.

    async def exit(self, code: int) -> str:
        """One of its running containers, by chance, ends with that code; the replica's id, or "": there is none."""
        running = [one for one in self._there.values() if one.container.exit is None]
        if not running:
            return ""
        chosen = self._chance.choice(running)
        await self._end(chosen)
        replica_id = chosen.assignment.replica_id
        ended = Exit(replica_id, code, ran_s=self._monotonic() - chosen.begun)
        chosen.container = dataclasses.replace(chosen.container, addresses={}, exit=ended)
        self._look()
        return replica_id

    # What is known of them.

    def running(self) -> list[Assignment]:
        """What runs."""
        return [one.assignment for one in self._there.values() if one.container.exit is None]

    def busy_gpus(self) -> dict[str, bool]:
        """GPUs that a container has: does one of them work just now?"""
        found: dict[str, bool] = {}
        for one in self._there.values():
            for gpu_id in one.assignment.gpu_ids if one.container.exit is None else ():
                found[gpu_id] = found.get(gpu_id, False) or one.served.busy > 0
        return found

    @property
    def answered(self) -> int:
        """Requests answered since this engine began."""
        return self._answered_before + sum(one.served.answered for one in self._there.values())

    async def _end(self, running: _Running) -> None:
        running.loading.cancel()
        await asyncio.wait([running.loading])
        self._answered_before += running.served.answered
        running.served.answered = 0
        await running.served.close()

    def _note_overcommitted(self, started: Assignment) -> None:
        held: Counter[str] = Counter()
        for assignment in self.running():
            held.update(dict.fromkeys(assignment.gpu_ids, assignment.gpu_share or WHOLE))
        for gpu_id in started.gpu_ids:
            if held[gpu_id] > WHOLE:
                holders = ", ".join(one.replica_id for one in self.running() if gpu_id in one.gpu_ids)
                self.overcommitted.append(f"{gpu_id} of {self.node} has {held[gpu_id]} thousandths taken by {holders}")

    def _look(self) -> None:
        for look in self._looks:
            look()


def _size_of(image: str) -> int:
    least, most = IMAGE_GIB
    return (least + int.from_bytes(hashlib.sha256(image.encode()).digest()[:4]) % (most - least + 1)) * GIB
