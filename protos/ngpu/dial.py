"""Several addresses of which one answers: a control plane that stands by for another does not listen.

All are dialled at once, and the first connection that stands is the one. So it does not matter which of them was
killed, stands still, or lies behind a dead line: nobody waits for those.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import grpc

#: For one of them to answer. Who goes on trying dials anew then, so that pauses between tries do not grow.
REACH_S: Final = 5.0


def split(addresses: str) -> list[str]:
    """`a:1, b:2`: each of them."""
    return [address.strip() for address in addresses.split(",")]


async def reach(
    addresses: Sequence[str], dial: Callable[[str], grpc.aio.Channel], *, limit_s: float = REACH_S
) -> tuple[str, grpc.aio.Channel] | None:
    """The first that answers, and the channel to it; None if none does in time."""
    channels = [dial(address) for address in addresses]
    waiting = [
        asyncio.create_task(channel.channel_ready(), name=f"reach {address}")
        for address, channel in zip(addresses, channels, strict=True)
    ]
    chosen: int | None = None
    try:
        await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        chosen = next((index for index, wait in enumerate(waiting) if wait.done()), None)
    finally:
        for wait in waiting:
            wait.cancel()
        await asyncio.wait(waiting)
        await asyncio.gather(*(channel.close() for index, channel in enumerate(channels) if index != chosen))
    return None if chosen is None else (addresses[chosen], channels[chosen])
