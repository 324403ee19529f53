"""How many replicas a workspace should have, by how it is used: up at once, down slowly, to none when idle. Pure.

What is needed is counted in slots: those that run a task, and as many as empty the queue within the wait that the
customer finds acceptable. Replicas that are coming up count as if they were there, so that a slow start does not call
for more and more of them. Down goes only what was not needed during the whole of DOWN_AFTER_S: the highest need within
it counts, so that a load that comes in waves does not make replicas come and go.
"""

from math import ceil
from typing import Final

import msgspec

from controlplane.spec import Scale

#: Less must have been needed for so long before there is less.
DOWN_AFTER_S: Final = 300.0
#: Share of slots in use, averaged over USE_S, from which one more is needed; and which those that are left may reach.
HIGH_USE: Final = 0.9
LOW_USE: Final = 0.7
USE_S: Final = 60.0
#: At most so many times as many at once, or 4.
FASTEST: Final = 2
FIRST_STEP: Final = 4


class Load(msgspec.Struct, frozen=True):
    """How a workspace is used now.

    `queued`, `running`: tasks. `oldest_s`: how long the first of the queue has waited. `ready`: replicas that take
    tasks. `mean_s`: average seconds of its tasks; 0: not known.
    """

    queued: int = 0
    running: int = 0
    oldest_s: float = 0.0
    ready: int = 0
    mean_s: float = 0.0


class Course(msgspec.Struct, frozen=True):
    """What must be remembered between two looks. Times are monotonic seconds.

    `use`: slots in use, averaged. `busy_s`: when there was last a task. `low_since_s`: since when less is needed than
    there is, None: it is not; `low_peak`: the most that was needed since.
    """

    now_s: float
    use: float = 0.0
    busy_s: float = 0.0
    low_since_s: float | None = None
    low_peak: int = 0


def begun(now_s: float) -> Course:
    """At first sight of a workspace."""
    return Course(now_s=now_s, busy_s=now_s)


def scaled(
    rules: Scale, concurrency: int, target: int, load: Load, course: Course, *, now_s: float
) -> tuple[int, Course, str]:
    """How many replicas from now on, `target` until now; what to remember; and why, in words (empty: no change)."""
    weight = min(1.0, (now_s - course.now_s) / USE_S)
    use = course.use + (load.running - course.use) * weight
    busy = load.queued > 0 or load.running > 0
    course = msgspec.structs.replace(course, now_s=now_s, use=use, busy_s=now_s if busy else course.busy_s)
    wanted, why = _wanted(rules, concurrency, target, load, use)
    if wanted > target:
        return wanted, msgspec.structs.replace(course, low_since_s=None, low_peak=0), why
    return _down(rules, target, wanted, course, now_s)


def _wanted(rules: Scale, concurrency: int, target: int, load: Load, use: float) -> tuple[int, str]:
    """How many there should be by the load of this moment, and why if more than `target`."""
    least, most = rules.min_replicas, rules.max_replicas
    if not load.queued and not load.running:
        return least, f"at least {least} are asked for"
    if not target:
        return max(least, 1), f"{load.queued} waiting, and no replica"
    # So many slots empty the queue in time; a task alone fills one.
    waiting = load.queued * load.mean_s / rules.queue_wait_s if load.mean_s else 0.0
    slots = load.running + min(float(load.queued), waiting)
    # Some of the need is use that comes and goes.
    needed = max(least, 1, ceil(slots / concurrency), ceil(use / (concurrency * LOW_USE)) if use else 0)
    fastest = max(FIRST_STEP, target * FASTEST)
    wait_s = load.queued * load.mean_s / (target * concurrency)
    all_ready = load.ready >= target
    if wait_s > rules.queue_wait_s or (all_ready and load.oldest_s > rules.queue_wait_s):
        more = min(most, fastest, max(target + 1, needed))
        return max(more, least), f"{load.queued} waiting, {max(wait_s, load.oldest_s):.0f} s to wait"
    if all_ready and use > HIGH_USE * target * concurrency:
        more = max(least, min(most, target + 1))
        return more, f"{use / (target * concurrency):.0%} of its slots are in use"
    return max(least, min(needed, most, target)), f"at least {least} are asked for"


def _down(rules: Scale, target: int, wanted: int, course: Course, now_s: float) -> tuple[int, Course, str]:
    """Fewer, if fewer were needed for long enough; none only after the idle time."""
    if target > rules.max_replicas:
        return rules.max_replicas, course, f"at most {rules.max_replicas} are asked for"
    idle_s = now_s - course.busy_s
    if not rules.min_replicas and target and idle_s >= rules.idle_time_s:
        fresh = msgspec.structs.replace(course, low_since_s=None, low_peak=0)
        return 0, fresh, f"it was idle for {idle_s / 60:.0f} min"
    # The last one stays until then.
    wanted = max(wanted, 1, rules.min_replicas)
    if wanted >= target:
        return target, msgspec.structs.replace(course, low_since_s=None, low_peak=0), ""
    since_s = now_s if course.low_since_s is None else course.low_since_s
    peak = max(wanted, course.low_peak)
    if now_s - since_s < DOWN_AFTER_S:
        return target, msgspec.structs.replace(course, low_since_s=since_s, low_peak=peak), ""
    fresh = msgspec.structs.replace(course, low_since_s=None, low_peak=0)
    return peak, fresh, f"no more than {peak} were needed for {DOWN_AFTER_S / 60:.0f} min"
