"""Waiting for a workspace to serve, and showing how far each replica is: live on a terminal, line by line elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc
from ngpu.v1 import workspace_pb2 as pb
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from controlplane.ctl.output import Output, cell, counted, plain
from controlplane.ctl.problem import Problem
from controlplane.ctl.session import Session
from controlplane.ctl.units import duration_text

#: Between attempts to watch again after the stream broke.
RETRY_S: Final = 1.0
#: Elsewhere than on a terminal a line is printed for every so many per cent.
STEP: Final = 10

_STYLES: Final = {
    pb.REPLICA_STATE_READY: "green",
    pb.REPLICA_STATE_BACKOFF: "red",
    pb.REPLICA_STATE_LOST: "red",
    pb.REPLICA_STATE_STOPPING: "dim",
}


def state_text(state: pb.ReplicaState.ValueType) -> Text:
    """`pulling`, in its colour."""
    name = pb.ReplicaState.Name(state).removeprefix("REPLICA_STATE_").lower()
    return Text(name, _STYLES.get(state, "yellow"))


def is_serving(workspace: pb.Workspace) -> bool:
    """All the replicas wanted are ready, and of the newest generation."""
    return workspace.updated_replicas >= workspace.wanted_replicas and not workspace.HasField("delete_time")


def count_text(workspace: pb.Workspace) -> str:
    """`1 of 2 replicas ready`."""
    text = f"{workspace.ready_replicas} of {counted(workspace.wanted_replicas, 'replica')} ready"
    former = workspace.ready_replicas - workspace.updated_replicas
    return f"{text}, {former} of them of an earlier generation" if former else text


def await_serving(
    session: Session,
    name: str,
    limit_s: float,
    *,
    generation: int = 0,
    sleep: Callable[[float], None] = time.sleep,
) -> pb.Workspace:
    """The workspace, once all its replicas are ready, of that generation if one is given.

    Raises Problem if that is not so within `limit_s`, or never will be because the update was taken back.
    """
    with _view(session.out) as show:
        deadline = time.monotonic() + limit_s
        last = pb.Workspace()
        request = pb.WatchWorkspaceRequest(workspace=name)
        while (rest := deadline - time.monotonic()) > 0:
            try:
                for event in session.stream(session.workspaces.WatchWorkspace, request, limit_s=rest):
                    last = event.workspace
                    show(last)
                    if last.HasField("delete_time"):
                        raise Problem(f"The workspace {last.spec.name} has been deleted.")
                    if last.generation < generation:
                        raise Problem(last.message or "The update was taken back.")
                    if is_serving(last):
                        return last
            except grpc.RpcError as error:
                # A control plane that is being restarted is worth waiting for; one that has never answered is not.
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    break
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not last.spec.name:
                    raise session.problem(error) from error
            sleep(min(RETRY_S, max(0.0, deadline - time.monotonic())))
    raise Problem(_too_late(last, name, limit_s))


@contextlib.contextmanager
def _view(out: Output) -> Iterator[Callable[[pb.Workspace], None]]:
    if out.quiet:
        yield lambda _: None
    elif not out.stderr.is_terminal:
        yield _Lines(out).update
    else:
        picture = _Picture()
        with Live(picture, console=out.stderr, refresh_per_second=8):
            yield picture.update


def _too_late(workspace: pb.Workspace, name: str, limit_s: float) -> str:
    reasons = {plain(f"{r.node_name}: {r.message}") for r in workspace.replicas if r.message and not _is_ready(r)}
    why = (plain(workspace.message) or "; ".join(sorted(reasons)[:3])).rstrip(".")
    return (
        f"Not serving within {duration_text(limit_s)}: {count_text(workspace)}{f' ({why})' if why else ''}. It goes on "
        f"being deployed; watch it with `ngpu workspace show {name} --wait`."
    )


def _is_ready(replica: pb.Replica) -> bool:
    return replica.state == pb.REPLICA_STATE_READY


class _Lines:
    """A line for every change of a replica's state and every STEP per cent."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._said: dict[str, tuple[object, ...]] = {}

    def update(self, workspace: pb.Workspace) -> None:
        if workspace.message and not workspace.replicas:
            self._say("", (workspace.message,), f"waiting for a node: {plain(workspace.message)}")
        for replica in workspace.replicas:
            share = f" {replica.progress}%" if 0 < replica.progress < 100 and not _is_ready(replica) else ""
            text = f"{replica.id} on {replica.node_name or replica.node_addr}: {state_text(replica.state)}{share}"
            detail = f" ({replica.message})" if replica.message and not _is_ready(replica) else ""
            # Messages that count bytes change all the time: they alone are no news, unless something is wrong.
            wrong = replica.message if replica.state == pb.REPLICA_STATE_BACKOFF else ""
            self._say(replica.id, (replica.state, replica.progress // STEP, wrong), plain(text + detail))
        if is_serving(workspace):
            self._say("", (), f"{workspace.spec.name}: {count_text(workspace)}")

    def _say(self, key: str, news: tuple[object, ...], text: str) -> None:
        if self._said.get(key) != news:
            self._said[key] = news
            self._out.say(text)


class _Picture:
    """The workspace as a live table: a row a replica, with a bar."""

    def __init__(self) -> None:
        self._workspace: pb.Workspace | None = None
        self._spinner = Spinner("dots")
        self._began = time.monotonic()

    def update(self, workspace: pb.Workspace) -> None:
        self._workspace = workspace

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        workspace = self._workspace
        elapsed = duration_text(round(time.monotonic() - self._began))
        if workspace is None:
            self._spinner.update(text=Text(f"asking the control plane  {elapsed}"))
            yield self._spinner
            return
        head = f"{workspace.spec.name}: {count_text(workspace)}  {elapsed}"
        if is_serving(workspace):
            yield Text(f"✓ {head}", "green")
        else:
            self._spinner.update(text=cell(head, "bold"))
            yield self._spinner
        rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        for _ in range(4):
            rows.add_column(no_wrap=True)
        rows.add_column(overflow="ellipsis", no_wrap=True)
        for replica in workspace.replicas:
            done = 100 if _is_ready(replica) else replica.progress
            bar = ProgressBar(total=100, completed=done, width=24, finished_style="green")
            message = "" if _is_ready(replica) else replica.message
            rows.add_row(
                cell(replica.node_name or replica.node_addr),
                state_text(replica.state),
                bar,
                cell(f"{done}%"),
                cell(message, "dim"),
            )
        waiting = [cell(f"  {workspace.message}", "yellow")] if workspace.message and not is_serving(workspace) else []
        yield Group(rows, *waiting)
