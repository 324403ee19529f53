"""The process engine with real processes: what it promises, and how it cleans up."""

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nodedaemon.engine import MIB, Container, ImageMissing, Mount, Readiness, StartFailed
from nodedaemon.engine.process import ProcessEngine
from nodedaemon.engine.process_log import PIECE_BYTES, ProcessLog
from nodedaemon.readiness import probe
from nodedaemon.replicas import Replicas, State
from tests import images
from tests.nodedaemon.fake_engine import assignment

NODE = f"0xtest{os.getpid()}"


class Events:
    """Awaits what an engine's look announces."""

    def __init__(self, engine: ProcessEngine) -> None:
        self._engine = engine
        self._look = asyncio.Event()
        self.task = asyncio.create_task(engine.watch(self._look.set))

    async def until_ended(self, replica_id: str) -> Container:
        while True:
            self._look.clear()
            for container in await self._engine.containers():
                if container.replica_id == replica_id and container.exit:
                    return container
            await self._look.wait()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    images.echo_directory(tmp_path / "images")
    return tmp_path


@pytest_asyncio.fixture
async def engine(home: Path) -> AsyncIterator[ProcessEngine]:
    engine = ProcessEngine(NODE, images=home / "images", state_dir=home / "state")
    yield engine
    await engine.close()


@pytest_asyncio.fixture
async def events(engine: ProcessEngine) -> AsyncIterator[Events]:
    events = Events(engine)
    yield events
    events.task.cancel()
    await asyncio.gather(events.task, return_exceptions=True)


async def until_ready(container: Container, path: str = "") -> None:
    async with asyncio.timeout(20):
        while await probe(Readiness(8080, path), container.addresses[8080]):
            await asyncio.sleep(0.02)


async def get(container: Container, path: str, port: int = 8080) -> bytes:
    reader, writer = await asyncio.open_connection(*container.addresses[port])
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


def python(code: str, **more: Any) -> Any:
    return assignment(command=(sys.executable, "-c", textwrap.dedent(code)), **more)


def running(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_a_process_runs_in_its_directory_with_a_small_environment(
    engine: ProcessEngine, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "1")
    images.echo_directory(home / "images", "echo:2", env={"FROM_IMAGE": "a", "BOTH": "image"})
    wanted = assignment(image="echo:2", ports=(8080, 9000), env={"BOTH": "spec"}, gpu_ids=("GPU-1", "GPU-2"))
    container = await engine.start(wanted, restarts=2)
    await until_ready(container)
    about = json.loads(await get(container, "/about", port=9000))
    env = about["env"]
    assert about["cwd"] == str(home / "images" / "echo_2")
    assert env["NGPU_PORT_8080"] == env["PORT"] == str(container.addresses[8080][1])
    assert env["NGPU_PORT_9000"] == str(container.addresses[9000][1])
    assert (env["FROM_IMAGE"], env["BOTH"], env["CUDA_VISIBLE_DEVICES"]) == ("a", "spec", "GPU-1,GPU-2")
    assert "SECRET_OF_THE_DAEMON" not in env
    assert [c.restarts for c in await engine.containers()] == [2]
    assert engine.owns(about["pid"]) is True
    assert engine.owns(os.getpid()) is False
    assert engine.owns(2**22 + 1) is None
    async with asyncio.timeout(10):
        while "GET /about" not in await engine.logs("r-1", lines=5):
            await asyncio.sleep(0.02)


async def test_limits_are_set(engine: ProcessEngine, home: Path) -> None:
    code = """
        import resource as r, pathlib
        print(r.getrlimit(r.RLIMIT_CORE)[0], r.getrlimit(r.RLIMIT_AS)[0] == r.RLIM_INFINITY)
        print(pathlib.Path("/proc/self/oom_score_adj").read_text())
    """
    events = Events(engine)
    await engine.start(python(code), restarts=0)
    await events.until_ended("r-1")
    assert (await engine.logs("r-1", lines=5)).split() == ["0", "True", "500"]
    other = ProcessEngine(NODE + "b", images=home / "images", state_dir=home / "b", limit_address_space=True)
    events.task.cancel()
    events = Events(other)
    await other.start(python("x = bytearray(600 * 1024 * 1024)", memory_bytes=512 * MIB), restarts=0)
    ended = await events.until_ended("r-1")
    assert ended.exit
    assert ended.exit.code == 1
    assert "MemoryError" in await other.logs("r-1", lines=5)
    events.task.cancel()


@pytest.mark.parametrize(
    ("image", "toml", "command", "error", "words"),
    [
        ("none", None, (), ImageMissing, "there is no image none for the process engine: make the directory"),
        ("..", None, (), ImageMissing, "there is no image .."),
        ("a/b", "", (), StartFailed, "there is no start command"),
        ("a/b", "command = 3", (), StartFailed, "command must be a list of strings"),
        ("a/b", "[env]\nA = 3", (), StartFailed, "env must be a table of strings"),
        ("a/b", "command = [", (), StartFailed, "image.toml cannot be read"),
        ("a/b", "", ("no-such-program",), StartFailed, "'no-such-program' is not in the image"),
        ("a/b", "", ("./image.toml",), StartFailed, "Permission denied"),
        ("a/b", "", ("x\0y",), StartFailed, "could not be started: embedded null byte"),
        pytest.param("a/b", "", ("x" * 3_000_000,), StartFailed, "Argument list too long", id="too long"),
    ],
)
async def test_what_cannot_be_started_says_why(
    engine: ProcessEngine,
    home: Path,
    image: str,
    toml: str | None,
    command: tuple[str, ...],
    error: type[Exception],
    words: str,
) -> None:
    if toml is not None:
        (home / "images" / "a_b").mkdir()
        (home / "images" / "a_b" / "image.toml").write_text(toml)
    with pytest.raises(error, match=words):
        await engine.start(assignment(image=image, command=command), restarts=0)
    assert await engine.containers() == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('bye'); sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 11)", 139),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
