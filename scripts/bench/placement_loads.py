"""What the placement benchmark is driven with: the openb trace; arrivals, departures and deaths of nodes over time."""

import csv
import gzip
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

TRACES: Final = ("default", "gpuspec33", "multigpu50")
#: Thousandths of a GPU.
WHOLE: Final = 1000
#: The trace, where it comes with the repository.
DATA: Final = Path(__file__).parent / "data" / "openb"

DAY_S: Final = 86_400.0


class Machine(NamedTuple):
    """A node of the trace. CPU in thousandths of a core, memory in MiB."""

    name: str
    cpu: int
    memory: int
    gpus: int
    model: str


class Pod(NamedTuple):
    """A request of the trace: `cards` GPUs, `share` thousandths of each; `model`: any of these, divided by `|`."""

    cpu: int
    memory: int
    cards: int
    share: int
    model: str

    @property
    def gpu(self) -> int:
        """Thousandths of GPUs in all."""
        return self.cards * self.share


def machines(data: Path) -> list[Machine]:
    """All nodes, those without GPUs too."""
    return [
        Machine(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]), int(row["gpu"]), row["model"])
        for row in _rows(data, "openb_nodes.csv")
    ]


def pods(data: Path, trace: str) -> list[Pod]:
    """One workload, in the order of the file."""
    return [
        Pod(
            int(row["cpu_milli"]),
            int(row["memory_mib"]),
            int(row["num_gpu"]),
            int(row["gpu_milli"] or 0) if int(row["num_gpu"]) else 0,
            row["gpu_spec"] or "",
        )
        for row in _rows(data, f"openb_pods_{trace}.csv")
    ]


def _rows(data: Path, name: str) -> Iterator[dict[str, str]]:
    packed = data / f"{name}.gz"
    text = gzip.decompress(packed.read_bytes()) if packed.exists() else (data / name).read_bytes()
    yield from csv.DictReader(io.StringIO(text.decode(), newline=""))


def capacity(nodes: Sequence[Machine]) -> int:
    """Thousandths of GPUs of all."""
    return sum(node.gpus for node in nodes) * WHOLE


def inflated(load: Sequence[Pod], capacity: int, ratio: float, seed: int) -> list[Pod]:
    """In random order, until `ratio` of the capacity has been asked for; a load too small is filled up with copies."""
    chance = random.Random(seed)  # noqa: S311
    arrivals = list(load)
    chance.shuffle(arrivals)
    asked, kept = 0, []
    for pod in _endless(arrivals, chance):
        if asked + pod.gpu > ratio * capacity:
            break
        asked += pod.gpu
        kept.append(pod)
    return kept


def _endless(arrivals: Sequence[Pod], chance: random.Random) -> Iterator[Pod]:
    yield from arrivals
    while True:
        yield chance.choice(arrivals)


@dataclass(frozen=True)
class Churn:
    """A fleet over time: what is asked for, and which nodes die when. Times are seconds.

    Requests arrive independently of each other (Poisson) and stay for exponential times, so that without a limit they
    would hold `load` of all GPUs at once. One node in `bad_every` is bad: it dies often, and a good one hardly ever.
    """

    days: float = 30.0
    #: Not counted: the fleet fills up.
    warm_up_days: float = 4.0
    load: float = 0.95
    stay_s: float = DAY_S
    bad_every: int = 10
    bad_life_s: float = 1.5 * DAY_S
    good_life_s: float = 150 * DAY_S
    repair_s: float = 2 * 3600.0


class Arrival(NamedTuple):
    """A request and how long it stays."""

    time_s: float
    pod: Pod
    stay_s: float


class Death(NamedTuple):
    """A node dies, and is back later."""

    time_s: float
    node: int
    back_s: float


def arrivals(load: Sequence[Pod], nodes: Sequence[Machine], churn: Churn, seed: int) -> list[Arrival]:
    """In order of time."""
    chance = random.Random(f"arrivals {seed}")  # noqa: S311
    held = sum(pod.gpu for pod in load) / len(load) * churn.stay_s
    every_s = held / (churn.load * capacity(nodes))
    found, time_s = [], 0.0
    while (time_s := time_s + chance.expovariate(1 / every_s)) < churn.days * DAY_S:
        found.append(Arrival(time_s, chance.choice(load), chance.expovariate(1 / churn.stay_s)))
    return found


def deaths(nodes: Sequence[Machine], churn: Churn, seed: int) -> tuple[list[Death], frozenset[int]]:
    """In order of time; and which nodes are bad."""
    chance = random.Random(f"deaths {seed}")  # noqa: S311
    bad = frozenset(chance.sample(range(len(nodes)), len(nodes) // churn.bad_every))
    found = []
    for node in range(len(nodes)):
        life_s = churn.bad_life_s if node in bad else churn.good_life_s
        time_s = chance.expovariate(1 / life_s)
        while time_s < churn.days * DAY_S:
            back_s = time_s + chance.expovariate(1 / churn.repair_s)
            found.append(Death(time_s, node, back_s))
            time_s = back_s + chance.expovariate(1 / life_s)
    return sorted(found), bad
