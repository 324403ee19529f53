"""All simulated nodes of this process: they come up one after the other, suffer what they are told to, and go."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from nodedaemon.simulated import faults
from nodedaemon.simulated.containers import Pace
from nodedaemon.simulated.faults import ANY, Fault
from nodedaemon.simulated.line import Line, LineDialler
from nodedaemon.simulated.node import Hardware, SimulatedNode, home_of

#: Nodes that come up in a second: each has a connection to make and a key to prove.
COMING_UP: Final = 50.0


@dataclass(frozen=True)
class Plan:
    """What fleet it is. Nodes have the numbers of GPUs in turn, each such round the next model; speeds by chance."""

    nodes: int = 8
    models: tuple[str, ...] = ("NVIDIA GeForce RTX 4090",)
    gpus: tuple[int, ...] = (4,)
    speeds: tuple[float, ...] = (1.0,)
    prefix: str = "sim"
    seed: int = 0
    #: Copied for each node.
    pace: Pace = field(default_factory=Pace)

    def names(self) -> list[str]:
        """Of its nodes."""
        width = max(3, len(str(self.nodes)))
        return [f"{self.prefix}-{number:0{width}}" for number in range(1, self.nodes + 1)]

    def hardware(self, number: int) -> Hardware:
        """Of node `number`, from 0."""
        model = self.models[number // len(self.gpus) % len(self.models)]
        return Hardware(model, self.gpus[number % len(self.gpus)])


class Fleet:
    """`dialler`: makes one for each node. `tell` hears of each fault and its end."""

    def __init__(
        self,
        plan: Plan,
        state_dir: Path,
        dialler: Callable[[Line], LineDialler],
        tell: Callable[[str], None] = lambda _: None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tell = tell
        self._sleep = sleep
        self._chance = random.Random(plan.seed)  # noqa: S311, no secret
        self._nodes: dict[str, SimulatedNode] = {}
        for number, name in enumerate(plan.names()):
            pace = replace(plan.pace, speed=self._chance.choice(plan.speeds))
            chance = random.Random(f"{plan.seed} {name}")  # noqa: S311
            self._nodes[name] = SimulatedNode(
                name,
                home_of(state_dir, name),
                plan.hardware(number),
                pace=pace,
                dialler=dialler(Line()),
                chance=chance,
            )
        self._ends: set[asyncio.Task[None]] = set()
        #: What lasts, by node and kind: a later fault of the kind, or a return, makes an earlier end void.
        self._lasting: dict[tuple[str, str, int], Fault] = {}

    @property
    def nodes(self) -> Sequence[SimulatedNode]:
        """In order."""
        return list(self._nodes.values())

    async def run(self, tokens: Mapping[str, str], stop: asyncio.Event, *, faults_a_minute: float = 0.0) -> None:
        """Until `stop`. `tokens`: for joining, by address. Raises NotEnrolled, EnrolRefused, for the first of them."""
        async with asyncio.TaskGroup() as group:
            tasks = []
            for node in self.nodes:
                token = tokens.get(node.address, "")
                tasks.append(group.create_task(node.run(token), name=f"node {node.name}"))
                await self._sleep(1 / COMING_UP)
                if stop.is_set():
                    break
            if faults_a_minute:
                tasks.append(group.create_task(self._chaos(faults_a_minute), name="chaos"))
            await stop.wait()
            if faults_a_minute:
                tasks[-1].cancel()
            await asyncio.gather(*(node.leave() for node in self.nodes))
            for task in (*tasks, *self._ends):
                task.cancel()

    async def suffer(self, fault: Fault) -> str:
        """Have it happen; what happened, in words. Raises ValueError."""
        node = self._node(fault.node)
        words = await node.suffer(fault)
        what = (node.name, "kill" if fault.kind in ("stop", "return") else fault.kind, fault.gpu)
        if fault.kind == "heal":
            self._lasting = {key: one for key, one in self._lasting.items() if key[0] != node.name or key[1] == "kill"}
        else:
            self._lasting[what] = fault
        if not fault.lasts_s:
            self._tell(words)
            return words
        end = asyncio.create_task(self._end(node, what, fault), name=f"end of {fault.kind} {node.name}")
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)
        words += f", for {fault.lasts_s:g} s"
        self._tell(words)
        return words

    async def _end(self, node: SimulatedNode, what: tuple[str, str, int], fault: Fault) -> None:
        await self._sleep(fault.lasts_s)
        if self._lasting.get(what) is fault:
            del self._lasting[what]
            node.undo(fault)
            self._tell(f"{fault.kind} {node.name} is over")

    def _node(self, name: str) -> SimulatedNode:
        if name == ANY:
            up = [node for node in self.nodes if node.on]
            if not up:
                raise ValueError("no node is up")
            return self._chance.choice(up)
        if name not in self._nodes:
            raise ValueError(f"there is no simulated node {name!r}: the first is {next(iter(self._nodes))}")
        return self._nodes[name]

    async def _chaos(self, faults_a_minute: float) -> None:
        while True:
            await self._sleep(self._chance.expovariate(faults_a_minute / 60))
            up = [node for node in self.nodes if node.on]
            if not up:
                continue
            node = self._chance.choice(up)
            try:
                await self.suffer(faults.by_chance(self._chance, node.name, node.hardware.gpus))
            except ValueError:
                # It has no container to end, say.
                continue

    def status(self) -> dict[str, Any]:
        """How all are, as JSON has it."""
        return {"nodes": [node.status() for node in self.nodes]}
