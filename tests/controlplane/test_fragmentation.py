"""F is what its definition says, whatever the tables remember; and the cases by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import fragmentation
from controlplane.cards import model_matches
from controlplane.demand import Shape
from controlplane.fragmentation import Fragmentation, Lot

LOTS = st.lists(
    st.tuples(st.sampled_from(("T4", "A100")), st.sampled_from((16, 80)), st.sampled_from((0, 300, 500, 1000))),
    max_size=4,
)
SHAPES = st.one_of(
    st.builds(
        Shape,
        model=st.sampled_from(("", "T4")),
        count=st.integers(1, 3),
        min_memory_bytes=st.sampled_from((0, 40)),
        cpus=st.sampled_from((0.0, 2.0, 4.0)),
    ),
    st.builds(Shape, count=st.just(1), share=st.sampled_from((200, 500)), cpus=st.sampled_from((0.5, 2.0))),
)
HISTOGRAMS = st.dictionaries(SHAPES, st.integers(1, 5).map(float), min_size=1, max_size=4)


def by_definition(histogram: dict[Shape, float], lots: list[Lot], cpus: float) -> float:
    total = 0.0
    for shape, weight in histogram.items():
        share = shape.share or 1000
        useful = [
            free
            for model, memory, free in lots
            if free >= share and memory * share >= shape.min_memory_bytes * 1000 and model_matches(shape.model, model)
        ]
        fits = len(useful) >= shape.count and cpus >= shape.cpus
        total += weight * (sum(free for _, _, free in lots) - (sum(useful) if fits else 0)) / 1000
    return total


@given(HISTOGRAMS, st.lists(st.tuples(LOTS, st.sampled_from((0.0, 0.5, 3.0, 64.0))), min_size=1, max_size=8))
def test_it_is_what_its_definition_says(histogram: dict[Shape, float], nodes: list[tuple[list[Lot], float]]) -> None:
    measure = Fragmentation(histogram, model_matches)
    for lots, cpus in nodes:
        assert measure.of(tuple(sorted(lots)), cpus) == pytest.approx(by_definition(histogram, lots, cpus), abs=1e-9)


@pytest.mark.parametrize(
    ("lots", "cpus", "useless"),
    [
        ([], 8, 0.0),
        ([1000, 1000], 8, 0.0),
        # Half a GPU is of no use to pairs, nor is one that is left alone.
        ([500, 1000, 1000], 8, 0.5),
        ([1000], 8, 1.0),
        # Without cores for a pair nothing is of use.
        ([1000, 1000], 3, 2.0),
    ],
)
def test_for_pairs_that_need_four_cores(lots: list[int], cpus: float, useless: float) -> None:
    measure = Fragmentation({Shape(count=2, cpus=4): 1.0}, model_matches)
    assert measure.of(tuple(("T4", 16, free) for free in sorted(lots)), cpus) == useless


def test_its_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragmentation, "ROWS", 4)
    measure = Fragmentation({Shape(count=1, share=500): 1.0, Shape(count=2): 1.0}, model_matches)
    for free in range(0, 1000, 50):
        assert measure.of((("T4", 16, free),), 8) == pytest.approx((2 * free - free * (free >= 500)) / 1000)
    assert all(len(table) <= 4 for table in (measure._known, measure._usable_lots, measure._usable_wholes))
