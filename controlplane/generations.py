"""How a workspace goes from one generation of its containers to the next, and back. Pure.

A generation is everything that makes a container what it is. What else is described (how many, limits) changes without
a new one. A generation is good once it serves; until then the last good one is kept to return to.
"""

from collections.abc import Collection
from typing import Final

from msgspec.structs import replace

from controlplane.census import Deployment, Version, Workspace
from controlplane.errors import Conflict
from controlplane.spec import Spec

#: Generations of one workspace that replicas are of at the same time: each is a whole description in its row.
VERSIONS: Final = 8


def made_of(spec: Spec) -> tuple[object, ...]:
    """All that makes a container what it is, but its GPUs' ids. Not what may change while it runs."""
    return (
        spec.image,
        spec.command,
        spec.env,
        spec.ports,
        float(spec.cpus),  # 8 and 8.0 are the same, and differ as JSON
        spec.memory_bytes,
        spec.shm_bytes,
        spec.writable_paths,
        spec.gpu.share,  # told in the environment
        spec.volumes,
    )


def same_containers(one: Spec, other: Spec) -> bool:
    """Will the containers of one do for the other, where they are, and are they ready by the same sign?"""
    return (made_of(one), one.gpu, one.readiness) == (made_of(other), other.gpu, other.readiness)


def updated(workspace: Workspace, spec: Spec, used: Collection[int], *, serves: bool) -> Workspace:
    """The workspace described anew. `used`: generations that replicas are of. `serves`: one of the current is ready.

    Raises Conflict if replicas are of too many.
    """
    # The load goes on as it was; where the number was fixed, it is followed from what is asked for.
    target = workspace.deployment.target if workspace.spec.scale.max_replicas else spec.replicas
    workspace = replace(workspace, deployment=replace(workspace.deployment, target=target))
    if same_containers(workspace.spec, spec):
        return replace(workspace, spec=spec, deployment=replace(workspace.deployment, fault=""))
    known = [version for version in workspace.deployment.versions if same_containers(version.spec, spec)]
    # What somebody returns to is there still, or is to be told from what was there.
    generation = known[-1].generation if known else workspace.deployment.last + 1
    before = workspace.deployment
    deployment = replace(
        before,
        versions=_kept(workspace),
        good=before.good or (workspace.generation if serves else 0),
        fault="",
        last=max(generation, before.last),
    )
    moved = _pruned(replace(workspace, spec=spec, generation=generation, deployment=deployment), used)
    if len(moved.deployment.versions) > VERSIONS:
        raise Conflict(f"Replicas of {VERSIONS} earlier descriptions are still there: try again when some have ended.")
    return moved


def settled(workspace: Workspace, used: Collection[int]) -> Workspace:
    """The current generation serves."""
    return _pruned(replace(workspace, deployment=replace(workspace.deployment, good=workspace.generation)), used)


def taken_back(workspace: Workspace, good: int, fault: str, used: Collection[int]) -> Workspace:
    """The generation `good` again, with as many replicas as are wanted now."""
    spec = replace(workspace.spec_at(good), replicas=workspace.spec.replicas, scale=workspace.spec.scale)
    words = f"Generation {workspace.generation} was taken back: {fault}"
    deployment = replace(workspace.deployment, versions=_kept(workspace), good=good, fault=words)
    return _pruned(replace(workspace, spec=spec, generation=good, deployment=deployment), used)


def _kept(workspace: Workspace) -> tuple[Version, ...]:
    return (*workspace.deployment.versions, Version(workspace.generation, workspace.spec))


def _pruned(workspace: Workspace, used: Collection[int]) -> Workspace:
    deployment: Deployment = workspace.deployment
    needed = {*used, deployment.good} - {workspace.generation}
    versions = tuple(version for version in deployment.versions if version.generation in needed)
    return replace(workspace, deployment=replace(deployment, versions=versions))
