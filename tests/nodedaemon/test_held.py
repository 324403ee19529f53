"""Connections that outlive the daemon: each point at which it may be killed, with real sockets and a real keeper."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ngpu.v1 import node_pb2, workspace_pb2

from nodedaemon import held as held_module
from nodedaemon import keeper_link
from nodedaemon.errand import ERRAND_BYTES, counts, pack, unpack
from nodedaemon.held import Held, Hold, Taken

SOON_S = 10.0
REQUEST = b"POST / HTTP/1.1\r\n\r\n"


def start(attempt_id: str = "t.1", **more: Any) -> node_pb2.Start:
    return node_pb2.Start(attempt_id=attempt_id, replica_id="r-1", port=80, run_time_limit_ms=60_000, **more)


def errand(attempt_id: str = "t.1", **more: Any) -> bytes:
    note = pack(start(attempt_id, **more), "c-1", 1000.0, has_gpus=False, job=None)
    assert note
    return note


class Daemon:
    """What a daemon does with its connections, step by step, until it is killed."""

    def __init__(self, state_dir: Path, **options: Any) -> None:
        self.held = Held(state_dir, **options)
        self.socks: list[socket.socket] = [taken.hold.sock for taken in self.held.taken]

    def connect(self, server: "Server") -> tuple[Hold, socket.socket]:
        """The hold on a new connection, and the container's end of it."""
        sock = socket.create_connection(server.listener.getsockname())
        sock.setblocking(False)
        self.socks.append(sock)
        other = server.accept()
        hold = self.held.hold(sock)
        assert hold
        return hold, other

    def note(self, hold: Hold, note: bytes, size: int = len(REQUEST), *, received: int = 0) -> None:
        """As written before a request of that size."""
        now = counts(hold.sock)
        assert now
        hold.note(note, sent=now.sent + size, received=received, now=1001.0)

    async def kill(self) -> None:
        """As SIGKILL does it: nothing is tidied up, the kernel closes what this process had open."""
        await self.given()
        held = self.held
        if held._link is not None:
            held._let_go_of_link().close()
        if held._restart is not None:
            held._restart.cancel()
        for sock in self.socks:
            sock.close()

    async def given(self) -> None:
        """Until the keeper has all."""
        async with asyncio.timeout(SOON_S):
            while self.held._unsent:
                await asyncio.sleep(0.01)


