"""The nodes for one shape of request: what each costs, in order, or why it is refused. A structure, without policy.

Nodes are small numbers ("slots"). Those that cost the same but for a price that changes are kept in one group for each
price, so that a change of price changes no order. A few bytes per node: there are many rankings of many nodes.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import compress, count
from typing import Final

#: What a group's price is made of: the models of the GPUs that would be taken.
Models = tuple[str, ...]
#: Cost, address (which decides between equals), slot.
Row = tuple[float, str, int]

#: Verdicts on a slot below those that stand for reasons.
_ABSENT: Final = 0
_ACCEPTED: Final = 1


class Ranking:
    """Verdicts on slots. One slot has one verdict: the last."""

    def __init__(self) -> None:
        self._verdicts = bytearray()
        self._groups: dict[Models, list[Row]] = {}
        #: By slot, of those that are accepted.
        self._rows: list[tuple[Row, Models] | None] = []
        self._reasons = ["absent", "accepted"]
        self._counts = [0, 0]
        self._codes: dict[str, int] = {}

    def accept(self, slot: int, addr: str, cost: float, models: Models) -> None:
        """It would do, for `cost` and the price of `models`."""
        self.forget(slot)
        self._say(slot, _ACCEPTED)
        row = (cost, addr, slot)
        self._rows[slot] = row, models
        insort(self._groups.setdefault(models, []), row)

    def refuse(self, slot: int, why: str) -> None:
        """It would not do."""
        self.forget(slot)
        code = self._codes.get(why)
        if code is None:
            code = self._codes[why] = len(self._reasons)
            self._reasons.append(why)
            self._counts.append(0)
        self._say(slot, code)

    def forget(self, slot: int) -> None:
        """There is no such node, or not any more."""
        missing = slot + 1 - len(self._verdicts)
        if missing > 0:
            self._verdicts.extend(bytes(missing))
            self._rows.extend([None] * missing)
            self._counts[_ABSENT] += missing
        known = self._rows[slot]
        if known is not None:
            row, models = known
            rows = self._groups[models]
            del rows[bisect_left(rows, row)]
            self._rows[slot] = None
        self._say(slot, _ABSENT)

    def _say(self, slot: int, verdict: int) -> None:
        self._counts[self._verdicts[slot]] -= 1
        self._verdicts[slot] = verdict
        self._counts[verdict] += 1

    def cost(self, slot: int, price_of: Callable[[Models], float]) -> float | None:
        """Of one slot, with its price; None: it is not accepted."""
        known = self._rows[slot] if slot < len(self._rows) else None
        return None if known is None else round(known[0][0] + price_of(known[1]), 6)

    def cheapest(self, price_of: Callable[[Models], float]) -> Iterator[Row]:
        """All that are accepted, by cost with price."""
        return merge(*(_priced(rows, price_of(models)) for models, rows in self._groups.items() if rows))

    def refusals(self) -> dict[str, int]:
        """How many for which reason."""
        return {why: self._counts[code] for why, code in self._codes.items() if self._counts[code]}

    def refused(self) -> Iterator[tuple[int, str]]:
        """Each slot that is refused, and why."""
        refused = self._verdicts.translate(_REFUSED)
        return ((slot, self._reasons[self._verdicts[slot]]) for slot in compress(count(), refused))


#: 0 for verdicts that are no refusals.
_REFUSED: Final = bytes([0, 0]) + bytes([1]) * 254


def _priced(rows: Iterable[Row], price: float) -> Iterator[Row]:
    return ((round(cost + price, 6), addr, slot) for cost, addr, slot in rows)
