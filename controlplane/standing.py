"""How a workspace stands, where that is not as it should be: what its owner reads first. Pure."""

from collections.abc import Collection

from controlplane import explain
from controlplane.census import Replica, Workspace
from controlplane.report import ReplicaReport, ReplicaState


def words(workspace: Workspace, replicas: Collection[tuple[Replica, ReplicaReport]]) -> str:
    """Sentences; empty: nothing is missing and nothing under way. `replicas`: those not stopped, as they stand."""
    said = [
        workspace.deployment.fault,
        _update(workspace, replicas),
        "" if workspace.unplaced is None else explain.summary(workspace.unplaced),
    ]
    return " ".join(sentence for sentence in said if sentence)


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
