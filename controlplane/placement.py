"""On which node a replica goes: filters that say why not, then one cost made of named parts. Pure and deterministic.

The policy is two tuples, FILTERS and COSTS, and the weights in Policy. Each filter gives its reason in words, which
become the error message as they stand; the least cost wins, ties go by address (random ties alone were measured to cost
five points of GPU allocation). `place` looks at every node.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from msgspec.structs import replace
from ngpu.image import allowed

from controlplane.cards import Card, Fit, fits, lots_of, model_matches
from controlplane.demand import Shape
from controlplane.explain import Candidate, Decision, decide
from controlplane.fragmentation import CPU_ROUNDING, WHOLE, Fragmentation, Lot
from controlplane.grade import Grade
from controlplane.model import Availability
from controlplane.spec import GIB, GpuNeed

#: Most replicas on one node: all of them go into one message.
REPLICAS: Final = 100
#: What a large node has, by which leftovers are measured.
LARGE_CPUS: Final = 128
LARGE_GPUS: Final = 8


class GpuView(msgspec.Struct, frozen=True):
    """One GPU as placement sees it.

    `free`: no replica holds all of it; `shared`: thousandths of it that replicas with shares hold.
    """

    id: str
    model: str
    memory_bytes: int
    index: int = 0
    grade: Grade = Grade.OK
    free: bool = True
    shared: int = 0

    @property
    def card(self) -> Card:
        """What it is, whichever it is."""
        return self.grade, self.memory_bytes, self.model, WHOLE - self.shared if self.free else 0


class NodeView(msgspec.Struct, frozen=True):
    """One node as placement sees it.

    `cpus`: in all; `cpus_free`, `memory_free_bytes`: not promised to replicas. `images`: sizes by normalised reference,
    or by directory with the process engine. `load`: share of its slots that run a task, 0 to 1. `orphans`: containers
    it has that are no replicas of ours. `replicas`: all that are; `here`: by workspace uid. `volumes`: are allowed.
    `allowed_images`: patterns of those that its operator allows; none: all.
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
    volumes: bool = True
    allowed_images: tuple[str, ...] = ()

    def cards(self) -> tuple[Card, ...]:
        """Its GPUs, whichever they are, in order."""
        return tuple(sorted([gpu.card for gpu in self.gpus]))


class Need(msgspec.Struct, frozen=True):
    """What one replica needs.

    `image`: a normalised reference; `directory`: what stands for it with the process engine; `image_bytes`: its size if
    any node knows it. `replicas`: how many the workspace wants in all. `volumes`: does it keep any?
    """

    workspace_uid: str
    image: str
    directory: str = ""
    gpu: GpuNeed = GpuNeed()
    cpus: float = 0.0
    memory_bytes: int = 0
    replicas: int = 1
    image_bytes: int | None = None
    volumes: bool = False

    @property
    def gpu_share(self) -> int:
        """Thousandths of each of its GPUs."""
        return self.gpu.share or WHOLE

    @property
    def shape(self) -> Shape:
        """What of it says something about the requests to come."""
        return Shape(self.gpu.model, self.gpu.count, self.gpu.share, self.gpu.min_memory_bytes, self.cpus)


class Policy(msgspec.Struct, frozen=True):
    """The weights of COSTS, and what the filters leave room for."""

    fragmentation: float = 1.0
    leftover: float = 0.05
    #: Price of the last GPU of a model, and how steeply it rises to that.
    scarcity: float = 0.6
    scarcity_base: float = 100.0
    image: float = 0.02
    image_per_gib: float = 0.004
    #: Assumed of an image that no node has yet.
    image_gib: float = 5.0
    degraded: float = 0.3
    load: float = 0.05
    unreliable: float = 0.15
    crowded: float = 0.10
    #: Disk that an image must leave free.
    disk_reserve_bytes: int = GIB


#: The policy unless told otherwise.
DEFAULT_POLICY: Final = Policy()


class Market(msgspec.Struct, frozen=True):
    """What a cost depends on beside request and node: the weights, the demand, and the price of a GPU by model."""

    policy: Policy
    demand: Fragmentation
    prices: Mapping[str, float]


#: Nothing is known of the requests to come.
NO_DEMAND: Final = Fragmentation({}, model_matches)


class Placement(msgspec.Struct, frozen=True):
    """Where it goes."""

    node_addr: str
    gpu_ids: tuple[str, ...]
    decision: Decision


