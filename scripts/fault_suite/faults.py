"""What is done to a rig: the table of faults, each with what it may cost.

A fault is a function that does it, waits as long as it lasts, and undoes it.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from controlplane.__main__ import GIVE_WAY
from scripts.fault_suite.disk import full
from scripts.fault_suite.pair import LEASE_S
from scripts.fault_suite.rig import GIVEN_UP_S, HEARTBEAT_S, RECONNECT_GRACE_S, SMALL_NODE, Recovery, Rig, until

#: Shorter than any node is given up after.
BLIP_S: Final = 1.5
#: Longer than a node is given up after.
LONG_S: Final = GIVEN_UP_S + 1.0
#: A busy machine's share in noticing.
NOTICE_MARGIN_S: Final = 8.0
#: From a node's return until its containers are what they should be; the product's word is 60 s.
ORPHAN_LIMIT_S: Final = 60.0

#: For a container that has ended to be started anew: its backoff, and a busy machine.
RESTART_LIMIT_S: Final = 60.0

#: For the other control plane to serve, and nodes and bridge to be there; the product's words are 1 s and 15 s.
SERVES_S: Final = 1.0 + NOTICE_MARGIN_S
MOVED_S: Final = 15.0
#: That calls get to end when a control plane stops; its default.
STOP_GRACE_S: Final = 10.0

#: Left before a long outage: fewer than the slots of a rig.
LONG_TASKS: Final = 6

#: A log is heard so long after it was written.
DEAF_MARGIN_S: Final = 3.0

NOTHING: Final = "nothing"
REPEATS: Final = "repeats"


@dataclass(frozen=True)
class Fault:
    """`costs` NOTHING: no attempt fails. REPEATS: attempts may be lost and run again elsewhere; a task may fail only if
    it must not run twice. `subject`: what it is done to; two faults at once have different ones.
    """

    name: str
    inflict: Callable[[Rig], None]
    costs: str
    subject: str = ""
    needs: tuple[str, ...] = ()
    #: Only in the long form: like another one.
    variant: bool = False
    check: Callable[[Rig, Recovery], None] | None = None

    def why_not(self, rig: Rig) -> str:
        """Why it cannot be had here; "" if it can."""
        return "; ".join(filter(None, (rig.lacks.get(need, "") for need in self.needs)))


FAULTS: Final[dict[str, Fault]] = {}


def fault(
    name: str,
    costs: str,
    *needs: str,
    subject: str,
    variant: bool = False,
    check: Callable[[Rig, Recovery], None] | None = None,
) -> Callable[[Callable[[Rig], None]], Callable[[Rig], None]]:
    """Into the table."""

    def enter(inflict: Callable[[Rig], None]) -> Callable[[Rig], None]:
        FAULTS[name] = Fault(name, inflict, costs, subject, needs, variant, check)
        return inflict

    return enter


def suffer(rig: Rig, *names: str) -> Recovery:
    """One fault, or several at once, from a whole rig to a well one; checked against what they may cost."""
    faults = [FAULTS[name] for name in names]
    rig.await_whole()
    with rig.suffering(" + ".join(names)):
        _inflict(rig, faults)
    recovery = rig.recoveries[-1]
    if all(one.costs == NOTHING for one in faults):
        assert not recovery.attempts, f"{recovery.fault} should cost nothing, and attempts failed: {recovery.attempts}"
    assert not recovery.work_failed, f"{recovery.fault}: repeatable tasks failed: {recovery.work_failed}"
    for one in faults:
        if one.check and len(faults) == 1:
            one.check(rig, recovery)
    return recovery


def _inflict(rig: Rig, faults: Sequence[Fault]) -> None:
    for done in [rig.threads.submit(one.inflict, rig) for one in faults]:
        done.result()


# The control plane.


@fault("control plane: kill -9, then start", NOTHING, "one control plane", subject="controlplane")
def control_plane_killed(rig: Rig) -> None:
    """At once."""
    rig.platform.controlplane.kill()
    rig.platform.start_controlplane()


@fault("control plane: gone while nodes work on", NOTHING, "one control plane", subject="controlplane")
def control_plane_gone(rig: Rig) -> None:
    """Longer than a node would be waited for."""
    rig.platform.controlplane.kill()
    time.sleep(rig.lasts(LONG_S, 60.0))
    rig.platform.start_controlplane()


@fault(
    "control plane: gone for long, over tasks as long",
    NOTHING,
    "one control plane",
    "outage",
    subject="controlplane",
    variant=True,
)
def control_plane_long_gone(rig: Rig) -> None:
    """Tasks that were given out before end while nobody hears of it."""
    assert rig.callers
    left = [rig.callers.leave(rig.outage_s * part / (LONG_TASKS + 1)) for part in range(1, LONG_TASKS + 1)]
    until(lambda: all(rig.is_running(call) for call in left), RESTART_LIMIT_S, "long tasks to run")
    rig.platform.controlplane.kill()
    time.sleep(rig.outage_s)
    rig.platform.start_controlplane()


@fault("control plane: stopped and started", NOTHING, "one control plane", subject="controlplane")
def control_plane_restarted(rig: Rig) -> None:
    """SIGTERM, as an upgrade does it."""
    rig.platform.controlplane.stop()
    rig.platform.start_controlplane()


@fault("control plane: SIGSTOP, SIGCONT", NOTHING, "one control plane", subject="controlplane")
def control_plane_frozen(rig: Rig) -> None:
    """When it goes on, every node has been silent for too long, by its clock."""
    with rig.frozen(rig.platform.controlplane):
        time.sleep(rig.lasts(LONG_S, 25.0))


@fault("bridge: kill -9, then start", NOTHING, subject="bridge")
def bridge_killed(rig: Rig) -> None:
    """Whoever waited for an answer asks again, with the same key."""
    rig.restart_bridge()


# Nodes.


def _lost(_: Rig, recovery: Recovery) -> None:
    """It was noticed in time."""
    assert recovery.noticed_s <= GIVEN_UP_S + NOTICE_MARGIN_S, f"noticed after {recovery.noticed_s:.1f} s"


def _back(rig: Rig, recovery: Recovery) -> None:
    """Noticed, and when the node is back nothing is left on it that nobody wants."""
    _lost(rig, recovery)
    rig.await_whole()
    until(lambda: not rig.orphans(), ORPHAN_LIMIT_S, "containers that nobody wants to be gone")


@fault("node: daemon killed -9 with its containers, then started", REPEATS, "processes", subject="node", check=_lost)
def daemon_killed(rig: Rig) -> None:
    """Processes of the process engine end with their daemon."""
    name = rig.some_node()
    rig.node(name).kill()
    time.sleep(rig.lasts(0.5, 20.0))
    rig.start_node(name)


@fault("node: vanishes (power)", REPEATS, "processes", subject="node", check=_lost)
def node_vanishes(rig: Rig) -> None:
    """No packet says that it is gone."""
    name = rig.some_node("gamma")
    with rig.cut_off(name):
        rig.node(name).kill()
        time.sleep(rig.lasts(LONG_S, 30.0))
    rig.start_node(name)


@fault("node: daemon SIGSTOP, given up, SIGCONT", REPEATS, subject="node", check=_back)
def daemon_frozen(rig: Rig) -> None:
    """Its containers go on meanwhile; what it says when it wakes comes too late."""
    name = rig.some_node("alpha")
    with rig.frozen(rig.node(name)):
        time.sleep(rig.lasts(LONG_S, 25.0))


def _resumed(_: Rig, recovery: Recovery) -> None:
    """Nothing was run again, but for one answer that was just being read; or the daemon took too long to be back."""
    lost = recovery.attempts.total()
    assert lost <= 1 or recovery.lasted_s >= RECONNECT_GRACE_S, f"attempts were lost: {recovery.attempts}"


@fault(
    "node: daemon killed -9 while its containers work, then started", REPEATS, "docker", subject="node", check=_resumed
)
def daemon_killed_alone(rig: Rig) -> None:
    """The containers go on, and the next daemon goes on waiting for their answers: one execution."""
    name = rig.some_node()
    rig.node(name).kill()
    time.sleep(rig.lasts(1.0, 20.0))
    rig.start_node(name)


@fault("node: daemon stopped and started, its containers stay", NOTHING, "docker", subject="node")
def daemon_upgraded(rig: Rig) -> None:
    """As an upgrade does it."""
    name = rig.some_node()
    rig.node(name).stop()
    rig.start_node(name)


@fault("engine: dockerd killed -9, then started", REPEATS, "own engine", subject="node")
def engine_killed(rig: Rig) -> None:
    """Containers go on without it; when it starts it may end them, as Docker does without live-restore."""
    assert rig.docker
    assert rig.docker.kill
    assert rig.docker.start
    killed = time.time()
    rig.docker.kill()
    time.sleep(rig.lasts(3.0, 15.0))
    rig.docker.start()
    # What a container writes while its engine is dead is lost with the container, if the engine then ends it.
    rig.deaf.append((killed - DEAF_MARGIN_S, time.time() + DEAF_MARGIN_S))


@fault("network: dropped both ways (iptables), given up, back", REPEATS, "namespace", subject="node", check=_back)
def dropped(rig: Rig) -> None:
    """Of the node in a namespace."""
    assert rig.namespace
    with rig.namespace.dropping():
        time.sleep(rig.lasts(LONG_S, 30.0))


@fault("network: dropped on the way up (iptables), back", REPEATS, "namespace", subject="node", check=_lost)
def dropped_up(rig: Rig) -> None:
    """The node hears and is not heard."""
    assert rig.namespace
    with rig.namespace.dropping("up"):
        time.sleep(rig.lasts(LONG_S, 30.0))


@fault("network: swallowed both ways, given up, back", REPEATS, subject="node", check=_lost)
def swallowed(rig: Rig) -> None:
    """By the proxy."""
    with rig.proxies[rig.some_node("beta")].swallowing():
        time.sleep(rig.lasts(LONG_S, 30.0))


@fault("network: swallowed on the way up, given up, back", REPEATS, subject="node", variant=True, check=_lost)
def swallowed_up(rig: Rig) -> None:
    """The node hears and is not heard."""
    with rig.proxies[rig.some_node("alpha")].swallowing("up"):
        time.sleep(rig.lasts(LONG_S, 30.0))


@fault("network: swallowed on the way down, back", REPEATS, subject="node")
def swallowed_down(rig: Rig) -> None:
    """The node is heard and hears nothing: it is believed, until it notices."""
    with rig.proxies[rig.some_node("beta")].swallowing("down"):
        time.sleep(rig.lasts(LONG_S, 30.0))


@fault("network: a blip", NOTHING, subject="node")
def blip(rig: Rig) -> None:
    """Shorter than anybody is given up after."""
    with rig.proxies[rig.some_node("alpha")].swallowing():
        time.sleep(rig.lasts(BLIP_S, BLIP_S))


@fault("network: connections reset", NOTHING, subject="node")
def reset(rig: Rig) -> None:
    """The node dials again at once."""
    for _ in range(3):
        rig.proxies[rig.some_node("beta")].reset()
        time.sleep(HEARTBEAT_S)


@fault("network: cut after some bytes, again and again", NOTHING, subject="node")
def cut(rig: Rig) -> None:
    """In the middle of messages."""
    with rig.proxies[rig.some_node("alpha")].cutting(rig.chance.randrange(2_000, 20_000)):
        time.sleep(rig.lasts(2.0, 10.0))


@fault("network: slow", NOTHING, subject="node")
def slow(rig: Rig) -> None:
    """Every piece late."""
    with rig.proxies[rig.some_node("beta")].delaying(0.3):
        time.sleep(rig.lasts(2.0, 15.0))


@fault("all nodes silent at once", NOTHING, subject="node")
def all_silent(rig: Rig) -> None:
    """Longer than one node would be waited for: the fault is ours, and nothing is given up."""
    with contextlib.ExitStack() as stack:
        for proxy in rig.proxies.values():
            stack.enter_context(proxy.swallowing())
        time.sleep(rig.lasts(LONG_S, 40.0))


@fault("node: its disk is full", REPEATS, "disk", subject="node")
def node_disk_full(rig: Rig) -> None:
    """No journal, no spool: what cannot be noted there is not begun there."""
    with full(rig.state / SMALL_NODE):
        time.sleep(rig.lasts(3.0, 20.0))


# Containers; what processes can show, too, is in tests/faults/test_containers.py.


@fault("container: out of memory", REPEATS, "docker", subject="container")
def out_of_memory(rig: Rig) -> None:
    """It is called that, and the container is back."""
    if "greedy" not in rig.made:
        rig.create("greedy", cpus=0.1, memory="128MiB", limits={"max_attempts": 1})
    greedy = rig.api("greedy")
    answer = greedy.run("oom")
    assert "memory" in answer["msg"], answer
    until(lambda: greedy.run()["result_code"] == 200, RESTART_LIMIT_S, "the container to be back")


@fault("engine: an image that is not to be had", NOTHING, "docker", subject="container")
def no_image(rig: Rig) -> None:
    """The reason is told in words."""
    if "nowhere" not in rig.made:
        rig.create("nowhere", image="127.0.0.1:1/no/such:1", cpus=0.1, wait=False)

    def told() -> bool:
        return any("127.0.0.1:1" in one.get("message", "") for one in rig.workspace("nowhere").get("replicas", []))

    until(told, RESTART_LIMIT_S, "the missing image to be told of")


# The database.


@fault("database: disk full", NOTHING, "disk", "sqlite", subject="controlplane")
def database_full(rig: Rig) -> None:
    """Nothing can be accepted, nothing is lost."""
    with full(rig.state / "controlplane"):
        time.sleep(rig.lasts(4.0, 20.0))


@fault("database: locked by another program", NOTHING, "sqlite", subject="controlplane")
def database_locked(rig: Rig) -> None:
    """For longer than a writer waits for a lock."""
    path = rig.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(rig.lasts(7.0, 20.0))
        other.execute("ROLLBACK")


@fault("database: PostgreSQL restarted", NOTHING, "postgres", subject="controlplane")
def postgres_restarted(rig: Rig) -> None:
    """As a crash does it."""
    assert rig.postgres
    rig.postgres.stop()
    time.sleep(rig.lasts(1.0, 20.0))
    rig.postgres.start()


@fault("database: PostgreSQL cut off", NOTHING, "postgres", subject="controlplane")
def postgres_cut_off(rig: Rig) -> None:
    """Silently."""
    assert rig.database_proxy
    with rig.database_proxy.swallowing():
        time.sleep(rig.lasts(12.0, 30.0))


@fault("database: connections to PostgreSQL reset", NOTHING, "postgres", subject="controlplane")
def postgres_reset(rig: Rig) -> None:
    """Was the last commit done or not?"""
    assert rig.database_proxy
    for _ in range(5):
        rig.database_proxy.reset()
        time.sleep(0.3)


# One of two control planes. In a rig of the quick form the second is only there from here on.


def _switched(rig: Rig, _: Recovery, after_s: float = 0.0) -> None:
    """In time, where nothing else was hurt."""
    switch = rig.switches[-1]
    assert switch.serves_s <= after_s + SERVES_S, f"the other control plane served after {switch.serves_s:.1f} s"
    assert switch.whole_s <= after_s + MOVED_S, f"nodes and bridge were there after {switch.whole_s:.1f} s"


@fault("two control planes: the active one killed -9", NOTHING, "standby", subject="controlplane", check=_switched)
def active_killed(rig: Rig) -> None:
    """The other serves within a second or so, and nodes and bridge find it by themselves."""
    assert rig.pair
    active = rig.pair.both()
    with rig.switching("killed"):
        active.kill()


@fault(
    "two control planes: the active one stopped",
    NOTHING,
    "standby",
    subject="controlplane",
    variant=True,
    check=partial(_switched, after_s=STOP_GRACE_S),
)
def active_stopped(rig: Rig) -> None:
    """SIGTERM, as an upgrade does it."""
    assert rig.pair
    active = rig.pair.both()
    with rig.switching("stopped"):
        active.stop()


@fault(
    "two control planes: the active one SIGSTOP, taken over, SIGCONT",
    NOTHING,
    "standby",
    subject="controlplane",
    check=partial(_switched, after_s=LEASE_S),
)
def active_frozen(rig: Rig) -> None:
    """When it goes on it ends at once: what it says or writes then would be another's business."""
    assert rig.pair
    active = rig.pair.both()
    with rig.switching("frozen"), rig.frozen(active):
        until(lambda: rig.pair and rig.pair.served_by_other(active), RESTART_LIMIT_S, "the other to take over")
        time.sleep(rig.lasts(0.0, 10.0))
    code = active.process.wait(SERVES_S)
    assert code == GIVE_WAY, f"it ended with {code} when it went on"
