"""How a replica has fared over several reports: how often it failed, since when it stands where it does. Pure.

A report says only what is now. What is made of several of them is in a Trail, explicitly; after a restart of ours
trails begin anew, which makes us wait a little longer and nothing else.
"""

import re
from typing import Final

import msgspec

from controlplane.report import ReplicaReport, ReplicaState

#: A replica that failed so often, or whose failure is so old, does not come up by itself. The node tries again after
#: 1, 2, 4, 8 s and so on.
FAILURES: Final = 4
FAILED_FOR_S: Final = 300.0
#: Ready for so long, it is well again, whatever was before.
HEALTHY_S: Final = 60.0
#: A pull without progress for so long is worth a word.
STALLED_S: Final = 120.0
#: Of a failure's words.
WORDS: Final = 300

#: Said by the node before why it failed; changes each time.
_PAUSE: Final = re.compile(r"^next start after \d+ s: ")


class Trail(msgspec.Struct, frozen=True):
    """Times are monotonic seconds; None: not so. `since_s`: of this state and progress. `started_s`: since when its
    container is up without ever having been ready. `failed_s`: of the first of `failures`, the last being `why`.
    """

    state: ReplicaState
    progress: int
    since_s: float
    started_s: float | None = None
    failed_s: float | None = None
    failures: int = 0
    why: str = ""


def follow(before: Trail | None, said: ReplicaReport, now_s: float) -> Trail:
    """The trail with one more report."""
    if before is None:
        before = Trail(ReplicaState.ASSIGNED, 0, now_s)
    moved = (said.state, said.progress) != (before.state, before.progress)
    trail = msgspec.structs.replace(
        before, state=said.state, progress=said.progress, since_s=now_s if moved else before.since_s
    )
    if said.state is ReplicaState.BACKOFF:
        failures = trail.failures + (before.state is not ReplicaState.BACKOFF)
        failed_s = now_s if trail.failed_s is None else trail.failed_s
        return msgspec.structs.replace(trail, failures=failures, failed_s=failed_s, why=_words(said.message))
    if said.state is ReplicaState.STARTING and trail.started_s is None:
        return msgspec.structs.replace(trail, started_s=now_s)
    if said.state is ReplicaState.READY and now_s - trail.since_s >= HEALTHY_S:
        return msgspec.structs.replace(trail, started_s=None, failed_s=None, failures=0, why="")
    return trail


def failure(trail: Trail | None, start_limit_s: float, now_s: float) -> str:
    """Why the replica will not come up by itself, in words; empty: it is ready, or may become so."""
    if trail is None or trail.state is ReplicaState.READY:
        return ""
    if trail.failures >= FAILURES:
        return f"it failed {trail.failures} times, the last time: {trail.why}"
    if trail.failed_s is not None and now_s - trail.failed_s >= FAILED_FOR_S:
        return f"it has failed for {(now_s - trail.failed_s) / 60:.0f} min: {trail.why}"
    if trail.started_s is not None and now_s - trail.started_s >= start_limit_s:
        return f"it was not ready within {start_limit_s:g} s" + (f": {trail.why}" if trail.why else "")
    return ""


def stall(trail: Trail | None, now_s: float) -> str:
    """That its pull makes no progress, in words; empty: it does, or there is none."""
    if trail is None or trail.state is not ReplicaState.PULLING or now_s - trail.since_s < STALLED_S:
        return ""
    return f"no progress for {(now_s - trail.since_s) // 60:.0f} min"


def _words(message: str) -> str:
    return _PAUSE.sub("", message)[:WORDS]
