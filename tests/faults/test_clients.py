"""Callers who hang up, dawdle, or send without end: bounded memory and time, and the others are served as before."""

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pytest

from scripts.fault_suite.records import executions
from scripts.fault_suite.rig import Rig, until
from scripts.programs import Program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

Outcome = TypeVar("Outcome")

MIB = 1024 * 1024
AT_ONCE = 8
STALL_S = 2
#: What all of the bad callers together may cost one program: buffers, not bodies.
MEMORY_BYTES = 200 * MIB
#: A good caller's call takes 10 ms. Seconds of it are another program's doing, more would be ours.
SERVED_S = 30.0
REFUSAL_S = 15.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    environment = {"NGPU_BRIDGE_STALL_TIME": f"{STALL_S}s", "NGPU_BRIDGE_BODY_TIME": "6s"}
    with Rig(tmp_path_factory.mktemp("clients") / "state", nodes=1, bridge=environment, small_disks=False) as rig:
        rig.await_whole()
        assert rig.work.run()["result_code"] == 200
        yield rig


def memory_bytes(program: Program) -> int:
    for line in Path(f"/proc/{program.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@contextmanager
def others_unaffected(rig: Rig) -> Iterator[None]:
    """Meanwhile one good caller calls without a pause."""
    took: list[float] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            begin = time.monotonic()
            answer = rig.work.call("POST", "/user/work", json.dumps({"token": "good"}).encode())
            assert answer["result_code"] == 200, answer
            took.append(time.monotonic() - begin)

    programs = [rig.platform.controlplane, rig.node("alpha"), rig.bridge]
    before = [memory_bytes(program) for program in programs]
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(call)
        try:
            yield
        finally:
            stop.set()
        good.result()
    for program, least in zip(programs, before, strict=True):
        assert memory_bytes(program) - least < MEMORY_BYTES, f"{program.name} grew past its bound"
    assert took
    assert max(took) < SERVED_S, f"median {statistics.median(took):.3f} s, worst {max(took):.3f} s"


def connect(rig: Rig, headers: str, *, small_buffer: bool = False) -> socket.socket:
    """A connection on which a call's head was sent."""
    url = urlsplit(rig.platform.url)
    connection = socket.socket()
    if small_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.settimeout(30)
    connection.connect((url.hostname, url.port))
    head = f"POST /user/work HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {rig.work.bearer}\r\n{headers}\r\n"
    connection.sendall(head.encode())
    return connection


def all_at_once(what: Callable[[], Outcome]) -> list[Outcome]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [done.result() for done in [pool.submit(what) for _ in range(AT_ONCE)]]


def rest_of(connection: socket.socket) -> bytes:
    """What still comes until the other side closes."""
    parts = []
    while True:
        try:
            part = connection.recv(64 * 1024)
        except ConnectionError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def test_hanging_up_in_the_middle_of_an_upload_begins_nothing(rig: Rig) -> None:
    def hang_up() -> None:
        with connect(rig, f"Content-Length: {4 * MIB}\r\n") as connection:
            connection.sendall(b"x" * MIB)

    with others_unaffected(rig):
        all_at_once(hang_up)
    assert not [one for one in executions(rig.worker_logs) if one.token.startswith("body-of-")]


def test_hanging_up_in_the_middle_of_a_download_frees_what_it_held(rig: Rig) -> None:
    body = json.dumps({"token": "half-read", "do": "large", "bytes": 32 * MIB}).encode()

    def hang_up() -> None:
        with connect(rig, f"Content-Length: {len(body)}\r\n") as connection:
            connection.sendall(body)
            assert connection.recv(64 * 1024).startswith(b"HTTP/1.1 200")

    with others_unaffected(rig):
        all_at_once(hang_up)
        until(lambda: not spooled(rig), 20, "the node's spool to be empty")


def test_who_reads_nothing_is_cut_off(rig: Rig) -> None:
    body = json.dumps({"token": "unread", "do": "large", "bytes": 32 * MIB}).encode()

    def dawdle() -> int:
        with connect(rig, f"Content-Length: {len(body)}\r\n", small_buffer=True) as connection:
            connection.sendall(body)
            assert connection.recv(1)
            time.sleep(STALL_S + 4)
            return len(rest_of(connection))

    with others_unaffected(rig):
        assert all(read < 32 * MIB for read in all_at_once(dawdle))


def test_who_sends_too_slowly_is_cut_off(rig: Rig) -> None:
    def dawdle() -> bytes:
        with connect(rig, "Content-Length: 1000\r\n") as connection:
            begin = time.monotonic()
            try:
                # Never so slow as to stall, and never done.
                while time.monotonic() - begin < 20:
                    connection.sendall(b"x")
                    time.sleep(0.5)
            except ConnectionError:
                pass
            return rest_of(connection)

    begin = time.monotonic()
    with others_unaffected(rig):
        answers = all_at_once(dawdle)
    assert time.monotonic() - begin < 18, "cut off by body_time, not by us"
    assert all(not answer or b" 408 " in answer[:20] for answer in answers)


@pytest.mark.parametrize("chunked", [False, True], ids=["told", "chunked"])
def test_ten_gigabytes_are_refused_long_before_they_are_read(rig: Rig, chunked: bool) -> None:
    ten_gb = 10 * 1024 * MIB
    piece = b"%x\r\n%b\r\n" % (MIB, b"x" * MIB) if chunked else b"x" * MIB

    def send() -> tuple[int, bytes]:
        with connect(
            rig, "Transfer-Encoding: chunked\r\n" if chunked else f"Content-Length: {ten_gb}\r\n"
        ) as connection:
            sent = 0
            try:
                while sent < ten_gb:
                    connection.sendall(piece)
                    sent += len(piece)
            except OSError:
                pass
            return sent, rest_of(connection)

    begin = time.monotonic()
    with others_unaffected(rig):
        sent, answer = send()
    # It is refused at once, and listened to for a moment more, so that the refusal is not lost in a reset.
    assert time.monotonic() - begin < REFUSAL_S
    assert sent < ten_gb
    assert not answer or b" 413 " in answer[:20]


def spooled(rig: Rig) -> list[Path]:
    return list((rig.state / "alpha").glob("**/*.body"))
