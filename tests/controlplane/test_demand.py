"""What is learnt of the requests that come: by how often, the newest most, and never without bound."""

import pytest

from controlplane.demand import Demand, Shape, difference

ONE, TWO, SHARE = Shape(count=1), Shape(count=2), Shape(count=1, share=300)


def test_shares_of_what_came() -> None:
    demand = Demand()
    demand.observe(ONE, 3)
    demand.observe(TWO)
    assert demand.histogram() == pytest.approx({ONE: 0.75, TWO: 0.25}, abs=1e-3)


def test_requests_without_gpus_say_nothing_of_gpus() -> None:
    demand = Demand()
    demand.observe(Shape(cpus=4.0))
    assert demand.histogram() == {}


def test_one_counts_half_after_a_half_life() -> None:
    demand = Demand(half_life=10)
    demand.observe(ONE)
    demand.observe(TWO, 10)
    demand.observe(SHARE)
    histogram = demand.histogram()
    assert histogram[ONE] / histogram[SHARE] == pytest.approx(0.5, abs=0.05)


def test_what_is_not_asked_for_any_more_is_forgotten() -> None:
    demand = Demand(half_life=10)
    demand.observe(ONE, 10)
    for _ in range(1000):
        demand.observe(TWO)
    assert demand.histogram()[TWO] == pytest.approx(1.0)


def test_the_rarest_makes_room() -> None:
    demand = Demand(shapes=2)
    demand.observe(ONE, 5)
    demand.observe(TWO)
    demand.observe(SHARE)
    assert set(demand.histogram()) == {ONE, SHARE}


def test_weights_stay_sane() -> None:
    demand = Demand(half_life=1)
    for _ in range(2000):
        demand.observe(ONE)
        demand.observe(TWO)
    histogram = demand.histogram()
    assert histogram[TWO] / histogram[ONE] == pytest.approx(2)
    assert sum(histogram.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("one", "other", "much"),
    [
        ({}, {}, 0.0),
        ({ONE: 1.0}, {}, 1.0),
        ({ONE: 1.0}, {TWO: 1.0}, 1.0),
        ({ONE: 1.0}, {ONE: 0.75, TWO: 0.25}, 0.25),
    ],
)
def test_how_much_has_changed(one: dict[Shape, float], other: dict[Shape, float], much: float) -> None:
    assert difference(one, other) == much == difference(other, one)
