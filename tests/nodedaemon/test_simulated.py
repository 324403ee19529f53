"""Simulated nodes: engine, GPUs, network and faults behave as real ones are relied upon to."""

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import CliRunner

from nodedaemon.__main__ import app
from nodedaemon.engine import Assignment, DiskFull, Readiness, RegistryUnreachable
from nodedaemon.gpu_tests import State
from nodedaemon.readiness import probe
from nodedaemon.simulated import door, faults
from nodedaemon.simulated import gpus as simulated_gpus
from nodedaemon.simulated.containers import Pace
from nodedaemon.simulated.engine import SimulatedEngine
from nodedaemon.simulated.faults import BadFault, Fault
from nodedaemon.simulated.fleet import Fleet, Plan
from nodedaemon.simulated.gpus import SimulatedGpus, SimulatedGpuTests, memory_gib
from nodedaemon.simulated.line import Line, LineChannel, LineDialler
from nodedaemon.simulated.node import Hardware
from tests.nodedaemon.fake_engine import FakeTime, settle

FAST = Pace(pull_s=0, start_s=0, service_s=0)


def assignment(replica_id: str = "r-1", *, gpu_ids: tuple[str, ...] = ("GPU-0",), share: int = 0) -> Assignment:
    return Assignment(
        replica_id=replica_id,
        workspace="img2img",
        spec_hash="h",
        image="registry.example/img2img:1",
        ports=(8080,),
        readiness=Readiness(8080),
        gpu_ids=gpu_ids,
        gpu_share=share,
    )


def engine(time: FakeTime | None = None, pace: Pace = FAST) -> SimulatedEngine:
    if time is None:
        return SimulatedEngine("sim-001", pace, random.Random(1))
    return SimulatedEngine("sim-001", pace, random.Random(1), monotonic=time.monotonic, sleep=time.sleep)


# Faults as they are typed.


@pytest.mark.parametrize(
    ("typed", "fault"),
    [
        ("kill sim-001", Fault("kill", "sim-001")),
        ("kill sim-001 30s", Fault("kill", "sim-001", lasts_s=30)),
        ("silence any 2m", Fault("silence", "any", lasts_s=120)),
        ("slow sim-001 4x", Fault("slow", "sim-001", times=4)),
        ("slow sim-001 2.5 10", Fault("slow", "sim-001", times=2.5, lasts_s=10)),
        ("gpu-xid sim-001 0 79", Fault("gpu-xid", "sim-001", gpu=0, number=79)),
        ("gpu-lost sim-001 3 500ms", Fault("gpu-lost", "sim-001", gpu=3, lasts_s=0.5)),
        ("gpu-bad sim-001 3", Fault("gpu-bad", "sim-001", gpu=3)),
        ("container-exit sim-001 137", Fault("container-exit", "sim-001", number=137)),
        ("heal sim-001", Fault("heal", "sim-001")),
    ],
)
def test_a_fault_is_typed(typed: str, fault: Fault) -> None:
    assert faults.parse(typed.split()) == fault
    assert faults.parse(faults.words_of(fault).split()) == fault


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", "there is no fault ''"),
        ("burn sim-001", "there is no fault 'burn': kill, stop"),
        ("kill", r"write: kill NODE \[TIME\]"),
        ("gpu-xid sim-001 0", "write: gpu-xid NODE GPU XID"),
        ("heal sim-001 3s", "write: heal NODE"),
        ("kill sim-001 soon", "'soon' is no time: write 30s"),
        ("gpu-xid sim-001 first 79", "'first' is no GPU: write a number"),
        ("slow sim-001 0x", "write 4x"),
    ],
)
def test_what_is_no_fault_is_told(typed: str, words: str) -> None:
    with pytest.raises(BadFault, match=words):
        faults.parse(typed.split())


