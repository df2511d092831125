"""The OpenAPI (Swagger) description of `/score`, made from the request schema in the version that is asked for."""

import json
from typing import Any

from mptserve import __version__
from mptserve.request import openapi_parameters, request_schema
from mptserve.settings import Settings

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "field": {"type": "string"},
                "request_id": {"type": "string"},
            },
            "required": ["code", "message", "request_id"],
        }
    },
    "required": ["error"],
}
RECORD = {
    "type": "object",
    "description": 'Texts under "0", "1", …, one for each sequence; `details` under the same keys, on request.',
    "properties": {"details": {"type": "object", "additionalProperties": {"type": "object"}}},
    "additionalProperties": {"type": "string"},
}
ANSWER = {
    "type": "array",
    "description": "One record per prompt; for `columns` one of all prompts; for `list` the texts themselves.",
    "items": {
        "anyOf": [
            RECORD,
            {"type": "string"},
            {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text", "finish_reason"]},
        ]
    },
    "example": [{"0": "the meaning of life is to find your gift"}],
}
CHAT_ANSWER = {
    "type": "object",
    "description": "The answer to messages; several answers are a list.",
    "properties": {
        "output": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "details": {"type": "object", "additionalProperties": {"type": "object"}},
    },
    "required": ["output"],
}
STATUSES = {
    "200": "The generated text; server-sent events when `stream` is true.",
    "400": "The request breaks a rule; `code`, `field` and `message` say which.",
    "413": "The body or a prompt is too large.",
    "429": "Too many requests are waiting; come back after `Retry-After` seconds.",
    "500": "A failure of the server; the log has the trace under `request_id`.",
    "503": "The server is shutting down.",
    "504": "The deadline passed and partial answers are off.",
}
EXAMPLE = {
    "input_data": {
        "input_string": ["the meaning of life is"],
        "parameters": {"temperature": 0.5, "top_p": 0.5, "max_new_tokens": 10, "do_sample": True},
    }
}


def openapi(schema: dict[str, Any], version: str) -> dict[str, Any]:
    """Return the document in version "2", "3" or "3.1".

    Only 3.1 speaks the request schema's own dialect (JSON Schema 2020-12). The older ones lose what they cannot say:
    `null`, and in version 2 every choice between forms, of which the first stays: the model card's.
    """
    request = openapi_parameters(schema)
    definitions = request.pop("$defs")
    for key in ("$schema", "$id"):
        request.pop(key)
    prefix = "#/definitions/" if version == "2" else "#/components/schemas/"
    schemas = {
        "ServiceInput": request | {"example": EXAMPLE},
        "ServiceOutput": {"anyOf": [ANSWER, CHAT_ANSWER]},
        "Error": ERROR,
    } | definitions
    schemas = json.loads(json.dumps(schemas).replace("#/$defs/", prefix))
    if version == "2":
        schemas["ServiceInput"] = schemas["ServiceInput"]["oneOf"][0] | {"example": EXAMPLE}
    if version != "3.1":
        schemas = _older(schemas, version)

    def content(name: str) -> dict[str, Any]:
        ref = {"schema": {"$ref": prefix + name}}
        return ref if version == "2" else {"content": {"application/json": ref}}

    operation: dict[str, Any] = {
        "operationId": "score",
        "summary": "Continue one or several prompts.",
        "responses": {
            status: {"description": text} | content("ServiceOutput" if status == "200" else "Error")
            for status, text in STATUSES.items()
        },
    }
    document: dict[str, Any] = {
        "info": {"title": "MPT text generation", "version": __version__},
        "paths": {"/score": {"post": operation}},
    }
    if version == "2":
        operation["parameters"] = [{"in": "body", "name": "request", "required": True} | content("ServiceInput")]
        types = {"consumes": ["application/json"], "produces": ["application/json", "text/event-stream"]}
        return {"swagger": "2.0"} | document | types | {"definitions": schemas}
    operation["requestBody"] = {"required": True} | content("ServiceInput")
    full = "3.1.0" if version == "3.1" else "3.0.3"
    return {"openapi": full} | document | {"components": {"schemas": schemas}}


def score_operation() -> dict[str, Any]:
    """Return what FastAPI's description of /score lacks: the body, and an answer that may be a stream."""
    request = openapi_parameters(request_schema(Settings()))
    defs = request.pop("$defs")
    for key in ("$schema", "$id"):
        request.pop(key)
    answer = {"application/json": {"schema": {"anyOf": [ANSWER, CHAT_ANSWER]}}, "text/event-stream": {"schema": {}}}
    errors = {
        status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in STATUSES.items()
        if status != "200"
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(request, defs)}}},
        "responses": {"200": {"description": STATUSES["200"], "content": answer}} | errors,
    }


def _inlined(value: Any, defs: dict[str, Any]) -> Any:
    """Return a schema with every reference into `defs`, which has no circles, replaced by what it refers to."""
    if isinstance(value, list):
        return [_inlined(item, defs) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(defs[value["$ref"].removeprefix("#/$defs/")], defs)
    return {key: _inlined(item, defs) for key, item in value.items()}


def _older(value: Any, version: str) -> Any:
    """Rewrite one schema for OpenAPI 3.0 or Swagger 2, whose dialects predate JSON Schema 2020-12."""
    if isinstance(value, list):
        return [_older(item, version) for item in value]
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if "examples" in value:
        value["example"] = value.pop("examples")[0]
    nullable = {"x-nullable" if version == "2" else "nullable": True}
    if isinstance(value.get("type"), list):  # ["object", "null"]
        value |= {"type": value["type"][0]} | nullable
    if "anyOf" in value:
        forms = value.pop("anyOf")
        choices = [form for form in forms if form != {"type": "null"}]
        if len(choices) < len(forms):
            choices[0] = choices[0] | nullable
        value |= choices[0] if version == "2" or len(choices) == 1 else {"anyOf": choices}
    if "exclusiveMinimum" in value:
        value |= {"minimum": value["exclusiveMinimum"], "exclusiveMinimum": True}
    if "enum" in value and value.get("nullable"):
        value["enum"] = [*value["enum"], None]
    return {key: _older(item, version) for key, item in value.items()}
