"""What the soak's workspace runs: a small server as people write them, that takes and gives bodies, events, messages.

Listens on the port that PORT names.

POST /small         answers with 300 bytes of JSON
POST /mirror        the body comes back as it is read
GET  /bytes?n=5     n bytes
GET  /events?n=3&gap=0.1
                    n server-sent events with their numbers, `gap` seconds apart
GET  /socket        a WebSocket that says everything back
"""

import asyncio
import json
import os

from aiohttp import WSMsgType, web

PIECE = 64 * 1024
SMALL = json.dumps({"result": "x" * 286}).encode()


async def small(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=SMALL, content_type="application/json")


async def mirror(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": request.headers.get("Content-Type", "text/plain")})
    answer.content_length = request.content_length
    await answer.prepare(request)
    async for piece in request.content.iter_any():
        await answer.write(piece)
    return answer


async def many(request: web.Request) -> web.StreamResponse:
    left = int(request.query["n"])
    answer = web.StreamResponse()
    answer.content_length = left
    await answer.prepare(request)
    while left:
        await answer.write(bytes(min(left, PIECE)))
        left -= min(left, PIECE)
    return answer


async def events(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for number in range(int(request.query["n"])):
        await answer.write(b"data: %d\n\n" % number)
        await asyncio.sleep(float(request.query["gap"]))
    return answer


async def socket(request: web.Request) -> web.WebSocketResponse:
    answer = web.WebSocketResponse(compress=False, max_msg_size=0)
    await answer.prepare(request)
    async for message in answer:
        if message.type is WSMsgType.BINARY:
            await answer.send_bytes(message.data)
    return answer


def main() -> None:
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.add_routes(
        [
            web.post("/small", small),
            web.post("/mirror", mirror),
            web.get("/bytes", many),
            web.get("/events", events),
            web.get("/socket", socket),
        ]
    )
    web.run_app(app, port=int(os.environ["PORT"]), print=None, access_log=None)


if __name__ == "__main__":
    main()
