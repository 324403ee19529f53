"""Bodies: appended to at their end, followed as they grow, complete once sealed, there after a restart."""

import asyncio
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ngpu import wire

from controlplane.bodies import ALL_BEHIND_BYTES, BEHIND_BYTES, BEHIND_S, Bodies
from controlplane.body_files import RESERVE_SHARE
from controlplane.body_pieces import ALL_HELD_BYTES, HELD_BYTES, HELD_PIECES
from controlplane.errors import Conflict, NotFound, OutOfRange, TooLarge, Unavailable

MIB = 1024 * 1024
NAME = "20250102_03_04_05_00000000000000000001.1.response"


@pytest.fixture
async def bodies(tmp_path: Path) -> AsyncIterator[Bodies]:
    bodies = await Bodies.open(tmp_path / "bodies")
    yield bodies
    await bodies.close()


async def store(bodies: Bodies, name: str, data: bytes, *, seal: bool = True) -> None:
    await bodies.append(name, 0, data, limit_bytes=1 << 40)
    if seal:
        await bodies.seal(name)


async def whole(bodies: Bodies, name: str, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in bodies.follow(name, offset)])


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def waiting(bodies: Bodies, reader: "asyncio.Task[bytes]") -> None:
    """Returns when the reader has read all there is: its reads and this one take turns in the same threads."""
    for _ in range(20):
        await bodies.size(NAME)
        await asyncio.sleep(0)
    assert not reader.done()


async def test_a_body_is_read_as_it_was_written(bodies: Bodies) -> None:
    assert await bodies.size(NAME) is None
    assert await bodies.append(NAME, 0, b"abc", limit_bytes=100) == 3
    assert await bodies.append(NAME, 3, b"defg", limit_bytes=100) == 7
    assert await bodies.size(NAME) == 7
    assert not await bodies.sealed(NAME)
    assert await bodies.seal(NAME) == 7
    assert await bodies.sealed(NAME)
    assert await bodies.size(NAME) == 7
    assert await whole(bodies, NAME) == b"abcdefg"
    assert await whole(bodies, NAME, 5) == b"fg"
    assert await whole(bodies, NAME, 7) == b""


async def test_an_empty_body(bodies: Bodies) -> None:
    await store(bodies, NAME, b"")
    assert await bodies.size(NAME) == 0
    assert await whole(bodies, NAME) == b""


async def test_chunks_are_no_larger_than_the_wire_takes(bodies: Bodies) -> None:
    data = os.urandom(2 * wire.CHUNK_BYTES + 12_345)
    await store(bodies, NAME, data)
    chunks = [chunk async for chunk in bodies.follow(NAME)]
    assert max(map(len, chunks)) == wire.CHUNK_BYTES
    assert b"".join(chunks) == data


async def test_an_append_goes_to_the_end_and_nowhere_else(bodies: Bodies) -> None:
    await store(bodies, NAME, b"abc", seal=False)
    for offset in (0, 2, 4):
        with pytest.raises(OutOfRange, match="size is 3"):
            await bodies.append(NAME, offset, b"x", limit_bytes=100)
    with pytest.raises(OutOfRange, match="size is 0"):
        await bodies.append("other", 4, b"x", limit_bytes=100)
    assert await bodies.size("other") is None


async def test_a_body_does_not_pass_its_limit(bodies: Bodies) -> None:
    await bodies.append(NAME, 0, b"abc", limit_bytes=5)
    with pytest.raises(TooLarge, match="5 bytes"):
        await bodies.append(NAME, 3, b"def", limit_bytes=5)
    assert await bodies.size(NAME) == 3
    assert await bodies.append(NAME, 3, b"de", limit_bytes=5) == 5


async def test_a_sealed_body_takes_nothing_more(bodies: Bodies) -> None:
    await store(bodies, NAME, b"abc")
    with pytest.raises(Conflict):
        await bodies.append(NAME, 3, b"d", limit_bytes=100)
    assert await bodies.seal(NAME) == 3
    assert await bodies.seal(NAME, durable=False) == 3
    with pytest.raises(NotFound):
        await bodies.seal("other")


