"""The pages, in a real browser, on a real server with a worker."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.conftest import Running
from batch_app.core import utc_now
from batch_app.keys import Scope, new_key
from batch_app.store import Store
from integration.api_fixtures import ServerProcess
from support.browser import PHONE, Tab
from support.site import ENDLESS, REPO, Site, echo_line

NO_SUCH_BATCH = "/batches/batch_000000000000000000000000"
HOSTILE = '<img src=x onerror="document.title=1">"\'&\u202e{{7*7}}'
Open = Callable[..., Tab]


@pytest.fixture
def tab(chromium: Any, working: Running) -> Iterator[Tab]:
    """A page of the server with a worker; nothing on it may go wrong."""
    tab = Tab(chromium, working.url)
    yield tab
    tab.close()
    assert tab.complaints == []


def jsonl(num: int, **body: Any) -> bytes:
    return b"".join(json.dumps(echo_line(n, **body)).encode() + b"\n" for n in range(num))


def submitted(url: str, content: bytes, model: str = "sim", name: str = "in.jsonl") -> str:
    answer = httpx.post(
        f"{url}/v1/batches", data={"model": model}, files={"file": (name, content)}, timeout=120
    )
    assert answer.status_code == 200, answer.text
    batch_id: str = answer.json()["batch_id"]
    return batch_id


def choose(page: Any, content: bytes, model: str = "sim") -> None:
    page.select_option("#model", model)
    page.set_input_files(
        "#file", {"name": "mine.jsonl", "mimeType": "application/jsonl", "buffer": content}
    )
    page.wait_for_selector("#queue:enabled, .problem")


# -- the way of a batch ----------------------------------------------------------------------------


def test_submit_watch_and_download(tab: Tab, tmp_path: Path) -> None:
    page = tab.go("/submit")
    choose(page, jsonl(50))
    page.click("#queue")
    page.wait_for_url(re.compile(r"/batches/batch_[0-9a-f]{24}$"))
    page.wait_for_selector("article[data-state=completed]")
    page.wait_for_selector("#download")
    assert page.inner_text("h1") == "mine.jsonl"
    assert "50 of 50" in page.inner_text("article")
    page.wait_for_function(
        "() => document.getElementById('log').textContent.includes('Completed: 50')"
    )
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename.endswith("_results.jsonl")
    lines = Path(download.value.path()).read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == [f"r{n}" for n in range(50)]
    assert not_estimating(tab)
    tab.complaints.clear()


def not_estimating(tab: Tab) -> bool:
    """A server without POST /v1/estimate says so, which a browser notes in its console."""
    return all("status of 40" in one for one in tab.complaints)


def test_a_file_with_bad_lines_is_shown_them_and_not_queued(tab: Tab, working: Running) -> None:
    before = httpx.get(f"{working.url}/v1/batches", timeout=120).json()["first_id"]
    page = tab.go("/submit")
    bad = jsonl(1) + b'{"custom_id": "<b>x</b>"}\n' + 3 * b"no json\n"
    page.select_option("#model", "sim")
    page.set_input_files(
        "#file", {"name": "bad.jsonl", "mimeType": "application/jsonl", "buffer": bad}
    )
    page.wait_for_selector("#queue:enabled, #bad-lines")
    if page.is_enabled("#queue"):
        page.click("#queue")
    page.wait_for_selector("#bad-lines")
    assert page.inner_text("#bad-lines") == "4 lines can't run"
    cells = page.locator("#outcome tbody tr td:first-child").all_inner_texts()
    assert cells == ["2", "3–5"], "neighbours with the same error are one row"
    assert httpx.get(f"{working.url}/v1/batches", timeout=120).json()["first_id"] == before
    assert not_estimating(tab)
    tab.complaints.clear()


def test_tables_and_packed_files_are_shown_their_command(tab: Tab) -> None:
    page = tab.go("/submit")
    page.select_option("#model", "sim")
    for name, command in {
        "my data's.csv": "vllm-batch submit 'my data'\\''s.csv' --model sim --template ",
        "in.jsonl.gz": "vllm-batch submit in.jsonl.gz --model sim",
    }.items():
        page.set_input_files("#file", {"name": name, "mimeType": "text/plain", "buffer": b"x"})
        assert page.inner_text("#outcome pre").startswith(command)
        assert page.is_disabled("#queue")
    page.set_input_files("#file", {"name": "in.jsonl", "mimeType": "", "buffer": jsonl(1)})
    page.wait_for_selector("#queue:enabled")


def test_the_estimate_stands_before_the_queue(tab: Tab) -> None:
    """As `POST /v1/estimate` answers; the figures are made up, so that each is known."""
    estimate = {
        "estimated_seconds": 900,
        "low_s": 600.0,
        "high_s": 1500.0,
        "prompt_tokens": 123456,
        "expected_output_tokens": 789,
        "queue_wait_s": 60.0,
        "estimated_completion": "2030-01-01T00:00:00Z",
        "based_on_benchmark": HOSTILE,
    }
    row = {"model": "sim", "estimate": estimate, "max_model_len": 4096, "num_too_long": 2}
    row |= {"num_refused": 0, "lines": [3, 9], "prompt_tokens_error": 0.0, "reason": None}
    body = {"object": "estimate", "num_requests": 5, "num_errors": 0, "errors": []}
    body |= {"models": [row], "count": 1}
    tab.page.route("**/v1/estimate", lambda route: route.fulfill(json=body))
    page = tab.go("/submit")
    choose(page, jsonl(5))
    text = page.inner_text("#estimate")
    for part in ("About 15 min (10 min to 25 min)", "123,456", "789", "60 s", "Line 3, 9."):
        assert part in text
    assert "2 requests are longer than the model's context of 4096 tokens" in text
    assert "onerror" in text
    assert page.locator("#estimate img").count() == 0
    assert page.is_enabled("#queue")


def test_cancel_by_keyboard(tab: Tab, working: Running) -> None:
    batch_id = submitted(working.url, jsonl(ENDLESS), "endless")
    page = tab.go(f"/batches/{batch_id}")
    page.wait_for_selector("article[data-state=running]")
    page.focus("#confirm-cancel summary")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cancel", state="visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "cancel"
    page.keyboard.press("Enter")
    page.wait_for_selector("article[data-state=cancelled]")
    page.wait_for_selector("#retry")
    assert page.inner_text("#retry") == "Run the rest", "what was cancelled can be run once more"
    assert not page.is_visible("#confirm-cancel")


def test_what_failed_is_grouped_and_retried(tab: Tab, working: Running) -> None:
    lines = [echo_line(n) for n in range(20)]
    for line in lines[:7]:
        line["body"]["messages"] = [{"role": "user", "content": "one two three four five six"}]
        line["custom_id"] += HOSTILE
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    batch_id = submitted(working.url, content, "tiny-context", name=f"{HOSTILE}.jsonl")
    working.site.wait_until_done(batch_id)
    page = tab.go(f"/batches/{batch_id}")
    (row,) = page.locator("table.failures tbody tr").all()
    assert row.locator("td").first.inner_text() == "7"
    example = row.locator(".id").inner_text()
    assert example == "r0" + HOSTILE.replace("\u202e", "\\u202e")
    # Whatever ids, names and logs hold is text.
    page.wait_for_function(
        "() => document.getElementById('log').textContent.includes('Completed: 13')"
    )
    assert "onerror" in page.inner_text("#log")
    assert "onerror" in page.inner_text("h1")
    assert page.locator("main img:not(picture img)").count() == 0
    assert "mine" not in page.title()
    assert page.title() != "1"
    assert "{{7*7}}" in page.inner_text("h1")
    page.click("#retry")
    page.wait_for_url(lambda url: batch_id not in url)
    assert "again what failed in" in page.inner_text("main")
    page.wait_for_selector("article[data-state=completed]")


def test_the_queue_follows_what_happens(tab: Tab, working: Running) -> None:
    page = tab.go("/")
    page.wait_for_function("() => connection.isReady")
    batch_id = submitted(working.url, jsonl(ENDLESS), "endless", name="live.jsonl")
    row = f"[data-batch={batch_id}]"
    page.wait_for_selector(f"{row}[data-state=running]")
    page.wait_for_function(f"() => document.querySelector('{row} progress').value > 0")
    waiting = submitted(working.url, jsonl(3))
    page.wait_for_selector(f"[data-batch={waiting}][data-state=queued] .note >> text=Next in line")
    httpx.post(f"{working.url}/v1/batches/{batch_id}/cancel", timeout=120).raise_for_status()
    page.wait_for_selector(f"{row}[data-state=cancelled]")
    page.wait_for_selector(f"[data-batch={waiting}][data-state=completed]")


def test_filter_and_pages_of_results(tab: Tab, working: Running) -> None:
    for _ in range(26):
        last = submitted(working.url, jsonl(1))
    working.site.wait_until_done(last)
    page = tab.go("/?status=completed")
    assert page.locator(".batch").count() == 25
    assert page.locator(".batch:not([data-state=completed])").count() == 0
    first = page.get_attribute(".batch", "data-batch")
    page.click("text=Older")
    page.wait_for_url(re.compile("after="))
    assert page.locator(f"[data-batch={first}]").count() == 0
    assert page.locator(".batch").count() >= 1
    page.click("text=Newest")
    page.wait_for_selector(f"[data-batch={first}]")


# -- a connection that breaks ----------------------------------------------------------------------


def test_a_restart_of_the_server_is_said_and_survived(
    chromium: Any, start_server_process: Callable[..., ServerProcess]
) -> None:
    server = start_server_process()
    url = server.url
    tab = Tab(chromium, url)
    page = tab.go("/")
    page.wait_for_function("() => connection.isReady")
    assert page.is_hidden("#connection p")
    server.end()
    page.wait_for_selector("#connection p", state="visible")
    assert re.search("stopping|does not answer", page.inner_text("#connection"))
    again = start_server_process("--port", url.rsplit(":", 1)[1])
    assert again.url == url
    httpx.post(
        f"{url}/v1/batches",
        data={"model": "sim"},
        files={"file": ("new.jsonl", jsonl(2))},
        timeout=120,
    ).raise_for_status()
    page.wait_for_selector("#connection p", state="hidden")
    page.wait_for_selector("text=new.jsonl")
    tab.close()


# -- keys ------------------------------------------------------------------------------------------


class Locked:
    """A server that asks for keys: Ana's, Bob's and an admin's."""

    url = ""

    def __init__(self, store: Store) -> None:
        self.tokens: dict[str, str] = {}
        for name, scopes in {
            "ana": [Scope.READ, Scope.WRITE],
            "bob": [Scope.READ],
            "admin": list(Scope),
        }.items():
            key, self.tokens[name] = new_key(name, scopes, utc_now())
            store.add_key(key)

    def sign_in(self, page: Any, name: str) -> None:
        page.goto("/sign-in")
        page.fill("#key", self.tokens[name])
        page.press("#key", "Enter")
        page.wait_for_url(lambda url: "sign-in" not in url)


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    site = Site(tmp_path_factory.mktemp("locked"), min_free_bytes=0)
    try:
        locked = Locked(site.store)
        locked.url = site.start_server()
        yield locked
    finally:
        site.close()


