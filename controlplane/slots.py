"""Who is connected, what each replica has in flight, and so what is free.

Knows nothing of SQL or protobuf. The set in flight is restated by the node at every connect and heartbeat, and what is
free is always counted from it: there is no counter that could drift.
"""

from collections.abc import Collection
from datetime import datetime
from itertools import islice
from math import inf
from typing import Final, Protocol

import msgspec

from controlplane import estimates
from controlplane.ejection import CLEAN
from controlplane.lineup import Lineup
from controlplane.model import Cause, Delivery
from controlplane.sizes import Features, Sizes
from controlplane.spec import JobRule

Headers = tuple[tuple[str, bytes], ...]


class Request(msgspec.Struct, frozen=True):
    """A request as the container gets it. Over wire.INLINE_BYTES `body` is empty and lies in the body store."""

    method: str
    path: str
    query: str = ""
    headers: Headers = ()
    body: bytes = b""
    size: int = 0


class Response(msgspec.Struct, frozen=True):
    """A response as the container gave it. Its body as in Request."""

    status: int
    headers: Headers = ()
    body: bytes = b""
    size: int = 0
    is_utf8: bool = False


class Failure(msgspec.Struct, frozen=True):
    """Why there is no answer of the container. `reason` is one of the constants of task.proto (Failure)."""

    cause: Cause
    reason: str
    message: str


class Start(msgspec.Struct, frozen=True):
    """Begin an attempt. Given twice for the same id, the second changes nothing."""

    attempt_id: str
    replica_id: str
    port: int
    request: Request
    run_time_limit_s: float
    response_body_limit_bytes: int
    streamed: bool = False
    #: The request may begin a job, to be followed by this rule.
    job: JobRule | None = None
    #: Longer than this is slow, and recorded; inf: never.
    record_after_s: float = inf
    #: While so many attempts run on the replica it waits at its node, at most so long; 0: it begins at once.
    concurrency: int = 0
    wait_limit_s: float = 0.0


class AttemptResult(msgspec.Struct, frozen=True):
    """The end of an attempt, as its node says: `response`, or `failure`. Times in microseconds; 0: not reached."""

    attempt_id: str
    delivery: Delivery
    response: Response | None = None
    failure: Failure | None = None
    sent_after_us: int = 0
    first_byte_after_us: int = 0
    last_byte_after_us: int = 0
    gpu_us: int = 0
    #: By the node's clock; for the record only.
    end_time: datetime | None = None
    #: The container's own id of the job that it became; empty: none.
    job_id: str = ""
    #: How long it waited at its node for a slot; the times above count from then.
    waited_us: int = 0


class Link(Protocol):
    """The way to one connected node: puts into a bounded outbox that a writer drains in batches. None of them waits."""

    def start(self, start: Start) -> None:
        """Begin an attempt."""

    def cancel(self, attempt_id: str) -> None:
        """End an attempt; its result still follows."""

    def ack(self, attempt_id: str) -> None:
        """The attempt's end is on disk, or it was given up: forget it."""


#: A slot may hold one task ahead where it would stand empty between two for so much of what a task runs.
AHEAD_SHARE: Final = 0.1


class Node:
    """A node that has been connected in this life of the control plane, or on which something may still run."""

    __slots__ = ("addr", "down_since", "ip", "link", "replicas", "strangers")

    def __init__(self, addr: str, now: float) -> None:
        self.addr = addr
        self.ip = ""
        self.link: Link | None = None
        #: Monotonic; meaningless while there is a link.
        self.down_since = now
        self.replicas: dict[str, Replica] = {}
        #: Running attempts that nobody here knows, on replicas nobody here knows: they are being cancelled, and until
        #: then each costs every replica of the node a slot.
        self.strangers: set[str] = set()

    @property
    def workspaces(self) -> set[str]:
        """Those that have a replica here."""
        return {replica.workspace_uid for replica in self.replicas.values()}


