"""Write the documents that are made from the code: docs/settings.md.

python tools/write_docs.py            write them
python tools/write_docs.py --check    exit with 1 if one of them is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from batch_app.config import Settings

ROOT = Path(__file__).parents[1]

SETTINGS_HEAD = """\
# Settings

Each may be set, from weakest to strongest: as it is by default; in `vllm-batch.toml` in the folder
the program is started from (another file: `VLLM_BATCH_CONFIG`); in the environment, as
`VLLM_BATCH_` and the name in capitals; by a flag, for those that have one (`vllm-batch serve
--help`).

```toml
# vllm-batch.toml
data_dir = "/srv/batches"
port = 8081
```

An unknown name in the file is an error. This page is made by `tools/write_docs.py`.

| setting | default | meaning |
|---|---|---|
"""


def settings_page() -> str:
    """docs/settings.md, from the fields' own descriptions."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default if field.default != "" else "(empty)"
        rows.append(f"| `{name}` | `{default}` | {field.description} |\n")
    return SETTINGS_HEAD + "".join(rows)


PAGES = {ROOT / "docs" / "settings.md": settings_page}


def stale_pages() -> list[Path]:
    """The documents that aren't what the code says."""
    return [
        path
        for path, make in PAGES.items()
        if not path.exists() or path.read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    stale = stale_pages()
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run tools/write_docs.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(PAGES[path](), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