def test_chance_makes_faults_that_can_be_typed_and_the_same_seed_the_same() -> None:
    made = [faults.by_chance(random.Random(seed), "sim-001", gpus=4) for seed in range(200)]
    assert {fault.kind for fault in made} == set(faults.CHAOS)
    assert [faults.parse(faults.words_of(fault).split()) for fault in made] == made
    assert made == [faults.by_chance(random.Random(seed), "sim-001", gpus=4) for seed in range(200)]
    without = [faults.by_chance(random.Random(seed), "sim-001", gpus=0) for seed in range(200)]
    assert not any(fault.kind.startswith("gpu-") for fault in without)


# The engine.


async def test_a_pull_takes_its_time_once() -> None:
    time = FakeTime()
    one = engine(time, Pace(pull_s=10))
    heard: list[int] = []
    pulling = asyncio.create_task(one.pull("a/b:1", None, heard.append))
    await time.advance(1)
    assert heard
    assert heard[-1] < 100
    assert await one.images() == []
    await time.advance(60)
    digest = await pulling
    assert heard == sorted(heard)
    assert heard[-1] == 100
    assert [image.reference for image in await one.images()] == ["a/b:1"]
    assert await one.pull("a/b:1", None, heard.append) == digest


@pytest.mark.parametrize(("fault", "error"), [("pull-fail", RegistryUnreachable), ("disk-full", DiskFull)])
async def test_a_pull_fails_as_told(fault: str, error: type[Exception]) -> None:
    one = engine()
    one.pull_fault = fault
    with pytest.raises(error, match="a/b:1"):
        await one.pull("a/b:1", None, lambda _: None)


async def test_a_container_is_ready_once_it_has_loaded_and_says_who_it_is() -> None:
    time = FakeTime()
    one = engine(time, Pace(start_s=5, service_s=0))
    container = await one.start(assignment(), restarts=0)
    address = container.addresses[8080]
    assert "refused" in await probe(Readiness(8080), address)
    await time.advance(10)
    assert await probe(Readiness(8080), address) == ""
    async with aiohttp.ClientSession() as session, session.post(f"http://{address[0]}:{address[1]}/x") as answer:
        said = await answer.json()
    assert (said["node"], said["replica"], said["gpus"]) == ("sim-001", "r-1", ["GPU-0"])
    assert one.answered == 1
    await one.close()
    assert one.answered == 1
    assert "refused" in await probe(Readiness(8080), address)


async def test_a_container_that_exits_is_told_and_its_work_is_cut() -> None:
    one = engine()
    looks: list[None] = []
    watching = asyncio.create_task(one.watch(lambda: looks.append(None)))
    await settle()
    address = (await one.start(assignment(), restarts=0)).addresses[8080]
    await settle()
    before = len(looks)
    async with aiohttp.ClientSession() as session:
        call = asyncio.create_task(session.post(f"http://{address[0]}:{address[1]}/x?seconds=60"))
        while not one.busy_gpus()["GPU-0"]:
            await asyncio.sleep(0.001)
        assert await one.exit(137) == "r-1"
        with pytest.raises(aiohttp.ClientError):
            await call
    (container,) = await one.containers()
    assert container.exit
    assert container.exit.code == 137
    assert len(looks) > before
    assert await one.exit(1) == ""
    assert one.running() == []
    watching.cancel()


async def test_too_much_on_one_gpu_is_written_down() -> None:
    one = engine()
    await one.start(assignment("r-1", share=600), restarts=0)
    await one.start(assignment("r-2", share=400), restarts=0)
    await one.start(assignment("r-3", gpu_ids=("GPU-1",)), restarts=0)
    assert not one.overcommitted
    await one.start(assignment("r-4", share=1), restarts=0)
    assert list(one.overcommitted) == ["GPU-0 of sim-001 has 1001 thousandths taken by r-1, r-2, r-4"]
    await one.close()


# GPUs.


@pytest.mark.parametrize(
    ("model", "gib"), [("NVIDIA GeForce RTX 4090", 24), ("NVIDIA A100-SXM4-80GB", 80), ("NVIDIA H100 80GB HBM3", 80)]
)
def test_memory_is_as_the_model_says(model: str, gib: int) -> None:
    assert memory_gib(model) == gib


