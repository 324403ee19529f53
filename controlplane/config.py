"""Settings of the control plane: a TOML file, the environment and the command line, each winning over the one before.

Only `__main__` reads them; every part gets what it needs by its constructor. Faults are told all at once.
"""

import ipaddress
import os
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic
import pydantic_settings
from ngpu.settings import address, address_or_none, duration, is_loopback, readable, size, split_address, words
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX: Final = "NGPU_CONTROLPLANE_"
#: The one variable with that prefix that is no setting: where the settings' file is.
ENV_FILE: Final = f"{ENV_PREFIX}CONFIG"


class ConfigFault(Exception):
    """Settings that cannot be used; the message names every fault, a line each."""


Seconds = Annotated[float, BeforeValidator(duration), Field(gt=0)]
SecondsOrNone = Annotated[float, BeforeValidator(duration), Field(ge=0)]
Bytes = Annotated[int, BeforeValidator(size), Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=100)]
Words = Annotated[list[str], NoDecode, BeforeValidator(words)]
Address = Annotated[str, pydantic.AfterValidator(address)]
OptionalAddress = Annotated[str, pydantic.AfterValidator(address_or_none)]
ReadableFile = Annotated[Path, pydantic.AfterValidator(readable)]


class _Section(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Provider(_Section):
    """One source of balances."""

    kind: str
    """unisat, bestinslot, xverse, maestro, opi or ledger."""
    base_url: str = ""
    """Where it is, if not at its makers' address."""
    api_key: pydantic.SecretStr = pydantic.SecretStr("")
    """Its key."""
    api_key_file: str = ""
    """A file with its key, instead."""
    path: str = ""
    """The ledger's file."""


class Assets(_Section):
    """Which BRC-20 assets are asked for, and who is asked about them."""

    tickers: Words = ["AINN"]
    """One of these must be held by an address that comes with a task."""
    network: str = "mainnet"
    """The Bitcoin network of the addresses."""
    providers: list[Provider] = []
    """Who is asked, in order of preference; in the file as [[assets.providers]] with kind, base_url, api_key, ..."""
    timeout: Seconds = 5.0
    """How long one of them may take."""
    cache: SecondsOrNone = 60.0
    """How long an answer is believed ..."""
    cache_empty: SecondsOrNone = 10.0
    """... and how long if it was that nothing is held."""
    cache_entries: Annotated[int, Field(gt=0)] = 10_000
    """How many answers are remembered."""


class Webhooks(_Section):
    """Where the ends of tasks may be posted to (`callback_url`), and how often."""

    allow_http: bool = False
    """Post in the clear too, to http:// URLs."""
    allow_networks: Words = []
    """Networks that are not public and may be posted to all the same, e.g. 10.0.0.0/8,fd00::/8."""
    give_up_after: Seconds = 86_400.0
    """How long a receiver that does not answer with 2xx is tried."""
    first_pause: Seconds = 5.0
    """Bound of the pause after the first try; it doubles from try to try, up to 2 hours."""
    time_limit: Seconds = 15.0
    """How long a receiver may take to answer."""
    concurrency: Annotated[int, Field(gt=0, le=1000)] = 64
    """Posts at once ..."""
    concurrency_per_host: Annotated[int, Field(gt=0, le=1000)] = 4
    """... of them to one host ..."""
    concurrency_per_workspace: Annotated[int, Field(gt=0, le=1000)] = 16
    """... and for one workspace."""
    bridge_url: str = ""
    """Where callers reach the bridge, e.g. https://ngpu.example: told to receivers with a task's result_url."""

    @pydantic.field_validator("allow_networks")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"{network!r} is no network: write 10.0.0.0/8 or fd00::/8") from None
        return value


