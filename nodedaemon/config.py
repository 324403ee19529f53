"""Settings of the node daemon: a TOML file, the environment and the command line, each winning over the one before.

Only `__main__` reads them; every part gets what it needs by its constructor. Faults are told all at once.
"""

import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta
from ngpu import settings as reading
from ngpu.image import PATTERNS, REFERENCE_LENGTH
from ngpu.settings import Secret, Settings, address_or_none, addresses, duration, readable, size, split_addresses

from nodedaemon.errors import ConfigFault

ENV_PREFIX: Final = "NGPU_NODE_"
#: The one variable with that prefix that is no setting: where the settings' file is.
ENV_FILE: Final = f"{ENV_PREFIX}CONFIG"


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


class Config(Settings, frozen=True, kw_only=True):
    """All settings. Durations are `15s`, `10m` or seconds; sizes `64MiB` or bytes."""

    controlplane: Annotated[str, addresses] = "127.0.0.1:50051"
    """HOST:PORT of the control plane; of all, with commas, if others stand by. The node only ever dials out."""
    tls: bool = False
    """Speak TLS to the control plane."""
    tls_ca: Annotated[Path | None, readable] = None
    """PEM file with the roots that the control plane's certificate must lead to; implies tls. Default: the system's."""
    allow_plaintext: bool = False
    """Speak without TLS to a control plane on another machine: only inside something that adds TLS."""
    token: Secret = Secret()
    """One-time token for joining, from `ngpu token create --role node`. Not needed once the node has joined."""
    token_file: Annotated[Path | None, readable] = None
    """File with the one-time token."""
    name: Annotated[str, _name] = ""
    """Name for people, asked for when joining. Default: the machine's."""
    state_dir: Path = Path(".ngpu/node")
    """The node's key (its identity: keep it), and what was done and is not yet acknowledged."""
    engine: Literal["auto", "docker", "process"] = "auto"
    """What runs containers. auto: Docker if it answered at the first start, else plain processes."""
    process_images: Path | None = None
    """Process engine: the directory with a directory for each image. Default: STATE_DIR/images."""
    allow_root: bool = False
    """Docker engine: let containers run as root if their image says so."""
    stop_grace: Annotated[float, duration, Meta(ge=0, le=3600)] = 30.0
    """How long running tasks may take to finish when the daemon stops."""
    allowed_images: Annotated[str, _patterns] = ""
    """Images that may run here: patterns of full names, as `ghcr.io/acme/*,docker.io/library/debian:*`. Empty: all."""
    volumes: Annotated[int, size, Meta(ge=0)] = 64 * 1024**3
    """Disk for volumes, in which workspaces keep what they have loaded, all together. 0: none are allowed."""
    disk_reserve: Annotated[int, size, Meta(ge=0)] = 20 * 1024**3
    """With less free disk, images that this daemon pulled and no replica uses are removed. 0: never."""
    image_idle: Annotated[float, duration, Meta(ge=60)] = 3600.0
    """An image used within this time is not removed."""
    spool_limit: Annotated[int, size, Meta(ge=64 * 1024**2)] = 4 * 1024**3
    """Disk for answers that the control plane has not acknowledged; past it containers wait with theirs."""
    metrics_listen: Annotated[str, address_or_none] = ""
    """HOST:PORT for Prometheus (/metrics). Empty: off. Port 0: any free one, written to STATE_DIR/metrics_address."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""

    def faults(self) -> Iterator[str]:
        """See Settings."""
        if self.token.text and self.token_file is not None:
            yield "token and token_file: set one of them"
        hosts = [host for host, _ in split_addresses(self.controlplane)]
        if not self.with_tls and not self.allow_plaintext and not all(map(reading.is_loopback, hosts)):
            yield (
                f"controlplane = {self.controlplane!r} leaves this machine without TLS: set tls = true, "
                "or allow_plaintext = true if something around it adds TLS"
            )

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
        return self.token.text

    def node_name(self) -> str:
        """The name to ask for."""
        return self.name or re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")[:63] or "node"


def load(file: Path | None, options: Mapping[str, Any]) -> Config:
    """Settings from `file` (or the one ENV_FILE names), the environment and `options` (None: not given).

    Raises ConfigFault with every fault, a line each.
    """
    try:
        return reading.load(Config, prefix=ENV_PREFIX, file=file, options=options, listed_by="ngpu-node settings")
    except reading.SettingsFault as fault:
        raise ConfigFault(str(fault)) from None


def settings() -> list[tuple[str, str, str]]:
    """Every setting: its name, its default, what it means."""
    return reading.table(Config)


def env_name(setting: str) -> str:
    """The environment variable of a setting."""
    return reading.env_name(ENV_PREFIX, setting)
