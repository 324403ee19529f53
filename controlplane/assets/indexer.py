"""What is asked of an indexer, and the careful way in which all of them are asked over HTTP."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Final, Protocol, TypeVar

import aiohttp
import msgspec

#: An honest answer is a few hundred bytes; one ticker list of a collector's address a few hundred KiB.
ANSWER_BYTES: Final = 2 * 1024 * 1024
#: Of a list that comes in pages, at most so many are asked for.
PAGES: Final = 20
#: However long an indexer asks to be left alone, it is tried again after this.
RETRY_AFTER_S: Final = 300.0

# BestInSlot writes zero with 36 decimals; nobody writes more than 40 digits on either side.
_AMOUNT: Final = re.compile(r"[0-9]{1,40}(\.[0-9]{1,40})?", re.ASCII)

T = TypeVar("T")


class IndexerFault(Exception):
    """The indexer gave no answer that can be believed; the message is for the log, without address or key."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Indexer(Protocol):
    """A source of balances."""

    #: As in the settings, for the log.
    kind: str
    #: Answers cost nothing and may change any moment: nothing is remembered of them.
    is_local: bool

    async def balances(self, address: str, tickers: Sequence[str]) -> Mapping[str, Decimal]:
        """What the address holds of each of `tickers`, in token units, zero too: available and transferable together.

        Raises IndexerFault. The caller sets the time limit.
        """


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


def amount(text: str) -> Decimal:
    """A balance as indexers write it. Raises IndexerFault: what cannot be read is not zero."""
    if not _AMOUNT.fullmatch(text):
        raise IndexerFault(f"answered a balance that is no decimal number: {text[:50]!r}")
    return Decimal(text)


def overall(total: str | None, available: str | None, transferable: str | None = None) -> Decimal:
    """The whole balance from the parts an indexer names. Raises IndexerFault if they do not make one."""
    if total is not None:
        whole = amount(total)
        if available is not None and amount(available) > whole:
            raise IndexerFault("answered more available than there is overall")
        return whole
    if available is None or transferable is None:
        raise IndexerFault("answered no overall balance")
    return amount(available) + amount(transferable)
