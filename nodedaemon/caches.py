"""What a node keeps on its disk from one replica to the next: images that it pulled, and workspaces' volumes; and when
they go.

Images go when the disk is short or something did not fit on it, unused for longest first. Volumes go when their
workspace is gone or has not been here for long, and when all of them together outgrow what the operator allows. Nobody
else's image or volume is ever touched, and none that a container has: the engine itself refuses that.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final, Protocol

import structlog

from nodedaemon.engine import GIB, Assignment, EngineError, Storage, Volume
from nodedaemon.last_use import LastUse
from nodedaemon.replica import either

log = structlog.get_logger()

#: Between two looks at the disk: so long may volumes outgrow their limit unseen.
LOOK_S: Final = 60.0
#: To measure volumes is to walk through them: of the time no more than one part in so many.
LOOK_PAUSES: Final = 20
#: Images removed in one look.
IMAGES_AT_ONCE: Final = 16
#: Volumes on one node.
VOLUMES: Final = 1000
#: A volume that no replica has had for so long goes, even if its workspace lives.
VOLUME_IDLE_S: Final = 14 * 24 * 3600.0
#: For the engine to tell of what has just been ended, and the control plane of what should be.
AGAIN_S: Final = 2.0


class Replicas(Protocol):
    """What is asked of the replicas of this node."""

    def assignments(self) -> Sequence[Assignment] | None:
        """All that should be here or still is; None: not known yet."""

    def end(self, replica_id: str, why: str, *, customers: bool) -> None:
        """End its container and begin anew."""

    def on_full(self, make_room: Callable[[], None]) -> None:
        """Have it called when something did not fit on the disk."""


class Caches:
    """Looks after images and volumes: run `run()` in the daemon's TaskGroup.

    `volumes`: when they were last used. `volume_limit_bytes`: of all of them together; 0: none are allowed.
    `disk_reserve_bytes`: with less free disk images go; 0: never. `image_idle_s`: those not used for so long.
    """

    def __init__(
        self,
        engine: Storage,
        replicas: Replicas,
        volumes: LastUse,
        *,
        volume_limit_bytes: int,
        disk_reserve_bytes: int,
        image_idle_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine = engine
        self._replicas = replicas
        self._images = engine.pulled
        self._volumes = volumes
        self.volume_limit_bytes = volume_limit_bytes
        self._disk_reserve_bytes = disk_reserve_bytes
        self._image_idle_s = image_idle_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._kept: list[Volume] = []
        self._dead: frozenset[str] = frozenset()
        self._news = asyncio.Event()
        self._short = False
        self._tidied = False
        replicas.on_full(self.make_room)

    # What others ask and say.

    def volumes(self) -> Sequence[Volume]:
        """All that are kept here, as of the last look."""
        return self._kept

    def bury(self, workspace_uids: Iterable[str]) -> None:
        """These workspaces are no more, says the control plane each time it answers."""
        self._dead = frozenset(workspace_uids)
        gone = self._dead - _wanted(self._replicas.assignments() or ())
        if any(volume.workspace_uid in gone for volume in self._kept):
            self._news.set()

    def make_room(self) -> None:
        """Something did not fit on the disk: an image goes that may, though the reserve is there."""
        self._short = True
        self._news.set()

    def refusal(self, assignment: Assignment) -> str:
        """Why it must not be started for its volumes, in words; "": it may."""
        if not assignment.mounts:
            return ""
        if not self.volume_limit_bytes:
            return "it needs volumes, and this node's operator allows none"
        if len(self._kept) >= VOLUMES:
            return f"there are {VOLUMES} volumes on this node, and may be no more"
        if (used := _bytes(self._kept)) > self.volume_limit_bytes:
            return f"the volumes on this node hold {_gib(used)} of the {_gib(self.volume_limit_bytes)} that it allows"
        return ""

    # The loop.

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            pause_s = AGAIN_S
            try:
                if (here := self._replicas.assignments()) is not None:
                    await self._look_at_images(here)
                    begun = self._monotonic()
                    again = await self._look_at_volumes(here)
                    taken_s = self._monotonic() - begun
                    pause_s = AGAIN_S if again else max(LOOK_S, LOOK_PAUSES * taken_s)
            except EngineError as error:
                # The replicas' own messages say so too.
                log.debug("caches_not_seen", reason=str(error))
            await either(self._news, self._sleep(pause_s))
            self._news.clear()

    async def _look_at_images(self, here: Sequence[Assignment]) -> None:
        in_use = {assignment.image for assignment in here}
        if not self._tidied:
            # Pulls that a crash cut off: what somebody else pulls under that name later is his.
            gone = [image for image in self._images.oldest() if not await self._engine.has_image(image)]
            await self._forget(self._images, set(gone) - in_use)
            self._tidied = True
        await self._touch(self._images, [image for image in in_use if image in self._images])
        if not self._disk_reserve_bytes:
            return
        short, self._short = self._short, False
        for image in idle(self._images, in_use, self._image_idle_s)[:IMAGES_AT_ONCE]:
            free = (await self._engine.info()).disk_free_bytes
            if free >= self._disk_reserve_bytes and not short:
                return
            if image in {assignment.image for assignment in self._replicas.assignments() or here}:
                continue
            idle_s = round(self._images.idle_s(image))
            if await self._engine.remove_image(image):
                await self._forget(self._images, [image])
                log.info("image_removed", image=image, idle_s=idle_s, disk_free=_gib(free))
                short = False
            else:
                # Somebody else runs it: it is his, too.
                await self._touch(self._images, [image])

    async def _look_at_volumes(self, here: Sequence[Assignment]) -> bool:
        """Returns whether to look again soon."""
        self._kept = (await self._engine.volumes())[:VOLUMES]
        uses = {_key(Volume(one.workspace_uid, mount.name)) for one in here for mount in one.mounts}
        uses |= {_key(volume) for volume in self._kept if volume.in_use or _key(volume) not in self._volumes}
        await self._touch(self._volumes, uses)
        await self._forget(self._volumes, set(self._volumes.oldest()) - uses - set(map(_key, self._kept)))
        # What the control plane wants here is no more dead than it knows.
        dead = self._dead - _wanted(here)
        for volume, why in doomed(self._kept, dead, self._volumes, self.volume_limit_bytes):
            if await self._engine.remove_volume(volume):
                self._kept.remove(volume)
                await self._forget(self._volumes, [_key(volume)])
                log.info("volume_removed", workspace=volume.workspace_uid, volume=volume.name, why=why)
        if (used := _bytes(self._kept)) <= self.volume_limit_bytes:
            return False
        return self._end_largest(
            here, f"all on this node hold {_gib(used)}, {_gib(self.volume_limit_bytes)} are allowed"
        )

    def _end_largest(self, here: Sequence[Assignment], words: str) -> bool:
        """What is in use has outgrown the limit: who holds most must let go."""
        sizes: Counter[str] = Counter()
        for volume in self._kept:
            sizes[volume.workspace_uid] += volume.size_bytes or 0
        ((workspace_uid, size),) = sizes.most_common(1)
        ended = [one for one in here if one.mounts and one.workspace_uid == workspace_uid]
        for assignment in ended:
            why = f"its volumes hold {_gib(size)} and are emptied: {words}"
            self._replicas.end(assignment.replica_id, why, customers=True)
        return bool(ended)

    async def _touch(self, ledger: LastUse, keys: Collection[str]) -> None:
        await self._note(ledger.touch, keys)

    async def _forget(self, ledger: LastUse, keys: Collection[str]) -> None:
        await self._note(ledger.forget, keys)

    async def _note(self, note: Callable[[Iterable[str]], None], keys: Collection[str]) -> None:
        if not keys:
            return
        try:
            await asyncio.to_thread(note, keys)
        except OSError as error:
            # The disk may be full: then all the more must what can go, go. It is known here until the daemon ends.
            log.warning("last_use_not_written", reason=str(error))


def idle(ledger: LastUse, in_use: Collection[str], idle_s: float) -> list[str]:
    """What has not been used for so long, unused for longest first."""
    return [key for key in ledger.oldest() if key not in in_use and ledger.idle_s(key) >= idle_s]


def doomed(
    kept: Sequence[Volume], dead: Collection[str], ledger: LastUse, limit_bytes: int
) -> list[tuple[Volume, str]]:
    """Volumes that are to go, if no container has them, and why: the dead, the idle, and as many as are too much."""
    found = []
    left = _bytes(kept)
    for volume in sorted(kept, key=lambda one: -ledger.idle_s(_key(one))):
        if volume.in_use:
            continue
        if volume.workspace_uid in dead:
            why = "its workspace was deleted"
        elif ledger.idle_s(_key(volume)) >= VOLUME_IDLE_S:
            why = f"no replica has used it for {VOLUME_IDLE_S / 86400:.0f} days"
        elif left > limit_bytes:
            why = f"the volumes hold {_gib(left)} of the {_gib(limit_bytes)} that are allowed"
        else:
            continue
        found.append((volume, why))
        left -= volume.size_bytes or 0
    return found


def _wanted(here: Iterable[Assignment]) -> set[str]:
    return {assignment.workspace_uid for assignment in here}


def _key(volume: Volume) -> str:
    return f"{volume.workspace_uid}/{volume.name}"


def _bytes(volumes: Iterable[Volume]) -> int:
    return sum(volume.size_bytes or 0 for volume in volumes)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
