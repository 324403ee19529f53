"""Settings of the node daemon: a TOML file, the environment and the command line, each winning over the one before.

Only `__main__` reads them; every part gets what it needs by its constructor. Faults are told all at once.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic
import pydantic_settings
from ngpu import dial
from ngpu.image import PATTERNS, REFERENCE_LENGTH
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from nodedaemon.errors import ConfigFault

ENV_PREFIX: Final = "NGPU_NODE_"
#: The one variable with that prefix that is no setting: where the settings' file is.
ENV_FILE: Final = f"{ENV_PREFIX}CONFIG"

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZES: Final = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


def _duration(value: object) -> object:
    """`15`, `"15s"`, `"10m"`: seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", value.strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is no duration: write 15s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _size(value: object) -> object:
    """`1048576`, `"64 MiB"`, `"2G"`: bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", value.strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is no size: write 1048576, 64MiB or 2GiB")
    return int(match[1]) * _SIZES[match[2]]


def _addresses(value: str) -> str:
    split_addresses(value)
    return value


def _address(value: str) -> str:
    split_address(value)
    return value


def _optional_address(value: str) -> str:
    return _address(value) if value else value


def _name(value: str) -> str:
    if value and not re.fullmatch(r"[a-z0-9.-]{1,63}", value):
        raise ValueError("must be 1 to 63 of a-z, 0-9, '-' and dots")
    return value


def _patterns(value: str) -> str:
    patterns = _split(value)
    if len(patterns) > PATTERNS or any(len(pattern) > REFERENCE_LENGTH for pattern in patterns):
        raise ValueError(f"must be at most {PATTERNS} patterns of at most {REFERENCE_LENGTH} characters")
    return value


def _split(patterns: str) -> list[str]:
    return [pattern for part in patterns.split(",") if (pattern := part.strip())]


Seconds = Annotated[float, BeforeValidator(_duration)]
Bytes = Annotated[int, BeforeValidator(_size)]


class Config(BaseSettings):
    """All settings. Durations are `15s`, `10m` or seconds; sizes `64MiB` or bytes."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    controlplane: Annotated[str, AfterValidator(_addresses)] = "127.0.0.1:50051"
    """HOST:PORT of the control plane; of all, with commas, if others stand by. The node only ever dials out."""
    tls: bool = False
    """Speak TLS to the control plane."""
    tls_ca: Path | None = None
    """PEM file with the roots that the control plane's certificate must lead to; implies tls. Default: the system's."""
    allow_plaintext: bool = False
    """Speak without TLS to a control plane on another machine: only inside something that adds TLS."""
    token: SecretStr = SecretStr("")
    """One-time token for joining, from `ngpu token create --role node`. Not needed once the node has joined."""
    token_file: Path | None = None
    """File with the one-time token."""
    name: Annotated[str, AfterValidator(_name)] = ""
    """Name for people, asked for when joining. Default: the machine's."""
    state_dir: Path = Path(".ngpu/node")
    """The node's key (its identity: keep it), and what was done and is not yet acknowledged."""
    engine: Literal["auto", "docker", "process"] = "auto"
    """What runs containers. auto: Docker if it answered at the first start, else plain processes."""
    process_images: Path | None = None
    """Process engine: the directory with a directory for each image. Default: STATE_DIR/images."""
    allow_root: bool = False
    """Docker engine: let containers run as root if their image says so."""
    stop_grace: Annotated[Seconds, Field(ge=0, le=3600)] = 30.0
    """How long running tasks may take to finish when the daemon stops."""
    allowed_images: Annotated[str, AfterValidator(_patterns)] = ""
    """Images that may run here: patterns of full names, as `ghcr.io/acme/*,docker.io/library/debian:*`. Empty: all."""
    volumes: Annotated[Bytes, Field(ge=0)] = 64 * 1024**3
    """Disk for volumes, in which workspaces keep what they have loaded, all together. 0: none are allowed."""
    disk_reserve: Annotated[Bytes, Field(ge=0)] = 20 * 1024**3
    """With less free disk, images that this daemon pulled and no replica uses are removed. 0: never."""
    image_idle: Annotated[Seconds, Field(ge=60)] = 3600.0
    """An image used within this time is not removed."""
    spool_limit: Annotated[Bytes, Field(ge=64 * 1024**2)] = 4 * 1024**3
    """Disk for answers that the control plane has not acknowledged; past it containers wait with theirs."""
    metrics_listen: Annotated[str, AfterValidator(_optional_address)] = ""
    """HOST:PORT for Prometheus (/metrics). Empty: off. Port 0: any free one, written to STATE_DIR/metrics_address."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""

    @pydantic.field_validator("tls_ca", "token_file")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not os.access(value, os.R_OK):
            raise ValueError(f"{value} cannot be read")
        return value

    @pydantic.model_validator(mode="after")
    def _safe(self) -> Self:
        if self.token.get_secret_value() and self.token_file is not None:
            raise ValueError("token and token_file: set one of them")
        hosts = [host for host, _ in split_addresses(self.controlplane)]
        if not self.with_tls and not self.allow_plaintext and not all(map(is_loopback, hosts)):
            raise ValueError(
                f"controlplane = {self.controlplane!r} leaves this machine without TLS: set tls = true, "
                "or allow_plaintext = true if something around it adds TLS"
            )
        return self

    @property
    def with_tls(self) -> bool:
        """Whether to speak TLS to the control plane."""
        return self.tls or self.tls_ca is not None

    @property
    def image_patterns(self) -> list[str]:
        """Which images may run here; none: all."""
        return _split(self.allowed_images)

    @property
    def images(self) -> Path:
        """Where the process engine finds images."""
        return self.process_images or self.state_dir / "images"

    def join_token(self) -> str:
        """The one-time token; empty if there is none."""
        if self.token_file is not None:
            return self.token_file.read_text().strip()
        return self.token.get_secret_value()

    def node_name(self) -> str:
        """The name to ask for."""
        return self.name or re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")[:63] or "node"


def load(file: Path | None, options: Mapping[str, Any]) -> Config:
    """Settings from `file` (or the one ENV_FILE names), the environment and `options` (None: not given).

    Raises ConfigFault with every fault, a line each.
    """
    known = {env_name(name) for name in Config.model_fields} | {ENV_FILE}
    faults = [
        f"{name}: there is no such setting (see `ngpu-node settings`)"
        for name in sorted(os.environ)
        if name.startswith(ENV_PREFIX) and name not in known
    ]
    if file is None and os.environ.get(ENV_FILE):
        file = Path(os.environ[ENV_FILE])
    if file is not None and not file.is_file():
        raise ConfigFault("\n".join([f"{file}: there is no such file", *faults]))

    class Layered(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, pydantic_settings.TomlConfigSettingsSource(settings_cls, file)

    try:
        config = Layered(**{name: value for name, value in options.items() if value is not None})
    except pydantic.ValidationError as error:
        faults += [_words_of(fault) for fault in error.errors()]
    except (pydantic_settings.SettingsError, ValueError, OSError) as error:
        faults.append(f"{file}: {error}" if file else str(error))
    if faults:
        raise ConfigFault("\n".join(faults))
    return config


def settings() -> list[tuple[str, str, str]]:
    """Every setting: its name, its default, what it means."""
    rows = []
    for name, field in Config.model_fields.items():
        default = "" if field.default is None or isinstance(field.default, SecretStr) else str(field.default)
        rows.append((name, default, " ".join((field.description or "").split())))
    return rows


def env_name(setting: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def split_addresses(addresses: str) -> list[tuple[str, int]]:
    """`HOST:PORT,HOST:PORT`. Raises ValueError."""
    return [split_address(address) for address in dial.split(addresses)]


def split_address(address: str) -> tuple[str, int]:
    """`HOST:PORT`, IPv6 in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is no HOST:PORT")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r} is no HOST:PORT: an IPv6 address goes in brackets")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can be reached by it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _words_of(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: there is no such setting (see `ngpu-node settings`)"
    said = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
