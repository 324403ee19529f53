"""Settings of the bridge: a TOML file, the environment and the command line, each winning over the one before.

Only `__main__` reads them; every part gets what it needs by its constructor. Faults are told all at once.
"""

import ipaddress
import re
import zoneinfo
from collections.abc import Iterator, Mapping
from datetime import UTC, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta
from ngpu import settings as reading
from ngpu.settings import Settings, address, addresses, duration, readable, size, split_addresses, words

from httpbridge.errors import ConfigFault

ENV_PREFIX: Final = "NGPU_BRIDGE_"

_OFFSET: Final = re.compile(r"(?:UTC)?([+-])(0?\d|1[0-4])(?::?([0-5]\d))?")


def _networks(value: object) -> object:
    networks = words(value)
    for network in networks if isinstance(networks, list | tuple) else ():
        ipaddress.ip_network(network)
    return networks


def _zone(value: str) -> str:
    zone(value)
    return value


Seconds = Annotated[float, duration, Meta(gt=0)]
Bytes = Annotated[int, size, Meta(gt=0)]


class Config(Settings, frozen=True, kw_only=True):
    """All settings. Durations are `15s`, `10m` or seconds; sizes `64MiB` or bytes."""

    controlplane: Annotated[str, addresses] = "127.0.0.1:50051"
    """HOST:PORT of the control plane; of all, with commas between them, if others stand by."""
    token_file: Annotated[Path, readable] = Path(".ngpu/controlplane/bridge.token")
    """File with the bridge's token (role service). Read anew at every connection."""
    listen: Annotated[str, address] = "127.0.0.1:8080"
    """HOST:PORT for HTTP. Port 0: any free one, written to STATE_DIR/address."""
    state_dir: Path = Path(".ngpu/bridge")
    """Where `address` is written; nothing else is kept."""
    tls_cert: Annotated[Path | None, readable] = None
    """PEM file with the certificate chain for HTTPS."""
    tls_key: Annotated[Path | None, readable] = None
    """PEM file with its key."""
    tls: bool = False
    """Speak TLS to the control plane."""
    tls_ca: Annotated[Path | None, readable] = None
    """PEM file with the roots that the control plane's certificate must lead to; implies tls. Default: the system's."""
    allow_plaintext: bool = False
    """Speak without TLS to and on addresses of other machines: only inside something that adds TLS."""
    reuse_port: bool = False
    """Share the port with other bridge processes on this machine; the kernel spreads connections over them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""

    display_timezone: Annotated[str, _zone] = "UTC"
    """Zone of all times in answers: Asia/Shanghai, or UTC+8. Set the control plane's alike: it makes the task ids."""
    accepted_result_code: Literal[200, 100] = 200
    """result_code of an accepted task; 100 is what the original's samples print."""
    require_auth: bool = False
    """Want the Authorization header everywhere: for tasks by their id, for published routes, for checkAddress."""
    trusted_proxies: Annotated[tuple[str, ...], _networks] = ()
    """Networks of proxies whose X-Forwarded-For says where a caller is, e.g. 10.0.0.0/8."""

    sync_wait: Annotated[float, duration, Meta(ge=1, le=3600)] = 300.0
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
    max_connections: Annotated[int, Meta(gt=0)] = 4096
    """Open connections; the next ones get 503."""
    max_line: Annotated[int, size, Meta(ge=1024, le=65536)] = 8190
    """Bytes of the request line, and of one header."""
    stop_grace: Seconds = 20.0
    """How long calls in flight may take to end when the bridge stops."""

    def faults(self) -> Iterator[str]:
        """See Settings."""
        if (self.tls_cert is None) != (self.tls_key is None):
            yield "tls_cert and tls_key come together"
        if self.body_memory < self.body_limit:
            yield "body_memory is smaller than body_limit: the largest bodies would never be taken"
        for name, there, plain in (
            ("listen", self.listen, self.tls_cert is None),
            ("controlplane", self.controlplane, not self.with_tls),
        ):
            hosts = [host for host, _ in split_addresses(there)]
            if plain and not self.allow_plaintext and not all(map(reading.is_loopback, hosts)):
                yield (
                    f"{name} = {there!r} leaves this machine without TLS: set "
                    f"{'tls_cert and tls_key' if name == 'listen' else 'tls = true'}, "
                    "or allow_plaintext = true if something around it adds TLS"
                )

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
    """Settings from `file` (or the one NGPU_BRIDGE_CONFIG names), the environment and `options` (None: not given).

    Raises ConfigFault with every fault, a line each.
    """
    try:
        return reading.load(Config, prefix=ENV_PREFIX, file=file, options=options, listed_by="ngpu-bridge --settings")
    except reading.SettingsFault as fault:
        raise ConfigFault(str(fault)) from None


def settings() -> list[tuple[str, str, str]]:
    """Every setting: its name, its default, what it means."""
    return reading.table(Config)


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
