"""Retention: how long files are kept, whatever their owners said.

Worked out from the settings whenever it is asked for, and not stored with a file: a change of the
settings holds for the files that are there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from batch_app.config import Settings
from batch_app.core import FilePurpose, StoredFile


@dataclass(frozen=True, slots=True)
class Retention:
    """The longest life of each kind of file, from its creation; a kind without one has no end."""

    lives: Mapping[FilePurpose, timedelta]

    @classmethod
    def of(cls, settings: Settings) -> Retention:
        seconds = {
            FilePurpose.BATCH: settings.retention_input_s,
            FilePurpose.BATCH_OUTPUT: settings.retention_output_s,
        }
        return cls({kind: timedelta(seconds=life) for kind, life in seconds.items() if life})

    def applied_to(self, file: StoredFile) -> StoredFile:
        """The file with the `expires_at` that holds: its owner's wish or ours, the earlier one."""
        life = self.lives.get(file.purpose)
        if life is None:
            return file
        end = file.created_at + life
        if file.expires_at is not None and file.expires_at <= end:
            return file
        return replace(file, expires_at=end)

    def outlived(self, now: datetime) -> dict[FilePurpose, datetime]:
        """For each kind that has a longest life: files made before this have outlived it."""
        return {kind: now - life for kind, life in self.lives.items()}
