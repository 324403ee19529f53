"""A container that is asynchronous itself, as those of the original are. Standard library only.

One job at a time; the others are told that it is busy. Each execution is one line on stdout, `RUN id`, so that a test
can count them in the container's own log; each request is `METHOD PATH`.

POST   /removeBG?...        begins a job with the body's JSON: {"task_id": id, "result_code": 100, ...}; 203: busy
GET    /removeBG?taskID=id  101 waiting, 102 running, 100 done (with "image"), 104 failed; 404 for an id not known
DELETE /removeBG?taskID=id  ends the job
POST   /plain               result_code 100 without an id: no job, the body comes back
ANY    /busy?n=3            the next n posts to /removeBG are refused as busy

The job's JSON: {"s": seconds, "fail": words, "size": bytes of the image, "echo": anything}; all may be left out.
"""

import http.server
import json
import os
import signal
import sys
import threading
import time
import urllib.parse
import uuid
from typing import Any

QUEUED_S = 0.1
_lock = threading.Lock()
_jobs: dict[str, dict[str, Any]] = {}
_refusals = [0]


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def begin(wanted: dict[str, Any]) -> dict[str, Any]:
    with _lock:
        if _refusals[0]:
            _refusals[0] -= 1
            return {"result_code": 203, "msg": "server is busy"}
        if any(code_of(job) in (101, 102) for job in _jobs.values()):
            return {"result_code": 203, "msg": "server is busy"}
        job_id = str(uuid.uuid4())
        _jobs[job_id] = {**wanted, "began": time.monotonic()}
    say(f"RUN {job_id}")
    return {"task_id": job_id, "result_code": 100, "msg": "SUCCESS! The task is currently in the queue"}


def code_of(job: dict[str, Any]) -> int:
    passed = time.monotonic() - job["began"]
    if job.get("ended"):
        return 104
    if passed < QUEUED_S:
        return 101
    if passed < QUEUED_S + float(job.get("s", 0)):
        return 102
    return 104 if job.get("fail") else 100


def stand(job_id: str) -> tuple[int, dict[str, Any]]:
    job = _jobs.get(job_id)
    if job is None:
        return 404, {"result_code": 404, "msg": f"no task {job_id}"}
    code = code_of(job)
    said = {"task_id": job_id, "result_code": code, "msg": {101: "waiting", 102: "running", 100: "success"}.get(code)}
    if code == 104:
        said["msg"] = job.get("fail") or "ended"
    if code == 100:
        said |= {"image": "x" * int(job.get("size", 8)), "echo": job.get("echo"), "pid": os.getpid()}
    return 200, said


# Names of methods are http.server's.
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True

    def answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        say(f"{self.command} {self.path}")
        status, said = 200, {}
        if url.path == "/busy":
            _refusals[0] = int(query["n"])
        elif url.path == "/plain":
            said = {"result_code": 100, "msg": "done at once", "echo": body.decode()}
        elif self.command == "POST":
            said = begin(json.loads(body or b"{}"))
        elif self.command == "DELETE":
            _jobs[query["taskID"]]["ended"] = True
            say(f"END {query['taskID']}")
        elif "taskID" in query:
            status, said = stand(query["taskID"])
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are printed as they arrive."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error here."""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ports = sorted({int(port) for name, port in os.environ.items() if name.startswith("NGPU_PORT_")}) or [8080]
    say(f"listening, {sys.version}")
    Server(("", ports[0]), Handler).serve_forever()


if __name__ == "__main__":
    main()
