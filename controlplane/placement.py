"""On which node a replica goes: filters that say why not, then one cost made of named parts. Pure and deterministic.

The policy is two tuples, FILTERS and COSTS, and the weights in Policy. Each filter gives its reason in words, which
become the error message as they stand; the least cost wins, ties go by address (random ties alone were measured to cost
five points of GPU allocation). What a placement costs the shapes of requests still to come (fragmentation) will be a
further part of COSTS once the demand is learnt; packing stands in for it until then.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Final

import msgspec

from controlplane.explain import Candidate, Decision, decide
from controlplane.grade import Grade
from controlplane.model import Availability
from controlplane.spec import GIB, GpuNeed

#: Most replicas on one node: all of them go into one message.
REPLICAS: Final = 100
#: Sums of fractions of a core: what is smaller is rounding.
_CPU_ROUNDING: Final = 1e-6


class GpuView(msgspec.Struct, frozen=True):
    """One GPU as placement sees it. `free`: no replica holds it."""

    id: str
    model: str
    memory_bytes: int
    index: int = 0
    grade: Grade = Grade.OK
    free: bool = True


class NodeView(msgspec.Struct, frozen=True):
    """One node as placement sees it.

    `cpus`: in all; `cpus_free`, `memory_free_bytes`: not promised to replicas. `images`: sizes by normalised reference,
    or by directory with the process engine. `load`: share of its slots that run a task, 0 to 1. `orphans`: containers
    it has that are no replicas of ours. `replicas`: all that are; `here`: by workspace uid.
    """

    addr: str
    name: str = ""
    connected: bool = True
    availability: Availability = Availability.OPEN
    engine: str = "docker"
    gpus: tuple[GpuView, ...] = ()
    cpus: float = 0.0
    cpus_free: float = 0.0
    memory_free_bytes: int = 0
    disk_free_bytes: int = 0
    images: Mapping[str, int] = {}
    load: float = 0.0
    failures: float = 0.0
    uptime_days: float = 0.0
    orphans: int = 0
    replicas: int = 0
    here: Mapping[str, int] = {}


class Need(msgspec.Struct, frozen=True):
    """What one replica needs.

    `image`: a normalised reference; `directory`: what stands for it with the process engine; `image_bytes`: its size if
    any node knows it. `replicas`: how many the workspace wants in all.
    """

    workspace_uid: str
    image: str
    directory: str = ""
    gpu: GpuNeed = GpuNeed()
    cpus: float = 0.0
    memory_bytes: int = 0
    replicas: int = 1
    image_bytes: int | None = None


class Policy(msgspec.Struct, frozen=True):
    """The weights of COSTS, and what the filters leave room for."""

    leftover: float = 0.05
    image: float = 0.02
    image_per_gib: float = 0.004
    #: Assumed of an image that no node has yet.
    image_gib: float = 5.0
    load: float = 0.05
    degraded: float = 0.3
    unreliable: float = 0.15
    crowded: float = 0.10
    #: Disk that an image must leave free.
    disk_reserve_bytes: int = GIB


#: The policy unless told otherwise.
DEFAULT_POLICY: Final = Policy()


class Placement(msgspec.Struct, frozen=True):
    """Where it goes."""

    node_addr: str
    gpu_ids: tuple[str, ...]
    decision: Decision


class Refusals(msgspec.Struct, frozen=True):
    """It goes nowhere; `decision.refusals` counts why."""

    decision: Decision


@lru_cache(maxsize=4096)
def model_matches(wanted: str, model: str) -> bool:
    """Has the model's name all words of `wanted`? "NVIDIA GeForce RTX 4090" has "rtx 4090"; "RTX 40900" has not."""
    return _words_of(wanted) <= _words_of(model)


def _words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


# -- Filters: "" or why not.

Filter = Callable[[Need, NodeView, Policy], str]


def is_connected(_need: Need, node: NodeView, _policy: Policy) -> str:
    """The node has a session."""
    return "" if node.connected else "not connected"


