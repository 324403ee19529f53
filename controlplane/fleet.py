"""The fleet as it stands: workspaces, routes, nodes and replicas in memory, loaded once, written through.

Rule of this file: nothing is shown before it is on disk. A change is checked against the picture, written, and only then
made in the picture, one at a time under a lock; so that what a caller was told survives kill -9, and two callers never
both get the same name. What nodes report (sessions, reports, health) lives in memory and is stated anew by the nodes.
"""

import enum
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

import msgspec

from controlplane.changes import Changes
from controlplane.explain import Decision
from controlplane.health import Health
from controlplane.model import Availability
from controlplane.report import Inventory, ReplicaReport, Report
from controlplane.spec import Spec


class Workspace(msgspec.Struct, frozen=True):
    """A workspace. `unplaced`: why fewer replicas run than wanted; None: none are missing."""

    uid: str
    id: str
    spec: Spec
    generation: int
    create_time: datetime
    delete_time: datetime | None = None
    unplaced: Decision | None = None

    @property
    def name(self) -> str: ...
    @property
    def wanted(self) -> int:
        """Replicas wanted: none once it is being deleted."""


class Route(msgspec.Struct, frozen=True):
    """A public name for a path of a workspace. `port` is a declared one, `path` begins with "/"."""

    name: str
    workspace_uid: str
    port: int
    path: str
    create_time: datetime


class Replica(msgspec.Struct, frozen=True):
    """One container of a workspace on one node, from its placement until it is known to be gone."""

    id: str
    workspace_uid: str
    node_addr: str
    generation: int
    gpu_ids: tuple[str, ...]
    create_time: datetime
    drain_time: datetime | None = None
    stop_time: datetime | None = None
    #: explain.Decision as JSON.
    explanation: bytes = b""

    @property
    def active(self) -> bool:
        """Wanted, and takes tasks."""


class Node(msgspec.Struct, frozen=True):
    """A node that has enrolled, and what it last said.

    `report` is None until it has reported since this start; `health` is by GPU id, in the inventory's order.
    """

    addr: str
    name: str
    enroll_time: datetime
    availability: Availability = Availability.OPEN
    last_seen_time: datetime | None = None
    revoke_time: datetime | None = None
    ip: str = ""
    inventory: Inventory = Inventory()
    connected: bool = False
    report: Report | None = None
    health: Mapping[str, Health] = {}


class Fleet:
    """The picture and every change of it."""

    #: Touched with a workspace's uid when it or one of its replicas changes.
    workspace_changes: Changes
    #: Touched with a node's address when what it should run, its availability or its standing changes.
    node_changes: Changes

    async def load(self) -> None:
        """Read the picture from the store; once, before anything else."""

    # workspaces
    async def create_workspace(self, spec: Spec) -> Workspace:
        """Raises InvalidArgument with every fault, Conflict if the name is taken."""

    async def scale_workspace(self, key: str, replicas: int) -> Workspace: ...
    async def delete_workspace(self, key: str) -> Workspace: ...
    def workspace(self, key: str) -> Workspace:
        """By id, uid or (living ones) name. Deleted ones are found by id and uid. Raises NotFound."""

    def workspaces(self, *, deleted: bool = False) -> list[Workspace]:
        """By name; with `deleted` also those."""

    def workspace_of(self, id: str) -> str | None:
        """The uid of the workspace with that id (its credential), deleted or not: for Access."""

    # routes
    async def publish_route(self, name: str, workspace: str, *, port: int = 0, path: str = "") -> Route:
        """Give or move a public name. Raises InvalidArgument, NotFound."""

    async def delete_route(self, name: str) -> None: ...
    def route(self, name: str) -> Route | None: ...
    def routes(self) -> list[Route]: ...

    # nodes
    async def enroll_node(self, addr: str, name: str, *, ip: str = "", token_id: str = "") -> Node:
        """Make a node known; uses the one-time token up in the same transaction. Its name is made unique. Idempotent."""

    async def set_availability(self, key: str, availability: Availability) -> Node: ...
    async def revoke_node(self, key: str) -> Node: ...
    def node(self, key: str) -> Node:
        """By address (any case) or name. Raises NotFound."""

    def nodes(self, *, revoked: bool = False) -> list[Node]:
        """By name."""

    # replicas
    def replica(self, replica_id: str) -> Replica | None: ...
    def replicas_of(self, workspace_uid: str) -> list[Replica]:
        """All not known to be gone, oldest first."""

    def replicas_on(self, node_addr: str) -> list[Replica]: ...
    def replica_report(self, replica: Replica) -> ReplicaReport:
        """How it stands: as its node last said, ASSIGNED before that, LOST while the node is not connected."""
