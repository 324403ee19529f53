"""From the driver to the grade: every sign, through the real binding, the wire, and the control plane's rules."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from ngpu.v1 import node_pb2

from controlplane import health
from controlplane.api import translate
from controlplane.grade import Grade
from controlplane.health import EVACUATE_AFTER_S, Memory, judge_all, restarts
from controlplane.report import Report
from nodedaemon import gpus as module
from nodedaemon import statement
from nodedaemon.gpus import Gpus
from tests.nodedaemon.nvml.fake import FakeDriver

OK, DEGRADED, QUARANTINED = Grade.OK, Grade.DEGRADED, Grade.QUARANTINED
STRANGER = 200


class Sign(NamedTuple):
    """What the driver says of one GPU (`key=value`, several with spaces), and what is to follow."""

    said: str
    grade: Grade
    words: str = ""
    moves: bool = False
    restarts: bool = False


#: The policy's table, line by line.
SIGNS = (
    Sign("", OK),
    *(Sign(f"xid={xid}", OK) for xid in (13, 31, 43, 45, 68, 109)),
    Sign("xid=94", OK, restarts=True),
    *(
        Sign(f"xid={xid}", QUARANTINED, f"Xid {xid} (", moves=True)
        for xid in (48, 62, 63, 64, 74, 79, 95, 119, 120, 140, 143)
    ),
    Sign("xid=4711", QUARANTINED, "Xid 4711 (not known to us)", moves=True),
    Sign("xid=13 xid=94 xid=48", QUARANTINED, "Xid 48 (double-bit memory error)", moves=True, restarts=True),
    Sign("remap_pending=1", QUARANTINED, "reset the GPU", moves=True),
    Sign("remap_failed=1", QUARANTINED, "replace the GPU", moves=True),
    Sign("recovery=0", OK),
    Sign("recovery=1", QUARANTINED, "asks for a reset of the GPU", moves=True),
    Sign("recovery=2", QUARANTINED, "asks for a reboot of the node", moves=True),
    Sign("recovery=3", QUARANTINED, "asks to end peer-to-peer traffic and reset", moves=True),
    Sign("recovery=4", QUARANTINED, "asks to drain and reset the GPU", moves=True),
    Sign("recovery=7", QUARANTINED, "asks for recovery action 7", moves=True),
    Sign("clocks=0x8", DEGRADED, "slowed down by heat or power in 6 of the last 10 minutes"),
    Sign("clocks=0x20", DEGRADED, "slowed down"),
    Sign("clocks=0x40", DEGRADED, "slowed down"),
    Sign("clocks=0x80", DEGRADED, "slowed down"),
    # Idle, set by the application, at its power limit: as it should be.
    *(Sign(f"clocks={reason}", OK) for reason in ("0x1", "0x2", "0x4")),
    Sign("temperature=!999", QUARANTINED, "cannot be read: Unknown Error", moves=True),
    Sign("power=!15", QUARANTINED, "cannot be read: GPU is lost", moves=True),
    Sign(f"process={STRANGER}:4000000000", QUARANTINED, "3.7 GiB held by a process that is not ours"),
    Sign(f"process={STRANGER}:400000000", OK),
)


class Card:
    """What the control plane makes of a node's GPUs."""

    def __init__(self) -> None:
        self.memories: dict[str, Memory] = {}

    def hears(self, gpus: Gpus, *, at_s: float, without: Iterable[str] = ()) -> Report:
        """One report, over the wire."""
        report = translate.report_of(
            node_pb2.HeartbeatRequest(
                inventory=node_pb2.Inventory(
                    gpus=[
                        node_pb2.Gpu(id=gpu.id, model=gpu.model, memory_bytes=gpu.memory_bytes, index=gpu.index)
                        for gpu in gpus.inventory().gpus
                        if gpu.id not in without
                    ]
                ),
                readings=map(statement.reading, gpus.readings()),
            )
        )
        self.memories = judge_all(self.memories, report.inventory.gpus, report.readings, at_s)
        return report

    def of(self, n: int) -> health.Health:
        return self.memories[f"GPU-{n}"].health


async def until_read(gpus: Gpus, signs: int) -> None:
    """All of the driver's words have come."""
    async with asyncio.timeout(30):
        while len(gpus.readings()) < signs or sum(len(one.xids) for one in gpus.readings()) < 22:
            await asyncio.sleep(0.01)


async def test_every_sign_of_the_driver_has_its_grade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(tmp_path, monkeypatch, gpus=len(SIGNS))
    for n, sign in enumerate(SIGNS):
        for word in sign.said.split():
            key, _, value = word.partition("=")
            if key in ("xid", "process"):
                driver.add(f"gpu{n}_{key}", value.replace(":", " "))
            else:
                driver.set(**{f"gpu{n}_{key}": value})
    gpus = Gpus({STRANGER: False}.get, interval_s=0.02, deadline_s=20)
    reading = asyncio.create_task(gpus.run())
    try:
        await until_read(gpus, len(SIGNS))
        plane = Card()
        report = plane.hears(gpus, at_s=0.0)
        assert [restarts(one) for one in report.readings] == [sign.restarts for sign in SIGNS]
        gpus.acknowledge(gpus.readings())
        grades = [plane.of(n).grade for n in range(len(SIGNS))]
        # A slowdown is one once it is frequent; all else at once.
        assert grades == [OK if sign.grade is DEGRADED else sign.grade for sign in SIGNS]
        for minute in range(1, health.SLOW_MINUTES):
            plane.hears(gpus, at_s=minute * 60.0)
        for n, sign in enumerate(SIGNS):
            assert (plane.of(n).grade, sign.words in plane.of(n).reason) == (sign.grade, True), sign
            assert plane.of(n).evacuate is sign.moves, sign
            # Nothing is started on a GPU that cannot be read, or whose memory a stranger holds.
            held = "read" in plane.of(n).reason or "not ours" in plane.of(n).reason
            assert bool(gpus.refusal([f"GPU-{n}"])) is held, sign
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"count": "1"}, "the driver no longer lists it"),
        ({"gpu1_power": "hang"}, "does not answer within"),
        ({"gpu1_power": "crash"}, "library crashed"),
    ],
)
async def test_a_gpu_that_vanishes_or_hangs_is_out_and_the_other_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], words: str
) -> None:
    monkeypatch.setattr(module, "LIFE_READINGS", 2)
    driver = FakeDriver(tmp_path, monkeypatch, gpus=2)
    gpus = Gpus(interval_s=0.02, deadline_s=1.0, start_deadline_s=20)
    reading = asyncio.create_task(gpus.run())
    try:
        await gpus.read()
        plane = Card()
        plane.hears(gpus, at_s=0.0)
        assert [plane.of(n).grade for n in (0, 1)] == [OK, OK]
        driver.set(**said)
        async with asyncio.timeout(30):
            while not any(one.error for one in gpus.readings()):
                await asyncio.sleep(0.01)
        for at_s in (5.0, 5.0 + EVACUATE_AFTER_S):
            plane.hears(gpus, at_s=at_s)
        assert (plane.of(0).grade, plane.of(1).grade, plane.of(1).evacuate) == (OK, QUARANTINED, True)
        assert words in plane.of(1).reason
        # Also if the node's inventory no longer has it, as after a restart of its daemon.
        plane.hears(gpus, at_s=60.0, without=["GPU-1"])
        assert "missing from the node's inventory" in plane.of(1).reason
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
