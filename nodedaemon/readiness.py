"""Is a container ready? One look at its port, in words."""

import asyncio
import contextlib
import os
import re
import urllib.parse

from nodedaemon.engine import Address, Readiness

#: One look takes no longer than this.
LOOK_S = 5.0
#: A port published by Docker's proxy accepts even when nobody listens behind it, and closes at once: how long to
#: watch for that.
CLOSED_AT_ONCE_S = 0.02


async def probe(readiness: Readiness, address: Address) -> str:
    """What is missing until it is ready; "" : it is ready. Never raises for what the container does."""
    port = readiness.port
    try:
        async with asyncio.timeout(LOOK_S):
            reader, writer = await asyncio.open_connection(*address, limit=64 * 1024)
            try:
                if readiness.path:
                    return await _get(readiness, address, reader, writer)
                return await _open(port, address, reader)
            finally:
                # A close with an answer unread resets the connection; nobody waits for it.
                writer.transport.abort()
    except TimeoutError:
        return f"port {port} does not answer within {LOOK_S:.0f} s"
    except OSError as error:
        return f"port {port}: {os.strerror(error.errno).lower() if error.errno else error}"


async def _open(port: int, address: Address, reader: asyncio.StreamReader) -> str:
    if not address[0].startswith("127."):
        return ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSED_AT_ONCE_S):
            if not await reader.read(1):
                return f"port {port} closes at once"
    return ""


async def _get(
    readiness: Readiness, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> str:
    target = urllib.parse.quote(readiness.path, safe="/?&=%:@!$'()*+,;~-._")
    writer.write(
        f"GET {target} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
        "User-Agent: ngpu-node\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode()
    )
    what = f"GET {readiness.path} on port {readiness.port}"
    try:
        line = await reader.readuntil(b"\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        line = b""
    answer = re.match(rb"HTTP/1\.[01] (\d{3})\b", line)
    if not answer:
        return f"{what} is not answered in HTTP"
    status = int(answer[1])
    return "" if status < 500 else f"{what} is answered with status {status}"