def is_open(_need: Need, node: NodeView, _policy: Policy) -> str:
    """The operator lets it take new replicas."""
    if node.availability is Availability.OPEN:
        return ""
    return "cordoned" if node.availability is Availability.CORDONED else "draining"


def is_tidy(_need: Need, node: NodeView, _policy: Policy) -> str:
    """Nothing runs there that holds GPUs and memory we do not know of."""
    return "still stops containers that were given up" if node.orphans else ""


def has_room(_need: Need, node: NodeView, _policy: Policy) -> str:
    """It does not have the most it may have."""
    return "" if node.replicas < REPLICAS else f"has {REPLICAS} replicas, which is the most"


def has_engine(need: Need, node: NodeView, _policy: Policy) -> str:
    """There is an engine, and it can get the image: the process engine cannot pull."""
    if not node.engine:
        return "no container engine"
    if node.engine == "process" and not _has_image(need, node):
        return "process engine without a directory for the image"
    return ""


def has_gpus(need: Need, node: NodeView, _policy: Policy) -> str:
    """Enough of its GPUs pass each of GPU_FILTERS."""
    return _gpus_left(need, node)[1]


def has_cpus(need: Need, node: NodeView, _policy: Policy) -> str:
    """Enough cores are not promised yet."""
    return "" if node.cpus_free + _CPU_ROUNDING >= need.cpus else "too few free CPU cores"


def has_memory(need: Need, node: NodeView, _policy: Policy) -> str:
    """Enough memory is not promised yet."""
    return "" if node.memory_free_bytes >= need.memory_bytes else "too little free memory"


def has_disk(need: Need, node: NodeView, policy: Policy) -> str:
    """The image fits on the disk, if it is not there yet and its size is known."""
    if need.image_bytes is None or _has_image(need, node):
        return ""
    return (
        "" if node.disk_free_bytes >= need.image_bytes + policy.disk_reserve_bytes else "too little disk for the image"
    )


#: What a GPU must be, each after the one before, and what is missing if too few are.
GPU_FILTERS: Final[tuple[tuple[Callable[[GpuNeed, GpuView], bool], str], ...]] = (
    (lambda need, gpu: model_matches(need.model, gpu.model), "GPU"),
    (lambda need, gpu: gpu.memory_bytes >= need.min_memory_bytes, "GPU with enough memory"),
    (lambda _, gpu: gpu.grade < Grade.QUARANTINED, "healthy GPU"),
    (lambda _, gpu: gpu.free, "free healthy GPU"),
)

#: Cheap ones and those that say the most first.
FILTERS: Final[tuple[Filter, ...]] = (
    is_connected,
    is_open,
    has_engine,
    has_gpus,
    has_cpus,
    has_memory,
    has_disk,
    is_tidy,
    has_room,
)
#: Said of nodes that have half of the workspace's replicas, while others have not.
CROWDED: Final = "has half of the workspace's replicas already"

# -- Costs: each from 0 to about 1 before its weight; lower is better.

Cost = Callable[[Need, NodeView, Sequence[GpuView], Policy], float]


def leftover(need: Need, node: NodeView, _gpus: Sequence[GpuView], policy: Policy) -> float:
    """What the node would have left: full nodes are filled up, so that whole ones stay for large requests."""
    cpus = (node.cpus_free - need.cpus) / node.cpus if node.cpus else 0.0
    free = sum(gpu.free for gpu in node.gpus) - need.gpu.count
    return policy.leftover * (max(cpus, 0.0) + (free / len(node.gpus) if node.gpus else 0.0)) / 2


def image(need: Need, node: NodeView, _gpus: Sequence[GpuView], policy: Policy) -> float:
    """The image must be pulled."""
    if _has_image(need, node):
        return 0.0
    gib = policy.image_gib if need.image_bytes is None else need.image_bytes / GIB
    return policy.image + policy.image_per_gib * gib


def load(_need: Need, node: NodeView, _gpus: Sequence[GpuView], policy: Policy) -> float:
    """It is busy."""
    return policy.load * node.load


