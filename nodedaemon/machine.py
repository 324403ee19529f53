"""What this machine has besides GPUs: processors, memory, the engine and its images; asked again now and then."""

import asyncio
import importlib.metadata
import os
import platform
from typing import Final

import structlog

from nodedaemon.engine import CachedImage, Engine, EngineError, EngineInfo

log = structlog.get_logger()

#: How often engine and images are asked for.
SURVEY_S: Final = 15.0
#: Most images told of.
IMAGES: Final = 500


class Machine:
    """`engine` and `images` are as of the last survey; the rest does not change while the daemon runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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

    async def survey(self) -> None:
        """Ask the engine. What it said last stays, should it not answer: the replicas' reports say that it is down."""
        try:
            self.engine = await self._engine.info()
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
