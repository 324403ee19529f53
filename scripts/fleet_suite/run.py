"""One run: programs up, customers and faults for so long, then calm; watched all the time, audited at the end."""

import asyncio
import contextlib
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from ngpu import wire
from ngpu.v1 import fleet_pb2, fleet_pb2_grpc, workspace_pb2

from nodedaemon.simulated import door, faults
from scripts.bench.loads import cpu_s, rss_mib
from scripts.fleet_suite import audit, customers, records
from scripts.fleet_suite.audit import Stuck
from scripts.fleet_suite.customers import Customers
from scripts.programs import BIN, Failed, Platform, Program

MODELS: Final = ("NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S-48GB")
#: What customers call them.
WORDS: Final = ("4090", "A100", "L40S")
#: For all nodes to have joined.
JOIN_S: Final = 90.0
#: Between two looks at the database, and at every workspace through the API.
LOOK_S: Final = 1.0
WATCH_S: Final = 3.0
SAMPLE_S: Final = 2.0
#: A node whose GPU is in quarantine is tested and opened again by its operator after about that time.
TEST_S: Final = 20.0
#: Of all GPUs, wanted while it is calm: all of it fits, whatever the sizes.
CALM: Final = 0.6
#: It is calm once nothing has been under way for so long: between two steps of an update all seems well.
CALM_S: Final = 2.0
CALL_S: Final = 30.0
#: Of memory in the last sixth of the run, against that in the third sixth, when it is warm: what may be added.
GROWTH_SHARE: Final = 0.15
GROWTH_MIB: Final = 12.0


@dataclass
class Findings:
    """Counts, and what must not be."""

    faults: Counter[str] = field(default_factory=Counter)
    looks: int = 0
    watched: int = 0
    most_gpus: float = 0.0
    explained: int = 0
    tested: int = 0
    #: Of the control plane, in MiB, every SAMPLE_S.
    memory: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, None] = field(default_factory=dict)

    def say(self, faults: Sequence[str]) -> None:
        """Each once."""
        self.wrong.update(dict.fromkeys(faults))


@dataclass(frozen=True)
class Size:
    """Of a run.

    `patience_s`: how long a replica may stand still without a word. `unsaid_s`: how long one may be on no node before
    it is said why. `calm_s`: for everything to settle.
    """

    nodes: int
    gpus: int
    seconds: float
    seed: int
    rate: float
    calls: float
    faults_a_minute: float
    patience_s: float
    unsaid_s: float
    calm_s: float
    pull_s: float
    start_s: float
    settings: dict[str, str] = field(default_factory=dict)


