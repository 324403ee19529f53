"""One simulated node: wired as `nodedaemon.__main__` wires a real one, over a simulated engine, GPUs and network.

It has lives: it is switched on, runs, is killed or stopped, and is switched on again with the key, the spool and the
images that it had.
"""

import asyncio
import random
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from nodedaemon.bulk import Bulk
from nodedaemon.engine import GIB
from nodedaemon.errors import EnrolRefused, NodeError, NotEnrolled
from nodedaemon.execute import Executor
from nodedaemon.flight import Recorder
from nodedaemon.identity import Identity
from nodedaemon.journal import Journal
from nodedaemon.machine import Machine
from nodedaemon.relay import Relay
from nodedaemon.replicas import Replicas
from nodedaemon.session import GOODBYE_LIMIT_S, Session
from nodedaemon.simulated.containers import Pace
from nodedaemon.simulated.engine import WHOLE, SimulatedEngine
from nodedaemon.simulated.faults import Fault, words_of
from nodedaemon.simulated.gpus import SimulatedGpus, SimulatedGpuTests
from nodedaemon.simulated.line import LineDialler
from nodedaemon.spool import Spool

#: What a machine has for each of its GPUs, and one without any.
CPUS_PER_GPU: Final = 16
MEMORY_PER_GPU: Final = 64 * GIB
SPOOL_BYTES: Final = 256 * 1024**2
#: For requests to end when it is stopped.
FINISH_S: Final = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a node is built of."""

    model: str
    gpus: int


class SimulatedNode:
    """`home`: where it keeps its key and spool. `ended`: why it will not be up again, in words; empty: it may be."""

    def __init__(
        self, name: str, home: Path, hardware: Hardware, *, pace: Pace, dialler: LineDialler, chance: random.Random
    ) -> None:
        self.name = name
        self.hardware = hardware
        self.line = dialler.line
        self.ended = ""
        self._home = home
        self._pace = pace
        self._dialler = dialler
        self._identity = Identity.load(home / "node.key")
        self._engine = SimulatedEngine(name, pace, chance)
        self._gpus: SimulatedGpus | None = None
        self._lost_gpus: set[int] = set()
        self._bad_gpus: set[int] = set()
        self._session: Session | None = None
        self._token = ""
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._leave = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """The node's address."""
        return self._identity.address

    @property
    def on(self) -> bool:
        """It is switched on."""
        return self._wanted.is_set() and not self.ended

    async def run(self, token: str) -> None:
        """Its lives, until cancelled. `token`: for joining, if it has to. Raises NotEnrolled, EnrolRefused."""
        self._token = token
        try:
            while not self.ended:
                await self._wanted.wait()
                self._leave.clear()
                self._life = asyncio.create_task(self._live(), name=f"life of {self.name}")
                await asyncio.wait([self._life])
                if not self._life.cancelled() and (fault := self._life.exception()):
                    self._end(fault)
        finally:
            if self._life is not None and not self._life.done():
                self._life.cancel()
                await asyncio.wait([self._life])

    def _end(self, fault: BaseException) -> None:
        while isinstance(fault, BaseExceptionGroup):
            fault = fault.exceptions[0]
        if isinstance(fault, NotEnrolled | EnrolRefused) or not isinstance(fault, NodeError):
            raise fault
        self.ended = str(fault)
        log.warning("simulated_node_ended", node=self.name, reason=self.ended)

    async def leave(self) -> None:
        """Say goodbye, if it is up, and return when it is off."""
        self._wanted.clear()
        self._leave.set()
        if self._life is not None:
            await asyncio.wait([self._life])

    # A life.

    async def _live(self) -> None:
        engine = self._engine
        gpus = SimulatedGpus(self.address, self.hardware.model, self.hardware.gpus, engine.busy_gpus)
        gpus.lost = self._lost_gpus
        machine = Machine(engine)
        machine.cpus = float(CPUS_PER_GPU * max(1, self.hardware.gpus))
        machine.memory_bytes = MEMORY_PER_GPU * max(1, self.hardware.gpus)
        replicas = Replicas(engine, may_start=lambda assignment: gpus.refusal(assignment.gpu_ids))
        gpu_tests = SimulatedGpuTests(
            gpus, replicas.holds, lambda gpu_id: gpu_id in [gpus.id_of(index) for index in self._bad_gpus]
        )
        relay = Relay()
        spool = Spool(self._home / "spool", limit_bytes=SPOOL_BYTES)
        journal = Journal(self._home / "journal")
        bulk = Bulk(self._dialler.channel())
        recorder = Recorder(logs=engine, replicas=replicas, gpus=gpus, tell=bulk.record)
        executor = Executor(places=replicas, relay=relay, bulk=bulk, spool=spool, journal=journal, record=recorder.keep)
        replicas.on_exit(executor.container_exited)
        session = Session(
            dialler=self._dialler,
            identity=self._identity,
            boot_id=secrets.token_hex(16),
            name=self.name,
            token=self._token,
            executor=executor,
            bulk=bulk,
            replicas=replicas,
            gpus=gpus,
            machine=machine,
            gpu_tests=gpu_tests,
        )
        self._gpus, self._session = gpus, session
        try:
            async with asyncio.TaskGroup() as group:
                loops = [
                    group.create_task(gpus.run(), name="gpus"),
                    group.create_task(gpu_tests.run(), name="gpu tests"),
                    group.create_task(machine.run(), name="machine"),
                    group.create_task(replicas.run(), name="replicas"),
                    group.create_task(executor.run(), name="executor"),
                    group.create_task(spool.run(), name="spool"),
                    group.create_task(recorder.run(), name="flights"),
                ]
                await gpus.read()
                await machine.survey()
                await replicas.listed()
                speaking = group.create_task(session.run(), name="session")
                await self._leave.wait()
                executor.close()
                await executor.finish(FINISH_S)
                session.leave()
                await asyncio.wait([speaking], timeout=GOODBYE_LIMIT_S + 1)
                for loop in (*loops, speaking):
                    loop.cancel()
        finally:
            self._gpus = self._session = None
            journal.close()
            relay.close()
            spool.close()
            await engine.close()
            await bulk.shut()

    # What happens to it.

    async def suffer(self, fault: Fault) -> str:
        """Make it so; what happened, in words. How long it lasts is the caller's. Raises ValueError."""
        if fault.kind.startswith("gpu-") and fault.gpu >= self.hardware.gpus:
            raise ValueError(f"{self.name} has {self.hardware.gpus} GPUs, counted from 0")
        if self.ended:
            raise ValueError(f"{self.name} has ended: {self.ended}")
        match fault.kind:
            case "kill":
                await self._kill()
            case "stop":
                await self.leave()
            case "container-exit":
                replica_id = await self._engine.exit(fault.number)
                if not replica_id:
                    raise ValueError(f"{self.name} has no running container")
                return f"container-exit {self.name}: that of {replica_id}, with code {fault.number}"
            case _:
                self._change(fault)
        self._news()
        return words_of(replace(fault, lasts_s=0.0))

    async def _kill(self) -> None:
        self._wanted.clear()
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])

    def _change(self, fault: Fault) -> None:
        match fault.kind:
            case "return":
                self._wanted.set()
            case "silence":
                self.line.cut()
            case "slow":
                self._pace.slow = fault.times
            case "gpu-xid":
                if self._gpus is None:
                    raise ValueError(f"{self.name} is off")
                self._gpus.xid(fault.gpu, fault.number)
            case "gpu-lost":
                self._lost_gpus.add(fault.gpu)
            case "gpu-bad":
                self._bad_gpus.add(fault.gpu)
            case "pull-fail" | "disk-full":
                self._engine.pull_fault = fault.kind
            case "heal":
                self._heal()

    def undo(self, fault: Fault) -> None:
        """What lasted is over."""
        match fault.kind:
            case "kill" | "stop":
                self._wanted.set()
            case "silence":
                self.line.mend()
            case "slow":
                self._pace.slow = 1.0
            case "gpu-lost":
                self._lost_gpus.discard(fault.gpu)
            case "gpu-bad":
                self._bad_gpus.discard(fault.gpu)
            case "pull-fail" | "disk-full":
                self._engine.pull_fault = ""
        self._news()

    def _heal(self) -> None:
        self.line.mend()
        self._pace.slow = 1.0
        self._lost_gpus.clear()
        self._bad_gpus.clear()
        self._engine.pull_fault = ""

    def _news(self) -> None:
        if self._gpus is not None:
            self._gpus.look()
        if self._session is not None:
            self._session.report_soon()

    def status(self) -> dict[str, Any]:
        """How it is, as JSON has it."""
        faults = [name for name, there in self._faults().items() if there]
        return {
            "name": self.name,
            "addr": self.address,
            "on": self.on,
            "connected": self._session is not None and self._session.up,
            "model": self.hardware.model,
            "gpus": self.hardware.gpus,
            "faults": faults,
            "ended": self.ended,
            "answered": self._engine.answered,
            "overcommitted": list(self._engine.overcommitted),
            "containers": [
                {
                    "replica": one.replica_id,
                    "workspace": one.workspace,
                    "gpus": list(one.gpu_ids),
                    "share": one.gpu_share or WHOLE,
                }
                for one in self._engine.running()
            ],
        }

    def _faults(self) -> dict[str, bool]:
        return {
            "off": not self.on,
            "silence": self.line.cut_off,
            f"slow {self._pace.slow:g}x": self._pace.slow != 1.0,
            **{f"gpu-lost {index}": True for index in sorted(self._lost_gpus)},
            **{f"gpu-bad {index}": True for index in sorted(self._bad_gpus)},
            self._engine.pull_fault: bool(self._engine.pull_fault),
        }


def home_of(state_dir: Path, name: str) -> Path:
    """Where a node keeps what it must not forget."""
    home = state_dir / "nodes" / name
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home
