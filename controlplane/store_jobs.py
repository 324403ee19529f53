"""The jobs of containers by their own ids, as SQL: rows that only workspaces have which declare how to follow jobs.

They go with the bodies of their tasks (store_tasks.expire).
"""

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from controlplane.model import Job, JobTable
from controlplane.store_database import table_of

_job: Final = table_of(JobTable)
_KEY: Final = [_job.c.workspace_uid, _job.c.id]


def _upsert(insert: Any) -> Any:
    return insert.on_conflict_do_update(
        index_elements=_KEY,
        set_={name: insert.excluded[name] for name in ("task_id", "attempt", "replica_id", "node_addr")},
    )


_PUT: Final[Mapping[str, sa.Insert]] = {
    "sqlite": _upsert(sqlite.insert(_job)),
    "postgresql": _upsert(postgresql.insert(_job)),
}
_BY_ID: Final = sa.select(_job).where(
    _job.c.workspace_uid == sa.bindparam("of_workspace"), _job.c.id == sa.bindparam("of_job")
)
_OF_TASK: Final = sa.select(_job).where(_job.c.task_id == sa.bindparam("of_task")).order_by(_job.c.attempt)


def put(connection: sa.Connection, row: Job) -> None:
    """Add it, or put it in place of that of the same id."""
    connection.execute(_PUT[connection.dialect.name], row.__dict__)


def job(connection: sa.Connection, workspace_uid: str, job_id: str) -> Job | None:
    """The job that a container of the workspace gave that id."""
    row = connection.execute(_BY_ID, {"of_workspace": workspace_uid, "of_job": job_id}).mappings().first()
    return None if row is None else Job(**row)


def jobs_of(connection: sa.Connection, task_id: str) -> list[Job]:
    """The jobs that a task has become, by attempt."""
    return [Job(**row) for row in connection.execute(_OF_TASK, {"of_task": task_id}).mappings()]