def gpus_of_nodes(nodes: int, gpus: int) -> tuple[int, ...]:
    """How many a node has, to be taken in turn so that nodes of several sizes have so many together."""
    mean = max(1, gpus // nodes)
    if gpus == nodes * mean and mean % 2 == 0:
        # Largest first, since a fleet may be smaller than the turn.
        return (mean * 2, mean, mean // 2, mean // 2)
    return (mean,)


class Run:
    """A control plane, a bridge and a simulated fleet, for as long as the block lasts."""

    def __init__(self, state: Path, size: Size) -> None:
        self.size = size
        self.findings = Findings()
        self._chance = random.Random(size.seed)  # noqa: S311
        self._sim_state = state / "sim"
        self._database = state / "controlplane" / "ngpu.db"
        self._platform = Platform(state, settings=size.settings)
        self._simulator: Program

    def do(self) -> Findings:
        """All of it. Raises Failed if the programs do not come up."""
        began = time.monotonic()
        with self._platform as platform:
            platform.start_bridge()
            arguments = ["--nodes", self.size.nodes, "--seed", self.size.seed, "--state-dir", self._sim_state]
            arguments += ["--pull", self.size.pull_s, "--start", self.size.start_s, "--service", 0.3, "--speed", 1]
            arguments += ["--speed", 2]
            for gpus in gpus_of_nodes(self.size.nodes, self.size.gpus):
                arguments += ["--gpus", gpus]
            for model in MODELS:
                arguments += ["--model", model]
            self._simulator = platform.launch([str(BIN / "ngpu"), "simulate", *map(str, arguments)], "simulate")
            self._await_nodes()
            self.findings.figures["nodes up after, s"] = round(time.monotonic() - began, 1)
            asyncio.run(self._drive())
        return self.findings

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + JOIN_S
        while True:
            with contextlib.suppress(door.NoSimulation):
                nodes = door.ask(self._sim_state, "status")["nodes"]
                if sum(node["connected"] for node in nodes) == self.size.nodes:
                    return
            if self._simulator.process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the simulated nodes did not come up:\n{self._simulator.log.read_text()[-2000:]}")
            time.sleep(0.2)

    async def _drive(self) -> None:
        token = (self._platform.state / "controlplane" / "operator.token").read_text().strip()
        self._metadata = ((wire.AUTHORIZATION, f"Bearer {token}"),)
        async with grpc.aio.insecure_channel(self._platform.server, options=wire.CLIENT_OPTIONS) as channel:
            self._fleet: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            self._workspaces = customers.stub_of(channel)
            nodes = (await self._nodes()).values()
            gpus = [len(node.inventory.gpus) for node in nodes]
            self.findings.figures |= {"nodes": len(gpus), "gpus": sum(gpus)}
            self._customers = Customers(
                self._workspaces,
                self._metadata,
                self._platform.url,
                self._chance,
                gpus=sum(gpus),
                models=WORDS,
                largest=max(gpus),
                rate=self.size.rate,
                calls=self.size.calls,
            )
            async with asyncio.TaskGroup() as group:
                watching = [
                    group.create_task(self._look(), name="look"),
                    group.create_task(self._watch(), name="watch"),
                    group.create_task(self._sample(), name="sample"),
                    group.create_task(self._test_gpus(), name="operator"),
                ]
                await self._suffer(group)
                await self._calm()
                for task in watching:
                    task.cancel()
            await self._finish()

    # What happens.

    async def _suffer(self, group: asyncio.TaskGroup) -> None:
        began, used = time.monotonic(), self._cpu_s()
        doing = [
            group.create_task(self._customers.come_and_go(), name="customers"),
            group.create_task(self._customers.call(), name="callers"),
            group.create_task(self._inflict(), name="faults"),
        ]
        await asyncio.sleep(self.size.seconds)
        passed = time.monotonic() - began
        for name, before, after in zip(("control plane", "simulator", "bridge"), used, self._cpu_s(), strict=True):
            self.findings.figures[f"{name}, share of a core"] = round((after - before) / passed, 3)
        for task in doing:
            task.cancel()
        await asyncio.wait(doing)

    def _pids(self) -> tuple[int, int, int]:
        bridge = next(one for one in self._platform.programs if one.name == "ngpu-bridge")
        return self._platform.controlplane.pid, self._simulator.pid, bridge.pid

    def _cpu_s(self) -> list[float]:
        return [cpu_s([pid]) for pid in self._pids()]

    async def _inflict(self) -> None:
        gpus = {node["name"]: node["gpus"] for node in (await self._ask("status"))["nodes"]}
        while True:
            await asyncio.sleep(self._chance.expovariate(self.size.faults_a_minute / 60))
            name = self._chance.choice(list(gpus))
            fault = faults.by_chance(self._chance, name, gpus[name])
            answer = await self._ask(faults.words_of(fault))
            if "error" not in answer:
                self.findings.faults[fault.kind] += 1

    async def _test_gpus(self) -> None:
        """The operator: resets and tests GPUs that are in quarantine for good, and opens their nodes again."""
        while True:
            await asyncio.sleep(TEST_S)
            await self._open_nodes()

    async def _open_nodes(self) -> None:
        for addr, node in (await self._nodes()).items():
            if any("Xid" in one.reason for one in node.gpu_health):
                request = fleet_pb2.SetNodeAvailabilityRequest(node=addr, availability=fleet_pb2.AVAILABILITY_OPEN)
                await self._fleet.SetNodeAvailability(request, metadata=self._metadata, timeout=CALL_S)
                self.findings.tested += 1

    async def _calm(self) -> None:
        """Everything is mended, and what is wanted fits: until all of it is ready, or the time is up."""
        for node in (await self._ask("status"))["nodes"]:
            await self._ask(f"heal {node['name']}")
            await self._ask(f"return {node['name']}")
        await self._customers.go(CALM)
        await self._open_nodes()
        began = calm_since = time.monotonic()
        while (now := time.monotonic()) - began < self.size.calm_s and now - calm_since < CALM_S:
            await asyncio.sleep(0.5)
            if await self._unready() or await self._unsettled():
                calm_since = time.monotonic()
        self.findings.figures["calm after, s"] = round(calm_since - began, 1)

    async def _unready(self) -> list[str]:
        """What is not ready although it has a node, or has none although there is room; in words."""
        held, _ = await asyncio.to_thread(records.held, self._database)
        short = await asyncio.to_thread(records.shortages, self._database)
        nodes = list((await self._nodes()).values())
        faults = []
        async for one in self._all_workspaces():
            lacks = short.get(one.spec.name, (0, 0))[1]
            stand = f"{one.spec.name} has {one.ready_replicas} of {one.wanted_replicas} replicas ready"
            if one.ready_replicas != one.wanted_replicas - lacks:
                faults.append(f"{stand}, {lacks} on no node; it says: {one.message or 'nothing'}")
            elif lacks or one.updated_replicas != one.ready_replicas:
                # An update, too, needs room for one replica more.
                room = audit.room_for(one.spec, nodes, held)
                if room or not one.message:
                    where = f"there is room on {', '.join(room[:3]) or 'no node'}"
                    faults.append(f"{stand}, {one.updated_replicas} as last described, {where}; it says: {one.message}")
        return faults

    async def _unsettled(self) -> list[str]:
        """What is to go and has not gone, and containers that are not what they should be; in words."""
        held, _ = await asyncio.to_thread(records.held, self._database)
        leaving = await asyncio.to_thread(records.leaving, self._database)
        return leaving + audit.running_otherwise(await self._ask("status"), held)

    # What is watched.

    async def _look(self) -> None:
        """At the database: one consistent moment."""
        while True:
            held, nodes = await asyncio.to_thread(records.held, self._database)
            self.findings.say(audit.overcommitted(held, nodes))
            self.findings.looks += 1
            taken = sum(len(one.gpu_ids) * one.share for one in held) / audit.WHOLE
            share = taken / max(1, sum(len(node.gpu_ids) for node in nodes.values()))
            self.findings.most_gpus = max(self.findings.most_gpus, share)
            await asyncio.sleep(LOOK_S)

    async def _watch(self) -> None:
        """At every workspace: who stands still, and who is nowhere and nobody says why."""
        stuck = Stuck(self.size.patience_s)
        # By name: since when so many are wanted and so many are on no node.
        short: dict[str, tuple[tuple[int, int], float]] = {}
        while True:
            await asyncio.sleep(WATCH_S)
            nodes = await self._nodes()
            there = [one async for one in self._all_workspaces()]
            connected = [addr for addr, node in nodes.items() if node.connected]
            replicas = [replica for one in there for replica in one.replicas]
            self.findings.say(stuck.seen(time.monotonic(), replicas, connected))
            self.findings.watched += len(replicas)
            now = time.monotonic()
            lacking = await asyncio.to_thread(records.shortages, self._database)
            short = {
                name: short[name] if name in short and short[name][0] == lacks else (lacks, now)
                for name, lacks in lacking.items()
            }
            for name, (lacks, since) in short.items():
                # Until then a plan may not yet have come to it.
                if now - since >= self.size.unsaid_s:
                    await self._check_explained(name, lacks)

    async def _check_explained(self, name: str, lacks: tuple[int, int]) -> None:
        request = fleet_pb2.ExplainRequest(workspace=name)
        try:
            answer = await self._fleet.Explain(request, metadata=self._metadata, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return
            raise
        workspace = await self._workspace(name)
        now = await asyncio.to_thread(records.shortages, self._database)
        if workspace is not None and now.get(name) == lacks:
            self.findings.explained += lacks[1]
            self.findings.say(audit.unexplained(name, lacks[1], workspace.message, answer))

    async def _all_workspaces(self) -> Any:
        for name in list(self._customers.living):
            if (found := await self._workspace(name)) is not None:
                yield found

    async def _workspace(self, name: str) -> workspace_pb2.Workspace | None:
        request = workspace_pb2.GetWorkspaceRequest(workspace=name)
        try:
            answer = await self._workspaces.GetWorkspace(request, metadata=self._metadata, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        found: workspace_pb2.Workspace = answer.workspace
        return found

    async def _nodes(self) -> dict[str, fleet_pb2.Node]:
        answer = await self._fleet.ListNodes(fleet_pb2.ListNodesRequest(), metadata=self._metadata, timeout=CALL_S)
        return {node.addr: node for node in answer.nodes}

    async def _ask(self, words: str) -> dict[str, Any]:
        reader, writer = await asyncio.open_unix_connection(self._sim_state / door.NAME, limit=door.ANSWER_BYTES)
        try:
            writer.write(words.encode() + b"\n")
            answer: dict[str, Any] = json.loads(await reader.readline())
        finally:
            writer.close()
        return answer

    async def _sample(self) -> None:
        while True:
            self.findings.memory.append(rss_mib([self._platform.controlplane.pid]))
            await asyncio.sleep(SAMPLE_S)

    # The end.

    async def _finish(self) -> None:
        findings = self.findings
        held, nodes = await asyncio.to_thread(records.held, self._database)
        findings.say(audit.overcommitted(held, nodes))
        status = await self._ask("status")
        findings.say([one for node in status["nodes"] for one in node["overcommitted"]])
        findings.say([f"{node['name']} has ended: {node['ended']}" for node in status["nodes"] if node["ended"]])
        findings.say(await self._unsettled())
        findings.say(await self._unready())
        findings.say(self._customers.wrong)
        median_s, late_s = await asyncio.to_thread(records.placed_after_s, self._database)
        findings.figures |= {
            "replicas placed": await asyncio.to_thread(records.replicas_ever, self._database),
            "placed after, median s": round(median_s, 3),
            "placed after, p99 s": round(late_s, 3),
            "simulator, MiB": round(rss_mib([self._simulator.pid])),
            **self._memory(),
            "customers": dict(self._customers.did),
            "answers": dict(self._customers.answers),
            "answered by containers": sum(node["answered"] for node in status["nodes"]),
        }

    def _memory(self) -> dict[str, float]:
        samples = self.findings.memory
        sixth = max(1, len(samples) // 6)
        warm = statistics.median(samples[2 * sixth : 3 * sixth] or samples)
        end = statistics.median(samples[-sixth:])
        if end > warm * (1 + GROWTH_SHARE) + GROWTH_MIB:
            self.findings.say([f"the control plane's memory grew from {warm:.0f} MiB when warm to {end:.0f} MiB"])
        return {
            "control plane when warm, MiB": round(warm, 1),
            "control plane at the end, MiB": round(end, 1),
            "control plane at most, MiB": round(max(samples), 1),
        }


def words(findings: Findings) -> Iterator[str]:
    """For people, line by line."""
    figures = findings.figures
    for name, value in figures.items():
        if isinstance(value, dict):
            yield f"{name + ':':<30} {', '.join(f'{count} {what}' for what, count in value.items()) or 'none'}"
        else:
            yield f"{name + ':':<30} {value}"
    yield f"{'faults:':<30} {', '.join(f'{count} {kind}' for kind, count in sorted(findings.faults.items())) or 'none'}"
    yield f"{'GPUs held at most:':<30} {findings.most_gpus:.0%}"
    yield f"{'looks at the database:':<30} {findings.looks}"
    yield f"{'replicas looked at:':<30} {findings.watched}"
    yield f"{'unplaced ones explained:':<30} {findings.explained}"
    yield f"{'GPUs tested after an Xid:':<30} {findings.tested}"
    for fault in findings.wrong:
        yield f"WRONG {fault}"
