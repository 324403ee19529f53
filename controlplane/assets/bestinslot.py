"""Best in Slot's API, version 3. Documented at https://docs.bestinslot.xyz/api-reference/brc-20."""

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from controlplane.assets.http import Http
from controlplane.assets.indexer import overall


class _Balance(msgspec.Struct):
    ticker: str
    overall_balance: str | None = None
    available_balance: str | None = None
    transferrable_balance: str | None = None


class _Answer(msgspec.Struct):
    data: list[_Balance]


class BestInSlot:
    """One request a ticker, by their filter; the list has no pages, so a ticker that is not in it is not held."""

    kind = "bestinslot"
    is_local = False

    def __init__(self, http: Http, base_url: str, api_key: str) -> None:
        self._http = http
        self._base_url = base_url
        self._headers = {"x-api-key": api_key}

    async def balances(self, address: str, tickers: Sequence[str]) -> dict[str, Decimal]:
        """See Indexer."""
        return {ticker: await self._balance(address, ticker) for ticker in tickers}

    async def _balance(self, address: str, ticker: str) -> Decimal:
        answer = await self._http.get(
            f"{self._base_url}/v3/brc20/wallet_balances",
            _Answer,
            headers=self._headers,
            params={"address": address, "ticker": ticker.lower()},
        )
        for row in answer.data:
            if row.ticker.casefold() == ticker.casefold():
                return overall(row.overall_balance, row.available_balance, row.transferrable_balance)
        return Decimal(0)
