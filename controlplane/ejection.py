"""Which replicas are not trusted for a while, by how their attempts end: grey failures. Pure.

A replica can be up, report well and still do harm: its node answers heartbeats and refuses connections, its GPU makes
every answer an error, its disk makes all slow. One that fails at once would even look like the fastest of all and eat
the queue. So each replica (a workspace on a node) has a Record, judged by three rules:

* Errors of the platform, IN_A_ROW of them with no answer between: it is ejected, whatever the others do.
* No good answer (none at all, or a status of 500 and more) to SHARE of its recent attempts, while of its peers' the
  typical one has a third of that at most: ejected. Where all are alike the fault is the customer's, or the input's.
* Slow so many times in a row: SLOW_TIMES what is typical of its peers now, and of itself before. First it is doubted,
  then ejected. An attempt that ran into its time limit counts for several. A slow machine is not ejected for being one.

Attempts that fail together count as one failure: a container that dies takes all with it that it runs.

Ejected, it gets nothing, for EJECTION_S times the number of its ejections (which are forgotten one by one); then one
task for trial, and by what becomes of that it is back, or out again for longer. Doubted, it is taken when no other is
free, for DOUBT_S. At most a tenth of a workspace's replicas are ejected, at least one, and never the last that serves:
a bad image cannot empty the fleet. Who fails in a row and may not be ejected is paused for seconds, which double up to
LONGEST_PAUSE_S, and tried with one task after each: the only replica of a workspace is always tried again, without
burning the attempts of all that wait.

Nothing of it is on disk: a new process trusts everybody, and finds out anew within a few tasks.
"""

import enum
from math import inf
from typing import Final

import msgspec
from msgspec.structs import replace

#: Errors of the platform that eject.
IN_A_ROW: Final = 3
#: The first ejection; the n-th takes n times as long ...
EJECTION_S: Final = 30.0
#: ... up to this. One is forgotten for each such time without another.
LONGEST_EJECTION_S: Final = 300.0
FORGET_S: Final = 600.0
#: The first pause of one that may not be ejected; they double.
PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 8.0
#: How long one that has failed is taken only when no other is free.
DOUBT_S: Final = 30.0
#: Share of recent attempts without a good answer that ejects, if it is so many times the typical share of the peers.
SHARE: Final = 0.3
SHARE_TIMES: Final = 3.0
#: Weight of the newest attempt in that share: four of the last seven eject.
SHARE_WEIGHT: Final = 0.1
#: Slow is so many times what is typical of the peers, and of itself before ...
SLOW_TIMES: Final = 4.0
#: ... where itself has been seen with so many tasks. Its past is an average with this weight of the newest.
SEEN: Final = 8
PAST_WEIGHT: Final = 0.02
#: So many slow ones in a row make it doubted, and ejected; one that ran into its time limit counts as so many.
SLOW_DOUBT: Final = 5
SLOW_EJECT: Final = 10
TIMED_OUT: Final = 5
#: Of the replicas, at most one in so many is ejected at once.
ONE_IN: Final = 10
#: Of the words of a failure.
WORDS: Final = 200


class Trust(enum.IntEnum):
    """How far a replica is trusted."""

    FULL = 0
    #: Taken when no other is free.
    DOUBTED = 1
    #: Takes one task at a time, until one was answered.
    TRIAL = 2
    #: Takes nothing for seconds: it fails, and may not be ejected.
    PAUSED = 3
    #: Takes nothing.
    EJECTED = 4


class Record(msgspec.Struct, frozen=True):
    """What is remembered of a replica. Times are monotonic seconds.

    `until`: when the trust changes by itself; inf: it does not. `why`: in words. `row`: platform errors in a row;
    `failed_at`: of the last failure. `share`: of recent attempts without a good answer. `slow`: slow ones in a row.
    `ejections`: not yet forgotten at `back_at`, when it last came back.
    """

    trust: Trust = Trust.FULL
    until: float = inf
    why: str = ""
    row: int = 0
    failed_at: float = -inf
    share: float = 0.0
    slow: int = 0
    ejections: int = 0
    back_at: float = -inf

    @property
    def penalty(self) -> int:
        """For routing: how far behind the others it comes; 0: not at all, as on trial, which would never end else."""
        return 0 if self.trust in {Trust.FULL, Trust.TRIAL} else max(self.row, 1)

    @property
    def most(self) -> int | None:
        """How many tasks it may run at once; None: as many as it can."""
        if self.trust is Trust.TRIAL:
            return 1
        return 0 if self.trust >= Trust.PAUSED else None


#: Of one of which nothing bad is known.
CLEAN: Final = Record()


class Peers(msgspec.Struct, frozen=True):
    """The other replicas of the workspace that could take tasks now.

    `serving`: those not ejected; `ejected`: the others. Typical (the median) of those serving that have answered
    lately: `share` without a good answer, None if none has; and `pace_s`, average seconds of their tasks, 0 likewise.
    """

    serving: int = 0
    ejected: int = 0
    share: float | None = None
    pace_s: float = 0.0


def is_slow(seconds: float, past_s: float, seen: int, peers: Peers) -> bool:
    """Is a task that took so long out of the ordinary? `past_s`: what is usual of its replica, after `seen` tasks."""
    return seen >= SEEN and 0.0 < SLOW_TIMES * max(past_s, peers.pace_s) < seconds and peers.pace_s > 0.0


