"""The container that a peer passes its work on to, as ours does.

CONTAINER_URL says where it is; if it is empty, the peer does the work itself. Connections are kept.
"""

# mypy: disable-error-code="import-not-found"

import http.client
import os
import threading
import urllib.parse
from typing import Any

URL = os.environ.get("CONTAINER_URL", "")
_local = threading.local()


def call(path: str, body: bytes) -> bytes:
    """What the container answers; one connection for each thread."""
    connection: http.client.HTTPConnection | None = getattr(_local, "connection", None)
    if connection is None:
        connection = _local.connection = http.client.HTTPConnection(urllib.parse.urlsplit(URL).netloc)
    connection.request("POST", path, body)
    answer = connection.getresponse()
    read = answer.read()
    if answer.status != http.HTTPStatus.OK:
        raise ConnectionError(f"the container answered {answer.status}")
    return read


class Container:
    """The same for asyncio: connections of one process, as many as are needed."""

    def __init__(self) -> None:
        self._session: Any = None

    async def call(self, path: str, body: bytes) -> bytes:
        """What the container answers."""
        if self._session is None:
            from aiohttp import ClientSession, TCPConnector  # Only some of the peers have it.

            self._session = ClientSession(connector=TCPConnector(limit=0), raise_for_status=True)
        async with self._session.post(URL + path, data=body) as answer:
            read: bytes = await answer.read()
            return read