async def test_an_end_is_told_with_its_code(engine: ProcessEngine, events: Events, code: str, expected: int) -> None:
    await engine.start(python(code), restarts=0)
    ended = (await events.until_ended("r-1")).exit
    assert ended
    assert (ended.code, ended.out_of_memory, ended.ran_s < 20) == (expected, False, True)
    if expected == 3:
        assert await engine.logs("r-1", lines=5) == "bye"
        log, why = await engine.log_of("r-1", since=0, until=1)
        assert (log, "no times" in why) == ("bye", True)


async def test_stop_asks_first_then_kills_all_of_it_and_tidies_up(engine: ProcessEngine, home: Path) -> None:
    stubborn = assignment(env={"ECHO_STUBBORN": "1", "ECHO_CHILD": "1"})
    container = await engine.start(stubborn, restarts=0)
    await until_ready(container)
    assert len(running(f"NGPU_NODE={NODE}")) == 2
    await engine.stop("r-1", grace_s=0.2)
    assert running(f"NGPU_NODE={NODE}") == []
    assert list((home / "state" / "processes").iterdir()) == []
    # Twice is no error.
    await engine.stop("r-1", grace_s=0.2)


async def test_a_child_that_left_its_group_ends_with_it(engine: ProcessEngine, events: Events) -> None:
    container = await engine.start(assignment(env={"ECHO_CHILD": "1"}), restarts=0)
    await until_ready(container)
    await get(container, "/exit?code=5")
    ended = await events.until_ended("r-1")
    assert ended.exit
    assert ended.exit.code == 5
    assert running(f"NGPU_NODE={NODE}") == []


