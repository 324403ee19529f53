"""A future that calls whoever waits within `set_result`, and is one to everybody else."""

import asyncio
from typing import Any

import pytest

from controlplane.futures import DirectFuture


def a_future() -> DirectFuture[str]:
    return DirectFuture(loop=asyncio.get_running_loop())


async def test_first_callback_is_called_at_once_and_others_a_round_later() -> None:
    future, heard = a_future(), list[str]()
    future.add_done_callback(lambda done: heard.append(f"first {done.result()}"))
    future.add_done_callback(lambda done: heard.append(f"second {done.result()}"))
    future.set_result("x")
    assert heard == ["first x"]
    await asyncio.sleep(0)
    assert heard == ["first x", "second x"]


async def test_error_is_told_at_once_too() -> None:
    future, heard = a_future(), list[BaseException | None]()
    future.add_done_callback(lambda done: heard.append(done.exception()))
    error = ValueError("x")
    future.set_exception(error)
    assert heard == [error]


async def test_callback_after_the_end_comes_a_round_later() -> None:
    future, heard = a_future(), list[str]()
    future.set_result("x")
    future.add_done_callback(lambda done: heard.append(done.result()))
    assert not heard
    await asyncio.sleep(0)
    assert heard == ["x"]


async def test_cancelling_does_not_call_back_within_whatever_cancels() -> None:
    future, heard = a_future(), list[bool]()
    future.add_done_callback(lambda done: heard.append(done.cancelled()))
    assert future.cancel()
    assert not heard
    await asyncio.sleep(0)
    assert heard == [True]


async def test_callback_that_was_taken_back_is_not_called() -> None:
    future, heard = a_future(), list[str]()

    def hear(done: asyncio.Future[str]) -> None:
        heard.append(done.result())

    future.add_done_callback(hear)
    assert future.remove_done_callback(hear) == 1
    assert future.remove_done_callback(hear) == 0
    future.set_result("x")
    await asyncio.sleep(0)
    assert not heard


async def test_it_can_be_awaited_gathered_and_shielded() -> None:
    one, two, three = a_future(), a_future(), a_future()

    async def wait() -> str:
        return await one

    awaited = asyncio.create_task(wait(), name="wait")
    gathered, shielded = asyncio.gather(two), asyncio.shield(three)
    await asyncio.sleep(0)
    for future in (one, two, three):
        future.set_result("x")
    async with asyncio.timeout(5):
        assert [await awaited, *await gathered, await shielded] == ["x", "x", "x"]


async def test_error_of_a_callback_is_the_loops_business_and_not_whose_who_sets_the_result() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    future = a_future()

    def fail(_: asyncio.Future[str]) -> None:
        raise ValueError("of the callback")

    future.add_done_callback(fail)
    future.set_result("x")
    assert await future == "x"
    with pytest.raises(ValueError, match="of the callback"):
        raise told[0]["exception"]
