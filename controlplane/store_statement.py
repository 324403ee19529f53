"""A statement that is given many rows at a time, on the hot path: compiled once, its values converted by us.

What SQLAlchemy does for each row of a compiled statement costs more than the database does.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

#: A row as parameters of a statement.
Row = Mapping[str, Any]

#: With placeholders by position: a row is then a tuple.
_DIALECTS: Final[Mapping[str, sa.Dialect]] = {
    "sqlite": sqlite.dialect(paramstyle="qmark"),
    "postgresql": postgresql.psycopg.dialect(paramstyle="format"),  # type: ignore[no-untyped-call]
}
#: As the driver takes them; binary needs no wrapping.
_AS_THEY_ARE: Final = (sa.LargeBinary, sa.Integer, sa.String, sa.Boolean)


class Statement:
    """An INSERT or UPDATE. `columns`: of an INSERT, those that are given values."""

    def __init__(self, make: Callable[[str], sa.Insert | sa.Update], *, columns: Sequence[str] | None = None) -> None:
        self._forms = {name: _Form(make(name), dialect, columns) for name, dialect in _DIALECTS.items()}

    def run(self, connection: sa.Connection, rows: Sequence[Row]) -> int:
        """Execute it for each row. Gives how many rows of the table were added or changed, all together."""
        form = self._forms[connection.dialect.name]
        values = form.values(rows)
        if connection.dialect.name != "sqlite":
            return connection.exec_driver_sql(form.text, values, execution_options=_COUNTED).rowcount
        # For a single row SQLAlchemy takes as long as the database. `store_database.is_down` knows the driver's errors.
        raw: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]
        cursor = raw.executemany(form.text, values)
        count = cursor.rowcount
        cursor.close()
        return count


def add_or_not(table: sa.Table) -> Mapping[str, sa.Insert]:
    """By dialect, an INSERT that leaves alone what is there. Two constructs: SQLAlchemy has none for both."""
    return {
        "sqlite": sqlite.insert(table).on_conflict_do_nothing(),
        "postgresql": postgresql.insert(table).on_conflict_do_nothing(),
    }


#: Of an INSERT too.
_COUNTED: Final = {"preserve_rowcount": True}


class _Form:
    """A statement in one database's dialect."""

    def __init__(self, statement: sa.Insert | sa.Update, dialect: sa.Dialect, columns: Sequence[str] | None) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        assert isinstance(compiled, sa.sql.compiler.SQLCompiler)
        assert compiled.positiontup is not None
        self.text = str(compiled)
        self._names = tuple(compiled.positiontup)
        self._converted = [
            (at, convert)
            for at, name in enumerate(self._names)
            if (convert := _conversion(compiled.binds[name].type, dialect)) is not None
        ]

    def values(self, rows: Sequence[Row]) -> list[tuple[Any, ...]]:
        """The rows as the driver takes them."""
        names, converted = self._names, self._converted
        if not converted:
            return [tuple([row[name] for name in names]) for row in rows]
        taken = []
        for row in rows:
            values = [row[name] for name in names]
            for at, convert in converted:
                values[at] = convert(values[at])
            taken.append(tuple(values))
        return taken


def _conversion(kind: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> Callable[[Any], Any] | None:
    if isinstance(kind, _AS_THEY_ARE):
        return None
    return kind.dialect_impl(dialect).bind_processor(dialect)