def degraded(_need: Need, _node: NodeView, gpus: Sequence[GpuView], policy: Policy) -> float:
    """Share of the GPUs that are not quite well."""
    return policy.degraded * sum(gpu.grade is Grade.DEGRADED for gpu in gpus) / len(gpus) if gpus else 0.0


def unreliable(_need: Need, node: NodeView, _gpus: Sequence[GpuView], policy: Policy) -> float:
    """It has failed us before."""
    return policy.unreliable * min(3.0, (node.failures + 0.2) / (node.uptime_days / 10 + 1))


def crowded(need: Need, node: NodeView, _gpus: Sequence[GpuView], policy: Policy) -> float:
    """Replicas of this workspace that would go down with it."""
    return policy.crowded * node.here.get(need.workspace_uid, 0)


COSTS: Final[tuple[Cost, ...]] = (leftover, image, load, degraded, unreliable, crowded)


def place(
    need: Need, nodes: Iterable[NodeView], *, time: datetime, subject: str, policy: Policy = DEFAULT_POLICY
) -> Placement | Refusals:
    """The node and GPUs for one replica, with the explanation; or why there are none.

    `time` and `subject` are the decision's.
    """
    fitting: list[NodeView] = []
    refused: list[Candidate] = []
    for node in nodes:
        why = next((why for says in FILTERS if (why := says(need, node, policy))), "")
        if why:
            refused.append(Candidate(node.addr, node.name, why))
        else:
            fitting.append(node)
    fitting, others = _spread(need, fitting)
    refused.extend(Candidate(node.addr, node.name, CROWDED) for node in others)
    accepted = [_rated(need, node, policy) for node in fitting]
    decision = decide(time, subject, accepted, refused)
    if not decision.chosen:
        return Refusals(decision)
    chosen = next(node for node in fitting if node.addr == decision.chosen)
    return Placement(chosen.addr, tuple(gpu.id for gpu in _chosen(need, chosen)), decision)


def _rated(need: Need, node: NodeView, policy: Policy) -> Candidate:
    gpus = _chosen(need, node)
    parts = {cost.__name__: round(cost(need, node, gpus, policy), 6) for cost in COSTS}
    return Candidate(node.addr, node.name, parts=parts, cost=round(sum(parts.values()), 6))


def _spread(need: Need, nodes: list[NodeView]) -> tuple[list[NodeView], list[NodeView]]:
    """Those with less than half of the workspace's replicas, and the others; all are the former if none has less."""
    if need.replicas < 2:
        return nodes, []
    below: list[NodeView] = []
    others: list[NodeView] = []
    for node in nodes:
        few = node.here.get(need.workspace_uid, 0) < max(1, need.replicas // 2)
        (below if few else others).append(node)
    return (below, others) if below else (nodes, [])


def _gpus_left(need: Need, node: NodeView) -> tuple[Sequence[GpuView], str]:
    """The GPUs that pass all of GPU_FILTERS and "", or (), and why too few do."""
    if not need.gpu.count:
        return (), ""
    gpus: Sequence[GpuView] = node.gpus
    for passes, kind in GPU_FILTERS:
        gpus = [gpu for gpu in gpus if passes(need.gpu, gpu)]
        if len(gpus) < need.gpu.count:
            return (), _too_few(need.gpu, kind)
    return gpus, ""


def _chosen(need: Need, node: NodeView) -> list[GpuView]:
    """The best, then the smallest that will do, then the first."""
    gpus, _ = _gpus_left(need, node)
    return sorted(gpus, key=lambda gpu: (gpu.grade, gpu.memory_bytes, gpu.index, gpu.id))[: need.gpu.count]


def _has_image(need: Need, node: NodeView) -> bool:
    return (need.directory if node.engine == "process" else need.image) in node.images


def _too_few(need: GpuNeed, kind: str) -> str:
    """E.g. `fewer than 2 free healthy GPUs of model 4090`."""
    many = f"no {kind}" if need.count == 1 else f"fewer than {need.count} {kind.replace('GPU', 'GPUs', 1)}"
    return f"{many} of model {need.model}" if need.model else many
