"""Where there is room for a replica: nodes as placement sees them, less what is placed on them meanwhile. Pure."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Final

from msgspec.structs import replace

from controlplane import explain, placement
from controlplane.census import Node, Replica, Workspace
from controlplane.explain import Decision
from controlplane.grade import Grade, Health
from controlplane.image import comparable, directory
from controlplane.placement import GpuView, Need, NodeView, Policy
from controlplane.spec import Spec

#: Of a GPU that its node does not know.
MISSING: Final = Health(Grade.QUARANTINED, "missing from the node's inventory", evacuate=True)


class Room:
    """What is left of the nodes in the course of one plan."""

    def __init__(
        self,
        views: Mapping[str, NodeView],
        *,
        time: datetime,
        image_bytes: Callable[[str], int | None],
        policy: Policy,
    ) -> None:
        self._views = dict(views)
        self._time = time
        self._image_bytes = image_bytes
        self._policy = policy

    def find(self, workspace: Workspace, replica_id: str, *, without: Collection[str] = ()) -> Replica | Decision:
        """A new replica of the workspace, whose room is taken from now on; or why there is none.

        `without`: addresses of nodes that are not considered.
        """
        need = need_of(workspace, self._image_bytes)
        views = [view for view in self._views.values() if view.addr not in without] if without else self._views.values()
        found = placement.place(need, views, time=self._time, subject=f"replica {replica_id}", policy=self._policy)
        if isinstance(found, placement.Refusals):
            return replace(found.decision, subject=f"replica of {workspace.name}")
        self._views[found.node_addr] = _taken(self._views[found.node_addr], need, found.gpu_ids)
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
    )


def view_of(node: Node, replicas: Sequence[Replica], spec_of: Callable[[Replica], Spec], time: datetime) -> NodeView:
    """The node as placement sees it: what it has, less what the rows of its replicas hold.

    `spec_of`: what a replica is made of.
    """
    specs = [spec_of(replica) for replica in replicas]
    held = {gpu_id for replica in replicas for gpu_id in replica.gpu_ids}
    rows = {replica.id for replica in replicas}
    slots = sum(said.capacity for said in node.said.values())
    tasks = len(node.report.attempt_ids) if node.report else 0
    return NodeView(
        addr=node.addr,
        name=node.name,
        connected=node.connected and node.report is not None,
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
    )


def _taken(view: NodeView, need: Need, gpu_ids: Sequence[str]) -> NodeView:
    """The node with one more replica."""
    return replace(
        view,
        gpus=tuple(replace(gpu, free=False) if gpu.id in gpu_ids else gpu for gpu in view.gpus),
        cpus_free=view.cpus_free - need.cpus,
        memory_free_bytes=view.memory_free_bytes - need.memory_bytes,
        replicas=view.replicas + 1,
        here={**view.here, need.workspace_uid: view.here.get(need.workspace_uid, 0) + 1},
    )
