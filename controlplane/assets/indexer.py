"""What is asked of an indexer, and how its answers are read."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Final, Protocol

#: Of a list that comes in pages, at most so many are asked for.
PAGES: Final = 20

# BestInSlot writes zero with 36 decimals; nobody writes more than 40 digits on either side.
_AMOUNT: Final = re.compile(r"[0-9]{1,40}(\.[0-9]{1,40})?", re.ASCII)


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
