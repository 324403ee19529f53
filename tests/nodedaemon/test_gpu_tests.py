"""Tests of GPUs: what is found, in the real process against a fake driver; when one runs, and what becomes of it."""

import array
import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nodedaemon import gpu_kernels, gpu_test
from nodedaemon import gpu_tests as module
from nodedaemon.gpu_tests import GpuTests, Outcome, State
from nodedaemon.gpus import Gpus
from tests.nodedaemon.nvml import ptx
from tests.nodedaemon.nvml.fake import FakeDriver

PASSED, FAILED, UNABLE = State.PASSED, State.FAILED, State.UNABLE
ID = "GPU-00000000-0000-0000-0000-0000000000a{n}"
MIB = 1024**2


def test_the_kernels_write_what_is_computed_here() -> None:
    """The text that GPUs get, run instruction by instruction."""
    worked = ptx.run(gpu_kernels.PTX, "work", 4096, 40, blocks=2, threads=64)
    written = array.array("I", [worked[4096 + 4 * i] for i in range(128)]).tobytes()
    assert written == gpu_kernels.results(rounds=40) * 4
    filled = ptx.run(gpu_kernels.PTX, "fill", 4096, 100, 7, blocks=2, threads=8)
    assert sorted(filled) == [4096 + 4 * i for i in range(100)]
    assert array.array("I", [filled[at] for at in sorted(filled)]).tobytes() == gpu_kernels.pattern(107)[28:]


