"""Makes the number of replicas follow the load, for the workspaces that want that: looks, asks `autoscale`, writes."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from controlplane import autoscale
from controlplane.autoscale import Course, Load
from controlplane.errors import NgpuError
from controlplane.fleet import Fleet

_log = structlog.get_logger(__name__)

#: How often all are looked at. One that tasks call for while it has no replicas is looked at at once.
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
        look_at = self._monotonic()
        while True:
            called = self._fleet.take_called()
            try:
                if self._monotonic() < look_at:
                    for uid in called:
                        await self._look_at(uid)
                else:
                    await self.look()
                    look_at = self._monotonic() + LOOK_S
            except NgpuError as error:
                _log.warning("scaling_failed", error=type(error).__name__, reason=str(error))
                await asyncio.sleep(RETRY_S)
                # At all, those that were called for among them.
                look_at = self._monotonic()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(look_at - self._monotonic()):
                    await self._fleet.calls.wait()

    async def look(self) -> None:
        """Once, at all. Raises as the store does."""
        following = [one.uid for one in self._fleet.workspaces() if one.spec.scale.max_replicas]
        self._courses = {uid: self._course(uid) for uid in following}
        for uid in following:
            await self._look_at(uid)

    def _course(self, uid: str) -> Course:
        return self._courses.get(uid) or autoscale.begun(self._monotonic())

    async def _look_at(self, uid: str) -> None:
        # As it is now: it may have changed while another's number was written.
        workspace = self._fleet.workspace(uid)
        if workspace.deleted:
            return
        spec, load = workspace.spec, self._tasks.load(uid)
        target, course, why = autoscale.scaled(
            spec.scale,
            spec.concurrency,
            workspace.deployment.target,
            load,
            self._course(uid),
            now_s=self._monotonic(),
        )
        if target != workspace.deployment.target:
            await self._fleet.follow_load(uid, target)
            _log.info("workspace_followed_load", workspace=uid, replicas=target, reason=why)
        self._courses[uid] = course
