"""What an object store does, on a folder and on a real S3 server."""

from __future__ import annotations

import base64
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from batch_app.config import Settings
from batch_app.errors import ConfigError, ObjectsUnavailable
from batch_app.objects import READ_BYTES, Objects, open_objects
from support.object_stores import PART_BYTES, S3Server


def test_what_is_put_can_be_read(objects: Objects) -> None:
    objects.put("input/a.jsonl", b"one")
    assert objects.get("input/a.jsonl") == b"one"
    assert objects.size("input/a.jsonl") == 3
    objects.put("input/a.jsonl", b"other")
    assert objects.get("input/a.jsonl") == b"other"
    assert b"".join(objects.read("input/a.jsonl", 1, 4)) == b"the"


def test_nothing_at_all(objects: Objects, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    objects.put_file("input/empty", empty)
    assert objects.size("input/empty") == 0
    assert list(objects.read("input/empty", 0, 0)) == []


def test_a_file_of_several_parts(objects: Objects, tmp_path: Path) -> None:
    content = os.urandom(PART_BYTES * 2 + READ_BYTES // 2)
    path = tmp_path / "large"
    path.write_bytes(content)
    objects.put_file("output/large", path)
    assert objects.size("output/large") == len(content)
    pieces = list(objects.read("output/large", 0, len(content)))
    assert len(pieces) > 1
    assert b"".join(pieces) == content
    start = PART_BYTES - 10
    assert b"".join(objects.read("output/large", start, start + 20)) == content[start : start + 20]


def test_large_files_go_to_s3_in_parts(s3_environment: S3Server, tmp_path: Path) -> None:
    objects = Objects(s3_environment.new_bucket(), part_bytes=PART_BYTES)
    path = tmp_path / "large"
    path.write_bytes(bytes(PART_BYTES * 2 + 1))
    objects.put_file("output/in-parts", path)
    asked = httpx.get(f"{s3_environment.endpoint}/-/requests", timeout=60).text
    parts = [line for line in asked.splitlines() if "in-parts" in line and "partNumber=" in line]
    assert len(parts) == 3


def test_what_is_not_there(objects: Objects) -> None:
    objects.put("other", b"")
    for ask in (objects.get, objects.size):
        with pytest.raises(FileNotFoundError):
            ask("input/none")
    with pytest.raises(FileNotFoundError):
        list(objects.read("input/none", 0, 3))
    assert list(objects.list("input")) == []


def test_a_listing_knows_whole_segments_only(objects: Objects) -> None:
    objects.put("results/batch_1/s/2", b"ab")
    objects.put("results/batch_1/s/1", b"abc")
    objects.put("results/batch_10/s/1", b"abc")
    found = sorted(objects.list("results/batch_1"), key=lambda one: one.name)
    assert [(one.name, one.size_bytes) for one in found] == [
        ("results/batch_1/s/1", 3),
        ("results/batch_1/s/2", 2),
    ]
    assert abs(datetime.now(UTC) - found[0].modified_at) < timedelta(hours=1)


def test_deleting_is_done_twice_without_harm(objects: Objects) -> None:
    for name in ("input/a", "input/b", "input/c"):
        objects.put(name, b"x")
    objects.delete(["input/a", "input/c", "input/none"])
    objects.delete(["input/a"])
    objects.delete([])
    assert [one.name for one in objects.list("input")] == ["input/b"]


def test_many_are_listed_and_deleted(objects: Objects) -> None:
    names = [f"results/batch/s/{number:04d}" for number in range(60)]
    for name in names:
        objects.put(name, b"x")
    assert sorted(one.name for one in objects.list("results/batch")) == names
    objects.delete(names)
    assert list(objects.list("results")) == []


def test_a_bucket_that_is_missing_is_no_missing_object(s3_environment: S3Server) -> None:
    """Else an input would count as deleted because of a wrong setting."""
    objects = Objects("s3://no-such-bucket/prefix")
    for ask in (objects.get, objects.size):
        with pytest.raises(ObjectsUnavailable, match="bucket"):
            ask("input/a")
    with pytest.raises(ObjectsUnavailable):
        objects.put("input/a", b"")
    with pytest.raises(ObjectsUnavailable):
        objects.ping()


def test_a_folder_that_is_not_mounted_is_no_missing_object(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    objects = Objects(f"file://{tmp_path / 'later'}")
    for ask in (objects.get, objects.size):
        with pytest.raises(ObjectsUnavailable, match="folder"):
            ask("input/a")
    (tmp_path / "later").mkdir()
    objects.put("input/a", b"x")
    assert objects.get("input/a") == b"x"


def test_a_store_that_is_away(
    s3_environment: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Objects(s3_environment.new_bucket())
    objects.put("input/a", b"x")
    s3_environment.fail(True)
    try:
        with pytest.raises(ObjectsUnavailable) as unavailable:
            objects.get("input/a")
        with pytest.raises(ObjectsUnavailable):
            objects.put("input/b", b"x")
        with pytest.raises(ObjectsUnavailable):
            list(objects.list("input"))
    finally:
        s3_environment.fail(False)
    assert "127.0.0.1" not in unavailable.value.message
    assert "a-secret-of-a-test" not in caplog.text
    assert objects.get("input/a") == b"x"


def test_a_link_needs_no_credentials(s3_environment: S3Server) -> None:
    objects = Objects(s3_environment.new_bucket())
    objects.put("output/a.jsonl", b"0123456789")
    url = objects.link("output/a.jsonl", 60)
    assert url is not None
    answer = httpx.get(url, headers={"range": "bytes=2-4"}, timeout=60)
    assert answer.content == b"234"
    assert "a-secret-of-a-test" not in url


def test_links_of_stores_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are signed without asking anybody, with what the environment says."""
    pytest.importorskip("obstore")
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "client_email": "batches@example.org",
        "private_key_id": "1",
        "private_key": key.decode(),
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "batches")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"a" * 32).decode())
    for url, place, signature in [
        ("gs://bucket/prefix", "storage.googleapis.com/bucket/prefix", "X-Goog-Signature="),
        ("az://container/prefix", "batches.blob.core.windows.net/container/prefix", "sig="),
    ]:
        link = Objects(url).link("output/a", 60)
        assert link is not None
        assert link.startswith(f"https://{place}/output/a?")
        assert signature in link


def test_a_folder_has_no_links(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    assert Objects(f"file://{tmp_path}").link("output/a", 60) is None


def test_a_folder_in_the_data_folder_is_refused(tmp_path: Path) -> None:
    """What lies there under the same names are copies, which may be evicted."""
    pytest.importorskip("obstore")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for url in (f"file://{tmp_path}/data", f"file://{tmp_path}/link/batches"):
        with pytest.raises(ConfigError, match="data folder"):
            open_objects(Settings(data_dir=tmp_path / "data", storage_url=url))
    elsewhere = Settings(data_dir=tmp_path / "data", storage_url=f"file://{tmp_path}/objects")
    assert open_objects(elsewhere) is not None
    assert open_objects(Settings(data_dir=tmp_path)) is None


@pytest.mark.parametrize(
    "url",
    [
        "/folder",
        "ftp://host/folder",
        "file://host/folder",
        "file:///",
        "s3:///prefix",
        "s3://key:secret@bucket/prefix",
        "s3://bucket/prefix?secret=secret",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="storage_url") as refused:
        Objects(url)
    assert "secret" not in str(refused.value)
