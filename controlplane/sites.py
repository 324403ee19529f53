"""All nodes as placement sees them, indexed: the decisions of `placement.place` in a fraction of its time.

For each shape of request that came lately there is a ranking: which nodes would refuse it and why, and what the others
would cost, in order. It depends on the nodes one by one, so it is brought up to date by looking at those that were
touched since it was last used. What depends on more is added when a request comes, going through the ranking from its
cheap end: the price of a GPU model, by which the ranking is divided; the image; the workspace's other replicas. They
only add, so the search ends where nothing can get cheaper.

Nodes with the same free GPUs are piled up: a new ranking asks once for each pile whether its GPUs will do.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from heapq import nsmallest
from itertools import chain, islice
from typing import Final

from controlplane.cards import Card, Fit, fits, model_matches
from controlplane.demand import Demand, Shape, difference
from controlplane.explain import ACCEPTED_KEPT, REFUSED_KEPT, Candidate, Decision
from controlplane.fragmentation import WHOLE, Fragmentation
from controlplane.placement import (
    CROWDED,
    DEFAULT_POLICY,
    IMAGE_FILTERS,
    NO_DEMAND,
    NODE_FILTERS,
    REPLICAS,
    SHAPE_COSTS,
    SHAPE_FILTERS,
    Filter,
    Market,
    Need,
    NodeView,
    Placement,
    Policy,
    Refusals,
    best_fit,
    cost_parts,
    gpu_ids,
    gpu_price,
    has_gpus,
    has_image,
    is_crowded,
    offered,
    price,
    pull_cost,
    rated,
    refusal,
    unreliable_cost,
)
from controlplane.ranking import Models, Ranking, Row

#: Shapes of requests for which nodes are kept ranked; the one not used for longest makes room.
RANKINGS: Final = 256
#: Kinds of nodes of which a ranking remembers how they would do.
KINDS: Final = 4096
#: Touches remembered, in units of nodes; a ranking that missed more is made anew.
TOUCHES_PER_NODE: Final = 4
#: When so much of the demand has changed, fragmentation is measured by the new one, and all rankings are made anew.
NEWS: Final = 0.1
#: Most requests between two looks at how much has changed.
LOOK_EVERY: Final = 256
#: Nodes with the image are looked at first if there are at most so many.
FEW: Final = 64

PriceOf = Callable[[Models], float]
_NONE: Final[frozenset[int]] = frozenset()
#: Why a node is refused whatever is asked of it, or ""; and its cards.
_Kind = tuple[str, tuple[Card, ...]]
_NOBODY: Final[_Kind] = ("", ())
#: NODE_FILTERS do not look at the need.
_ANY: Final = Need("", "")
#: What is not known of all nodes of a kind.
_OTHER_FILTERS: Final = tuple(says for says in SHAPE_FILTERS if says is not has_gpus)
#: Costs are millionths: what is less is rounding.
_ROUNDING: Final = 1e-7


class Sites:
    """The nodes, and what is known of the demand for them."""

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self._policy = policy
        self._demand = Demand()
        self._fragmentation = NO_DEMAND
        self._histogram: Mapping[Shape, float] = {}
        self._observed = 0
        self._look_at = 1
        #: By slot; None: free for the next node.
        self._views: list[NodeView | None] = []
        self._slots: dict[str, int] = {}
        self._vacant: list[int] = []
        #: By slot: why NODE_FILTERS refuse the node, or "", and its cards; and the slots that have both in common.
        self._kinds: list[_Kind] = []
        self._piles: dict[_Kind, set[int]] = {}
        #: Slots, in order; and how many were there before those.
        self._touches: list[int] = []
        self._forgotten = 0
        self._rankings: dict[tuple[object, ...], _Ranked] = {}
        #: By GPU model: thousandths that are held, and that are there.
        self._held: Counter[str] = Counter()
        self._there: Counter[str] = Counter()
        #: How many replicas of a workspace are in which slots; where an image is.
        self._homes: dict[str, dict[int, int]] = {}
        self._cached: dict[str, set[int]] = {}

    # The demand.

    def observe(self, need: Need, times: int = 1) -> None:
        """So many replicas of this kind were asked for, whether there is room for them or not."""
        self._demand.observe(need.shape, times)
        self._observed += times
        if self._observed < self._look_at:
            return
        self._look_at = self._observed + min(LOOK_EVERY, max(1, self._observed // 8))
        histogram = self._demand.histogram()
        if difference(histogram, self._histogram) > NEWS:
            self._histogram = histogram
            self._fragmentation = Fragmentation(histogram, model_matches)
            self._rankings.clear()

    @property
    def fragmentation(self) -> Fragmentation:
        """What placements are measured by now."""
        return self._fragmentation

    # The nodes.

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[NodeView]:
        return (view for view in self._views if view is not None)

    def get(self, addr: str) -> NodeView | None:
        """The node as it was put last."""
        slot = self._slots.get(addr)
        return None if slot is None else self._views[slot]

    def put(self, view: NodeView) -> None:
        """There is this node, or it is like this now."""
        slot = self._slots.get(view.addr)
        if slot is None:
            if not self._vacant:
                self._vacant.append(len(self._views))
                self._views.append(None)
                self._kinds.append(_NOBODY)
            slot = self._slots[view.addr] = self._vacant.pop()
        self._set(slot, view)

    def remove(self, addr: str) -> None:
        """There is no such node any more; no error if there was none."""
        slot = self._slots.pop(addr, None)
        if slot is not None:
            self._set(slot, None)
            self._vacant.append(slot)

    def _set(self, slot: int, view: NodeView | None) -> None:
        before, self._views[slot] = self._views[slot], view
        if before is view:
            return
        old, new = self._rank_key(before), self._rank_key(view)
        if old != new:
            if before is not None:
                self._stock(before, -1)
            if view is not None:
                self._stock(view, 1)
            self._move(slot, view)
            self._touches.append(slot)
            if len(self._touches) > TOUCHES_PER_NODE * len(self._views) + RANKINGS:
                half = len(self._touches) // 2
                del self._touches[:half]
                self._forgotten += half
        if before is None or view is None or before.here != view.here:
            for uid in before.here if before else ():
                del self._homes[uid][slot]
                if not self._homes[uid]:
                    del self._homes[uid]
            for uid, replicas in view.here.items() if view else ():
                self._homes.setdefault(uid, {})[slot] = replicas
        if before is None or view is None or before.images.keys() != view.images.keys():
            for image in before.images if before else ():
                self._cached[image].discard(slot)
                if not self._cached[image]:
                    del self._cached[image]
            for image in view.images if view else ():
                self._cached.setdefault(image, set()).add(slot)

    def _rank_key(self, view: NodeView | None) -> tuple[object, ...]:
        """All that the rankings depend on."""
        if view is None:
            return ()
        return (
            view.connected,
            view.availability,
            view.engine,
            view.gpus,
            view.cpus,
            view.cpus_free,
            view.memory_free_bytes,
            view.orphans > 0,
            view.replicas < REPLICAS,
            unreliable_cost(view, self._policy),
        )

    def _move(self, slot: int, view: NodeView | None) -> None:
        """To the pile where it belongs now."""
        before = self._kinds[slot]
        if view is None:
            kind = _NOBODY
        else:
            kind = refusal(_ANY, view, self._policy, NODE_FILTERS), view.cards()
        self._kinds[slot] = kind
        if kind != before:
            pile = self._piles.get(before)
            if pile is not None:
                pile.discard(slot)
                if not pile:
                    del self._piles[before]
            if view is not None:
                self._piles.setdefault(kind, set()).add(slot)

    def _stock(self, view: NodeView, sign: int) -> None:
        for model, _, free in offered(view):
            self._there[model] += sign * WHOLE
            self._held[model] += sign * (WHOLE - free)

    # The decision.

    def place(self, need: Need, *, time: datetime, subject: str) -> Placement | Refusals:
        """As placement.place of all nodes. Refusals for the image are counted only of nodes that were looked at."""
        market = self._market()
        ranking = self._ranking(need, market)
        here = self._homes.get(need.workspace_uid, {})
        price = partial(gpu_price, need, market)
        crowded = {
            slot: cost
            for slot, replicas in here.items()
            if is_crowded(need, replicas) and (cost := ranking.cost(slot, price)) is not None
        }
        search = _Search(need, self._views, here, self._policy)
        search.run(
            ranking, price, self._cached.get(need.image, _NONE) | self._cached.get(need.directory, _NONE), crowded
        )
        refusals = Counter(ranking.refusals())
        refused = search.refused
        if crowded and not search.found:
            for slot, cost in crowded.items():
                search.look(slot, cost)
        elif crowded:
            refused += [(slot, CROWDED) for slot in crowded]
        refusals.update(why for _, why in refused)
        decision = Decision(
            time=time,
            subject=subject,
            chosen=min(search.found)[1] if search.found else "",
            candidates=(
                *(rated(need, self._view(slot), market) for _, _, slot in nsmallest(ACCEPTED_KEPT, search.found)),
                *(
                    Candidate((view := self._view(slot)).addr, view.name, why)
                    for slot, why in islice(chain(refused, ranking.refused()), REFUSED_KEPT)
                ),
            ),
            refusals=dict(refusals.most_common()),
        )
        if not search.found:
            return Refusals(decision)
        view = self._view(min(search.found)[2])
        return Placement(view.addr, gpu_ids(need, view, market), decision)

    def _view(self, slot: int) -> NodeView:
        view = self._views[slot]
        assert view is not None
        return view

    def _market(self) -> Market:
        prices = {
            model: price(self._held[model] / there, self._policy) for model, there in self._there.items() if there
        }
        return Market(self._policy, self._fragmentation, prices)

    def _ranking(self, need: Need, market: Market) -> Ranking:
        """The nodes ranked for needs of this shape, as they are now."""
        key = (need.gpu, need.share, need.cpus, need.memory_bytes)
        ranked = self._rankings.pop(key, None)
        if ranked is None or ranked.heeded < self._forgotten:
            ranked = _Ranked(need, self._policy)
            for kind, pile in self._piles.items():
                why = ranked.refusal(kind)
                for slot in pile:
                    if why:
                        ranked.ranking.refuse(slot, why)
                    else:
                        ranked.rank(slot, self._views[slot], kind, market)
            if len(self._rankings) >= RANKINGS:
                del self._rankings[next(iter(self._rankings))]
        else:
            for slot in set(self._touches[ranked.heeded - self._forgotten :]):
                ranked.rank(slot, self._views[slot], self._kinds[slot], market)
        ranked.heeded = self._forgotten + len(self._touches)
        self._rankings[key] = ranked
        return ranked.ranking


class _Ranked:
    """A ranking for one shape of need, and how nodes get their place in it."""

    def __init__(self, need: Need, policy: Policy) -> None:
        self.ranking = Ranking()
        #: Touches of nodes that are in the ranking.
        self.heeded = 0
        self._need = need
        self._policy = policy
        self._fits: dict[tuple[Card, ...], tuple[Sequence[Fit], str]] = {}

    def refusal(self, kind: _Kind) -> str:
        """Of all nodes of a kind."""
        return kind[0] or self._ways(kind[1])[1]

    def rank(self, slot: int, view: NodeView | None, kind: _Kind, market: Market) -> None:
        """The node is of that kind now."""
        if view is None:
            self.ranking.forget(slot)
            return
        why = self.refusal(kind) or refusal(self._need, view, self._policy, _OTHER_FILTERS)
        if why:
            self.ranking.refuse(slot, why)
            return
        fit = best_fit(self._need, view, self._ways(kind[1])[0], market)
        cost = round(sum(cost_parts(self._need, view, fit, market, SHAPE_COSTS).values()), 6)
        self.ranking.accept(slot, view.addr, cost, fit.models)

    def _ways(self, cards: tuple[Card, ...]) -> tuple[Sequence[Fit], str]:
        known = self._fits.get(cards)
        if known is None:
            if len(self._fits) >= KINDS:
                self._fits.clear()
            known = self._fits[cards] = fits(self._need.gpu, self._need.gpu_share, cards)
        return known


class _Search:
    """Through a ranking for the node that is cheapest with what the ranking does not know."""

    def __init__(self, need: Need, views: Sequence[NodeView | None], here: Mapping[int, int], policy: Policy) -> None:
        self._need = need
        self._views = views
        self._here = here
        self._policy = policy
        self._pull = round(pull_cost(need, policy), 6)
        self.found: list[Row] = []
        self.refused: list[tuple[int, str]] = []
        self._best = math.inf

    def run(self, ranking: Ranking, price: PriceOf, cached: Collection[int], skipped: Collection[int]) -> None:
        """Until nothing cheaper can come and there are enough to be told. `cached`: slots that have the image."""
        few = cached if len(cached) <= FEW else ()
        for slot in few:
            if slot not in skipped and (cost := ranking.cost(slot, price)) is not None:
                self.look(slot, cost)
        # All others pay for the image then.
        least = self._pull if few or not cached else 0.0
        for cost, _, slot in ranking.cheapest(price):
            if cost + least > self._best + _ROUNDING and len(self.found) >= ACCEPTED_KEPT:
                return
            if slot not in few and slot not in skipped:
                self.look(slot, cost)

    def look(self, slot: int, cost: float) -> None:
        """At one node, which costs so much without image and other replicas."""
        view = self._views[slot]
        assert view is not None
        if why := refusal(self._need, view, self._policy, IMAGE_FILTERS):
            self.refused.append((slot, why))
            return
        if not has_image(self._need, view):
            cost += self._pull
        if slot in self._here:
            cost += round(self._policy.crowded * self._here[slot], 6)
        cost = round(cost, 6)
        self.found.append((cost, view.addr, slot))
        self._best = min(self._best, cost)
