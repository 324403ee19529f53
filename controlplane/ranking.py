"""The nodes for one shape of request: what each costs, in order, or why it is refused. A structure, without policy.

Nodes are small numbers ("slots"). Those that cost the same but for a price that changes are kept in one group for each
price, so that a change of price changes no order.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from heapq import merge

from controlplane.placement import DIGITS

#: What a group's price is made of: the models of the GPUs that would be taken.
Models = tuple[str, ...]
#: Cost, address (which decides between equals), slot.
Row = tuple[float, str, int]


class Ranking:
    """Verdicts on slots. One slot has one verdict: the last."""

    def __init__(self) -> None:
        #: By slot: where it is ranked; why it is refused; nothing.
        self._verdicts: list[tuple[Row, Models] | str | None] = []
        self._groups: dict[Models, list[Row]] = {}
        self._refusals: Counter[str] = Counter()

    def accept(self, slot: int, addr: str, cost: float, models: Models) -> None:
        """It would do, for `cost` and the price of `models`."""
        self.forget(slot)
        row = (cost, addr, slot)
        self._verdicts[slot] = row, models
        insort(self._groups.setdefault(models, []), row)

    def refuse(self, slot: int, why: str) -> None:
        """It would not do."""
        if slot < len(self._verdicts) and self._verdicts[slot] == why:
            return
        self.forget(slot)
        self._verdicts[slot] = why
        self._refusals[why] += 1

    def refuse_all(self, slots: Collection[int], why: str) -> None:
        """None of them would do; nothing is known of them yet."""
        self._grow(max(slots))
        for slot in slots:
            self._verdicts[slot] = why
        self._refusals[why] += len(slots)

    def forget(self, slot: int) -> None:
        """There is no such node, or not any more."""
        self._grow(slot)
        verdict = self._verdicts[slot]
        if isinstance(verdict, str):
            self._refusals[verdict] -= 1
        elif verdict is not None:
            row, models = verdict
            rows = self._groups[models]
            del rows[bisect_left(rows, row)]
            if not rows:
                del self._groups[models]
        self._verdicts[slot] = None

    def _grow(self, slot: int) -> None:
        if slot >= len(self._verdicts):
            self._verdicts.extend([None] * (slot + 1 - len(self._verdicts)))

    def cost(self, slot: int, price_of: Callable[[Models], float]) -> float | None:
        """Of one slot, with its price; None: it is not accepted."""
        verdict = self._verdicts[slot] if slot < len(self._verdicts) else None
        if verdict is None or isinstance(verdict, str):
            return None
        row, models = verdict
        return round(row[0] + price_of(models), DIGITS)

    def refusal(self, slot: int) -> str:
        """Why it would not do; empty: it would, or there is no such node."""
        verdict = self._verdicts[slot] if slot < len(self._verdicts) else None
        return verdict if isinstance(verdict, str) else ""

    def cheapest(self, price_of: Callable[[Models], float]) -> Iterator[Row]:
        """All that are accepted, by cost with price, then by address."""
        return merge(*(_priced(rows, price_of(models)) for models, rows in self._groups.items()))

    def refusals(self) -> Mapping[str, int]:
        """How many for which reason."""
        return +self._refusals

    def refused(self) -> Iterator[tuple[int, str]]:
        """Each slot that is refused, and why."""
        return ((slot, verdict) for slot, verdict in enumerate(self._verdicts) if isinstance(verdict, str))


def _priced(rows: Iterable[Row], price: float) -> Iterator[Row]:
    return ((round(cost + price, DIGITS), addr, slot) for cost, addr, slot in rows)