class Refusals(msgspec.Struct, frozen=True):
    """It goes nowhere; `decision.refusals` counts why."""

    decision: Decision


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


def has_engine(_need: Need, node: NodeView, _policy: Policy) -> str:
    """There is an engine."""
    return "" if node.engine else "no container engine"


def has_gpus(need: Need, node: NodeView, _policy: Policy) -> str:
    """Enough of its GPUs pass each of cards.FILTERS."""
    return fits(need.gpu, node.cards())[1]


def has_cpus(need: Need, node: NodeView, _policy: Policy) -> str:
    """Enough cores are not promised yet."""
    return "" if node.cpus_free + CPU_ROUNDING >= need.cpus else "too few free CPU cores"


def has_memory(need: Need, node: NodeView, _policy: Policy) -> str:
    """Enough memory is not promised yet."""
    return "" if node.memory_free_bytes >= need.memory_bytes else "too little free memory"


def is_tidy(_need: Need, node: NodeView, _policy: Policy) -> str:
    """Nothing runs there that holds GPUs and memory we do not know of."""
    return "still stops containers that were given up" if node.orphans else ""


def has_room(_need: Need, node: NodeView, _policy: Policy) -> str:
    """It does not have the most it may have."""
    return "" if node.replicas < REPLICAS else f"has {REPLICAS} replicas, which is the most"


def has_directory(need: Need, node: NodeView, _policy: Policy) -> str:
    """It can get the image: the process engine cannot pull."""
    missing = node.engine == "process" and not has_image(need, node)
    return "process engine without a directory for the image" if missing else ""


def has_disk(need: Need, node: NodeView, policy: Policy) -> str:
    """The image fits on the disk, if it is not there yet and its size is known."""
    if need.image_bytes is None or has_image(need, node):
        return ""
    return (
        "" if node.disk_free_bytes >= need.image_bytes + policy.disk_reserve_bytes else "too little disk for the image"
    )


def has_volumes(need: Need, node: NodeView, _policy: Policy) -> str:
    """Its operator allows them, if the replica has any."""
    return "its operator allows no volumes" if need.volumes and not node.volumes else ""


def allows_image(need: Need, node: NodeView, _policy: Policy) -> str:
    """Its operator lets the image run there."""
    return "" if allowed(need.image, node.allowed_images) else "its operator does not allow the image"


#: Of the node alone, cheap ones first, ...
NODE_FILTERS: Final[tuple[Filter, ...]] = (is_connected, is_open, has_engine)
#: ... of what the replica needs of it, those that say the most first, ...
SHAPE_FILTERS: Final[tuple[Filter, ...]] = (has_gpus, has_cpus, has_memory, is_tidy, has_room)
#: ... and of its image and volumes.
IMAGE_FILTERS: Final[tuple[Filter, ...]] = (allows_image, has_directory, has_disk, has_volumes)
FILTERS: Final = (*NODE_FILTERS, *SHAPE_FILTERS, *IMAGE_FILTERS)
#: Said of nodes that have half of the workspace's replicas, while others have not.
CROWDED: Final = "has half of the workspace's replicas already"

# -- Costs, in GPUs: what else could have been had for it; lower is better.

Cost = Callable[[Need, NodeView, Fit, Market], float]


def fragmentation(need: Need, node: NodeView, fit: Fit, market: Market) -> float:
    """GPUs of the node that become useless to the requests that come."""
    demand = market.demand
    growth = demand.of(fit.after, node.cpus_free - need.cpus) - demand.of(fit.before, node.cpus_free)
    return market.policy.fragmentation * growth


def leftover(need: Need, node: NodeView, fit: Fit, market: Market) -> float:
    """What the node would have left: full nodes are filled up, so that whole ones stay for large requests.

    Measured by a large node, not by this one: what is left of a small one is little.
    """
    cpus = (node.cpus_free - need.cpus) / LARGE_CPUS
    return market.policy.leftover * (cpus + fit.free_after / WHOLE / LARGE_GPUS) / 2


def degraded(_need: Need, _node: NodeView, fit: Fit, market: Market) -> float:
    """Share of the GPUs that are not quite well."""
    return market.policy.degraded * fit.degraded / len(fit.taken) if fit.degraded else 0.0


def unreliable(_need: Need, node: NodeView, _fit: Fit, market: Market) -> float:
    """It has failed us before."""
    return unreliable_cost(node, market.policy)


def load(_need: Need, node: NodeView, _fit: Fit, market: Market) -> float:
    """It is busy."""
    return load_cost(node, market.policy)


