"""A hand-written engine that keeps the protocol of nodedaemon/engine, and a clock that only moves when told to."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from nodedaemon.engine import (
    Assignment,
    CachedImage,
    Container,
    Credentials,
    EngineDown,
    EngineError,
    EngineInfo,
    Exit,
    ImageMissing,
    Readiness,
    Volume,
)
from nodedaemon.last_use import LastUse


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(50):
        await asyncio.sleep(0)


class FakeTime:
    """`monotonic` and `sleep` in one; time passes in `advance` only."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    @property
    def sleepers(self) -> int:
        """How many sleep."""
        return sum(not future.done() for _, _, future in self._sleepers)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._count), future))
        await future

    async def advance(self, seconds: float) -> None:
        until = self.now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until:
            self.now, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
                await settle()
        self.now = until
        await settle()


@dataclass
class FakePull:
    """A pull in flight: the test says how far it is and how it ends."""

    image: str
    credentials: Credentials | None
    progress: Callable[[int], None]
    end: asyncio.Future[str]


class FakeEngine:
    """Containers are entries of `there`. Images in `cache` are pulled at once.

    Others wait in `pulling` for the test.
    """

    def __init__(self, *cache: str) -> None:
        self.cache = set(cache)
        self.pulling: list[FakePull] = []
        self.there: dict[str, Container] = {}
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.start_errors: dict[str, EngineError] = {}
        self.last_words: dict[str, str] = {}
        #: Of which times `log_of` was asked.
        self.windows: list[tuple[float, float]] = []
        self.lists = 0
        #: From now on each list waits on its way until the test sets its event in `on_the_way`.
        self.holds_lists = False
        self.on_the_way: list[asyncio.Event] = []
        self.pulled: LastUse
        self.disk_free_bytes = 0
        #: Images that a container of somebody else's has.
        self.held_images: set[str] = set()
        self.removed_images: list[str] = []
        self.kept_volumes: list[Volume] = []
        #: By replica: how it shows that it no longer sees its GPUs.
        self.sightless: dict[str, str] = {}
        self._down: EngineError | None = None
        self._broken = asyncio.Event()
        self._looks: list[Callable[[], None]] = []
        self._ids = itertools.count(1)

    # What the test does.

    def go_down(self, words: str = "the engine does not answer") -> None:
        self._down = EngineDown(words)
        self._broken.set()

    def come_up(self) -> None:
        self._down = None
        self._broken = asyncio.Event()

    def break_stream(self) -> None:
        """It may have begun anew: its stream of events breaks, its other answers go on."""
        self._broken.set()
        self._broken = asyncio.Event()

    def kill(self, replica_id: str, code: int | None = 1, *, ran_s: float = 1.0, out_of_memory: bool = False) -> None:
        """The container ends by itself."""
        ended = Exit(replica_id, code, out_of_memory=out_of_memory, ran_s=ran_s, memory_bytes=2**30)
        self.there[replica_id] = replace(self.there[replica_id], exit=ended, addresses={})
        self.look()

    def remove(self, replica_id: str) -> None:
        """Somebody takes the container away."""
        del self.there[replica_id]
        self.look()

    def put(self, assignment: Assignment, *, restarts: int = 0, started: bool = True) -> Container:
        """A container that was there before."""
        n = next(self._ids)
        container = Container(
            replica_id=assignment.replica_id,
            container_id=f"c{n}",
            spec_hash=assignment.spec_hash,
            image_digest=f"sha256:{assignment.image}",
            restarts=restarts,
            started=started,
            addresses={port: (f"10.0.0.{n}", port) for port in assignment.ports},
        )
        self.there[assignment.replica_id] = container
        return container

    def look(self) -> None:
        for look in self._looks:
            look()

    # The protocol.

    def _answer(self) -> None:
        if self._down:
            raise self._down

    async def info(self) -> EngineInfo:
        self._answer()
        return EngineInfo("fake", disk_free_bytes=self.disk_free_bytes)

    async def pull(self, image: str, credentials: Credentials | None, progress: Callable[[int], None]) -> str:
        self._answer()
        if image in self.cache:
            return f"sha256:{image}"
        if image.startswith("missing"):
            raise ImageMissing
        pull = FakePull(image, credentials, progress, asyncio.get_running_loop().create_future())
        self.pulling.append(pull)
        try:
            digest = await pull.end
        finally:
            self.pulling.remove(pull)
        self.cache.add(image)
        return digest

    async def start(self, assignment: Assignment, *, restarts: int) -> Container:
        self._answer()
        if error := self.start_errors.get(assignment.replica_id):
            raise error
        self.started.append(assignment.replica_id)
        container = self.put(assignment, restarts=restarts)
        self.look()
        return container

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        self._answer()
        self.stopped.append(replica_id)
        self.there.pop(replica_id, None)
        self.look()

    async def containers(self) -> list[Container]:
        self._answer()
        self.lists += 1
        listed = list(self.there.values())
        if self.holds_lists:
            self.on_the_way.append(arrives := asyncio.Event())
            await arrives.wait()
        return listed

    async def watch(self, look: Callable[[], None]) -> None:
        self._answer()
        self._looks.append(look)
        look()
        broken = self._broken
        try:
            await broken.wait()
        finally:
            self._looks.remove(look)
        raise self._down or EngineDown("the engine has closed its stream of events")

    async def logs(self, replica_id: str, *, lines: int) -> str:
        self._answer()
        return self.last_words.get(replica_id, "")

    async def log_of(self, replica_id: str, *, since: float, until: float) -> tuple[str, str]:
        self._answer()
        self.windows.append((since, until))
        words = self.last_words.get(replica_id, "")
        return words, "" if words else "it wrote nothing in that time"

    async def images(self) -> list[CachedImage]:
        self._answer()
        return [CachedImage(image, 1) for image in sorted(self.cache)]

    async def has_image(self, reference: str) -> bool:
        self._answer()
        return reference in self.cache

    async def remove_image(self, reference: str) -> bool:
        self._answer()
        if reference in self.held_images:
            return False
        self.cache.discard(reference)
        self.removed_images.append(reference)
        self.disk_free_bytes += 1
        return True

    async def volumes(self) -> list[Volume]:
        self._answer()
        return list(self.kept_volumes)

    async def remove_volume(self, volume: Volume) -> bool:
        self._answer()
        if volume.in_use:
            return False
        self.kept_volumes.remove(volume)
        return True

    async def blind(self) -> dict[str, str]:
        self._answer()
        return {replica_id: words for replica_id, words in self.sightless.items() if replica_id in self.there}

    def owns(self, pid: int) -> bool | None:
        return None

    async def close(self) -> None:
        return


class FakeProbe:
    """Every container is ready but those named in `missing`, which maps a host to what it lacks."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.asked: list[tuple[Readiness, tuple[str, int]]] = []

    async def __call__(self, readiness: Readiness, address: tuple[str, int]) -> str:
        self.asked.append((readiness, address))
        return self.missing.get(address[0], "")


def assignment(replica_id: str = "r-1", *, image: str = "echo", spec_hash: str = "h1", **more: object) -> Assignment:
    """A small assignment; `more` are fields of Assignment."""
    plain = Assignment(
        replica_id=replica_id,
        workspace="demo",
        spec_hash=spec_hash,
        image=image,
        ports=(8080,),
        readiness=Readiness(8080),
    )
    return replace(plain, **more)  # type: ignore[arg-type]
