"""Webhooks: `ngpu workspace webhook-secret`, and how `ngpu task show` tells what became of one."""

from typing import Annotated

import typer
from ngpu.v1 import task_pb2
from ngpu.v1 import workspace_pb2 as pb
from rich.console import RenderableType

from controlplane.ctl.command import connected
from controlplane.ctl.output import facts, table
from controlplane.ctl.session import Session
from controlplane.ctl.units import duration_text, time_text
from controlplane.ctl.workspaces import Which, app, confirm


@app.command("webhook-secret")
@connected
def webhook_secret(
    session: Session,
    workspace: Which,
    rotate: Annotated[bool, typer.Option("--rotate", help="Make a new one; the old one signs too for a day.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Show the secret that signs what is posted to the callback URLs of a workspace's tasks.

    \b
    Examples:
      ngpu workspace webhook-secret img2img
      ngpu workspace webhook-secret img2img --rotate --yes
    """
    if rotate:
        confirm(f"Give {workspace} a new secret? Receivers must know it within a day.", yes=yes)
        made = session.call(session.workspaces.RotateWebhookSecret, pb.RotateWebhookSecretRequest(workspace=workspace))
        session.out.answer(made, lambda: _secret(made.secret), [made.secret.secret])
        return
    known = session.call(session.workspaces.GetWebhookSecret, pb.GetWebhookSecretRequest(workspace=workspace))
    session.out.answer(known, lambda: _secret(known.secret), [known.secret.secret])


def _secret(secret: pb.WebhookSecret) -> RenderableType:
    before = secret.previous_secret and f"{secret.previous_secret} until {time_text(secret.previous_expire_time)}"
    return facts(secret.secret, [("made", time_text(secret.create_time)), ("before", before)])


def text(webhook: task_pb2.Webhook) -> str:
    """Where a webhook stands, in a line."""
    words = [task_pb2.WebhookState.Name(webhook.state).removeprefix("WEBHOOK_STATE_").lower().replace("_", " ")]
    if webhook.url:
        words.append(f"to {webhook.url}")
    if webhook.tries:
        words.append("posted once" if webhook.tries == 1 else f"posted {webhook.tries} times")
    if webhook.HasField("next_time"):
        words.append(f"next {time_text(webhook.next_time)}")
    return ", ".join(words)


def log(webhook: task_pb2.Webhook) -> RenderableType:
    """Its last posts."""
    rows = [
        (
            one.number,
            time_text(one.time),
            duration_text(one.duration.ToTimedelta().total_seconds()),
            one.error or f"status {one.http_status}",
        )
        for one in webhook.log
    ]
    return table("POST", "TIME", "TOOK", "OUTCOME", rows=rows, right=("POST", "TOOK"))