@pytest.fixture
def door(chromium: Any, locked: Locked) -> Iterator[Tab]:
    """A page of that server, not signed in. A refusal is noted by the browser's console."""
    tab = Tab(chromium, locked.url)
    yield tab
    tab.close()
    assert [one for one in tab.complaints if "status of 4" not in one] == []


def test_sign_in_and_out(door: Tab, locked: Locked) -> None:
    page = door.go("/models")
    assert page.url.endswith("/sign-in?next=/models")
    page.fill("#key", "vbk_nothing")
    page.press("#key", "Enter")
    page.wait_for_selector("#problem")
    page.fill("#key", locked.tokens["ana"])
    page.press("#key", "Enter")
    page.wait_for_url("**/models")
    (cookie,) = door.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert locked.tokens["ana"] not in cookie["value"]
    assert page.evaluate("document.cookie") == ""
    assert page.locator("text=Keys").count() == 0, "not an admin"
    assert page.goto("/keys").status == 403
    page.goto("/")
    page.click("text=Sign out")
    page.wait_for_url("**/sign-in")
    door.context.add_cookies([cookie])
    assert page.goto("/").url.endswith("/sign-in"), "it ended on the server, too"


def test_each_sees_their_own_also_live(chromium: Any, door: Tab, locked: Locked) -> None:
    locked.sign_in(door.page, "ana")
    page = door.page
    page.goto("/submit")
    choose(page, jsonl(3))
    page.click("#queue")
    page.wait_for_url("**/batches/batch_*")
    batch_id = page.url.rsplit("/", 1)[1]
    assert "No worker is running" in page.inner_text("main")

    other = Tab(chromium, locked.url)
    locked.sign_in(other.page, "bob")
    assert "Nothing here yet" in other.page.inner_text("main")
    assert other.page.locator("text=Submit").count() == 0, "may only read"
    for path in (f"/batches/{batch_id}", f"/batches/{batch_id}/throughput.svg"):
        assert other.page.goto(path).status == 404
    other.close()

    page.goto("/")
    page.wait_for_function("() => connection.isReady")
    httpx.delete(
        f"{locked.url}/v1/batches/{batch_id}",
        headers={"authorization": f"Bearer {locked.tokens['ana']}"},
        timeout=120,
    ).raise_for_status()
    page.wait_for_selector(f"[data-batch={batch_id}][data-state=cancelled]")


