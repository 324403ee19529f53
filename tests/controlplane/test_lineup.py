"""How the replicas stood, told in words."""

from datetime import UTC, datetime
from typing import Any

from controlplane.ejection import EJECTION_S, Record, Trust
from controlplane.explain import Decision
from controlplane.lineup import TOLD, Lineup, decision, line_up
from controlplane.routing import AVOID_PENALTY_S, FAILURE_PENALTY_S
from controlplane.slots import Node, Replica

NOW = datetime(2024, 4, 15, 14, 30, 9, tzinfo=UTC)
NOW_S = 1000.0


class FakeLink:
    """It leads somewhere."""

    def start(self, start: object) -> None: ...
    def cancel(self, attempt_id: str) -> None: ...
    def ack(self, attempt_id: str) -> None: ...


def replica(name: str, pace_s: float = 2.0, *, capacity: int = 1, busy: int = 0, **values: Any) -> Replica:
    node = Node(f"node-of-{name}", NOW_S)
    node.link = FakeLink() if values.pop("linked", True) else None
    made = Replica(name, "w-1", node)
    made.capacity, made.pace_s, made.pace_time = capacity, pace_s, NOW_S
    made.usual_s = pace_s
    made.in_flight = {f"a{n}": NOW_S - 1.0 for n in range(busy)}
    for key, value in values.items():
        setattr(made, key, value)
    return made


def told(lineup: Lineup, chosen: str, *, work: float = 1.0, avoid: tuple[str, ...] = ()) -> Decision:
    return decision(lineup, time=NOW, subject="attempt 1", chosen=chosen, work=work, avoid=avoid, name_of=str.upper)


def test_each_is_told_with_its_seconds_or_why_it_was_out_of_the_question() -> None:
    ejected = Record(trust=Trust.EJECTED, until=NOW_S + EJECTION_S, why="after 3 failures in a row: It broke.")
    lineup = line_up(
        [
            replica("slow", 8.0),
            replica("busy", 1.0, busy=1),
            replica("fast", 2.0),
            replica("gone", linked=False),
            replica("new", capacity=0),
            replica("out", record=ejected, most=0),
            replica("doubted", 1.0, failures=1),
            replica("failed", 1.0),
        ],
        2.0,
        NOW_S,
    )
    made = told(lineup, "fast", work=2.0, avoid=("failed",))
    chosen, *others = made.candidates
    assert (made.chosen, chosen.id, chosen.name, chosen.parts) == (
        "fast",
        "fast",
        "NODE-OF-FAST",
        {"wait": 0, "run": 4},
    )
    able = {one.id: one.parts for one in others if not one.refusal}
    assert list(able) == ["busy", "slow", "doubted", "failed"]
    assert 0 < able["busy"]["wait"] <= 1.0
    assert (able["doubted"]["doubted"], able["failed"]["failed_before"]) == (FAILURE_PENALTY_S, AVOID_PENALTY_S)
    assert made.refusals == {
        "its node is not connected": 1,
        "it takes no tasks now": 1,
        "ejected for 30 s after 3 failures in a row: It broke.": 1,
    }


def test_a_great_many_are_counted_and_not_all_told() -> None:
    many = [replica(f"r{n:03}", 1.0 + n) for n in range(50)] + [replica(f"x{n:03}", capacity=0) for n in range(50)]
    made = told(line_up(many, 2.0, NOW_S), "r030")
    assert len(made.candidates) == 2 * TOLD
    assert [one.id for one in made.candidates[:3]] == ["r030", "r000", "r001"]
    assert made.refusals == {"it takes no tasks now": 50}
