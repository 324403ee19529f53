"""What was done and is not acknowledged survives, is bounded, and is forgotten when told."""

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from ngpu import wire
from ngpu.v1 import http_pb2, node_pb2, task_pb2

from nodedaemon.journal import REWRITE_BYTES, Journal
from nodedaemon.spool import ALL_HELD_BYTES, HELD_BYTES, Body, Spool

MIB = 1024 * 1024

A = "20240415_14_30_09_01234567890123456789.1"
B = "20240415_14_30_09_01234567890123456789.2"


def result(attempt_id: str, body: bytes = b"done", size: int | None = None) -> node_pb2.Result:
    answer = http_pb2.HttpResponse(
        status=200, body=http_pb2.Body(inline=body, size=len(body) if size is None else size)
    )
    return node_pb2.Result(attempt_id=attempt_id, delivery=task_pb2.DELIVERY_ANSWERED, response=answer)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    """Each call is a daemon started anew on one state directory."""
    made: list[Spool] = []

    def start(limit_bytes: int = 1_000_000, memory_limit_bytes: int = 1_000_000) -> Spool:
        for spool in made:
            spool.close()
        spool = Spool(tmp_path / "spool", limit_bytes=limit_bytes, memory_limit_bytes=memory_limit_bytes)
        made.append(spool)
        return spool

    yield start
    for spool in made:
        spool.close()


async def test_result_is_kept_until_acknowledged(make: Callable[..., Spool]) -> None:
    spool = make()
    spool.add(result(A))
    spool.add(result(B))
    assert (spool.attempts(), len(spool), A in spool) == ([A, B], 2, True)
    assert spool.result(A) == result(A)
    spool.forget(A)
    spool.forget(A)
    assert (spool.attempts(), spool.result(A)) == ([B], None)
    spool.forget(B)
    assert (spool.memory_bytes, spool.used_bytes) == (0, 0)


