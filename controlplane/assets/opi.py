"""OPI, the indexer one runs oneself. Source and documentation at https://github.com/bestinslot-xyz/OPI."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

import msgspec

from controlplane.assets.http import Http
from controlplane.assets.indexer import IndexerFault, overall

#: Balances are integers of this fraction of a token.
_UNIT: Final = Decimal(10) ** -18
#: Said with status 400, and means zero.
_NONE: Final = "no balance found"


class _Balance(msgspec.Struct):
    overall_balance: str
    available_balance: str | None = None


class _Answer(msgspec.Struct):
    error: str | None = None
    result: _Balance | None = None


class Opi:
    """One request a ticker; no key."""

    kind = "opi"
    is_local = False

    def __init__(self, http: Http, base_url: str) -> None:
        self._http = http
        self._base_url = base_url

    async def balances(self, address: str, tickers: Sequence[str]) -> dict[str, Decimal]:
        """See Indexer."""
        return {ticker: await self._balance(address, ticker) for ticker in tickers}

    async def _balance(self, address: str, ticker: str) -> Decimal:
        answer = await self._http.get(
            f"{self._base_url}/v1/brc20/get_current_balance_of_wallet",
            _Answer,
            params={"address": address, "ticker": ticker.lower()},
            statuses=(200, 400),
        )
        if answer.error == _NONE:
            return Decimal(0)
        if answer.error is not None or answer.result is None:
            raise IndexerFault(f"answered an error: {(answer.error or 'no result')[:100]}")
        whole = overall(answer.result.overall_balance, answer.result.available_balance)
        if whole != whole.to_integral_value():
            raise IndexerFault("answered a fraction of its smallest unit")
        return whole * _UNIT
