"""What tests of the control plane stand on: a database, a dispatcher's world, the command line with a control plane."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from controlplane.ctl.app import app
from controlplane.migrations import migrate
from controlplane.store import Store
from tests.controlplane.ctl_fakes import TOKEN, FakeControlPlane, Ngpu
from tests.controlplane.databases import KINDS, fresh_database
from tests.controlplane.fakes_dispatch import World, a_world, migrated

#: What would change where and how the command line connects.
ELSEWHERE = ("NGPU_TOKEN_FILE", "NGPU_TLS", "NGPU_TLS_CA", "NGPU_PLAINTEXT", "NGPU_WORKSPACE", "NGPU_DEBUG")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied."""
    return migrated(tmp_path_factory.mktemp("template"))


@pytest.fixture
async def world(template: Path, tmp_path: Path) -> AsyncIterator[World]:
    """A dispatcher with everything around it."""
    async with a_world(template, tmp_path) as world:
        yield world


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated database of each kind."""
    with fresh_database(request.param, tmp_path) as url:
        migrate(url)
        yield url


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    """It, opened."""
    store = await Store.open(url)
    yield store
    await store.close()


@pytest.fixture
def plane() -> Iterator[FakeControlPlane]:
    """A control plane that answers as a test says."""
    fake = FakeControlPlane()
    yield fake
    fake.stop()


@pytest.fixture
def ngpu(plane: FakeControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ngpu:
    """The command line, connected to `plane`: gives what it printed if it ended with `code`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NGPU_TOKEN", TOKEN)
    monkeypatch.setenv("NGPU_SERVER", plane.address)

    def run(*arguments: str, code: int = 0, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(app, arguments, input=stdin)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run
