"""Webhooks on the wire: their secrets (WorkspaceService), what became of a task's (GetDetail), and to have it again."""

from collections.abc import Callable
from datetime import datetime

import structlog
from ngpu.v1 import task_pb2
from ngpu.v1 import workspace_pb2 as pb

from controlplane import signatures, webhooks
from controlplane.api import translate
from controlplane.api.gate import Caller
from controlplane.api.owners import Owners
from controlplane.api.workspaces import WorkspaceApi
from controlplane.errors import NotFound
from controlplane.model import Task, Told, Webhook, WebhookSecret
from controlplane.signatures import Signatures
from controlplane.store import Store

_log = structlog.get_logger(__name__)

_STATES = {
    Told.WAITING: task_pb2.WEBHOOK_STATE_WAITING,
    Told.DELIVERED: task_pb2.WEBHOOK_STATE_DELIVERED,
    Told.GIVEN_UP: task_pb2.WEBHOOK_STATE_GIVEN_UP,
}


class WebhookApi:
    """The methods about webhooks, of both services."""

    def __init__(
        self,
        workspaces: WorkspaceApi,
        owners: Owners,
        store: Store,
        signatures: Signatures,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._workspaces = workspaces
        self._owners = owners
        self._store = store
        self._signatures = signatures
        self._clock = clock

    async def redeliver_webhook(
        self, request: task_pb2.RedeliverWebhookRequest, caller: Caller
    ) -> task_pb2.RedeliverWebhookResponse:
        """See task.proto."""
        why = "only its workspace may have a task's end posted again"
        owner = self._owners.proven(request.workspace_id, caller.principal, why)
        task = await self._store.task(request.task_id)
        if task is None or (owner and task.workspace_uid != owner):
            raise NotFound("There is no such task.")
        if not task.callback_url:
            raise NotFound("The task has no callback_url: nobody is told of its end.")
        if task.end_time is None:
            raise NotFound("The task has not ended: it will be told when it has.")
        await self._store.redeliver_webhook(task.id, self._clock())
        _log.info("webhook_asked_for_again", task_id=task.id, by=caller.principal.id)
        row = await self._store.webhook(task.id)
        return task_pb2.RedeliverWebhookResponse(webhook=webhook_of(task, row, owned=True))

    async def get_webhook_secret(
        self, request: pb.GetWebhookSecretRequest, caller: Caller
    ) -> pb.GetWebhookSecretResponse:
        """See workspace.proto."""
        uid = self._workspaces.find(request.workspace, caller.principal).uid
        return pb.GetWebhookSecretResponse(secret=_secret(await self._signatures.secret(uid)))

    async def rotate_webhook_secret(
        self, request: pb.RotateWebhookSecretRequest, caller: Caller
    ) -> pb.RotateWebhookSecretResponse:
        """See workspace.proto."""
        uid = self._workspaces.find(request.workspace, caller.principal).uid
        row = await self._signatures.rotate(uid)
        _log.info("webhook_secret_rotated", workspace=uid, by=caller.principal.id)
        return pb.RotateWebhookSecretResponse(secret=_secret(row))


def _secret(row: WebhookSecret) -> pb.WebhookSecret:
    return pb.WebhookSecret(
        secret=signatures.shown(row.secret),
        create_time=translate.timestamp(row.create_time),
        previous_secret="" if row.previous_secret is None else signatures.shown(row.previous_secret),
        previous_expire_time=translate.timestamp(signatures.previous_end(row)),
    )


def webhook_of(task: Task, row: Webhook | None, *, owned: bool) -> task_pb2.Webhook:
    """What became of a task's webhook. `row` None: the task has not ended."""
    message = task_pb2.Webhook(
        id=webhooks.webhook_id(task.id),
        url=task.callback_url if owned else "",
        state=task_pb2.WEBHOOK_STATE_PENDING,
    )
    if row is not None:
        message.state = _STATES[row.state]
        message.tries = row.tries
        message.log.extend(
            task_pb2.WebhookTry(
                number=one.number,
                time=translate.timestamp(one.time),
                duration=translate.duration(one.duration_s),
                http_status=one.status,
                error=one.error,
            )
            for one in webhooks.tries_of(row)
        )
        if row.next_time is not None:
            translate.fill_time(message.next_time, row.next_time)
    return message
