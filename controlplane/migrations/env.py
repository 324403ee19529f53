"""What Alembic runs for every command: the scripts, over the connection that `migrations` hands it."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # SQLite can change a table only by making it anew.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
