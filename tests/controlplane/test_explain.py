"""Decisions are bounded, survive a row, and read as sentences."""

from datetime import UTC, datetime

import pytest

from controlplane import explain
from controlplane.explain import Candidate, Decision, decide

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)


def accepted(*costs: float) -> list[Candidate]:
    return [Candidate(f"n{i}", f"name{i}", parts={"load": cost}, cost=cost) for i, cost in enumerate(costs)]


def refused(count: int, reason: str = "draining") -> list[Candidate]:
    return [Candidate(f"r{i}", refusal=reason) for i in range(count)]


def test_the_cheapest_is_chosen_and_ties_go_by_id() -> None:
    assert decide(NOW, "replica r-1", accepted(0.3, 0.1, 0.2), []).chosen == "n1"
    assert decide(NOW, "replica r-1", reversed(accepted(0.1, 0.1)), []).chosen == "n0"
    assert decide(NOW, "replica r-1", [], refused(2)).chosen == ""


def test_candidates_are_bounded_and_all_refused_are_counted() -> None:
    decision = decide(NOW, "replica r-1", accepted(*range(500)), [*refused(150), *refused(7, "cordoned")])
    kept = [candidate for candidate in decision.candidates if candidate.refusal]
    assert len(kept) == explain.REFUSED_KEPT
    assert len(decision.candidates) == explain.REFUSED_KEPT + explain.ACCEPTED_KEPT
    assert decision.refusals == {"draining": 150, "cordoned": 7}


def test_a_decision_survives_its_row() -> None:
    decision = decide(NOW, "replica r-1", accepted(0.1, 0.2), refused(3))
    assert explain.decode(explain.encode(decision)) == decision


@pytest.mark.parametrize("row", [None, b"", b"{", b"[]", b'{"time": 1}'])
def test_a_row_without_a_readable_decision_is_none(row: bytes | None) -> None:
    assert explain.decode(row) is None


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (decide(NOW, "replica r-1", accepted(0.1), []), "Replica r-1: name0, the only one that will do."),
        (
            decide(NOW, "replica r-1", accepted(0.1, 0.25), refused(2)),
            "Replica r-1: name0, the cheapest of 2 (0.100 against 0.250 for name1); refused: 2 draining.",
        ),
        (
            decide(NOW, "replica of demo", [], [*refused(1), *refused(3, "no GPU of model 4090")]),
            "Replica of demo: none of 4 will do: 3 no GPU of model 4090, 1 draining.",
        ),
        (Decision(NOW, "replica of demo"), "Replica of demo: there is no candidate at all."),
    ],
)
def test_a_decision_is_a_sentence(decision: Decision, words: str) -> None:
    assert explain.summary(decision) == words
