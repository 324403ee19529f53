"""UniSat's open API. Documented at https://docs.unisat.io/dev/open-api-documentation."""

from collections.abc import Sequence
from decimal import Decimal
from urllib.parse import quote

import msgspec

from controlplane.assets.http import Http
from controlplane.assets.indexer import IndexerFault, overall


class _Balance(msgspec.Struct, rename="camel"):
    ticker: str
    overall_balance: str | None = None
    available_balance: str | None = None
    transferable_balance: str | None = None


class _Answer(msgspec.Struct):
    #: 0 is success; the HTTP status is 200 for most failures too.
    code: int
    msg: str = ""
    data: _Balance | None = None


class Unisat:
    """One request a ticker: the summary of all tickers comes in pages and costs the indexer more."""

    kind = "unisat"
    is_local = False

    def __init__(self, http: Http, base_url: str, api_key: str) -> None:
        self._http = http
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {api_key}"}

    async def balances(self, address: str, tickers: Sequence[str]) -> dict[str, Decimal]:
        """See Indexer."""
        return {ticker: await self._balance(address, ticker) for ticker in tickers}

    async def _balance(self, address: str, ticker: str) -> Decimal:
        url = f"{self._base_url}/v1/indexer/address/{address}/brc20/{quote(ticker, safe='')}/info"
        answer = await self._http.get(url, _Answer, headers=self._headers)
        if answer.code != 0:
            raise IndexerFault(f"answered code {answer.code}: {answer.msg[:100]}")
        if answer.data is None or answer.data.ticker.casefold() != ticker.casefold():
            raise IndexerFault("answered about another ticker")
        return overall(answer.data.overall_balance, answer.data.available_balance, answer.data.transferable_balance)
