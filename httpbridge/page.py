"""`/docs`: openapi.yaml as one page of HTML, made once, without scripts, fonts or anything from elsewhere.

Renders what our own description uses, no more: another description would need another renderer.
"""

import json
import re
from html import escape
from importlib import resources
from typing import Any, Final

import yaml

_CODE: Final = re.compile(r"`([^`]+)`")
_STRONG: Final = re.compile(r"\*\*([^*]+)\*\*")

#: libyaml's, twenty times as fast, wherever PyYAML was built with it.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Node = dict[str, Any]


def render(openapi: bytes) -> bytes:
    """The page, UTF-8."""
    return _Page(yaml.load(openapi, _LOADER)).html().encode()  # noqa: S506 both loaders are safe ones


class _Page:
    def __init__(self, document: Node) -> None:
        self._document = document

    def html(self) -> str:
        info = self._document["info"]
        style = resources.files("httpbridge").joinpath("page.css").read_text()
        sections = [(tag, list(self._operations(tag["name"]))) for tag in self._document["tags"]]
        contents = "".join(
            f"<h2>{escape(tag['name'])}</h2><ul>{''.join(map(self._link, operations))}</ul>"
            for tag, operations in sections
        )
        body = "".join(
            f"<section><h2>{escape(tag['name'])}</h2>{_text(tag['description'])}"
            f"{''.join(map(self._operation, operations))}</section>"
            for tag, operations in sections
        )
        schemas = "".join(map(self._schema, self._document["components"]["schemas"].items()))
        scheme = self._document["components"]["securitySchemes"]["workspaceId"]
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(info['title'])}</title><style>{style}</style></head><body>"
            f'<nav><a class="top" href="#top">{escape(info["title"])}</a>{contents}'
            '<h2>Reference</h2><ul><li><a href="#schemas">Answers, field by field</a></li>'
            '<li><a href="/openapi.yaml">openapi.yaml</a></li></ul></nav>'
            f'<main id="top"><h1>{escape(info["title"])} <small>{escape(info["version"])}</small></h1>'
            f"{_text(info['description'])}<h3>Credentials</h3>{_text(scheme['description'])}{body}"
            f'<section id="schemas"><h2>Answers, field by field</h2>{schemas}</section></main></body></html>'
        )

    def _operations(self, tag: str) -> list[tuple[str, str, Node]]:
        return [
            (path, method, operation)
            for path, item in self._document["paths"].items()
            for method, operation in item.items()
            if tag in operation["tags"]
        ]

    def _link(self, found: tuple[str, str, Node]) -> str:
        path, method, operation = found
        return f'<li><a href="#{operation["operationId"]}">{_badge(method)} {escape(path)}</a></li>'

    def _operation(self, found: tuple[str, str, Node]) -> str:
        path, method, operation = found
        needs = [scheme for scheme in operation.get("security", []) if scheme]
        return (
            f'<article id="{operation["operationId"]}"><h3>{_badge(method)} <code>{escape(path)}</code>'
            f"{'<span class=key>needs Authorization</span>' if needs else ''}</h3>"
            f'<p class="summary">{escape(operation["summary"])}</p>{_text(operation.get("description", ""))}'
            f"{self._parameters(operation)}{self._body(operation)}{self._responses(operation)}</article>"
        )

    def _parameters(self, operation: Node) -> str:
        rows = []
        for parameter in map(self._resolved, operation.get("parameters", [])):
            schema = self._resolved(parameter["schema"])
            facts = [parameter["in"], "required" if parameter.get("required") else "", _limits(schema)]
            example = f"e.g. <code>{escape(str(parameter['example']))}</code>" if "example" in parameter else ""
            rows.append(
                f"<tr><th><code>{escape(parameter['name'])}</code></th><td>{', '.join(filter(None, facts))}</td>"
                f"<td>{_inline(parameter.get('description', ''))} {example}</td></tr>"
            )
        return f"<h4>Parameters</h4><table>{''.join(rows)}</table>" if rows else ""

    def _body(self, operation: Node) -> str:
        if "requestBody" not in operation:
            return ""
        body = self._resolved(operation["requestBody"])
        types = ", ".join(f"<code>{escape(name)}</code>" for name in body["content"])
        examples = "".join(
            f"<p>{_inline(example.get('summary', name))}</p>{_json(example['value'])}"
            for media in body["content"].values()
            for name, example in media.get("examples", {}).items()
        )
        return f"<h4>Body</h4><p>{_inline(body['description'])} {types}</p>{examples}"

    def _responses(self, operation: Node) -> str:
        rows = []
        for status, reference in operation["responses"].items():
            response = self._resolved(reference)
            shown = "".join(self._media(media) for media in response.get("content", {}).values())
            rows.append(
                f'<details{" open" if status == "200" else ""}><summary><b class="s{status[0]}">{escape(status)}</b> '
                f"{_inline(response['description'])}</summary>{shown}</details>"
            )
        return f"<h4>Answers</h4>{''.join(rows)}"

    def _media(self, media: Node) -> str:
        schema = media["schema"]
        parts = [*schema.get("anyOf", [schema]), *schema.get("properties", {}).values()]
        names = [_name(part) for part in parts if "$ref" in part]
        links = " or ".join(f'<a href="#schema-{name}">{name}</a>' for name in names)
        examples = (
            [media["example"]] if "example" in media else [e["value"] for e in media.get("examples", {}).values()]
        )
        return (f"<p>{links}</p>" if links else "") + "".join(map(_json, examples))

    def _schema(self, item: tuple[str, Node]) -> str:
        name, schema = item
        schema = next((part for part in schema.get("anyOf", []) if part["type"] == "object"), schema)
        rows = []
        for key, field in schema.get("properties", {}).items():
            link = f'<a href="#schema-{_name(field)}">{_name(field)}</a>' if "$ref" in field else ""
            if "$ref" in field.get("items", {}):
                link = f'list of <a href="#schema-{_name(field["items"])}">{_name(field["items"])}</a>'
            rows.append(
                f"<tr><th><code>{escape(key)}</code></th><td>{link or _limits(field)}</td>"
                f"<td>{_inline(field.get('description', ''))}</td></tr>"
            )
        return f'<h3 id="schema-{name}">{name}</h3>{_text(schema.get("description", ""))}<table>{"".join(rows)}</table>'

    def _resolved(self, node: Node) -> Node:
        if "$ref" not in node:
            return node
        found: Any = self._document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return dict(found)


def _badge(method: str) -> str:
    return f'<span class="m {method}">{method.upper()}</span>'


def _name(reference: Node) -> str:
    return str(reference["$ref"].rpartition("/")[2])


def _limits(schema: Node) -> str:
    if "const" in schema:
        return f"always <code>{escape(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(filter(None, map(_limits, schema["anyOf"]))))
    kind = str(schema.get("type", "any JSON"))
    if kind == "array":
        return f"list of {_limits(schema['items'])}"
    if "minimum" in schema and "maximum" in schema:
        return f"{kind}, {schema['minimum']} to {schema['maximum']}"
    return kind


def _json(value: object) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def _inline(text: str) -> str:
    return _STRONG.sub(r"<strong>\1</strong>", _CODE.sub(r"<code>\1</code>", escape(text.strip(), quote=False)))


def _text(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.strip().split("\n\n") if paragraph)
