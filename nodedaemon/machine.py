"""What this machine has besides GPUs: processors, memory, the engine and its images; asked again now and then.

And which images its operator lets it run.
"""

import asyncio
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import structlog
from ngpu.image import allowed

from nodedaemon.engine import CachedImage, Engine, EngineError, EngineInfo

log = structlog.get_logger()

#: How often engine and images are asked for.
SURVEY_S: Final = 15.0
#: A change of the disk's free space by less is none: it never stands still, and each change is told.
DISK_STEP_BYTES: Final = 64 * 1024**2
#: Most images told of.
IMAGES: Final = 500


class Machine:
    """`engine` and `images` are as of the last survey; the rest does not change while the daemon runs.

    `allowed_images`: patterns of images that may run here; none: all may.
    """

    def __init__(self, engine: Engine, *, allowed_images: Sequence[str] = ()) -> None:
        self._engine = engine
        self.allowed_images = allowed_images
        self.cpus = float(len(os.sched_getaffinity(0)))
        self.memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.os = operating_system()
        self.daemon_version = importlib.metadata.version("ngpu")
        self.engine = EngineInfo(name="")
        self.images: list[CachedImage] = []

    async def run(self) -> None:
        """Survey every SURVEY_S, until cancelled. The first survey is the caller's."""
        while True:
            await asyncio.sleep(SURVEY_S)
            await self.survey()

    def refusal(self, image: str) -> str:
        """Why the image may not run here; empty: it may."""
        if allowed(image, self.allowed_images):
            return ""
        return f"the operator of this node does not allow {image}, only {', '.join(self.allowed_images)}"

    async def survey(self) -> None:
        """Ask the engine. What it said last stays, should it not answer: the replicas' reports say that it is down."""
        try:
            now = await self._engine.info()
            if self.engine.name and abs(now.disk_free_bytes - self.engine.disk_free_bytes) < DISK_STEP_BYTES:
                now = replace(now, disk_free_bytes=self.engine.disk_free_bytes)
            self.engine = now
            self.images = (await self._engine.images())[:IMAGES]
        except EngineError as fault:
            log.debug("survey_failed", reason=str(fault))


def operating_system() -> str:
    """Distribution and kernel, in words."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    return f"{name}, kernel {platform.release()}"
