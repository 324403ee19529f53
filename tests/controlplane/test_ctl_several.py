"""`ngpu` with the addresses of several control planes: the one that answers is asked."""

import pytest
from ngpu import dial
from ngpu.v1 import workspace_pb2 as workspace

from controlplane.ctl.problem import Exit
from tests.controlplane.ctl_fakes import FakeControlPlane, Ngpu, a_workspace

#: Nothing listens there.
CLOSED = "127.0.0.1:1"


def test_the_one_that_answers_is_asked(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["ListWorkspaces"] = workspace.ListWorkspacesResponse(workspaces=[a_workspace()])
    assert "img2img" in ngpu("workspace", "list", "--server", f"{CLOSED},{plane.address}").stdout


def test_if_none_answers_all_are_named(ngpu: Ngpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "REACH_S", 0.05)
    said = ngpu("workspace", "list", "--server", f"{CLOSED},127.0.0.1:2", code=Exit.UNREACHABLE).stderr
    assert f"does not answer at {CLOSED},127.0.0.1:2" in " ".join(said.split())


def test_no_address_may_get_the_token_in_the_clear(ngpu: Ngpu) -> None:
    assert "unencrypted" in ngpu("workspace", "list", "--server", f"{CLOSED},192.0.2.1:1", code=Exit.USAGE).stderr
