"""Say why a batch is paused, since when, and when it is tried again"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("batches") as batches:
        batches.add_column(sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
        batches.add_column(sa.Column("paused_by", sa.String(length=64), nullable=True))
        batches.add_column(sa.Column("retry_at", sa.DateTime(timezone=True), nullable=True))
        batches.add_column(sa.Column("pause_kind", sa.String(length=32), nullable=True))
        batches.add_column(sa.Column("pause_model", sa.Text(), nullable=True))
        batches.add_column(sa.Column("pause_entry", sa.String(length=64), nullable=True))
        batches.add_column(
            sa.Column("num_pauses", sa.Integer(), nullable=False, server_default="0")
        )
