"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _create_index(name: str, table: str, columns: list[str], *, where: str, unique: bool) -> None:
    op.create_index(name, table, columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "workspace",
        sa.Column("uid", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec_json", sa.LargeBinary(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("delete_time", sa.BigInteger(), nullable=True),
        sa.Column("unplaced_json", sa.LargeBinary(), nullable=True),
        sa.Column("deployment_json", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("id"),
    )
    _create_index("workspace_living", "workspace", ["name"], where="delete_time IS NULL", unique=True)
    op.create_table(
        "route",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "node",
        sa.Column("addr", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("availability", sa.Integer(), nullable=False),
        sa.Column("enroll_time", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_time", sa.BigInteger(), nullable=True),
        sa.Column("revoke_time", sa.BigInteger(), nullable=True),
        sa.Column("ip", sa.String(), nullable=False),
        sa.Column("inventory_json", sa.LargeBinary(), nullable=False),
        sa.Column("health_json", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("addr"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "replica",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("node_addr", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("gpu_ids_json", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("drain_time", sa.BigInteger(), nullable=True),
        sa.Column("stop_time", sa.BigInteger(), nullable=True),
        sa.Column("gone_time", sa.BigInteger(), nullable=True),
        sa.Column("explanation_json", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "token",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("role", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("expire_time", sa.BigInteger(), nullable=True),
        sa.Column("revoke_time", sa.BigInteger(), nullable=True),
        sa.Column("use_time", sa.BigInteger(), nullable=True),
        sa.Column("used_by", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("secret_hash"),
    )
    op.create_table(
        "task",
        sa.Column("number", _SERIAL, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("start_time", sa.BigInteger(), nullable=True),
        sa.Column("end_time", sa.BigInteger(), nullable=True),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("query", sa.String(), nullable=False),
        sa.Column("request_headers_json", sa.LargeBinary(), nullable=False),
        sa.Column("request_body", sa.LargeBinary(), nullable=True),
        sa.Column("request_size", sa.BigInteger(), nullable=False),
        sa.Column("repeatable", sa.Boolean(), nullable=False),
        sa.Column("btc_address", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("request_hash", sa.LargeBinary(), nullable=True),
        sa.Column("user_ip", sa.String(), nullable=False),
        sa.Column("origin_url", sa.String(), nullable=False),
        sa.Column("operation", sa.String(), nullable=False),
        sa.Column("streamed", sa.Boolean(), nullable=False),
        sa.Column("cancel_on_hangup", sa.Boolean(), nullable=False),
        sa.Column("callback_url", sa.String(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("replica_id", sa.String(), nullable=False),
        sa.Column("node_addr", sa.String(), nullable=False),
        sa.Column("assign_time", sa.BigInteger(), nullable=True),
        sa.Column("assign_reason", sa.String(), nullable=False),
        sa.Column("response_status", sa.Integer(), nullable=False),
        sa.Column("response_headers_json", sa.LargeBinary(), nullable=False),
        sa.Column("response_body", sa.LargeBinary(), nullable=True),
        sa.Column("response_size", sa.BigInteger(), nullable=False),
        sa.Column("response_is_utf8", sa.Boolean(), nullable=False),
        sa.Column("gpu_us", sa.BigInteger(), nullable=False),
        sa.Column("cause", sa.Integer(), nullable=False),
        sa.Column("failure_reason", sa.String(), nullable=False),
        sa.Column("failure_message", sa.String(), nullable=False),
        sa.Column("expire_time", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("id"),
    )
    _create_index(
        "task_of_key", "task", ["workspace_uid", "idempotency_key"], where="idempotency_key IS NOT NULL", unique=True
    )
    op.create_index("task_of_workspace", "task", ["workspace_uid", "create_time", "number"])
    _create_index("task_open", "task", ["number"], where="state < 3", unique=False)
    _create_index(
        "task_with_bodies", "task", ["end_time"], where="end_time IS NOT NULL AND expire_time IS NULL", unique=False
    )
    _create_index(
        "task_passed_on",
        "task",
        ["end_time"],
        where="streamed AND end_time IS NOT NULL AND expire_time IS NULL "
        "AND (request_size > 65536 OR response_size > 65536)",
        unique=False,
    )
    op.create_table(
        "price",
        sa.Column("gpu_model", sa.String(), nullable=False),
        sa.Column("effective_time", sa.BigInteger(), nullable=False),
        sa.Column("nanos", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("gpu_model", "effective_time"),
    )
    op.create_table(
        "job",
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("replica_id", sa.String(), nullable=False),
        sa.Column("node_addr", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("workspace_uid", "id"),
    )
    op.create_index("job_of_task", "job", ["task_id"])
    op.create_table(
        "attempt",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("replica_id", sa.String(), nullable=False),
        sa.Column("node_addr", sa.String(), nullable=False),
        sa.Column("node_ip", sa.String(), nullable=False),
        sa.Column("gpu_ids_json", sa.LargeBinary(), nullable=False),
        sa.Column("delivery", sa.Integer(), nullable=False),
        sa.Column("assign_time", sa.BigInteger(), nullable=False),
        sa.Column("end_time", sa.BigInteger(), nullable=False),
        sa.Column("sent_after_us", sa.BigInteger(), nullable=False),
        sa.Column("first_byte_after_us", sa.BigInteger(), nullable=False),
        sa.Column("last_byte_after_us", sa.BigInteger(), nullable=False),
        sa.Column("gpu_us", sa.BigInteger(), nullable=False),
        sa.Column("http_status", sa.Integer(), nullable=False),
        sa.Column("cause", sa.Integer(), nullable=False),
        sa.Column("failure_reason", sa.String(), nullable=False),
        sa.Column("failure_message", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("queue_time", sa.BigInteger(), nullable=True),
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("gpu_model", sa.String(), nullable=False),
        sa.Column("gpu_count", sa.Integer(), nullable=False),
        sa.Column("price_nanos", sa.BigInteger(), nullable=False),
        sa.Column("cost_nanos", sa.BigInteger(), nullable=False),
        sa.Column("decision_json", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("task_id", "number"),
    )
    op.create_index("attempt_of_workspace", "attempt", ["workspace_uid", "end_time"])
    op.create_table(
        "webhook",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("next_time", sa.BigInteger(), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("tries_json", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("task_id"),
    )
    _create_index(
        "webhook_waiting",
        "webhook",
        ["next_time", "host", "workspace_uid"],
        where="next_time IS NOT NULL",
        unique=False,
    )
    op.create_table(
        "webhook_secret",
        sa.Column("workspace_uid", sa.String(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("previous_secret", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("workspace_uid"),
    )
    op.create_table(
        "lease",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("bodies_id", sa.String(), nullable=False),
        sa.Column("expire_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
