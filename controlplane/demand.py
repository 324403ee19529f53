"""What has been asked for lately: a histogram of the shapes of requests, learnt as they come. Bounded and decaying.

Placement asks it what is still to come: a GPU that none of these shapes could use is as good as lost (fragmentation).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

#: Shapes remembered; the rarest makes room.
SHAPES: Final = 512
#: Requests after which one counts half.
HALF_LIFE: Final = 8192.0
#: Weights are brought back to sane sizes when the newest has reached this.
_LARGEST: Final = 1e9


class Shape(msgspec.Struct, frozen=True):
    """What a replica asks of its node: `count` GPUs, or with `share` so many thousandths of one, and CPU cores."""

    model: str = ""
    count: int = 0
    share: int = 0
    min_memory_bytes: int = 0
    cpus: float = 0.0


class Demand:
    """The shapes of the requests that came lately, by how often."""

    def __init__(self, *, shapes: int = SHAPES, half_life: float = HALF_LIFE) -> None:
        self._shapes = shapes
        self._growth = 2.0 ** (1.0 / half_life)
        #: What the next request weighs: old ones need not be touched for it to weigh more than they do.
        self._newest = 1.0
        self._weights: dict[Shape, float] = {}

    def observe(self, shape: Shape, times: int = 1) -> None:
        """Requests of this shape were made. What cannot be used by any GPU is not of interest."""
        if not shape.count:
            return
        weights = self._weights
        weights[shape] = weights.get(shape, 0.0) + self._newest * times
        self._newest *= self._growth**times
        if len(weights) > self._shapes:
            del weights[min(weights, key=lambda kept: (weights[kept], kept != shape))]
        if self._newest > _LARGEST:
            self._weights = {kept: weight / self._newest for kept, weight in weights.items()}
            self._newest = 1.0

    def histogram(self) -> dict[Shape, float]:
        """The share of each shape: all together are 1."""
        total = sum(self._weights.values())
        return {shape: weight / total for shape, weight in self._weights.items()}


def difference(one: Mapping[Shape, float], other: Mapping[Shape, float]) -> float:
    """Between two histograms: 0 when equal, 1 when they have nothing in common."""
    if not one or not other:
        return 0.0 if one == other else 1.0
    return sum(abs(one.get(shape, 0.0) - other.get(shape, 0.0)) for shape in one.keys() | other.keys()) / 2
