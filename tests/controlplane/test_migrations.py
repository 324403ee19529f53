"""The scripts make the schema that `model` declares, on both databases."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlmodel import SQLModel

import controlplane.model
from controlplane import migrations
from controlplane.errors import Unavailable
from controlplane.migrations import check_current, migrate, migrate_apart
from controlplane.store_database import connect_to
from tests.controlplane.databases import KINDS, fresh_database


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with fresh_database(request.param, tmp_path) as url:
        yield url


def execute(url: str, statement: str) -> None:
    engine = connect_to(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_migrated_is_as_the_model_declares(url: str) -> None:
    migrate(url)
    engine = connect_to(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
        # The comparison above does not look at the conditions of partial indexes.
        made = {
            (table, index["name"]): condition_of(index["dialect_options"])
            for table in SQLModel.metadata.tables
            for index in sa.inspect(connection).get_indexes(table)
            if not index.get("duplicates_constraint")
        }
    engine.dispose()
    assert made == {
        (table.name, index.name): condition_of(index.dialect_kwargs)
        for table in SQLModel.metadata.tables.values()
        for index in table.indexes
    }


def condition_of(options: Mapping[str, object]) -> str:
    """The condition of a partial index, without the parentheses that PostgreSQL adds."""
    conditions = (str(value) for option, value in options.items() if option.endswith("_where"))
    return next(conditions, "").replace("(", "").replace(")", "")


def test_migrating_again_changes_nothing(url: str) -> None:
    migrate(url)
    migrate(url)
    check_current(url)


def test_migrating_apart_is_migrating(url: str) -> None:
    migrate_apart(url)
    check_current(url)
    migrate_apart(url)


def test_scripts_are_found_by_the_names_of_their_files(url: str) -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    by_alembic = [script.revision for script in scripts.walk_revisions()]
    files = sorted((Path(migrations.__file__).parent / "versions").glob("*.py"), reverse=True)
    assert [file.name.partition("_")[0] for file in files] == by_alembic
    migrate(url)
    execute(url, f"UPDATE alembic_version SET version_num = '{by_alembic[0]}'")
    check_current(url)


def test_a_database_that_was_not_migrated_is_refused_with_what_to_do(url: str) -> None:
    with pytest.raises(Unavailable, match="ngpu-controlplane migrate"):
        check_current(url)


def test_a_database_of_a_newer_version_is_refused(url: str) -> None:
    migrate(url)
    execute(url, "UPDATE alembic_version SET version_num = '9999'")
    for refused in (check_current, migrate, migrate_apart):
        with pytest.raises(Unavailable, match="newer version"):
            refused(url)


def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    execute(url, "CREATE TABLE attempt (in_the_way INTEGER)")  # the last one that the script makes
    with pytest.raises(sa.exc.SQLAlchemyError):
        migrate(url)
    engine = connect_to(url)
    assert sa.inspect(engine).get_table_names() == ["attempt"]
    engine.dispose()


def test_a_database_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/none/ngpu.db", "postgresql+psycopg://nobody:hidden@127.0.0.1:1/ngpu"):
        for refused in (check_current, migrate):
            with pytest.raises(Unavailable, match="does not answer") as caught:
                refused(url)
            assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "ngpu.db", "mysql://x:hidden@y/z", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_is_none_is_refused_in_words(url: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///|SQLite") as caught:
        migrate(url)
    assert "hidden" not in str(caught.value)


def test_the_scripts_ship_beside_the_code() -> None:
    directory = Path(controlplane.migrations.__file__).parent
    assert (directory / "env.py").is_file()
    assert list((directory / "versions").glob("0001_*.py"))
