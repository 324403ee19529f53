"""Tasks that ended a moment ago or were asked after since: whoever polls is answered without a look into the database.

A task that has ended changes no more, but for its bodies, which are deleted one day: what is shown here may be older
than that by RECENT_S.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from controlplane.tasks import TaskView

#: How long one is kept.
RECENT_S: Final = 30.0
#: How many, and how many bytes with their headers and bodies.
VIEWS: Final = 2000
BYTES: Final = 4 * 1024 * 1024
#: Counted for a view beside that, and for a header beside its text.
VIEW_BYTES: Final = 1024
HEADER_BYTES: Final = 150


class Recent:
    """Ended tasks by id, the oldest first. Bounded by number, bytes and age."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        #: With the time until which it is kept, and its bytes.
        self._views: OrderedDict[str, tuple[TaskView, float, int]] = OrderedDict()
        self._bytes = 0

    def keep(self, view: TaskView) -> None:
        """Remember the task as it is on disk: it must have ended."""
        if view.task_id in self._views:
            return
        size = _size(view)
        self._views[view.task_id] = view, self._monotonic() + RECENT_S, size
        self._bytes += size
        while self._bytes > BYTES or len(self._views) > VIEWS:
            self._bytes -= self._views.popitem(last=False)[1][2]

    def get(self, task_id: str) -> TaskView | None:
        """The task, if it is known here."""
        known = self._views.get(task_id)
        if known is None:
            return None
        view, until, size = known
        if until > self._monotonic():
            return view
        del self._views[task_id]
        self._bytes -= size
        return None


def _size(view: TaskView) -> int:
    response = view.response
    if response is None:
        return VIEW_BYTES
    headers = sum([HEADER_BYTES + len(name) + len(value) for name, value in response.headers])
    return VIEW_BYTES + headers + len(response.body)
