"""Whether a file or folder is still the one that was opened: somebody may have removed it, or put
another in its place. What is written then is lost, and nothing says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PathIdentity:
    """What was at a path at some time."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> PathIdentity:
        """Raises OSError where there is nothing."""
        found = path.stat()
        return cls(path, found.st_dev, found.st_ino)

    def change(self) -> str | None:
        """What has become of it: `removed` or `replaced`; None: it is there. One call of `stat`."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return "removed"
        except OSError as error:
            return f"made unreachable ({error.strerror})"
        same = (found.st_dev, found.st_ino) == (self.device, self.inode)
        return None if same else "replaced"
