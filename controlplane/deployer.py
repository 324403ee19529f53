"""Desired replicas against reported ones: the loop that applies `rollout.plan`, and the door for heartbeats.

Public signatures first; see the class.
"""

from typing import Protocol

import msgspec

from controlplane.explain import Decision
from controlplane.report import Report
from controlplane.spec import Spec


class Tasks(Protocol):
    """What the deployer tells the dispatcher, and the one thing it asks."""

    def set_capacity(self, replica_id: str, workspace_uid: str, node_addr: str, capacity: int) -> None: ...
    def replica_gone(self, replica_id: str) -> None: ...
    def node_lost(self, node_addr: str) -> None: ...
    def workspace_deleted(self, uid: str) -> None: ...
    def in_flight(self, replica_id: str) -> int:
        """Attempts that run there or may: a drained replica stops at 0."""


class Assignment(msgspec.Struct, frozen=True):
    """A replica that should run on a node (node.proto)."""

    replica_id: str
    workspace_name: str
    generation: int
    spec: Spec
    gpu_ids: tuple[str, ...]
    spec_hash: str
    draining: bool


class Deployer:
    """Keeps as many replicas of each workspace as are wanted."""

    async def run(self) -> None:
        """Plan and apply, woken by changes and at latest every 5 s, until cancelled."""

    def session_up(self, node_addr: str, ip: str) -> int:
        """A Heartbeat stream has begun. Gives the session's number."""

    def session_down(self, node_addr: str, clean: bool, session: int | None = None) -> None:
        """It has ended; `clean`: with a goodbye. Ignored if `session` is given and a newer one is up."""

    def report(self, node_addr: str, report: Report) -> None:
        """All that is on a node: one Heartbeat message."""

    def desired(self, node_addr: str) -> list[Assignment]:
        """All that should be on it. Changes are told by `fleet.node_changes`."""

    def explain(self, workspace: str) -> tuple[str, tuple[Decision, ...]]:
        """The whole in words, and the decisions, newest first. Raises NotFound."""
