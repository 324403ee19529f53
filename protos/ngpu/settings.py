"""Settings of a program: a TOML file, the environment and the command line, each winning over the one before.

A program's settings are a subclass of Settings. A field's annotation says what it takes, its default what it is if
nobody says, the docstring below it what it means. Functions within Annotated, such as `duration` and `readable`, read
what was written or refuse it; limits are msgspec's. (pydantic-settings could do the same, and takes 13 MiB for as long
as the program runs.)
"""

import ast
import inspect
import ipaddress
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ngpu import dial

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES: Final = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_YES: Final = ("1", "true", "t", "yes", "y", "on")
_NO: Final = ("0", "false", "f", "no", "n", "off")


class SettingsFault(ValueError):
    """Settings that cannot be used; the message names every fault, a line each."""


class Secret:
    """Text that is not shown."""

    __slots__ = ("text",)

    def __init__(self, text: str = "") -> None:
        self.text = text

    def __repr__(self) -> str:
        return "Secret(***)"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a program."""

    def faults(self) -> Iterable[str]:
        """What is wrong with them together, each of them being right."""
        return ()


Kind = TypeVar("Kind", bound=Settings)


def load(kind: type[Kind], *, prefix: str, file: Path | None, options: Mapping[str, Any], listed_by: str) -> Kind:
    """Settings from `file`, else the one that the variable PREFIX + CONFIG names; the environment; and `options`.

    An option that is None was not given. `listed_by`: the command that lists all there are. Raises SettingsFault.
    """
    hints = get_type_hints(kind, include_extras=True)
    no_such = f"there is no such setting (see `{listed_by}`)"
    file_variable = f"{prefix}CONFIG"
    known = {env_name(prefix, name) for name in hints} | {file_variable}
    faults = [f"{name}: {no_such}" for name in sorted(os.environ) if name.startswith(prefix) and name not in known]
    if file is None and os.environ.get(file_variable):
        file = Path(os.environ[file_variable])
    said: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise SettingsFault("\n".join([f"{file}: there is no such file", *faults]))
        try:
            said = tomllib.loads(file.read_text())
        except (ValueError, OSError) as error:
            raise SettingsFault("\n".join([f"{file}: {error}", *faults])) from error
    faults += [f"{name}: {no_such}" for name in (*said, *options) if name not in hints]
    for name in hints:
        if (written := os.environ.get(env_name(prefix, name))) is not None:
            said[name] = written
    said |= {name: value for name, value in options.items() if value is not None}
    taken = {}
    for field in msgspec.structs.fields(kind):
        try:
            taken[field.name] = _taken(said.get(field.name, field.default), hints[field.name])
        except ValueError as error:
            faults.append(f"{field.name}: {error}")
    if not faults:
        settings = kind(**taken)
        faults += settings.faults()
        if not faults:
            return settings
    raise SettingsFault("\n".join(faults))


def table(kind: type[Settings]) -> list[tuple[str, str, str]]:
    """Every setting: its name, its default, what it means."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
    return [(field.name, _shown(field.default), meanings[field.name]) for field in msgspec.structs.fields(kind)]


def env_name(prefix: str, setting: str) -> str:
    """The environment variable of a setting."""
    return prefix + setting.upper()


# What was written, read. All raise ValueError.


def duration(value: object) -> object:
    """`15`, `"15s"`, `"10m"`, `"1h30m"`, `"7d"`: seconds."""
    if not isinstance(value, str):
        return value
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", text := value.strip().lower())
    if parts and "".join(number + unit for number, unit in parts) == "".join(text.split()):
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    raise ValueError(f"{value!r} is no duration: write 15s, 10m, 1h30m or 7d")


def size(value: object) -> object:
    """`1048576`, `"64 MiB"`, `"2G"`: bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is no size: write 1048576, 64MiB or 2GiB")
    return int(match[1]) * _SIZES[match[2]]


def words(value: object) -> object:
    """`"AINN,ORDI"`: a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def address(value: str) -> str:
    """HOST:PORT."""
    split_address(value)
    return value


def address_or_none(value: str) -> str:
    """HOST:PORT, or nothing."""
    return address(value) if value else value


def addresses(value: str) -> str:
    """HOST:PORT,HOST:PORT."""
    split_addresses(value)
    return value


def readable(value: str | Path | None) -> str | Path | None:
    """A file that is there."""
    if value is not None and not os.access(value, os.R_OK):
        raise ValueError(f"{value} cannot be read")
    return value


def split_addresses(text: str) -> list[tuple[str, int]]:
    """`HOST:PORT,HOST:PORT`. Raises ValueError."""
    return [split_address(one) for one in dial.split(text)]


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, IPv6 in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no HOST:PORT")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{text!r} is no HOST:PORT: an IPv6 address goes in brackets")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it, or be reached by it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _taken(value: Any, hint: Any) -> Any:
    """What was written, as the field's annotation wants it. Raises ValueError."""
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if str(value) not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return choices[str(value)]
    if kind is bool:
        return _flag(value)
    reads = [mark for mark in marks if callable(mark)]
    # Of text they look at what it says; all else they make of text.
    if kind in (int, float) or get_origin(kind) is tuple:
        return _converted(_all(reads, value), hint)
    return _all(reads, _converted(value, hint))


def _all(reads: Iterable[Callable[[Any], Any]], value: Any) -> Any:
    for read in reads:
        value = read(value)
    return value


def _converted(value: Any, hint: Any) -> Any:
    try:
        return msgspec.convert(value, hint, strict=False, dec_hook=_made)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("`", "").lower()) from None


def _flag(value: object) -> bool:
    text = str(value).lower()
    if text not in _YES and text not in _NO:
        raise ValueError(f"{value!r} is neither true nor false")
    return text in _YES


def _made(kind: type, value: object) -> object:
    if isinstance(value, kind):
        return value
    if kind in (Path, Secret) and isinstance(value, str):
        return kind(value)
    raise ValueError(f"{value!r} is no text")


def _shown(default: object) -> str:
    if default is None or isinstance(default, Secret):
        return ""
    return ",".join(default) if isinstance(default, tuple) else str(default)
