"""The database's schema through time: Alembic's scripts, run from here and not by Alembic's own command."""


def migrate(url: str) -> None:
    """Bring the database at `url` to this version's schema; makes it if it is new. Blocks. Raises Unavailable."""
    raise NotImplementedError


def check_current(url: str) -> None:
    """Raise Unavailable, saying what to do, unless the database at `url` has this version's schema. Blocks."""
    raise NotImplementedError