def scarcity(need: Need, _node: NodeView, fit: Fit, market: Market) -> float:
    """Price of the GPUs: the fewer of a model are left, the more those who must have that one will miss it."""
    return gpu_price(need, market, fit.models)


def image(need: Need, node: NodeView, _fit: Fit, market: Market) -> float:
    """The image must be pulled."""
    return 0.0 if has_image(need, node) else pull_cost(need, market.policy)


def crowded(need: Need, node: NodeView, _fit: Fit, market: Market) -> float:
    """Replicas of this workspace that would go down with it."""
    return market.policy.crowded * node.here.get(need.workspace_uid, 0)


#: What depends on node and shape alone and changes only with them, ...
SHAPE_COSTS: Final[tuple[Cost, ...]] = (fragmentation, leftover, degraded, load, unreliable)
#: ... and what depends on the other nodes, the image or the workspace.
OTHER_COSTS: Final[tuple[Cost, ...]] = (scarcity, image, crowded)
COSTS: Final = (*SHAPE_COSTS, *OTHER_COSTS)
#: Costs are compared in millionths: what is less is rounding.
DIGITS: Final = 6


def place(
    need: Need,
    nodes: Iterable[NodeView],
    *,
    time: datetime,
    subject: str,
    policy: Policy = DEFAULT_POLICY,
    demand: Fragmentation = NO_DEMAND,
    without: Collection[str] = (),
) -> Placement | Refusals:
    """The node and GPUs for one replica, with the explanation; or why there are none.

    `time` and `subject` are the decision's. `demand`: what requests are to come. `without`: addresses of nodes that are
    not considered.
    """
    nodes = tuple(nodes)
    market = Market(policy, demand, prices(nodes, policy))
    fitting: list[NodeView] = []
    refused: list[Candidate] = []
    for node in nodes:
        if node.addr in without:
            continue
        why = refusal(need, node, policy, FILTERS)
        if why:
            refused.append(Candidate(node.addr, node.name, why))
        else:
            fitting.append(node)
    fitting, others = _spread(need, fitting)
    refused.extend(Candidate(node.addr, node.name, CROWDED) for node in others)
    decision = decide(time, subject, [rated(need, node, _ways(need, node), market) for node in fitting], refused)
    if not decision.chosen:
        return Refusals(decision)
    chosen = next(node for node in fitting if node.addr == decision.chosen)
    return Placement(chosen.addr, gpu_ids(need, chosen, _ways(need, chosen), market), decision)


def _ways(need: Need, node: NodeView) -> Sequence[Fit]:
    return fits(need.gpu, node.cards())[0]


def refusal(need: Need, node: NodeView, policy: Policy, filters: Iterable[Filter]) -> str:
    """What the first of the filters that refuses the node says, or ""."""
    for says in filters:
        if why := says(need, node, policy):
            return why
    return ""


def rated(need: Need, node: NodeView, ways: Sequence[Fit], market: Market) -> Candidate:
    """A node that passes all filters, with each part of its cost; `ways`: to give it GPUs there, of which there are."""
    fit = best_fit(need, node, ways, market)
    parts = {cost.__name__: round(cost(need, node, fit, market), DIGITS) for cost in COSTS}
    others = sum([parts[cost.__name__] for cost in OTHER_COSTS])
    return Candidate(
        node.addr, node.name, parts=parts, cost=round(shape_cost(need, node, fit, market) + others, DIGITS)
    )


def shape_cost(need: Need, node: NodeView, fit: Fit, market: Market) -> float:
    """The sum of SHAPE_COSTS."""
    return round(sum([cost(need, node, fit, market) for cost in SHAPE_COSTS]), DIGITS)


def best_fit(need: Need, node: NodeView, ways: Sequence[Fit], market: Market) -> Fit:
    """Of the ways to give it GPUs of the node: the best GPU, then where least is lost, then where least is left."""
    if len(ways) == 1:
        return ways[0]
    cpus = node.cpus_free - need.cpus

    def rank(fit: Fit) -> tuple[object, ...]:
        grade, memory_bytes, model, free = fit.taken[0]
        return grade, round(market.demand.of(fit.after, cpus), DIGITS), free, memory_bytes, model

    return min(ways, key=rank)


