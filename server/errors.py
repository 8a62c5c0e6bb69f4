"""Every refusal of the server, in the shape that OpenAI's clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from halfturn.error import quoted

_TYPES = {401: "authentication_error", 500: "server_error", 503: "server_error"}

# As /openapi.json describes every refusal of a request.
_PARTS = {"message": "string", "type": "string", "param": ["string", "null"], "code": ["string", "null"]}
_SCHEMA = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": {name: {"type": kind} for name, kind in _PARTS.items()}}},
}
REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Refused: 400 names the field at fault, 401 asks for the key, 404 knows no such model",
        "content": {"application/json": {"schema": _SCHEMA}},
    }
}


class ApiError(Exception):
    """One refusal: an HTTP status and a sentence; `param` names the field at fault, `code` is for programs.

    It is not a ValueError, so that it passes through pydantic's validators unchanged.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers)


def internal_error() -> ApiError:
    """What a client sees of a bug; the traceback goes to the server's log only."""
    message = "the server failed while it handled this request; its log has the details"
    return ApiError(message, code="internal_error", status=500)


def shutting_down() -> ApiError:
    return ApiError("the server is shutting down; send the request again later", code="shutting_down", status=503)


def field_name(location: tuple[int | str, ...]) -> str | None:
    """('messages', 0, 'content') -> 'messages[0].content'; None for the body as a whole."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or None


def from_validation(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints as one sentence that names the field and quotes the value."""
    first = error.errors(include_url=False)[0]
    kind, context, given = first["type"], first.get("ctx", {}), first["input"]
    if kind == "json_invalid":
        reason = context.get("error", first["msg"])
        return ApiError(f"the request body is not valid JSON: {reason}", code="invalid_json")
    name = field_name(first["loc"])
    if name is None:
        return ApiError("the request body must be a JSON object", code="invalid_type")
    if kind == "missing":
        return ApiError(f"{name} is missing", name, "missing_required_parameter")
    bounds = {"greater_than_equal": "ge", "less_than_equal": "le", "greater_than": "gt", "less_than": "lt"}
    words = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}
    if kind in bounds:
        bound = bounds[kind]
        return ApiError(
            f"{name} must be {words[bound]} {context[bound]:.20g}, not {quoted(given)}", name, "invalid_value"
        )
    expected = {
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a string",
        "list_type": "an array",
        "dict_type": "an object",
        "model_type": "an object",
    }
    if kind in expected:
        return ApiError(f"{name} must be {expected[kind]}, not {quoted(given)}", name, "invalid_type")
    return ApiError(f"{name}: {first['msg'].lower()}, not {quoted(given)}", name, "invalid_value")


def from_http(error: HTTPException, request: Request) -> ApiError:
    """Starlette's own refusals: unknown routes and methods."""
    target = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(f"unknown request URL: {target}; the API is under /v1", code="unknown_url", status=404)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(f"{target} is not allowed; use {allowed}", code="method_not_allowed", status=405)
    return ApiError(str(error.detail), status=error.status_code)
