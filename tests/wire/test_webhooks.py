"""The end of a task reaches its callback_url, whatever the receiver does; and its secret only its owner."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from ngpu.v1 import task_pb2 as pb
from ngpu.v1 import workspace_pb2

from controlplane import receivers
from tests.wire.house import DEADLINE_S, Client, House, house, refused, request, until
from tests.wire.node import Node, answered, hold
from tests.wire.test_execute import BODY, Delivery

HERE = {"allow_http": True, "allow_networks": ["127.0.0.0/8"], "first_pause": 0.02, "time_limit": 0.5}
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Post:
    """What a receiver got."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self.path = request.path
        self.headers = request.headers.copy()
        self.body = body
        self.id = request.headers["webhook-id"]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)  # type: ignore[no-any-return]

    def is_signed_with(self, secret: str) -> bool:
        """As any library for Standard Webhooks sees it."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        text = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        wanted = "v1," + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
        return wanted in self.headers["webhook-signature"].split(" ")


class Receiver:
    """Somebody's web server on this machine. `answer`: what it does with a post; the first ones, if it is a list."""

    def __init__(self) -> None:
        self.posts: list[Post] = []
        self.url = ""
        self.answers: list[Answer] = []

    async def take(self, request: web.Request) -> web.StreamResponse:
        self.posts.append(Post(request, await request.read()))
        return await (self.answers.pop(0) if self.answers else says(204))(request)

    async def got(self, number: int = 1) -> list[Post]:
        await until(lambda: len(self.posts) >= number)
        return self.posts


@asynccontextmanager
async def receiving(port: int = 0) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", receiver.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    assert site._server
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    receiver.url = f"http://127.0.0.1:{port}/ended"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def says(status: int, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path, webhooks=HERE) as running:
        yield running


@pytest.fixture
async def workspace(there: House, node: Node) -> workspace_pb2.Workspace:
    workspace = await there.operator.workspace(concurrency=8)
    await there.operator.ready("echo")
    return workspace


async def detail(client: Client, task_id: str) -> pb.GetDetailResponse:
    call = client.tasks.GetDetail(pb.GetDetailRequest(task_id=task_id), metadata=client.auth, timeout=DEADLINE_S)
    return await call  # type: ignore[no-any-return]


