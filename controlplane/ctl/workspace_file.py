"""A workspace as people write it down, in TOML, read into the API's WorkspaceSpec with every fault named at once.

    name = "img2img"
    image = "registry.example/img2img:1"
    command = ["python3", "server.py"]
    ports = [8080]
    memory = "16GiB"

    [gpu]
    model = "RTX 4090"
    count = 1

    [volumes]
    models = "/models"

A container that answers at once and works on is declared with `async = "ngpu-classic"`, or with tables [[async]].

Only what the file alone can tell is judged here: names, types, units. The rest is the control plane's to judge.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ngpu.v1 import workspace_pb2 as pb

from controlplane.ctl.units import duration_message, parse_duration, parse_size

#: Descriptions are a few hundred bytes.
FILE_BYTES: Final = 256 * 1024
_UINT32: Final = 2**32 - 1

Document = Mapping[str, Any]


class SpecFault(Exception):
    """The description cannot be used; the message names every fault, a line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise _wrong('text, such as "abc"', value)


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _UINT32:
        return value
    raise _wrong("a whole number from 0 up", value)


def _port(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
        return value
    raise _wrong("a port from 1 to 65535", value)


def _number(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6:
        return float(value)
    raise _wrong("a number", value)


def _share(value: object) -> int:
    share = round(_number(value) * 1000)
    if not 1 <= share <= 999:
        raise _wrong("a part of one GPU, such as 0.25", value)
    return share


def _volumes(value: object) -> list[dict[str, str]]:
    """A table of names and paths, or a list of tables with both."""
    wanted = 'a table of names and paths, such as models = "/models"'
    if isinstance(value, dict):
        value = [{"name": name, "path": path} for name, path in value.items()]
    if not isinstance(value, list):
        raise _wrong(wanted, value)
    for volume in value:
        if not isinstance(volume, dict) or volume.keys() != {"name", "path"}:
            raise _wrong('tables with "name" and "path"', volume, "each of the list ")
    return [{"name": _text(volume["name"]), "path": _text(volume["path"])} for volume in value]


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _wrong("true or false", value)


def _list_of(read: Callable[[object], Any], example: str) -> Callable[[object], list[Any]]:
    def read_all(value: object) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(f"a list, such as {example}", value)
        return [read(item) for item in value]

    return read_all


def _environment(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wrong("a table of names and values", value)
    for name, content in value.items():
        if not isinstance(content, str | int | float) or isinstance(content, bool):
            raise _wrong('text, such as "abc"', content, name + " ")
    return {name: str(content) for name, content in value.items()}


def _duration(value: object) -> object:
    return duration_message(parse_duration(value))


def _strings(value: object) -> list[str]:
    """Text or a number, or several."""
    words = value if isinstance(value, list) else [value]
    for word in words:
        if not isinstance(word, str | int | float):
            raise _wrong("text or a number, or a list of them", word)
    return [str(word).lower() if isinstance(word, bool) else str(word) for word in words]


def _job_rules(value: object) -> list[dict[str, Any]]:
    """A preset's name, or rules as tables."""
    if isinstance(value, str):
        return [{"preset": value}]
    rules = value if isinstance(value, list) else [value]
    return [_job_rule(rule) for rule in rules]


def _job_rule(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong('a preset, such as "ngpu-classic", or tables, [[async]]', value)
    rule = {}
    for name, content in value.items():
        if name not in _JOB_KEYS:
            near = difflib.get_close_matches(name, _JOB_KEYS, 1, cutoff=0.5)
            raise ValueError(
                f"{name}: is not known; "
                + (f"did you mean {near[0]}?" if near else f"known are {', '.join(_JOB_KEYS)}")
            )
        try:
            rule[name] = _JOB_KEYS[name](content)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return rule


def _wrong(wanted: str, value: object, what: str = "") -> ValueError:
    return ValueError(f"{what}must be {wanted}, not {_kind(value)}")


def _kind(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str() | int() | float():
            return repr(value)
        case list():
            return "a list"
        case dict():
            return "a table"
        case _:
            return f"a {type(value).__name__}"


@dataclass(frozen=True)
class _Key:
    """How a key is read, and the field of the message that it fills."""

    field: str
    read: Callable[[object], Any]


_KEYS: Final[Mapping[str, _Key]] = {
    "name": _Key("name", _text),
    "image": _Key("image", _text),
    "command": _Key("command", _list_of(_text, '["python3", "server.py"]')),
    "env": _Key("env", _environment),
    "ports": _Key("ports", _list_of(_port, "[8080]")),
    "replicas": _Key("replicas", _count),
    "concurrency": _Key("concurrency", _count),
    "cpus": _Key("cpus", _number),
    "memory": _Key("memory_bytes", parse_size),
    "shm": _Key("shm_bytes", parse_size),
    "repeatable": _Key("repeatable", _truth),
    "cancel_on_hangup": _Key("cancel_on_hangup", _truth),
    "writable_paths": _Key("writable_paths", _list_of(_text, '["/data"]')),
    "volumes": _Key("volumes", _volumes),
    "account": _Key("account", _text),
    "hedge": _Key("hedge", _number),
    "async": _Key("jobs", _job_rules),
    "gpu.model": _Key("model", _text),
    "gpu.count": _Key("count", _count),
    "gpu.memory": _Key("min_memory_bytes", parse_size),
    "gpu.share": _Key("share_milli", _share),
    "readiness.path": _Key("path", _text),
    "readiness.port": _Key("port", _port),
    "readiness.start_limit": _Key("start_limit", _duration),
    "scale.min": _Key("min_replicas", _count),
    "scale.max": _Key("max_replicas", _count),
    "scale.idle": _Key("idle_time", _duration),
    "scale.queue_wait": _Key("queue_wait", _duration),
    "registry.username": _Key("username", _text),
    "registry.password": _Key("password", _text),
    "registry.password_file": _Key("password", _text),
    "limits.queue_time": _Key("queue_time", _duration),
    "limits.run_time": _Key("run_time", _duration),
    "limits.total_time": _Key("total_time", _duration),
    "limits.request_body": _Key("request_body_bytes", parse_size),
    "limits.response_body": _Key("response_body_bytes", parse_size),
    "limits.queue_length": _Key("queue_length", _count),
    "limits.max_attempts": _Key("max_attempts", _count),
    "limits.rate": _Key("rate", _count),
}
#: Of a table [[async]]; fields of JobRule.
_JOB_KEYS: Final[Mapping[str, Callable[[object], Any]]] = {
    "preset": _text,
    "start": _text,
    "id": _strings,
    "ask": _text,
    "cancel": _text,
    "state": _text,
    "accepted": _strings,
    "done": _strings,
    "running": _strings,
    "waiting": _strings,
    "failed": _strings,
    "busy": _strings,
    "output": _text,
    "message": _text,
    "poll": _duration,
    "limit": _duration,
}
_SECTIONS: Final = frozenset(key.partition(".")[0] for key in _KEYS if "." in key)
#: What other tools call it, where likeness alone would guess wrong.
_MEANT: Final = {"gpus": ["gpu.count"], "cmd": ["command"], "environment": ["env"], "timeout": ["limits.run_time"]}
_REQUIRED: Final = ("name", "image", "ports")


@dataclass(frozen=True)
class Source:
    """A description and what to call it in messages; files that it names are relative to `directory`."""

    document: Document
    label: str
    directory: Path = Path()


def load(path: Path, text: str | None = None) -> Source:
    """The file (or `text`, if it is given, as if it were read from there). Raises SpecFault."""
    try:
        if text is None:
            with path.open("rb") as file:
                text = file.read(FILE_BYTES + 1).decode()
        if len(text) > FILE_BYTES:
            raise SpecFault([f"{path}: is longer than {FILE_BYTES} bytes: is it the right file?"])
        return Source(tomllib.loads(text), str(path), path.parent)
    except OSError as error:
        raise SpecFault([f"{path}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise SpecFault([f"{path}: is not valid TOML: {error}"]) from error


def to_spec(*sources: Source) -> pb.WorkspaceSpec:
    """The workspace that the sources describe, a later one winning key by key. Raises SpecFault."""
    fields: dict[str, Any] = {"replicas": 1}
    given: set[str] = set()
    faults: list[str] = []
    for source in sources:
        for key, value in _flat(source.document):
            given.add(key)
            try:
                _put(fields, key, _read(key, value, source.directory))
            except ValueError as error:
                faults.append(f"{source.label}: {key}: {error}")
    if "gpu.share" in given:
        fields.get("gpu", {}).setdefault("count", 1)
    label = sources[0].label
    faults += [f"{label}: {key}: is missing" for key in _REQUIRED if key not in given]
    if faults:
        raise SpecFault(faults)
    return pb.WorkspaceSpec(**fields)


def _flat(document: Document) -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        if key in _SECTIONS and isinstance(value, dict):
            yield from ((f"{key}.{inner}", content) for inner, content in value.items())
        else:
            yield key, value


def _read(key: str, value: object, directory: Path) -> object:
    if key in _SECTIONS:
        raise _wrong(f"a table, [{key}]", value)
    if key not in _KEYS:
        near = _MEANT.get(key) or difflib.get_close_matches(key, _KEYS, 1, cutoff=0.5)
        raise ValueError("is not known" + (f": did you mean {near[0]}?" if near else f"; known are {', '.join(_KEYS)}"))
    content = _KEYS[key].read(value)
    if key == "registry.password_file":
        try:
            return (directory / str(content)).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"cannot be read: {error}") from error
    return content


def _put(fields: dict[str, Any], key: str, value: object) -> None:
    section, _, _ = key.rpartition(".")
    target = fields.setdefault(section, {}) if section else fields
    field = _KEYS[key].field
    # Names of the environment win one by one, too.
    target[field] = {**target.get(field, {}), **value} if isinstance(value, dict) else value
