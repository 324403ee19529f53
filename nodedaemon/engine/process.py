"""No engine: local processes in place of containers, for machines without Docker and for trying things out."""

import asyncio
import contextlib
import itertools
import os
import platform
import shutil
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from nodedaemon.engine import (
    LOG_WINDOW_BYTES,
    Assignment,
    CachedImage,
    Container,
    Credentials,
    DiskFull,
    EngineInfo,
    Exit,
    ImageMissing,
    StartFailed,
    Volume,
)
from nodedaemon.engine.process_log import ProcessLog
from nodedaemon.engine.volumes import check
from nodedaemon.last_use import LastUse

LAUNCH: Final = Path(__file__).with_name("launch.py")
LOG_ANSWER_BYTES: Final = 16 * 1024
IMAGES_TOLD: Final = 500
#: Files counted for an image's size.
FILES_COUNTED: Final = 10_000
#: Killing goes on until nobody is left: who forks faster than that wins.
KILL_ROUNDS, KILL_PAUSE_S = 50, 0.02
#: At close, before processes are killed.
CLOSE_GRACE_S: Final = 5.0
#: In the environment of every process of ours: by these it is known again, whatever has become of its parents.
NODE, REPLICA = "NGPU_NODE", "NGPU_REPLICA"

ISOLATION: Final = (
    "Local processes: nothing is kept apart. They run as the daemon's own user, see its files and network, and can "
    "stop one another. Run only what you trust."
)
LIMITS: Final = (
    "limits of cpu, memory, processes and disk are not enforced",
    "GPUs are assigned by environment (CUDA_VISIBLE_DEVICES), which a process may ignore",
    "writable_paths are not made: a process can write wherever the daemon's user can",
    "a volume is a directory that NGPU_VOLUME_<NAME> names, not one at the declared path, and not kept from others",
    "processes end with the daemon; they are started anew when it comes back",
)


class _Process:
    """One process group."""

    def __init__(
        self,
        container: Container,
        child: asyncio.subprocess.Process,
        pipe: asyncio.ReadTransport,
        volumes: frozenset[Path],
    ) -> None:
        self.container = container
        self.volumes = volumes
        self.child = child
        self.pipe = pipe
        self.start = time.monotonic()
        self.over = asyncio.Event()
        self.writer: asyncio.Task[None]
        self.waiter: asyncio.Task[None]

    def signal(self, number: signal.Signals) -> None:
        """To all of the group; it is there as long as its first process has not been waited for."""
        if self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, number)


