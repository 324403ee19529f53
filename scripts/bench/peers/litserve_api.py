"""LitServe before a container, or with its work as APIs (see container.py): python litserve_api.py PORT HOME."""

# mypy: disable-error-code="import-not-found,misc,no-any-return"

import asyncio
import json
import sys
from typing import Any

import container
import litserve
from starlette.responses import Response

SMALL = json.dumps({"result": "x" * 286}).encode()
LARGE = b"x" * (4 * 1024 * 1024)


class Work(litserve.LitAPI):
    """One of the paths: what it answers, after how many seconds."""

    def __init__(self, path: str, answer: bytes, seconds: float = 0.0) -> None:
        super().__init__(api_path=path, enable_async=True)
        self.path = path
        self.answer = answer
        self.container = container.Container()
        self.seconds = seconds

    def setup(self, device: str) -> None:
        """Nothing to load."""

    async def decode_request(self, request: dict[str, Any]) -> str:
        data: str = request["data"]
        return data

    async def predict(self, data: str) -> bytes:
        if container.URL:
            return await self.container.call(self.path, data.encode())
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return self.answer

    async def encode_response(self, output: bytes) -> Response:
        return Response(output)


def main() -> None:
    works = [Work("/w1", SMALL), Work("/w2", SMALL, 0.02), Work("/w3", LARGE)]
    server = litserve.LitServer(works, accelerator="cpu", max_payload_size=64 * 1024 * 1024, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)


if __name__ == "__main__":
    main()
