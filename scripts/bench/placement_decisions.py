"""What a decision costs in a large fleet: CPU of this thread for one arrival, with all that it makes the index do.

The fleet is made of copies of the trace's nodes as the product filled them to 85 %; from there on something leaves for
each that comes, so that it stays as full.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from controlplane.placement import Need, Placement, with_replica
from controlplane.sites import Sites
from scripts.bench.placement_loads import WHOLE, capacity, inflated, machines, pods
from scripts.bench.placement_ours import NOW, Ours, given_back, need_of

NODES: Final = 10_000
FULL: Final = 0.85
TRACE: Final = "default"
#: Not measured: the shapes of requests become known.
WARM_UP: Final = 3000
MEASURED: Final = 2000
SEED: Final = 7


@dataclass(frozen=True)
class Cost:
    """CPU of `count` decisions in milliseconds; `new`: of a shape that was not ranked yet, which took `first_ms`."""

    count: int
    new: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    first_ms: float


def decisions(data: Path) -> Cost:
    """In a process of its own."""
    nodes, chance = machines(data), random.Random(SEED)  # noqa: S311
    load = inflated(pods(data, TRACE), capacity(nodes), 1.3, SEED)
    small, held = Ours(nodes), 0
    for number, pod in enumerate(load):
        if held >= FULL * capacity(nodes):
            break
        held += pod.gpu if small.take(number, pod) is not None else 0
    large = Sites()
    for pod in load:
        large.observe(need_of(pod, 0).shape)
    placed: list[tuple[str, Need, tuple[str, ...]]] = []
    for copy in range(-(-NODES // len(nodes))):
        chosen = {addr: f"{addr}-{copy}" for addr in list(small.sites.addrs)[: NODES - copy * len(nodes)]}
        for addr, name in chosen.items():
            large.put(replace(small.sites[addr], addr=name))
        placed += [(chosen[addr], need, ids) for addr, need, ids in small.placed if addr in chosen]
    took: list[tuple[float, bool]] = []
    for number in range(WARM_UP + MEASURED):
        need = need_of(chance.choice(load), number)
        known = large.knows(need)
        began_s = time.thread_time()
        large.observe(need.shape)
        found = large.place(need, time=NOW, subject="replica")
        if isinstance(found, Placement):
            large.put(with_replica(need, large[found.node_addr], found.gpu_ids))
            placed.append((found.node_addr, need, found.gpu_ids))
            surplus = _gpus(need)
            while surplus > 0:
                place = chance.randrange(len(placed))
                placed[place], placed[-1] = placed[-1], placed[place]
                addr, gone, ids = placed.pop()
                large.put(given_back(gone, large[addr], ids))
                surplus -= _gpus(gone)
        took.append((1000 * (time.thread_time() - began_s), known))
    measured = took[WARM_UP:]
    each = sorted(ms for ms, _ in measured)
    first = [ms for ms, known in took if not known]
    return Cost(
        count=len(each),
        new=sum(not known for _, known in measured),
        mean_ms=sum(each) / len(each),
        p50_ms=each[len(each) // 2],
        p99_ms=each[len(each) * 99 // 100],
        first_ms=sum(first) / len(first),
    )


def _gpus(need: Need) -> int:
    return need.gpu.count * (need.gpu.share or WHOLE)
