"""Futures of the hot path: who waits is called at once, not by the event loop a round later."""

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any, Self, TypeVar

Result = TypeVar("Result")


class DirectFuture(asyncio.Future[Result]):
    """Calls its first callback within `set_result` and `set_exception`; others, and those of `await`, as ever.

    The callback must be one that may be called wherever the result is set. Three of them a call, each through a handle
    of the loop with its context, were a twentieth of what a call costs.
    """

    _first: Callable[[Any], Any] | None = None

    def add_done_callback(self, fn: Callable[[Self], Any], /, *, context: Context | None = None) -> None:
        """As a future's; after the end, or with a context, through the loop."""
        if context is not None or self._first is not None or self.done():
            super().add_done_callback(fn, context=context)
        else:
            self._first = fn

    def remove_done_callback(self, fn: Callable[[Self], Any], /) -> int:
        """As a future's."""
        removed = super().remove_done_callback(fn)
        if self._first == fn:
            self._first = None
            removed += 1
        return removed

    def set_result(self, result: Result, /) -> None:
        """As a future's."""
        super().set_result(result)
        if self._first is not None:
            self._call_first()

    def set_exception(self, exception: type | BaseException, /) -> None:
        """As a future's."""
        super().set_exception(exception)
        if self._first is not None:
            self._call_first()

    def cancel(self, msg: Any = None) -> bool:
        """As a future's: the callback is called later, not within whatever cancels."""
        cancelled = super().cancel(msg)
        if cancelled and self._first is not None:
            self.get_loop().call_soon(self._call_first)
        return cancelled

    def _call_first(self) -> None:
        first, self._first = self._first, None
        if first is None:
            return
        try:
            first(self)
        except Exception as error:
            # As the loop does: whoever sets the result has no part in it.
            self.get_loop().call_exception_handler(
                {"message": "Exception in a callback of a future", "exception": error, "future": self}
            )
