"""Fresh databases: SQLite always, PostgreSQL where NGPU_TEST_POSTGRES_URL names a server that lets us make some."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

KINDS = ("sqlite", "postgresql")


@contextmanager
def fresh_database(kind: str, directory: Path) -> Iterator[str]:
    """The URL of an empty database, dropped afterwards. Skips the test where there is no server."""
    if kind == "sqlite":
        yield f"sqlite:///{directory / 'ngpu.db'}"
        return
    server = os.environ.get("NGPU_TEST_POSTGRES_URL")
    if not server:
        pytest.skip(
            "NGPU_TEST_POSTGRES_URL is not set (postgresql+psycopg://USER@HOST/DATABASE, with the right to create)"
        )
    name = f"ngpu_test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
