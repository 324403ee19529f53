"""What runs in the containers of test_raw.py: a model server as people write them, and HTTP's odder corners.

Listens on the port that NGPU_PORT_8080 names, and where there is an NGPU_PORT_8081 there with WebSockets that echo.

POST /v1/chat/completions   says the last message's words back: at once, or with `stream` one event each, `gap` s apart
GET  /v1/models             the one model there is
GET  /events?n=3&gap=0      n server-sent events: a number and the time at which it was written
GET  /forever?name=x        events until the caller has gone, which /gone?name=x then tells
GET  /silent?name=x         never answers; when its caller has gone, /gone?name=x tells
GET  /gone?name=x           waits until that is so: the time
ANY  /about                 JSON: method, target, headers, the body's length and SHA-256
POST /mirror                the body comes back while it is still being read
GET  /bytes?n=5&chunked=1   n bytes
GET  /cut?n=5               promises twice as many bytes as it sends
GET  /odd                   interim responses, two cookies, a trailer, and its own X-Request-Id
GET  /cached                304 with a Content-Length
"""

import hashlib
import http.server
import json
import os
import select
import signal
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

PIECE = 64 * 1024
GONE: dict[str, float] = {}
CHANGED = threading.Condition()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query).items()}
        self.read = False
        getattr(self, "do_" + url.path.strip("/").replace("/", "_"), self.do_about)(query)
        for _ in self.pieces():
            pass

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = handle_any  # noqa: N815

    # What comes in, and how it is answered.

    def pieces(self) -> Iterator[bytes]:
        if self.read:
            return
        self.read = True
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read1(min(left, PIECE))
            left -= len(piece)
            yield piece

    def head(self, *fields: tuple[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in fields:
            self.send_header(name, value)
        self.end_headers()

    def answer(self, body: bytes, content_type: str = "application/json", status: int = 200) -> None:
        self.head(("Content-Type", content_type), ("Content-Length", str(len(body))), status=status)
        if self.command != "HEAD":
            self.wfile.write(body)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, what: object) -> None:
        self.chunk(b"data: %b\n\n" % (what.encode() if isinstance(what, str) else json.dumps(what).encode()))

    def events_begin(self) -> None:
        self.head(("Content-Type", "text/event-stream; charset=utf-8"), ("Transfer-Encoding", "chunked"))

    def is_gone(self, name: str) -> None:
        with CHANGED:
            GONE[name] = time.time()
            CHANGED.notify_all()

    # What there is.

    def do_v1_chat_completions(self, query: dict[str, str]) -> None:
        asked = json.loads(b"".join(self.pieces()))
        words = asked["messages"][-1]["content"].split(" ")
        common = {"id": "chatcmpl-1", "created": int(time.time()), "model": asked["model"]}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(json.dumps({**common, "object": "chat.completion", "choices": [choice]}).encode())
            return
        self.events_begin()
        for number, word in enumerate(words):
            time.sleep(float(asked.get("gap", 0)) if number else 0)
            choice = {"index": 0, "delta": {"content": word if not number else f" {word}"}, "finish_reason": None}
            said = {"object": "chat.completion.chunk", "choices": [choice], "system_fingerprint": str(time.time())}
            self.event(common | said)
        self.event("[DONE]")
        self.chunk(b"")

    def do_v1_models(self, query: dict[str, str]) -> None:
        model = {"id": "parrot", "object": "model", "created": 1, "owned_by": "ngpu"}
        self.answer(json.dumps({"object": "list", "data": [model]}).encode())

    def do_events(self, query: dict[str, str]) -> None:
        self.events_begin()
        for number in range(int(query.get("n", "3"))):
            self.event({"number": number, "time": time.time()})
            if gap := float(query.get("gap", "0")):
                time.sleep(gap)
        self.chunk(b"")

    def do_forever(self, query: dict[str, str]) -> None:
        self.events_begin()
        try:
            while True:
                self.event({"time": time.time()})
                time.sleep(0.05)
        except OSError:
            self.close_connection = True
            self.is_gone(query["name"])

    def do_silent(self, query: dict[str, str]) -> None:
        select.select([self.connection], [], [])
        self.close_connection = True
        self.is_gone(query["name"])

    def do_gone(self, query: dict[str, str]) -> None:
        with CHANGED:
            CHANGED.wait_for(lambda: query["name"] in GONE, timeout=20)
        self.answer(json.dumps(GONE.get(query["name"])).encode())

    def do_about(self, query: dict[str, str]) -> None:
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces():
            digest.update(piece)
            size += len(piece)
        about = {
            "method": self.command,
            "target": self.path,
            "headers": self.headers.items(),
            "size": size,
            "sha256": digest.hexdigest(),
        }
        self.answer(json.dumps(about).encode())

    def do_mirror(self, query: dict[str, str]) -> None:
        kind = ("Content-Type", self.headers.get("Content-Type", "application/octet-stream"))
        length = self.headers.get("Content-Length")
        self.head(kind, ("Content-Length", length) if length else ("Transfer-Encoding", "chunked"))
        for piece in self.pieces():
            if length:
                self.wfile.write(piece)
            else:
                self.chunk(piece)
        if not length:
            self.chunk(b"")

    def do_bytes(self, query: dict[str, str]) -> None:
        left = int(query["n"])
        chunked = "chunked" in query
        self.head(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(left)))
        while left:
            piece = bytes(min(left, PIECE))
            left -= len(piece)
            self.chunk(piece) if chunked else self.wfile.write(piece)
        if chunked:
            self.chunk(b"")

    def do_cut(self, query: dict[str, str]) -> None:
        size = int(query["n"])
        self.head(("Content-Length", str(2 * size)))
        self.wfile.write(bytes(size))
        self.close_connection = True

    def do_odd(self, query: dict[str, str]) -> None:
        self.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        fields = [("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2"), ("X-Request-Id", "mine"), ("X-NGPU-Not", "x")]
        self.head(*fields, ("Trailer", "X-Sum"), ("Transfer-Encoding", "chunked"))
        self.chunk(b"odd")
        self.wfile.write(b"0\r\nX-Sum: 3\r\n\r\n")

    def do_cached(self, query: dict[str, str]) -> None:
        self.head(("ETag", '"1"'), ("Content-Length", "12345"), status=304)

    def log_message(self, format: str, *args: Any) -> None:
        """Each request, on stdout, so that a test can count them."""
        print(self.command, self.path, flush=True)  # noqa: T201


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error here."""


def websockets(port: int) -> None:
    from websockets.sync.server import ServerConnection, serve

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            if message == "close":
                connection.close(4000, "as you wish")
            else:
                connection.send(message)

    with serve(echo, "", port, max_size=None) as server:
        server.serve_forever()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if port := os.environ.get("NGPU_PORT_8081"):
        threading.Thread(target=websockets, args=(int(port),), daemon=True).start()
    Server(("", int(os.environ.get("NGPU_PORT_8080", "8080"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
