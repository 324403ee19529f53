"""The product's placement as a contestant: controlplane.sites with nodes and requests of the trace."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec.structs import replace

from controlplane.placement import (
    DEFAULT_POLICY,
    GpuView,
    Need,
    NodeView,
    Placement,
    Policy,
    with_replica,
    without_replica,
)
from controlplane.sites import Sites
from controlplane.spec import MIB, GpuNeed
from scripts.bench.placement_loads import DAY_S, WHOLE, Machine, Pod

NOW: Final = datetime(2024, 1, 1, tzinfo=UTC)
_IMAGE: Final = "example/model:1"


def view_of(machine: Machine, name: str = "") -> NodeView:
    """A node of the trace, empty."""
    return NodeView(
        addr=name or machine.name,
        gpus=tuple(GpuView(f"{gpu}", machine.model, 0, gpu) for gpu in range(machine.gpus)),
        cpus=machine.cpu / 1000,
        cpus_free=machine.cpu / 1000,
        memory_free_bytes=machine.memory * MIB,
    )


def need_of(pod: Pod, number: int) -> Need:
    """A request of the trace, as the only replica of a workspace."""
    return Need(
        workspace_uid=f"w-{number}",
        image=_IMAGE,
        gpu=GpuNeed(pod.model, pod.cards, share=pod.share % WHOLE),
        cpus=pod.cpu / 1000,
        memory_bytes=pod.memory * MIB,
    )


class Ours:
    """See placement_runs.Contestant. It is told nothing beforehand."""

    def __init__(self, nodes: Sequence[Machine], policy: Policy = DEFAULT_POLICY) -> None:
        self.sites = Sites(policy)
        self._nodes = nodes
        self._number = {node.name: number for number, node in enumerate(nodes)}
        self._placed: dict[int, tuple[str, Need, tuple[str, ...]]] = {}
        for node in nodes:
            self.sites.put(view_of(node))

    def take(self, number: int, pod: Pod) -> int | None:
        need = need_of(pod, number)
        self.sites.observe(need.shape)
        found = self.sites.place(need, time=NOW, subject="replica")
        if not isinstance(found, Placement):
            return None
        self.sites.put(with_replica(need, self.sites[found.node_addr], found.gpu_ids))
        self._placed[number] = found.node_addr, need, found.gpu_ids
        return self._number[found.node_addr]

    @property
    def placed(self) -> Iterable[tuple[str, Need, tuple[str, ...]]]:
        """All that is: on which node, what, with which GPUs."""
        return self._placed.values()

    def give_back(self, number: int) -> None:
        addr, need, gpu_ids = self._placed.pop(number)
        self.sites.put(given_back(need, self.sites[addr], gpu_ids))

    def die(self, node: int, time_s: float) -> None:
        view = self.sites[self._nodes[node].name]
        days = time_s / DAY_S
        self.sites.put(replace(view, connected=False, failures=view.failures + 1, uptime_days=days))

    def come_back(self, node: int, time_s: float) -> None:
        view = self.sites[self._nodes[node].name]
        self.sites.put(replace(view, connected=True, uptime_days=time_s / DAY_S))

    def pass_day(self, time_s: float) -> None:
        """All nodes are older."""
        for addr in self.sites.addrs:
            self.sites.put(replace(self.sites[addr], uptime_days=time_s / DAY_S))


def given_back(need: Need, node: NodeView, gpu_ids: Sequence[str]) -> NodeView:
    """The node with that replica less, its cores in thousandths, so that sums of fractions come to what they were."""
    view = without_replica(need, node, gpu_ids)
    return replace(view, cpus_free=round(view.cpus_free, 3))
