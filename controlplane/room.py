"""Where there is room for a replica: nodes as placement sees them, less what is placed on them meanwhile. Pure."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from types import TracebackType
from typing import Final, Self

from msgspec.structs import replace
from ngpu.image import comparable, directory

from controlplane import explain
from controlplane.census import Node, Replica, Workspace
from controlplane.explain import Decision
from controlplane.grade import Grade, Health
from controlplane.placement import GpuView, Need, NodeView, Refusals, with_replica
from controlplane.sites import Sites
from controlplane.spec import Spec

#: Of a GPU that its node does not know.
MISSING: Final = Health(Grade.QUARANTINED, "missing from the node's inventory", evacuate=True)


class Room:
    """What is left of the nodes in the course of one plan, which is the block.

    After it the sites are as they were: whether the plan comes true the next one sees from what is on disk.
    """

    def __init__(self, sites: Sites, *, time: datetime, image_bytes: Callable[[str], int | None]) -> None:
        self._sites = sites
        self._time = time
        self._image_bytes = image_bytes
        self._before: dict[str, NodeView] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for view in self._before.values():
            self._sites.put(view)

    def find(self, workspace: Workspace, replica_id: str, *, without: Collection[str] = ()) -> Replica | Decision:
        """A new replica of the workspace, whose room is taken from now on; or why there is none.

        `without`: addresses of nodes that are not considered.
        """
        need = need_of(workspace, self._image_bytes)
        found = self._sites.place(need, time=self._time, subject=f"replica {replica_id}", without=without)
        if isinstance(found, Refusals):
            return replace(found.decision, subject=f"replica of {workspace.name}")
        view = self._sites[found.node_addr]
        self._before.setdefault(view.addr, view)
        self._sites.put(with_replica(need, view, found.gpu_ids))
        return Replica(
            id=replica_id,
            workspace_uid=workspace.uid,
            node_addr=found.node_addr,
            generation=workspace.generation,
            gpu_ids=found.gpu_ids,
            create_time=self._time,
            explanation=explain.encode(found.decision),
        )


def need_of(workspace: Workspace, image_bytes: Callable[[str], int | None]) -> Need:
    """What one replica of the workspace needs."""
    spec = workspace.spec
    image = comparable(spec.image)
    return Need(
        workspace_uid=workspace.uid,
        image=image,
        directory=directory(spec.image),
        gpu=spec.gpu,
        cpus=spec.cpus,
        memory_bytes=spec.memory_bytes,
        replicas=workspace.wanted,
        image_bytes=image_bytes(image),
        volumes=bool(spec.volumes),
    )


def newly_wanted(before: Workspace | None, after: Workspace) -> int:
    """How many replicas of its kind a workspace asks for that it did not ask for before; None: there was none."""
    if before is None or need_of(before, _unknown).shape != need_of(after, _unknown).shape:
        return after.wanted
    return max(0, after.wanted - before.wanted)


def _unknown(_image: str) -> int | None:
    return None


def looks_alike(one: Node, other: Node) -> bool:
    """Does `view_of` see no difference? What a node says again is the same object again."""
    return (
        one.inventory is other.inventory
        and one.health is other.health
        and one.images is other.images
        and one.said is other.said
        and (one.name, one.availability, one.connected) == (other.name, other.availability, other.connected)
        and (one.failures, _tasks(one)) == (other.failures, _tasks(other))
    )


def _tasks(node: Node) -> int | None:
    """How many it holds; None: it has not reported."""
    return None if node.report is None else len(node.report.attempt_ids)


def view_of(
    node: Node, replicas: Sequence[Replica], spec_of: Callable[[Replica], Spec], time: datetime, *, lost: bool = False
) -> NodeView:
    """The node as placement sees it: what it has, less what the rows of its replicas hold.

    `spec_of`: what a replica is made of. `lost`: the node is given up, whatever its session says.
    """
    specs = [spec_of(replica) for replica in replicas]
    held: set[str] = set()
    shared: Counter[str] = Counter()
    for replica, spec in zip(replicas, specs, strict=True):
        if spec.gpu.share:
            shared.update(dict.fromkeys(replica.gpu_ids, spec.gpu.share))
        else:
            held.update(replica.gpu_ids)
    rows = {replica.id for replica in replicas}
    slots = sum(said.capacity for said in node.said.values())
    tasks = _tasks(node) or 0
    return NodeView(
        addr=node.addr,
        name=node.name,
        connected=node.connected and node.report is not None and not lost,
        availability=node.availability,
        engine=node.inventory.engine,
        gpus=tuple(
            GpuView(
                id=gpu.id,
                model=gpu.model,
                memory_bytes=gpu.memory_bytes,
                index=gpu.index,
                grade=node.health.get(gpu.id, MISSING).grade,
                free=gpu.id not in held,
                shared=shared[gpu.id],
            )
            for gpu in node.inventory.gpus
        ),
        cpus=node.inventory.cpus,
        cpus_free=node.inventory.cpus - sum(spec.cpus for spec in specs),
        memory_free_bytes=node.inventory.memory_bytes - sum(spec.memory_bytes for spec in specs),
        disk_free_bytes=node.inventory.disk_free_bytes,
        images=node.images,
        load=min(1.0, tasks / slots) if slots else 0.0,
        failures=node.failures,
        uptime_days=(time - node.enroll_time).total_seconds() / 86_400,
        replicas=len(replicas),
        orphans=sum(replica_id not in rows for replica_id in node.said),
        here=Counter(replica.workspace_uid for replica in replicas if replica.active),
        volumes=node.inventory.volume_limit_bytes > 0,
        allowed_images=node.inventory.allowed_images,
    )