class Placement(_Section):
    """What is weighed when a replica is given its node; all in GPUs, and 0 leaves it out. See docs/platform.md."""

    fragmentation: Weight = 1.0
    """Of each GPU that becomes useless to the kinds of requests that came lately."""
    leftover: Weight = 0.05
    """Of a node left empty: full ones are filled up first."""
    scarcity: Weight = 0.6
    """Of the last free GPU of a model ..."""
    scarcity_base: Annotated[float, Field(gt=1)] = 100.0
    """... and how steeply the price rises to that: with 1,000 it stays lower for longer."""
    image: Weight = 0.02
    """Of an image that must be pulled, ..."""
    image_per_gib: Weight = 0.004
    """... and of each GiB of it."""
    image_gib: Weight = 5.0
    """How large an image is taken to be that no node has yet, in GiB."""
    degraded: Weight = 0.3
    """Of GPUs that are degraded."""
    load: Weight = 0.05
    """Of a node all of whose slots run a task."""
    unreliable: Weight = 0.15
    """Of a node's failures, times (failures + 0.2) / (days since it enrolled / 10 + 1), at most 3."""
    crowded: Weight = 0.10
    """Of each other replica of the workspace on the node."""
    disk_reserve: Bytes = 1024**3
    """Disk that an image must leave free on a node."""


class Config(BaseSettings):
    """All settings. Durations are `15s`, `10m`, `7d` or seconds."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
    )

    state_dir: Path = Path(".ngpu/controlplane")
    """Where the database, the bodies and the first tokens are kept."""
    database_url: str = ""
    """SQLAlchemy URL, e.g. postgresql+psycopg://user@host/ngpu. Empty: SQLite in the state directory."""
    bodies_dir: Path | None = None
    """Where the bodies are kept. Default: in the state directory. One for all control planes on one PostgreSQL."""
    lease: Annotated[Seconds, Field(ge=1, le=60)] = 5.0
    """On PostgreSQL: an active control plane that stands still or is cut off for so long is taken over from."""
    listen: Address = "127.0.0.1:50051"
    """HOST:PORT for gRPC. Port 0: any free one, written to STATE_DIR/address."""
    metrics_listen: OptionalAddress = "127.0.0.1:9464"
    """HOST:PORT for /metrics, /healthz and /readyz over HTTP. Empty: off."""
    tls_cert: ReadableFile | None = None
    """PEM file with the certificate chain for gRPC."""
    tls_key: ReadableFile | None = None
    """PEM file with its key."""
    allow_plaintext: bool = False
    """Listen without TLS on addresses other machines can reach: only behind something that adds TLS."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, JSON lines elsewhere."""
    display_timezone: str = "UTC"
    """Zone of the date and time in task ids, e.g. Asia/Shanghai."""

    heartbeat_interval: Seconds = 5.0
    """How often nodes report."""
    node_timeout: Seconds = 15.0
    """A node from which nothing came for so long is taken for lost."""
    reconnect_grace: Seconds = 10.0
    """How long attempts wait for a node whose stream broke before they are given up."""
    start_grace: Seconds = 60.0
    """How long, after a start, attempts that were running wait for their nodes to come back."""
    hold: Seconds = 120.0
    """How long an attempt that must not run twice waits for its node."""

    body_retention: Seconds = 7 * 86400.0
    """How long bodies are kept after a task's end. What else is known of a task stays."""
    recorded_body: Bytes = 1024**2
    """Longer bodies of pass-through calls (/run) are not kept once they are passed on; up to 64 KiB all are."""
    account_queue_length: Annotated[int, Field(gt=0)] = 20_000
    """How many tasks may wait in all workspaces of one account together."""
    flight_retention: Seconds = 14 * 86400.0
    """How long the flight recorder's records of failed and slow attempts are kept, with containers' logs in them; never
    more than 30 days longer than bodies."""
    slow_attempt: Seconds = 30.0
    """An attempt that takes so long, and four times as long as is usual in its workspace, is recorded as slow."""
    upload_retention: Seconds = 3600.0
    """How long an upload waits for the task that uses it."""
    stop_grace: Seconds = 10.0
    """How long calls in flight may take to end when the control plane stops."""

    asset_check_on_error: Literal["deny", "allow"] = "deny"
    """What becomes of a task whose BTC address could not be checked."""
    assets: Assets = Assets()
    """BRC-20 assets."""
    webhooks: Webhooks = Webhooks()
    """Webhooks."""
    placement: Placement = Placement()
    """How nodes are chosen for replicas."""

    @pydantic.field_validator("display_timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            zoneinfo.ZoneInfo(value)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{value!r} is no time zone: write UTC or a name like Asia/Shanghai") from None
        return value

    @pydantic.field_validator("tls_key")
    @classmethod
    def _paired(cls, value: Path | None, info: pydantic.ValidationInfo) -> Path | None:
        if "tls_cert" in info.data and (info.data["tls_cert"] is None) != (value is None):
            raise ValueError("tls_cert and tls_key come together")
        return value

    # Of a field and not of the whole: else it would only be told once all else is right.
    @pydantic.field_validator("allow_plaintext")
    @classmethod
    def _safe(cls, value: bool, info: pydantic.ValidationInfo) -> bool:
        listen = info.data.get("listen")
        if listen and not value and not info.data.get("tls_cert") and not is_loopback(split_address(listen)[0]):
            raise ValueError(
                f"listen = {listen!r} can be reached from other machines and has no TLS: "
                "set tls_cert and tls_key, or allow_plaintext = true if something in front of it adds TLS"
            )
        return value

    @property
    def zone(self) -> tzinfo:
        """The display zone."""
        return UTC if self.display_timezone == "UTC" else zoneinfo.ZoneInfo(self.display_timezone)

    @property
    def bodies(self) -> Path:
        """Where the bodies are kept."""
        return self.bodies_dir or self.state_dir / "bodies"

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.state_dir.absolute() / 'ngpu.db'}"


