"""How long a task will take, and how long one that runs will still take. Pure.

Seconds are seconds per unit of work: a task's work is its size over its workspace's average (sizes.py), 1 where
nothing is known of sizes.
"""

from collections.abc import Iterable
from typing import Final, Protocol

#: Weight of the newest task in a replica's average, in what is usual of it, and in its workspace's average.
NEWEST_WEIGHT: Final = 0.2
NEWEST_WEIGHT_OF_USUAL: Final = 0.05
NEWEST_WEIGHT_OF_ALL: Final = 0.02
#: Without a task for so long (so many average tasks, but at least so many seconds) what is expected of a replica is
#: half way back to what is usual there ...
RELAX_TASKS: Final = 12.0
RELAX_S: Final = 10.0
#: ... and after so many times that, a quarter is left of how far what is usual there is from its workspace's average.
RELAX_USUAL_TIMES: Final = 50.0
#: A task counts as having taken at most so many times what was expected, ...
MOST_TIMES: Final = 8.0
#: ... the first one of a replica so many times what is usual in its workspace: it may have loaded a model.
FIRST_TIMES: Final = 4.0

#: What is left of a task is never taken for less than this share of what was expected of it as a whole ...
LEFT_SHARE: Final = 0.55
#: ... nor of the time that it has run already.
OVERDUE_SHARE: Final = 0.3
#: Of the time that a task has run, so much is taken off what was expected.
PASSED_SHARE: Final = 0.8


class Paced(Protocol):
    """A replica whose pace is kept. Seconds are for a unit of work."""

    @property
    def pace_s(self) -> float:
        """Average of its recent tasks; 0: none seen."""

    @property
    def usual_s(self) -> float:
        """The same over many more of its tasks."""

    @property
    def pace_time(self) -> float:
        """When both were last renewed, in monotonic seconds."""

    @property
    def crowding(self) -> float:
        """By how much its GPUs are more in use by others than while it had those tasks; 1: as then."""


def renewed(pace_s: float, seconds: float, weight: float) -> float:
    """The average after one more task that took `seconds`; `pace_s` 0: there is none yet."""
    return pace_s + (min(seconds, MOST_TIMES * pace_s) - pace_s) * weight if pace_s else seconds


def left_s(expected_s: float, passed_s: float) -> float:
    """How long a task still takes that was expected to take `expected_s` and runs since `passed_s` (-inf: not yet)."""
    if passed_s <= 0.0:
        return expected_s
    return max(expected_s - PASSED_SHARE * passed_s, LEFT_SHARE * expected_s, OVERDUE_SHARE * passed_s)


def paces(replicas: Iterable[Paced], mean_s: float, now: float) -> list[float]:
    """Seconds for a unit of work on each. Flat: this runs for every task, over every replica.

    `mean_s`: the workspace's average; 0 where nothing is known yet: then all are alike.
    """
    mean_s = mean_s or 1.0
    soon_s = max(RELAX_S, RELAX_TASKS * mean_s)
    late_s = soon_s * RELAX_USUAL_TIMES
    expected = []
    for replica in replicas:
        pace_s = replica.pace_s
        if pace_s:
            passed_s = now - replica.pace_time
            # Squared, which ends: one that was very slow, and so is not asked, would be not asked for days.
            usual_s = mean_s + (replica.usual_s - mean_s) * (late_s / (late_s + passed_s)) ** 2
            expected.append((usual_s + (pace_s - usual_s) * soon_s / (soon_s + passed_s)) * replica.crowding)
        else:
            expected.append(mean_s * replica.crowding)
    return expected
