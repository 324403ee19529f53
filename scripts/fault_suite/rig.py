"""A platform to be hurt: real programs whose nodes dial through fault proxies, two workspaces, and callers at work.

`settle` waits until all is well again and says how long that took; `audit` compares the three accounts.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from controlplane.model import Delivery
from scripts.fault_suite import worker
from scripts.fault_suite.audit import Findings, audit
from scripts.fault_suite.callers import Api, Call, Callers
from scripts.fault_suite.disk import small_disk, why_no_disks
from scripts.fault_suite.netns import Namespace, why_no_namespaces
from scripts.fault_suite.pair import Pair, pair_settings
from scripts.fault_suite.postgres import Postgres
from scripts.fault_suite.proxy import FaultProxies, FaultProxy
from scripts.fault_suite.records import DockerEars, executions, recorded
from scripts.programs import BIN, Failed, Platform, Program

WORKER: Final = Path(worker.__file__)
WORK, ONCE = "work", "once"
#: Short paces, so that a fault takes seconds; what the product promises is in the same proportion.
HEARTBEAT_S: Final = 0.5
NODE_TIMEOUT_S: Final = 3.5
#: Longer than a node waits between two tries (3 s).
RECONNECT_GRACE_S: Final = 4.5
START_GRACE_S: Final = 8.0
HOLD_S: Final = 10.0
#: From a node's silence to its work's second attempt.
GIVEN_UP_S: Final = NODE_TIMEOUT_S + RECONNECT_GRACE_S
#: For all that had begun to end after a fault: retries, backoffs and a busy machine included.
SETTLE_LIMIT_S: Final = 60.0
#: For nodes to notice that a line is dead (keepalive: 15 s), and to come back.
WHOLE_LIMIT_S: Final = 90.0
#: Of the control plane, and of one node.
DISK_BYTES: Final = 64 * 1024 * 1024
SMALL_NODE: Final = "beta"
#: What must end after a fault is over, for it to count as over.
CALLS_AFTER: Final = 10


@dataclass(frozen=True)
class Docker:
    """An engine for the nodes: its address for DOCKER_HOST, a client of it, and an image with Python 3 in it.

    One's own can be killed and started; its network is entered by `prefix`, and this side is seen from there as `host`.
    """

    url: str
    client: Any
    image: str
    prefix: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    kill: Callable[[], None] | None = None
    start: Callable[[], None] | None = None


@dataclass(frozen=True)
class Recovery:
    """What a fault cost. `silence_s`: the longest time in which no work ended. `settled_s`: from the fault's end until
    all work begun before that had ended, and some begun after. `noticed_s`: from its begin until the last attempt that
    it took was given up; 0: none was.
    """

    fault: str
    lasted_s: float
    silence_s: float
    settled_s: float
    noticed_s: float
    #: By reason: attempts that had been sent and failed, and tasks, repeatable ones and those that must not run twice.
    attempts: Counter[str]
    work_failed: Counter[str]
    once_failed: Counter[str]


@dataclass(frozen=True)
class Switch:
    """From a fault of the active control plane: until the other served, and until nodes and bridge were there."""

    fault: str
    serves_s: float
    whole_s: float


#: result_code of a task that has a slot.
RUNNING: Final = 101


class Rig:
    """Nodes `alpha`, `beta`, `gamma`: `beta` on a small disk, like the control plane, and `gamma` in a network
    namespace of its own, where this machine allows such things (`lacks`).

    `postgres`: where the database is; else it is SQLite. `bridge`: its settings, as
    environment. `quick`: faults last just long enough to show. `outage_s`: how long the control plane may be gone.
    `standby`: there may be a second one (`pair`).
    """

    def __init__(
        self,
        state: Path,
        *,
        nodes: int = 3,
        postgres: Postgres | None = None,
        docker: Docker | None = None,
        bridge: Mapping[str, str] | None = None,
        small_disks: bool = True,
        chance: random.Random | None = None,
        quick: bool = True,
        rate: float = 15.0,
        outage_s: float = 0.0,
        standby: bool = False,
    ) -> None:
        self.state = state.resolve()
        self.images = self.state / "images"
        self.worker_logs = self.state / "worker-logs"
        self.names = ["alpha", "beta", "gamma"][:nodes]
        self.rate = rate
        self.outage_s = outage_s
        self.quick = quick
        self.chance = chance or random.Random()  # noqa: S311
        self.postgres = postgres
        self.docker = docker
        no_gamma = "" if "gamma" in self.names else "no node of this rig is in a namespace"
        #: What faults may need and this machine or this rig does not have, with the reason.
        self.lacks = {
            "namespace": no_gamma or why_no_namespaces(),
            "disk": why_no_disks() if small_disks else "disks are not small here",
        }
        self.lacks["processes"] = "containers do not end with their daemon here" if docker else ""
        self.lacks["docker"] = "" if docker else "containers are processes here"
        self.lacks["own engine"] = "" if docker and docker.kill else "the engine is not ours to kill"
        self.lacks["outage"] = "" if outage_s else "no long outage was asked for"
        self.lacks["one control plane"] = "there may be two" if standby else ""
        self.lacks["standby"] = "" if standby else "there is no second control plane"
        self.lacks |= {"sqlite": "the database is PostgreSQL"} if postgres else {"postgres": "the database is SQLite"}
        self.namespace: Namespace | None = None
        self.database_proxy: FaultProxy | None = None
        settings = {
            "NGPU_CONTROLPLANE_HEARTBEAT_INTERVAL": f"{HEARTBEAT_S}s",
            "NGPU_CONTROLPLANE_NODE_TIMEOUT": f"{NODE_TIMEOUT_S}s",
            "NGPU_CONTROLPLANE_RECONNECT_GRACE": f"{RECONNECT_GRACE_S}s",
            "NGPU_CONTROLPLANE_START_GRACE": f"{START_GRACE_S}s",
            "NGPU_CONTROLPLANE_HOLD": f"{HOLD_S}s",
        }
        self._settings = {**settings, **(bridge or {})}
        self._standby = standby
        self.pair: Pair | None = None
        self._node_addrs: set[str] = set()
        self._ears: DockerEars | None = None
        self.database_url = postgres.url() if postgres else f"sqlite:///{self.state / 'controlplane' / 'ngpu.db'}"
        self.proxies: dict[str, FaultProxies] = {}
        self.recoveries: list[Recovery] = []
        self.switches: list[Switch] = []
        self.calls: list[Call] = []
        self.callers: Callers | None = None
        #: When containers could not be heard.
        self.deaf: list[tuple[float, float]] = []
        #: Workspaces.
        self.made: set[str] = set()
        #: A program ends with the thread that has started it: these live as long as the rig.
        self.threads = concurrent.futures.ThreadPoolExecutor(3, thread_name_prefix="fault")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.threads)
            self.worker_logs.mkdir(parents=True)
            self.make_image(WORK)
            if not self.lacks["disk"]:
                for name in ("controlplane", SMALL_NODE):
                    stack.enter_context(small_disk(self.state / name, DISK_BYTES))
            if not self.lacks["namespace"] and "gamma" in self.names:
                self.namespace = stack.enter_context(Namespace())
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self.callers:
            self.callers.stop(0)
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        if self.postgres:
            self.database_proxy = stack.enter_context(FaultProxy(self.postgres.address))
            self._settings["NGPU_CONTROLPLANE_DATABASE_URL"] = self.postgres.url(self.database_proxy.address)
            command = [str(BIN / "ngpu-controlplane"), "migrate"]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, **self._settings})
        if self.docker:
            # After the daemons, which leave containers running.
            stack.callback(self._remove_containers)
        if self._standby:
            self._settings |= pair_settings(self.state)
        self.platform = stack.enter_context(Platform(self.state, settings=self._settings))
        if self._standby:
            self.pair = stack.enter_context(Pair(self.platform))
        for name in self.names:
            inside = self._namespace_of(name)
            host = inside.host_ip if inside else self.docker.host if self.docker else "127.0.0.1"
            self.proxies[name] = stack.enter_context(FaultProxies(self.platform.server, host=host))
            self.start_node(name)
        self.bridge = self.platform.start_bridge()
        if self.docker:
            self._node_addrs |= {self.platform.node(name)["addr"] for name in self.names}
            self._ears = stack.enter_context(
                DockerEars(self.docker.url, self.docker.client, self._node_addrs, self.worker_logs)
            )
        for workspace in (WORK, ONCE):
            self.create(workspace, replicas=len(self.names), repeatable=workspace == WORK)
        self.work, self.once = self.api(WORK), self.api(ONCE)
        self.work_uid, self.once_uid = self._uid(WORK), self._uid(ONCE)

    def _namespace_of(self, node: str) -> Namespace | None:
        return self.namespace if node == "gamma" else None

    # Parts.

    def make_image(self, name: str, **environment: str) -> None:
        """An image directory with the worker in it."""
        directory = self.images / name
        directory.mkdir(parents=True)
        shutil.copy(WORKER, directory / "worker.py")
        env = {"WORKER_LOG": str(self.worker_logs), **environment}
        lines = ["command = " + json.dumps([sys.executable, "-u", "worker.py"]), "[env]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in env.items()]
        (directory / "image.toml").write_text("\n".join(lines) + "\n")

    def start_node(self, name: str, **environment: str) -> Program:
        """Start a node's daemon, or start it again."""
        inside = self._namespace_of(name)
        prefix: tuple[str, ...] = inside.prefix if inside else ()
        engine: tuple[str, ...] = ("--engine", "process", "--process-images", str(self.images))
        if self.docker:
            prefix = self.docker.prefix
            engine, environment = ("--engine", "docker"), {"DOCKER_HOST": self.docker.url, **environment}
        try:
            return self.platform.start_node(
                name,
                *engine,
                prefix=prefix,
                server=self.proxies[name].address,
                environment={"NGPU_NODE_ALLOW_PLAINTEXT": "true", **environment},
            )
        except Failed:
            # The control plane is away just then; `await_whole` waits for the node.
            if self.node(name).process.poll() is not None:
                raise
            return self.node(name)

    def create(self, name: str, *, replicas: int = 1, wait: bool = True, image: str = WORK, **fields: Any) -> None:
        """A workspace of workers."""
        self.made.add(name)
        if self.docker:
            fields = {"command": ["python3", "-u", "-c", WORKER.read_text()], **fields}
            image = self.docker.image if image == WORK else image
        lines = [f"name = {json.dumps(name)}", f"image = {json.dumps(image)}", "ports = [8080]"]
        # No node has room for two of these: so all nodes have something to lose, also after one was lost.
        share = round((os.cpu_count() or 1) * 0.4, 2)
        values = {"replicas": replicas, "concurrency": 8, "memory": "256MiB", "cpus": share, **fields}
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
        for key, table in values.items():
            if isinstance(table, dict):
                lines += [f"[{key}]", *(f"{inner} = {json.dumps(value)}" for inner, value in table.items())]
        path = self.state / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        self.platform.ngpu("workspace", "create", str(path), *(("--wait", "--timeout", "60s") if wait else ()))

    def api(self, workspace: str) -> Api:
        """The REST API as that workspace's owner calls it."""
        return Api(self.platform.url, self.workspace(workspace)["id"])

    def workspace(self, name: str) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = self.platform.ngpu("workspace", "show", name)["workspace"]
        return found

    def _uid(self, name: str) -> str:
        import sqlalchemy as sa

        engine = sa.create_engine(self.database_url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            uid = connection.execute(sa.text("SELECT uid FROM workspace WHERE name = :name"), {"name": name}).scalar()
        engine.dispose()
        return str(uid)

    def node(self, name: str) -> Program:
        """Its daemon."""
        return self.platform.nodes[name]

    @contextlib.contextmanager
    def frozen(self, program: Program) -> Iterator[None]:
        """SIGSTOP, and SIGCONT."""
        program.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            program.signal(signal.SIGCONT)

    def restart_bridge(self) -> None:
        """SIGKILL, and on the same port again."""
        port = int(self.platform.url.rpartition(":")[2])
        self.bridge.kill()
        self.bridge = self.platform.start_bridge(port=port)

    @contextlib.contextmanager
    def cut_off(self, node: str) -> Iterator[None]:
        """Nothing of it gets through, not even that its programs have ended."""
        inside = self._namespace_of(node)
        with inside.dropping() if inside else self.proxies[node].swallowing():
            yield
            # What its programs sent last is not to be heard when the way is free again.
            self.proxies[node].reset()

    def _remove_containers(self) -> None:
        assert self.docker
        for node in self._node_addrs:
            for found in self.docker.client.api.containers(all=True, filters={"label": f"ngpu.node={node}"}):
                self.docker.client.api.remove_container(found["Id"], force=True, v=True)

    def orphans(self) -> set[str]:
        """Replicas with a process of ours that are in no workspace's list."""
        wanted = {one["id"] for name in self.made for one in self.workspace(name).get("replicas", [])}
        if self.docker:
            found = self.docker.client.api.containers(filters={"label": "ngpu.replica"})
            labels = [one["Labels"] for one in found]
            return {one["ngpu.replica"] for one in labels if one["ngpu.node"] in self._node_addrs} - wanted
        mark = f"WORKER_LOG={self.worker_logs}".encode()
        running = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                variables = path.read_bytes().split(b"\0")
                if mark in variables:
                    running |= {v.decode().partition("=")[2] for v in variables if v.startswith(b"NGPU_REPLICA=")}
        return running - wanted

    def some_node(self, usually: str = "alpha") -> str:
        """Whom a fault hits."""
        return usually if self.quick else self.chance.choice(self.names)

    def is_running(self, call: Call) -> bool:
        """Has the task of that call been given to a node?"""
        return bool(call.task_id) and self.work.query(call.task_id)["result_code"] == RUNNING

    def lasts(self, quick_s: float, long_s: float) -> float:
        """How long a fault lasts, in seconds: the short time, or between the two."""
        return quick_s if self.quick else self.chance.uniform(quick_s, long_s)

    def await_whole(self) -> None:
        """Until every node has a ready replica of each workspace."""
        until(self._is_whole, WHOLE_LIMIT_S, "all nodes to have ready replicas")

    def _is_whole(self) -> bool:
        for api in (self.work, self.once):
            with contextlib.suppress(OSError, ValueError):
                nodes = api.call("GET", "/user/queryNodes").get("nodes") or []
                if len({one["nodeAddr"] for one in nodes if one["status"] == 1}) == len(self.names):
                    continue
            return False
        return True

    # Runs.

    def begin(self) -> None:
        """Set callers to work, and wait until work ends."""
        self.callers = Callers(self.work, self.once, rate=self.rate, chance=self.chance)
        self.await_calls(CALLS_AFTER, time.time(), SETTLE_LIMIT_S)

    def await_calls(self, number: int, since: float, limit_s: float) -> None:
        """Until so much work begun after that moment has ended."""
        callers = self.callers
        assert callers
        until(
            lambda: sum(1 for call in list(callers.calls) if call.begin >= since and call.end) >= number,
            limit_s,
            f"{number} calls after a fault to end",
        )

    @contextlib.contextmanager
    def switching(self, fault: str) -> Iterator[None]:
        """The block is what makes the active control plane give way. Waits until all is with the other."""
        assert self.pair
        active, begun = self.pair.active, time.monotonic()
        assert active
        watching = self.threads.submit(self._served_by_other, active)
        yield
        serves_s = watching.result() - begun
        until(self._is_whole, WHOLE_LIMIT_S, "nodes and bridge to be there")
        self.switches.append(Switch(fault, serves_s, time.monotonic() - begun))

    def _served_by_other(self, than: Program) -> float:
        """When, by the monotonic clock, another control plane was seen to serve."""
        pair = self.pair
        assert pair
        until(lambda: pair.served_by_other(than), WHOLE_LIMIT_S, "the other control plane to serve")
        return time.monotonic()

    @contextlib.contextmanager
    def suffering(self, fault: str, limit_s: float = SETTLE_LIMIT_S) -> Iterator[None]:
        """The block is the fault, and its end the fault's end. Waits until all is well, and keeps what it cost."""
        callers = self.callers
        assert callers
        begun = time.time()
        yield
        ended = time.time()
        self.await_calls(CALLS_AFTER, ended, limit_s)
        until(lambda: not callers.open_before(ended), limit_s, "what had begun before a fault's end to end")
        settled = time.time()
        ends = [call.end for call in list(callers.calls) if call.acknowledged]
        moments = sorted(end for end in ends if begun - 1 <= end <= settled)
        silence_s = max((late - early for early, late in itertools.pairwise(moments)), default=settled - begun)
        self.recoveries.append(self._cost(fault, begun, ended, settled, silence_s))

    def _cost(self, fault: str, begun: float, ended: float, settled: float, silence_s: float) -> Recovery:
        attempts: Counter[str] = Counter()
        failed: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        noticed_s = 0.0
        for one in recorded(self.database_url).values():
            once = one.task.workspace_uid == self.once_uid
            if not once and one.task.workspace_uid != self.work_uid:
                continue
            for attempt in one.attempts:
                at = attempt.end_time.timestamp()
                # What never reached a container is simply sent again.
                if attempt.failure_reason and at >= begun and attempt.delivery != Delivery.NOT_SENT:
                    attempts[attempt.failure_reason] += 1
                    if not once and attempt.assign_time.timestamp() <= begun:
                        noticed_s = max(noticed_s, at - begun)
            if one.task.failure_reason and one.task.end_time and one.task.end_time.timestamp() >= begun:
                failed[once][one.task.failure_reason] += 1
        return Recovery(
            fault, ended - begun, silence_s, settled - ended, noticed_s, attempts, failed[False], failed[True]
        )

    def finish(self, limit_s: float = SETTLE_LIMIT_S) -> Findings:
        """Stop the callers, wait for all ends, and compare the three accounts of what has been since `begin`."""
        assert self.callers
        self.callers.stop(limit_s)
        calls, self.callers = self.callers.calls, None
        self.calls += calls
        return self.audit()

    def audit(self) -> Findings:
        """Of all that there has been in this rig."""
        if self._ears:
            self._ears.catch_up()
        return audit(
            self.calls,
            recorded(self.database_url),
            executions(self.worker_logs),
            once_uid=self.once_uid,
            deaf=self.deaf,
        )


def until(what: Callable[[], Any], limit_s: float, words: str) -> Any:
    """The first true answer of `what`. Raises TimeoutError with what was waited for."""
    deadline = time.monotonic() + limit_s
    while True:
        if answer := what():
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit_s:g} s for {words}")
        time.sleep(0.1)
