"""What would follow from a workspace's description, with the fleet as it is: the dry run of `ngpu plan`. Pure.

The same decisions as the deployer's, one replica after another, each against what those before it leave; nothing is
kept. An update goes as `rollout` does it: the first new replica finds room beside all old ones, and each further one
where one more of those has gone.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from msgspec.structs import replace

from controlplane import generations, placement, room
from controlplane.census import Replica, Workspace
from controlplane.explain import Decision, in_words
from controlplane.fragmentation import Fragmentation
from controlplane.placement import NodeView, Policy
from controlplane.spec import Spec

#: Replicas that are tried; of more, these stand for all.
REPLICAS: Final = 32


class Change(enum.IntEnum):
    """What becomes of the workspace; the numbers are fleet.proto's."""

    #: There is none of that name yet.
    NEW = 1
    #: Nothing.
    NONE = 2
    #: It is described anew; its containers go on.
    IN_PLACE = 3
    #: It needs other containers.
    GENERATION = 4


class Step(msgspec.Struct, frozen=True):
    """One replica. `decision.chosen` empty: there is no room for it, and with that the steps end.

    `pulls`: its image is not on that node yet; of `image_bytes`, None: not known. `replaces`: the id of the one of a
    former generation that goes once it is ready; empty: none.
    """

    decision: Decision
    gpu_ids: tuple[str, ...] = ()
    pulls: bool = False
    image_bytes: int | None = None
    replaces: str = ""


class Rehearsal(msgspec.Struct, frozen=True):
    """The whole. `wanted`: how many replicas there should be; `kept`: of those there are, how many go on.

    `steps`: of those that are to come, the first REPLICAS of `missing`. `fields`: what is described anew; `anew`: what
    of that needs other containers. `idle`: none are wanted now, and one was tried all the same.
    """

    change: Change
    generation: int
    wanted: int
    kept: int
    missing: int
    steps: tuple[Step, ...]
    fields: tuple[str, ...] = ()
    anew: tuple[str, ...] = ()
    idle: bool = False

    @property
    def fits(self) -> bool:
        """Has every replica that was tried found its room?"""
        return all(step.decision.chosen for step in self.steps)


def rehearse(
    before: Workspace | None,
    after: Workspace,
    replicas: Sequence[Replica],
    nodes: Mapping[str, NodeView],
    *,
    image_bytes: Callable[[str], int | None],
    time: datetime,
    policy: Policy,
    demand: Fragmentation,
) -> Rehearsal:
    """See the module. `before`: the workspace as it is, with these replicas, those that stay longest last."""
    change, fields, anew = _change(before, after)
    active = [replica for replica in replicas if replica.active]
    former = [replica for replica in active if replica.generation != after.generation]
    staying = len(active) - len(former)
    idle = not after.wanted
    missing = max(0, max(after.wanted, idle) - staying)
    need = room.need_of(after, image_bytes)
    views = dict(nodes)
    steps: list[Step] = []
    for number in range(min(missing, REPLICAS)):
        subject = f"replica {staying + number + 1} of {after.name}"
        found = placement.place(need, views.values(), time=time, subject=subject, policy=policy, demand=demand)
        if isinstance(found, placement.Refusals):
            steps.append(Step(found.decision))
            break
        view = views[found.node_addr]
        views[view.addr] = placement.with_replica(need, view, found.gpu_ids)
        # One more than wanted at most; what there are too few of has nothing to replace.
        gone = former.pop(0) if former and staying + number + 1 + len(former) > after.wanted else None
        if gone is not None and before is not None and gone.node_addr in views:
            old = room.need_of(replace(before, spec=before.spec_at(gone.generation)), image_bytes)
            views[gone.node_addr] = placement.without_replica(old, views[gone.node_addr], gone.gpu_ids)
        steps.append(
            Step(
                decision=found.decision,
                gpu_ids=found.gpu_ids,
                pulls=not placement.has_image(need, view),
                image_bytes=need.image_bytes,
                replaces="" if gone is None else gone.id,
            )
        )
    kept = min(staying, after.wanted)
    return Rehearsal(change, after.generation, after.wanted, kept, missing, tuple(steps), fields, anew, idle)


def words(rehearsal: Rehearsal) -> str:
    """The whole in a sentence or two."""
    text = {
        Change.NEW: "It would be a new workspace.",
        Change.NONE: "It is described so already.",
        Change.IN_PLACE: f"{_listed(rehearsal.fields)} would change; no container is started anew for that.",
        Change.GENERATION: (
            f"It would be generation {rehearsal.generation}, since {_listed(rehearsal.anew)} cannot change in a "
            "container that runs: its replicas are replaced one by one, each old one kept until a new one is ready."
        ),
    }[rehearsal.change]
    placed = sum(1 for step in rehearsal.steps if step.decision.chosen)
    if rehearsal.idle:
        will = "would find room now" if rehearsal.fits else "would find no room now"
        return f"{text} No replica is wanted as it stands; the first one {will}."
    if not rehearsal.missing:
        fewer = "" if rehearsal.kept else " None is wanted."
        return f"{text} No replica has to be placed.{fewer}"
    tried = "" if rehearsal.missing <= REPLICAS else f" (the first {REPLICAS} were tried)"
    if rehearsal.fits:
        return f"{text} There is room for {_all_of(rehearsal.missing)}{tried}."
    reasons = in_words(rehearsal.steps[-1].decision.refusals) or "there is no node"
    return f"{text} There is room for {placed} of {rehearsal.missing} replicas; for the next: {reasons}."


def _all_of(count: int) -> str:
    return "its replica" if count == 1 else f"all {count} replicas"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _change(before: Workspace | None, after: Workspace) -> tuple[Change, tuple[str, ...], tuple[str, ...]]:
    if before is None:
        return Change.NEW, (), ()
    fields = tuple(name for name in Spec.__struct_fields__ if getattr(before.spec, name) != getattr(after.spec, name))
    anew = tuple(
        name
        for name in fields
        if not generations.same_containers(before.spec, replace(before.spec, **{name: getattr(after.spec, name)}))
    )
    if before.generation != after.generation:
        return Change.GENERATION, fields, anew
    return (Change.IN_PLACE if fields else Change.NONE), fields, anew