class Server:
    """A container's side."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.socks: list[socket.socket] = []

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(SOON_S)
        self.socks.append(sock)
        return sock


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(listener)
        yield server
        for sock in server.socks:
            sock.close()


Boot = Callable[..., Daemon]


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    """Starts a daemon; each call is one more on the same state directory. The last one stops in order."""
    daemons: list[Daemon] = []

    def begin(**options: Any) -> Daemon:
        daemons.append(Daemon(tmp_path, **options))
        return daemons[-1]

    yield begin
    for daemon in daemons:
        if daemon.held._link is not None:
            for taken in daemon.held.taken:
                taken.hold.discard()
            daemon.held.close()
            for sock in daemon.socks:
                sock.close()


async def succeed(daemon: Daemon, boot: Boot) -> list[Taken]:
    """What the next daemon goes on with."""
    await daemon.kill()
    return boot().held.taken


def read(sock: socket.socket) -> bytes:
    """What comes next on it."""
    sock.settimeout(SOON_S)
    data = sock.recv(100)
    sock.setblocking(False)
    return data


def ended(sock: socket.socket) -> bool:
    """Does the container see that its caller has gone, after all that was sent?"""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(100):
            pass
    return True


async def test_a_request_that_only_waits_is_gone_on_with(boot: Boot, server: Server) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand(streamed=True, response_body_limit_bytes=7))
    hold.sock.send(REQUEST)
    (taken,) = await succeed(first, boot)
    assert taken.errand.start == start(streamed=True, response_body_limit_bytes=7)
    assert (taken.errand.container_id, taken.errand.accepted_at, taken.begun_at) == ("c-1", 1000.0, 1001.0)
    other.send(b"answer")
    assert read(taken.hold.sock) == b"answer"


async def test_an_answer_that_came_while_no_daemon_was_there_is_not_lost(boot: Boot, server: Server) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand())
    hold.sock.send(REQUEST)
    await first.kill()
    assert read(other) == REQUEST
    other.send(b"answer")
    other.close()
    await asyncio.sleep(0.05)
    (taken,) = boot().held.taken
    assert (read(taken.hold.sock), read(taken.hold.sock)) == (b"answer", b"")


async def test_a_container_that_broke_off_while_no_daemon_was_there_is_seen_to_have(boot: Boot, server: Server) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand())
    hold.sock.send(REQUEST)
    await first.kill()
    # With the request unread, that is a reset.
    other.close()
    await asyncio.sleep(0.05)
    (taken,) = boot().held.taken
    with pytest.raises(ConnectionResetError):
        read(taken.hold.sock)


async def test_what_broke_off_is_there_for_a_daemon_that_is_slow_to_take_it(
    boot: Boot, server: Server, tmp_path: Path
) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand())
    (pid,) = keepers(first)
    hold.sock.send(REQUEST)
    await first.kill()
    other.close()
    with contextlib.closing(keeper_link.connect(tmp_path)) as link:
        async with asyncio.timeout(SOON_S):
            # Until the keeper has that daemon, too, and waits for what it says.
            while sockets(pid) < 3:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        found = keeper_link.Found()
        found.take(link)
    ((_, _, sock),) = found.socks
    sock.close()


async def test_daemons_may_be_killed_one_after_the_other(boot: Boot, server: Server) -> None:
    daemon = boot()
    hold, other = daemon.connect(server)
    daemon.note(hold, errand())
    hold.sock.send(REQUEST)
    for _ in range(3):
        await daemon.kill()
        daemon = boot()
        (taken,) = daemon.held.taken
    other.send(b"answer")
    assert read(taken.hold.sock) == b"answer"
    daemon.note(taken.hold, errand("t.2"), received=6)
    taken.hold.sock.send(REQUEST)
    (taken,) = await succeed(daemon, boot)
    assert taken.errand.start.attempt_id == "t.2"


# One after the other, the moments of an exchange on a connection that has done one before.


def nothing_yet(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    """The earlier answer is read, its note still there."""


def note_half_written(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)
    # As it is until the last byte is written.
    daemon.held.memory[held_module._offset(hold.number)] = 0
    hold.sock.send(REQUEST)


def nothing_sent(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)


def sent_in_part(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)
    hold.sock.send(REQUEST[:-1])


def a_byte_read(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)
    hold.sock.send(REQUEST)
    other.send(b"answer")
    hold.sock.settimeout(SOON_S)
    assert hold.sock.recv(1) == b"a"


def answer_read_and_closed(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)
    hold.sock.send(REQUEST)
    other.send(b"answer")
    other.recv(100)
    other.close()
    assert read(hold.sock) == b"answer"


def asked_after_a_job(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    hold.sock.send(REQUEST)


def invalid(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)
    hold.sock.send(REQUEST)
    daemon.held.memory[held_module._offset(hold.number)] = 0


def shut(daemon: Daemon, hold: Hold, other: socket.socket) -> None:
    daemon.note(hold, errand("t.2"), received=6)
    hold.sock.send(REQUEST)
    hold.let_go()


@pytest.mark.parametrize(
    "moment",
    [
        nothing_yet,
        note_half_written,
        nothing_sent,
        sent_in_part,
        a_byte_read,
        answer_read_and_closed,
        asked_after_a_job,
        invalid,
        shut,
    ],
)
async def test_what_cannot_be_gone_on_with_is_shut(
    boot: Boot, server: Server, moment: Callable[[Daemon, Hold, socket.socket], None]
) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand("t.1"))
    hold.sock.send(REQUEST)
    assert read(other) == REQUEST
    other.settimeout(SOON_S)
    other.send(b"answer")
    assert read(hold.sock) == b"answer"
    moment(first, hold, other)
    assert await succeed(first, boot) == []
    assert other.fileno() < 0 or ended(other)


async def test_a_number_s_note_is_not_taken_for_an_older_connection_s(boot: Boot, server: Server) -> None:
    first = boot()
    old, other = first.connect(server)
    await first.given()
    first.note(old, errand("t.1"))
    old.sock.send(REQUEST)
    # As if the keeper had not heard that a newer one has its number: it has the same counts.
    newer = Hold(first.held, old.sock, old.number, old.serial + 1)
    first.note(newer, errand("t.2"), 0)
    assert await succeed(first, boot) == []
    assert ended(other)


async def test_a_connection_that_is_let_go_is_closed_although_the_keeper_has_it(boot: Boot, server: Server) -> None:
    daemon = boot()
    hold, other = daemon.connect(server)
    await daemon.given()
    hold.discard()
    assert ended(other)
    # The keeper lets go of its own accord.
    (pid,) = keepers(daemon)
    async with asyncio.timeout(SOON_S):
        while sockets(pid) > 2:
            await asyncio.sleep(0.01)


def keepers(daemon: Daemon) -> list[int]:
    return [daemon.held._child] if daemon.held._child else []


def sockets(pid: int) -> int:
    """Its listener, its daemon, and the connections."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(entry.readlink()))
    return sum(link.startswith("socket:") for link in links)


async def test_an_orderly_stop_ends_the_keeper(boot: Boot, server: Server) -> None:
    daemon = boot()
    _, other = daemon.connect(server)
    (pid,) = keepers(daemon)
    daemon.held.close()
    assert os.waitpid(pid, 0) == (pid, 0)
    for sock in daemon.socks:
        sock.close()
    assert ended(other)


async def test_what_is_left_at_an_orderly_stop_is_gone_on_with(boot: Boot, server: Server) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand())
    hold.sock.send(REQUEST)
    await first.given()
    assert hold.leave()
    hold.discard()
    first.held.close()
    (taken,) = boot().held.taken
    other.send(b"answer")
    assert read(taken.hold.sock) == b"answer"