async def test_settled_results_survive_a_restart(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    spool.add(result(A))
    await spool.settle()
    spool.add(result(B))
    spool = make()
    assert spool.attempts() == [A]
    assert spool.result(A) == result(A)
    spool.forget(A)
    assert list((tmp_path / "spool").iterdir()) == []
    assert spool.used_bytes == 0


async def test_only_what_waits_too_long_is_settled(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    spool.add(result(A))
    await spool.settle(before=0.0)
    assert list((tmp_path / "spool").iterdir()) == []
    await spool.settle()
    assert [file.name for file in (tmp_path / "spool").iterdir()] == [f"{A}.result"]


async def test_settling_makes_room_in_memory(make: Callable[..., Spool]) -> None:
    spool = make(memory_limit_bytes=10_000)
    for number in range(10):
        spool.add(result(f"t.{number}", b"x" * 1000))
    full_before = spool.full
    await spool.settle()
    assert (full_before, spool.full) == (True, False)
    assert spool.memory_bytes <= 5_000
    assert all(spool.result(f"t.{number}") == result(f"t.{number}", b"x" * 1000) for number in range(10))
    for number in range(10):
        spool.forget(f"t.{number}")
    assert (spool.memory_bytes, spool.used_bytes) == (0, 0)


async def test_damaged_result_becomes_a_failure_that_says_so(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    spool.add(result(A))
    await spool.settle()
    file = tmp_path / "spool" / f"{A}.result"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    found = make().result(A)
    assert found is not None
    assert (found.failure.reason, found.failure.cause) == ("INTERNAL", task_pb2.CAUSE_PLATFORM)
    assert "damaged" in found.failure.message


async def test_attempt_ids_stay_within_the_directory(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    for attempt_id in ("../../evil", "..", "/etc/x"):
        spool.add(result(attempt_id))
    await spool.settle()
    assert sorted(make().attempts()) == ["..", "../../evil", "/etc/x"]
    assert len(list((tmp_path / "spool").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]


async def test_disk_that_takes_nothing_leaves_results_in_memory(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    # Longer than any file name may be.
    spool.add(result("x" * 300))
    spool.add(result(A))
    await spool.settle()
    assert spool.attempts() == ["x" * 300, A]
    assert make().attempts() == [A]


# Bodies.


async def test_reader_follows_the_writer(make: Callable[..., Spool]) -> None:
    body = make().begin_body(A)
    reading = asyncio.create_task(body.read(0))
    await body.write(b"hello ")
    assert await reading == b"hello "
    reading = asyncio.create_task(body.read(6))
    await body.write(b"x" * 100_000)
    assert await reading == b"x" * 100_000
    reading = asyncio.create_task(body.read(100_006))
    body.end()
    assert await reading == b""
    assert await body.read(100_000) == b"x" * 6


async def test_body_and_its_result_survive_a_restart(make: Callable[..., Spool]) -> None:
    spool = make()
    body = spool.begin_body(A)
    await body.write(b"x" * 70_000)
    body.end()
    spool.add(result(A, b"", size=70_000))
    await spool.settle()
    spool = make()
    found = spool.body(A)
    assert found is not None
    assert (found.size, found.ended, await found.read(0)) == (70_000, True, b"x" * 70_000)
    assert spool.used_bytes > 70_000
    spool.forget(A)
    assert spool.used_bytes == 0


async def test_body_without_a_result_is_of_a_killed_daemon_and_deleted(
    make: Callable[..., Spool], tmp_path: Path
) -> None:
    spool = make(limit_bytes=1 << 30)
    await spool.begin_body(A).write(b"x" * (HELD_BYTES + 1))
    assert stored(tmp_path) == [HELD_BYTES + 1]
    assert make().attempts() == []
    assert list((tmp_path / "spool").iterdir()) == []


async def test_body_shorter_than_its_result_says_is_a_failure(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    body = spool.begin_body(A)
    await body.write(b"x" * 70_000)
    spool.add(result(A, b"", size=70_000))
    await spool.settle()
    os.truncate(tmp_path / "spool" / f"{A}.body", 60_000)
    spool = make()
    found = spool.result(A)
    assert found is not None
    assert found.HasField("failure")
    assert spool.body(A) is None
    assert list((tmp_path / "spool").iterdir()) == []


async def test_full_spool_stalls_all_bodies_but_the_oldest(make: Callable[..., Spool]) -> None:
    spool = make(limit_bytes=100_000)
    oldest, younger = spool.begin_body(A), spool.begin_body(B)
    await younger.write(b"y" * 100_000)
    assert spool.full
    stalled = asyncio.create_task(younger.write(b"y"))
    await oldest.write(b"o" * 50_000)
    assert not stalled.done()
    spool.drop_body(A)
    # Now it is the oldest itself.
    await stalled
    assert younger.size == 100_001


async def test_dropped_body_does_not_come_back(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    body = spool.begin_body(A)
    await body.write(b"x")
    spool.drop_body(A)
    with pytest.raises(FileNotFoundError):
        await body.write(b"y" * 100_000)
    assert await body.read(0) == b""
    assert list((tmp_path / "spool").iterdir()) == []


def stored(tmp_path: Path) -> list[int]:
    return [path.stat().st_size for path in (tmp_path / "spool").iterdir()]


async def test_small_bodies_are_held_in_memory_and_large_ones_are_not(
    make: Callable[..., Spool], tmp_path: Path
) -> None:
    spool = make(limit_bytes=1 << 30)
    body = spool.begin_body(A)
    pieces = [bytes([n]) * (300 * 1024) for n in range(HELD_BYTES // (300 * 1024))]
    for piece in pieces:
        await body.write(piece)
    assert (stored(tmp_path), spool.held_bytes) == ([], sum(map(len, pieces)))
    before = [chunk async for chunk in read_all(body)]
    assert max(map(len, before)) <= wire.CHUNK_BYTES
    await body.write(b"y" * (300 * 1024))
    assert (stored(tmp_path), spool.held_bytes) == ([body.size], 0)
    body.end()
    assert b"".join([chunk async for chunk in read_all(body)]) == b"".join([*pieces, b"y" * (300 * 1024)])
    spool.forget(A)
    assert (spool.used_bytes, spool.held_bytes) == (0, 0)


async def test_a_body_that_is_said_to_become_large_is_never_held(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make(limit_bytes=1 << 30)
    held, body = spool.begin_body(A, HELD_BYTES), spool.begin_body(B, HELD_BYTES + 1)
    for one in (held, body):
        await one.write(b"abc")
    assert (stored(tmp_path), spool.held_bytes) == ([3], 3)
    body.end()
    assert await body.read(1) == b"bc"
    for attempt_id in (A, B):
        spool.forget(attempt_id)
    spool.close()
    assert (stored(tmp_path), spool.used_bytes, spool.held_bytes) == ([], 0, 0)


async def test_all_bodies_together_are_held_up_to_a_limit(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make(limit_bytes=1 << 30)
    piece = b"x" * MIB
    bodies = ALL_HELD_BYTES // MIB + 3
    for number in range(bodies):
        body = spool.begin_body(f"{A}{number}")
        await body.write(piece)
        assert spool.held_bytes <= ALL_HELD_BYTES
    assert spool.used_bytes == bodies * MIB == sum(stored(tmp_path)) + spool.held_bytes
    for number in range(bodies):
        spool.forget(f"{A}{number}")
    assert (spool.used_bytes, spool.held_bytes) == (0, 0)


async def test_a_held_body_is_read_on_while_and_after_it_goes_to_disk(
    make: Callable[..., Spool], tmp_path: Path
) -> None:
    spool = make()
    body = spool.begin_body(A)
    await body.write(b"abc")
    body.end()
    spool.add(result(A, b"", size=3))
    settling = asyncio.create_task(spool.settle())
    await asyncio.sleep(0)
    assert await body.read(1) == b"bc"
    await settling
    assert min(stored(tmp_path)) == 3
    assert await body.read(1) == b"bc"


async def test_a_held_body_that_the_disk_does_not_take_stays(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    body = spool.begin_body(A)
    await body.write(b"abc")
    body.end()
    spool.add(result(A, b"", size=3))
    home = tmp_path / "spool"
    home.rename(tmp_path / "away")
    await spool.settle()
    assert (await body.read(0), spool.result(A)) == (b"abc", result(A, b"", size=3))
    (tmp_path / "away").rename(home)
    await spool.settle()
    assert len(stored(tmp_path)) == 2


async def test_what_a_full_disk_took_of_a_body_goes_with_it(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool = make()
    body = spool.begin_body(A)
    await body.write(b"x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            await body.store()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stored(tmp_path) == [50_000]
    spool.drop_body(A)
    spool.close()
    assert stored(tmp_path) == []


async def read_all(body: Body) -> AsyncIterator[bytes]:
    at = 0
    while at < body.size:
        chunk = await body.read(at)
        yield chunk
        at += len(chunk)


# The journal.


def test_journal_tells_what_a_killed_daemon_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.interrupted == ()
    journal.begin(A)
    journal.begin(A)
    journal.begin(B)
    journal.end(A)
    journal.end("never began")
    # The end of one attempt is written with the beginning of the next, at the latest when it closes.
    journal.begin("c.1")
    journal = Journal(tmp_path / "journal")
    assert journal.interrupted == (B, "c.1")
    journal.end(B)
    journal.close()
    assert Journal(tmp_path / "journal").interrupted == ("c.1",)


def test_torn_last_line_was_never_acted_upon(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(f"S {A}\nS 2024".encode())
    assert Journal(path).interrupted == (A,)


def test_journal_does_not_grow_for_ever(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.begin("stays")
    for number in range(40_000):
        journal.begin(f"attempt-{number}")
        journal.end(f"attempt-{number}")
    assert (tmp_path / "journal").stat().st_size < REWRITE_BYTES + 10_000
    journal.close()
    assert Journal(tmp_path / "journal").interrupted == ("stays",)
