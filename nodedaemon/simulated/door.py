"""Where a running simulation is told what shall happen: a Unix socket in its state directory.

A line in, a line out: the words of a fault, or `status`; the answer is JSON, with `error` if it could not be done.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from nodedaemon.errors import NodeError
from nodedaemon.simulated import faults
from nodedaemon.simulated.fleet import Fleet

NAME: Final = "door"
LINE_BYTES: Final = 4096
#: `status` of many nodes is long.
ANSWER_BYTES: Final = 64 * 1024**2
ASK_S: Final = 30.0


class NoSimulation(NodeError):
    """No simulation runs with that state directory."""


class NotDone(NodeError):
    """The simulation could not do that."""


@contextlib.asynccontextmanager
async def open_door(fleet: Fleet, state_dir: Path) -> AsyncIterator[None]:
    """Listen for as long as the block lasts. Raises OSError, also where the path is too long for a socket."""
    path = state_dir / NAME
    path.unlink(missing_ok=True)
    answering: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(fleet, reader, writer), name="door")
        answering.add(task)
        task.add_done_callback(answering.discard)

    server = await asyncio.start_unix_server(connected, path, limit=LINE_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in answering:
            task.cancel()
        path.unlink(missing_ok=True)


async def _serve(fleet: Fleet, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(ASK_S):
            answer = await _answer(fleet, (await reader.readline()).decode(errors="replace").split())
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    except (OSError, TimeoutError, ValueError):
        # Who asked has gone, or never ended the line.
        pass
    finally:
        writer.close()


async def _answer(fleet: Fleet, words: list[str]) -> dict[str, Any]:
    if words == ["status"]:
        return fleet.status()
    try:
        return {"done": await fleet.suffer(faults.parse(words))}
    except ValueError as why:
        return {"error": str(why)}


def ask(state_dir: Path, words: str) -> dict[str, Any]:
    """The answer of the simulation with that state directory. Blocks. Raises NoSimulation, NotDone."""
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(ASK_S)
        try:
            door.connect(str(state_dir / NAME))
            door.sendall(words.encode() + b"\n")
            with door.makefile("rb") as answers:
                line = answers.readline(ANSWER_BYTES)
        except OSError as fault:
            raise NoSimulation(
                f"No simulation answers at {state_dir / NAME} ({fault.strerror or fault}): start one with "
                f"`ngpu simulate --state-dir {state_dir}`."
            ) from None
    if not line.endswith(b"\n"):
        raise NotDone("The simulation ended before it had answered.")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise NotDone(f"The simulation could not do that: {answer['error']}.")
    return answer