async def test_a_keeper_that_nobody_comes_back_to_ends(boot: Boot, server: Server) -> None:
    daemon = boot(return_limit_s=0.3)
    _, other = daemon.connect(server)
    (pid,) = keepers(daemon)
    await daemon.kill()
    began = time.monotonic()
    assert ended(other)
    assert time.monotonic() - began < SOON_S
    assert os.waitpid(pid, 0) == (pid, 0)


async def test_a_keeper_that_was_killed_is_replaced_and_gets_all(boot: Boot, server: Server) -> None:
    first = boot(restart_s=0.05)
    hold, _ = first.connect(server)
    first.note(hold, errand())
    hold.sock.send(REQUEST)
    await first.given()
    (pid,) = keepers(first)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(SOON_S):
        while keepers(first) in ([], [pid]) or first.held._link is None:
            await asyncio.sleep(0.01)
    (taken,) = await succeed(first, boot)
    assert taken.errand.start.attempt_id == "t.1"


async def test_another_version_s_keeper_is_replaced_without_losing_connections(
    boot: Boot, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand())
    hold.sock.send(REQUEST)
    (old,) = keepers(first)
    await first.kill()
    monkeypatch.setattr(held_module, "VERSION", 2)
    second = boot()
    (new,) = keepers(second)
    assert new != old
    assert os.waitpid(old, 0) == (old, 0)
    monkeypatch.undo()
    (taken,) = await succeed(second, boot)
    other.send(b"answer")
    assert read(taken.hold.sock) == b"answer"


async def test_notes_in_another_layout_are_not_read(
    boot: Boot, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = boot()
    hold, other = first.connect(server)
    first.note(hold, errand())
    hold.sock.send(REQUEST)
    monkeypatch.setattr(held_module, "_LAYOUT", b"NGPU errands 2".ljust(held_module.NOTE_BYTES, b"\0"))
    assert await succeed(first, boot) == []
    assert ended(other)


async def test_a_keeper_that_hangs_holds_no_daemon_up(
    boot: Boot, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = boot(return_limit_s=0.3)
    first.connect(server)
    (pid,) = keepers(first)
    await first.kill()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(keeper_link, "TAKE_LIMIT_S", 0.1)
    second = boot()
    assert second.held.taken == []
    hold, _ = second.connect(server)
    second.note(hold, errand())
    hold.sock.send(REQUEST)
    os.kill(pid, signal.SIGCONT)
    assert os.waitpid(pid, 0) == (pid, 0)
    assert len(await succeed(second, boot)) == 1


async def test_more_connections_than_are_held_do_not_fail(boot: Boot, server: Server) -> None:
    daemon = boot(limit=1)
    hold, _ = daemon.connect(server)
    with socket.create_connection(server.listener.getsockname()) as sock:
        server.accept()
        assert daemon.held.hold(sock) is None
        hold.discard()
        assert daemon.held.hold(sock) is not None


async def test_hundreds_at_once_are_all_held(boot: Boot, server: Server) -> None:
    first = boot()
    for number in range(400):
        hold, _ = first.connect(server)
        first.note(hold, errand(f"t.{number}"))
        hold.sock.send(REQUEST)
    taken = await succeed(first, boot)
    assert {one.errand.start.attempt_id for one in taken} == {f"t.{number}" for number in range(400)}


# The note.


def test_a_note_is_read_as_it_was_written() -> None:
    job = node_pb2.Start(attempt_id="t.1", job=workspace_pb2.JobRule(id="/id", ask="GET /jobs/{id}"))
    said = start(record_after_ms=5)
    said.request.method = "HEAD"
    note = pack(said, "c" * 64, 1.5, has_gpus=True, job=job)
    assert note
    read_ = unpack(note)
    assert read_
    assert (read_.is_head, read_.has_gpus, read_.job, read_.accepted_at) == (True, True, job, 1.5)
    assert (read_.container_id, read_.start) == ("c" * 64, start(record_after_ms=5))


@pytest.mark.parametrize(
    ("attempt_id", "container_id", "ask"),
    [("t" * ERRAND_BYTES, "c", ""), ("t", "c" * ERRAND_BYTES, ""), ("t", "", ""), ("t", "c", "x" * ERRAND_BYTES)],
)
def test_what_does_not_fit_is_not_noted(attempt_id: str, container_id: str, ask: str) -> None:
    job = node_pb2.Start(job=workspace_pb2.JobRule(ask=ask)) if ask else None
    assert pack(start(attempt_id), container_id, 0.0, has_gpus=False, job=job) is None


@pytest.mark.parametrize("note", [b"", b"\0" * 20, errand()[:-9], errand().replace(b"\0c-1", b"-c-1")])
def test_what_is_no_note_is_not_read(note: bytes) -> None:
    assert unpack(note) is None