class ProcessEngine:
    """Processes of one node (`node_addr`); see Engine, and ISOLATION and LIMITS for what they are not.

    An image is a directory below `images`, its name with `/` and `:` replaced by `_`. A process runs in it, with an
    environment that has little more than what the assignment says. The directory's `image.toml` may have `command`,
    a list, for assignments without one, and `env`, a table. Declared ports are replaced by free ones, told in PORT
    (the first) and NGPU_PORT_<declared>. `state_dir` keeps logs, homes and volumes. `limit_address_space`: hold each
    process (not all of a replica's together) to the assignment's memory by RLIMIT_AS, which counts what is reserved and
    not what is used: CUDA does not live with it.
    """

    def __init__(self, node_addr: str, *, images: Path, state_dir: Path, limit_address_space: bool = False) -> None:
        self._node = node_addr
        self._images = images
        self._state = state_dir / "processes"
        self._volumes = state_dir / "volumes"
        self.pulled = LastUse(state_dir / "pulled-images.json")
        self._limit_address_space = limit_address_space
        self._there: dict[str, _Process] = {}
        self._looks: list[Callable[[], None]] = []
        self._sweeping = asyncio.Lock()
        self._swept = False
        #: By directory name: the reference it was last asked for by.
        self._references: dict[str, str] = {}
        #: By directory name: when it was changed, and its size then.
        self._sizes: dict[str, tuple[int, int]] = {}

    # The protocol.

    async def info(self) -> EngineInfo:
        """As Engine."""
        self._images.mkdir(parents=True, exist_ok=True)
        return EngineInfo(
            "process",
            version=platform.release(),
            disk_free_bytes=shutil.disk_usage(self._images).free,
            isolation=ISOLATION,
            limits=LIMITS,
        )

    async def pull(self, image: str, _: Credentials | None, progress: Callable[[int], None]) -> str:
        """As Engine; an image is there or is missing."""
        directory = self._directory(image)
        self._references[directory.name] = image
        progress(100)
        return ""

    async def start(self, assignment: Assignment, *, restarts: int) -> Container:
        """As Engine."""
        await self._sweep()
        await self._end(assignment.replica_id, grace_s=0)
        directory = self._directory(assignment.image)
        command, env = _image_toml(directory)
        argv = list(assignment.command) or command
        if not argv:
            raise StartFailed(f"there is no start command: neither the workspace nor {directory}/image.toml says one")
        ports = _free_ports(assignment.ports)
        check(assignment)
        volumes = [self._volume(assignment.workspace_uid, mount.name) for mount in assignment.mounts]
        for directory_of_its_own in (self._home(assignment.replica_id), *volumes):
            try:
                directory_of_its_own.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DiskFull(f"{directory_of_its_own} cannot be made: {error.strerror}") from error
        address_space = assignment.memory_bytes if self._limit_address_space else 0
        child, lines, pipe = await self._launch(argv, self._env(assignment, ports, env), directory, address_space)
        process = self._there[assignment.replica_id] = _Process(
            Container(
                replica_id=assignment.replica_id,
                container_id=f"{child.pid}.{restarts}",
                spec_hash=assignment.spec_hash,
                restarts=restarts,
                addresses={declared: ("127.0.0.1", port) for declared, port in ports.items()},
            ),
            child,
            pipe,
            frozenset(volumes),
        )
        log = self._log(assignment.replica_id).take(lines)
        process.writer = asyncio.create_task(log, name=f"log of {assignment.replica_id}")
        process.waiter = asyncio.create_task(self._await_end(process), name=f"end of {assignment.replica_id}")
        self._look()
        return process.container

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """As Engine."""
        await self._end(replica_id, grace_s=grace_s)
        self._log(replica_id).erase()
        shutil.rmtree(self._home(replica_id), ignore_errors=True)

    async def containers(self) -> list[Container]:
        """As Engine."""
        await self._sweep()
        return [process.container for process in self._there.values()]

    async def watch(self, look: Callable[[], None]) -> None:
        """As Engine; there is nothing that could go down."""
        self._looks.append(look)
        try:
            look()
            await asyncio.Event().wait()
        finally:
            self._looks.remove(look)

    async def logs(self, replica_id: str, *, lines: int) -> str:
        """As Engine."""
        return self._log(replica_id).last(lines, LOG_ANSWER_BYTES)

    async def log_of(self, replica_id: str, *, since: float, until: float) -> tuple[str, str]:  # noqa: ARG002
        """As Engine."""
        log = self._log(replica_id).last(LOG_WINDOW_BYTES, LOG_WINDOW_BYTES)
        return log, "processes' logs have no times: this is its end" if log else "it wrote nothing"

    async def images(self) -> list[CachedImage]:
        """As Engine."""

        def count() -> list[CachedImage]:
            with contextlib.suppress(FileNotFoundError):
                return [
                    CachedImage(self._references.get(directory.name, directory.name), self._size(directory))
                    for directory in self._images.iterdir()
                    if directory.is_dir()
                ]
            return []

        cached = await asyncio.to_thread(count)
        return sorted(cached, key=lambda image: (-image.size_bytes, image.reference))[:IMAGES_TOLD]

    async def has_image(self, reference: str) -> bool:
        """As Storage."""
        try:
            self._directory(reference)
        except ImageMissing:
            return False
        return True

    async def remove_image(self, reference: str) -> bool:  # noqa: ARG002
        """As Storage; but images are the machine's operator's, and stay."""
        return False

    async def volumes(self) -> list[Volume]:
        """As Storage."""
        directories = await asyncio.to_thread(lambda: sorted(self._volumes.absolute().glob("*/*")))
        in_use = {directory for process in self._there.values() for directory in process.volumes}
        sizes = {directory: await asyncio.to_thread(_held, directory) for directory in directories}
        return [Volume(one.parent.name, one.name, size, one in in_use) for one, size in sizes.items()]

    async def remove_volume(self, volume: Volume) -> bool:
        """As Storage."""
        directory = self._volume(volume.workspace_uid, volume.name)
        if any(directory in process.volumes for process in self._there.values()):
            return False
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()
        return True

    def owns(self, pid: int) -> bool | None:
        """As Engine."""
        return _has(pid, {f"{NODE}={self._node}"})

    async def close(self) -> None:
        """As Engine."""
        await asyncio.gather(*(self._end(replica_id, grace_s=CLOSE_GRACE_S) for replica_id in list(self._there)))

    # Processes.

    async def _sweep(self) -> None:
        """Once: end what a killed daemon left. Its children died with it; their children need not have."""
        async with self._sweeping:
            if not self._swept:
                await asyncio.to_thread(_kill, {f"{NODE}={self._node}"})
                self._swept = True

    async def _launch(
        self, argv: list[str], env: dict[str, str], directory: Path, address_space: int
    ) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader, asyncio.ReadTransport]:
        """The process, and what it writes."""
        # Not asyncio's pipes: with these, wait() lasts until the last child of the child has closed its end.
        output, its_output = os.pipe()
        status, its_status = os.pipe()
        try:
            lines, pipe = await _stream(output)
            words, _ = await _stream(status)
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), str(its_status), str(address_space)),
                *argv,
                cwd=directory,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=its_output,
                stderr=its_output,
                start_new_session=True,
                pass_fds=[its_status],
            )
        except (OSError, ValueError) as error:
            # Too long an environment, a NUL in it, no more processes.
            raise StartFailed(f"the process could not be started: {error}") from error
        finally:
            os.close(its_output)
            os.close(its_status)
        try:
            fault = (await words.read()).decode(errors="replace")
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        if fault:
            await child.wait()
            raise StartFailed(f"the start command {argv[0]!r} is not in the image, or is no program: {fault}")
        return child, lines, pipe

    async def _await_end(self, process: _Process) -> None:
        code = await process.child.wait()
        replica_id = process.container.replica_id
        # Whoever is left of the group, and whoever has left it.
        await asyncio.to_thread(_kill, {f"{NODE}={self._node}", f"{REPLICA}={replica_id}"})
        await asyncio.wait({process.writer}, timeout=1)
        ended = Exit(replica_id, 128 - code if code < 0 else code, ran_s=time.monotonic() - process.start)
        process.container = replace(process.container, addresses={}, exit=ended)
        process.over.set()
        self._look()

    async def _end(self, replica_id: str, *, grace_s: float) -> None:
        process = self._there.get(replica_id)
        if process is None:
            return
        if not process.over.is_set():
            process.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await process.over.wait()
            except TimeoutError:
                process.signal(signal.SIGKILL)
                await process.over.wait()
        process.pipe.close()
        process.writer.cancel()
        await asyncio.wait({process.writer, process.waiter})
        self._there.pop(replica_id, None)
        self._look()

    def _look(self) -> None:
        for look in self._looks:
            look()

    # Directories and environment.

    def _directory(self, image: str) -> Path:
        name = image.replace("/", "_").replace(":", "_")
        directory = self._images / name
        if name in ("", ".", "..") or not directory.is_dir():
            raise ImageMissing(
                f"there is no image {image} for the process engine: make the directory "
                f'{self._images.absolute()}/{name} with an image.toml that says `command = ["..."]`'
            )
        return directory

    def _size(self, directory: Path) -> int:
        """Counted again only when the directory itself has changed: it is asked for with every heartbeat."""
        changed = directory.stat().st_mtime_ns
        if self._sizes.get(directory.name, (0, 0))[0] != changed:
            total = 0
            for file in itertools.islice(directory.rglob("*"), FILES_COUNTED):
                with contextlib.suppress(OSError):
                    total += file.lstat().st_size
            self._sizes[directory.name] = (changed, total)
        return self._sizes[directory.name][1]

    def _home(self, replica_id: str) -> Path:
        return self._state / replica_id

    def _volume(self, workspace_uid: str, name: str) -> Path:
        return self._volumes.absolute() / workspace_uid / name

    def _log(self, replica_id: str) -> ProcessLog:
        return ProcessLog(self._state / f"{replica_id}.log")

    def _env(self, assignment: Assignment, ports: Mapping[int, int], image_env: Mapping[str, str]) -> dict[str, str]:
        home = str(self._home(assignment.replica_id).absolute())
        gpus = ",".join(assignment.gpu_ids)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": home,
            "TMPDIR": home,
            **image_env,
            **assignment.env,
            "PORT": str(ports[assignment.ports[0]]),
            **{f"NGPU_PORT_{declared}": str(port) for declared, port in ports.items()},
            **{m.variable: str(self._volume(assignment.workspace_uid, m.name)) for m in assignment.mounts},
            **({"NGPU_GPU_SHARE_MILLI": str(assignment.gpu_share)} if assignment.gpu_share else {}),
            "CUDA_VISIBLE_DEVICES": gpus,
            "NVIDIA_VISIBLE_DEVICES": gpus or "void",
            NODE: self._node,
            REPLICA: assignment.replica_id,
        }


