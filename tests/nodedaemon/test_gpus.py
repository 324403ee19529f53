"""GPUs through the real binding, against a fake driver library."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from nodedaemon import gpus as module
from nodedaemon.gpus import Gpu, GpuInventory, GpuReading, Gpus
from tests.nodedaemon.nvml.fake import FakeDriver

MINE, STRANGER, GONE = 100, 200, 300


class Reader:
    """Gpus in motion."""

    def __init__(self, *, deadline_s: float = 5.0) -> None:
        self.gpus = Gpus(
            {MINE: True, STRANGER: False}.get, interval_s=0.02, deadline_s=deadline_s, start_deadline_s=10 * deadline_s
        )
        self.task = asyncio.create_task(self.gpus.run())

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                assert not self.task.done()
                await asyncio.sleep(0.01)

    def reading(self, n: int = 0) -> GpuReading:
        return {r.gpu_id: r for r in self.gpus.readings()}[f"GPU-{n}"]

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(tmp_path, monkeypatch, gpus=2)


@pytest_asyncio.fixture
async def reader(driver: FakeDriver) -> AsyncIterator[Reader]:
    reader = Reader()
    await reader.gpus.read()
    yield reader
    await reader.end()


async def test_what_is_built_in(reader: Reader) -> None:
    assert reader.gpus.inventory() == GpuInventory(
        gpus=(
            Gpu("GPU-0", "NVIDIA GeForce RTX 4090", 25757220864, 0, "00000000:01:00.0"),
            Gpu("GPU-1", "NVIDIA GeForce RTX 4090", 25757220864, 1, "00000000:02:00.0"),
        ),
        driver_version="550.54.15",
        cuda_version="12.4",
    )


async def test_every_reading(reader: Reader) -> None:
    assert reader.reading() == GpuReading(
        "GPU-0",
        memory_used_bytes=1073741824,
        utilization=37,
        temperature_c=61,
        power_w=312.5,
        clocks_event_reasons=4,
        ecc_uncorrected=0,
        row_remap_pending=False,
        row_remap_failed=False,
        recovery_action=0,
        foreign_memory_bytes=0,
    )


async def test_readings_follow_the_driver(driver: FakeDriver, reader: Reader) -> None:
    driver.set(gpu1_temperature="93", gpu1_remap_pending="1", gpu1_recovery="2", gpu1_ecc="7")
    await reader.until(lambda: reader.reading(1).temperature_c == 93)
    one = reader.reading(1)
    assert (one.row_remap_pending, one.row_remap_failed, one.recovery_action, one.ecc_uncorrected) == (
        True,
        False,
        2,
        7,
    )
    assert reader.reading(0).temperature_c == 61


async def test_what_the_driver_does_not_offer_is_absent(driver: FakeDriver, reader: Reader) -> None:
    names = ("utilization", "temperature", "power", "clocks", "ecc", "remap_pending", "recovery")
    driver.drop(*(f"gpu0_{name}" for name in names))
    await reader.until(lambda: reader.reading().temperature_c is None)
    assert reader.reading() == GpuReading("GPU-0", memory_used_bytes=1073741824, foreign_memory_bytes=0)


async def test_xids_are_told_until_acknowledged(driver: FakeDriver, reader: Reader) -> None:
    driver.add("gpu0_xid", "79")
    driver.add("gpu0_xid", "13")
    await reader.until(lambda: reader.reading().xids == (79, 13))
    told = reader.gpus.readings()
    driver.add("gpu0_xid", "48")
    await reader.until(lambda: reader.reading().xids == (79, 13, 48))
    reader.gpus.acknowledge(told)
    assert reader.reading().xids == (48,)
    reader.gpus.acknowledge(told)
    assert reader.reading().xids == (48,)
    assert reader.reading(1).xids == ()


async def test_a_driver_without_events_still_reads(driver: FakeDriver) -> None:
    driver.set(gpu0_events="!3", gpu1_events="!3")
    reader = Reader()
    await reader.gpus.read()
    assert (reader.reading().temperature_c, reader.reading().error) == (61, "")
    await reader.end()


async def test_memory_of_strangers_is_told_and_nothing_is_started_into_it(driver: FakeDriver, reader: Reader) -> None:
    driver.add("gpu0_process", f"{MINE} 8000000000")
    driver.add("gpu0_process", f"{STRANGER} 5000000000")
    driver.add("gpu0_graphics", f"{STRANGER} 5000000000")
    driver.add("gpu0_process", f"{GONE} 1000000000")
    driver.add("gpu1_process", f"{STRANGER} 100000000")
    await reader.until(lambda: reader.reading().foreign_memory_bytes == 5000000000)
    assert reader.gpus.refusal(["GPU-0"]) == "4.66 GiB of GPU GPU-0 are held by a process that is not ours"
    # As much as a desktop takes is let pass.
    assert reader.gpus.refusal(["GPU-1"]) == ""
    driver.clear()
    await reader.until(lambda: reader.gpus.refusal(["GPU-0"]) == "")


async def test_a_lost_gpu_is_out_and_the_other_is_not(driver: FakeDriver, reader: Reader) -> None:
    driver.set(gpu0_used="!15")
    await reader.until(lambda: reader.reading().error == "GPU is lost")
    assert reader.gpus.refusal(["GPU-0", "GPU-1"]) == "GPU GPU-0 cannot be used: GPU is lost"
    assert reader.gpus.refusal(["GPU-1"]) == ""
    assert len(reader.gpus.inventory().gpus) == 2
    # A child of its own finds out when it is back.
    driver.set(gpu0_used="1")
    await reader.until(lambda: not reader.reading().error)


async def test_a_gpu_that_fell_off_the_bus_stays_known(
    driver: FakeDriver, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIFE_READINGS", 2)
    driver.set(count="1")
    await reader.until(lambda: reader.reading(1).error == "the driver no longer lists it")
    assert [gpu.id for gpu in reader.gpus.inventory().gpus] == ["GPU-0", "GPU-1"]
    assert not reader.reading(0).error
    driver.set(count="2")
    await reader.until(lambda: not reader.reading(1).error)


async def test_a_gpu_that_cannot_be_listed_is_said_to_be_missing(driver: FakeDriver) -> None:
    driver.set(gpu1_handle="!15")
    reader = Reader()
    await reader.gpus.read()
    assert [gpu.id for gpu in reader.gpus.inventory().gpus] == ["GPU-0"]
    assert reader.gpus.inventory().message == "GPU 1: GPU is lost"
    await reader.end()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("hang", "the NVIDIA driver does not answer within 0.5 s"),
        ("crash", "the NVIDIA driver's library crashed (signal 6)"),
    ],
)
async def test_a_gpu_that_hangs_the_driver_is_left_out(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    monkeypatch.setattr(module, "LEAVE_OUT_S", 2.0)
    reader = Reader(deadline_s=0.5)
    await reader.gpus.read()
    driver.set(gpu1_power=how)
    await reader.until(lambda: reader.reading(1).error == words)
    driver.set(gpu0_temperature="62")
    await reader.until(lambda: reader.reading(0).temperature_c == 62)
    assert reader.reading(1).error == words
    # It is asked again after a while.
    driver.set(gpu1_power="1000")
    await reader.until(lambda: reader.reading(1).power_w == 1.0)
    await reader.end()


async def test_a_gpu_that_hangs_at_the_start_does_not_hide_the_others(driver: FakeDriver) -> None:
    driver.set(gpu0_name="hang")
    reader = Reader(deadline_s=0.2)
    await reader.until(lambda: len(reader.gpus.readings()) == 1)
    assert [gpu.id for gpu in reader.gpus.inventory().gpus] == ["GPU-1"]
    assert reader.gpus.inventory().message == "GPU 0: the NVIDIA driver does not answer within 2 s"
    assert "there is no GPU GPU-0 in this machine" in reader.gpus.refusal(["GPU-0"])
    await reader.end()


async def test_a_hung_driver_never_blocks_the_daemon(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.1)
    driver.set(init="hang")
    reader = Reader(deadline_s=0.1)
    await reader.gpus.read()
    assert reader.gpus.inventory() == GpuInventory(message="the NVIDIA driver does not answer within 1 s")
    driver.set(init="0")
    await reader.until(lambda: len(reader.gpus.inventory().gpus) == 2)
    assert reader.gpus.inventory().message == ""
    await reader.end()


async def test_a_driver_that_goes_away_takes_its_gpus_out(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIFE_READINGS", 2)
    monkeypatch.setattr(module, "RETRY_S", 0.1)
    reader = Reader()
    await reader.gpus.read()
    driver.set(init="!9")
    await reader.until(lambda: reader.reading().error == "NVML: Driver Not Loaded")
    assert len(reader.gpus.inventory().gpus) == 2
    driver.set(init="0")
    await reader.until(lambda: not reader.reading().error)
    await reader.end()


async def test_no_driver_is_no_gpus_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if any(Path(folder, "libnvidia-ml.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")):
        pytest.skip("this machine has an NVIDIA driver")
    reader = Reader()
    await reader.gpus.read()
    inventory = reader.gpus.inventory()
    assert inventory.gpus == ()
    assert inventory.message == "there is no NVIDIA driver on this machine (no libnvidia-ml.so.1)"
    assert reader.gpus.readings() == ()
    assert reader.gpus.refusal([]) == ""
    assert "there is no GPU GPU-0 in this machine" in reader.gpus.refusal(["GPU-0"])
    await reader.end()


async def test_a_driver_that_sees_no_gpu_says_so(driver: FakeDriver) -> None:
    driver.set(count="0")
    reader = Reader()
    await reader.gpus.read()
    assert reader.gpus.inventory() == GpuInventory((), "550.54.15", "12.4", "the NVIDIA driver is here and sees no GPU")
    await reader.end()


async def test_nothing_is_left_behind(driver: FakeDriver) -> None:
    reader = Reader()
    await reader.gpus.read()
    await reader.end()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert not [command for command in commands if b"nodedaemon.gpu_probe" in command]


async def test_before_the_first_reading_nothing_is_started_on_gpus() -> None:
    assert Gpus().refusal(["GPU-0"]) == "the GPUs have not been read yet"
    assert Gpus().refusal([]) == ""
