"""Deadlines: each is heeded once, in its time, unless it was removed."""

import asyncio

from nodedaemon.deadlines import Deadlines


async def test_each_is_called_in_order_and_removed_ones_are_not() -> None:
    deadlines, called, over = Deadlines(), list[str](), asyncio.Event()
    deadlines.set("last", 0.05, lambda _: over.set())
    deadlines.set("b", 0.03, called.append)
    deadlines.set("never", 0.01, called.append)
    deadlines.set("a", 0.02, called.append)
    deadlines.remove("never")
    deadlines.remove("unknown")
    await over.wait()
    assert called == ["a", "b"]


async def test_a_key_that_is_set_again_is_called_once() -> None:
    deadlines, called, over = Deadlines(), list[int](), asyncio.Event()
    deadlines.set("k", 0.01, lambda _: called.append(1))
    deadlines.set("k", 0.02, lambda _: called.append(2))
    deadlines.set("last", 0.04, lambda _: over.set())
    await over.wait()
    assert called == [2]


async def test_one_that_is_called_may_set_others() -> None:
    deadlines, over = Deadlines(), asyncio.Event()
    deadlines.set("first", 0.0, lambda _: deadlines.set("second", 0.0, lambda _: over.set()))
    await over.wait()