def gpu_ids(need: Need, node: NodeView, ways: Sequence[Fit], market: Market) -> tuple[str, ...]:
    """The GPUs that the replica would get; the node must pass the filters."""
    gpus = sorted(node.gpus, key=lambda gpu: (gpu.index, gpu.id))
    ids: list[str] = []
    for card in best_fit(need, node, ways, market).taken:
        gpu = next(gpu for gpu in gpus if gpu.card == card)
        gpus.remove(gpu)
        ids.append(gpu.id)
    return tuple(ids)


def prices(nodes: Iterable[NodeView], policy: Policy) -> dict[str, float]:
    """Of a whole GPU by model: 0 while none is taken, the whole weight for the last one."""
    held: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for node in nodes:
        for model, _, free in offered(node, node.cards()):
            there[model] += WHOLE
            held[model] += WHOLE - free
    return {model: price(held[model] / there[model], policy) for model in there}


def offered(node: NodeView, cards: tuple[Card, ...]) -> Sequence[Lot]:
    """The GPUs that it has for replicas, taken or not; `cards` are its."""
    return lots_of(cards) if node.connected and node.availability is Availability.OPEN else ()


def price(utilisation: float, policy: Policy) -> float:
    """Of a whole GPU of a model of which that share is taken."""
    base = policy.scarcity_base
    return policy.scarcity * (math.pow(base, utilisation) - 1) / (base - 1)


def gpu_price(need: Need, market: Market, models: Iterable[str]) -> float:
    """Of what it takes of GPUs of these models."""
    return round(sum([market.prices[model] for model in models]) * need.gpu_share / WHOLE, DIGITS)


def load_cost(node: NodeView, policy: Policy) -> float:
    """In steps of a tenth of its slots: it need not change with each task."""
    return policy.load * round(node.load, 1) if node.load else 0.0


def unreliable_cost(node: NodeView, policy: Policy) -> float:
    """In thousandths: days go by, and it need not change with each minute of them."""
    return round(policy.unreliable * min(3.0, (node.failures + 0.2) / (node.uptime_days / 10 + 1)), 3)


def pull_cost(need: Need, policy: Policy) -> float:
    """Of an image that is not there yet."""
    gib = policy.image_gib if need.image_bytes is None else need.image_bytes / GIB
    return policy.image + policy.image_per_gib * gib


def has_image(need: Need, node: NodeView) -> bool:
    """The node has it already."""
    return (need.directory if node.engine == "process" else need.image) in node.images


def with_replica(need: Need, node: NodeView, gpu_ids: Collection[str]) -> NodeView:
    """The node with one more replica."""
    return replace(
        node,
        gpus=tuple(_taken(gpu, need.gpu.share) if gpu.id in gpu_ids else gpu for gpu in node.gpus),
        cpus_free=node.cpus_free - need.cpus,
        memory_free_bytes=node.memory_free_bytes - need.memory_bytes,
        replicas=node.replicas + 1,
        here={**node.here, need.workspace_uid: node.here.get(need.workspace_uid, 0) + 1},
    )


def without_replica(need: Need, node: NodeView, gpu_ids: Collection[str]) -> NodeView:
    """The node with that replica less."""
    left = node.here.get(need.workspace_uid, 0) - 1
    others = {uid: count for uid, count in node.here.items() if uid != need.workspace_uid}
    return replace(
        node,
        gpus=tuple(_released(gpu, need.gpu.share) if gpu.id in gpu_ids else gpu for gpu in node.gpus),
        cpus_free=node.cpus_free + need.cpus,
        memory_free_bytes=node.memory_free_bytes + need.memory_bytes,
        replicas=node.replicas - 1,
        here=others if left <= 0 else {**others, need.workspace_uid: left},
    )


def _taken(gpu: GpuView, share: int) -> GpuView:
    return replace(gpu, shared=gpu.shared + share) if share else replace(gpu, free=False)


def _released(gpu: GpuView, share: int) -> GpuView:
    return replace(gpu, shared=max(0, gpu.shared - share)) if share else replace(gpu, free=True)


def _spread(need: Need, nodes: list[NodeView]) -> tuple[list[NodeView], list[NodeView]]:
    """Those with less than half of the workspace's replicas, and the others; all are the former if none has less."""
    below: list[NodeView] = []
    others: list[NodeView] = []
    for node in nodes:
        (others if is_crowded(need, node.here.get(need.workspace_uid, 0)) else below).append(node)
    return (below, others) if below else (nodes, [])


def is_crowded(need: Need, here: int) -> bool:
    """Are so many at least half of the workspace's replicas?"""
    return need.replicas > 1 and here >= max(1, need.replicas // 2)
