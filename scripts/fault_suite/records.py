"""The second and the third account: what the database says of each task and attempt, and what containers wrote down."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import sqlalchemy as sa

from controlplane.model import Attempt, AttemptTable, Task, TaskTable

#: How often it is looked for new containers to listen to.
LOOK_S: Final = 0.5


@dataclass(frozen=True)
class Execution:
    """One run of one piece of work in a container, in the container's own words. `end` 0: it never got there."""

    id: str
    token: str
    replica_id: str
    begin: float
    end: float = 0.0


@dataclass
class Recorded:
    """A task's row and its ledger."""

    task: Task
    attempts: list[Attempt] = field(default_factory=list)


def recorded(url: str) -> dict[str, Recorded]:
    """All tasks of a database by id, with their ended attempts in order."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    tasks, attempts = sa.inspect(TaskTable).local_table, sa.inspect(AttemptTable).local_table
    try:
        with engine.connect() as connection:
            # In this order: an attempt has a task, while a task may get a further attempt at any moment.
            ledger = connection.execute(sa.select(attempts).order_by(attempts.c.number)).mappings().all()
            found = {row["id"]: Recorded(Task(**row)) for row in connection.execute(sa.select(tasks)).mappings()}
            for row in ledger:
                found[row["task_id"]].attempts.append(Attempt(**row))
    finally:
        engine.dispose()
    return found


def token_of(task: Task) -> str:
    """The caller's name for the work; empty if the task is no work of the suite."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(task.request_body or b"")["token"])
    return ""


def executions(directory: Path) -> list[Execution]:
    """What the containers that log below that directory wrote. A line that was heard twice counts once."""
    lines = {line for path in directory.glob("*.log") for line in path.read_text().splitlines()}
    return list(_read(lines))


def _read(lines: set[str]) -> Iterator[Execution]:
    begun: dict[str, tuple[str, str, float]] = {}
    ended: dict[str, float] = {}
    for line in lines:
        words = line.split()
        if len(words) != 5 or words[0] not in ("B", "E"):
            continue
        kind, token, execution, replica_id, moment = words
        if kind == "B":
            begun[execution] = (token, replica_id, float(moment))
        else:
            ended[execution] = float(moment)
    for execution, (token, replica_id, begin) in begun.items():
        yield Execution(execution, token, replica_id, begin, ended.get(execution, 0.0))


class DockerEars:
    """Hears what the containers of some nodes write, as they write it: a container's log goes with the container.

    `url`: of the engine, a Unix socket's. `node_addrs`: label values; one file for each container, below `directory`.
    """

    def __init__(self, url: str, client: Any, node_addrs: set[str], directory: Path) -> None:
        self._url = url
        self._client = client
        self._node_addrs = node_addrs
        self._directory = directory
        self._stop = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._looking = threading.Thread(target=self._look, name="ears", daemon=True)

    def __enter__(self) -> Self:
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._looking.join()

    def catch_up(self) -> None:
        """Hear all that the containers which are there have written: who listens may be behind."""
        for found in self._client.api.containers(all=True, filters={"label": "ngpu.replica"}):
            labels = found["Labels"]
            if labels.get("ngpu.node") in self._node_addrs:
                written = self._client.api.logs(found["Id"])
                with (self._directory / f"{found['Id']}-all.log").open("wb") as file:
                    file.writelines(_named(written.split(b"\n"), labels["ngpu.replica"]))

    def _look(self) -> None:
        import docker

        while not self._stop.wait(LOOK_S):
            if not self._is_there():
                continue
            with contextlib.suppress(docker.errors.DockerException, OSError):
                for found in self._client.api.containers(filters={"label": "ngpu.replica"}):
                    labels = found["Labels"]
                    thread = self._threads.get(found["Id"])
                    if labels.get("ngpu.node") in self._node_addrs and not (thread and thread.is_alive()):
                        self._listen(found["Id"], labels["ngpu.replica"])

    def _is_there(self) -> bool:
        # Not by the SDK: it leaves the socket of a connection that is refused to the garbage collector.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as door:
            door.connect(self._url.removeprefix("unix://"))
            return True
        return False

    def _listen(self, container_id: str, replica_id: str) -> None:
        thread = threading.Thread(target=self._hear, args=(container_id, replica_id), daemon=True)
        self._threads[container_id] = thread
        thread.start()

    def _hear(self, container_id: str, replica_id: str) -> None:
        import docker

        path = self._directory / f"{container_id}.log"
        with contextlib.suppress(docker.errors.DockerException, OSError), path.open("ab", buffering=0) as file:
            rest = b""
            for piece in self._client.api.logs(container_id, stream=True, follow=True):
                *lines, rest = (rest + piece).split(b"\n")
                for line in _named(lines, replica_id):
                    file.write(line)


def _named(lines: Iterable[bytes], replica_id: str) -> Iterator[bytes]:
    """Executions, with their replica's name, which in its container it has not."""
    for line in lines:
        words = line.split()
        if len(words) == 5:
            words[3] = replica_id.encode()
            yield b" ".join(words) + b"\n"
