"""BentoML before a container, or with its work as a service (see container.py): python bentoml_service.py PORT HOME."""

# mypy: disable-error-code="import-not-found,no-any-return,untyped-decorator"

import asyncio
import json
import os
import sys
from pathlib import Path

import bentoml
import container

SMALL = json.dumps({"result": "x" * 286})
LARGE = "x" * (4 * 1024 * 1024)
CONTAINER = container.Container()


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 512})
class Work:
    """/w1, /w2, /w3 as in product.py; the fields of a body are the arguments, as BentoML has it."""

    @bentoml.api(route="/w1")
    async def w1(self, btc_address: str, data: str) -> str:  # noqa: ARG002
        return (await CONTAINER.call("/w1", data.encode())).decode() if container.URL else SMALL

    @bentoml.api(route="/w2")
    async def w2(self, btc_address: str, data: str) -> str:  # noqa: ARG002
        if container.URL:
            return (await CONTAINER.call("/w2", data.encode())).decode()
        await asyncio.sleep(0.02)
        return SMALL

    @bentoml.api(route="/w3")
    async def w3(self, btc_address: str, data: str) -> str:  # noqa: ARG002
        return (await CONTAINER.call("/w3", data.encode())).decode() if container.URL else LARGE


def main() -> None:
    here = Path(__file__)
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": sys.argv[2]}
    command = [sys.executable, "-m", "bentoml", "serve", f"{here.stem}:Work", "--working-dir", str(here.parent)]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", sys.argv[1]])  # noqa: S606


if __name__ == "__main__":
    main()
