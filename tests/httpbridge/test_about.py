"""The bridge about itself: its description fits its routes, the page shows all of it, figures count."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import yaml

from httpbridge.page import render
from httpbridge.routes import routes
from tests.httpbridge.conftest import BEARER, Bridge


async def document(bridge: Bridge) -> dict[str, Any]:
    async with bridge.client.get(bridge.url + "/openapi.yaml") as response:
        assert (response.status, response.content_type) == (200, "application/yaml")
        loaded: dict[str, Any] = yaml.safe_load(await response.read())
        return loaded


async def test_the_description_has_every_route_and_no_other(bridge: Bridge) -> None:
    described = {(path, method.upper()) for path, item in (await document(bridge))["paths"].items() for method in item}
    table = routes(*[_Anything()] * 4)  # type: ignore[arg-type]
    served = {(path, method) for path, route in table.items() for method in route.handlers}
    # Of methods under /run there is no end.
    assert described == served | {("/user/{path}", "POST"), ("/run/{path}", "GET"), ("/run/{path}", "POST")}


class _Anything:
    def __getattr__(self, name: str) -> str:
        return name


async def test_the_description_says_nothing_by_halves(bridge: Bridge) -> None:
    """YAML makes half a sentence and an empty key of an unquoted comma, and a number of an unquoted task id."""

    def walk(node: object, path: str) -> None:
        if path.endswith("/error"):
            return
        assert node is not None, path
        if isinstance(node, dict):
            for key, value in node.items():
                assert isinstance(key, str), path
                if key == "$ref":
                    assert resolves(value), value
                if key in ("description", "summary"):
                    assert isinstance(value, str), path
                if key.lower() in ("taskid", "task_id"):
                    assert not isinstance(value, int), path
                walk(value, f"{path}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{path}/{index}")

    def resolves(reference: str) -> bool:
        found: Any = described
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        return bool(found)

    described = await document(bridge)
    walk(described, "")


async def test_every_refusal_is_described_where_it_can_happen(bridge: Bridge) -> None:
    for path, item in (await document(bridge))["paths"].items():
        for operation in item.values():
            if operation["tags"] == ["This service"]:
                continue
            answers = set(operation["responses"])
            assert {"200", "401", "500", "503"} <= answers, path
            assert {"400"} <= answers or not operation.get("parameters"), path


class _Page(HTMLParser):
    """Collects ids, links, and whatever would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.foreign: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.ids |= {attributes["id"] or ""} if "id" in attributes else set()
        self.links |= {attributes["href"] or ""} if "href" in attributes else set()
        if tag in ("script", "link", "img", "iframe") or "src" in attributes:
            self.foreign.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_shows_all_of_it_and_needs_nothing(bridge: Bridge) -> None:
    async with bridge.client.get(bridge.url + "/docs") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
        html = await response.text()
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert page.foreign == []
    assert "url(" not in html
    assert "@import" not in html
    described = await document(bridge)
    for path, item in described["paths"].items():
        assert f">{path}<" in html or f" {path}<" in html
        for operation in item.values():
            assert operation["operationId"] in page.ids
    assert {f"schema-{name}" for name in described["components"]["schemas"]} <= page.ids
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert not [link for link in page.links if not link.startswith(("#", "/"))]


def test_the_page_escapes_what_it_shows() -> None:
    evil = "<script>alert(1)</script>"
    html = render(
        yaml.safe_dump(
            {
                "info": {"title": evil, "version": "1", "description": evil},
                "tags": [{"name": "a", "description": evil}],
                "paths": {
                    "/x": {
                        "get": {
                            "operationId": "x", "tags": ["a"], "summary": evil,
                            "parameters": [{"name": evil, "in": "query", "schema": {"enum": [evil]}, "example": evil}],
                            "responses": {
                                "200": {"description": evil, "content": {"a": {"schema": {}, "example": evil}}}
                            },
                        }
                    }
                },
                "components": {
                    "schemas": {"S": {"properties": {"a": {"const": evil}}}},
                    "securitySchemes": {"workspaceId": {"description": evil}},
                },
            }
        ).encode()
    )  # fmt: skip
    assert b"<script" not in html


async def test_figures(bridge: Bridge) -> None:
    await bridge.post("/user/x", json={}, headers=BEARER)
    await bridge.post("/user/x", json={}, headers=BEARER)
    await bridge.post("/user/x", json={}, headers={"Authorization": "99"})
    await bridge.get("/nonsense")
    async with bridge.client.get(bridge.url + "/metrics") as response:
        assert response.status == 200
        figures = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines() if line[0] != "#")
    assert figures['ngpu_bridge_replies_total{operation="passthrough",status="200"}'] == "2.0"
    assert figures['ngpu_bridge_replies_total{operation="passthrough",status="401"}'] == "1.0"
    assert figures['ngpu_bridge_replies_total{operation="unknown",status="404"}'] == "1.0"
    assert figures['ngpu_bridge_reply_seconds_count{operation="passthrough"}'] == "3.0"
    assert figures['ngpu_bridge_reply_seconds_bucket{le="+Inf",operation="passthrough"}'] == "3.0"
    assert figures["ngpu_bridge_control_plane_up"] == "1.0"
    assert figures["ngpu_bridge_batch_calls_total"] == "3.0"
    assert figures["ngpu_bridge_calls_in_flight"] == "0.0"
    # No credential and no task's id.
    assert not re.search(r"(?<![.\d])\d{20}", json.dumps(figures))
