"""What a node operator may set: a TOML file, the environment (`NGPU_NODE_*`), the command line; the later wins.

Only `__main__` reads it. All faults are told at once.
"""

import ipaddress
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from nodedaemon import log
from nodedaemon.errors import ConfigFault

GIB = 1024**3
PREFIX = "NGPU_NODE_"


def host_port(address: str) -> tuple[str, int]:
    """Split `HOST:PORT` or `[IPV6]:PORT`. Raises ValueError with words."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def _is_address(value: str) -> str:
    host_port(value)
    return value


def _is_address_or_empty(value: str) -> str:
    return _is_address(value) if value else value


def _node_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9.-]{1,63}", value):
        raise ValueError("must be 1 to 63 of a-z, 0-9, '-', '.'")
    return value


def _default_name() -> str:
    name = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")[:63]
    return name or "node"


class Config(BaseSettings):
    """Everything that may be set, with its default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    controlplane: Annotated[str, AfterValidator(_is_address)] = Field(
        "127.0.0.1:50051", description="HOST:PORT of the control plane's gRPC port; the node only ever dials out"
    )
    tls: bool = Field(False, description="speak TLS to the control plane")
    tls_ca: Path | None = Field(None, description="PEM file with the CA to trust; empty: the system's")
    allow_plaintext: bool = Field(False, description="allow a control plane on another machine without TLS")
    token: SecretStr = Field(SecretStr(""), description="one-time token for joining")
    token_file: Path | None = Field(None, description="file with the one-time token for joining")
    name: Annotated[str, AfterValidator(_node_name)] = Field(
        default_factory=_default_name, description="name for people; default: the machine's"
    )
    state_dir: Path = Field(Path(".ngpu/node"), description="where the node's key, spool and images of processes live")
    engine: Literal["auto", "docker", "process"] = Field(
        "auto", description="what runs containers; auto: Docker if it answers, else processes"
    )
    process_images: Path | None = Field(
        None, description="process engine: directory with one directory per image; default STATE_DIR/images"
    )
    stop_grace_s: float = Field(30.0, ge=0, le=3600, description="at SIGTERM: seconds that running tasks get to finish")
    spool_bytes: int = Field(
        4 * GIB, ge=64 * 1024**2, description="disk for answers that the control plane has not yet acknowledged"
    )
    metrics_listen: Annotated[str, AfterValidator(_is_address_or_empty)] = Field(
        "", description="HOST:PORT for Prometheus metrics; empty: off"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_form: log.Form = Field("auto", description="auto: console on a terminal, else JSON lines")

    @model_validator(mode="after")
    def _together(self) -> Self:
        faults = []
        if self.token.get_secret_value() and self.token_file:
            faults.append("token and token_file: set one of them")
        if self.tls_ca and not self.tls:
            faults.append("tls_ca is set but tls is not")
        if not self.tls and not self.allow_plaintext and not _is_loopback(host_port(self.controlplane)[0]):
            faults.append(
                "controlplane is on another machine and would be spoken to in the clear: set tls = true, or "
                "allow_plaintext = true in a network you trust"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def images_dir(self) -> Path:
        """Where the process engine looks for images."""
        return self.process_images or self.state_dir / "images"


def load(file: Path | None, options: Mapping[str, Any]) -> Config:
    """What the file (if any), the environment and `options` of the command line say; the later wins.

    Raises ConfigFault with every fault.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except OSError as fault:
            raise ConfigFault(f"{file} cannot be read: {fault.strerror}.") from None
        except ValueError as fault:
            raise ConfigFault(f"{file} is not TOML: {fault}.") from None

    class FromAll(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, values)

    try:
        return FromAll(**options)
    except ValidationError as faults:
        lines = [
            f"  {'.'.join(map(str, fault['loc'])) or 'together'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in faults.errors()
        ]
        raise ConfigFault("\n".join(["The configuration is not valid:", *lines])) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
