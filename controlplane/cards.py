"""Which GPUs of a node a replica would take: by what they are and how much of each is free, whichever they are. Pure.

Nodes with the same cards, equally free, give the same answers, so an answer is good for all of them.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from controlplane.fragmentation import WHOLE, Lot
from controlplane.grade import Grade
from controlplane.spec import GpuNeed

#: One GPU: grade, bytes of memory, model, thousandths that are free. The least is the best that will do.
Card = tuple[Grade, int, str, int]


class Fit(msgspec.Struct, frozen=True):
    """One way to give a replica its GPUs: those it takes, and the node's useful ones before and after."""

    taken: tuple[Card, ...]
    before: tuple[Lot, ...]
    after: tuple[Lot, ...]
    #: Thousandths that are left.
    free_after: int
    #: Of the GPUs it takes; and how many of those are not quite well.
    models: tuple[str, ...]
    degraded: int


@lru_cache(maxsize=16_384)
def lots_of(cards: tuple[Card, ...]) -> tuple[Lot, ...]:
    """Those that are of use to anybody, in order."""
    return tuple(sorted([(model, memory, free) for grade, memory, model, free in cards if grade < Grade.QUARANTINED]))


@lru_cache(maxsize=4096)
def model_matches(wanted: str, model: str) -> bool:
    """Has the model's name all words of `wanted`? "NVIDIA GeForce RTX 4090" has "rtx 4090"; "RTX 40900" has not.

    `|` stands between alternatives: "4090|A100".
    """
    words = _words_of(model)
    return any(_words_of(alternative) <= words for alternative in wanted.split("|"))


def _words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


#: What a card must be for a need and a share in thousandths, each after the one before, and what is missing if too few
#: are.
FILTERS: Final[tuple[tuple[Callable[[GpuNeed, int, Card], bool], str], ...]] = (
    (lambda need, _, card: model_matches(need.model, card[2]), "GPU"),
    (lambda need, share, card: card[1] * share >= need.min_memory_bytes * WHOLE, "GPU with enough memory"),
    (lambda _need, _, card: card[0] < Grade.QUARANTINED, "healthy GPU"),
    (lambda _, share, card: card[3] >= share, "free healthy GPU"),
)


def fits(need: GpuNeed, cards: tuple[Card, ...]) -> tuple[Sequence[Fit], str]:
    """The ways to give `need.count` cards or, with `need.share`, that much of one; or none, and why. `cards` in order.

    Of whole ones it is the best, then the smallest that will do; for a share one way for each different card.
    """
    share = need.share or WHOLE
    if not need.count:
        return (_fit(cards, (), lots_of(cards), share),), ""
    left: Sequence[Card] = cards
    for passes, kind in FILTERS:
        left = [card for card in left if passes(need, share, card)]
        if len(left) < need.count:
            return (), _too_few(need, share, kind)
    before = lots_of(cards)
    ways = [left[: need.count]] if share == WHOLE else [[card] for card in dict.fromkeys(left)]
    return [_fit(cards, taken, before, share) for taken in ways], ""


def _fit(cards: tuple[Card, ...], taken: Sequence[Card], before: tuple[Lot, ...], share: int) -> Fit:
    left = list(cards)
    for card in taken:
        grade, memory, model, free = card
        left[left.index(card)] = grade, memory, model, free - share
    after = lots_of(tuple(left))
    return Fit(
        taken=tuple(taken),
        before=before,
        after=after,
        free_after=sum(lot[2] for lot in after),
        models=tuple(card[2] for card in taken),
        degraded=sum(card[0] is Grade.DEGRADED for card in taken),
    )


def _too_few(need: GpuNeed, share: int, kind: str) -> str:
    """E.g. `fewer than 2 free healthy GPUs of model 4090`."""
    if share < WHOLE:
        kind = kind.replace("free healthy GPU", f"healthy GPU with {share}/{WHOLE} free")
    many = f"no {kind}" if need.count == 1 else f"fewer than {need.count} {kind.replace('GPU', 'GPUs', 1)}"
    return f"{many} of model {need.model.replace('|', ' or ')}" if need.model else many
