"""Count the finish reasons of answers"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Batches from before have 0 in all: what their answers ended with was not noted.
    for reason in ("stop", "length", "tool_calls", "content_filter", "other"):
        op.add_column(
            "batches",
            sa.Column(f"finish_{reason}", sa.BigInteger(), server_default="0", nullable=False),
        )
