"""Settings of the bridge: a TOML file, the environment and the command line, each winning over the one before.

Only `__main__` reads them; every part gets what it needs by its constructor. Faults are told all at once.
"""

import ipaddress
import os
import re
import zoneinfo
from collections.abc import Mapping
from datetime import UTC, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic
import pydantic_settings
from ngpu import dial
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from httpbridge.errors import ConfigFault

ENV_PREFIX: Final = "NGPU_BRIDGE_"
#: The one variable with that prefix that is no setting: where the settings' file is.
ENV_FILE: Final = f"{ENV_PREFIX}CONFIG"

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZES: Final = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_OFFSET: Final = re.compile(r"(?:UTC)?([+-])(0?\d|1[0-4])(?::?([0-5]\d))?")


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
    match = re.fullmatch(r"(\d+)\s*([kmg]?)(?:i?b)?", value.strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is no size: write 1048576, 64MiB or 2GiB")
    return int(match[1]) * _SIZES[match[2]]


def _words(value: object) -> object:
    """`"10.0.0.0/8,192.168.0.0/16"`: a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _addresses(value: str) -> str:
    split_addresses(value)
    return value


def _address(value: str) -> str:
    split_address(value)
    return value


def _network(value: str) -> str:
    ipaddress.ip_network(value)
    return value


def _zone(value: str) -> str:
    zone(value)
    return value


Seconds = Annotated[float, BeforeValidator(_duration), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(_size), Field(gt=0)]
Address = Annotated[str, AfterValidator(_address)]


class Config(BaseSettings):
    """All settings. Durations are `15s`, `10m` or seconds; sizes `64MiB` or bytes."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    controlplane: Annotated[str, AfterValidator(_addresses)] = "127.0.0.1:50051"
    """HOST:PORT of the control plane; of all, with commas between them, if others stand by."""
    token_file: Path = Path(".ngpu/controlplane/bridge.token")
    """File with the bridge's token (role service). Read anew at every connection."""
    listen: Address = "127.0.0.1:8080"
    """HOST:PORT for HTTP. Port 0: any free one, written to STATE_DIR/address."""
    state_dir: Path = Path(".ngpu/bridge")
    """Where `address` is written; nothing else is kept."""
    tls_cert: Path | None = None
    """PEM file with the certificate chain for HTTPS."""
    tls_key: Path | None = None
    """PEM file with its key."""
    tls: bool = False
    """Speak TLS to the control plane."""
    tls_ca: Path | None = None
    """PEM file with the roots that the control plane's certificate must lead to; implies tls. Default: the system's."""
    allow_plaintext: bool = False
    """Speak without TLS to and on addresses of other machines: only inside something that adds TLS."""
    reuse_port: bool = False
    """Share the port with other bridge processes on this machine; the kernel spreads connections over them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""

    display_timezone: Annotated[str, AfterValidator(_zone)] = "UTC"
    """Zone of all times in answers: Asia/Shanghai, or UTC+8. Set the control plane's alike: it makes the task ids."""
    accepted_result_code: Literal[200, 100] = 200
    """result_code of an accepted task; 100 is what the original's samples print."""
    require_auth: bool = False
    """Want the Authorization header everywhere: for tasks by their id, for published routes, for checkAddress."""
    trusted_proxies: Annotated[list[Annotated[str, AfterValidator(_network)]], NoDecode, BeforeValidator(_words)] = []
    """Networks of proxies whose X-Forwarded-For says where a caller is, e.g. 10.0.0.0/8."""

    sync_wait: Annotated[Seconds, Field(ge=1, le=3600)] = 300.0
    """How long a synchronous call or a wait= is held; then the answer is 202, or the task as it stands."""
    body_limit: Bytes = 64 * 1024**2
    """Largest request body."""
    body_memory: Bytes = 512 * 1024**2
    """All request bodies over 64 KiB that are being read, together; past it calls get 503."""
    body_time: Seconds = 300.0
    """How long one request body may take."""
    stall_time: Seconds = 30.0
    """A caller who neither sends nor takes a byte for so long is cut off."""
    idle_time: Seconds = 75.0
    """A connection on which no whole request came for so long is closed."""
    max_connections: Annotated[int, Field(gt=0)] = 4096
    """Open connections; the next ones get 503."""
    max_line: Annotated[int, BeforeValidator(_size), Field(ge=1024, le=65536)] = 8190
    """Bytes of the request line, and of one header."""
    stop_grace: Seconds = 20.0
    """How long calls in flight may take to end when the bridge stops."""

    @pydantic.field_validator("tls_cert", "tls_key", "tls_ca", "token_file")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not os.access(value, os.R_OK):
            raise ValueError(f"{value} cannot be read")
        return value

    @pydantic.model_validator(mode="after")
    def _safe(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key come together")
        if self.body_memory < self.body_limit:
            raise ValueError("body_memory is smaller than body_limit: the largest bodies would never be taken")
        for name, address, plain in (
            ("listen", self.listen, self.tls_cert is None),
            ("controlplane", self.controlplane, not self.with_tls),
        ):
            hosts = [host for host, _ in split_addresses(address)]
            if plain and not self.allow_plaintext and not all(map(is_loopback, hosts)):
                raise ValueError(
                    f"{name} = {address!r} leaves this machine without TLS: set "
                    f"{'tls_cert and tls_key' if name == 'listen' else 'tls = true'}, "
                    "or allow_plaintext = true if something around it adds TLS"
                )
        return self

    @property
    def with_tls(self) -> bool:
        """Whether to speak TLS to the control plane."""
        return self.tls or self.tls_ca is not None

    @property
    def zone(self) -> tzinfo:
        """The display zone."""
        return zone(self.display_timezone)

    @property
    def proxies(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """The trusted proxies' networks."""
        return [ipaddress.ip_network(network) for network in self.trusted_proxies]


def load(file: Path | None, options: Mapping[str, Any]) -> Config:
    """Settings from `file` (or the one ENV_FILE names), the environment and `options` (None: not given).

    Raises ConfigFault with every fault, a line each.
    """
    known = {ENV_PREFIX + name.upper() for name in Config.model_fields} | {ENV_FILE}
    faults = [
        f"{name}: there is no such setting (see `ngpu-bridge --settings`)"
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
        faults += [_fault(fault) for fault in error.errors()]
    except (pydantic_settings.SettingsError, ValueError, OSError) as error:
        faults.append(f"{file}: {error}" if file else str(error))
    if faults:
        raise ConfigFault("\n".join(faults))
    return config


def settings() -> list[tuple[str, str, str]]:
    """Every setting: its name, its default, what it means."""
    rows = []
    for name, field in Config.model_fields.items():
        default = field.default
        shown = "" if default is None else ",".join(default) if isinstance(default, list) else str(default)
        rows.append((name, shown, " ".join((field.description or "").split())))
    return rows


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
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def zone(name: str) -> tzinfo:
    """`UTC`, `Asia/Shanghai`, `UTC+8`, `+08:00`. Raises ValueError."""
    if name == "UTC":
        return UTC
    if match := _OFFSET.fullmatch(name):
        offset = timedelta(hours=int(match[2]), minutes=int(match[3] or 0))
        return timezone(-offset if match[1] == "-" else offset)
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is no time zone: write UTC, UTC+8 or a name like Asia/Shanghai") from None


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: there is no such setting (see `ngpu-bridge --settings`)"
    said = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
