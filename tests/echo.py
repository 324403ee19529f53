"""What runs in test containers: an HTTP server that echoes, and does everything wrong on request. Standard library
only.

Listens on every port that the environment names (`NGPU_PORT_<declared>`), else on 8080. Each request is one line on
stdout, `METHOD PATH`, so that a test can count executions in the container's own log.

ANY  /echo (or anything else)   the request's body, with X-Echo-Method, X-Echo-Path and its Content-Type
GET  /about                     JSON: method, path, headers, environment, uid, pid, cwd, start time
GET  /sleep?s=1                 answers after s seconds
GET  /status?code=503           that status
GET  /stream?n=3&gap=0.1        n chunks with gaps, chunked
GET  /size?n=1000               n bytes
GET  /cut                       promises 1000 bytes, sends 10, closes
GET  /garbage                   no HTTP at all
GET  /hang                      never answers
GET  /exit?code=3               the process ends without answering
GET  /oom                       eats memory until killed
GET  /oomchild                  a child process does, and is killed; answers its return code
GET  /write?path=/x             tries to write a file: "ok" or the error
GET  /connect?host=h&port=p     tries to open a TCP connection: "ok" or the error

Environment: ECHO_EXIT=code ends at once; ECHO_DELAY=s begins to listen after that; ECHO_DEAF=1 never listens;
ECHO_SAY=text is printed first; ECHO_EAT=1 eats memory at start; ECHO_STUBBORN=1 ignores SIGTERM; ECHO_CHILD=1 has a
child that outlives it.
"""

import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import Any

START = time.time()


def eat() -> None:
    held = []
    while True:
        held.append(b"x" * (16 * 1024 * 1024))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one segment, and no waiting for the acknowledgement of the one before.
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_type": "text/plain", **headers}.items():
            self.send_header(name.replace("_", "-").title(), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        sys.stdout.write(f"{self.command} {self.path}\n")
        sys.stdout.flush()
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[-1] for k, v in urllib.parse.parse_qs(url.query).items()}
        body = self.body()
        behaviour = getattr(self, "do_" + url.path.strip("/"), None) if url.path.count("/") == 1 else None
        if behaviour:
            behaviour(query)
        else:
            self.answer(
                body,
                x_echo_method=self.command,
                x_echo_path=self.path,
                content_type=self.headers.get("Content-Type", "application/octet-stream"),
            )

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = handle_any  # noqa: N815

    def do_about(self, query: dict[str, str]) -> None:
        about = {
            "method": self.command,
            "path": self.path,
            "headers": list(self.headers.items()),
            "env": dict(os.environ),
            "uid": os.getuid(),
            "pid": os.getpid(),
            "cwd": str(pathlib.Path.cwd()),
            "start": START,
        }
        self.answer(json.dumps(about).encode(), content_type="application/json")

    def do_sleep(self, query: dict[str, str]) -> None:
        time.sleep(float(query.get("s", "1")))
        self.answer(b"slept")

    def do_status(self, query: dict[str, str]) -> None:
        self.answer(b"as you wish", int(query["code"]))

    def do_size(self, query: dict[str, str]) -> None:
        self.answer(b"x" * int(query["n"]), content_type="application/octet-stream")

    def do_stream(self, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(int(query.get("n", "3"))):
            piece = f"data: {i}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
            time.sleep(float(query.get("gap", "0.1")))
        self.wfile.write(b"0\r\n\r\n")

    def do_cut(self, query: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    def do_garbage(self, query: dict[str, str]) -> None:
        self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
        self.close_connection = True

    def do_hang(self, query: dict[str, str]) -> None:
        threading.Event().wait()

    def do_exit(self, query: dict[str, str]) -> None:
        os._exit(int(query.get("code", "1")))

    def do_oom(self, query: dict[str, str]) -> None:
        eat()

    def do_oomchild(self, query: dict[str, str]) -> None:
        child = subprocess.run([sys.executable, __file__], env={**os.environ, "ECHO_EAT": "1"}, check=False)
        self.answer(str(child.returncode).encode())

    def do_write(self, query: dict[str, str]) -> None:
        try:
            pathlib.Path(query["path"]).write_bytes(b"x")
        except OSError as error:
            self.answer(str(error).encode())
        else:
            self.answer(b"ok")

    def do_connect(self, query: dict[str, str]) -> None:
        try:
            socket.create_connection((query["host"], int(query["port"])), timeout=2).close()
        except OSError as error:
            self.answer(str(error).encode() or b"error")
        else:
            self.answer(b"ok")

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are printed as they arrive."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error here."""


def main() -> None:
    if text := os.environ.get("ECHO_SAY"):
        print(text, flush=True)  # noqa: T201
    if os.environ.get("ECHO_EAT"):
        eat()
    if code := os.environ.get("ECHO_EXIT"):
        sys.exit(int(code))
    if os.environ.get("ECHO_STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        # The first process of a container has no default action for SIGTERM.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if os.environ.get("ECHO_CHILD"):
        subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
    if os.environ.get("ECHO_DEAF"):
        threading.Event().wait()
    time.sleep(float(os.environ.get("ECHO_DELAY", "0")))
    ports = sorted({int(port) for name, port in os.environ.items() if name.startswith("NGPU_PORT_")}) or [8080]
    servers = [Server(("", port), Handler) for port in ports]
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
