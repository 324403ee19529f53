"""How much there is to do for a task, learnt from the numbers in its request: steps, width, the length of a text.

Per workspace, from each task that was answered: the logarithm of how many times longer it took than its replica's tasks
do, fitted to the logarithms of the numbers in its JSON (ridge regression over the last few hundred tasks: a product of
steps, width and height is a sum of their logarithms). Each fit is judged by tasks that it has not seen: while it does
not tell them apart clearly better than "all alike", all are alike. All is bounded: bytes read, fields looked at,
fields remembered, and how much a size may count.
"""

from array import array
from collections.abc import Iterator
from math import exp, log, log1p
from typing import Final, TypeAlias

import msgspec

#: Tasks that take less on average are not looked at: what could be won is less than the look costs.
LEAST_MEAN_S: Final = 0.25
#: Nor are larger requests, ...
BODY_BYTES: Final = 4096
#: ... further fields of one, ...
FIELDS: Final = 32
#: ... or further names of fields in a workspace, and longer ones.
NAMES: Final = 15
#: Of these, paths: some have an id in them.
PATHS: Final = 4
NAME_CHARS: Final = 64
#: A task's weight falls by this with each later one.
KEEP: Final = 0.998
#: What pulls each weight of a field to 0.
RIDGE: Final = 1.0
#: The fit is made anew after so many tasks, ...
REFIT: Final = 16
#: ... believed after so many, ...
SEEN: Final = 64
#: ... and while the square of its error is at most this share of what it is for "all alike".
GOOD: Final = 0.8
#: Weight of the newest task in both.
NEWEST_WEIGHT: Final = 0.02
#: Where so many tasks have shown no use in it, only one of so many is still looked at.
PATIENCE: Final = 512
SELDOM: Final = 8
#: No task counts for more than so many average ones, or for less than one such part.
MOST_WORK: Final = 8.0

#: Of type "f": 1, then by name the logarithm of its number.
Features: TypeAlias = "array[float]"


class Sizes:
    """What is known of the sizes of one workspace's tasks. All methods are cheap: microseconds."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._paths = 0
        self._products: list[list[float]] = [[0.0]]
        self._sums: list[float] = [0.0]
        self._weights: list[float] = [0.0]
        self._mean = 0.0
        self._error = self._error_alike = 0.0
        self._typical = 1.0
        self._seen = self._asked = 0

    @property
    def useful(self) -> bool:
        """Do sizes tell tasks apart?"""
        return self._seen >= SEEN and self._error <= GOOD * self._error_alike

    def features(self, path: str, body: bytes) -> "Features | None":
        """What there is to learn from in a request; None: it is not looked at."""
        self._asked += 1
        if self._asked > PATIENCE and self._asked % SELDOM and not self.useful:
            return None
        found = array("f", [0.0]) * (1 + len(self._names))
        found[0] = 1.0
        for name, value in _numbers(path, body):
            index = self._names.get(name)
            if index is None:
                if len(self._names) >= NAMES or len(name) > NAME_CHARS:
                    continue
                if name is path:
                    if self._paths >= PATHS:
                        continue
                    self._paths += 1
                index = self._names[name] = len(self._names) + 1
                found.append(0.0)
            found[index] = value
        return found

    def work(self, features: Features) -> float:
        """How much there is to do; 1: as much as on average, or nobody knows."""
        if not self.useful:
            return 1.0
        return min(max(exp(self._predicted(features)) / self._typical, 1 / MOST_WORK), MOST_WORK)

    def learn(self, features: Features, times: float) -> None:
        """A task has taken so many times what its replica takes for an average one."""
        target = log(min(max(times, 1e-3), 1e3))
        predicted = self._predicted(features)
        if self._seen >= REFIT:
            weight = max(NEWEST_WEIGHT, 1 / (self._seen - REFIT + 1))
            self._error += ((target - predicted) ** 2 - self._error) * weight
            self._error_alike += ((target - self._mean) ** 2 - self._error_alike) * weight
            self._typical += (exp(predicted) - self._typical) * weight
        self._seen += 1
        self._mean += (target - self._mean) * max(NEWEST_WEIGHT, 1 / self._seen)
        while len(self._sums) < len(features):
            self._sums.append(0.0)
            self._products.append([0.0] * len(self._sums))
        # Below the diagonal only. All of it fades, also where this task has nothing.
        values = [*features, *[0.0] * (len(self._sums) - len(features))]
        for index, (row, value) in enumerate(zip(self._products, values, strict=True)):
            self._products[index] = [KEEP * known + value * other for known, other in zip(row, values, strict=False)]
        self._sums = [KEEP * known + value * target for known, value in zip(self._sums, values, strict=True)]
        if self._seen % REFIT == 0:
            self._weights = _solved(self._products, self._sums)

    def _predicted(self, features: Features) -> float:
        # Of fields that came up since the last fit nothing is known.
        predicted = sum([weight * value for weight, value in zip(self._weights, features, strict=False)])
        return min(max(predicted, -5.0), 5.0)


def _numbers(path: str, body: bytes) -> Iterator[tuple[str, float]]:
    """The names and logarithms of what may tell the size of a request: at most FIELDS."""
    yield path, 1.0
    if not 2 < len(body) <= BODY_BYTES or body[0] not in b"{ \n":
        return
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return
    if not isinstance(fields, dict):
        return
    left = FIELDS
    pending = [("", fields)]
    for prefix, group in pending:
        for name, value in group.items():
            left -= 1
            if left < 0:
                return
            if isinstance(value, bool) or value is None:
                continue
            if isinstance(value, int | float):
                # An integer may have thousands of digits.
                yield prefix + name, log1p(min(abs(value), 1e15))
            elif isinstance(value, str | list):
                yield prefix + name, log1p(len(value))
            elif isinstance(value, dict) and not prefix:
                pending.append((f"{name}.", value))


def _solved(products: list[list[float]], sums: list[float]) -> list[float]:
    """The weights of the ridge regression, by Cholesky's decomposition. `products`: the lower half of the matrix."""
    size = len(sums)
    lower: list[list[float]] = []
    for i in range(size):
        row: list[float] = []
        for j in range(i + 1):
            value = products[i][j] - sum(a * b for a, b in zip(row, lower[j] if j < i else row, strict=False))
            if i != j:
                row.append(value / lower[j][j])
            else:
                # The first is the constant, which nothing pulls.
                row.append((max(value, 0.0) + (RIDGE if i else 1e-6)) ** 0.5)
        lower.append(row)
    weights = list(sums)
    for i in range(size):
        weights[i] = (weights[i] - sum(lower[i][j] * weights[j] for j in range(i))) / lower[i][i]
    for i in reversed(range(size)):
        weights[i] = (weights[i] - sum(lower[j][i] * weights[j] for j in range(i + 1, size))) / lower[i][i]
    return weights