def test_an_admin_makes_and_revokes_a_key(door: Tab, locked: Locked) -> None:
    locked.sign_in(door.page, "admin")
    page = door.go("/keys")
    page.fill("#name", HOSTILE.replace("\u202e", ""))
    page.fill("#days", "30")
    page.click("text=Make the key")
    token = page.inner_text("#made-key").strip()
    headers = {"authorization": f"Bearer {token}"}
    assert httpx.get(f"{locked.url}/v1/batches", headers=headers, timeout=120).status_code == 200
    page.goto("/keys")
    assert token not in page.content(), "shown once"
    assert page.locator("main img").count() == 0
    row = page.locator("tr", has_text="onerror")
    row.locator("summary").click()
    row.locator("button").click()
    page.wait_for_load_state()
    assert "revoked" in page.locator("tr", has_text="onerror").inner_text()
    assert httpx.get(f"{locked.url}/v1/batches", headers=headers, timeout=120).status_code == 401


def test_a_change_needs_more_than_the_cookie(locked: Locked) -> None:
    """What another site could make a browser send opens nothing, were the cookie sent along."""
    with httpx.Client(base_url=locked.url, timeout=120) as client:
        assert client.post("/sign-in", data={"key": locked.tokens["admin"]}).status_code == 303
        assert client.get("/v1/batches").status_code == 200
        gone = "/batches/batch_000000000000000000000000"
        posts = ("/keys", "/keys/key_000000000000/revoke", f"{gone}/cancel", f"{gone}/retry")
        for path in (*posts, "/sign-out", f"/v1{gone}/cancel", "/v1/files", "/v1/batches"):
            assert client.post(path, data={"form_token": "0" * 64}).status_code == 403, path
        assert client.delete(f"/v1{gone}").status_code == 403
        page = client.get("/").text
        token = page.split('name="form-token" content="')[1].split('"')[0]
        assert client.post(f"/v1{gone}/cancel", headers={"x-form-token": token}).status_code == 404
        assert client.post(f"{gone}/cancel", data={"form_token": token}).status_code == 404
        cross = {"sec-fetch-site": "cross-site"}
        refused = client.post("/sign-in", data={"key": locked.tokens["ana"]}, headers=cross)
        assert refused.status_code == 403, "nobody is signed in by another site"
        held = client.cookies["vllm_batch_session"]
        by_header = httpx.get(
            f"{locked.url}/v1/batches", headers={"authorization": f"Bearer {held}"}, timeout=120
        )
        assert by_header.status_code == 401, "a session is no API key"


