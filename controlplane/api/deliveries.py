"""Responses that are on their way from a node to the body store: their heads, and how they ended.

In memory only: after a restart the node says the head again and goes on from the byte that the body store has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.changes import Changes
from controlplane.slots import Response


class Deliveries:
    """By attempt. `changes` is touched with a task's id when a delivery of one of its attempts begins."""

    def __init__(self) -> None:
        self.changes = Changes()
        self._heads: dict[str, Response] = {}
        self._watchers: dict[str, int] = {}
        self._complete: dict[str, int] = {}
