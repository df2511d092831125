"""What pydantic found wrong with a request, as the other servers say it: field, rule, the value's type or size."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mptserve.errors import InvalidRequest
from mptserve.openai_server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mptserve.request import count, kind_of, unknown

KNOWN: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/chat/completions": ChatRequest,
    "/models/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
TYPES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
    "none_required": "null: this server does not offer it",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("above", "gt"),
    "less_than": ("below", "lt"),
}


def invalid(exc: RequestValidationError, path: str) -> InvalidRequest:
    """Return the first error; where a field has several forms, the error of the form that matched furthest."""
    errors: list[dict[str, Any]] = [dict(e) for e in exc.errors()]
    first = errors[0]["loc"][:2]  # the field; the others are of its other forms, or come after it
    found = max((e for e in errors if e["loc"][:2] == first), key=lambda e: len(_steps(exc.body, e["loc"])))
    steps = _steps(exc.body, found["loc"])
    field = "".join(f"[{s}]" if isinstance(s, int) else f".{s[:64]}" for s in steps).lstrip(".")
    kind, context, value = found["type"], found.get("ctx", {}), found.get("input")
    if kind == "json_invalid":
        return InvalidRequest(f"the body must be JSON; at character {found['loc'][-1]} it is not", code="invalid_json")
    if not steps and kind != "missing":
        return InvalidRequest(f"the body must be a JSON object, got {kind_of(exc.body)}", code="wrong_type")
    if kind == "missing":
        name = found["loc"][-1]
        where = f"{field}.{name}" if field else str(name)
        if name == "body":
            return InvalidRequest("the body is empty; it must be a JSON object", code="invalid_json")
        return InvalidRequest(f"`{where}` is missing", field=where, code="missing_field")
    if kind == "extra_forbidden":
        known = list(KNOWN[path].model_fields) if len(steps) == 1 and path in KNOWN else []
        text = unknown(str(steps[-1]), {name: name for name in known}) if known else f"`{field}` is not known"
        return InvalidRequest(text, field=field, code="unknown_parameter")
    code, rule = _rule(kind, context)
    same = [e for e in errors if e["loc"][:2] == first and len(_steps(exc.body, e["loc"])) == len(steps)]
    if len(same) > 1 and all(e["type"] in TYPES for e in same):  # none of its forms
        rule = "be " + " or ".join(dict.fromkeys(TYPES[e["type"]] for e in same))
    return InvalidRequest(f"`{field}` must {rule}, got {kind_of(value)}", field=field, code=code)


def as_error(exc: HTTPException, method: str) -> InvalidRequest:
    """Return the framework's own refusals (no such route, not this method) as one of ours."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    found = InvalidRequest(f"{method}: {exc.detail}", code=codes.get(exc.status_code, "invalid_request"))
    found.status = exc.status_code
    return found


def _rule(kind: str, context: dict[str, Any]) -> tuple[str, str]:
    if kind in TYPES:
        return "wrong_type", f"be {TYPES[kind]}"
    if kind in BOUNDS:
        words, key = BOUNDS[kind]
        return "out_of_range", f"be {words} {context[key]:g}"
    if kind == "literal_error":
        return "out_of_range", f"be {context['expected']}"
    if kind in ("too_long", "string_too_long"):
        return (
            "wrong_length",
            f"have at most {count(context['max_length'], 'item' if kind == 'too_long' else 'character')}",
        )
    if kind in ("too_short", "string_too_short"):
        return "wrong_length", "not be empty"
    if kind == "string_unicode":
        return "invalid_text", "be Unicode text, without halves of surrogate pairs"
    return "invalid_request", f"be valid ({kind})"


def _steps(body: Any, loc: tuple[Any, ...]) -> list[int | str]:
    """Return the steps of `loc` that lead through the body; pydantic mixes in the names of forms it tried."""
    steps: list[int | str] = []
    value = body
    for step in loc[1:]:
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            value = value[step]
            steps.append(step)
    return steps
