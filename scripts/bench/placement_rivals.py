"""Other ways to choose a node, of our own implementation: random, best-fit, dot-product and FGD (USENIX ATC'23).

They see what ours sees: free CPU, memory and GPU shares of each node. FGD knows the whole workload beforehand, as in
the paper; ours has to learn it. All but random choose the first of equals.
"""

import math
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from scripts.bench.placement_loads import WHOLE, Machine, Pod

#: The largest machine, by which FGD's authors scale.
MOST_CPU = 128_000
MOST_GPU = 8 * WHOLE
#: FGD looks at the most frequent kinds of requests that make up so much of all.
TYPICAL = 0.95


class Fleet:
    """What is free where."""

    def __init__(self, nodes: Sequence[Machine]) -> None:
        self.nodes = nodes
        self.up = [True] * len(nodes)
        self.cpu = [node.cpu for node in nodes]
        self.memory = [node.memory for node in nodes]
        self.gpus = [[WHOLE] * node.gpus for node in nodes]
        self.touched: list[int] = []
        self._models = {"": {node.model for node in nodes}}

    def fits(self, node: int, pod: Pod) -> bool:
        """Is there room?"""
        if not self.up[node] or self.cpu[node] < pod.cpu or self.memory[node] < pod.memory:
            return False
        if not pod.cards:
            return True
        if pod.model and self.nodes[node].model not in self._wanted(pod.model):
            return False
        gpus = self.gpus[node]
        if pod.cards == 1:
            return bool(gpus) and max(gpus) >= pod.share
        return gpus.count(WHOLE) >= pod.cards

    def _wanted(self, model: str) -> set[str]:
        wanted = self._models.get(model)
        if wanted is None:
            wanted = self._models[model] = set(model.split("|"))
        return wanted

    def take(self, node: int, pod: Pod, gpus: Sequence[int], sign: int = 1) -> None:
        """Or with sign -1, give back."""
        self.cpu[node] -= sign * pod.cpu
        self.memory[node] -= sign * pod.memory
        for gpu in gpus:
            self.gpus[node][gpu] -= sign * pod.share
        self.touched.append(node)

    def set_up(self, node: int, up: bool) -> None:
        """It died, or came back."""
        self.up[node] = up
        self.touched.append(node)


class Chooser(Protocol):
    """A way to choose."""

    def choose(self, pod: Pod) -> tuple[int, Sequence[int]] | None:
        """Node and GPUs, or None: there is no room."""


class Rival:
    """A way to choose, and what it has placed; see placement_runs.Contestant."""

    def __init__(self, fleet: Fleet, chooser: Chooser) -> None:
        self._fleet = fleet
        self._chooser = chooser
        self._placed: dict[int, tuple[int, Pod, Sequence[int]]] = {}

    def take(self, number: int, pod: Pod) -> int | None:
        found = self._chooser.choose(pod)
        if found is None:
            return None
        node, gpus = found
        self._fleet.take(node, pod, gpus)
        self._placed[number] = node, pod, gpus
        return node

    def give_back(self, number: int) -> None:
        node, pod, gpus = self._placed.pop(number)
        self._fleet.take(node, pod, gpus, -1)

    def die(self, node: int, time_s: float) -> None:  # noqa: ARG002, it does not learn
        self._fleet.set_up(node, False)

    def come_back(self, node: int, time_s: float) -> None:  # noqa: ARG002
        self._fleet.set_up(node, True)

    def pass_day(self, time_s: float) -> None:
        pass


#: Cost of a pod on a node, and the GPU for it if it wants a share of one.
Cost = Callable[[Fleet, int, Pod], tuple[float, int]]


class Cheapest:
    """The node with least cost; costs depend on the node alone and are kept until it is touched."""

    def __init__(self, fleet: Fleet, cost: Cost) -> None:
        self._fleet = fleet
        self._cost = cost
        self._costs: dict[Pod, tuple[list[float], int]] = {}

    def choose(self, pod: Pod) -> tuple[int, Sequence[int]] | None:
        """Node and GPUs, or None: there is no room."""
        fleet = self._fleet
        costs, heeded = self._costs.get(pod, ([], 0))
        nodes: Iterable[int] = set(fleet.touched[heeded:]) if costs else range(len(fleet.nodes))
        costs = costs or [math.inf] * len(fleet.nodes)
        for node in nodes:
            costs[node] = self._cost(fleet, node, pod)[0] if fleet.fits(node, pod) else math.inf
        self._costs[pod] = costs, len(fleet.touched)
        least = min(costs)
        if least == math.inf:
            return None
        node = costs.index(least)
        return node, gpus_for(fleet, node, pod, self._cost(fleet, node, pod)[1])