# -- for everybody ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shown(working: Running) -> str:
    """A batch with failures and throughput to show."""
    lines = [echo_line(n) for n in range(40)]
    lines[3]["body"]["messages"] = [{"role": "user", "content": "one two three four five six"}]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    batch_id = submitted(working.url, content, "tiny-context", name="shown.jsonl")
    working.site.wait_until_done(batch_id)
    return batch_id


PAGES = ("/", "/?status=failed", "/batches/{}", "/submit", "/models", "/machine", "/keys")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    chromium: Any, working: Running, locked: Locked, shown: str, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = Tab(chromium, working.url, color_scheme=scheme)
    door = Tab(chromium, locked.url, color_scheme=scheme)
    visits = [(tab, path.format(shown)) for path in PAGES] + [(door, "/sign-in")]
    found = {}
    for visitor, path in visits:
        violations = axe.run(visitor.go(path)).response["violations"]
        found[path] = [(one["id"], [node["html"] for node in one["nodes"]]) for one in violations]
    locked.sign_in(door.page, "admin")
    violations = axe.run(door.go("/keys")).response["violations"]
    found["keys"] = [(one["id"], [node["html"] for node in one["nodes"]]) for one in violations]
    tab.close()
    door.close()
    assert {path: what for path, what in found.items() if what} == {}


