"""Ray Serve before a container, or with its work as a deployment (see container.py): python ray_serve.py PORT HOME."""

# mypy: disable-error-code="attr-defined,import-not-found,untyped-decorator"

import asyncio
import json
import signal
import sys
import threading

import container
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

SMALL = json.dumps({"result": "x" * 286}).encode()
LARGE = b"x" * (4 * 1024 * 1024)


@serve.deployment(num_replicas=1, max_ongoing_requests=512)
class Work:
    """/w1, /w2, /w3 as in product.py."""

    def __init__(self) -> None:
        self.container = container.Container()

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        path = request.url.path
        if container.URL:
            return Response(await self.container.call(path, body))
        if path == "/w2":
            await asyncio.sleep(0.02)
        return Response(LARGE if path == "/w3" else SMALL)


def main() -> None:
    port, directory = int(sys.argv[1]), sys.argv[2]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ray.init(include_dashboard=False, _temp_dir=directory, log_to_driver=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Work.bind())
    while not ended.wait(1):
        pass
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
