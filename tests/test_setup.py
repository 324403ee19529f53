"""What the commands set up before they run: a virtualenv that several may want at once."""

import subprocess
from pathlib import Path

import pytest

from scripts.programs import ROOT

#: Stands where pip would: says what it was asked for, and that it ended.
PIP = """#!/bin/sh
echo "begin $*" >> asked
sleep 0.2
[ ! -e broken ] || exit 1
echo end >> asked
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    pip = tmp_path / ".venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text(PIP)
    pip.chmod(0o755)
    return tmp_path


def begin(project: Path, extras: str) -> subprocess.Popen[str]:
    command = ["bash", "-euc", f"source {ROOT}/scripts/setup.sh; setup_venv {extras}"]
    return subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)


def ended(child: subprocess.Popen[str]) -> int:
    """Its exit status; what it said is dropped."""
    child.communicate(timeout=30)
    return child.returncode


def asked(project: Path) -> list[str]:
    """What pip was asked to install, one line each with the ends between."""
    try:
        return [line.rpartition(" ")[2] for line in (project / "asked").read_text().splitlines()]
    except FileNotFoundError:
        return []


def test_what_is_there_is_left_alone(project: Path) -> None:
    assert ended(begin(project, "postgres,check,test")) == 0
    assert asked(project) == [".[check,postgres,test]", "end"]
    # Fewer of them, and the same in another order.
    assert ended(begin(project, "postgres")) == 0
    assert ended(begin(project, "test,check")) == 0
    assert asked(project) == [".[check,postgres,test]", "end"]


def test_a_missing_extra_comes_to_the_others_and_a_changed_project_is_installed_again(project: Path) -> None:
    assert ended(begin(project, "postgres")) == 0
    assert ended(begin(project, "test")) == 0
    assert asked(project) == [".[postgres]", "end", ".[postgres,test]", "end"]
    (project / "pyproject.toml").write_text("[project]\nname='other'\n")
    assert ended(begin(project, "test")) == 0
    assert asked(project)[4:] == [".[test]", "end"]


def test_commands_at_once_install_once(project: Path) -> None:
    children = [begin(project, "postgres") for _ in range(4)]
    assert [ended(child) for child in children] == [0, 0, 0, 0]
    assert asked(project) == [".[postgres]", "end"]


def test_an_installation_that_failed_is_not_taken_for_one(project: Path) -> None:
    assert ended(begin(project, "postgres")) == 0
    (project / "broken").touch()
    assert ended(begin(project, "postgres,test")) == 1
    (project / "broken").unlink()
    assert ended(begin(project, "postgres")) == 0
    assert asked(project) == [".[postgres]", "end", ".[postgres,test]", ".[postgres]", "end"]