def gpus_for(fleet: Fleet, node: int, pod: Pod, gpu: int) -> Sequence[int]:
    """`gpu` for a share, the first free ones otherwise."""
    if pod.cards == 1 and pod.share < WHOLE:
        return [gpu]
    return [i for i, free in enumerate(fleet.gpus[node]) if free == WHOLE][: pod.cards]


class Random:
    """Any node with room, any GPU with room."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._chance = random.Random(seed)  # noqa: S311
        self._fits = Cheapest(fleet, lambda *_: (0.0, 0))

    def choose(self, pod: Pod) -> tuple[int, Sequence[int]] | None:
        """As Cheapest."""
        fleet = self._fleet
        if self._fits.choose(pod) is None:
            return None
        costs = self._fits._costs[pod][0]
        node = self._chance.choice([node for node, cost in enumerate(costs) if cost == 0.0])
        roomy = [gpu for gpu, free in enumerate(fleet.gpus[node]) if free >= pod.share]
        return node, gpus_for(fleet, node, pod, self._chance.choice(roomy) if roomy else 0)


def fullest(fleet: Fleet, node: int, pod: Pod) -> int:
    """The GPU with least room that is enough."""
    gpus = fleet.gpus[node]
    fitting = [gpu for gpu in range(len(gpus)) if gpus[gpu] >= pod.share]
    return min(fitting, key=lambda gpu: gpus[gpu]) if fitting else 0


def best_fit(fleet: Fleet, node: int, pod: Pod) -> tuple[float, int]:
    """What would be left."""
    cpu = (fleet.cpu[node] - pod.cpu) / MOST_CPU
    gpu = (sum(fleet.gpus[node]) - pod.gpu) / MOST_GPU
    return (cpu + gpu) / 2, fullest(fleet, node, pod)


def dot_product(fleet: Fleet, node: int, pod: Pod) -> tuple[float, int]:
    """How much there is of what is asked for most; of a GPU that is shared, what is free of that one."""
    cpu = fleet.cpu[node] / MOST_CPU * pod.cpu / MOST_CPU
    if pod.cards == 1 and pod.share < WHOLE:
        gpu = fullest(fleet, node, pod)
        return cpu + fleet.gpus[node][gpu] / MOST_GPU * pod.gpu / MOST_GPU, gpu
    return cpu + sum(fleet.gpus[node]) / MOST_GPU * pod.gpu / MOST_GPU, 0


class Fgd:
    """Cost of the paper: growth of the GPUs that typical requests could not use."""

    def __init__(self, load: Iterable[Pod]) -> None:
        counts = Counter(pod._replace(memory=0) for pod in load)
        total, typical, seen = counts.total(), [], 0
        for pod, number in counts.most_common():
            if seen >= TYPICAL * total:
                break
            seen += number
            typical.append((pod, number))
        self._typical = [(pod, number / seen) for pod, number in typical]
        self._steps = sorted({pod.cpu for pod, _ in typical})
        self._known: dict[tuple[str, int, tuple[int, ...]], float] = {}
        self._models = defaultdict(set, {pod.model: set(pod.model.split("|")) for pod, _ in typical if pod.model})

    def cost(self, fleet: Fleet, node: int, pod: Pod) -> tuple[float, int]:
        """Of a pod on a node, and the GPU where it is least."""
        model, cpu, gpus = fleet.nodes[node].model, fleet.cpu[node], fleet.gpus[node]
        if not gpus:
            return 0.0, 0
        before = self.unusable(model, cpu, gpus)
        if pod.cards == 1 and pod.share < WHOLE:
            tried: dict[int, float] = {}
            best = math.inf, 0
            for gpu, free in enumerate(gpus):
                if free >= pod.share:
                    if free not in tried:
                        after = [*gpus[:gpu], free - pod.share, *gpus[gpu + 1 :]]
                        tried[free] = self.unusable(model, cpu - pod.cpu, after)
                    best = min(best, (tried[free] - before, gpu))
            return best
        after = list(gpus)
        for gpu in gpus_for(fleet, node, pod, 0):
            after[gpu] = 0
        return self.unusable(model, cpu - pod.cpu, after) - before, 0

    def unusable(self, model: str, cpu: int, gpus: Sequence[int]) -> float:
        """Of the free GPUs of a node, in thousandths; the mean over typical requests."""
        key = model, bisect_right(self._steps, cpu), tuple(sorted(gpus))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = sum(
                weight * self._unusable_to(pod, model, cpu, gpus) for pod, weight in self._typical
            )
        return found

    def _unusable_to(self, pod: Pod, model: str, cpu: int, gpus: Sequence[int]) -> int:
        fits = (
            pod.cards > 0
            and cpu >= pod.cpu
            and (not pod.model or model in self._models[pod.model])
            and sum(free >= pod.share for free in gpus) >= pod.cards
        )
        return sum(free for free in gpus if not fits or free < pod.share)