async def test_gpus_are_the_same_each_time_and_fail_as_told() -> None:
    gpus = SimulatedGpus("0xA", "NVIDIA L4", 2, dict)
    again = SimulatedGpus("0xA", "NVIDIA L4", 2, dict)
    reading = [asyncio.create_task(each.run()) for each in (gpus, again)]
    await gpus.read()
    await again.read()
    ids = [gpu.id for gpu in gpus.inventory().gpus]
    assert ids == [gpu.id for gpu in again.inventory().gpus]
    assert gpus.refusal(ids) == ""

    gpus.xid(1, 79)
    gpus.lost.add(0)
    gpus.look()
    await settle()
    lost, failed = gpus.readings()
    assert "GPU is lost" in gpus.refusal([ids[0]])
    assert (lost.error, failed.xids) == ("GPU is lost", (79,))
    gpus.acknowledge([failed])
    gpus.lost.clear()
    gpus.look()
    await settle()
    assert [(one.error, one.xids) for one in gpus.readings()] == [("", ()), ("", ())]
    for task in reading:
        task.cancel()


# The network.


class Call:
    """A stream of gRPC's."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.arriving: asyncio.Queue[str] = asyncio.Queue()
        self.cancelled = False

    async def write(self, message: str) -> None:
        self.written.append(message)

    async def read(self) -> str:
        return await self.arriving.get()

    def cancel(self) -> bool:
        self.cancelled = True
        return True


class Channel:
    """One that has only that stream."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def stream_stream(self, *_: Any, **__: Any) -> Any:
        return lambda **_: self.call


async def test_a_cut_line_holds_back_both_ways_until_it_stands() -> None:
    call, line = Call(), Line()
    stream = over(call, line)
    line.cut()
    writing, reading = asyncio.create_task(stream.write("up")), asyncio.create_task(stream.read())
    call.arriving.put_nowait("down")
    await settle()
    assert call.written == []
    assert not reading.done()
    line.mend()
    assert await reading == "down"
    await writing
    assert call.written == ["up"]


async def test_a_call_over_a_cut_line_can_be_given_up() -> None:
    call, line = Call(), Line()
    stream = over(call, line)
    line.cut()
    call.arriving.put_nowait("down")
    reading = asyncio.create_task(stream.read())
    await settle()
    stream.cancel()
    assert await reading == "down"
    assert call.cancelled


def over(call: Call, line: Line) -> Any:
    return LineChannel(Channel(call), line).stream_stream("x")()  # type: ignore[arg-type]


# The fleet.


def fleet_of(tmp_path: Path, time: FakeTime, **fields: Any) -> Fleet:
    return Fleet(Plan(**fields), tmp_path, lambda line: LineDialler("127.0.0.1:1", line=line), sleep=time.sleep)


def test_nodes_have_the_numbers_of_gpus_and_the_models_in_turn() -> None:
    plan = Plan(nodes=5, gpus=(8, 2), models=("A", "B"))
    assert plan.names()[0] == "sim-001"
    assert [plan.hardware(number) for number in range(5)] == [
        Hardware("A", 8),
        Hardware("A", 2),
        Hardware("B", 8),
        Hardware("B", 2),
        Hardware("A", 8),
    ]


async def test_the_same_state_directory_is_the_same_nodes(tmp_path: Path) -> None:
    first = fleet_of(tmp_path, FakeTime(), nodes=2)
    again = fleet_of(tmp_path, FakeTime(), nodes=3)
    assert [node.address for node in again.nodes][:2] == [node.address for node in first.nodes]
    assert len({node.address for node in again.nodes}) == 3


