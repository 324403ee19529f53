"""What the fleet is made of, as plain frozen values: workspaces, routes, nodes, replicas; and their rows."""

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

import msgspec

from controlplane import explain, model
from controlplane.explain import Decision
from controlplane.grade import Health
from controlplane.health import Memory, moved
from controlplane.model import Availability
from controlplane.report import Inventory, ReplicaReport, Report
from controlplane.spec import Spec

_EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})


class Version(msgspec.Struct, frozen=True):
    """What a workspace was in an earlier generation."""

    generation: int
    spec: Spec


class Move(msgspec.Struct, frozen=True):
    """A replica was taken from a node on which it did not come up."""

    time: datetime
    node_addr: str


class Deployment(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is remembered of how a workspace came to be as it is.

    `versions`: other generations that replicas are of, or that may be returned to. `good`: the generation that served
    last, the current one once it does; 0: none has. `fault`: why the last update was taken back, in words. `last`: the
    highest generation ever given. `target`: how many replicas the load calls for, where they follow it.
    `moves`: the last ones.
    """

    versions: tuple[Version, ...] = ()
    good: int = 0
    fault: str = ""
    last: int = 1
    target: int = 0
    moves: tuple[Move, ...] = ()


class Workspace(msgspec.Struct, frozen=True):
    """What a customer brought. `unplaced`: why fewer replicas run than wanted; None: none are missing."""

    uid: str
    id: str
    spec: Spec
    generation: int
    create_time: datetime
    delete_time: datetime | None = None
    unplaced: Decision | None = None
    deployment: Deployment = Deployment()

    def __repr__(self) -> str:
        """Without its id, which is its credential."""
        return f"Workspace(uid={self.uid!r}, name={self.name!r})"

    @property
    def name(self) -> str:
        """The customer's name for it."""
        return self.spec.name

    @property
    def deleted(self) -> bool:
        """It is being deleted, or gone."""
        return self.delete_time is not None

    @property
    def wanted(self) -> int:
        """How many replicas there should be."""
        if self.deleted:
            return 0
        scale = self.spec.scale
        if not scale.max_replicas:
            return self.spec.replicas
        return min(max(self.deployment.target, scale.min_replicas), scale.max_replicas)

    @property
    def returns_to(self) -> int:
        """The generation to return to if the current one does not come up; 0: there is none."""
        good = self.deployment.good
        return good if good != self.generation else 0

    def spec_at(self, generation: int) -> Spec:
        """What a replica of that generation is made of."""
        for version in self.deployment.versions if generation != self.generation else ():
            if version.generation == generation:
                return version.spec
        return self.spec


class Route(msgspec.Struct, frozen=True):
    """A public name for a path of a workspace. `port` is one of its declared ones; `path` begins with "/"."""

    name: str
    workspace_uid: str
    port: int
    path: str
    create_time: datetime


class Replica(msgspec.Struct, frozen=True):
    """One container of a workspace on one node, from its placement until it is known to be gone.

    `explanation`: why there, an explain.Decision as JSON. `stop_report`: its node's `reports` when it was stopped; not
    on disk, for the count begins anew with us.
    """

    id: str
    workspace_uid: str
    node_addr: str
    generation: int
    gpu_ids: tuple[str, ...]
    create_time: datetime
    drain_time: datetime | None = None
    stop_time: datetime | None = None
    gone_time: datetime | None = None
    explanation: bytes = b""
    stop_report: int = 0

    @property
    def active(self) -> bool:
        """Wanted, and open for tasks."""
        return self.drain_time is None and self.stop_time is None


class Node(msgspec.Struct, frozen=True):
    """A node that has enrolled, and what it last said.

    `heard_s`: monotonic seconds of its last sign of life, or of our own start. `report`: its last since our start, the
    `reports`-th; `said`: that report's replicas by id. `images`: its images' sizes by name, as in placement. `health`:
    by GPU id, in the inventory's order; GPUs that went missing last; `memories`: what that is judged by. `failures`:
    how often it was lost. `doomed`: its replicas whose container must start anew.
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
    heard_s: float = 0.0
    report: Report | None = None
    reports: int = 0
    said: Mapping[str, ReplicaReport] = _EMPTY
    images: Mapping[str, int] = _EMPTY
    health: Mapping[str, Health] = _EMPTY
    memories: Mapping[str, Memory] = _EMPTY
    failures: int = 0
    doomed: frozenset[str] = frozenset()

    @property
    def revoked(self) -> bool:
        """It was cut off for good."""
        return self.revoke_time is not None

    @property
    def gpu_tests(self) -> dict[str, int]:
        """The tests that it is asked for: their numbers by GPU id."""
        return {gpu_id: memory.tests.number for gpu_id, memory in self.memories.items() if memory.tests.number}


class Past(msgspec.Struct, frozen=True, omit_defaults=True):
    """What of a node's past is on disk, its times as seconds since 1970."""

    gpus: Mapping[str, Memory] = {}
    failures: int = 0
    doomed: frozenset[str] = frozenset()


_deployment = msgspec.json.Decoder(Deployment)
_past = msgspec.json.Decoder(Past)
_spec = msgspec.json.Decoder(Spec)
_inventory = msgspec.json.Decoder(Inventory)
_gpu_ids = msgspec.json.Decoder(tuple[str, ...])
_json = msgspec.json.Encoder()


def workspace_of(row: model.Workspace) -> Workspace:
    """The value of a row."""
    return Workspace(
        uid=row.uid,
        id=row.id,
        spec=_spec.decode(row.spec_json),
        generation=row.generation,
        create_time=row.create_time,
        delete_time=row.delete_time,
        unplaced=explain.decode(row.unplaced_json),
        deployment=_deployment.decode(row.deployment_json),
    )


def workspace_row(value: Workspace) -> model.Workspace:
    """The row of a value."""
    return model.Workspace(
        uid=value.uid,
        id=value.id,
        name=value.name,
        spec_json=_json.encode(value.spec),
        generation=value.generation,
        create_time=value.create_time,
        delete_time=value.delete_time,
        unplaced_json=None if value.unplaced is None else explain.encode(value.unplaced),
        deployment_json=_json.encode(value.deployment),
    )


def route_of(row: model.Route) -> Route:
    """The value of a row."""
    return Route(row.name, row.workspace_uid, row.port, row.path, row.create_time)


def route_row(value: Route) -> model.Route:
    """The row of a value."""
    return model.Route(**msgspec.structs.asdict(value))


def node_of(row: model.Node, now: datetime, now_s: float) -> Node:
    """The value of a row; it is not connected yet. `now`, `now_s`: the same moment by both clocks."""
    past, inventory = _past.decode(row.health_json), _inventory.decode(row.inventory_json)
    memories = {gpu.id: past.gpus.get(gpu.id, Memory()) for gpu in inventory.gpus}
    # GPUs that have gone missing are remembered; those that are there keep the inventory's order.
    memories |= {gpu_id: memory for gpu_id, memory in past.gpus.items() if gpu_id not in memories}
    memories = {gpu_id: moved(memory, now_s - now.timestamp()) for gpu_id, memory in memories.items()}
    return Node(
        addr=row.addr,
        name=row.name,
        enroll_time=row.enroll_time,
        availability=Availability(row.availability),
        last_seen_time=row.last_seen_time,
        revoke_time=row.revoke_time,
        ip=row.ip,
        inventory=inventory,
        heard_s=now_s,
        health={gpu_id: memory.health for gpu_id, memory in memories.items()},
        memories=memories,
        failures=past.failures,
        doomed=past.doomed,
    )


def node_row(value: Node, now: datetime, now_s: float) -> model.Node:
    """The row of a value. `now`, `now_s`: the same moment by both clocks."""
    by_s = now.timestamp() - now_s
    past = Past(
        {gpu_id: moved(memory, by_s) for gpu_id, memory in value.memories.items()}, value.failures, value.doomed
    )
    return model.Node(
        addr=value.addr,
        name=value.name,
        availability=value.availability,
        enroll_time=value.enroll_time,
        last_seen_time=value.last_seen_time,
        revoke_time=value.revoke_time,
        ip=value.ip,
        inventory_json=_json.encode(value.inventory),
        health_json=_json.encode(past),
    )


def replica_of(row: model.Replica) -> Replica:
    """The value of a row."""
    return Replica(
        id=row.id,
        workspace_uid=row.workspace_uid,
        node_addr=row.node_addr,
        generation=row.generation,
        gpu_ids=_gpu_ids.decode(row.gpu_ids_json),
        create_time=row.create_time,
        drain_time=row.drain_time,
        stop_time=row.stop_time,
        gone_time=row.gone_time,
        explanation=row.explanation_json,
    )


def replica_row(value: Replica) -> model.Replica:
    """The row of a value."""
    return model.Replica(
        id=value.id,
        workspace_uid=value.workspace_uid,
        node_addr=value.node_addr,
        generation=value.generation,
        gpu_ids_json=_json.encode(value.gpu_ids),
        create_time=value.create_time,
        drain_time=value.drain_time,
        stop_time=value.stop_time,
        gone_time=value.gone_time,
        explanation_json=value.explanation,
    )
