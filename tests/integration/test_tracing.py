"""Traces of a real server and worker, as a collector gets them; and that none are made unasked."""

from __future__ import annotations

import gzip
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from batch_app import tracing
from support.receiver import Receiver, receiving
from support.site import Site

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra tracing")


@pytest.fixture
def collector() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_a_batch_is_one_trace_without_its_text(tmp_path: Path, collector: Receiver) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    site = Site(
        tmp_path,
        min_free_bytes=0,
        poll_interval_s=0.2,
        otlp_endpoint=f"http://127.0.0.1:{collector.port}",
    )
    secret = "xylophone"
    line = {"custom_id": secret, "body": {"messages": [{"role": "user", "content": secret}]}}
    try:
        url = site.start_server()
        server, worker = site.last_process, site.start_worker()
        answer = httpx.post(
            f"{url}/v1/batches",
            data={"model": "sim"},
            files={"file": json.dumps(line).encode()},
            timeout=120,
        )
        batch_id = answer.json()["batch_id"]
        site.wait_until_done(batch_id)
        for process in (worker, server):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
    finally:
        site.close()
    spans = []
    for call in collector.calls:
        assert call.path == "/v1/traces"
        zipped = call.headers.get("content-encoding") == "gzip"
        raw = gzip.decompress(call.body) if zipped else call.body
        assert secret.encode() not in raw
        for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            for scope in resource.scope_spans:
                spans += list(scope.spans)
    names = [span.name for span in spans]
    assert sorted(names) == ["batch run", "engine load", "finalize", "intake", "upload"]
    assert len({span.trace_id for span in spans}) == 1
    for span in spans:
        values = {one.key: one.value.string_value for one in span.attributes}
        assert values["batch.id"] == batch_id
        assert span.end_time_unix_nano >= span.start_time_unix_nano
    by_name = {span.name: span for span in spans}
    assert by_name["finalize"].parent_span_id == by_name["batch run"].span_id
    assert by_name["engine load"].parent_span_id == by_name["batch run"].span_id


def test_nothing_is_traced_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    tracing.set_up("", "test")
    assert tracing._provider is None
    with tracing.span("x", "batch_1"):
        pass


def test_an_error_leaves_its_kind_and_not_its_text(
    collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing.set_up(f"http://127.0.0.1:{collector.port}/", "test")
    try:
        with pytest.raises(ValueError, match="xylophone"), tracing.span("x", "batch_1"):
            raise ValueError("xylophone")
    finally:
        tracing.shut_down()
    (call,) = collector.calls
    zipped = call.headers.get("content-encoding") == "gzip"
    raw = gzip.decompress(call.body) if zipped else call.body
    assert b"ValueError" in raw
    assert b"xylophone" not in raw
