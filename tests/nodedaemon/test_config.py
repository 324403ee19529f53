"""Settings: file, environment, command line, each winning over the one before; all faults at once."""

from pathlib import Path

import pytest

from nodedaemon.config import Config, load, settings
from nodedaemon.errors import ConfigFault


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("NGPU_NODE_"):
            monkeypatch.delenv(name)


def test_defaults_need_nothing() -> None:
    config = load(None, {})
    assert config.controlplane == "127.0.0.1:50051"
    assert config.images == Path(".ngpu/node/images")
    assert config.join_token() == ""
    assert config.node_name()


def test_command_line_wins_over_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "node.toml"
    file.write_text('name = "of-file"\nengine = "docker"\nstop_grace = "2m"\nspool_limit = "1GiB"\n')
    monkeypatch.setenv("NGPU_NODE_NAME", "of-environment")
    monkeypatch.setenv("NGPU_NODE_ENGINE", "process")
    monkeypatch.setenv("NGPU_NODE_CONFIG", str(file))
    config = load(None, {"name": "of-command-line", "engine": None})
    assert (config.name, config.engine, config.stop_grace) == ("of-command-line", "process", 120.0)
    assert config.spool_limit == 1024**3


def test_all_faults_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text('engine = "podman"\ncolour = "red"\ncontrolplane = "nowhere"\ntls_ca = "/not/there"\n')
    monkeypatch.setenv("NGPU_NODE_TOKENS", "x")
    with pytest.raises(ConfigFault) as fault:
        load(file, {"stop_grace": "soon", "name": "Not A Name"})
    lines = str(fault.value).splitlines()
    assert len(lines) == 7
    for word in ("NGPU_NODE_TOKENS", "engine:", "colour:", "controlplane:", "tls_ca:", "stop_grace:", "name:"):
        assert any(line.startswith(word) for line in lines), word


def test_token_comes_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("ngpu-abc\n")
    assert load(None, {"token_file": file}).join_token() == "ngpu-abc"
    with pytest.raises(ConfigFault, match="one of them"):
        load(None, {"token_file": file, "token": "other"})


def test_token_is_not_shown() -> None:
    assert "secret" not in repr(load(None, {"token": "secret"}))


@pytest.mark.parametrize(
    ("options", "fine"),
    [
        ({"controlplane": "10.1.2.3:50051"}, False),
        ({"controlplane": "[::1]:50051"}, True),
        ({"controlplane": "10.1.2.3:50051", "tls": True}, True),
        ({"controlplane": "10.1.2.3:50051", "allow_plaintext": True}, True),
    ],
)
def test_plaintext_leaves_the_machine_only_if_told(options: dict[str, object], fine: bool) -> None:
    if fine:
        load(None, options)
    else:
        with pytest.raises(ConfigFault, match="without TLS"):
            load(None, options)


def test_every_setting_says_what_it_means() -> None:
    assert {name for name, _, _ in settings()} == set(Config.__struct_fields__)
    assert all(meaning for _, _, meaning in settings())


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigFault, match="no such file"):
        load(tmp_path / "none.toml", {})


def test_broken_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("name =")
    with pytest.raises(ConfigFault, match=r"node\.toml"):
        load(file, {})
