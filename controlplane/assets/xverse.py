"""Xverse's API (Secret Key Labs). Documented at https://docs.xverse.app/api/brc-20/brc-20-by-address/brc-20-balances."""

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from controlplane.assets.http import Http
from controlplane.assets.indexer import PAGES, IndexerFault, overall


class _Balance(msgspec.Struct, rename="camel"):
    ticker: str
    overall_balance: str | None = None
    available_balance: str | None = None
    transferable_balance: str | None = None


class _Answer(msgspec.Struct):
    items: list[_Balance]
    total: int


class Xverse:
    """Their filter and pages are announced, not always obeyed: what comes is searched, until that is all there is."""

    kind = "xverse"
    is_local = False

    def __init__(self, http: Http, base_url: str, api_key: str) -> None:
        self._http = http
        self._base_url = base_url
        self._headers = {"x-api-key": api_key}

    async def balances(self, address: str, tickers: Sequence[str]) -> dict[str, Decimal]:
        """See Indexer."""
        return {ticker: await self._balance(address, ticker) for ticker in tickers}

    async def _balance(self, address: str, ticker: str) -> Decimal:
        seen = 0
        for _ in range(PAGES):
            answer = await self._http.get(
                f"{self._base_url}/v1/ordinals/address/{address}/brc20",
                _Answer,
                headers=self._headers,
                params={"ticker": ticker, **({"offset": str(seen)} if seen else {})},
            )
            for row in answer.items:
                if row.ticker.casefold() == ticker.casefold():
                    return overall(row.overall_balance, row.available_balance, row.transferable_balance)
            seen += len(answer.items)
            if seen >= answer.total:
                return Decimal(0)
            if not answer.items:
                break
        raise IndexerFault(f"answered {seen} tickers of {answer.total} and no more")
