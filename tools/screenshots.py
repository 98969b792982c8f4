"""Take the pictures of the dashboard that README and docs/dashboard.md show.

A site of its own, with the simulated engine, in a temporary folder. Needs Chromium and playwright.

    make screenshots
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import orjson

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.browser import PHONE, Tab, started  # noqa: E402
from support.site import Site, echo_line  # noqa: E402

IMAGES = ROOT / "docs" / "images"
LONG = "a question of more words than the context of this model has room for"


def main() -> int:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="screenshots-") as folder:
        site = Site(
            Path(folder), heartbeat_s=0.5, poll_interval_s=0.2, progress_log_s=2, min_free_bytes=0
        )
        try:
            url = site.start_server()
            site.start_worker()
            with started() as browser:
                take(site, url, browser, IMAGES)
        finally:
            site.close()
    return 0


def take(
    site: Site, url: str, browser: Any, images: Path, *, share: float = 1.0, settle_ms: int = 600
) -> None:
    """Seven pictures of a site with some history, one batch at work and two that wait.

    `share`: of the requests, for a quick look that the pictures can be taken at all.
    """

    def submit(name: str, num: int, model: str, num_long: int = 0) -> str:
        lines = [echo_line(n) for n in range(int(num * share))]
        for line in lines[:num_long]:
            line["body"]["messages"][0]["content"] = LONG
        content = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        form: dict[str, Any] = {"data": {"model": model}, "files": {"file": (name, content)}}
        answer = httpx.post(f"{url}/v1/batches", timeout=60, **form)
        return str(answer.raise_for_status().json()["batch_id"])

    submit("support-tickets-march.jsonl", 4000, "sim")
    failed = submit("product-descriptions.jsonl", 600, "tiny-context", 23)
    measured = submit("reviews-sample.jsonl", 1200, "slow")
    site.wait_until_done(measured)
    running = submit("reviews-2026.jsonl", 12000, "slow")
    submit("translations-fr.jsonl", 2500, "sim")
    submit("reviews-2025.jsonl", 9000, "slow")
    site.wait_for_progress(running, int(4500 * share))

    def shoot(tab: Tab, path: str, name: str, *, whole: bool = False) -> None:
        """The page, or its upper part, once it has heard how things stand."""
        page = tab.go(path)
        page.wait_for_function("() => connection.isReady")
        page.wait_for_timeout(settle_ms)
        page.screenshot(path=images / f"{name}.png", full_page=whole)

    for scheme in ("light", "dark"):
        desk = Tab(browser, url, color_scheme=scheme)
        phone = Tab(browser, url, viewport=PHONE, color_scheme=scheme)
        shoot(desk, "/", f"queue-{scheme}", whole=True)
        shoot(desk, f"/batches/{running}", f"batch-{scheme}")
        shoot(phone, "/", f"phone-{scheme}")
        if scheme == "light":
            shoot(desk, f"/batches/{failed}", "failures-light")
        desk.close()
        phone.close()
        assert desk.complaints == phone.complaints == []


if __name__ == "__main__":
    sys.exit(main())
