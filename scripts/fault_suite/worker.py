"""What runs in the suite's containers: does what a request's body says, and writes down every execution it begins and
ends. Standard library only; run as a file or as `python3 -c`.

A request's body is JSON: `token` names the caller's work, `seconds` is how long it takes, `do` (left out: answer with
the token) is what goes wrong: exit, oom, hang, cut, reset, garbage, or `large` (answers `bytes` bytes).

An execution is one line when it begins and one when its answer is about to be written: `B|E token execution replica
time`, appended at once to a file of this process below WORKER_LOG (a directory), and to stdout.

Environment: WORKER_EXIT=code ends at once; WORKER_DEAF=1 never listens; WORKER_SAY is printed first.
"""

import http.server
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from typing import Any

REPLICA = os.environ.get("NGPU_REPLICA") or socket.gethostname()


class Log:
    """Append-only: each line is one write."""

    def __init__(self) -> None:
        self._outputs = [1]
        if directory := os.environ.get("WORKER_LOG"):
            path = f"{directory}/{os.getpid()}-{uuid.uuid4().hex}.log"
            self._outputs.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))

    def note(self, kind: str, token: str, execution: str) -> None:
        line = f"{kind} {token} {execution} {REPLICA} {time.time():.6f}\n".encode()
        for output in self._outputs:
            os.write(output, line)


LOG = Log()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.answer(b"ready")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            work: dict[str, Any] = json.loads(body)
        except ValueError:
            work = {"token": f"body-of-{len(body)}"}
        token, execution = str(work["token"]), uuid.uuid4().hex
        LOG.note("B", token, execution)
        time.sleep(float(work.get("seconds", 0)))
        if what := work.get("do"):
            getattr(self, "go_" + what)(work)
        LOG.note("E", token, execution)
        if not self.close_connection:
            self.answer(b"x" * int(work["bytes"]) if what else token.encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def go_large(self, _: dict[str, Any]) -> None:
        """The answer follows."""

    def go_exit(self, work: dict[str, Any]) -> None:
        os._exit(int(work.get("code", 3)))

    def go_oom(self, _: dict[str, Any]) -> None:
        held = []
        while True:
            held.append(b"x" * (16 * 1024 * 1024))

    def go_hang(self, _: dict[str, Any]) -> None:
        threading.Event().wait()

    def go_cut(self, _: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    def go_reset(self, _: dict[str, Any]) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def go_garbage(self, _: dict[str, Any]) -> None:
        self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Executions are noted by themselves."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error here."""


def main() -> None:
    if text := os.environ.get("WORKER_SAY"):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    if code := os.environ.get("WORKER_EXIT"):
        sys.exit(int(code))
    # The first process of a container has no default action for SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if os.environ.get("WORKER_DEAF"):
        threading.Event().wait()
    # NGPU_PORT_<declared>: the process engine cannot give the declared port itself.
    ports = sorted({int(port) for name, port in os.environ.items() if name.startswith("NGPU_PORT_")}) or [8080]
    Server(("", ports[0]), Handler).serve_forever()


if __name__ == "__main__":
    main()
