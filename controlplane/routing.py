"""Which free slot gets the next task of a workspace, and why none does: pure functions over plain values.

First form of the plan in the design: of the free slots, the one with the earliest expected finish. Expected seconds are
an average of the replica's own recent tasks which, while unobserved, relaxes toward the workspace's, so that a replica
that was slow once is tried again. `plan` sees the busy replicas and the head of the queue as well, so that the full
form (reserve a busy but much faster slot, tasks by size) can take its place without a change for its caller.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from controlplane.report import ReplicaReport, ReplicaState

#: Weight of the newest task in a replica's average ...
NEWEST_WEIGHT: Final = 0.2
#: ... and in its workspace's, which remembers longer.
NEWEST_WEIGHT_OF_ALL: Final = 0.02
#: After so long without a task a replica's average is half way back to its workspace's.
RELAX_S: Final = 60.0
#: Added to the expected finish for each failure in a row: such a replica is taken when no other is free, and so gets
#: its trial. Without it one that fails at once would look like the fastest of all and eat the queue.
FAILURE_PENALTY_S: Final = 1e6
#: Added where the task itself has failed before: "elsewhere" if there is an elsewhere.
AVOID_PENALTY_S: Final = 1e12


class Candidate(Protocol):
    """A replica as routing sees it; nothing is written."""

    @property
    def id(self) -> str:
        """Ties are broken by it."""

    @property
    def capacity(self) -> int:
        """Tasks it may run at once; 0 while it takes none."""

    @property
    def free(self) -> int:
        """How many more it could take now, never more than 0 while its node is not connected."""

    @property
    def pace_s(self) -> float:
        """Average seconds of its recent tasks; 0: none seen."""

    @property
    def pace_time(self) -> float:
        """When `pace_s` was last renewed, in monotonic seconds."""

    @property
    def failures(self) -> int:
        """Attempts in a row that failed there without an answer of the container."""


class Waiting(Protocol):
    """A task as routing sees it."""

    @property
    def avoid(self) -> Collection[str]:
        """Ids of replicas on which it has failed: taken only if no other is free."""


W = TypeVar("W", bound=Waiting)


class Binding(NamedTuple, Generic[W]):
    """This task to that replica, and why, in words."""

    task: W
    replica_id: str
    reason: str


def plan(waiting: Iterable[W], replicas: Collection[Candidate], *, mean_s: float, now: float) -> list[Binding[W]]:
    """Who starts now and where. `waiting` is read in order and only as far as there are slots; the rest waits on.

    `mean_s`: average seconds of the workspace's tasks, 0 if none was seen.
    """
    bindings: list[Binding[W]] = []
    taken: dict[str, int] = {}
    for task in waiting:
        binding = _bind(task, replicas, taken, mean_s, now)
        if binding is None:
            break
        bindings.append(binding)
        taken[binding.replica_id] = taken.get(binding.replica_id, 0) + 1
    return bindings


def _bind(
    task: W, replicas: Collection[Candidate], taken: dict[str, int], mean_s: float, now: float
) -> Binding[W] | None:
    # Flat and without a helper per replica: this runs for every task, over every replica.
    avoid = task.avoid
    best: Candidate | None = None
    best_s = best_finish = 0.0
    open_count = 0
    for replica in replicas:
        free = replica.free
        if taken:
            free -= taken.get(replica.id, 0)
        if free <= 0:
            continue
        open_count += 1
        pace = replica.pace_s
        seconds = mean_s + (pace - mean_s) * 0.5 ** ((now - replica.pace_time) / RELAX_S) if pace else mean_s
        # Tasks that share a replica share its GPU. Where nothing is known yet, only the load counts.
        finish = (seconds or 1.0) * (2.0 - free / replica.capacity)
        if replica.failures:
            finish += FAILURE_PENALTY_S * replica.failures
        if avoid and replica.id in avoid:
            finish += AVOID_PENALTY_S
        if best is None or finish < best_finish or (finish == best_finish and replica.id < best.id):
            best, best_s, best_finish = replica, seconds, finish
    if best is None:
        return None
    which = "the only replica with a free slot" if open_count == 1 else f"the fastest of {open_count} with a free slot"
    others = len(replicas) - open_count
    reason = f"{which}, {others} busy or not ready" if others else which
    return Binding(task, best.id, f"{reason}; {best_s:.3g} s expected" if best_s else reason)


def renewed(pace_s: float, seconds: float, weight: float) -> float:
    """The average after one more task that took `seconds`."""
    return pace_s + (seconds - pace_s) * weight if pace_s else seconds


_STATE_WORDS: Final = {
    ReplicaState.ASSIGNED: "placed, its node has not begun with it",
    ReplicaState.PULLING: "pulling",
    ReplicaState.STARTING: "starting",
    ReplicaState.READY: "taking no new tasks",
    ReplicaState.BACKOFF: "failed and to be tried again",
    ReplicaState.STOPPING: "stopping",
    ReplicaState.LOST: "on a node that is not connected",
}


def waiting_for(replicas: Collection[Candidate], reports: Iterable[ReplicaReport]) -> str:
    """Why no slot is free, in words. `reports`: how all replicas of the workspace stand, ready or not."""
    able = sum(1 for replica in replicas if replica.capacity)
    if any(replica.free > 0 for replica in replicas):
        return "a slot is free; it is next"
    stands = Counter(_stand(report) for report in reports if report.state is not ReplicaState.READY or not able)
    others = ", ".join(
        f"{count} {words}" for words, count in sorted(stands.items(), key=lambda item: (-item[1], item[0]))
    )
    if able:
        busy = "the only replica is busy" if able == 1 else f"{able} replicas, all busy"
        return f"{busy}; besides {others}" if others else busy
    return f"no replica is ready: {others}" if others else "no replica is placed yet"


def _stand(report: ReplicaReport) -> str:
    words = _STATE_WORDS[report.state]
    if report.state in {ReplicaState.PULLING, ReplicaState.STARTING}:
        words += f" ({report.progress} %)"
    if report.state is ReplicaState.BACKOFF and report.message:
        words += f" ({report.message[:200]})"
    return words
