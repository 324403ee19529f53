"""How a workspace stands, where that is not as it should be: what its owner reads first. Pure."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from controlplane import explain
from controlplane.census import Replica, Workspace
from controlplane.report import ReplicaReport, ReplicaState


def words(
    workspace: Workspace,
    replicas: Collection[tuple[Replica, ReplicaReport]],
    failing: Callable[[Replica], str],
    doubts: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Sentences; empty: nothing is missing and nothing under way. `replicas`: those not gone, as they stand.

    `failing`: why one will not come up by itself, or nothing. `doubts`: by id, why one gets less work than it could do.
    """
    said = [
        workspace.deployment.fault,
        _update(workspace, replicas),
        _idle(workspace),
        _failing(workspace, replicas, failing),
        doubt(doubts),
        "" if workspace.unplaced is None else explain.summary(workspace.unplaced),
    ]
    return " ".join(sentence for sentence in said if sentence)


def _failing(
    workspace: Workspace, replicas: Collection[tuple[Replica, ReplicaReport]], failing: Callable[[Replica], str]
) -> str:
    """Of replicas that do not come up: one stands for all."""
    said = [(replica, why) for replica, _ in replicas if replica.active and (why := failing(replica))]
    if not said:
        return ""
    (replica, why), *more = said
    who = f"Replica {replica.id} and {len(more)} more do" if more else f"Replica {replica.id} does"
    text = f"{who} not come up: {why}."
    others = {move.node_addr for move in workspace.deployment.moves} - {replica.node_addr}
    return f"{text} Nor did it on {len(others)} other node{'s' * (len(others) > 1)}." if others else text


def doubt(doubts: Mapping[str, str]) -> str:
    """Of replicas that are not fully trusted: one stands for all. `doubts`: why, by id."""
    if not doubts:
        return ""
    replica_id, why = next(iter(doubts.items()))
    more = f" {len(doubts) - 1} more are not fully trusted." if len(doubts) > 1 else ""
    return f"Replica {replica_id} is {why.rstrip('.')}.{more}"


def absence(workspace: Workspace) -> str:
    """Why there is no replica at all, for who waits for one; empty: nothing is known of it yet."""
    if workspace.unplaced is not None:
        return explain.summary(workspace.unplaced)
    if workspace.wanted:
        return ""
    if workspace.spec.scale.max_replicas:
        return "the workspace was idle; one is being called for"
    return f"none is wanted: `ngpu workspace scale {workspace.name} 1`"


def _idle(workspace: Workspace) -> str:
    idle = workspace.spec.scale.max_replicas and not workspace.wanted and not workspace.deleted
    return "It is idle: the next call brings up a replica." if idle else ""


def _update(workspace: Workspace, replicas: Collection[tuple[Replica, ReplicaReport]]) -> str:
    """How far an update has come, up or back."""
    former = [report for replica, report in replicas if replica.generation != workspace.generation and replica.active]
    if workspace.deleted or not (former or workspace.returns_to):
        return ""
    ready = sum(
        report.state is ReplicaState.READY for replica, report in replicas if replica.generation == workspace.generation
    )
    serving = sum(report.state is ReplicaState.READY for report in former)
    text = f"Updating to generation {workspace.generation}: {ready} of {workspace.wanted} replicas are ready"
    return f"{text}, {serving} of an earlier generation serve until they are." if serving else f"{text}."
