"""The reverse proxy that one would write with aiohttp in an afternoon: streamed both ways, nothing recorded."""

import sys

from aiohttp import ClientSession, TCPConnector, web

TARGET = web.AppKey("target", str)
SESSION = web.AppKey("session", ClientSession)
HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


async def proxy(request: web.Request) -> web.StreamResponse:
    """Pass one request through."""
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
    body = request.content if request.can_read_body else None
    url = request.app[TARGET] + request.raw_path
    async with request.app[SESSION].request(request.method, url, headers=headers, data=body) as answer:
        response = web.StreamResponse(status=answer.status)
        response.content_type = answer.content_type
        response.content_length = answer.content_length
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def make(target: str) -> web.Application:
    """The application."""
    app = web.Application(client_max_size=1 << 30)
    app[TARGET] = target
    app[SESSION] = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False)
    app.router.add_route("*", "/{path:.*}", proxy)
    return app


if __name__ == "__main__":
    web.run_app(make(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
