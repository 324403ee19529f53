"""What the placement bench is driven with: the openb trace, and a workload of arrivals, departures and node deaths."""

import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TRACES = ("default", "gpuspec33", "multigpu50")
WHOLE = 1000


class Machine(NamedTuple):
    """A node of the trace. CPU in thousandths of a core, memory in MiB."""

    name: str
    cpu: int
    memory: int
    gpus: int
    model: str


class Pod(NamedTuple):
    """A request of the trace: `count` GPUs, `share` thousandths of each; `model`: any of these, divided by `|`."""

    cpu: int
    memory: int
    count: int
    share: int
    model: str

    @property
    def gpu(self) -> int:
        """Thousandths of GPUs in all."""
        return self.count * self.share


def machines(data: Path) -> list[Machine]:
    """All nodes, those without GPUs too."""
    with (data / "openb_nodes.csv").open(newline="") as file:
        return [
            Machine(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]), int(row["gpu"]), row["model"])
            for row in csv.DictReader(file)
        ]


def pods(data: Path, trace: str) -> list[Pod]:
    """One workload, in the order of the file."""
    with (data / f"openb_pods_{trace}.csv").open(newline="") as file:
        return [
            Pod(
                int(row["cpu_milli"]),
                int(row["memory_mib"]),
                int(row["num_gpu"]),
                int(row["gpu_milli"] or 0) if int(row["num_gpu"]) else 0,
                row["gpu_spec"] or "",
            )
            for row in csv.DictReader(file)
        ]


def inflated(load: Sequence[Pod], capacity: int, ratio: float, seed: int) -> list[Pod]:
    """In random order, until `ratio` of the capacity has been asked for; a load too small is filled up with copies."""
    chance = random.Random(seed)  # noqa: S311
    arrivals = list(load)
    chance.shuffle(arrivals)
    asked, kept = 0, []
    for pod in _endless(arrivals, chance):
        if asked + pod.gpu > ratio * capacity:
            return kept
        asked += pod.gpu
        kept.append(pod)
    raise AssertionError


def _endless(arrivals: Sequence[Pod], chance: random.Random) -> Iterator[Pod]:
    yield from arrivals
    while True:
        yield chance.choice(arrivals)
