"""Which replicas are not trusted, as tables: what ejects, what does not, and how one comes back."""

from math import inf

import pytest

from controlplane.ejection import (
    CLEAN,
    DOUBT_S,
    EJECTION_S,
    FORGET_S,
    LONGEST_EJECTION_S,
    LONGEST_PAUSE_S,
    SEEN,
    SLOW_DOUBT,
    SLOW_EJECT,
    Peers,
    Record,
    Trust,
    answered,
    ejections,
    failed,
    is_slow,
    may_eject,
    passed,
    words,
)

#: Nine others that serve, and are well.
WELL = Peers(serving=9, share=0.0, pace_s=1.0)
ALONE = Peers()

# Of one attempt: answered well, slow, with an error, not answered by the platform's or the customer's fault.
ENDS = {
    ".": {"good": True, "slow": False},
    "s": {"good": True, "slow": True},
    "5": {"good": False, "slow": False},
    "P": {"platform": True, "timed_out": False},
    "C": {"platform": False, "timed_out": False},
    "T": {"platform": False, "timed_out": True},
}


def after(ends: str, peers: Peers = WELL, record: Record = CLEAN, *, now: float = 0.0, every_s: float = 1.0) -> Record:
    """The record after these, one a second, each begun when the one before had ended."""
    for end in ends:
        given_at, now = now, now + every_s
        record = passed(record, now)
        if end in ".s5":
            record = answered(record, peers=peers, now=now, **ENDS[end])
        else:
            record = failed(record, "It broke.", given_at=given_at, peers=peers, now=now, **ENDS[end])
    return record


@pytest.mark.parametrize(
    ("ends", "trust"),
    [
        ("....", Trust.FULL),
        ("P", Trust.DOUBTED),
        ("PP", Trust.DOUBTED),
        ("PPP", Trust.EJECTED),
        ("PP.P", Trust.DOUBTED),
        ("PP.", Trust.FULL),
        # What the customer's side causes is no platform error, and neither ends a row nor makes one ...
        ("PCPP", Trust.EJECTED),
        ("CC", Trust.FULL),
        # ... but if only this one of many fails so, it is the node.
        ("CCCC", Trust.EJECTED),
        ("5555", Trust.EJECTED),
        (".5.5", Trust.FULL),
        ("55.5.5", Trust.EJECTED),
        ("5..." * 9, Trust.FULL),
        ("5.." * 9, Trust.EJECTED),
        # Slowness must last.
        ("s" * (SLOW_DOUBT - 1), Trust.FULL),
        ("s" * SLOW_DOUBT, Trust.DOUBTED),
        ("s" * (SLOW_EJECT - 1) + "." + "s" * (SLOW_DOUBT - 1), Trust.FULL),
        ("s" * SLOW_EJECT, Trust.EJECTED),
        ("T", Trust.DOUBTED),
        ("TT", Trust.EJECTED),
    ],
)
def test_what_ejects_among_peers_that_are_well(ends: str, trust: Trust) -> None:
    assert after(ends).trust is trust


@pytest.mark.parametrize(
    ("ends", "peers", "trust"),
    [
        # All answer with errors: it is the image, or what it is asked.
        ("5" * 20, Peers(serving=9, share=0.9, pace_s=1.0), Trust.FULL),
        ("C" * 20, Peers(serving=9, share=0.4, pace_s=1.0), Trust.FULL),
        ("5" * 20, Peers(serving=9, share=0.2, pace_s=1.0), Trust.EJECTED),
        # Nobody has shown lately that others do better: they are given the chance, no more.
        ("5" * 20, Peers(serving=9), Trust.DOUBTED),
        # A tenth are out already, at least one.
        ("PPP", Peers(serving=8, ejected=1, share=0.0), Trust.PAUSED),
        ("5555", Peers(serving=8, ejected=1, share=0.0), Trust.DOUBTED),
        ("s" * SLOW_EJECT, Peers(serving=8, ejected=1, share=0.0), Trust.DOUBTED),
        ("PPP", Peers(serving=18, ejected=1, share=0.0), Trust.EJECTED),
        # Of two, one may go, never the other.
        ("PPP", Peers(serving=1, share=0.0), Trust.EJECTED),
        ("PPP", Peers(serving=0, ejected=1), Trust.PAUSED),
        ("PPP", ALONE, Trust.PAUSED),
        ("5" * 20, ALONE, Trust.DOUBTED),
    ],
)
def test_what_the_peers_have_to_do_with_it(ends: str, peers: Peers, trust: Trust) -> None:
    assert after(ends, peers).trust is trust


@pytest.mark.parametrize(
    ("serving", "ejected", "may"),
    [(0, 0, False), (0, 1, False), (1, 0, True), (9, 0, True), (8, 1, False), (18, 1, True), (17, 2, False)],
)
def test_at_most_a_tenth_and_never_the_last(serving: int, ejected: int, may: bool) -> None:
    assert may_eject(Peers(serving=serving, ejected=ejected)) is may