def load(
    file: Path | None,
    options: Mapping[str, Any],
    *,
    asset_faults: Callable[[Assets], Sequence[str]] = lambda _: (),
) -> Config:
    """Settings from `file` (or the one ENV_FILE names), the environment and `options` (None: not given).

    `asset_faults` says what is wrong with the assets' section; this file knows only its form.
    Raises ConfigFault with every fault, a line each.
    """
    faults = [
        f"{name}: there is no such setting (see `ngpu-controlplane settings`)"
        for name in sorted(os.environ)
        if name.startswith(ENV_PREFIX) and name != ENV_FILE and name not in _env_names()
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

        @pydantic.field_validator("assets")
        @classmethod
        def _usable(cls, value: Assets) -> Assets:
            if found := asset_faults(value):
                raise ValueError("\n".join(found))
            return value

    try:
        config = Layered(**{name: value for name, value in options.items() if value is not None})
    except pydantic.ValidationError as error:
        faults += [line for fault in error.errors() for line in _words_of(fault)]
    except (pydantic_settings.SettingsError, ValueError, OSError) as error:
        faults.append(f"{file}: {error}" if file else str(error))
    if faults:
        raise ConfigFault("\n".join(faults))
    return config


def settings() -> list[tuple[str, str, str]]:
    """Every setting: its name in the file (`section.name`), its default, what it means."""
    rows: list[tuple[str, str, str]] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
                walk(field.annotation, f"{prefix}{name}.")
            else:
                default = (
                    "" if field.default is None or isinstance(field.default, pydantic.SecretStr) else field.default
                )
                shown = ",".join(default) if isinstance(default, list) else str(default)
                rows.append((prefix + name, shown, " ".join((field.description or "").split())))

    walk(Config, "")
    return rows


def env_name(setting: str) -> str:
    """The environment variable of a setting: `assets.tickers` -> NGPU_CONTROLPLANE_ASSETS__TICKERS."""
    return ENV_PREFIX + setting.replace(".", "__").upper()


def _env_names() -> frozenset[str]:
    return frozenset(env_name(name) for name, _, _ in settings())


def _words_of(fault: Any) -> list[str]:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return [f"{where}: there is no such setting (see `ngpu-controlplane settings`)"]
    said = str(fault["msg"]).removeprefix("Value error, ").splitlines()
    return [f"{where}{'.' if where == 'assets' else ': ' if where else ''}{line}" for line in said]
