"""A job queue behind HTTP, as users elsewhere have to have it: python front.py MODULE PORT, beside the queue's worker.

POST /submit: its body is the work; {"taskID"}. GET /result?taskID=ID: once it is done, {"result_code": 200,
"result_size", "data"}; each result is given once. `submit` and `result` of MODULE may block, or be coroutine functions.
"""

# mypy: disable-error-code="import-not-found"

import asyncio
import importlib
import inspect
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pace
from aiohttp import web

#: Of blocking clients: a thread for each task under way.
THREADS = ThreadPoolExecutor(pace.OUTSTANDING, thread_name_prefix="client")


def awaited(function: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    """It, or it in a thread."""
    if inspect.iscoroutinefunction(function):
        return function

    async def call(argument: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(THREADS, function, argument)

    return call


def answered(said: dict[str, Any]) -> web.Response:
    """JSON as ours, without spaces."""
    return web.Response(text=json.dumps(said, separators=(",", ":")), content_type="application/json")


def make(module: Any) -> web.Application:
    """The application before the client in `module`."""
    send, receive = awaited(module.submit), awaited(module.result)
    handles: dict[str, Any] = {}
    numbers = itertools.count(1)

    async def submit(request: web.Request) -> web.Response:
        handle = await send(await request.text())
        task_id = str(next(numbers))
        handles[task_id] = handle
        return answered({"taskID": task_id})

    async def result(request: web.Request) -> web.Response:
        answer = await receive(handles.pop(request.query["taskID"]))
        return answered({"result_code": 200, "result_size": len(answer), "data": answer})

    app = web.Application()
    app.add_routes([web.post("/submit", submit), web.get("/result", result)])
    return app


if __name__ == "__main__":
    web.run_app(
        make(importlib.import_module(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), access_log=None, print=None
    )
