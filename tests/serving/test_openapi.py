"""The description of `/score`, valid in each of its three versions and true to what is sent and answered."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft4Validator
from openapi_schema_validator import OAS30Validator, OAS31Validator
from openapi_spec_validator import OpenAPIV2SpecValidator, OpenAPIV30SpecValidator, OpenAPIV31SpecValidator

import mptserve
from mptserve.errors import ContextTooLong
from mptserve.openapi import EXAMPLE, openapi
from mptserve.request import RequestParser, request_schema
from mptserve.settings import Settings

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "online"
VERSIONS = {
    "2": (OpenAPIV2SpecValidator, Draft4Validator),
    "3": (OpenAPIV30SpecValidator, OAS30Validator),
    "3.1": (OpenAPIV31SpecValidator, OAS31Validator),
}


def document(version: str, settings: Settings | None = None) -> dict[str, Any]:
    return openapi(request_schema(settings or Settings()), version)


def problems(version: str, name: str, value: Any, settings: Settings | None = None) -> list[str]:
    """Return what the schema called `name` has against `value`."""
    described = document(version, settings)
    part = {"definitions": described["definitions"]} if version == "2" else {"components": described["components"]}
    prefix = "#/definitions/" if version == "2" else "#/components/schemas/"
    return [e.message for e in VERSIONS[version][1]({"$ref": prefix + name} | part).iter_errors(value)]


def sample(name: str) -> Any:
    return json.loads((SAMPLES / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("defaults", ["{}", '{"temperature": 0.7, "stop": ["x"], "logprobs": 1, "details": true}'])
def test_document_is_valid(version: str, defaults: str) -> None:
    validator, _ = VERSIONS[version]
    assert [e.message for e in validator(document(version, Settings(defaults=defaults))).iter_errors()] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_document_names_itself_and_its_one_operation(version: str) -> None:
    described = document(version)
    assert {k: described[k] for k in ("swagger", "openapi") if k in described} == {
        "2": {"swagger": "2.0"},
        "3": {"openapi": "3.0.3"},
        "3.1": {"openapi": "3.1.0"},
    }[version]
    assert described["info"] == {"title": "MPT text generation", "version": mptserve.__version__}
    assert {path: list(methods) for path, methods in described["paths"].items()} == {"/score": ["post"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_operation_takes_a_request_and_gives_an_answer_or_an_error(version: str) -> None:
    described = document(version)
    operation = described["paths"]["/score"]["post"]
    prefix = "#/definitions/" if version == "2" else "#/components/schemas/"

    def body(name: str) -> dict[str, Any]:
        ref = {"schema": {"$ref": prefix + name}}
        return ref if version == "2" else {"content": {"application/json": ref}}

    responses = operation.pop("responses")
    assert {status: {k: v for k, v in r.items() if k != "description"} for status, r in responses.items()} == {
        status: body("ServiceOutput" if status == "200" else "Error")
        for status in ("200", "400", "413", "429", "500", "503", "504")
    }
    assert all(r["description"].endswith(".") for r in responses.values())
    assert {k: v for k, v in operation.items() if k not in ("operationId", "summary")} == (
        {"parameters": [{"in": "body", "name": "request", "required": True} | body("ServiceInput")]}
        if version == "2"
        else {"requestBody": {"required": True} | body("ServiceInput")}
    )
    if version == "2":
        assert described["consumes"] == ["application/json"]
        assert described["produces"] == ["application/json", "text/event-stream"]


@pytest.mark.parametrize("version", VERSIONS)
def test_sample_request_fits(version: str) -> None:
    assert problems(version, "ServiceInput", sample("basic.json")) == []
    assert sample("basic.json") == EXAMPLE


@pytest.mark.parametrize("version", ["3", "3.1"])
def test_every_sample_fits_except_the_mistake(version: str) -> None:
    names = [path.name for path in sorted(SAMPLES.glob("*.json"))]
    misfits = [name for name in names if problems(version, "ServiceInput", sample(name))]
    assert (len(names) > 4, misfits) == (True, ["mistake.json"])


@pytest.mark.parametrize("version", ["3", "3.1"])
@pytest.mark.parametrize(
    "body",
    [
        {"input_data": {"input_string": "x"}},
        {"input_data": {"input_string": ["x"]}, "parameters": {"top_k": 5}},
        {"input_data": ["x"], "params": {"temperature": 0.5}},
        {"inputs": {"input_string": ["x"]}, "parameters": {}},
        {"inputs": "x"},
        {"inputs": ["x", "y"], "parameters": {"seed": [1, 2], "stop": "a", "top_p": [0.5, 1]}},
        {"inputs": "x", "parameters": {"stop_sequences": ["a"], "max_new_tokens": None, "output_format": None}},
        {"inputs": "x", "parameters": {"stop": None, "do_sample": None, "temperature": None}},
    ],
)
def test_every_dialect_list_and_null_is_described(version: str, body: dict[str, Any]) -> None:
    RequestParser(Settings()).parse(json.dumps(body).encode())
    assert problems(version, "ServiceInput", body) == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 101},
        {"top_p": 0},
        {"max_new_tokens": 4097},
        {"max_new_tokens": "5"},
        {"do_sample": 1},
        {"stop": [""]},
        {"output_format": "csv"},
        {"temprature": 1},
    ],
)
def test_mistakes_are_described_too(version: str, parameters: dict[str, Any]) -> None:
    assert problems(version, "ServiceInput", {"input_data": {"input_string": ["x"], "parameters": parameters}}) != []


@pytest.mark.parametrize("version", VERSIONS)
def test_operators_limits_and_defaults_are_described(version: str) -> None:
    settings = Settings(max_prompts=1, max_new_tokens=8, max_sequences=2, defaults='{"temperature": 0.5}')
    for parameters in ({"max_new_tokens": 9}, {"num_return_sequences": 3}):
        body = {"input_data": {"input_string": ["x"], "parameters": parameters}}
        assert (
            problems(version, "ServiceInput", body) == [],
            problems(version, "ServiceInput", body, settings) == [],
        ) == (
            True,
            False,
        )
    assert problems(version, "ServiceInput", {"input_data": {"input_string": ["x", "y"]}}, settings) != []
    assert '"default": 0.5' in json.dumps(document(version, settings))


DETAILS = {
    "finish_reason": "stop",
    "prompt_tokens": 3,
    "generated_tokens": 2,
    "seed": 1,
    "timings_ms": {"total": 1.5},
    "logprobs": [{"token": "x", "id": 1, "logprob": -0.5, "top": []}],
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "answer",
    [
        [{"0": "x"}, {"0": "y"}],
        [{"0": "x", "1": "y"}],
        [{"0": "x", "details": {"0": DETAILS}}],
        ["x", "y"],
        [{"text": "x"} | DETAILS],
    ],
    ids=["records", "columns", "details", "list", "list with details"],
)
def test_answer_fits(version: str, answer: list[Any]) -> None:
    """Version 2 knows no choice between forms and describes the model card's, which is no list."""
    is_list = isinstance(answer[0], str) or "text" in answer[0]
    assert (problems(version, "ServiceOutput", answer) == []) == (version != "2" or not is_list)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_no_answer_does_not_fit(version: str) -> None:
    for wrong in ({"0": "x"}, [5], [{"0": 5}], [{"0": None}]):
        assert problems(version, "ServiceOutput", wrong) != []


@pytest.mark.parametrize("version", VERSIONS)
def test_error_fits(version: str) -> None:
    for error in (ContextTooLong("too long", field="/input_data"), ContextTooLong("too long")):
        assert problems(version, "Error", error.as_json("id")) == []
    for missing in ("code", "message", "request_id"):
        left = {k: "x" for k in ("code", "message", "request_id") if k != missing}
        assert problems(version, "Error", {"error": left}) != []


def test_versions_that_predate_json_schema_2020_have_none_of_its_words() -> None:
    for version in ("2", "3"):
        text = json.dumps(document(version))
        assert [word for word in ('"$defs"', "#/$defs/", '"examples"', '"null"', "x-per-prompt") if word in text] == []
    assert "anyOf" not in json.dumps(document("2"))
    assert "oneOf" not in json.dumps(document("2"))


def test_making_a_document_changes_nothing() -> None:
    schema = request_schema(Settings())
    before = json.dumps(schema)
    documents = [json.dumps(openapi(schema, version)) for version in VERSIONS]
    assert (json.dumps(schema), [json.dumps(openapi(schema, version)) for version in VERSIONS]) == (before, documents)
