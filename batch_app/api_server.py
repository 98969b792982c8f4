"""The API server: takes batches, tells how far they are, hands out results. Runs no model.

`python -m batch_app.api_server [--host H] [--port P] …` or `vllm-batch serve`.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
import uvicorn.config
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from batch_app import __version__, floors, logs, tracing
from batch_app.access import has_keys
from batch_app.config import Settings, load_settings
from batch_app.dashboard import site as dashboard
from batch_app.dashboard.rendering import refusal
from batch_app.errors import BatchAppError, ConfigError, StoreUnavailable
from batch_app.routes import batches, errors, estimates, openai_files, ops, results, webhooks
from batch_app.routes.audit_trail import AuditTrail
from batch_app.routes.authentication import Authentication
from batch_app.routes.description import describe
from batch_app.routes.middleware import (
    Hosts,
    Origins,
    RequestIds,
    SecurityHeaders,
    StorageGuard,
    is_loopback,
)
from batch_app.routes.services import Services
from batch_app.routes.slow_clients import BodyLimits, bounded_headers

#: Seconds that answers under way get at shutdown. Uploads cut off here leave nothing behind.
SHUTDOWN_S = 8
#: Seconds that a check of lines gets to finish at shutdown; after that the next start does it anew.
BACKGROUND_STOP_S = 2.0
#: How long a thread may hold the interpreter while others wait. The default of 5 ms would make a
#: status call, which waits for it several times, as slow as the check of an upload beside it.
SWITCH_INTERVAL_S = 0.0005


def create_app(settings: Settings) -> FastAPI:
    """The app, with its folders made and its database brought up to date.

    Raises ConfigError, StoreUnavailable, StorageFull, or OSError where a folder can't be made.
    """
    services = Services.open(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with suppress(StoreUnavailable):
            await run_in_threadpool(services.access.is_required)  # for /openapi.json
        _announce(services)
        background = (
            services.validation,
            services.housekeeping,
            services.key_uses,
            services.sending,
            services.counting,
        )
        for thread in background:
            thread.start()
        yield
        for thread in background:
            await run_in_threadpool(thread.stop, BACKGROUND_STOP_S)
        await run_in_threadpool(services.outbox.wait, BACKGROUND_STOP_S)
        services.store.close()

    app: FastAPI = FastAPIOffline(
        title="vLLM Batch Server",
        version=__version__,
        summary="Large batches of LLM requests on your own GPU.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.services = services
    app.include_router(batches.router)
    app.include_router(results.router)
    app.include_router(batches.models_router)
    app.include_router(openai_files.files_router)
    app.include_router(openai_files.uploads_router)
    app.include_router(webhooks.router)
    app.include_router(estimates.router)
    app.include_router(ops.router)
    errors.install(app)
    dashboard.install(app, services)
    # The last one added is the first one asked.
    app.add_middleware(StorageGuard, require=services.require_storage)
    app.add_middleware(Authentication, access=services.access, refusal=refusal)
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Origins)
    app.add_middleware(Hosts, settings=settings, access=services.access)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestIds)
    app.add_middleware(AuditTrail, log=services.audit)
    describe(app, services.access)
    return app


def _announce(services: Services) -> None:
    logs.say(f"✅ Database initialized at {services.store.shown_url}")
    for model in dict.fromkeys(record.model for record in services.benchmarks.all()):
        logs.say(f"✅ Loaded benchmark for {model}")
    if services.settings.no_auth:
        logs.say(
            "⚠️  --no-auth: nobody is asked for an API key. Whoever reaches "
            f"{services.settings.host} may use this server, read all results and delete them."
        )
    for warning in floors.warnings(floors.SERVER_FLOORS):
        logs.say(f"⚠️  {warning}")
    logs.say("✅ Batch API Server started")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            uvicorn.config.logger.info("Uvicorn running on http://%s:%d", shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_first = not self.should_exit
        super().handle_exit(sig, frame)
        # Another signal may come within `set`, whose lock can't be taken twice.
        if is_first:
            self._services.stopping.set()


def serve(settings: Settings) -> int:
    """Run the server until a signal ends it. Returns the process's exit code."""
    logs.keep_texts_out()
    if settings.log_format == "json":
        logs.set_up(settings.log_format)  # before the first thing that can be said
    try:
        check_address(settings)
        listener = _listen(settings.host, settings.port)
        app = create_app(settings)
    except BatchAppError as error:
        return _fail(error.message)
    except OSError as error:
        return _fail(f"The data folder can't be used: {error}")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = uvicorn.Config(
        app,
        log_config=logs.server_config(uvicorn.config.LOGGING_CONFIG),
        timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False,
        http=bounded_headers(settings.client_timeout_s),
        # Whoever calls from this machine could else say that it was somebody else.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        ws="none",
    )
    # uvicorn raises the signal again once it is done; without these it would be our end.
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: None)
    tracing.set_up(settings.otlp_endpoint, "vllm-batch-api")
    _Server(config, app.state.services).run(sockets=[listener])
    tracing.shut_down()
    return 0


def check_address(settings: Settings) -> None:
    """Raises ConfigError where the address would let in others although there are no keys.

    Raises also StoreUnavailable, StorageFull.
    """
    if not is_loopback(settings.host) and not settings.no_auth and not has_keys(settings):
        raise ConfigError(
            f"Listening on {settings.host} would let anyone who reaches it use this server, and "
            "there are no API keys. Make one (vllm-batch keys create NAME), listen on 127.0.0.1 "
            "(the default), or say --no-auth if the network is yours alone."
        )


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError with what to do where the address can't be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {host} is in use already. End what listens there "
                f"(lsof -i :{port} names it), or choose another with --port."
            ) from None
        raise ConfigError(f"Can't listen on {host} port {port}: {error.strerror}.") from None
    return listener


def _fail(message: str) -> int:
    logs.say_error(f"❌ {message}")
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m batch_app.api_server", description="The batch API server."
    )
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8080)")
    parser.add_argument("--data-dir", type=Path, help="folder of uploads, results and database")
    parser.add_argument("--models", type=Path, help="the model registry (default models.toml)")
    parser.add_argument("--database-url", help="SQLAlchemy URL; default SQLite in the data folder")
    parser.add_argument(
        "--no-auth", action="store_true", default=None, help="allow others in without API keys"
    )
    parser.add_argument("--log-format", choices=["text", "json"], help="default text")
    flags = vars(parser.parse_args(arguments))
    try:
        settings = load_settings(**flags)
    except ConfigError as error:
        return _fail(error.message)
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