def test_a_phone_shows_all_of_it(chromium: Any, working: Running, shown: str) -> None:
    tab = Tab(chromium, working.url, viewport=PHONE)
    for path in PAGES:
        page = tab.go(path.format(shown))
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
    page = tab.go(f"/batches/{shown}")
    assert page.evaluate(
        "() => { const box = document.querySelector('.scroll'); "
        "return box.scrollWidth <= box.clientWidth }"
    ), "what failed is read without scrolling sideways"
    tab.close()
    assert tab.complaints == []


def test_the_documents_pictures_can_be_taken(
    chromium: Any, working: Running, tmp_path: Path
) -> None:
    """By the program that took them (`make screenshots`), of the pages as they are now."""
    program = runpy.run_path(str(REPO / "tools" / "screenshots.py"))
    program["take"](working.site, working.url, chromium, tmp_path, share=0.02, settle_ms=0)
    taken = {path.name for path in tmp_path.glob("*.png")}
    assert taken == {path.name for path in (REPO / "docs" / "images").glob("*.png")}
    for page in (REPO / "README.md", *(REPO / "docs").glob("*.md")):
        assert set(re.findall(r"images/([\w-]+\.png)", page.read_text())) <= taken, page


def test_by_keyboard_the_first_step_skips_to_the_content(tab: Tab) -> None:
    page = tab.go("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_pages_are_safe_and_nobody_else_s(working: Running, shown: str) -> None:
    for path in (*PAGES, NO_SUCH_BATCH):
        answer = httpx.get(
            working.url + path.format(shown), headers={"accept": "text/html"}, timeout=120
        )
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"].startswith("text/html")
        assert " style=" not in answer.text
        assert re.findall(r"<script(?![^>]* src=)", answer.text) == []
        assert re.findall(r"\son\w+=", answer.text) == []
        assert "http" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', answer.text))
    chart = httpx.get(f"{working.url}/batches/{shown}/throughput.svg", timeout=120)
    assert chart.headers["content-type"].startswith("image/svg+xml")
    assert "<script" not in chart.text
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!--.*?-->', "", chart.text)


def test_programs_get_the_api_s_errors(working: Running) -> None:
    for path in ("/nothing", NO_SUCH_BATCH):
        answer = httpx.get(working.url + path, timeout=120)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
