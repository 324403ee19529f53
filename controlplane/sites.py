"""All nodes as placement sees them, indexed: the decisions of `placement.place` in a fraction of its time.

For each shape of request that came lately there is a ranking: which nodes would refuse it and why, and what the others
would cost, in order. It depends on the nodes one by one, so it is brought up to date by looking at those that were
touched since it was last used. What depends on more is added when a request comes, going through the ranking from its
cheap end: the price of a GPU model, by which the ranking is divided; the image; the workspace's other replicas. They
only add, so the search ends where nothing can get cheaper.

It learns the demand from the requests that it is told of. It knows nothing of what is on disk: who takes back what was
placed puts the node as it was.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from datetime import datetime
from functools import partial
from itertools import chain, islice
from typing import Any, Final

from controlplane.cards import Card, Fit, fits, model_matches
from controlplane.demand import Demand, Shape, difference
from controlplane.explain import ACCEPTED_KEPT, REFUSED_KEPT, Candidate, Decision
from controlplane.fragmentation import WHOLE, Fragmentation
from controlplane.placement import (
    CROWDED,
    DEFAULT_POLICY,
    DIGITS,
    IMAGE_FILTERS,
    NO_DEMAND,
    NODE_FILTERS,
    REPLICAS,
    SHAPE_FILTERS,
    Market,
    Need,
    NodeView,
    Placement,
    Policy,
    Refusals,
    best_fit,
    gpu_ids,
    gpu_price,
    has_gpus,
    has_image,
    is_crowded,
    load_cost,
    offered,
    price,
    pull_cost,
    rated,
    refusal,
    shape_cost,
    unreliable_cost,
)
from controlplane.ranking import Models, Ranking, Row
from controlplane.spec import GpuNeed

#: Shapes of requests for which nodes are kept ranked, and nodes in all of them together; the shape that was not asked
#: for longest makes room.
RANKINGS: Final = 256
RANKED: Final = 2_000_000
#: Touches of nodes that are remembered: so many, or half as many as nodes. A ranking that missed more is made anew:
#: there nodes that are alike are refused together.
TOUCHES: Final = 64
#: When so much of the demand has changed, fragmentation is measured by the new one, and all rankings are made anew.
NEWS: Final = 0.1
#: Most requests between two looks at how much has changed.
LOOK_EVERY: Final = 256
#: Kinds of nodes of which is remembered how they would do for a need.
KINDS: Final = 2048
#: Nodes with the image are looked at first if there are at most so many.
FEW: Final = 64

PriceOf = Callable[[Models], float]
#: NODE_FILTERS do not look at the need.
_ANY: Final = Need("", "")
#: In the place of a node that is no more.
_NOBODY: Final = NodeView("", connected=False)
#: What is not known of all nodes with the same cards.
_OTHER_FILTERS: Final = tuple(says for says in SHAPE_FILTERS if says is not has_gpus)


def _key(need: Need) -> tuple[object, ...]:
    """All that a ranking takes of a need."""
    return need.gpu, need.cpus, need.memory_bytes


def _drop(index: dict[Any, set[int]], key: object, slot: int) -> None:
    index[key].discard(slot)
    if not index[key]:
        del index[key]


class _Kind:
    """Nodes with the same GPUs, equally free, that NODE_FILTERS treat alike: asked for these, all answer the same."""

    def __init__(self, key: tuple[str, tuple[Card, ...]]) -> None:
        self.key = key
        self.slots: set[int] = set()


#: Of a slot without a node.
_NO_KIND: Final = _Kind(("", ()))
#: Ways to give a replica its GPUs, or why there are none.
_Ways = tuple[Sequence[Fit], str]


class _Ranked:
    """A ranking for one shape of need, and how nodes get their place in it."""

    def __init__(self, need: Need, policy: Policy, ways: dict[_Kind, _Ways]) -> None:
        self.ranking = Ranking()
        #: How many touches of nodes it has heeded.
        self.heeded = 0
        self._ways = ways
        self._need = need
        self._policy = policy

    def rank(self, slot: int, view: NodeView, kind: _Kind, market: Market) -> None:
        """The node is like this now."""
        need = self._need
        ways, why = self._ways.get(kind) or self.ways(kind)
        if view is _NOBODY:
            self.ranking.forget(slot)
        elif why or (why := refusal(need, view, self._policy, _OTHER_FILTERS)):
            self.ranking.refuse(slot, why)
        else:
            fit = best_fit(need, view, ways, market)
            self.ranking.accept(slot, view.addr, shape_cost(need, view, fit, market), fit.models)

    def ways(self, kind: _Kind) -> _Ways:
        """To give a replica GPUs of nodes of that kind; or why there are none."""
        known = self._ways.get(kind)
        if known is None:
            if len(self._ways) >= KINDS:
                self._ways.clear()
            why, cards = kind.key
            known = self._ways[kind] = ((), why) if why else fits(self._need.gpu, cards)
        return known


class _Search:
    """Through a ranking for the nodes that are cheapest with what the ranking does not know."""

    def __init__(self, need: Need, views: Sequence[NodeView], here: Mapping[int, int], policy: Policy) -> None:
        self._need = need
        self._views = views
        self._here = here
        self._policy = policy
        self._pull = round(pull_cost(need, policy), DIGITS)
        #: The cheapest, in order.
        self.found: list[Row] = []
        self.refused: list[tuple[int, str]] = []

    def crowded(self) -> Iterator[int]:
        """Slots that have their share of the workspace's replicas."""
        return (slot for slot, replicas in self._here.items() if is_crowded(self._need, replicas))

    def run(self, ranking: Ranking, price: PriceOf, with_image: Collection[int], skipped: Collection[int]) -> None:
        """Until nothing that comes could be among those that are told."""
        first = with_image if len(with_image) <= FEW else ()
        for slot in first:
            if slot not in skipped and (cost := ranking.cost(slot, price)) is not None:
                self.look(slot, cost)
        # All others pay for the image then.
        least = self._pull if len(first) == len(with_image) else 0.0
        for cost, addr, slot in ranking.cheapest(price):
            # Rows come by cost and address: none after this one is less.
            if len(self.found) >= ACCEPTED_KEPT and (round(cost + least, DIGITS), addr) > self.found[-1][:2]:
                return
            if slot not in first and slot not in skipped:
                self.look(slot, cost)

    def look(self, slot: int, cost: float) -> None:
        """At one node, which costs so much without image and other replicas."""
        view = self._views[slot]
        if why := refusal(self._need, view, self._policy, IMAGE_FILTERS):
            self.refused.append((slot, why))
            return
        if not has_image(self._need, view):
            cost += self._pull
        if slot in self._here:
            cost += round(self._policy.crowded * self._here[slot], DIGITS)
        insort(self.found, (round(cost, DIGITS), view.addr, slot))
        del self.found[ACCEPTED_KEPT:]

    def pass_over(self, crowded: Collection[int]) -> None:
        """Those that were not looked at because they have their share."""
        for slot in crowded:
            self.refused.append((slot, refusal(self._need, self._views[slot], self._policy, IMAGE_FILTERS) or CROWDED))


