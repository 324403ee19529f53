"""Of several addresses the one that answers is found, however the others do not."""

import socket

import grpc
from ngpu import dial, wire

#: Nothing listens there.
CLOSED = "127.0.0.1:1"


def channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=wire.BULK_CLIENT_OPTIONS)


async def test_the_one_that_answers_is_found_beside_a_closed_port_and_one_that_stands_still() -> None:
    server = grpc.aio.server()
    answers = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    # Accepts, and says nothing: as a stopped process does.
    with socket.create_server(("127.0.0.1", 0)) as still:
        addresses = f"{CLOSED}, 127.0.0.1:{still.getsockname()[1]},{answers}"
        found = await dial.reach(dial.split(addresses), channel)
    assert found is not None
    assert found[0] == answers
    assert found[1].get_state() is grpc.ChannelConnectivity.READY
    await found[1].close()
    await server.stop(None)


async def test_none_is_found_where_none_answers() -> None:
    assert await dial.reach([CLOSED, "127.0.0.1:2"], channel, limit_s=0.05) is None