async def test_two_writers_at_once_cannot_mix(bodies: Bodies) -> None:
    pieces = [bytes([n]) * 1000 for n in range(50)]
    outcomes = await asyncio.gather(
        *(bodies.append(NAME, 0, piece, limit_bytes=MIB) for piece in pieces), return_exceptions=True
    )
    assert outcomes.count(1000) == 1
    assert all(isinstance(outcome, OutOfRange) for outcome in outcomes if outcome != 1000)
    await bodies.seal(NAME)
    assert await whole(bodies, NAME) in pieces


async def test_a_cancelled_append_is_whole_or_not_there(bodies: Bodies) -> None:
    data = b"x" * MIB
    appending = asyncio.create_task(bodies.append(NAME, 0, data, limit_bytes=2 * MIB))
    await asyncio.sleep(0)
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    # What follows waits for what is still under way in its thread.
    size = len(data) if await bodies.size(NAME) else 0
    try:
        await bodies.append(NAME, size, b"y", limit_bytes=2 * MIB)
    except OutOfRange:
        assert await bodies.size(NAME) == len(data)


# Pieces that come behind.


async def behind(bodies: Bodies, *pieces: bytes) -> None:
    size = await bodies.size(NAME) or 0
    for piece in pieces:
        size = await bodies.append(NAME, size, piece, limit_bytes=1 << 40, behind=True)


def written(tmp_path: Path) -> int:
    (path,) = tmp_path.rglob(f"{NAME}*")
    return path.stat().st_size


async def test_what_came_behind_is_written_together_and_soon(bodies: Bodies, tmp_path: Path) -> None:
    await behind(bodies, b"a", *[b"x" * 1000] * 10)
    assert written(tmp_path) == 1
    while written(tmp_path) < 10_001:
        await asyncio.sleep(BEHIND_S)
    await behind(bodies, b"y" * BEHIND_BYTES, b"z")
    assert await bodies.seal(NAME) == 10_001 + BEHIND_BYTES + 1
    assert await whole(bodies, NAME) == b"a" + b"x" * 10_000 + b"y" * BEHIND_BYTES + b"z"


async def test_what_came_behind_is_counted_before_it_is_written(bodies: Bodies, tmp_path: Path) -> None:
    await behind(bodies, b"abc", b"def")
    with pytest.raises(OutOfRange, match="6"):
        await bodies.append(NAME, 3, b"x", limit_bytes=100, behind=True)
    with pytest.raises(TooLarge):
        await bodies.append(NAME, 6, b"x" * 95, limit_bytes=100, behind=True)
    assert not await bodies.sealed(NAME)
    assert written(tmp_path) == 3
    # Who asks gets what is in the file, so what is said survives a kill.
    assert await bodies.size(NAME) == 6
    assert written(tmp_path) == 6


async def test_readers_have_what_came_behind_from_memory(bodies: Bodies, tmp_path: Path) -> None:
    async with aclosing(bodies.follow(NAME)) as chunks, aclosing(bodies.follow(NAME, 4)) as late:
        await behind(bodies, b"abc", b"def")
        assert await anext(chunks) == b"abcdef"
        assert await anext(late) == b"ef"
        assert written(tmp_path) == 3
        await behind(bodies, b"ghi")
        assert [await anext(chunks), await anext(late)] == [b"ghi", b"ghi"]


async def test_what_came_behind_is_read_from_memory_once_more_when_it_is_sealed(bodies: Bodies, tmp_path: Path) -> None:
    await behind(bodies, b"abc", b"", b"def")
    await bodies.seal(NAME)
    (path,) = tmp_path.rglob(NAME)
    with pytest.raises(OutOfRange):
        await whole(bodies, NAME, 7)
    kept = path.rename(path.with_name("kept"))
    assert await whole(bodies, NAME, 2) == b"cdef"
    kept.rename(path)
    assert await whole(bodies, NAME) == b"abcdef"
    path.write_bytes(b"ABCDEF")
    assert await whole(bodies, NAME) == b"ABCDEF"