class StillGpus(Gpus):
    """Two that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        listed = [{"id": ID.format(n=n), "model": "NVIDIA L4", "memory_bytes": 64 * MIB, "index": n} for n in range(2)]
        self._take_inventory({"gpus": listed, "driver": "", "cuda": "", "message": ""})
        self._take_readings([{"gpu_id": gpu["id"], "xids": []} for gpu in listed])

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def read_again(self) -> None: ...


class Bench:
    """A node with GPUs and their tests, both in motion."""

    def __init__(self, gpus: Gpus, *, limit_s: float = 20.0) -> None:
        self.held: set[str] = set()
        self.gpus = gpus
        self.tests = GpuTests(gpus, self.held.__contains__, memory_s=10.0, compute_s=0.01, limit_s=limit_s)
        self.told = asyncio.Event()
        self.tests.on_change(self.told.set)
        self._loops = [asyncio.create_task(loop) for loop in (self.gpus.run(), self.tests.run())]

    async def outcome(self, n: int = 0, number: int = 1) -> Outcome:
        """Ask for a test, and wait for its end."""
        self.tests.apply([(ID.format(n=n), number)])
        await self.until(lambda: self.state(n) not in (State.WAITING, State.RUNNING))
        return next((one.state, one.words) for one in self.tests.reports() if one.gpu_id == ID.format(n=n))

    def state(self, n: int = 0) -> State | None:
        return next((one.state for one in self.tests.reports() if one.gpu_id == ID.format(n=n)), None)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not true():
                assert not any(loop.done() for loop in self._loops)
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver(tmp_path, monkeypatch, gpus=2)
    driver.with_cuda()
    for n in range(2):
        driver.set(**{f"gpu{n}_uuid": ID.format(n=n), f"gpu{n}_memory": str(64 * MIB), f"gpu{n}_used": "0"})
    return driver


@pytest_asyncio.fixture
async def bench(driver: FakeDriver) -> AsyncIterator[Bench]:
    bench = Bench(StillGpus())
    yield bench
    await bench.end()


@pytest_asyncio.fixture
async def reading(driver: FakeDriver) -> AsyncIterator[Bench]:
    """With GPUs that are read as those of a node are."""
    bench = Bench(Gpus(lambda pid: pid < 0, interval_s=0.02))
    await bench.gpus.read()
    yield bench
    await bench.end()


@pytest.mark.parametrize(
    ("said", "state", "words"),
    [
        ({}, PASSED, "times its arithmetic, 0.1 of 0.1 GiB of memory with 3 patterns"),
        # A bit that does not become 0.
        ({"gpu1_stuck": "20000001"}, FAILED, "byte 20000000 of those tested gave 0x55555755 in place of 0x55555555"),
        # Two addresses that are one place: a pattern that is the same everywhere does not show it.
        ({"gpu1_alias": str(8 * MIB)}, FAILED, "its memory does not keep what is written: byte"),
        ({"gpu1_wrong": "777"}, FAILED, "it computes wrongly: thread 777 gave 0xC20A409E in place of 0xC208409E"),
        ({"cuMemcpyDtoH_v2": "!214"}, FAILED, "cuMemcpyDtoH_v2: CUDA_ERROR_ECC_UNCORRECTABLE (214)"),
        ({"cuCtxSynchronize": "!719"}, FAILED, "cuCtxSynchronize: an unknown error (719)"),
        ({"cuLaunchKernel": "crash"}, FAILED, "the driver's library crashed (signal 6) in the test of its arithmetic"),
        ({"gpu1_free": str(20 * MIB)}, UNABLE, "GiB of its memory are free: something else holds the rest"),
        ({"gpu1_free": "0"}, UNABLE, "CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ({"cuDevicePrimaryCtxRetain": "!46"}, UNABLE, "cuDevicePrimaryCtxRetain: an unknown error (46)"),
        ({"gpu1_integrated": "1"}, UNABLE, "it has no memory of its own"),
        ({"cuInit": "!803"}, UNABLE, "cuInit: an unknown error (803)"),
        ({"cuDeviceGetCount": "!100"}, UNABLE, "cuDeviceGetCount"),
    ],
)
async def test_what_is_found(driver: FakeDriver, bench: Bench, said: dict[str, str], state: State, words: str) -> None:
    driver.set(**said)
    found = await bench.outcome(1)
    assert (found[0], words in found[1]) == (state, True), found
    # And of the other GPU nothing is said.
    assert [one.gpu_id for one in bench.tests.reports()] == [ID.format(n=1)]


class Card:
    """A GPU of this process, whose copies take a second each."""

    def __init__(self, chunks: int) -> None:
        self.size = chunks * gpu_test.CHUNK_BYTES
        self.now_s = 0.0
        self.seen: set[int] = set()
        self.left = chunks

    def memory(self) -> tuple[int, int]:
        return round(self.left * gpu_test.CHUNK_BYTES / gpu_test.SHARE) + 1, self.size

    def allocate(self, size: int) -> Any:
        return ctypes.create_string_buffer(size)

    def allocate_here(self, size: int) -> ctypes.c_void_p:
        self.here = ctypes.create_string_buffer(size)
        return ctypes.c_void_p(ctypes.addressof(self.here))

    def free(self, piece: Any) -> None: ...

    def set(self, piece: Any, word: int, words: int) -> None:
        piece.raw = word.to_bytes(4, "little") * words

    def fill(self, piece: Any, words: int, first: int) -> None:
        piece.raw = gpu_kernels.pattern(words + first)[4 * first :]

    def wait(self) -> None: ...

    def read(self, here: Any, piece: Any, size: int) -> None:
        assert len(piece) == size
        self.here.raw = piece.raw
        self.seen.add(id(piece))
        self.now_s += 1.0


@pytest.mark.parametrize(
    ("limit_s", "part"),
    [(31.0, ""), (15.0, " (50 % of it, as time allowed)"), (10.0, " (33 % of it, as time allowed)")],
)
def test_a_slow_gpu_is_tested_as_far_as_time_allows(monkeypatch: pytest.MonkeyPatch, limit_s: float, part: str) -> None:
    monkeypatch.setattr(gpu_test, "CHUNK_BYTES", 4096)
    card: Any = Card(10)
    words = gpu_test.memory(card, limit_s, lambda: float(card.now_s))
    assert words == f"0.0 of 0.0 GiB of memory with 3 patterns{part}"
    # What one pattern leaves unread another reads.
    assert len(card.seen) >= 9


def test_a_gpu_that_is_too_slow_to_be_read_once_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_test, "CHUNK_BYTES", 4096)
    card: Any = Card(10)
    with pytest.raises(gpu_test.Unable, match="could be read back in 9 s"):
        gpu_test.memory(card, 9.0, lambda: float(card.now_s))


async def test_a_machine_without_cuda_says_so(driver: FakeDriver, bench: Bench) -> None:
    driver.without_cuda()
    assert await bench.outcome() == (UNABLE, "there is no CUDA driver on this machine (no libcuda.so.1)")


async def test_a_driver_that_hangs_is_found_and_nothing_is_left_behind(driver: FakeDriver) -> None:
    driver.set(cuInit="hang")
    bench = Bench(StillGpus(), limit_s=1.0)
    try:
        found = await bench.outcome()
        assert found == (FAILED, "the driver does not answer: the test of the start of CUDA took longer than 1 s")
        assert processes() == []
    finally:
        await bench.end()


async def test_a_gpu_is_looked_at_once_more_after_its_test(driver: FakeDriver, reading: Bench) -> None:
    """Errors that the test brought about: those that the driver counts fail it, an Xid is told before its outcome."""
    driver.set(gpu0_ecc="2", gpu0_copy_ms="20", gpu1_copy_ms="20")
    await reading.until(lambda: reading.gpus.readings()[0].ecc_uncorrected == 2)
    reading.tests.apply([(ID.format(n=0), 1)])
    await reading.until(lambda: bool(processes()))
    driver.set(gpu0_ecc="3")
    assert await reading.outcome() == (FAILED, "uncorrected errors of its memory went from 2 to 3")
    reading.tests.apply([(ID.format(n=1), 1)])
    await reading.until(lambda: bool(processes()))
    driver.add("gpu1_xid", "48")
    assert (await reading.outcome(1))[0] is PASSED
    assert 48 in reading.gpus.readings()[1].xids


async def test_one_at_a_time_and_each_once(bench: Bench) -> None:
    both = [(ID.format(n=n), 1) for n in range(2)]
    bench.tests.apply(both)
    seen: list[tuple[State | None, ...]] = []

    def states() -> bool:
        # As with every answer of the control plane.
        bench.tests.apply(both)
        now = (bench.state(0), bench.state(1))
        if seen[-1:] != [now]:
            seen.append(now)
        return now == (PASSED, PASSED)

    await bench.until(states)
    running, waiting = State.RUNNING, State.WAITING
    assert seen[-4:] in (
        [(running, waiting), (PASSED, waiting), (PASSED, running), (PASSED, PASSED)],
        [(waiting, waiting), (running, waiting), (PASSED, running), (PASSED, PASSED)],
    )
    assert bench.told.is_set()
    bench.tests.apply([])
    assert bench.tests.reports() == ()


async def test_a_test_that_is_not_asked_for_any_more_ends_at_once(driver: FakeDriver, bench: Bench) -> None:
    driver.set(cuInit="hang")
    bench.tests.apply([(ID.format(n=0), 1)])
    await bench.until(lambda: bool(processes()))
    assert bench.gpus.refusal([ID.format(n=0)]) == f"GPU {ID.format(n=0)} is being tested"
    assert not bench.gpus.refusal([ID.format(n=1)])
    bench.tests.apply([])
    await bench.until(lambda: not bench.gpus.refusal([ID.format(n=0)]))
    assert processes() == []
    assert bench.tests.reports() == ()


async def test_what_is_in_use_is_not_tested(driver: FakeDriver, reading: Bench) -> None:
    bench = reading
    bench.held.add(ID.format(n=0))
    assert await bench.outcome(0) == (UNABLE, "a container of ours still holds it")
    assert await bench.outcome(7) == (UNABLE, f"there is no GPU {ID.format(n=7)} in this machine")
    driver.set(gpu1_temperature="!15")
    await bench.until(lambda: any(one.error for one in bench.gpus.readings()))
    assert await bench.outcome(1) == (UNABLE, f"GPU {ID.format(n=1)} cannot be used: GPU is lost")


async def test_memory_that_a_test_holds_is_not_a_strangers(driver: FakeDriver, reading: Bench) -> None:
    driver.set(cuInit="hang")
    reading.tests.apply([(ID.format(n=0), 1)])
    await reading.until(lambda: bool(processes()))
    driver.add("gpu0_process", f"{processes()[0]} 60000000")
    await reading.gpus.read_again()
    assert reading.gpus.readings()[0].foreign_memory_bytes == 0
    # Once that process is not ours any more, what holds memory under its number is.
    reading.tests.apply([])
    await reading.until(lambda: reading.gpus.readings()[0].foreign_memory_bytes == 60000000)


async def test_processes_that_cannot_be_killed_are_bounded(bench: Bench) -> None:
    ends: list[asyncio.Future[int]] = [asyncio.get_running_loop().create_future() for _ in range(module.STUCK_LIMIT)]
    bench.tests._stuck[ID.format(n=0)] = ends[0]
    assert await bench.outcome(0) == (UNABLE, "1 earlier tests hang in the driver; restart the machine")
    bench.tests._stuck["GPU-9"] = ends[1]
    assert await bench.outcome(1) == (UNABLE, "2 earlier tests hang in the driver; restart the machine")
    ends[1].set_result(-9)
    # Another number is another test.
    assert (await bench.outcome(1, number=2))[0] is PASSED


def processes() -> list[int]:
    """Those of this test run that test a GPU."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"nodedaemon.gpu_test" in words and parent == os.getpid():
            found.append(int(process.name))
    return found
