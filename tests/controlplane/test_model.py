"""The table of task states, and what rows show of themselves."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from pydantic import ValidationError
from sqlmodel import SQLModel

from controlplane.model import ENDED, NEXT, OPEN, Role, State, Task, Token, UtcTime, Workspace

NOW = datetime(2025, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)


def test_the_table_knows_every_state_and_leads_each_to_an_end() -> None:
    assert set(NEXT) == set(State)
    assert {State.COMPLETED, State.FAILED, State.CANCELLED} == ENDED
    for state in set(State) - ENDED:
        assert NEXT[state] & ENDED


def test_the_index_of_open_tasks_covers_just_the_states_that_have_not_ended() -> None:
    assert f"state < {min(ENDED)}" == OPEN
    assert {state for state in State if state < min(ENDED)} == set(State) - ENDED


def test_times_keep_their_microseconds_and_their_zone() -> None:
    dialect = sa.create_engine("sqlite://").dialect
    kind = UtcTime()
    for time in (NOW, datetime(1969, 7, 20, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)):
        stored = kind.process_bind_param(time, dialect)
        assert isinstance(stored, int)
        assert kind.process_result_value(stored, dialect) == time
    elsewhere = NOW.astimezone(timezone(timedelta(hours=8)))
    assert kind.process_bind_param(elsewhere, dialect) == kind.process_bind_param(NOW, dialect)
    assert kind.process_bind_param(None, dialect) is None


def test_a_naive_time_is_refused() -> None:
    with pytest.raises(TypeError, match="offset-naive"):
        UtcTime().process_bind_param(datetime(2025, 1, 1), sa.create_engine("sqlite://").dialect)


def test_a_value_is_checked_as_it_is_made() -> None:
    with pytest.raises(ValidationError):
        Task.model_validate({"id": "t", "workspace_uid": "w"})


def test_a_row_does_not_show_credentials_and_bodies() -> None:
    workspace = Workspace(uid="w-1", id="4711" * 6, name="n", spec_json=b"secret", create_time=NOW)
    token = Token(id="t-1", secret_hash=b"secret", role=Role.OPERATOR, create_time=NOW)
    task = Task(
        id="t",
        workspace_uid="w-1",
        state=State.QUEUED,
        create_time=NOW,
        port=80,
        method="POST",
        path="/",
        request_headers_json=b"secret",
        request_body=b"secret",
        response_headers_json=b"secret",
        response_body=b"secret",
    )
    for row in (workspace, token, task):
        assert "secret'" not in repr(row)
        assert "4711" not in repr(row)


def test_every_table_is_declared_once() -> None:
    assert set(SQLModel.metadata.tables) == {
        *("workspace", "route", "node", "replica", "token"),
        *("task", "attempt", "price", "job", "webhook", "webhook_secret", "lease"),
    }
