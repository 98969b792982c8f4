"""docs/api.md names every route of the app, and none that isn't there."""

from __future__ import annotations

import re
from pathlib import Path

from batch_app.api_server import create_app
from batch_app.config import Settings
from batch_app.core import Endpoint

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_table_has_every_route(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[[model]]\nname = "sim"\nsource = "sim"\n')
    settings = Settings(
        data_dir=tmp_path, models=tmp_path / "models.toml", benchmarks_dir=tmp_path / "none"
    )
    app = create_app(settings)
    paths = app.openapi()["paths"]
    app.state.services.store.close()
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    listed = re.findall(r"^\| `([A-Z]+ /\S+)` \|", PAGE, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == routes


def test_every_endpoint_of_a_line_is_named() -> None:
    for endpoint in Endpoint:
        assert f"`{endpoint}`" in PAGE


def test_every_code_that_is_raised_is_named() -> None:
    sources = (Path(__file__).parents[2] / "batch_app").rglob("*.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    patterns = (r'code="(\w+)"', r'Line(?:Error|Problem)\(\s*"(\w+)"')
    raised = {name for pattern in patterns for name in re.findall(pattern, code)}
    # Of an address that nobody uses on purpose, and of a defect.
    raised -= {"host_not_allowed", "invalid_transition"}
    raised -= {"gated_model", "model_exists", "model_in_use"}  # of the command line alone
    assert len(raised) > 10
    missing = sorted(name for name in raised if f"`{name}`" not in PAGE)
    assert missing == []
