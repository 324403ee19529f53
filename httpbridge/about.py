"""The bridge about itself: is it alive, is it ready, what has it done, what does it speak."""

import asyncio
from importlib import resources

from httpbridge.answers import SUCCESS_MSG
from httpbridge.app import Call
from httpbridge.batch import Batch
from httpbridge.envelope import Said, encode
from httpbridge.errors import Unavailable
from httpbridge.metrics import CONTENT_TYPE, Metrics
from httpbridge.reply import Reply

#: The page needs nothing from anywhere, and nothing that gets into it may fetch or run anything.
_PAGE_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"}


class About:
    """`/healthz`, `/readyz`, `/metrics`, `/openapi.yaml` and `/docs`."""

    def __init__(self, batch: Batch, metrics: Metrics) -> None:
        self._batch = batch
        self._metrics = metrics
        self._openapi = resources.files("httpbridge").joinpath("openapi.yaml").read_bytes()
        self._page = b""
        self.is_stopping = False

    async def health(self, call: Call) -> Reply:  # noqa: ARG002
        """`GET /healthz`: the process answers."""
        return Reply(encode(Said(200, SUCCESS_MSG)))

    async def ready(self, call: Call) -> Reply:  # noqa: ARG002
        """`GET /readyz`: calls can be passed on."""
        if self.is_stopping:
            raise Unavailable("The bridge is stopping")
        if not self._batch.is_up:
            raise Unavailable("The control plane cannot be reached")
        return Reply(encode(Said(200, SUCCESS_MSG)))

    async def metrics(self, call: Call) -> Reply:  # noqa: ARG002
        """`GET /metrics`, for Prometheus."""
        return Reply(self._metrics.text(), content_type=CONTENT_TYPE)

    async def openapi(self, call: Call) -> Reply:  # noqa: ARG002
        """`GET /openapi.yaml`."""
        return Reply(self._openapi, content_type="application/yaml; charset=utf-8")

    async def docs(self, call: Call) -> Reply:  # noqa: ARG002
        """`GET /docs`: openapi.yaml for people."""
        # Made when somebody asks: it takes a tenth of a second, in which calls go on, and 2 MiB that few bridges need.
        self._page = self._page or await asyncio.to_thread(_render, self._openapi)
        return Reply(self._page, content_type="text/html; charset=utf-8", headers=_PAGE_POLICY)


def _render(openapi: bytes) -> bytes:
    from httpbridge.page import render

    return render(openapi)