async def test_what_nobody_reads_soon_is_not_held(
    bodies: Bodies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.bodies.HELD_S", 0.0)
    await behind(bodies, b"abc")
    await bodies.seal(NAME)
    assert bodies.held_bytes == 3
    while bodies.held_bytes:
        await asyncio.sleep(0.001)
    (path,) = tmp_path.rglob(NAME)
    path.unlink()
    with pytest.raises(NotFound):
        await whole(bodies, NAME)


@pytest.mark.parametrize(
    ("pieces", "held"),
    [
        ([b"x" * HELD_BYTES], True),
        ([b"x" * HELD_BYTES, b"y"], False),
        ([b"x"] * HELD_PIECES, True),
        ([b"x"] * (HELD_PIECES + 1), False),
    ],
)
async def test_of_a_body_only_so_much_is_held(bodies: Bodies, pieces: list[bytes], *, held: bool) -> None:
    await behind(bodies, *pieces)
    data = b"".join(pieces)
    assert bodies.held_bytes == (len(data) if held else 0)
    await bodies.seal(NAME)
    assert await whole(bodies, NAME) == data
    assert await whole(bodies, NAME, len(data) - 1) == data[-1:]
    assert bodies.held_bytes == 0


async def test_of_all_bodies_only_so_much_is_held(bodies: Bodies) -> None:
    data = b"x" * HELD_BYTES
    names = [f"upload-{number}" for number in range(ALL_HELD_BYTES // HELD_BYTES + 1)]
    for name in names:
        await bodies.append(name, 0, data, limit_bytes=1 << 40, behind=True)
        await bodies.seal(name, durable=False)
        assert bodies.held_bytes <= ALL_HELD_BYTES
    assert bodies.held_bytes == ALL_HELD_BYTES
    await bodies.delete(names[0])
    assert bodies.held_bytes == ALL_HELD_BYTES - HELD_BYTES
    assert [await whole(bodies, name) for name in names[1:]] == [data] * (len(names) - 1)
    assert bodies.held_bytes == 0


async def test_many_bodies_behind_wait_for_the_disk(bodies: Bodies) -> None:
    names = [f"upload-{number:032x}" for number in range(100)]
    for name in names:
        await bodies.append(name, 0, b"", limit_bytes=MIB, behind=True)
    piece = bytes(256 * 1024)
    most = 0
    for name in names:
        for at in range(0, 3 * len(piece), len(piece)):
            await bodies.append(name, at, piece, limit_bytes=MIB, behind=True)
            most = max(most, bodies.behind_bytes)
    assert most <= ALL_BEHIND_BYTES + len(piece)
    for name in names:
        assert await bodies.seal(name, durable=False) == 3 * len(piece)
    assert bodies.behind_bytes == 0


async def test_who_wrote_behind_is_told_that_it_failed(bodies: Bodies) -> None:
    await behind(bodies, b"x" * 1000)
    with file_size_limit(1500):
        await bodies.append(NAME, 1000, b"y" * 1000, limit_bytes=MIB, behind=True)
        with pytest.raises(Unavailable, match="disk"):
            await bodies.seal(NAME)
    assert await bodies.size(NAME) == 1000
    await behind(bodies, b"z" * 1000)
    await bodies.seal(NAME)
    assert await whole(bodies, NAME) == b"x" * 1000 + b"z" * 1000


async def test_a_deleted_body_does_not_come_back_from_behind(bodies: Bodies, tmp_path: Path) -> None:
    await behind(bodies, b"abc", b"def")
    await bodies.delete(NAME)
    assert await bodies.append(NAME, 0, b"new", limit_bytes=100) == 3
    await bodies.seal(NAME)
    assert await whole(bodies, NAME) == b"new"
    assert bodies.behind_bytes == 0


async def test_a_stop_writes_what_came_behind(tmp_path: Path) -> None:
    bodies = await Bodies.open(tmp_path / "bodies")
    await behind(bodies, b"abc", b"def")
    await bodies.close()
    assert written(tmp_path) == 6


async def test_a_reader_can_be_ended(bodies: Bodies) -> None:
    await behind(bodies, b"abc")
    over = asyncio.get_running_loop().create_future()
    reader = bodies.follow(NAME, until=over)
    assert await anext(reader) == b"abc"
    more = asyncio.ensure_future(anext(reader, b"nothing"))
    await asyncio.sleep(0)
    over.set_result(None)
    assert await more == b"nothing"


@pytest.mark.parametrize(
    ("happens", "error"),
    [
        (lambda part: part.rename(part.with_suffix("")), Conflict),
        (lambda part: part.unlink(), OutOfRange),
        (lambda part: (part.rename(part.with_suffix(".old")), part.write_bytes(b"abc")), OutOfRange),
    ],
    ids=["sealed", "deleted", "made anew"],
)
async def test_what_another_process_has_taken_over_is_not_written_to(
    bodies: Bodies, tmp_path: Path, happens: Callable[[Path], object], error: type[Exception]
) -> None:
    await behind(bodies, b"abc")
    (part,) = tmp_path.rglob(f"{NAME}.part")
    happens(part)
    await bodies.append(NAME, 3, b"def", limit_bytes=100, behind=True)
    with pytest.raises(error):
        await bodies.flush(NAME)
    assert {path.read_bytes() for path in tmp_path.rglob(f"{NAME}*")} <= {b"abc"}


# Following.


async def test_who_reads_a_sealed_body_keeps_its_file_whatever_becomes_of_its_name(bodies: Bodies) -> None:
    data = os.urandom(2 * wire.CHUNK_BYTES)
    await store(bodies, NAME, data)
    async with aclosing(bodies.follow(NAME)) as reader:
        begin = await anext(reader)
        await bodies.delete(NAME)
        assert begin + b"".join([chunk async for chunk in reader]) == data


async def test_only_so_many_files_are_kept_open(bodies: Bodies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlplane.bodies.KEPT_OPEN", 2)
    names, data = [f"upload-{number}" for number in range(4)], os.urandom(2 * wire.CHUNK_BYTES)
    for name in names:
        await store(bodies, name, data)
    opened = open_files()
    readers = [bodies.follow(name) for name in names]
    read = [await anext(reader) for reader in readers]
    while open_files() > opened + 2:  # a thread may still be at the last
        await asyncio.sleep(0)
    assert open_files() == opened + 2
    for begin, reader in zip(read, readers, strict=True):
        assert begin + b"".join([chunk async for chunk in reader]) == data
    readers.clear()
    del reader
    await bodies.close()  # a thread may still be at the last
    assert open_files() == opened


async def test_readers_follow_the_growth_each_from_its_own_offset(bodies: Bodies) -> None:
    await store(bodies, NAME, b"abc", seal=False)
    readers = [asyncio.create_task(whole(bodies, NAME, offset)) for offset in (0, 2, 3)]
    await waiting(bodies, readers[0])
    await bodies.append(NAME, 3, b"def", limit_bytes=100)
    late = asyncio.create_task(whole(bodies, NAME, 4))
    await bodies.append(NAME, 6, b"ghi", limit_bytes=100)
    await waiting(bodies, late)
    await bodies.seal(NAME, durable=False)
    assert await asyncio.gather(*readers, late) == [b"abcdefghi", b"cdefghi", b"defghi", b"efghi"]


async def test_a_reader_gets_what_is_there_before_more_comes(bodies: Bodies) -> None:
    await store(bodies, NAME, b"abc", seal=False)
    async with aclosing(bodies.follow(NAME)) as chunks:
        assert await anext(chunks) == b"abc"
        more = asyncio.ensure_future(anext(chunks))
        await bodies.append(NAME, 3, b"d", limit_bytes=100)
        assert await more == b"d"


@pytest.mark.parametrize("goes_on_behind", [True, False])
async def test_a_reader_may_know_more_than_the_file_has_after_a_kill(bodies: Bodies, *, goes_on_behind: bool) -> None:
    await store(bodies, NAME, b"abc", seal=False)
    async with aclosing(bodies.follow(NAME, 5)) as chunks:
        reading = asyncio.create_task(anext(chunks))
        await waiting(bodies, reading)
        assert await bodies.append(NAME, 3, b"de", limit_bytes=100, behind=goes_on_behind) == 5
        assert await bodies.append(NAME, 5, b"fg", limit_bytes=100, behind=goes_on_behind) == 7
        assert await reading == b"fg"


async def test_many_readers_and_a_writer_lose_nothing(bodies: Bodies) -> None:
    data = os.urandom(300_000)
    await store(bodies, NAME, b"", seal=False)
    readers = [asyncio.create_task(whole(bodies, NAME)) for _ in range(20)]
    for at in range(0, len(data), 1000):
        await bodies.append(NAME, at, data[at : at + 1000], limit_bytes=MIB)
    await bodies.seal(NAME, durable=False)
    assert await asyncio.gather(*readers) == [data] * 20


async def test_readers_of_a_body_that_is_given_up_are_told(bodies: Bodies) -> None:
    await store(bodies, NAME, b"abc", seal=False)
    reader = asyncio.create_task(whole(bodies, NAME))
    await waiting(bodies, reader)
    await bodies.delete(NAME)
    with pytest.raises(NotFound):
        await reader


async def test_a_reader_that_goes_away_leaves_nothing_behind(bodies: Bodies) -> None:
    await store(bodies, NAME, b"abc", seal=False)
    reader = asyncio.create_task(whole(bodies, NAME))
    await waiting(bodies, reader)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert bodies.followers == 0
    await bodies.append(NAME, 3, b"d", limit_bytes=100)


def is_cached(path: Path) -> bool:
    """Does the page cache have the file's first page? Skips where the file system cannot say."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError as error:
            pytest.skip(f"{path.parent}: reads without waiting: {error.strerror}")


async def test_a_body_leaves_the_page_cache_once_its_last_reader_has_it_all(tmp_path: Path) -> None:
    bodies = await Bodies.open(tmp_path / "bodies")
    data = os.urandom(MIB)
    await store(bodies, NAME, data)
    (path,) = (path for path in (tmp_path / "bodies").rglob(NAME))
    spare = tmp_path / "spare"
    spare.write_bytes(data)
    with spare.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(spare):
        pytest.skip(f"{tmp_path}: its files are the page cache")
    async with aclosing(bodies.follow(NAME)) as other:
        await anext(other)
        assert await whole(bodies, NAME) == data
        await bodies.size(NAME)
        assert is_cached(path)
    assert await whole(bodies, NAME) == data
    await bodies.close()
    assert not is_cached(path)


async def test_what_is_not_there_cannot_be_followed(bodies: Bodies) -> None:
    with pytest.raises(NotFound):
        await whole(bodies, NAME)
    await store(bodies, NAME, b"abc")
    with pytest.raises(OutOfRange, match="has 3 bytes"):
        await whole(bodies, NAME, 4)


async def test_close_tells_those_who_wait(tmp_path: Path) -> None:
    bodies = await Bodies.open(tmp_path)
    await store(bodies, NAME, b"abc", seal=False)
    reader = asyncio.create_task(whole(bodies, NAME))
    await waiting(bodies, reader)
    await bodies.close()
    with pytest.raises(Unavailable):
        await reader
    with pytest.raises(Unavailable):
        await bodies.size(NAME)


# Names, deletion, restarts.


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a.part", "x" * 129, "é"]
)
async def test_a_name_that_is_none_is_refused(bodies: Bodies, name: str) -> None:
    with pytest.raises(ValueError, match="not a body's name"):
        await bodies.append(name, 0, b"x", limit_bytes=100)
    with pytest.raises(ValueError, match="not a body's name"):
        await whole(bodies, name)


@pytest.mark.parametrize(("sealed", "behind"), [(False, False), (True, False), (False, True)])
async def test_an_upload_becomes_a_tasks_request(bodies: Bodies, tmp_path: Path, sealed: bool, behind: bool) -> None:
    upload, request = "upload-" + "0" * 32, "20250102_03_04_05_00000000000000000001.request"
    await store(bodies, upload, b"abc", seal=False)
    if sealed:
        await bodies.seal(upload, durable=False)
    elif behind:
        await bodies.append(upload, 3, b"", limit_bytes=100, behind=True)
        await bodies.append(upload, 3, b"d", limit_bytes=100, behind=True)
    for _ in range(2):  # given twice
        assert await bodies.seal(upload, request) == (4 if behind else 3)
    assert await whole(bodies, request) == (b"abcd" if behind else b"abc")
    assert files(tmp_path) == [request]
    with pytest.raises(NotFound):
        await bodies.seal("none", "other")


async def test_deletion(bodies: Bodies, tmp_path: Path) -> None:
    await store(bodies, "sealed", b"abc")
    await store(bodies, "growing", b"abc", seal=False)
    for _ in range(2):
        await bodies.delete("sealed", "growing", "none")
    assert files(tmp_path) == []
    # A writer that has not heard of it does not bring it back.
    with pytest.raises(OutOfRange):
        await bodies.append("growing", 3, b"def", limit_bytes=100)
    assert files(tmp_path) == []


async def test_old_uploads_are_swept(bodies: Bodies, tmp_path: Path) -> None:
    old = datetime(2025, 1, 1, tzinfo=UTC).timestamp()
    (tmp_path / "bodies" / "00" / ".not-ours").touch()
    os.utime(tmp_path / "bodies" / "00" / ".not-ours", (old, old))
    for name, seal in (("upload-old", True), ("upload-half", False), ("task.request", True), ("upload-new", True)):
        await store(bodies, name, b"abc", seal=seal)
        if name != "upload-new":
            (path,) = tmp_path.rglob(f"{name}*")
            os.utime(path, (old, old))
    assert await bodies.sweep(datetime(2025, 1, 2, tzinfo=UTC), "upload-") == 2
    assert files(tmp_path) == [".not-ours", "task.request", "upload-new"]
    assert await bodies.sweep(datetime(2025, 1, 2, tzinfo=UTC)) == 1
    assert files(tmp_path) == [".not-ours", "upload-new"]


async def test_after_a_restart_a_body_goes_on_from_its_length(tmp_path: Path) -> None:
    bodies = await Bodies.open(tmp_path)
    await store(bodies, "sealed", b"abc")
    await store(bodies, "growing", b"abc", seal=False)
    await bodies.close()
    bodies = await Bodies.open(tmp_path)
    assert await whole(bodies, "sealed") == b"abc"
    assert await bodies.size("growing") == 3
    assert not await bodies.sealed("growing")
    reader = asyncio.create_task(whole(bodies, "growing"))
    await bodies.append("growing", 3, b"def", limit_bytes=100)
    await bodies.seal("growing")
    assert await reader == b"abcdef"
    await bodies.close()


async def test_nobody_else_on_the_machine_can_read_them(bodies: Bodies, tmp_path: Path) -> None:
    await store(bodies, NAME, b"abc")
    for path in (tmp_path / "bodies").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


# Disks.


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """The kernel writes up to that size and refuses the rest, as a disk does that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_write_that_stops_half_way_is_taken_back(bodies: Bodies) -> None:
    await store(bodies, NAME, b"x" * 1000, seal=False)
    with file_size_limit(1500), pytest.raises(Unavailable, match="disk"):
        await bodies.append(NAME, 1000, b"y" * 1000, limit_bytes=MIB)
    assert await bodies.size(NAME) == 1000
    assert await bodies.append(NAME, 1000, b"z" * 1000, limit_bytes=MIB) == 2000
    await bodies.seal(NAME)
    assert await whole(bodies, NAME) == b"x" * 1000 + b"z" * 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one MiB and not for three."""
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=2560k", "ngpu-test"]
    made = subprocess.run(["mount", *options, str(mount)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"may not mount a file system here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


async def test_a_full_disk_is_said_and_what_was_there_stays(small_disk: Path) -> None:
    bodies = await Bodies.open(small_disk)
    await store(bodies, NAME, b"x" * MIB, seal=False)
    with pytest.raises(Unavailable, match="disk is full") as caught:
        await bodies.append(NAME, MIB, b"y" * (2 * MIB), limit_bytes=10 * MIB)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert await bodies.size(NAME) == MIB
    assert await bodies.append(NAME, MIB, b"z", limit_bytes=10 * MIB) == MIB + 1
    await bodies.close()


async def test_bodies_leave_room_for_a_database_on_the_same_disk(small_disk: Path) -> None:
    bodies = await Bodies.open(small_disk)

    async def fill() -> None:
        size = 0
        while True:
            size = await bodies.append(NAME, size, b"x" * 65_536, limit_bytes=10 * MIB)

    with pytest.raises(Unavailable, match="disk is full"):
        await fill()
    free = shutil.disk_usage(small_disk).free
    assert RESERVE_SHARE * 2.5 * MIB <= free < RESERVE_SHARE * 2.5 * MIB + 65_536 + 4096
    await bodies.close()
