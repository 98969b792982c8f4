"""Puts the pages onto the app: routes, static files, and errors as pages for who uses a browser."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from batch_app.dashboard import accounts, actions, events, pages
from batch_app.dashboard.device import Device
from batch_app.dashboard.failures import FailureReader
from batch_app.dashboard.feed import Feed
from batch_app.dashboard.rendering import error_page, refusal, wants_page
from batch_app.errors import BatchAppError
from batch_app.routes.services import Services

STATIC = Path(__file__).parent / "static"


def install(app: FastAPI, services: Services) -> None:
    """After `errors.install`, whose answers stay those of programs."""
    app.state.feed = Feed(services)
    app.state.device = Device(services.data.root)
    app.state.failures = FailureReader(services.data)
    for module in (pages, actions, accounts, events):
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _answer_people_with_pages(app)


def _answer_people_with_pages(app: FastAPI) -> None:
    for kind in (BatchAppError, HTTPException, RequestValidationError):
        for_programs = app.exception_handlers[kind]

        async def handle(
            request: Request, error: Exception, for_programs: object = for_programs
        ) -> Response:
            if not wants_page(request.scope):
                response: Response = await for_programs(request, error)  # type: ignore[operator]
                return response
            if isinstance(error, BatchAppError):
                return refusal(error, request.scope)
            if isinstance(error, HTTPException):
                message = "There is nothing here." if error.status_code == 404 else error.detail
                return error_page(request, error.status_code, message)
            return error_page(request, 400, "The address of this page can't be understood.")

        app.add_exception_handler(kind, handle)
