"""One heap: every item gets its attention in time, and those that want none any more cost nothing for long."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from controlplane.timers import SMALL, Timers


class Item:
    def __init__(self, at: float) -> None:
        self.at = at
        self.timer = inf

    def due(self) -> float:
        return self.at


def test_items_come_when_they_are_due_and_not_before() -> None:
    timers: Timers[Item] = Timers()
    late, early = Item(20.0), Item(10.0)
    assert timers.set(late)
    assert timers.set(early)
    assert timers.next() == 10.0
    assert timers.pop(9.9) is None
    assert timers.pop(10.0) is early
    assert timers.pop(10.0) is None
    assert timers.next() == 20.0


def test_item_that_is_put_off_comes_later_without_being_told_so() -> None:
    timers: Timers[Item] = Timers()
    item = Item(10.0)
    timers.set(item)
    item.at = 15.0
    assert timers.pop(10.0) is None
    assert timers.next() == 15.0
    assert timers.pop(15.0) is item


def test_item_that_is_brought_forward_comes_once() -> None:
    timers: Timers[Item] = Timers()
    item = Item(10.0)
    timers.set(item)
    item.at = 5.0
    assert timers.set(item)
    assert timers.pop(5.0) is item
    item.at = inf
    timers.set(item)
    assert timers.pop(100.0) is None


def test_heap_does_not_grow_with_items_that_are_over() -> None:
    timers: Timers[Item] = Timers()
    living = [Item(1e6) for _ in range(10)]
    for item in living:
        timers.set(item)
    for _ in range(20 * SMALL):
        item = Item(1e6)
        timers.set(item)
        item.at = inf
    assert len(timers) <= SMALL + 1
    assert sum(1 for _ in iter(lambda: timers.pop(1e6), None)) == len(living)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50) | st.just(inf), st.integers(0, 3))))
def test_whoever_is_due_comes(steps: list[tuple[int, float, int]]) -> None:
    timers: Timers[Item] = Timers()
    items = [Item(inf) for _ in range(5)]
    now = 0.0
    for index, at, passed in steps:
        items[index].at = max(at, now)
        timers.set(items[index])
        now += passed
        while (item := timers.pop(now)) is not None:
            assert item.at <= now
            item.at = inf
            timers.set(item)
        assert all(item.at > now for item in items)
        assert timers.next() <= min(item.at for item in items)
