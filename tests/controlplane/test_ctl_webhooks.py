"""`ngpu workspace webhook-secret`, and webhooks in `ngpu task`."""

import json
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from ngpu.v1 import task_pb2 as pb
from ngpu.v1 import workspace_pb2

from tests.controlplane.ctl_fakes import ID, FakeControlPlane, Ngpu, a_task, at

OLD, NEW = f"whsec_{'A' * 43}=", f"whsec_{'B' * 43}="


def test_secret(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    secret = workspace_pb2.WebhookSecret(secret=OLD, create_time=at())
    plane.answers["GetWebhookSecret"] = workspace_pb2.GetWebhookSecretResponse(secret=secret)
    assert OLD in ngpu("workspace", "webhook-secret", "img2img").stdout
    assert plane.last().workspace == "img2img"
    assert ngpu("workspace", "webhook-secret", "img2img", "--quiet").stdout == f"{OLD}\n"
    assert json.loads(ngpu("workspace", "webhook-secret", "img2img", "--json").stdout)["secret"]["secret"] == OLD


def test_rotate(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    secret = workspace_pb2.WebhookSecret(secret=NEW, create_time=at(), previous_secret=OLD, previous_expire_time=at(59))
    plane.answers["RotateWebhookSecret"] = workspace_pb2.RotateWebhookSecretResponse(secret=secret)
    shown = ngpu("workspace", "webhook-secret", "img2img", "--rotate", "--yes").stdout
    assert NEW in shown
    assert f"{OLD} until 2" in " ".join(shown.split())
    assert plane.last().workspace == "img2img"


def test_submit_with_a_callback(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    plane.answers["Schedule"] = pb.ScheduleResponse(task=a_task(pb.TASK_STATE_QUEUED, attempt=0))
    ngpu("task", "submit", "x", "-w", ID, "--callback-url", "https://example.com/ended")
    assert plane.last().callback_url == "https://example.com/ended"


def test_show(plane: FakeControlPlane, ngpu: Ngpu) -> None:
    took = Duration()
    took.FromTimedelta(timedelta(seconds=1.5))
    webhook = pb.Webhook(
        id="msg_t",
        url="https://example.com/ended",
        state=pb.WEBHOOK_STATE_WAITING,
        tries=2,
        next_time=at(30),
        log=[
            pb.WebhookTry(number=1, time=at(8), duration=took, error="No answer came within 15 s."),
            pb.WebhookTry(number=2, time=at(13), duration=took, http_status=503, error="The receiver answered 503."),
        ],
    )
    task = a_task(pb.TASK_STATE_COMPLETED, end_time=at(8))
    plane.answers["GetDetail"] = pb.GetDetailResponse(task=task, webhook=webhook)
    shown = " ".join(ngpu("task", "show", task.task_id).stdout.split())
    assert "waiting, to https://example.com/ended, posted 2 times, next 2" in shown
    assert "No answer came within 15 s." in shown
    assert "The receiver answered 503." in shown
    webhook = pb.Webhook(state=pb.WEBHOOK_STATE_DELIVERED, tries=1, log=[pb.WebhookTry(number=1, http_status=204)])
    plane.answers["GetDetail"] = pb.GetDetailResponse(task=task, webhook=webhook)
    shown = " ".join(ngpu("task", "show", task.task_id).stdout.split())
    assert "delivered, posted once" in shown
    assert "status 204" in shown