class Sites:
    """The nodes, and what is known of the demand for them."""

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self._policy = policy
        self._demand = Demand()
        self._fragmentation = NO_DEMAND
        self._histogram: Mapping[Shape, float] = {}
        self._observed = 0
        self._look_at = 1
        #: By slot, and of what kind they are; the kinds by what they have in common, and how they do
        #: for a need.
        self._views: list[NodeView] = []
        self._kinds: list[_Kind] = []
        self._kind_of: dict[tuple[str, tuple[Card, ...]], _Kind] = {}
        self._ways: dict[GpuNeed, dict[_Kind, _Ways]] = {}
        self._slots: dict[str, int] = {}
        self._vacant: list[int] = []
        self._rankings: dict[tuple[object, ...], _Ranked] = {}
        #: Slots that changed, in order; and how many did so before those.
        self._touches: list[int] = []
        self._forgotten = 0
        #: By GPU model: thousandths that are held, and that are there.
        self._held: Counter[str] = Counter()
        self._there: Counter[str] = Counter()
        #: How many replicas of a workspace are in which slots; where an image is.
        self._homes: dict[str, dict[int, int]] = {}
        self._with_image: dict[str, set[int]] = {}

    # The demand.

    def observe(self, shape: Shape, times: int = 1) -> None:
        """So many replicas of this shape were asked for, whether there is room for them or not."""
        self._demand.observe(shape, times)
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

    @property
    def addrs(self) -> Set[str]:
        """Of all nodes."""
        return self._slots.keys()

    def __getitem__(self, addr: str) -> NodeView:
        return self._views[self._slots[addr]]

    def put(self, view: NodeView) -> None:
        """There is this node, or it is like this now."""
        slot = self._slots.get(view.addr)
        if slot is None:
            if not self._vacant:
                self._vacant.append(len(self._views))
                self._views.append(_NOBODY)
                self._kinds.append(_NO_KIND)
            slot = self._slots[view.addr] = self._vacant.pop()
        self._set(slot, view)

    def remove(self, addr: str) -> None:
        """There is no such node any more; no error if there was none."""
        slot = self._slots.pop(addr, None)
        if slot is not None:
            self._set(slot, _NOBODY)
            self._vacant.append(slot)

    def _set(self, slot: int, view: NodeView) -> None:
        before, self._views[slot] = self._views[slot], view
        if before is view:
            return
        if self._ranked_by(before) != self._ranked_by(view):
            self._stock(before, self._kinds[slot].key[1], -1)
            self._move(slot, view)
            self._stock(view, self._kinds[slot].key[1], 1)
            self._touches.append(slot)
            if len(self._touches) > max(TOUCHES, len(self._views) // 2):
                half = len(self._touches) // 2
                del self._touches[:half]
                self._forgotten += half
        if before.here != view.here:
            for uid in before.here:
                del self._homes[uid][slot]
                if not self._homes[uid]:
                    del self._homes[uid]
            for uid, replicas in view.here.items():
                self._homes.setdefault(uid, {})[slot] = replicas
        if before.images is not view.images:
            for image in before.images.keys() - view.images.keys():
                _drop(self._with_image, image, slot)
            for image in view.images.keys() - before.images.keys():
                self._with_image.setdefault(image, set()).add(slot)

    def _ranked_by(self, view: NodeView) -> tuple[object, ...]:
        """All that the rankings and the prices depend on."""
        return (
            view.addr,
            view.connected,
            view.availability,
            view.engine,
            view.gpus,
            view.cpus_free,
            view.memory_free_bytes,
            view.orphans > 0,
            view.replicas < REPLICAS,
            load_cost(view, self._policy),
            unreliable_cost(view, self._policy),
        )

    def _move(self, slot: int, view: NodeView) -> None:
        """To its kind."""
        before, self._kinds[slot] = self._kinds[slot], _NO_KIND
        before.slots.discard(slot)
        if before is not _NO_KIND and not before.slots:
            del self._kind_of[before.key]
        if view is not _NOBODY:
            key = refusal(_ANY, view, self._policy, NODE_FILTERS), view.cards()
            kind = self._kinds[slot] = self._kind_of.setdefault(key, _Kind(key))
            kind.slots.add(slot)

    def _stock(self, view: NodeView, cards: tuple[Card, ...], sign: int) -> None:
        for model, _, free in offered(view, cards):
            self._there[model] += sign * WHOLE
            self._held[model] += sign * (WHOLE - free)

    # The decision.

    def place(self, need: Need, *, time: datetime, subject: str, without: Collection[str] = ()) -> Placement | Refusals:
        """As `placement.place` of all nodes, but for which of those refused are kept as examples.

        Where there is a choice, refusals for the image are counted only of nodes that were looked at.
        """
        market = self._market()
        ranked = self._ranked(need, market)
        ranking = ranked.ranking
        search = _Search(need, self._views, self._homes.get(need.workspace_uid, {}), self._policy)
        price = partial(gpu_price, need, market)
        excluded = {self._slots[addr] for addr in without if addr in self._slots}
        crowded = {
            slot: cost
            for slot in search.crowded()
            if slot not in excluded and (cost := ranking.cost(slot, price)) is not None
        }
        search.run(ranking, price, self._cached(need), excluded | crowded.keys())
        if search.found:
            search.pass_over(crowded)
        else:
            for slot, cost in crowded.items():
                search.look(slot, cost)
        refusals = Counter(ranking.refusals())
        refusals.subtract(why for slot in excluded if (why := ranking.refusal(slot)))
        refusals.update(why for _, why in search.refused)
        refused = (named for named in chain(search.refused, ranking.refused()) if named[0] not in excluded)
        decision = Decision(
            time=time,
            subject=subject,
            chosen=search.found[0][1] if search.found else "",
            candidates=(
                *(
                    rated(need, self._views[slot], ranked.ways(self._kinds[slot])[0], market)
                    for _, _, slot in search.found
                ),
                *(
                    Candidate((view := self._views[slot]).addr, view.name, why)
                    for slot, why in islice(refused, REFUSED_KEPT)
                ),
            ),
            refusals=dict((+refusals).most_common()),
        )
        if not search.found:
            return Refusals(decision)
        addr, slot = search.found[0][1:]
        return Placement(addr, gpu_ids(need, self._views[slot], ranked.ways(self._kinds[slot])[0], market), decision)

    def knows(self, need: Need) -> bool:
        """Are the nodes ranked already for requests of its shape?"""
        return _key(need) in self._rankings

    def _market(self) -> Market:
        prices = {
            model: price(self._held[model] / there, self._policy) for model, there in self._there.items() if there
        }
        return Market(self._policy, self._fragmentation, prices)

    def _cached(self, need: Need) -> Collection[int]:
        """Slots of nodes that may have the image."""
        found = [self._with_image[name] for name in (need.image, need.directory) if name in self._with_image]
        return found[0] if len(found) == 1 else set[int]().union(*found)

    def _ranked(self, need: Need, market: Market) -> _Ranked:
        """The nodes ranked for needs of this shape, as they are now."""
        key = _key(need)
        ranked = self._rankings.pop(key, None)
        if ranked is None or ranked.heeded < self._forgotten:
            if len(self._ways) >= RANKINGS:
                self._ways.clear()
            ranked = _Ranked(need, self._policy, self._ways.setdefault(need.gpu, {}))
            touched = set[int]()
            for kind in self._kind_of.values():
                if why := ranked.ways(kind)[1]:
                    ranked.ranking.refuse_all(kind.slots, why)
                else:
                    touched |= kind.slots
            while len(self._rankings) >= max(1, min(RANKINGS, RANKED // max(1, len(self._views)))):
                del self._rankings[next(iter(self._rankings))]
        else:
            touched = set(self._touches[ranked.heeded - self._forgotten :])
        for slot in touched:
            ranked.rank(slot, self._views[slot], self._kinds[slot], market)
        ranked.heeded = self._forgotten + len(self._touches)
        self._rankings[key] = ranked
        return ranked
