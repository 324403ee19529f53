"""Settings: what wins, what is refused, and that every fault is told at once."""

from datetime import UTC, timedelta
from pathlib import Path

import pytest

from httpbridge import config
from httpbridge.errors import ConfigFault


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "token"
    file.write_text("t")
    monkeypatch.setenv("NGPU_BRIDGE_TOKEN_FILE", str(file))
    return file


def test_options_win_over_environment_over_file(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text('listen = "127.0.0.1:1"\ncontrolplane = "127.0.0.1:1"\nbody_limit = "1MiB"\nsync_wait = "2m"\n')
    monkeypatch.setenv("NGPU_BRIDGE_CONFIG", str(file))
    monkeypatch.setenv("NGPU_BRIDGE_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("NGPU_BRIDGE_CONTROLPLANE", "127.0.0.1:2")
    monkeypatch.setenv("NGPU_BRIDGE_TRUSTED_PROXIES", "10.0.0.0/8, 192.168.0.0/16")
    loaded = config.load(None, {"listen": "127.0.0.1:3", "controlplane": None})
    assert (loaded.listen, loaded.controlplane) == ("127.0.0.1:3", "127.0.0.1:2")
    assert (loaded.body_limit, loaded.sync_wait, loaded.token_file) == (1024**2, 120.0, token_file)
    assert [str(network) for network in loaded.proxies] == ["10.0.0.0/8", "192.168.0.0/16"]


def test_every_fault_is_told_at_once(tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text('lisen = "127.0.0.1:1"\nsync_wait = "soon"\nbody_limit = 0\naccepted_result_code = 201\n')
    monkeypatch.setenv("NGPU_BRIDGE_DISPLAY_TIMEZONE", "Mars/Olympus")
    monkeypatch.setenv("NGPU_BRIDGE_TRUSTED_PROXIES", "here")
    monkeypatch.setenv("NGPU_BRIDGE_NONSENSE", "1")
    with pytest.raises(ConfigFault) as caught:
        config.load(file, {"listen": "nowhere"})
    said = str(caught.value)
    for word in (
        "lisen",
        "sync_wait",
        "body_limit",
        "accepted_result_code",
        "Mars/Olympus",
        "here",
        "NONSENSE",
        "nowhere",
    ):
        assert word in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"listen": "0.0.0.0:80"}, "leaves this machine without TLS"),
        ({"controlplane": "10.0.0.1:50051"}, "leaves this machine without TLS"),
        ({"tls_cert": "TOKEN"}, "come together"),
        ({"tls_key": "/nonexistent"}, "cannot be read"),
        ({"token_file": "/nonexistent"}, "cannot be read"),
        ({"body_memory": "1MiB"}, "body_memory is smaller"),
        ({"sync_wait": "2h"}, "sync_wait: expected float <= 3600"),
        ({"listen": "::1:80"}, "brackets"),
    ],
)
def test_what_is_not_safe_or_cannot_be_is_refused(token_file: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigFault, match=words):
        config.load(None, {name: str(token_file) if value == "TOKEN" else value for name, value in options.items()})


def test_what_is_safe_by_other_means(token_file: Path) -> None:
    assert config.load(None, {"listen": "0.0.0.0:80", "allow_plaintext": True})
    assert config.load(None, {"listen": "[::1]:80", "controlplane": "localhost:1"})
    tls = {"tls_cert": token_file, "tls_key": token_file, "tls_ca": token_file}
    loaded = config.load(None, {"listen": "0.0.0.0:443", "controlplane": "cp.example:443", **tls})
    assert loaded.with_tls


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigFault, match="there is no such file"):
        config.load(tmp_path / "none.toml", {})


def test_zones() -> None:
    assert config.zone("UTC") is UTC
    for name in ("UTC+8", "+08:00", "UTC+08", "+0800"):
        assert config.zone(name).utcoffset(None) == timedelta(hours=8)
    assert config.zone("-03:30").utcoffset(None) == -timedelta(hours=3, minutes=30)
    for name in ("UTC+25", "+8:99", "nowhere", "../etc/passwd"):
        with pytest.raises(ValueError, match="no time zone"):
            config.zone(name)


def test_every_setting_says_what_it_means() -> None:
    for name, _, meaning in config.settings():
        assert meaning.endswith((".", ")")), name
