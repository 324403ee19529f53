"""The database's schema through time: Alembic's scripts, run from here and not by Alembic's own command.

To change the schema: change `model`, then write the next script in versions/ (tests/controlplane/test_migrations.py
fails until the two agree). A script never imports `model`: it says what was, and `model` what is. The scripts' files
begin with their revision: to know whether there is anything to do Alembic is not needed, which takes 11 MiB.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from controlplane.errors import Unavailable
from controlplane.store_database import answering, connect_to

#: PostgreSQL's advisory lock that one migration at a time holds; any number that is ours alone.
_LOCK: Final = 0x6E677075
_HERE: Final = Path(__file__).parent
#: Where Alembic keeps the database's revision.
_VERSION: Final = sa.table("alembic_version", sa.column("version_num"))


def migrate(url: str) -> None:
    """Bring the database at `url` to this version's schema, in one transaction; makes SQLite's file. Blocks.

    Raises Unavailable if the database does not answer or is of a newer version, ValueError for a URL that is none.
    """
    from alembic import command
    from alembic.config import Config

    engine = connect_to(url)
    try:
        with answering(), engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            _refuse_newer(_revision(connection))
            config = Config()
            # A percent sign begins an interpolation in there.
            config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def migrate_apart(url: str) -> None:
    """`migrate`, if there is anything to do, in a process of its own: what that takes would stay in this one's memory.

    Raises Unavailable, ValueError as that.
    """
    if _revision_at(url) == _revisions()[-1]:
        return
    done = subprocess.run(  # noqa: S603 ourselves
        [sys.executable, "-m", "controlplane.migrations", url], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(done.stderr.strip().rpartition("\n")[2])


def check_current(url: str) -> None:
    """Raise Unavailable, saying what to do, unless the database at `url` has this version's schema. Blocks."""
    revision = _revision_at(url)
    _refuse_newer(revision)
    if revision != _revisions()[-1]:
        raise Unavailable("The database has not been migrated to this version: run `ngpu-controlplane migrate`.")


def _revision_at(url: str) -> str | None:
    engine = connect_to(url)
    try:
        with answering(), engine.connect() as connection:
            return _revision(connection)
    finally:
        engine.dispose()


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(_VERSION.name):
        return None
    return connection.scalar(sa.select(_VERSION.c.version_num))


def _revisions() -> list[str]:
    """All that this version knows, the oldest first."""
    return sorted(file.name.partition("_")[0] for file in (_HERE / "versions").glob("[0-9]*_*.py"))


def _refuse_newer(revision: str | None) -> None:
    if revision is not None and revision not in _revisions():
        raise Unavailable("The database was made by a newer version of NGPU: install that version or a newer one.")
