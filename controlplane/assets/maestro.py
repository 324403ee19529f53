"""Maestro's Bitcoin indexer. Documented at https://docs.gomaestro.org/bitcoin/blockchain-indexer-api."""

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from controlplane.assets.http import Http
from controlplane.assets.indexer import PAGES, IndexerFault, overall


class _Balance(msgspec.Struct):
    total: str | None = None
    available: str | None = None


class _Answer(msgspec.Struct):
    data: dict[str, _Balance]
    next_cursor: str | None = None


class Maestro:
    """All tickers of the address in one list, which may come in pages; an unknown address has an empty one."""

    kind = "maestro"
    is_local = False

    def __init__(self, http: Http, base_url: str, api_key: str) -> None:
        self._http = http
        self._base_url = base_url
        self._headers = {"api-key": api_key}

    async def balances(self, address: str, tickers: Sequence[str]) -> dict[str, Decimal]:
        """See Indexer."""
        wanted = {ticker.casefold(): ticker for ticker in tickers}
        held: dict[str, Decimal] = {}
        cursor: str | None = ""
        for _ in range(PAGES):
            answer = await self._http.get(
                f"{self._base_url}/v0/addresses/{address}/brc20",
                _Answer,
                headers=self._headers,
                params={"cursor": cursor} if cursor else None,
            )
            for name, row in answer.data.items():
                if ticker := wanted.get(name.casefold()):
                    held[ticker] = overall(row.total, row.available)
            cursor = answer.next_cursor
            if not cursor or len(held) == len(wanted):
                return {ticker: held.get(ticker, Decimal(0)) for ticker in tickers}
        raise IndexerFault(f"answered more than {PAGES} pages")