class Replica:
    """A replica and what it has in flight. What it satisfies is routing.Candidate."""

    __slots__ = (
        "answered_at",
        "answers",
        "capacity",
        "crowd",
        "crowding",
        "failures",
        "gpu_ids",
        "id",
        "in_flight",
        "most",
        "neighbours",
        "node",
        "pace_s",
        "pace_time",
        "past_s",
        "record",
        "trip_s",
        "usual_s",
        "works",
        "workspace_uid",
    )

    def __init__(self, replica_id: str, workspace_uid: str, node: Node) -> None:
        self.id = replica_id
        self.workspace_uid = workspace_uid
        self.node = node
        self.capacity = 0
        self.gpu_ids: tuple[str, ...] = ()
        #: Attempt id -> since when, monotonic. Attempts that were given up count until their node says they are over.
        self.in_flight: dict[str, float] = {}
        #: The work of those of which more is known than that it is 1.
        self.works: dict[str, float] = {}
        #: Replicas that share a GPU with it; how many of them, itself included, were at work on average while it was;
        #: and how that is now, by that average.
        self.neighbours: tuple[Replica, ...] = ()
        self.crowd = 0.0
        self.crowding = 1.0
        self.pace_s = 0.0
        self.usual_s = 0.0
        self.pace_time = 0.0
        #: How long a slot stands empty between two tasks: the start's way to disk and node, and the result's way back.
        self.trip_s = 0.0
        self.failures = 0
        #: How far it is trusted, and what follows from that: the most it may run at once; None: all that it can.
        self.record = CLEAN
        self.most: int | None = None
        #: What `doubts` goes by: its last answer, how many there were (up to what it takes), and its usual seconds.
        self.answered_at = -inf
        self.answers = 0
        self.past_s = 0.0

    @property
    def free(self) -> int:
        """How many more it could take now; below 0 where its capacity has become less than it runs."""
        node = self.node
        if node.link is None:
            return 0
        free = self.capacity - len(self.in_flight) - len(node.strangers)
        return free if self.most is None else min(free, self.most - len(self.in_flight))

    @property
    def has_room(self) -> bool:
        """What is given to its node now begins at once: for what is only reserved there the slot is not taken yet."""
        held = self.in_flight
        return len(held) < self.capacity or len(held) - list(held.values()).count(RESERVED) < self.capacity

    @property
    def ahead(self) -> int:
        """How many tasks more it could hold ahead: one for each slot, where the way is long for how long tasks run."""
        if self.trip_s <= AHEAD_SHARE * (self.pace_s - self.trip_s) or self.most is not None or self.node.link is None:
            return 0
        return max(0, self.capacity + min(self.free, 0))

    @property
    def comes_free(self) -> bool:
        """See routing.Candidate."""
        return self.node.link is not None and bool(self.in_flight) and self.most != 0

    def oldest(self) -> tuple[float, float]:
        """See routing.Candidate."""
        # In order of arrival, so the first is the oldest.
        attempt_id, since = next(iter(self.in_flight.items()))
        return since, self.works.get(attempt_id, 1.0)


def _settle(node: Node) -> None:
    """Who shares GPUs with whom has changed."""
    for replica in node.replicas.values():
        gpus = set(replica.gpu_ids)
        replica.neighbours = tuple(
            other for other in node.replicas.values() if other is not replica and gpus.intersection(other.gpu_ids)
        )
        replica.crowding = 1.0
    for replica in node.replicas.values():
        _tell_neighbours(replica)


def _begin_next(replica: Replica, now: float) -> None:
    """Of those that it holds ahead the first begins: as many run as it has slots, in the order in which they came."""
    attempt_id, since = next(islice(replica.in_flight.items(), replica.capacity - 1, None))
    if since is not RESERVED:
        replica.in_flight[attempt_id] = now


def _crowd_now(replica: Replica) -> int:
    return 1 + sum(1 for other in replica.neighbours if other.in_flight)


def _tell_neighbours(replica: Replica) -> None:
    """What it has in flight has changed. GPUs divide their time evenly among those at work."""
    for other in replica.neighbours:
        other.crowding = _crowd_now(other) / (other.crowd or 1.0)


