"""Traces for OpenTelemetry, where somebody wants them: the extra `tracing`, and an endpoint.

All spans of a batch are in one trace, whichever process they are of: the trace's id is made from
the batch's. They carry ids, names and counts, never a prompt, an answer or an error's text.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batch_app import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MS = 3000

_provider: TracerProvider | None = None


def set_up(endpoint: str, service: str) -> None:
    """Begin to trace if there is an endpoint, given or in OpenTelemetry's own variables."""
    global _provider
    if not endpoint and not any(os.environ.get(name) for name in VARIABLES):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning(
            "Traces are asked for, and OpenTelemetry isn't installed: "
            "pip install 'vllm-batch-server[tracing]'."
        )
        return
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None)
    resource = Resource.create({"service.name": service, "service.version": __version__})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(exporter))


def shut_down() -> None:
    """Send what is left, and end."""
    global _provider
    provider, _provider = _provider, None
    if provider is not None:
        provider.force_flush(FLUSH_MS)
        provider.shutdown()


@contextmanager
def span(name: str, batch_id: str, **attributes: str | int) -> Iterator[None]:
    """What is done within is a span of this batch's trace; nothing where nobody traces."""
    if _provider is None:
        yield
        return
    from opentelemetry.trace import Status, StatusCode

    with _provider.get_tracer("batch_app").start_as_current_span(
        name,
        context=_context(batch_id),
        attributes={"batch.id": batch_id, **attributes},
        record_exception=False,  # its text may tell what isn't ours to tell
        set_status_on_exception=False,
    ) as current:
        try:
            yield
        except BaseException as error:
            current.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


def _context(batch_id: str) -> Any:
    """The span around this one if it is of the same batch, else the trace's beginning."""
    from opentelemetry import trace

    digest = hashlib.sha256(batch_id.encode()).digest()
    trace_id = int.from_bytes(digest[:16], "big")
    around = trace.get_current_span().get_span_context()
    if around.trace_id == trace_id:
        return None
    root = trace.SpanContext(
        trace_id,
        int.from_bytes(digest[16:24], "big"),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(root))