def _image_toml(directory: Path) -> tuple[list[str], dict[str, str]]:
    path = directory / "image.toml"
    try:
        said = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return [], {}
    except (OSError, ValueError) as error:
        raise StartFailed(f"{path} cannot be read: {error}") from error
    command, env = said.get("command", []), said.get("env", {})
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise StartFailed(f"{path}: command must be a list of strings")
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise StartFailed(f"{path}: env must be a table of strings")
    return command, env


def _held(directory: Path) -> int:
    total = 0
    for where, _, files in os.walk(directory):
        for file in files:
            with contextlib.suppress(OSError):
                total += Path(where, file).lstat().st_blocks * 512
    return total


def _free_ports(declared: Iterable[int]) -> dict[int, int]:
    """Another process may take one before ours does; then ours fails, and is started anew with others."""
    with contextlib.ExitStack() as stack:
        taken = {}
        for port in declared:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            taken[port] = int(probe.getsockname()[1])
        return taken


async def _stream(fd: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader()
    file = os.fdopen(fd, "rb", buffering=0)
    loop = asyncio.get_running_loop()
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    return reader, pipe


def _has(pid: int, marks: set[str]) -> bool | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return False
    return {mark.encode() for mark in marks} <= set(environment.split(b"\0"))


def _kill(marks: set[str]) -> None:
    """Kill every process with these marks in its environment, until there are none."""
    for _ in range(KILL_ROUNDS):
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        found = [pid for pid in pids if _has(pid, marks)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(KILL_PAUSE_S)