async def test_processes_die_with_their_daemon_and_leftovers_are_swept(home: Path, engine: ProcessEngine) -> None:
    code = f"""
        import asyncio, sys
        from pathlib import Path
        from nodedaemon.engine.process import ProcessEngine
        from tests.nodedaemon.fake_engine import assignment
        async def main():
            engine = ProcessEngine({NODE!r}, images=Path({str(home / "images")!r}), state_dir=Path({str(home)!r}))
            container = await engine.start(assignment(env={{"ECHO_CHILD": "1"}}), restarts=0)
            print(container.addresses[8080][1], flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(code),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert daemon.stdout
    port = int(await daemon.stdout.readline())
    await until_ready(Container("r-1", "", "", addresses={8080: ("127.0.0.1", port)}))
    assert len(running(f"NGPU_NODE={NODE}")) == 2
    daemon.kill()
    await daemon.wait()
    async with asyncio.timeout(5):
        while len(running(f"NGPU_NODE={NODE}")) > 1:
            await asyncio.sleep(0.01)
    # The child of the child is left to the next daemon.
    assert await engine.containers() == []
    assert running(f"NGPU_NODE={NODE}") == []


async def test_replicas_on_processes_from_start_to_crash_to_restart_to_stop(engine: ProcessEngine) -> None:
    replicas = Replicas(engine, stop_grace_s=2)
    task = asyncio.create_task(replicas.run())
    wanted = assignment(readiness=Readiness(8080, "/about"))

    async def until(state: State | None) -> None:
        async with asyncio.timeout(20):
            seen = -1
            while [r.state for r in replicas.reports()] != [state] * (state is not None):
                seen = await replicas.changed(seen)

    replicas.apply([wanted])
    await until(State.READY)
    address = replicas.address("r-1", 8080)
    assert address
    await get(Container("r-1", "", "", addresses={8080: address}), "/exit?code=7")
    await until(State.BACKOFF)
    assert "exited with code 7" in replicas.reports()[0].message
    while "its last lines:\nGET /about\nGET /exit?code=7" not in replicas.reports()[0].message:
        await replicas.changed(replicas.version)
    await until(State.READY)
    assert replicas.reports()[0].restarts == 1
    replicas.apply([])
    await until(None)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert running(f"NGPU_NODE={NODE}") == []


async def test_two_replicas_have_ports_of_their_own(engine: ProcessEngine) -> None:
    one = await engine.start(assignment("r-1"), restarts=0)
    two = await engine.start(assignment("r-2"), restarts=0)
    await until_ready(one, "/about")
    await until_ready(two, "/about")
    assert one.addresses[8080] != two.addresses[8080]


async def test_images_are_directories_by_the_names_they_are_asked_for(engine: ProcessEngine, home: Path) -> None:
    images.echo_directory(home / "images", "registry/echo:1")
    heard: list[int] = []
    await engine.pull("registry/echo:1", None, heard.append)
    assert heard == [100]
    names = {image.reference for image in await engine.images()}
    assert names == {"echo", "registry/echo:1"}
    assert all(image.size_bytes > 1000 for image in await engine.images())


async def test_a_volume_is_a_directory_that_outlives_process_and_daemon(
    engine: ProcessEngine, events: Events, home: Path
) -> None:
    keep = 'import os; open(os.environ["NGPU_VOLUME_MODELS"] + "/weights", "a").write("x" * 9000)'
    mine = {"workspace_uid": "w-1", "mounts": (Mount("models", "/models"),)}
    await engine.start(python(keep, **mine), restarts=0)
    await events.until_ended("r-1")
    (volume,) = await engine.volumes()
    assert (volume.workspace_uid, volume.name, volume.in_use) == ("w-1", "models", True)
    assert 9000 <= (volume.size_bytes or 0) < 100_000
    assert not await engine.remove_volume(volume)
    await engine.stop("r-1", grace_s=0)
    again = ProcessEngine(NODE, images=home / "images", state_dir=home / "state")
    await again.start(python(keep, **mine), restarts=0)
    await Events(again).until_ended("r-1")
    assert (home / "state/volumes/w-1/models/weights").stat().st_size == 18_000
    await again.start(python(keep, **{**mine, "workspace_uid": "w-2"}), restarts=0)
    assert {one.workspace_uid for one in await again.volumes()} == {"w-1", "w-2"}
    await again.close()
    for one in await again.volumes():
        assert await again.remove_volume(one)
        assert await again.remove_volume(one), "given twice"
    assert list((home / "state/volumes").iterdir()) == []


async def test_a_share_of_a_gpu_is_told(engine: ProcessEngine) -> None:
    container = await engine.start(assignment(image="echo", gpu_ids=("GPU-1",), gpu_share=250), restarts=0)
    await until_ready(container)
    env = json.loads(await get(container, "/about"))["env"]
    assert (env["NGPU_GPU_SHARE_MILLI"], env["CUDA_VISIBLE_DEVICES"]) == ("250", "GPU-1")


async def test_it_says_what_it_does_not_do(engine: ProcessEngine) -> None:
    info = await engine.info()
    assert info.name == "process"
    assert "nothing is kept apart" in info.isolation
    assert "limits of cpu, memory, processes and disk are not enforced" in info.limits
    assert 0 < info.disk_free_bytes < 2**60


async def test_a_log_is_bounded_and_keeps_the_last_lines(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "x.log", file_bytes=PIECE_BYTES)
    stream = asyncio.StreamReader()
    taking = asyncio.create_task(log.take(stream))
    for i in range(8):
        stream.feed_data(b"%d" % i + b"x" * (PIECE_BYTES // 2 - 2) + b"\n")
    stream.feed_data(b"the end\n")
    stream.feed_eof()
    await taking
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4 * PIECE_BYTES
    assert log.last(1, 1000) == "the end"
    assert len(log.last(10, 1000)) <= 1000


async def test_who_ends_is_not_asked_to_by_signal_of_a_recycled_number(engine: ProcessEngine, events: Events) -> None:
    await engine.start(python("pass"), restarts=0)
    await events.until_ended("r-1")
    # Its process is gone and waited for: nothing may be signalled by its number.
    engine._there["r-1"].signal(signal.SIGKILL)
    await engine.stop("r-1", grace_s=1)