class Pool:
    """The replicas of one workspace."""

    __slots__ = ("ejections", "lined_up_at", "lineup", "mean_s", "replicas", "sizes")

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        #: Average seconds of its tasks, each divided by its work, over all replicas; 0: none seen.
        self.mean_s = 0.0
        self.sizes = Sizes()
        #: How its replicas stood at that time, to explain what was chosen then.
        self.lineup: Lineup = ()
        self.lined_up_at = -inf
        #: How often one of them was ejected.
        self.ejections = 0


#: While most nodes are silent at once the fault is likely ours: nothing is given up until one was silent for so long.
SILENCE_S: Final = 120.0
#: How long after most nodes were silent at once none is given up yet.
SILENCE_END_S: Final = 10.0
#: Since when an attempt is in flight that its node has not been given yet: no restatement can speak of it.
RESERVED: Final = inf

_EMPTY: Final = Pool()


class Slots:
    """All replicas, by workspace and by node. Bounded by the fleet: replicas go with `remove`."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._replicas: dict[str, Replica] = {}
        self._pools: dict[str, Pool] = {}
        self._where: dict[str, Replica] = {}
        #: When most nodes were last silent at once.
        self._silence_at = -inf

    # -- replicas

    def known(self, replica_id: str, workspace_uid: str, node_addr: str, now: float) -> Replica:
        """The replica; one heard of for the first time takes nothing yet."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            node = self._node(node_addr, now)
            replica = Replica(replica_id, workspace_uid, node)
            self._replicas[replica_id] = node.replicas[replica_id] = replica
            self._pools.setdefault(workspace_uid, Pool()).replicas[replica_id] = replica
        return replica

    def remove(self, replica_id: str) -> list[str]:
        """It is no more. Gives the attempts that were in flight there; nothing can be taken there any longer."""
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return []
        del replica.node.replicas[replica_id]
        _settle(replica.node)
        pool = self._pools[replica.workspace_uid]
        del pool.replicas[replica_id]
        if not pool.replicas:
            del self._pools[replica.workspace_uid]
        for attempt_id in replica.in_flight:
            del self._where[attempt_id]
        return list(replica.in_flight)

    def set_gpus(self, replica: Replica, gpu_ids: tuple[str, ...]) -> None:
        """It runs on these. Again is no error."""
        if replica.gpu_ids != gpu_ids:
            replica.gpu_ids = gpu_ids
            _settle(replica.node)

    def replica(self, replica_id: str) -> Replica | None:
        """By id."""
        return self._replicas.get(replica_id)

    def pool(self, workspace_uid: str) -> Pool:
        """The workspace's replicas; an empty one if there are none."""
        return self._pools.get(workspace_uid, _EMPTY)

    # -- attempts

    def reserve(self, attempt_id: str, replica: Replica) -> None:
        """Keep a slot for an attempt that is not given to the node yet."""
        replica.in_flight[attempt_id] = RESERVED
        self._where[attempt_id] = replica

    def take(self, attempt_id: str, replica: Replica, now: float, work: float = 1.0) -> None:
        """The attempt, of that much work, is given to the node and in flight there from now on."""
        replica.in_flight[attempt_id] = now
        self._where[attempt_id] = replica
        if work != 1.0:
            replica.works[attempt_id] = work
        if replica.neighbours:
            _tell_neighbours(replica)

    def release(self, attempt_id: str, node_addr: str, now: float) -> Collection[str]:
        """The attempt is over, by word of this node. Gives the workspaces that have got a free slot by that."""
        replica = self._where.get(attempt_id)
        if replica is not None:
            if replica.node.addr != node_addr:
                return ()
            del self._where[attempt_id], replica.in_flight[attempt_id]
            if replica.works:
                replica.works.pop(attempt_id, None)
            if replica.neighbours:
                _tell_neighbours(replica)
            if len(replica.in_flight) >= replica.capacity > 0:
                _begin_next(replica, now)
            return (replica.workspace_uid,)
        node = self._nodes.get(node_addr)
        if node is None or attempt_id not in node.strangers:
            return ()
        node.strangers.remove(attempt_id)
        return node.workspaces

    def observe(
        self,
        replica: Replica,
        seconds: float,
        now: float,
        work: float = 1.0,
        features: "Features | None" = None,
        *,
        trip_s: float = 0.0,
    ) -> None:
        """A task of that much work, and of these features if its request was looked at, took so long there.

        `trip_s`: how much of its slot's time was the way there and back; 0: not known.
        """
        if trip_s > 0.0:
            replica.trip_s = estimates.renewed(replica.trip_s, trip_s, estimates.NEWEST_WEIGHT)
        pool = self._pools.get(replica.workspace_uid)
        if features is not None and replica.pace_s and pool is not None:
            pool.sizes.learn(features, seconds / replica.pace_s)
        if replica.neighbours:
            replica.crowd = estimates.renewed(replica.crowd, _crowd_now(replica), estimates.NEWEST_WEIGHT)
        seconds /= work
        if not replica.pace_s and pool is not None and pool.mean_s:
            seconds = min(seconds, estimates.FIRST_TIMES * pool.mean_s)
        replica.pace_s = estimates.renewed(replica.pace_s, seconds, estimates.NEWEST_WEIGHT)
        replica.usual_s = estimates.renewed(replica.usual_s, seconds, estimates.NEWEST_WEIGHT_OF_USUAL)
        replica.pace_time = now
        replica.failures = 0
        if pool is not None:
            pool.mean_s = estimates.renewed(pool.mean_s, seconds, estimates.NEWEST_WEIGHT_OF_ALL)

    # -- nodes

    def connect(self, node_addr: str, link: Link, ip: str, running: Collection[str], now: float) -> set[str]:
        """The node is there over this link and runs these attempts, no others. Gives the workspaces on it."""
        # A silence may end with this one, and nobody have asked meanwhile.
        self._notice_silence(now)
        node = self._node(node_addr, now)
        node.link = link
        node.ip = ip
        for replica in node.replicas.values():
            over = [held for held, since in replica.in_flight.items() if since is not RESERVED and held not in running]
            for attempt_id in over:
                del self._where[attempt_id], replica.in_flight[attempt_id]
                replica.works.pop(attempt_id, None)
            _tell_neighbours(replica)
        node.strangers = {attempt_id for attempt_id in running if attempt_id not in self._where}
        return node.workspaces

    def disconnect(self, node_addr: str, link: Link, now: float) -> bool:
        """The link is gone. False if it was not the node's current one: then nothing has changed."""
        node = self._nodes.get(node_addr)
        if node is None or node.link is not link:
            return False
        node.link = None
        node.down_since = now
        return True

    def missing(self, node_addr: str, held: Collection[str], given_before: float) -> list[str]:
        """Attempts given to the connected node before that time which it does not say it holds."""
        node = self._nodes.get(node_addr)
        if node is None or node.link is None:
            return []
        strangers = [attempt_id for attempt_id in node.strangers if attempt_id not in held]
        return strangers + [
            attempt_id
            for replica in node.replicas.values()
            for attempt_id, since in replica.in_flight.items()
            if since < given_before and attempt_id not in held
        ]

    def link(self, node_addr: str) -> Link | None:
        """The way to the node, if it is connected."""
        node = self._nodes.get(node_addr)
        return None if node is None else node.link

    def most_are_silent(self, now: float) -> bool:
        """Have more nodes fallen silent within SILENCE_S than are connected, and more than one?"""
        self._notice_silence(now)
        # It ends for one node after the other: the others have so long to come back.
        return now - self._silence_at < SILENCE_END_S

    def _notice_silence(self, now: float) -> None:
        up = sum(1 for node in self._nodes.values() if node.link is not None)
        silent = sum(1 for node in self._nodes.values() if node.link is None and now - node.down_since < SILENCE_S)
        if silent > max(up, 1):
            self._silence_at = now

    def _node(self, addr: str, now: float) -> Node:
        node = self._nodes.get(addr)
        if node is None:
            node = self._nodes[addr] = Node(addr, now)
        return node
