"""How a container's answer goes to its caller untouched: status, fields in their order, bytes as they come."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import time
from typing import Final

from ngpu.v1 import http_pb2

from httpbridge import headers
from httpbridge.calls import Part
from httpbridge.plain import Request
from httpbridge.reply import Reply, date_line, status_line

#: Of these there is no body, whatever their fields say; nor of the answer to HEAD.
BODILESS: Final = frozenset({101, 204, 304})


class Passed(Reply):
    """An answer and its body: whole, or in pieces as it comes."""

    def __init__(
        self,
        response: http_pb2.HttpResponse,
        body: bytes | AsyncGenerator[bytes, None],
        *,
        method: str,
        task_id: str,
    ) -> None:
        super().__init__(body, status=response.status, task_id=task_id)
        self._bodiless = method == "HEAD" or response.status in BODILESS
        self._fields = headers.back(response, bodiless=self._bodiless)
        if not isinstance(body, bytes):
            # What the container has promised; if it has not, 0.
            self.length = response.body.size or None

    def _head(self, request: Request, framing: str) -> bytes:
        lines = [status_line(self._status)]
        named = set()
        for name, value in self._fields:
            lines.append(f"{name}: {value}")
            named.add(name.lower())
        if "date" not in named:
            lines.append(date_line(int(time())))
        if "x-request-id" not in named:
            lines.append(f"X-Request-Id: {self.request_id}")
        lines.append(f"X-NGPU-Task-Id: {self.task_id}")
        if framing and not self._bodiless:
            lines.append(framing)
        lines += self._connection(request)
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Live(Passed):
    """One that may still be coming. That its caller breaks off ends the task.

    `parts`: of ControlPlane.follow, which sees to that once it has begun; before, `call_off` does.
    """

    def __init__(
        self,
        response: http_pb2.HttpResponse,
        parts: AsyncGenerator[Part, None],
        *,
        method: str,
        task_id: str,
        call_off: Callable[[str], None],
    ) -> None:
        super().__init__(response, self._pieces(parts), method=method, task_id=task_id)
        self._call_off = call_off
        self._begun = False

    async def _pieces(self, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(parts):
            async for part in parts:
                self._begun = True
                if isinstance(part, bytes):
                    yield part

    async def write_eof(self, data: bytes = b"") -> None:
        """See Reply."""
        try:
            await super().write_eof(data)
        except BaseException:
            if not self._begun:
                self._call_off(self.task_id)
            raise
