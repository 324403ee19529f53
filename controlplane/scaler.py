"""Makes the number of replicas follow the load, for the workspaces that want that: looks, asks `autoscale`, writes."""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from controlplane import autoscale
from controlplane.autoscale import Course, Load
from controlplane.errors import NgpuError
from controlplane.fleet import Fleet

_log = structlog.get_logger(__name__)

#: How often is looked: so long at most a call waits until a replica is begun for it.
LOOK_S: Final = 1.0
#: After a failed write.
RETRY_S: Final = 1.0


class Tasks(Protocol):
    """What is asked of the dispatcher."""

    def load(self, workspace_uid: str) -> Load:
        """How the workspace is used now."""


class Scaler:
    """One for the control plane. The fleet must have been loaded."""

    def __init__(self, fleet: Fleet, tasks: Tasks, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._tasks = tasks
        self._monotonic = monotonic
        #: By workspace. Not on disk: after a restart idle times and lulls are counted anew.
        self._courses: dict[str, Course] = {}

    async def run(self) -> None:
        """Look for ever, until cancelled."""
        while True:
            try:
                await self.look()
                await asyncio.sleep(LOOK_S)
            except NgpuError as error:
                _log.warning("scaling_failed", error=type(error).__name__, reason=str(error))
                await asyncio.sleep(RETRY_S)

    async def look(self) -> None:
        """Once. Raises as the store does."""
        now_s = self._monotonic()
        following = [workspace for workspace in self._fleet.workspaces() if workspace.spec.scale.max_replicas]
        self._courses = {
            workspace.uid: self._courses.get(workspace.uid) or autoscale.begun(now_s) for workspace in following
        }
        for workspace in following:
            spec, course = workspace.spec, self._courses[workspace.uid]
            load = self._tasks.load(workspace.uid)
            target, course, why = autoscale.scaled(
                spec.scale, spec.concurrency, workspace.deployment.target, load, course, now_s=now_s
            )
            if target != workspace.deployment.target:
                await self._fleet.follow_load(workspace.uid, target)
                _log.info("workspace_followed_load", workspace=workspace.uid, replicas=target, reason=why)
            self._courses[workspace.uid] = course
