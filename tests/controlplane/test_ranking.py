"""A ranking keeps its order whatever is accepted, refused and forgotten, and whatever the prices become."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from controlplane.ranking import Models, Ranking

SLOTS = st.integers(0, 9)
COSTS = st.integers(-9, 9).map(lambda tenths: tenths / 10)
KINDS: tuple[Models, ...] = ((), ("T4",), ("A100", "A100"))
PRICES = {(): 0.0, ("T4",): 0.3, ("A100", "A100"): -0.2}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), SLOTS, COSTS, st.sampled_from(KINDS)),
        st.tuples(st.just("refuse"), SLOTS, st.sampled_from(("too small", "draining"))),
        st.tuples(st.just("forget"), SLOTS),
    )
)


@given(STEPS)
def test_one_slot_has_one_verdict_the_last(steps: list[Any]) -> None:
    ranking, last = Ranking(), dict[int, Any]()
    for step in steps:
        match step:
            case "accept", slot, cost, models:
                ranking.accept(slot, f"0x{slot}", cost, models)
            case "refuse", slot, why:
                ranking.refuse(slot, why)
            case _, slot:
                ranking.forget(slot)
        last[slot] = step
    accepted = {slot: step for slot, step in last.items() if step[0] == "accept"}
    refused = {slot: step[2] for slot, step in last.items() if step[0] == "refuse"}
    rows = [(round(cost + PRICES[models], 6), f"0x{slot}", slot) for _, slot, cost, models in accepted.values()]
    assert list(ranking.cheapest(PRICES.__getitem__)) == sorted(rows)
    assert dict(ranking.refused()) == refused
    assert ranking.refusals() == {why: list(refused.values()).count(why) for why in set(refused.values())}
    for slot in range(12):
        assert ranking.cost(slot, PRICES.__getitem__) == next((row[0] for row in rows if row[2] == slot), None)
        assert ranking.refusal(slot) == refused.get(slot, "")


def test_a_price_orders_groups_and_not_what_is_in_them() -> None:
    ranking = Ranking()
    ranking.accept(0, "0xb", 0.1, ("T4",))
    ranking.accept(1, "0xa", 0.1, ("T4",))
    ranking.accept(2, "0xc", 0.2, ("A100",))
    prices: dict[Models, float] = {("T4",): 0.0, ("A100",): 0.0}
    assert [slot for _, _, slot in ranking.cheapest(prices.__getitem__)] == [1, 0, 2]
    prices["T4",] = 0.5
    assert [slot for _, _, slot in ranking.cheapest(prices.__getitem__)] == [2, 1, 0]


def test_many_are_refused_at_once() -> None:
    ranking = Ranking()
    ranking.refuse_all([3, 1], "draining")
    ranking.accept(1, "0xa", 0.1, ())
    assert dict(ranking.refused()) == {3: "draining"}
    assert ranking.refusals() == {"draining": 1}
