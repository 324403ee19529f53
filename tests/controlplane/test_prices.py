"""Money is exact, and what was has its price for good."""

from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.model import Price
from controlplane.prices import COST_NANOS, PRICE_NANOS, Prices, amount_text, cost_of, nanos_of

NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)
RTX_4090 = "NVIDIA GeForce RTX 4090"


def price(words: str, nanos: int, at: datetime = NOW) -> Price:
    return Price(gpu_model=words, effective_time=at, nanos=nanos)


@given(st.integers(0, 10**18 - 1))
def test_an_amount_is_read_as_it_was_written(nanos: int) -> None:
    assert nanos_of(amount_text(nanos)) == nanos


@pytest.mark.parametrize(
    ("text", "nanos"), [("0", 0), ("1", 10**9), ("0.000125", 125_000), ("12.5", 12_500_000_000), ("0.000000001", 1)]
)
def test_amounts_are_decimals(text: str, nanos: int) -> None:
    assert nanos_of(text) == nanos


@pytest.mark.parametrize("text", ["", "-1", "1e3", ".5", "1.", "0.0000000001", "1,5", "1 000", "NaN", "١"])
def test_what_is_no_amount_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"0\.000125"):
        nanos_of(text)


@given(st.integers(0, 10**12), st.integers(0, PRICE_NANOS))
def test_a_cost_is_the_exact_product_rounded_once(gpu_us: int, price_nanos: int) -> None:
    exact = Decimal(gpu_us) * Decimal(price_nanos) / Decimal(1_000_000)
    assert cost_of(gpu_us, price_nanos) == min(int(exact.quantize(Decimal(1), ROUND_HALF_EVEN)), COST_NANOS)


def test_the_price_with_the_most_words_that_fit_holds() -> None:
    prices = Prices([price("", 1), price("4090", 2), price("RTX 4090", 3), price("H100", 4)])
    assert prices.nanos(RTX_4090, NOW) == 3
    assert prices.nanos("NVIDIA H100 80GB HBM3", NOW) == 4
    assert prices.nanos("Some other card", NOW) == 1
    assert Prices().nanos(RTX_4090, NOW) == 0


def test_a_price_holds_from_its_time_on_and_changes_nothing_before() -> None:
    prices = Prices([price("4090", 2)])
    assert prices.nanos(RTX_4090, NOW - DAY) == 0
    prices.add(price("4090", 5, NOW + DAY))
    assert [prices.nanos(RTX_4090, at) for at in (NOW, NOW + DAY - timedelta.resolution, NOW + DAY)] == [2, 2, 5]


def test_a_narrower_price_to_come_leaves_the_wider_one_until_then() -> None:
    prices = Prices([price("4090", 2), price("RTX 4090", 9, NOW + DAY)])
    assert [prices.nanos(RTX_4090, at) for at in (NOW, NOW + DAY)] == [2, 9]


def test_a_price_set_again_for_the_same_time_replaces_the_first() -> None:
    prices = Prices([price("4090", 2)])
    assert prices.nanos(RTX_4090, NOW) == 2
    prices.add(price("4090", 7))
    assert (prices.nanos(RTX_4090, NOW), len(prices)) == (7, 1)
