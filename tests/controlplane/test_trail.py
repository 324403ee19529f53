"""What several reports of a replica make together."""

import pytest

from controlplane.report import ReplicaReport, ReplicaState
from controlplane.trail import FAILED_FOR_S, FAILURES, HEALTHY_S, STALLED_S, Trail, failure, follow, stall

PULLING, STARTING, READY, BACKOFF = (
    ReplicaState.PULLING,
    ReplicaState.STARTING,
    ReplicaState.READY,
    ReplicaState.BACKOFF,
)
LIMIT_S = 100.0

#: After so many seconds this state, with this progress or these words.
Step = tuple[float, ReplicaState, int | str]


def walked(*steps: Step) -> tuple[Trail, float]:
    trail, now_s = None, 0.0
    for after_s, state, more in steps:
        now_s += after_s
        said = ReplicaReport("r", state, message=more) if isinstance(more, str) else ReplicaReport("r", state, more)
        trail = follow(trail, said, now_s)
    assert trail is not None
    return trail, now_s


CRASH: list[Step] = [(1, STARTING, 90), (1, BACKOFF, "next start after 8 s: exited with 1")]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        pytest.param([(1, READY, 100)], "", id="ready"),
        pytest.param(CRASH * (FAILURES - 1), "", id="a few failures"),
        pytest.param(CRASH * FAILURES, "it failed 4 times, the last time: exited with 1", id="a crash loop"),
        pytest.param([*CRASH * FAILURES, (1, STARTING, 90)], "it failed 4 times", id="between two crashes"),
        pytest.param([*CRASH * FAILURES, (1, READY, 100)], "", id="it came up after all"),
        pytest.param(
            [*CRASH * 3, (1, READY, 100), (HEALTHY_S, READY, 100), *CRASH], "", id="what was well counts anew"
        ),
        pytest.param([*CRASH * 3, (1, READY, 100), *CRASH], "it failed 4 times", id="ready for a moment is not well"),
        pytest.param(
            [(1, BACKOFF, "no such image"), (FAILED_FOR_S, BACKOFF, "no such image")],
            "it has failed for 5 min: no such image",
            id="a long failure",
        ),
        pytest.param([(1, BACKOFF, "a"), (FAILED_FOR_S - 1, BACKOFF, "b")], "", id="the same failure is counted once"),
        pytest.param([(1, STARTING, 90), (LIMIT_S, STARTING, 90)], "not ready within 100 s", id="never ready"),
        pytest.param([(1, STARTING, 90), (LIMIT_S - 1, STARTING, 90)], "", id="not yet"),
        pytest.param([(1, PULLING, 3), (10 * LIMIT_S, PULLING, 3)], "", id="a pull may take long"),
    ],
)
def test_what_will_not_come_up(steps: list[Step], words: str) -> None:
    trail, now_s = walked(*steps)
    said = failure(trail, LIMIT_S, now_s)
    assert words in said
    assert bool(said) is bool(words)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([(1, PULLING, 30), (STALLED_S, PULLING, 30)], "no progress for 2 min"),
        ([(1, PULLING, 30), (STALLED_S, PULLING, 31)], ""),
        ([(1, PULLING, 30), (STALLED_S - 1, PULLING, 30)], ""),
        ([(1, STARTING, 90), (STALLED_S, STARTING, 90)], ""),
    ],
)
def test_a_pull_that_stalls_is_told(steps: list[Step], words: str) -> None:
    assert stall(*walked(*steps)) == words


def test_of_what_nobody_spoke_nothing_is_said() -> None:
    assert failure(None, LIMIT_S, 1e9) == ""
    assert stall(None, 1e9) == ""