async def test_what_lasts_ends_unless_it_was_said_anew(tmp_path: Path) -> None:
    time = FakeTime()
    fleet = fleet_of(tmp_path, time, nodes=1)
    (node,) = fleet.nodes
    await fleet.suffer(Fault("silence", "sim-001", lasts_s=10))
    await fleet.suffer(Fault("slow", "any", times=4))
    await fleet.suffer(Fault("gpu-lost", "sim-001", gpu=2, lasts_s=10))
    await fleet.suffer(Fault("gpu-bad", "sim-001", gpu=1, lasts_s=10))
    assert node.status()["faults"] == ["silence", "slow 4x", "gpu-lost 2", "gpu-bad 1"]
    await time.advance(5)
    await fleet.suffer(Fault("silence", "sim-001", lasts_s=10))
    await time.advance(6)
    assert node.status()["faults"] == ["silence", "slow 4x"]
    await time.advance(5)
    assert node.status()["faults"] == ["slow 4x"]
    await fleet.suffer(Fault("heal", "sim-001"))
    assert node.status()["faults"] == []


async def test_a_gpu_of_a_simulated_node_passes_its_test_unless_it_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_gpus, "TEST_S", 0.0)
    gpus, bad = SimulatedGpus("0xA", "NVIDIA L4", 2, dict), set[str]()
    tests = SimulatedGpuTests(gpus, lambda _: False, bad.__contains__)
    loops = [asyncio.create_task(each.run()) for each in (gpus, tests)]
    await gpus.read()
    bad.add(gpus.id_of(1))
    tests.apply([(gpus.id_of(0), 7), (gpus.id_of(1), 7)])
    await settle()
    assert [(one.number, one.state) for one in tests.reports()] == [(7, State.PASSED), (7, State.FAILED)]
    for loop in loops:
        loop.cancel()


async def test_a_node_that_was_killed_returns_when_told_or_in_time(tmp_path: Path) -> None:
    time = FakeTime()
    fleet = fleet_of(tmp_path, time, nodes=1)
    (node,) = fleet.nodes
    await fleet.suffer(Fault("kill", "sim-001"))
    assert node.status()["on"] is False
    with pytest.raises(ValueError, match="no node is up"):
        await fleet.suffer(Fault("silence", "any"))
    await fleet.suffer(Fault("return", "sim-001"))
    assert node.status()["on"] is True
    await fleet.suffer(Fault("kill", "sim-001", lasts_s=10))
    await time.advance(11)
    assert node.status()["on"] is True


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("kill", "sim-9"), "there is no simulated node 'sim-9': the first is sim-001"),
        (Fault("gpu-lost", "sim-001", gpu=4), "sim-001 has 4 GPUs, counted from 0"),
        (Fault("gpu-xid", "sim-001", number=79), "sim-001 is off"),
        (Fault("container-exit", "sim-001", number=1), "sim-001 has no running container"),
    ],
)
async def test_what_cannot_happen_is_told(tmp_path: Path, fault: Fault, words: str) -> None:
    fleet = fleet_of(tmp_path, FakeTime(), nodes=1)
    with pytest.raises(ValueError, match=words):
        await fleet.suffer(fault)


# The door.


async def test_a_fault_is_told_at_the_door(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, FakeTime(), nodes=1)
    async with door.open_door(fleet, tmp_path):
        assert await asyncio.to_thread(door.ask, tmp_path, "slow sim-001 4x") == {"done": "slow sim-001 4x"}
        status = await asyncio.to_thread(door.ask, tmp_path, "status")
        assert status["nodes"][0]["faults"] == ["slow 4x"]
        with pytest.raises(door.NotDone, match="there is no fault 'burn'"):
            await asyncio.to_thread(door.ask, tmp_path, "burn sim-001")
    with pytest.raises(door.NoSimulation, match="ngpu simulate"):
        await asyncio.to_thread(door.ask, tmp_path, "status")


def test_addresses_are_told_for_tokens(tmp_path: Path) -> None:
    told = [
        CliRunner().invoke(app, ["simulate", "--state-dir", str(tmp_path), "--nodes", "2", "--addresses"])
        for _ in range(2)
    ]
    assert told[0].output == told[1].output
    assert len(told[0].output.split()) == 2