def answered(record: Record, *, good: bool, slow: bool, peers: Peers, now: float) -> Record:
    """The record after an answer of the container. `good`: its status was below 500."""
    record = replace(record, row=0, slow=record.slow + 1 if slow else 0, share=_share(record, bad=not good))
    if not (good and not slow):
        record = _judged(record, "" if good else "it answers with a status of 500 or more", peers, now)
        if record.trust is not Trust.TRIAL:
            return record
    return _well(record, now)


def failed(
    record: Record, message: str, *, platform: bool, timed_out: bool, given_at: float, peers: Peers, now: float
) -> Record:
    """The record after an attempt without an answer. `timed_out`: it ran into its time limit, while peers are quick."""
    if given_at < record.failed_at:
        # It was under way at the last failure, and has failed with that.
        return record
    record = replace(
        record,
        row=record.row + platform,
        failed_at=now,
        share=_share(record, bad=True),
        slow=record.slow + TIMED_OUT * timed_out,
    )
    return _judged(record, message, peers, now, platform=platform)


def passed(record: Record, now: float) -> Record:
    """The record now, if time alone has changed it."""
    if record.until > now:
        return record
    if record.trust is Trust.DOUBTED:
        return replace(record, trust=Trust.FULL, until=inf, why="")
    return replace(record, trust=Trust.TRIAL, until=inf)


def words(record: Record, now: float) -> str:
    """How it stands and why; empty: it is trusted."""
    if record.trust is Trust.FULL:
        return ""
    if record.trust is Trust.TRIAL:
        return f"on trial {record.why}"
    left_s = max(1, round(record.until - now))
    return f"{record.trust.name.lower()} for {left_s} s {record.why}"


def ejections(record: Record, now: float) -> int:
    """Those that are not forgotten."""
    return max(0, record.ejections - int((now - record.back_at) / FORGET_S)) if record.ejections else 0


def may_eject(peers: Peers) -> bool:
    """Would so many not be too many?"""
    allowed = max(1, (peers.serving + peers.ejected + 1) // ONE_IN)
    return peers.serving > 0 and peers.ejected < allowed


def _share(record: Record, *, bad: bool) -> float:
    share = record.share + (bad - record.share) * SHARE_WEIGHT
    return share if share >= SHARE_WEIGHT / 10 else 0.0


def _well(record: Record, now: float) -> Record:
    if record.trust is Trust.EJECTED:
        # What was under way at that time may come to its end.
        return record
    if record.trust is Trust.TRIAL:
        return Record(ejections=record.ejections, back_at=now)
    record = replace(record, trust=Trust.FULL, until=inf, why="")
    # Nothing is left to remember: so the next answers cost nothing.
    return record if record.share or ejections(record, now) else CLEAN


def _judged(record: Record, message: str, peers: Peers, now: float, *, platform: bool = False) -> Record:
    """What follows from something that was not well."""
    unlike_peers = peers.share is not None and record.share >= SHARE_TIMES * peers.share
    told = f": {message[:WORDS]}" if message else ""
    on_trial = record.trust is Trust.TRIAL
    if record.row >= IN_A_ROW or (on_trial and platform):
        why = f"after {_counted(record.row, 'failure')} in a row{told}"
        return _ejected(record, why, peers, now) or _paused(record, why, now)
    ejected = None
    if unlike_peers and (record.share >= SHARE or (on_trial and not record.slow)):
        why = f"without a good answer to {record.share:.0%} of its recent tasks, unlike its peers{told}"
        ejected = _ejected(record, why, peers, now)
    elif record.slow >= SLOW_EJECT or (on_trial and record.slow):
        ejected = _ejected(record, f"since it is more than {SLOW_TIMES:.0f} times as slow as its peers", peers, now)
    if ejected is not None:
        return ejected
    if record.trust >= Trust.TRIAL:
        return record
    if record.slow >= SLOW_DOUBT:
        why = f"since it is more than {SLOW_TIMES:.0f} times as slow as its peers"
    elif platform:
        why = f"after {_counted(record.row, 'failure')} in a row{told}"
    elif record.share >= SHARE and (unlike_peers or peers.share is None):
        # Nobody has lately shown whether others do better: they get the chance.
        why = f"without a good answer to {record.share:.0%} of its recent tasks{told}"
    else:
        return record
    return replace(record, trust=Trust.DOUBTED, until=now + DOUBT_S, why=why)


def _ejected(record: Record, why: str, peers: Peers, now: float) -> Record | None:
    """It is out; None: it may not be."""
    if record.trust is Trust.EJECTED:
        return record
    if not may_eject(peers):
        return None
    count = ejections(record, now) + 1
    until = now + min(EJECTION_S * count, LONGEST_EJECTION_S)
    return replace(record, trust=Trust.EJECTED, until=until, why=why, ejections=count, back_at=until)


def _paused(record: Record, why: str, now: float) -> Record:
    if record.trust is Trust.PAUSED:
        return record
    pause_s = min(PAUSE_S * 2.0 ** max(0, min(record.row - IN_A_ROW, 10)), LONGEST_PAUSE_S)
    return replace(record, trust=Trust.PAUSED, until=now + pause_s, why=why)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
