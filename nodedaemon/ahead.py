"""Starts that came ahead of their slot: each waits until its replica runs fewer attempts than it may.

So a slot need not stand empty for as long as a result and the next start take on their way.
"""

from typing import NamedTuple

from ngpu.v1 import node_pb2


class Waiting(NamedTuple):
    """A start, and since when it waits (monotonic)."""

    start: node_pb2.Start
    since: float


class Ahead(dict[str, Waiting]):
    """By attempt, in the order in which they came. The control plane sends one for each slot at most."""

    def add(self, start: node_pb2.Start, now: float) -> None:
        """It waits from now on. It is copied: kept itself, it would keep the whole frame that it came in."""
        own = node_pb2.Start()
        own.CopyFrom(start)
        self[start.attempt_id] = Waiting(own, now)

    def first(self, replica_id: str) -> node_pb2.Start | None:
        """Of those that wait for this replica the one that came first."""
        return next((start for start, _ in self.values() if start.replica_id == replica_id), None)