async def told(client: Client, task_id: str, *states: "pb.WebhookState.ValueType", tries: int = 0) -> pb.Webhook:
    """The task's webhook once it is in one of these states."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            webhook = (await detail(client, task_id)).webhook
            if webhook.state in states and webhook.tries >= tries:
                return webhook
            await asyncio.sleep(0.005)


async def secret(client: Client, workspace: str = "echo") -> workspace_pb2.WebhookSecret:
    ask = workspace_pb2.GetWebhookSecretRequest(workspace=workspace)
    answer = await client.workspaces.GetWebhookSecret(ask, metadata=client.auth, timeout=DEADLINE_S)
    return answer.secret  # type: ignore[no-any-return]


DELIVERED = pb.WEBHOOK_STATE_DELIVERED
WAITING = pb.WEBHOOK_STATE_WAITING
GIVEN_UP = pb.WEBHOOK_STATE_GIVEN_UP


async def test_end_is_posted_signed(there: House, workspace: workspace_pb2.Workspace, receiver: Receiver) -> None:
    client = there.client(workspace.id)
    accepted = await client.schedule(request(workspace, body=b'{"a":1}', callback_url=receiver.url))
    (post,) = await receiver.got()
    task_id = accepted.task.task_id
    assert (post.path, post.id) == ("/ended", f"msg_{task_id}")
    assert post.headers["Content-Type"] == "application/json"
    assert post.is_signed_with((await secret(client)).secret)
    said = post.json
    assert (said["type"], said["taskID"], said["result_code"], said["msg"]) == (
        "task.completed",
        task_id,
        200,
        "success",
    )
    assert (said["data"], said["result_size"], said["state"], said["http_status"]) == ('{"a":1}', 7, 3, 200)
    assert said["result_url"] == f"/user/queryTask?taskID={task_id}"
    webhook = await told(client, task_id, DELIVERED)
    assert (webhook.url, webhook.tries, len(webhook.log)) == (receiver.url, 1, 1)
    assert (webhook.log[0].http_status, webhook.log[0].error) == (204, "")


async def test_receiver_that_fails_is_tried_again_with_the_same_id(
    there: House, workspace: workspace_pb2.Workspace, receiver: Receiver
) -> None:
    receiver.answers = [says(500), says(302, Location="/elsewhere"), says(404)]
    client = there.client(workspace.id)
    task_id = (await client.schedule(request(workspace, body=b"x", callback_url=receiver.url))).task.task_id
    webhook = await told(client, task_id, DELIVERED)
    # Nobody has followed the redirect.
    assert {post.path for post in receiver.posts} == {"/ended"}
    assert {post.id for post in receiver.posts} == {f"msg_{task_id}"}
    assert len({post.body for post in receiver.posts}) == 1
    assert [one.http_status for one in webhook.log] == [500, 302, 404, 204]
    assert [one.number for one in webhook.log] == [1, 2, 3, 4]
    assert "redirects are not followed" in webhook.log[1].error
    key = (await secret(client)).secret
    assert all(post.is_signed_with(key) for post in receiver.posts)


async def test_receiver_that_wants_no_more_gets_no_more(
    there: House, workspace: workspace_pb2.Workspace, receiver: Receiver
) -> None:
    receiver.answers = [says(410)]
    task_id = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    webhook = await told(there.operator, task_id, GIVEN_UP)
    assert not webhook.HasField("next_time")
    assert "wants no more" in webhook.log[0].error
    assert len(receiver.posts) == 1


async def test_retry_after_is_heeded(there: House, workspace: workspace_pb2.Workspace, receiver: Receiver) -> None:
    receiver.answers = [says(503, Retry_After="3600")]
    task_id = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    webhook = await told(there.operator, task_id, WAITING, tries=1)
    assert 3590 < webhook.next_time.seconds - webhook.log[0].time.seconds <= 3601


async def test_receiver_that_hangs_holds_up_nobody(
    there: House, workspace: workspace_pb2.Workspace, receiver: Receiver
) -> None:
    async with receiving() as hanging:
        hanging.answers = [hangs] * 1000
        # One host by another name: as slow as it is, it has no more than its own share.
        url = hanging.url.replace("127.0.0.1", "127.0.0.2")
        async with receiving_at("127.0.0.2", hanging, int(url.split(":")[2].split("/")[0])):
            for _ in range(30):
                await there.operator.schedule(request(workspace, callback_url=url, wait_s=5.0))
            await hanging.got(4)
            for number in range(30):
                sent = request(workspace, body=b"%d" % number, callback_url=receiver.url, wait_s=5.0)
                await there.operator.schedule(sent)
            await receiver.got(30)
            assert len(hanging.posts) < 30
    assert sorted(int(post.json["data"]) for post in receiver.posts) == list(range(30))


@asynccontextmanager
async def receiving_at(host: str, receiver: Receiver, port: int) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", receiver.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def test_receiver_that_is_not_there(there: House, workspace: workspace_pb2.Workspace) -> None:
    async with receiving() as gone:
        url = gone.url
    task_id = (await there.operator.schedule(request(workspace, callback_url=url))).task.task_id
    webhook = await told(there.operator, task_id, WAITING, tries=2)
    assert webhook.log[0].http_status == 0
    assert webhook.log[0].error == "The receiver refused the connection."
    port = int(url.split(":")[2].split("/")[0])
    async with receiving(port) as back:
        await told(there.operator, task_id, DELIVERED)
        assert len(back.posts) == 1


async def test_answer_is_not_read(there: House, workspace: workspace_pb2.Workspace, receiver: Receiver) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(65536))

    receiver.answers = [endless]
    task_id = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    webhook = await told(there.operator, task_id, DELIVERED)
    assert (webhook.tries, webhook.log[0].http_status) == (1, 200)


async def test_failed_and_cancelled_ends_are_told(there: House, receiver: Receiver) -> None:
    workspace = await there.operator.workspace()
    cancelled = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    deleted = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    assert (await detail(there.operator, deleted)).webhook.state == pb.WEBHOOK_STATE_PENDING
    await there.operator.tasks.Cancel(pb.CancelRequest(task_id=cancelled), metadata=there.operator.auth)
    (post,) = await receiver.got()
    assert (post.json["type"], post.json["taskID"], post.json["result_code"]) == ("task.cancelled", cancelled, 499)
    await there.operator.workspaces.DeleteWorkspace(
        workspace_pb2.DeleteWorkspaceRequest(workspace="echo"), metadata=there.operator.auth
    )
    post = (await receiver.got(2))[1]
    assert (post.json["type"], post.json["taskID"], post.json["state"]) == ("task.failed", deleted, -1)
    assert post.json["error"]["reason"] == "WORKSPACE_DELETED"
    # Its secret outlives it: what is still to be told is signed as ever.
    assert post.is_signed_with((await secret(there.operator, workspace.id)).secret)


async def test_long_response_is_told_by_its_size(there: House, node: Node, receiver: Receiver) -> None:
    workspace = await there.operator.workspace()
    node.answer = hold
    await there.operator.ready("echo")
    task_id = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    (start,) = await node.started()
    delivery = Delivery(node, start.attempt_id)
    await delivery.begin()
    await delivery.send(0, BODY[:70_000], last=True)
    node.end(answered(start.attempt_id, size=70_000, headers={"Content-Type": "image/png"}))
    (post,) = await receiver.got()
    assert (post.json["data"], post.json["data_omitted"], post.json["result_size"]) == ("", True, 70_000)
    assert post.json["content_type"] == "image/png"
    assert post.json["result_url"].endswith(f"?taskID={task_id}")


# Where they may go.


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/x", "https://"),
        ("ftp://example.com/x", "https://"),
        ("https://user:secret@example.com/", "credentials"),
        ("https://127.0.0.1/", "loopback"),
        ("https://localhost:8443/", "loopback"),
        ("https://2130706433/", "loopback"),
        ("https://[::ffff:10.0.0.1]/", "private"),
        ("https://[64:ff9b::7f00:1]/", "loopback"),
        ("https://169.254.169.254/latest/meta-data", "link-local"),
        ("https://example.com/a b", "character"),
        ("https:///x", "no URL"),
        ("x" * 2049, "2048"),
    ],
)
async def test_bad_url_is_refused_with_the_task(tmp_path: Path, url: str, words: str) -> None:
    async with house(tmp_path) as there:
        workspace = await there.operator.workspace()
        with refused(*INVALID, words):
            await there.operator.schedule(request(workspace, callback_url=url))


async def test_name_that_leads_inside_is_not_posted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    # Every name leads here, whatever it led to when the task came.
    monkeypatch.setattr(receivers, "_addresses", lambda _host, port, _family: [(2, 1, 6, "", ("127.0.0.1", port))])
    port = receiver.url.split(":")[2].split("/")[0]
    async with house(tmp_path, webhooks={**HERE, "allow_networks": []}) as there:
        workspace = await there.operator.workspace()
        sent = request(workspace, callback_url=f"http://example.com:{port}/")
        task_id = (await there.operator.schedule(sent)).task.task_id
        await there.operator.tasks.Cancel(pb.CancelRequest(task_id=task_id), metadata=there.operator.auth)
        webhook = await told(there.operator, task_id, WAITING, tries=2)
        assert {one.error for one in webhook.log} == {"The host does not lead to a public address."}
        assert not receiver.posts


# Who may know.


async def redeliver(client: Client, task_id: str, workspace_id: str = "") -> pb.Webhook:
    ask = pb.RedeliverWebhookRequest(task_id=task_id, workspace_id=workspace_id)
    answer = await client.tasks.RedeliverWebhook(ask, metadata=client.auth, timeout=DEADLINE_S)
    return answer.webhook  # type: ignore[no-any-return]


async def test_end_is_posted_once_more_when_its_owner_asks(
    there: House, workspace: workspace_pb2.Workspace, receiver: Receiver
) -> None:
    receiver.answers = [says(410)]
    client = there.client(workspace.id)
    task_id = (await client.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    await told(client, task_id, GIVEN_UP)
    for number, asking in enumerate((client, there.operator), start=2):
        assert (await redeliver(asking, task_id)).url == receiver.url
        await told(client, task_id, DELIVERED, tries=number)
    await redeliver(there.bridge, task_id, workspace.id)
    log = (await told(client, task_id, DELIVERED, tries=4)).log
    assert [one.http_status for one in log] == [410, 204, 204, 204], [one.error for one in log]
    assert {post.id for post in receiver.posts} == {f"msg_{task_id}"}


async def test_nothing_is_posted_once_more_for_strangers_or_without_an_end(
    there: House, node: Node, workspace: workspace_pb2.Workspace, receiver: Receiver
) -> None:
    task_id = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    await told(there.operator, task_id, DELIVERED)
    other = await there.operator.workspace(name="other", replicas=0)
    # A task's id opens its result, and does not make us post.
    with refused(*INVALID, "workspace_id"):
        await redeliver(there.bridge, task_id)
    with refused(*NOT_FOUND):
        await redeliver(there.client(other.id), task_id)
    silent = (await there.operator.schedule(request(workspace))).task.task_id
    with refused(*NOT_FOUND, "no callback_url"):
        await redeliver(there.operator, silent)
    node.answer = hold
    running = (await there.operator.schedule(request(workspace, callback_url=receiver.url))).task.task_id
    with refused(*NOT_FOUND, "not ended"):
        await redeliver(there.operator, running)
    assert len(receiver.posts) == 1


async def test_url_is_its_owners_to_see(there: House, workspace: workspace_pb2.Workspace, receiver: Receiver) -> None:
    url = f"{receiver.url}?token=secret"
    task_id = (await there.operator.schedule(request(workspace, callback_url=url))).task.task_id
    await told(there.operator, task_id, DELIVERED)
    assert (await detail(there.operator, task_id)).webhook.url == url
    assert (await detail(there.client(workspace.id), task_id)).webhook.url == url
    # Whoever has but the task's id.
    other = (await detail(there.bridge, task_id)).webhook
    assert (other.url, other.state) == ("", DELIVERED)


async def test_secret_is_its_owners(there: House) -> None:
    own = await there.operator.workspace("own")
    other = await there.operator.workspace("other")
    known = await secret(there.client(own.id), "")
    assert known.secret.startswith("whsec_")
    assert len(base64.b64decode(known.secret.removeprefix("whsec_"))) == 32
    assert known == await secret(there.operator, "own")
    assert known.secret != (await secret(there.operator, "other")).secret
    with refused(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"):
        await secret(there.client(other.id), own.id)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"):
        await secret(there.bridge, own.id)


async def test_replaced_secret_signs_for_a_while(
    there: House, workspace: workspace_pb2.Workspace, receiver: Receiver
) -> None:
    old = await secret(there.operator)
    rotate = workspace_pb2.RotateWebhookSecretRequest(workspace="echo")
    new = (await there.operator.workspaces.RotateWebhookSecret(rotate, metadata=there.operator.auth)).secret
    assert (new.previous_secret, new.secret != old.secret) == (old.secret, True)
    assert new.previous_expire_time.seconds - new.create_time.seconds == 86_400
    await there.operator.schedule(request(workspace, callback_url=receiver.url))
    (post,) = await receiver.got()
    assert post.is_signed_with(old.secret)
    assert post.is_signed_with(new.secret)


# Restarts.


async def test_what_was_not_delivered_is_after_a_restart(tmp_path: Path) -> None:
    async with receiving() as gone:
        url = gone.url
    async with house(tmp_path, webhooks=HERE) as there:
        workspace = await there.operator.workspace()
        known = await secret(there.operator)
        task_id = (await there.operator.schedule(request(workspace, callback_url=url))).task.task_id
        queued = (await there.operator.schedule(request(workspace, callback_url=url))).task.task_id
        await there.operator.tasks.Cancel(pb.CancelRequest(task_id=task_id), metadata=there.operator.auth)
        await told(there.operator, task_id, WAITING, tries=1)
    async with receiving(int(url.split(":")[2].split("/")[0])) as back, house(tmp_path, webhooks=HERE) as there:
        webhook = await told(there.operator, task_id, DELIVERED)
        assert webhook.tries >= 2
        assert back.posts[0].id == f"msg_{task_id}"
        assert back.posts[0].is_signed_with(known.secret)
        # One that was still queued then knows where its end is to be told.
        await there.operator.tasks.Cancel(pb.CancelRequest(task_id=queued), metadata=there.operator.auth)
        await told(there.operator, queued, DELIVERED)


async def test_same_key_with_another_url_is_another_request(there: House, receiver: Receiver) -> None:
    workspace = await there.operator.workspace()
    first = request(workspace, callback_url=receiver.url, idempotency_key="k")
    assert (await there.operator.schedule(first)).task.task_id == (await there.operator.schedule(first)).task.task_id
    with refused(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT"):
        await there.operator.schedule(request(workspace, callback_url=f"{receiver.url}2", idempotency_key="k"))
