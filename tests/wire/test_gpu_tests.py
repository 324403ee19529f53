"""A GPU after an Xid: out, its replica moved, tested by its node, and back: by itself, or at an operator's word."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from ngpu.v1 import fleet_pb2, node_pb2

from controlplane import deployer, health
from nodedaemon.simulated import gpus as simulated_gpus
from nodedaemon.simulated.containers import Pace
from nodedaemon.simulated.faults import Fault
from nodedaemon.simulated.line import Line, LineDialler
from nodedaemon.simulated.node import Hardware, SimulatedNode, home_of
from tests.wire.house import DEADLINE_S, House, house, refused
from tests.wire.test_nodes import INVALID, seen

PASSED, FAILED = node_pb2.GPU_TEST_STATE_PASSED, node_pb2.GPU_TEST_STATE_FAILED


@pytest.fixture
async def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[House, list[SimulatedNode]]]:
    """Two nodes with a GPU each, up, of a control plane that loses no time."""
    monkeypatch.setattr(health, "EVACUATE_AFTER_S", 0.0)
    monkeypatch.setattr(deployer, "PLAN_EVERY_S", 0.3)
    monkeypatch.setattr(deployer, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(simulated_gpus, "TEST_S", 0.01)
    async with house(tmp_path, heartbeat_interval="300ms") as there:
        made, lives = [], []
        for number in (1, 2):
            name = f"node-{number}"
            node = SimulatedNode(
                name,
                home_of(tmp_path, name),
                Hardware("NVIDIA L4", 1),
                pace=Pace(pull_s=0.0, start_s=0.0),
                dialler=LineDialler(there.address, line=Line()),
                chance=random.Random(number),
            )
            made.append(node)
            lives.append(asyncio.create_task(node.run(await there.operator.join_token()), name=name))
        try:
            yield there, made
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)


async def until_gpu(there: House, addr: str, true: Callable[[fleet_pb2.GpuHealth], bool]) -> fleet_pb2.GpuHealth:
    """The node's GPU, once it is so."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            known = (await seen(there, addr)).gpu_health
            if known and true(known[0]):
                return known[0]
            await asyncio.sleep(0.02)


async def have_tested(there: House, node: str, *gpu_ids: str) -> None:
    request = fleet_pb2.TestGpusRequest(node=node, gpu_ids=gpu_ids)
    await there.operator.fleet.TestGpus(request, metadata=there.operator.auth)


async def test_a_gpu_comes_back_by_itself_or_says_why_not(nodes: tuple[House, list[SimulatedNode]]) -> None:
    there, (first, second) = nodes
    await there.operator.workspace(gpu={"count": 1})
    (replica,) = (await there.operator.ready("echo")).replicas
    bad, good = (first, second) if replica.node_addr == first.address else (second, first)

    await bad.suffer(Fault("gpu-xid", bad.name, number=79))
    out = await until_gpu(there, bad.address, lambda gpu: gpu.grade == fleet_pb2.GRADE_QUARANTINED)
    assert out.reason.startswith("Xid 79 (GPU has fallen off the bus): ")
    back = await until_gpu(there, bad.address, lambda gpu: gpu.grade == fleet_pb2.GRADE_OK)
    assert (back.test.last, back.test.words) == (PASSED, "as a simulated GPU is")
    assert (back.test.HasField("last_end_time"), back.test.HasField("next_time")) == (True, False)
    # It was tested only once nothing was on it.
    assert [one.node_addr for one in (await there.operator.ready("echo")).replicas] == [good.address]

    # Soon after that it has to wait for its next test, unless an operator says otherwise.
    await bad.suffer(Fault("gpu-bad", bad.name))
    await bad.suffer(Fault("gpu-xid", bad.name, number=48))
    waits = await until_gpu(there, bad.address, lambda gpu: gpu.test.HasField("next_time"))
    assert waits.test.next_time.seconds - waits.test.last_end_time.seconds == health.FIRST_WAIT_S
    await have_tested(there, bad.name)
    failed = await until_gpu(there, bad.address, lambda gpu: gpu.test.last == FAILED)
    assert failed.grade == fleet_pb2.GRADE_QUARANTINED
    assert "it failed its test: its memory does not keep what is written (simulated)" in failed.reason
    await bad.suffer(Fault("heal", bad.name))
    await have_tested(there, bad.address, failed.gpu_id)
    await until_gpu(there, bad.address, lambda gpu: gpu.grade == fleet_pb2.GRADE_OK)

    with refused(*INVALID, "no test is needed"):
        await have_tested(there, bad.name)
    with refused(*INVALID, "no test is needed"):
        await have_tested(there, bad.name, failed.gpu_id)
    with refused(*INVALID, "has no GPU"):
        await have_tested(there, bad.name, "GPU-9")