def test_what_fails_together_counts_once() -> None:
    record = CLEAN
    for _ in range(16):
        record = failed(record, "It died.", platform=True, timed_out=False, given_at=0.0, peers=WELL, now=5.0)
    assert (record.trust, record.row) == (Trust.DOUBTED, 1)


def test_doubt_ends_with_time_but_the_row_goes_on() -> None:
    record = after("PP")
    assert passed(record, 2.0 + DOUBT_S).trust is Trust.FULL
    assert after("P", record=record, now=100.0).trust is Trust.EJECTED


def test_one_trial_task_brings_it_back() -> None:
    record = after("PPP")
    assert (record.most, record.until) == (0, 3.0 + EJECTION_S)
    assert passed(record, record.until - 0.1) is record
    trial = passed(record, record.until)
    assert (trial.trust, trial.most, trial.penalty) == (Trust.TRIAL, 1, 0)
    back = after(".", record=trial, now=40.0)
    assert (back.trust, back.most, back.row, back.share) == (Trust.FULL, None, 0, 0.0)


@pytest.mark.parametrize("end", ["P", "5", "C", "s", "T"])
def test_failed_trial_ejects_for_longer(end: str) -> None:
    trial = passed(after("PPP"), 100.0)
    again = after(end, record=trial, now=100.0)
    assert (again.trust, again.until) == (Trust.EJECTED, 101.0 + 2 * EJECTION_S)


def test_trial_that_ends_as_everybodys_tasks_do_is_passed() -> None:
    alike = Peers(serving=9, share=0.8, pace_s=1.0)
    trial = passed(after("PPP", alike), 100.0)
    assert after("5", alike, trial, now=100.0).trust is Trust.FULL


def test_ejections_grow_are_bounded_and_are_forgotten() -> None:
    record, now, lengths = CLEAN, 0.0, []
    for _ in range(12):
        record = after("PPP" if record.trust is Trust.FULL else "P", record=record, now=now)
        lengths.append(record.until - now)
        now = record.until
        record = passed(record, now)
    assert lengths[0] < lengths[1] < lengths[2]
    assert max(lengths) <= LONGEST_EJECTION_S + 3.0
    record = after(".", record=record, now=now)
    count = ejections(record, now)
    assert ejections(record, now + 3 * FORGET_S + 1.0) == count - 3
    assert after(".", record=record, now=now + 100 * FORGET_S) is CLEAN


def test_the_only_one_is_paused_and_tried_again_and_again() -> None:
    record, now, pauses = after("PPP", ALONE), 3.0, []
    for _ in range(6):
        pauses.append(record.until - now)
        now = record.until
        record = after("P", ALONE, passed(record, now), now=now, every_s=0.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert after(".", ALONE, passed(record, record.until), now=now).trust is Trust.FULL


def test_answer_of_what_was_under_way_ends_a_pause_and_no_ejection() -> None:
    paused, ejected = after("PPP", ALONE), after("PPP")
    assert answered(paused, good=True, slow=False, peers=ALONE, now=3.5).trust is Trust.FULL
    assert answered(ejected, good=True, slow=False, peers=WELL, now=3.5).trust is Trust.EJECTED


@pytest.mark.parametrize(
    ("seconds", "past_s", "seen", "pace_s", "slow"),
    [
        (5.0, 1.0, SEEN, 1.0, True),
        (4.0, 1.0, SEEN, 1.0, False),
        # Others are as slow now: the work has changed.
        (5.0, 1.0, SEEN, 4.0, False),
        # It has always been so.
        (5.0, 4.0, SEEN, 1.0, False),
        # Too little is known of it, or of the others.
        (5.0, 1.0, SEEN - 1, 1.0, False),
        (5.0, 1.0, SEEN, 0.0, False),
    ],
)
def test_slow_is_unlike_its_peers_and_unlike_itself(
    seconds: float, past_s: float, seen: int, pace_s: float, slow: bool
) -> None:
    assert is_slow(seconds, past_s, seen, Peers(serving=3, share=0.0, pace_s=pace_s)) is slow


@pytest.mark.parametrize(
    ("record", "now", "said"),
    [
        (CLEAN, 0.0, ""),
        (after("PPP"), 3.0, "ejected for 30 s after 3 failures in a row: It broke."),
        (after("P"), 1.0, "doubted for 30 s after 1 failure in a row: It broke."),
        (passed(after("PPP"), 99.0), 99.0, "on trial after 3 failures in a row: It broke."),
        (after("PPP", ALONE), 3.0, "paused for 1 s after 3 failures in a row: It broke."),
        (after("s" * SLOW_EJECT), 10.0, "ejected for 30 s since it is more than 4 times as slow as its peers"),
        (
            after("5555"),
            4.0,
            "ejected for 30 s without a good answer to 34% of its recent tasks, unlike its peers: it answers with a "
            "status of 500 or more",
        ),
    ],
)
def test_words(record: Record, now: float, said: str) -> None:
    assert words(record, now) == said


def test_trusted_record_never_changes_with_time() -> None:
    assert passed(CLEAN, 1e9) is CLEAN
    assert CLEAN.until == inf
