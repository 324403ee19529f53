"""How webhooks are signed (https://www.standardwebhooks.com), and the secrets they are signed with: one a workspace."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from controlplane import ids
from controlplane.model import WebhookSecret
from controlplane.store import Store

SECRET_BYTES: Final = 32
#: How long a secret that was replaced signs as well.
PREVIOUS_TIME: Final = timedelta(days=1)


def shown(secret: bytes) -> str:
    """A secret as people and verifying libraries know it."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def signature(secret: bytes, webhook_id: str, timestamp: int, body: bytes) -> str:
    """`v1,` and the HMAC-SHA256 of id, seconds since 1970 and body."""
    digest = hmac.digest(secret, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def previous_end(row: WebhookSecret) -> datetime | None:
    """When the secret before ceases to sign; None: there is none."""
    return None if row.previous_secret is None else row.create_time + PREVIOUS_TIME


class Signatures:
    """The secrets, made when they are first asked for."""

    def __init__(
        self, store: Store, *, clock: Callable[[], datetime], random: ids.Random = secrets.token_bytes
    ) -> None:
        self._store = store
        self._clock = clock
        self._random = random

    async def secret(self, workspace_uid: str) -> WebhookSecret:
        """The workspace's. Raises Unavailable."""
        known = await self._store.webhook_secret(workspace_uid)
        return known or await self._store.add_webhook_secret(self._fresh(workspace_uid))

    async def rotate(self, workspace_uid: str) -> WebhookSecret:
        """A new one; the one before signs as well for a while. Raises Unavailable."""
        # Made first if it never was; nobody knows that one, and no harm is done.
        before = await self.secret(workspace_uid)
        fresh = self._fresh(workspace_uid)
        fresh.previous_secret = before.secret
        await self._store.put_webhook_secret(fresh)
        return fresh

    def _fresh(self, workspace_uid: str) -> WebhookSecret:
        return WebhookSecret(workspace_uid=workspace_uid, secret=self._random(SECRET_BYTES), create_time=self._clock())

    async def headers(self, workspace_uid: str, webhook_id: str, body: bytes) -> dict[str, str]:
        """The fields of a post that is made now. Raises Unavailable."""
        row, now = await self.secret(workspace_uid), self._clock()
        timestamp = int(now.timestamp())
        signatures = [signature(row.secret, webhook_id, timestamp, body)]
        end = previous_end(row)
        if row.previous_secret is not None and end is not None and now < end:
            signatures.append(signature(row.previous_secret, webhook_id, timestamp, body))
        return {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signatures),
        }
