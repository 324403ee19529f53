"""`ngpu` on a terminal: a real process on a pseudo-terminal, as a person has it."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ngpu.v1 import task_pb2, workspace_pb2

from tests.controlplane.ctl_fakes import ID, TASK, TOKEN, FakeControlPlane, a_replica, a_task, a_workspace

ROOT = Path(__file__).parents[2]
#: Who runs the tests in the background has Ctrl-C ignored, and it would be here.
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from controlplane.ctl import main; main()"
)


def on_terminal(
    plane: FakeControlPlane,
    *arguments: str,
    typed: str = "",
    started: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> tuple[int, str]:
    """Exit code, and what the terminal was sent without its escape sequences."""
    ours, theirs = pty.openpty()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "HOME": "/nonexistent",
        "NGPU_SERVER": plane.address,
        "NGPU_TOKEN": TOKEN,
    }
    command = [sys.executable, "-c", MAIN, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    started(process)
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # that is how a terminal ends
        pass
    finally:
        process.kill()  # of no effect if it has ended
        code = process.wait()
        os.close(ours)
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode()).replace("\r", "")


def watched(*steps: workspace_pb2.Workspace) -> list[workspace_pb2.WatchWorkspaceResponse]:
    return [workspace_pb2.WatchWorkspaceResponse(workspace=step) for step in steps]


def test_progress_ends_in_a_picture_of_all_replicas(plane: FakeControlPlane) -> None:
    pulling = a_replica(workspace_pb2.REPLICA_STATE_PULLING, progress=40, message="16 of 40 MiB")
    ready = [a_replica(workspace_pb2.REPLICA_STATE_READY, id=f"r-{n}", node_name=f"node-{n}") for n in (1, 2)]
    plane.answers["WatchWorkspace"] = watched(a_workspace(pulling, wanted=2), a_workspace(*ready, wanted=2))
    code, text = on_terminal(plane, "workspace", "show", "img2img", "--wait")
    assert code == 0
    last = text.rstrip().splitlines()[-3:]
    assert "✓ img2img: 2 of 2 replicas ready" in last[0]
    assert [re.split(r"\s{2,}", line.strip())[:2] for line in last[1:]] == [["node-1", "ready"], ["node-2", "ready"]]
    assert all("100%" in line for line in last[1:])


def test_progress_in_vain(plane: FakeControlPlane) -> None:
    pulling = a_replica(workspace_pb2.REPLICA_STATE_PULLING, progress=40, message="16 of 40 MiB")
    plane.answers["WatchWorkspace"] = watched(
        a_workspace(pulling, message="1 replica waits: too little memory", wanted=2)
    )
    code, text = on_terminal(plane, "workspace", "show", "img2img", "--wait", "--timeout", "500ms")
    assert code == 1
    for part in ("pulling", "40%", "16 of 40 MiB", "1 replica waits: too little memory", "Not serving within 500ms"):
        assert part in text


@pytest.mark.parametrize(("typed", "code", "asked"), [("n\n", 1, 0), ("y\n", 0, 1)])
def test_deleting_is_asked_about(plane: FakeControlPlane, typed: str, code: int, asked: int) -> None:
    plane.answers["DeleteWorkspace"] = workspace_pb2.DeleteWorkspaceResponse()
    ended, text = on_terminal(plane, "workspace", "delete", "img2img", typed=typed)
    assert "Delete the workspace img2img? Its queued tasks fail." in text
    assert (ended, len(plane.asked)) == (code, asked)


def test_an_answer_that_is_not_text_is_not_for_a_terminal(plane: FakeControlPlane) -> None:
    events = [
        task_pb2.WatchResponse(task=a_task(task_pb2.TASK_STATE_RUNNING)),
        task_pb2.WatchResponse(data=b"\x89PNG\x1b[2J"),
        task_pb2.WatchResponse(task=a_task(task_pb2.TASK_STATE_COMPLETED)),
    ]
    plane.answers["Schedule"] = task_pb2.ScheduleResponse(task=a_task(task_pb2.TASK_STATE_QUEUED))
    plane.answers["Watch"] = events
    code, text = on_terminal(plane, "task", "submit", "p", "-w", ID, "--wait")
    assert code == 2
    assert TASK in text
    assert "PNG" not in text
    assert "--output FILE" in text


def test_ctrl_c_ends_the_waiting_quietly(plane: FakeControlPlane) -> None:
    def interrupt_once_asked(process: subprocess.Popen[bytes]) -> None:
        def answer(_: object) -> list[workspace_pb2.WatchWorkspaceResponse]:
            process.send_signal(signal.SIGINT)
            return watched(a_workspace())

        plane.answers["WatchWorkspace"] = answer

    code, text = on_terminal(plane, "workspace", "show", "img2img", "--wait", started=interrupt_once_asked)
    assert code == 130
    assert "Traceback" not in text
