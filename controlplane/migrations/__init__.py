"""The database's schema through time: Alembic's scripts, run from here and not by Alembic's own command.

To change the schema: change `model`, then write the next script in versions/ (tests/controlplane/test_migrations.py
fails until the two agree). A script never imports `model`: it says what was, and `model` what is.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from controlplane.errors import Unavailable
from controlplane.store_database import answering, connect_to

#: PostgreSQL's advisory lock that one migration at a time holds; any number that is ours alone.
_LOCK = 0x6E677075


def migrate(url: str) -> None:
    """Bring the database at `url` to this version's schema, in one transaction; makes SQLite's file. Blocks.

    Raises Unavailable if the database does not answer or is of a newer version, ValueError for a URL that is none.
    """
    engine = connect_to(url)
    try:
        with answering(), engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            _refuse_newer(_revision(connection))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def check_current(url: str) -> None:
    """Raise Unavailable, saying what to do, unless the database at `url` has this version's schema. Blocks."""
    engine = connect_to(url)
    try:
        with answering(), engine.connect() as connection:
            revision = _revision(connection)
    finally:
        engine.dispose()
    _refuse_newer(revision)
    if revision != _scripts().get_current_head():
        raise Unavailable("The database has not been migrated to this version: run `ngpu-controlplane migrate`.")


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(revision: str | None) -> None:
    if revision is not None and revision not in {script.revision for script in _scripts().walk_revisions()}:
        raise Unavailable("The database was made by a newer version of NGPU: install that version or a newer one.")


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    # A percent sign begins an interpolation in there.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
