"""Alembic's environment: runs on the connection (and in the transaction) that `migrate` opened."""

from typing import Any, Literal

from alembic import context

from batch_app.database import UtcDateTime, metadata


def _render_item(kind: str, item: Any, _autogen_context: Any) -> str | Literal[False]:
    """Migrations outlive the code: they name plain SQLAlchemy types only."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    render_item=_render_item,
    # A comparison for a new migration must not be taken for a difference in type.
    compare_type=False,
)
context.run_migrations()
