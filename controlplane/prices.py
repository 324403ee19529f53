"""What GPU time costs: the operator's price table, and the arithmetic of money. Pure, and exact.

Money is counted in 10^-9 of the operator's unit, as integers: nothing is ever rounded but a receipt's own cost, once,
half to even. A price is never changed, only followed by another from a time on; a receipt keeps the price at which its
attempt was assigned, so what was is never dearer or cheaper afterwards.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from controlplane.cards import model_matches
from controlplane.model import Price

#: One unit of money.
NANOS: Final = 10**9
#: Most that a second of one GPU may cost: then a receipt's cost has room in 64 bits whatever it was for.
PRICE_NANOS: Final = 1000 * NANOS
#: Most that one receipt can cost: what has room in the database.
COST_NANOS: Final = 2**63 - 1
#: Most prices that are kept: the table is in memory.
PRICES: Final = 10_000
#: Models for which it is remembered which prices hold. They are the nodes' words, and so without end.
MODELS: Final = 1000

_AMOUNT: Final = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)


def nanos_of(text: str) -> int:
    """`0.000125` as 125,000. Raises ValueError for what is no amount, or finer than 10^-9."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is no amount: write digits and at most 9 decimals, as in 0.000125")
    return int(match[1]) * NANOS + int((match[2] or "").ljust(9, "0"))


def amount_text(nanos: int) -> str:
    """125,000 as `0.000125000`: all nine decimals, so that sums can be compared as text."""
    return f"{nanos // NANOS}.{nanos % NANOS:09d}"


def cost_of(gpu_us: int, price_nanos: int) -> int:
    """What so many microseconds cost at a price a second, rounded half to even."""
    whole, rest = divmod(gpu_us * price_nanos, 1_000_000)
    return min(whole + (rest > 500_000 or (rest == 500_000 and whole % 2 == 1)), COST_NANOS)


class Prices:
    """The table in memory. Of the rules that fit a GPU's model the one with the most words holds."""

    def __init__(self, rows: Iterable[Price] = ()) -> None:
        self._histories: dict[str, list[Price]] = {}
        self._rules: dict[str, Sequence[str]] = {}
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return sum(map(len, self._histories.values()))

    def add(self, row: Price) -> None:
        """One more; one for the same words and time replaces the one before."""
        history = self._histories.setdefault(row.gpu_model, [])
        history[:] = [other for other in history if other.effective_time != row.effective_time]
        history.append(row)
        history.sort(key=lambda one: one.effective_time)
        self._rules.clear()

    def rows(self) -> list[Price]:
        """All, by model and time."""
        return [row for words in sorted(self._histories) for row in self._histories[words]]

    def nanos(self, gpu_model: str, at: datetime) -> int:
        """What a second of a GPU of that model costs at that time; 0 if no rule holds."""
        rules = self._rules.get(gpu_model)
        if rules is None:
            if len(self._rules) >= MODELS:
                self._rules.clear()
            rules = self._rules[gpu_model] = self._fitting(gpu_model)
        for words in rules:
            history = self._histories[words]
            number = bisect_right(history, at, key=lambda one: one.effective_time)
            if number:
                return history[number - 1].nanos
        return 0

    def _fitting(self, gpu_model: str) -> Sequence[str]:
        fitting = [words for words in self._histories if not words or model_matches(words, gpu_model)]
        return sorted(fitting, key=lambda words: (-len(words.split()), -len(words), words))
