"""Following a task to its end, with its answer written as it comes, over as many streams as it takes."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import grpc
from ngpu.v1 import http_pb2
from ngpu.v1 import task_pb2 as pb

from controlplane.ctl.problem import Exit, Problem
from controlplane.ctl.session import Session
from controlplane.ctl.units import duration_text

RETRY_S: Final = 1.0
ENDED: Final = frozenset({pb.TASK_STATE_COMPLETED, pb.TASK_STATE_FAILED, pb.TASK_STATE_CANCELLED})


class Sink(Protocol):
    """Where an answer's body goes."""

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def restart(self) -> None:
        """Forget all that was written: another attempt answers. Raises Problem if that cannot be."""


def state_name(state: pb.TaskState.ValueType) -> str:
    """`running`."""
    return pb.TaskState.Name(state).removeprefix("TASK_STATE_").lower()


def follow(
    session: Session, task_id: str, limit_s: float, sink: Sink | None, *, sleep: Callable[[float], None] = time.sleep
) -> tuple[pb.Task, http_pb2.HttpResponse]:
    """The task at its end and the head of its answer; the body has gone to `sink`.

    A stream that breaks is taken up again where it broke. Raises Problem, also when `limit_s` is over first: the task
    goes on.
    """
    deadline = time.monotonic() + limit_s
    task, head = pb.Task(), http_pb2.HttpResponse()
    offset, begun = 0, 0  # what was written, and of which attempt
    part = pb.WatchRequest.PART_UNSPECIFIED if sink else pb.WatchRequest.PART_NONE
    with session.out.waiting() as waiting:
        while (rest := deadline - time.monotonic()) > 0:
            try:
                request = pb.WatchRequest(task_id=task_id, part=part, offset=offset)
                for event in session.stream(session.tasks.Watch, request, limit_s=rest):
                    if event.HasField("task"):
                        task = event.task
                        waiting(news(task))
                        if sink and offset and begun and task.attempt != begun:
                            sink.restart()
                            offset = begun = 0
                            break
                    if event.HasField("head"):
                        head = event.head
                    if event.data and sink:
                        waiting("")
                        sink.write(event.data)
                        offset, begun = offset + len(event.data), begun or task.attempt
                else:
                    if task.state in ENDED:
                        return task, head
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    break
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not task.task_id:
                    raise session.problem(error) from error
            sleep(min(RETRY_S, max(0.0, deadline - time.monotonic())))
    state = state_name(task.state) if task.state else "unknown"
    raise Problem(f"Not ended within {duration_text(limit_s)} ({state}). It goes on: ngpu task result {task_id}")


def news(task: pb.Task) -> str:
    """What there is to say of a task that has not ended."""
    if task.state == pb.TASK_STATE_QUEUED:
        wait = f", about {duration_text(task.expected_wait.ToTimedelta().total_seconds())} to go"
        return "".join(
            (
                f"queued, {task.queue_position} before it",
                wait if task.HasField("expected_wait") else "",
                f": {task.waiting_for}" if task.waiting_for else "",
            )
        )
    return state_name(task.state)


def check_outcome(task: pb.Task, head: http_pb2.HttpResponse) -> None:
    """Raises Problem unless the container answered with success."""
    if task.state == pb.TASK_STATE_CANCELLED:
        raise Problem("The task was cancelled.")
    if task.state != pb.TASK_STATE_COMPLETED:
        raise Problem(f"The task failed: {task.failure.message} ({task.failure.reason})")
    if head.status >= 400:
        raise Problem(f"The container answered with status {head.status}.")


@contextlib.contextmanager
def sink_for(path: Path | None) -> Iterator[Sink]:
    """A file, which appears only when it is whole, or stdout (None or `-`)."""
    if path is None or str(path) == "-":
        yield _Stdout(sys.stdout.buffer, to_terminal=sys.stdout.isatty())
        return
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            yield _File(file)
        partial.replace(path)
    except OSError as error:
        raise Problem(f"{path} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


class _File:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()


class _Stdout:
    def __init__(self, file: BinaryIO, *, to_terminal: bool) -> None:
        self._file = file
        self._to_terminal = to_terminal

    def write(self, data: bytes) -> None:
        # A terminal would obey what is in it.
        if self._to_terminal and any((byte < 32 and byte not in b"\t\n\r") or byte == 127 for byte in data):
            raise Problem("The answer is not text; write it to a file with --output FILE.", Exit.USAGE)
        self._file.write(data)
        self._file.flush()

    def restart(self) -> None:
        raise Problem(
            "The node was lost while it answered, and the task runs anew: get it again with `ngpu task result`."
        )
