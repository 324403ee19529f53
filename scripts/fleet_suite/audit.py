"""What must hold of a fleet at every moment, and once all is calm. Pure: values in, faults in words out."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ngpu.v1 import fleet_pb2, node_pb2, workspace_pb2

#: Thousandths of a GPU.
WHOLE: Final = 1000
READY: Final = workspace_pb2.REPLICA_STATE_READY
BACKOFF: Final = workspace_pb2.REPLICA_STATE_BACKOFF
#: How much longer a replica may stand still that says why.
PATIENCE: Final = 3
#: What sums of fractions of processors may be off.
ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class Held:
    """What one replica holds on its node: so many thousandths of each of its GPUs (WHOLE: nobody else has any)."""

    replica: str
    node: str
    gpu_ids: tuple[str, ...]
    share: int
    cpus: float
    memory_bytes: int


@dataclass(frozen=True)
class Has:
    """What a node has."""

    name: str
    gpu_ids: frozenset[str]
    cpus: float
    memory_bytes: int


def overcommitted(held: Iterable[Held], nodes: Mapping[str, Has]) -> list[str]:
    """Every GPU and node of which more is held than there is."""
    faults = []
    gpus: dict[str, list[Held]] = defaultdict(list)
    on: dict[str, list[Held]] = defaultdict(list)
    for one in held:
        on[one.node].append(one)
        for gpu_id in one.gpu_ids:
            gpus[gpu_id].append(one)
    for gpu_id, holders in gpus.items():
        taken = sum(one.share for one in holders)
        if taken > WHOLE:
            faults.append(f"{gpu_id} has {taken} thousandths taken, by {', '.join(one.replica for one in holders)}")
        faults += [
            f"{one.replica} holds {gpu_id}, which is not its node's"
            for one in holders
            if one.node not in nodes or gpu_id not in nodes[one.node].gpu_ids
        ]
    for addr, there in on.items():
        node = nodes.get(addr)
        if node is None:
            continue
        cpus, memory = sum(one.cpus for one in there), sum(one.memory_bytes for one in there)
        if cpus > node.cpus + ROUNDING:
            faults.append(f"{node.name} has {node.cpus:g} processors, of which {cpus:g} are promised")
        if memory > node.memory_bytes:
            faults.append(f"{node.name} has {node.memory_bytes} bytes of memory, of which {memory} are promised")
    return faults


@dataclass
class Stuck:
    """Watches replicas: one that has not moved for `limit_s` is READY or says why; PATIENCE times that is too long.

    Only one that waits for its next start may take longer, and one whose node is away.
    """

    limit_s: float
    _since: dict[str, tuple[float, tuple[object, ...]]] = field(default_factory=dict)

    def seen(self, now: float, replicas: Iterable[workspace_pb2.Replica], connected: Iterable[str]) -> list[str]:
        """Those that are stuck, in words. To be told of every look."""
        faults = []
        there: dict[str, tuple[float, tuple[object, ...]]] = {}
        up = set(connected)
        for one in replicas:
            stands: tuple[object, ...] = (one.state, one.progress, one.message, one.restarts, one.node_addr in up)
            since, before = self._since.get(one.id, (now, stands))
            since = since if before == stands else now
            there[one.id] = since, stands
            if one.state == READY or one.node_addr not in up:
                continue
            still_s = now - since
            if still_s > self.limit_s * (PATIENCE if one.message else 1) and not (one.message and one.state == BACKOFF):
                state = workspace_pb2.ReplicaState.Name(one.state).removeprefix("REPLICA_STATE_")
                said = one.message or "nothing"
                faults.append(f"{one.id} on {one.node_name} is {state} at {one.progress} % too long; it says: {said}")
        self._since = there
        return faults


def unexplained(name: str, lacks: int, message: str, explained: fleet_pb2.ExplainResponse) -> list[str]:
    """What is not said of a workspace that `lacks` so many replicas, which are on no node."""
    faults = []
    if not message:
        faults.append(f"{name} lacks {lacks} replicas, and its message is empty")
    if not any(not one.chosen and one.refusals for one in explained.decisions):
        faults.append(f"{name} lacks {lacks} replicas, and nothing says which node was refused why")
    return faults


def room_for(spec: workspace_pb2.WorkspaceSpec, nodes: Sequence[fleet_pb2.Node], held: Iterable[Held]) -> list[str]:
    """Nodes that have room for one more replica of that kind, by name: computed anew, not as placement does."""
    on: dict[str, list[Held]] = defaultdict(list)
    for one in held:
        on[one.node].append(one)
    wants = spec.gpu.share_milli or WHOLE
    found = []
    for node in nodes:
        if not node.connected or node.availability != fleet_pb2.AVAILABILITY_OPEN:
            continue
        taken: Counter[str] = Counter()
        for one in on[node.addr]:
            taken.update(dict.fromkeys(one.gpu_ids, one.share))
        good = {one.gpu_id for one in node.gpu_health if one.grade != fleet_pb2.GRADE_QUARANTINED}
        free = [
            gpu
            for gpu in node.inventory.gpus
            if gpu.id in good and taken[gpu.id] + wants <= WHOLE and _is_model(gpu, spec.gpu.model)
        ]
        cpus = node.inventory.cpus - sum(one.cpus for one in on[node.addr])
        memory = node.inventory.memory_bytes - sum(one.memory_bytes for one in on[node.addr])
        if len(free) >= spec.gpu.count and cpus >= spec.cpus and memory >= spec.memory_bytes:
            found.append(node.name)
    return found


def _is_model(gpu: node_pb2.Gpu, wanted: str) -> bool:
    return wanted.lower() in gpu.model.lower()


def running_otherwise(status: Mapping[str, Any], held: Iterable[Held]) -> list[str]:
    """Where the containers of the nodes that are up are not the replicas that the control plane has there."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for one in held:
        wanted[one.node].add(one.replica)
    faults = []
    for node in status["nodes"]:
        runs = {one["replica"] for one in node["containers"]}
        faults += [f"{node['name']} runs {one}, which nobody wants" for one in sorted(runs - wanted[node["addr"]])]
        faults += [f"{node['name']} does not run {one}" for one in sorted(wanted[node["addr"]] - runs)]
    return faults
