"""OpenTelemetry spans, one per request, joined across router and workers. The only module that imports opentelemetry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from miles_rollout.extras import MissingExtraError, require


class Span(Protocol):
    """What is said of a request once it has been answered."""

    def set_attribute(self, key: str, value: Any) -> None:
        """Note a fact."""
        ...


class Tracing:
    """Spans of one service. `exporter` receives them; without one they go to the provider that is set up already."""

    def __init__(self, service: str, exporter: Any = None) -> None:
        self._trace = require("opentelemetry.trace", extra="otel", purpose="--otel")
        self._propagate = require("opentelemetry.propagate", extra="otel", purpose="--otel")
        self._provider = None
        if exporter is not None:
            sdk = require("opentelemetry.sdk.trace", extra="otel", purpose="--otel")
            export = require("opentelemetry.sdk.trace.export", extra="otel", purpose="--otel")
            resources = require("opentelemetry.sdk.resources", extra="otel", purpose="--otel")
            self._provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": service}))
            self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = (self._provider or self._trace).get_tracer("miles_rollout")

    @contextlib.contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """A server span whose parent is the caller's, if the caller sent one."""
        parent = self._propagate.extract({key: headers[key] for key in ("traceparent", "tracestate") if key in headers})
        with self._tracer.start_as_current_span(name, context=parent, kind=self._trace.SpanKind.SERVER) as span:
            yield span

    def headers(self) -> dict[str, str]:
        """What to send on, so that the next span hangs below the current one."""
        carrier: dict[str, str] = {}
        self._propagate.inject(carrier)
        return carrier

    def close(self) -> None:
        """Send what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


_current: Tracing | None = None


def current() -> Tracing | None:
    """The process's tracing, None when it is off."""
    return _current


def use(tracing: Tracing | None) -> None:
    """Trace the requests of this process from now on."""
    global _current
    _current = tracing


def setup_tracing(service: str) -> None:
    """Trace to OTEL_EXPORTER_OTLP_ENDPOINT over HTTP. Raises MissingExtraError, ValueError without an endpoint."""
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        raise ValueError("--otel needs OTEL_EXPORTER_OTLP_ENDPOINT, the address of an OpenTelemetry collector")
    require("opentelemetry.sdk.trace", extra="otel", purpose="--otel")
    try:
        module = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="otel", purpose="--otel")
    except MissingExtraError:
        raise MissingExtraError("--otel needs an exporter: pip install opentelemetry-exporter-otlp-proto-http") from None
    use(Tracing(service, module.OTLPSpanExporter()))
