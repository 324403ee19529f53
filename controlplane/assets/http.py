"""The careful way in which indexers are asked over HTTP."""

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

import aiohttp
import msgspec

from controlplane.assets.indexer import IndexerFault

#: An honest answer is a few hundred bytes; one ticker list of a collector's address a few hundred KiB.
ANSWER_BYTES: Final = 2 * 1024 * 1024
#: However long an indexer asks to be left alone, it is tried again after this.
RETRY_AFTER_S: Final = 300.0

T = TypeVar("T")


class Http:
    """GET and decode, and never more: no redirects, no answer past ANSWER_BYTES, nothing that is not of the shape."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def get(
        self,
        url: str,
        shape: type[T],
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        statuses: Sequence[int] = (200,),
    ) -> T:
        """The JSON answer as `shape`. Raises IndexerFault, also for any status not in `statuses`."""
        try:
            # A redirect would carry the key to whoever is named there.
            async with self._session.get(url, headers=headers, params=params, allow_redirects=False) as response:
                if response.status not in statuses:
                    raise IndexerFault(f"answered {response.status}", retry_after_s=_retry_after(response))
                body = await _body(response)
        except aiohttp.ClientConnectorError as error:
            raise IndexerFault(f"cannot be reached: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            # Their texts may quote the URL, and so the address.
            raise IndexerFault(f"broke off: {type(error).__name__}") from error
        try:
            return msgspec.json.decode(body, type=shape)
        except msgspec.ValidationError as error:
            raise IndexerFault(f"answered in another shape than documented: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise IndexerFault("answered something that is not JSON") from error


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > ANSWER_BYTES:
            raise IndexerFault(f"answered more than {ANSWER_BYTES} bytes")
    return bytes(body)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), RETRY_AFTER_S) if seconds.isascii() and seconds.isdecimal() else 0.0
