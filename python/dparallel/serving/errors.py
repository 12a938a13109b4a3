"""Answers that are errors, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

T = TypeVar("T")


class ApiError(HTTPException):
    """An answer in OpenAI's form: {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> Response:
        # ASCII, since a message may quote bytes that are no text.
        return Response(json.dumps(self.body), self.status_code, self.headers, "application/json")


class ErrorFields(BaseModel):
    """An error's fields in OpenAI's form."""

    message: str
    type: str
    param: str | None
    """The parameter that the error is about."""
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFields


ERRORS = {
    400: "The request cannot be followed: `param` names what is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    413: "The body is too large.",
    429: "Too many requests are under way; Retry-After says when to come again.",
    503: "The server is shutting down.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a path, for its OpenAPI description: these statuses, and the form of any other."""
    answers: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": ERRORS[status]} for status in statuses
    }
    return {**answers, "default": {"model": ErrorAnswer, "description": "Another error."}}


def full(message: str, wait: int) -> ApiError:
    """The error 429. wait: seconds after which there may be room."""
    return ApiError(429, message, code="full", headers={"Retry-After": str(wait)})


def failed() -> ApiError:
    """The error of a request on which the model raised."""
    return ApiError(500, "the model failed on this request", code="internal_error")


def client_left() -> ApiError:
    return ApiError(499, "the client left")


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})


async def in_time(awaited: Awaitable[T], aborted: asyncio.Future[None], seconds: float | None = None) -> T:
    """The result of `awaited`. Raises ApiError if it takes longer than `seconds`, or if the server stops."""
    doing = asyncio.ensure_future(awaited)
    waiting: set[asyncio.Future[Any]] = {doing, aborted}
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
    finally:
        doing.cancel()
    if aborted.done():
        raise stopping()
    raise ApiError(408, "the request did not arrive in time", headers={"Connection": "close"})
