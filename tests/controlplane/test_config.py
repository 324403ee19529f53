"""Settings: where they come from, which wins, and that every fault is told at once."""

import os
import subprocess
import sys
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from controlplane import config
from controlplane.__main__ import placement_policy
from controlplane.placement import Policy


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(config.ENV_PREFIX):
            monkeypatch.delenv(name)


def write(directory: Path, text: str) -> Path:
    file = directory / "controlplane.toml"
    file.write_text(text)
    return file


def faults(file: Path | None, **options: object) -> list[str]:
    with pytest.raises(config.ConfigFault) as caught:
        config.load(file, options)
    return str(caught.value).splitlines()


def test_defaults_will_do() -> None:
    settings = config.load(None, {})
    assert settings.listen == "127.0.0.1:50051"
    assert settings.metrics_listen == "127.0.0.1:9464"
    assert settings.database == f"sqlite:///{Path.cwd() / '.ngpu/controlplane/ngpu.db'}"
    assert settings.node_timeout == 15
    assert settings.body_retention == 7 * 86400
    assert settings.assets.tickers == ["AINN"]
    assert settings.asset_check_on_error == "deny"


def test_command_line_wins_over_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, 'node_timeout = "1m"\nhold = "3m"\nstart_grace = 5\n')
    monkeypatch.setenv("NGPU_CONTROLPLANE_NODE_TIMEOUT", "20s")
    monkeypatch.setenv("NGPU_CONTROLPLANE_HOLD", "1h30m")
    settings = config.load(file, {"node_timeout": "25s", "hold": None})
    assert (settings.node_timeout, settings.hold, settings.start_grace) == (25, 5400, 5)


def test_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPU_CONTROLPLANE_CONFIG", str(write(tmp_path, "hold = 7\n")))
    assert config.load(None, {}).hold == 7


def test_sections_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path,
        '[assets]\ntickers = ["ORDI"]\ncache = 0\n[[assets.providers]]\nkind = "unisat"\napi_key = "secret"\n',
    )
    monkeypatch.setenv("NGPU_CONTROLPLANE_ASSETS__TICKERS", "AINN, SATS")
    assets = config.load(file, {}).assets
    assert assets.tickers == ["AINN", "SATS"]
    assert assets.cache == 0
    assert assets.providers[0].api_key.get_secret_value() == "secret"
    assert "secret" not in repr(assets)


def test_every_fault_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path,
        'display_timezone = "Mars/Olympus"\nnode_timeout = "soon"\nhold = -1\nfast = true\n'
        '[assets]\ntickerz = ["X"]\n[[assets.providers]]\nurl = "x"\n',
    )
    monkeypatch.setenv("NGPU_CONTROLPLANE_LISTEN", "50051")
    monkeypatch.setenv("NGPU_CONTROLPLANE_LISTENN", "127.0.0.1:1")
    told = faults(file, tls_cert=tmp_path / "none.pem", log_level="loud")
    for name in (
        "display_timezone",
        "node_timeout",
        "hold",
        "fast",
        "assets.tickerz",
        "assets.providers.0.kind",
        "assets.providers.0.url",
        "listen",
        "NGPU_CONTROLPLANE_LISTENN",
        "tls_cert",
        "log_level",
    ):
        assert [line for line in told if line.startswith(f"{name}: ")], (name, told)


def test_faults_of_the_assets_are_told_with_the_others() -> None:
    def asset_faults(section: config.Assets) -> list[str]:
        return [f"network: {section.network} is none", "tickers: too few"]

    with pytest.raises(config.ConfigFault) as caught:
        config.load(None, {"hold": 0}, asset_faults=asset_faults)
    told = str(caught.value).splitlines()
    assert "assets.network: mainnet is none" in told
    assert "assets.tickers: too few" in told
    assert [line for line in told if line.startswith("hold: ")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"listen": "0.0.0.0:50051"}, "can be reached from other machines"),
        ({"listen": "[::]:50051"}, "can be reached from other machines"),
        ({"listen": "example.org:50051"}, "can be reached from other machines"),
        ({"listen": "127.0.0.1"}, "no HOST:PORT"),
        ({"listen": "::1:50051"}, "in brackets"),
        ({"listen": "127.0.0.1:65536"}, "no HOST:PORT"),
        ({"metrics_listen": "here"}, "no HOST:PORT"),
    ],
)
def test_addresses_that_will_not_do(options: dict[str, str], words: str) -> None:
    (told,) = faults(None, **options)
    assert words in told


@pytest.mark.parametrize(
    "options",
    [
        {"listen": "127.0.0.1:0"},
        {"listen": "localhost:1"},
        {"listen": "[::1]:1"},
        {"listen": "127.1.2.3:1"},
        {"listen": "0.0.0.0:1", "allow_plaintext": True},
        {"metrics_listen": ""},
    ],
)
def test_addresses_that_will_do(options: dict[str, object]) -> None:
    config.load(None, options)


def test_tls_needs_both_files_and_opens_the_address(tmp_path: Path) -> None:
    pem = write(tmp_path, "")
    assert faults(None, tls_cert=pem) == ["tls_key: tls_cert and tls_key come together"]
    assert faults(None, tls_key=pem) == ["tls_key: tls_cert and tls_key come together"]
    config.load(None, {"tls_cert": pem, "tls_key": pem, "listen": "0.0.0.0:50051"})


def test_missing_file_is_told(tmp_path: Path) -> None:
    assert faults(tmp_path / "none.toml") == [f"{tmp_path}/none.toml: there is no such file"]


def test_file_that_is_no_toml_is_told(tmp_path: Path) -> None:
    (told,) = faults(write(tmp_path, "= 1\n"))
    assert "controlplane.toml" in told


def test_zone_is_known() -> None:
    assert config.load(None, {"display_timezone": "Asia/Shanghai"}).zone == ZoneInfo("Asia/Shanghai")


def test_every_setting_is_explained() -> None:
    rows = config.settings()
    assert len(rows) > 20
    assert [name for name, _, meaning in rows if not meaning] == []
    assert config.env_name("assets.tickers") == "NGPU_CONTROLPLANE_ASSETS__TICKERS"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controlplane", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_faults_end_the_program_with_2(tmp_path: Path) -> None:
    ended = run("run", "--state-dir", str(tmp_path), "--listen", "0.0.0.0:1", "--log-level", "loud")
    assert ended.returncode == 2
    assert "can be reached from other machines" in ended.stderr
    assert "log_level" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_teaches() -> None:
    assert "operator.token" in run("run", "--help").stdout
    listed = run("settings").stdout
    assert "NGPU_CONTROLPLANE_ASSET_CHECK_ON_ERROR" in listed
    assert "node_timeout = 15" in listed


def test_placement_weighs_as_the_file_says(tmp_path: Path) -> None:
    assert placement_policy(config.load(None, {}).placement) == Policy()
    file = write(tmp_path, '[placement]\nscarcity = 0\nimage_per_gib = 0.5\ndisk_reserve = "20GiB"\n')
    policy = placement_policy(config.load(file, {}).placement)
    assert policy == Policy(scarcity=0, image_per_gib=0.5, disk_reserve_bytes=20 * 1024**3)


def test_weights_that_make_no_sense_are_told(tmp_path: Path) -> None:
    file = write(tmp_path, "[placement]\nleftover = -1\nscarcity_base = 1\nbeauty = 2\n")
    told = faults(file)
    assert len(told) == 3
    assert all(line.startswith("placement.") for line in told)
