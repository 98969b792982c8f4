"""Write a migration for what `batch_app/database/tables.py` says and the migrations don't yet.

    python tools/new_migration.py "Add the table of keys"

Read the result before committing it: a rename looks like a removal and an addition.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config

from batch_app import database


def main() -> None:
    message = sys.argv[1]
    number = len(list((database.MIGRATIONS_DIR / "versions").glob("[0-9]*.py"))) + 1
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS_DIR))
    config.set_main_option("file_template", f"{number:04d}_%%(slug)s")
    with tempfile.TemporaryDirectory() as folder:
        engine = database.connect(f"sqlite:///{Path(folder) / 'now.db'}")
        database.migrate(engine)
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            config.attributes["autogenerate"] = True
            command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")
        engine.dispose()


if __name__ == "__main__":
    main()
