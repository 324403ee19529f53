"""How much of a node's free GPUs is of no use to the requests that come: F of Fragmentation Gradient Descent (ATC'23).

For each shape of the demand, weighted by its frequency, all that is free and that one more such request could not use:
everything if it does not fit at all, else the GPUs with too little free. Growth of F is what a placement costs others.

F is a sum over GPUs, except for what requests for several GPUs could use, which depends on how many are wholly free;
and a node's cores matter only by which shapes they are enough for. So both sums are tables, filled as needed, and so is
F itself: nothing is computed anew that did not change.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from controlplane.demand import Shape

#: Thousandths of a whole GPU.
WHOLE: Final = 1000
#: Rows of each table; a full one is emptied.
ROWS: Final = 16_384
#: Sums of fractions of a core: what is smaller is rounding.
CPU_ROUNDING: Final = 1e-6


#: One GPU by what matters here: model, bytes of memory, thousandths that are free.
Lot = tuple[str, int, int]
Matches = Callable[[str, str], bool]


class Fragmentation:
    """F under one histogram of demand. `matches(wanted, model)`: is that a GPU which was asked for?"""

    def __init__(self, histogram: Mapping[Shape, float], matches: Matches) -> None:
        self._matches = matches
        self._singles = [(shape, weight) for shape, weight in histogram.items() if shape.count == 1]
        self._several = [(shape, weight) for shape, weight in histogram.items() if shape.count > 1]
        self._total = sum(histogram.values())
        #: The numbers of cores that make a difference, and so the columns of the tables.
        self._steps = sorted({shape.cpus for shape in histogram})
        self._known: dict[tuple[int, tuple[Lot, ...]], float] = {}
        self._usable_lots: dict[Lot, Sequence[float]] = {}
        self._usable_wholes: dict[tuple[Lot, ...], Sequence[float]] = {}

    def of(self, lots: tuple[Lot, ...], cpus: float) -> float:
        """F of a node with these GPUs (in order) and free cores, in GPUs."""
        step = bisect_right(self._steps, cpus + CPU_ROUNDING)
        known = self._known.get((step, lots))
        return self._learn(step, lots) if known is None else known

    def _learn(self, step: int, lots: tuple[Lot, ...]) -> float:
        if len(self._known) >= ROWS:
            self._known.clear()
        free = sum([lot[2] for lot in lots])
        usable = sum([self._usable(lot)[step] for lot in lots])
        if self._several:
            usable += self._usable_whole(tuple([lot for lot in lots if lot[2] == WHOLE]))[step]
        found = self._known[step, lots] = (self._total * free - usable) / WHOLE
        return found

    def _usable(self, lot: Lot) -> Sequence[float]:
        """Thousandths of the GPU that requests for one or a share of one could use, weighted; by step of cores."""
        row = self._usable_lots.get(lot)
        if row is None:
            model, memory_bytes, free = lot
            weights = (
                (shape, weight * free)
                for shape, weight in self._singles
                if free >= (shape.share or WHOLE)
                and memory_bytes * (shape.share or WHOLE) >= shape.min_memory_bytes * WHOLE
                and self._matches(shape.model, model)
            )
            row = self._usable_lots[lot] = self._row(self._usable_lots, weights)
        return row

    def _usable_whole(self, wholes: tuple[Lot, ...]) -> Sequence[float]:
        """The same for requests for several GPUs: it depends on how many there are."""
        row = self._usable_wholes.get(wholes)
        if row is None:
            weights = ((shape, weight * self._number(shape, wholes)) for shape, weight in self._several)
            row = self._usable_wholes[wholes] = self._row(self._usable_wholes, weights)
        return row

    def _number(self, shape: Shape, wholes: Sequence[Lot]) -> int:
        """Thousandths of GPUs that would do for the shape; 0 if too few would."""
        found = sum(
            memory_bytes >= shape.min_memory_bytes and self._matches(shape.model, model)
            for model, memory_bytes, _ in wholes
        )
        return found * WHOLE if found >= shape.count else 0

    def _row(self, table: dict[Any, Sequence[float]], weights: Iterable[tuple[Shape, float]]) -> Sequence[float]:
        if len(table) >= ROWS:
            table.clear()
        row = [0.0] * (len(self._steps) + 1)
        for shape, weight in weights:
            row[bisect_left(self._steps, shape.cpus) + 1] += weight
        return tuple(accumulate(row))
