"""Properties of the request parser: it never breaks, and it says the same as the schema that we publish."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mptserve.errors import InvalidRequest
from mptserve.request import GenerateRequest, RequestParser, openapi_parameters, request_schema
from mptserve.settings import Settings

LIMITS = Settings(max_prompts=4)
SCHEMA = request_schema(LIMITS)
PARSER = RequestParser(LIMITS)
PUBLISHED = Draft202012Validator(openapi_parameters(SCHEMA))
SECRET = "zxqj"
"""Part of every generated prompt and stop string: it may be in no error."""
NOT_IN_A_SCHEMA = [
    " as a list needs one value per prompt (",
    "`min_new_tokens` must be at most `max_new_tokens` (",
    " are the same; give one",
    "parameters are given twice; give them once",
    "`logprobs` are part of the details; ask for `details` too",
    " is half of a surrogate pair",
    "`chat_template` is for messages",
]
PROPERTY = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

names = st.sampled_from([*PARSER.rules, "input_data", "inputs", "input_string", "parameters", "params"]) | st.text(
    max_size=4
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 5000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(-2, 2)
    | st.text(st.characters(), max_size=5)
    | st.sampled_from([10.0, 2.0**53, 10**400, "records", "\ud800", [], {}])
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names, inner, max_size=4))


def refused(body: bytes) -> str | None:
    """Return what the parser has against `body`; the whole error must be short and must not repeat what was sent."""
    try:
        assert isinstance(PARSER.parse(body), GenerateRequest)
    except InvalidRequest as error:
        shown = json.dumps(error.as_json("id"))
        return error.message if SECRET not in shown and len(shown) < 1200 else f"leaks: {shown}"
    return None


def check(message: str | None) -> None:
    assert message is None or not message.startswith("leaks: ")


@settings(PROPERTY, max_examples=150)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | values.map(lambda v: json.dumps(v).encode()))
def test_whatever_is_sent_gives_a_request_or_a_refusal(body: bytes) -> None:
    check(refused(body))


def text_with_secret(max_size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=max_size - len(SECRET)).map(lambda text: SECRET + text)


def of_rule(rule: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that the schema's rule allows."""
    if "$ref" in rule:
        return of_rule(SCHEMA["$defs"][rule["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in rule:
        return st.one_of([of_rule(choice) for choice in rule["anyOf"]])
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    low, high = rule.get("minimum"), rule.get("maximum")
    match rule["type"]:
        case "boolean":
            return st.booleans()
        case "string":
            return text_with_secret(min(rule.get("maxLength", 12), 12))
        case "integer":
            integers = st.integers(low, high)
            return integers | integers.map(float) if high <= 2**53 else integers
        case "number":
            exclusive = "exclusiveMinimum" in rule
            return st.floats(rule.get("exclusiveMinimum", low), high, exclude_min=exclusive) | st.just(high)
        case "array":
            return st.lists(of_rule(rule["items"]), min_size=rule.get("minItems", 0), max_size=min(rule["maxItems"], 4))
    raise AssertionError(rule)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Return a body that breaks no rule, in any dialect."""
    prompts = draw(of_rule({"$ref": "#/$defs/prompts"}))
    n = 1 if isinstance(prompts, str) else len(prompts)
    chosen = draw(st.lists(st.sampled_from(list(PARSER.rules)), unique=True, max_size=6))
    parameters: dict[str, Any] = {}
    for name in chosen:
        value = of_rule(PARSER.rules[name])
        if PARSER.rules[name].get("x-per-prompt"):
            value |= st.lists(value, min_size=n, max_size=n)
        parameters[name] = draw(value | st.none())
    parameters.pop("chat_template", None)  # for messages, and these are texts
    first_names: set[str] = set()
    for name in list(parameters):  # a parameter is given under one of its names
        first_name = PARSER.rules[name].get("x-alias-of", name)
        if parameters[name] is not None and first_name in first_names:
            del parameters[name]
        elif parameters[name] is not None:
            first_names.add(first_name)
    if parameters.get("logprobs") is not None:
        parameters["details"] = True
    if parameters.get("min_new_tokens") is not None:
        parameters = {n: v for n, v in parameters.items() if n not in ("max_tokens", "max_gen_len")}
        parameters["max_new_tokens"] = 4096
    body = draw(
        st.sampled_from(
            [
                {"input_data": {"input_string": prompts, "parameters": parameters}},
                {"input_data": {"input_string": prompts}, "parameters": parameters},
                {"input_data": prompts, "params": parameters},
                {"inputs": {"input_string": prompts}, "parameters": parameters},
                {"inputs": prompts, "parameters": parameters},
            ]
        )
    )
    return body if parameters or draw(st.booleans()) else without_parameters(body)


def without_parameters(body: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in body.items() if key not in ("parameters", "params")}
    if isinstance(kept.get("input_data"), dict):
        kept["input_data"] = {"input_string": kept["input_data"]["input_string"]}
    return kept


@settings(PROPERTY, max_examples=150)
@given(requests())
def test_request_made_by_the_schemas_rules_is_accepted(body: dict[str, Any]) -> None:
    assert PUBLISHED.is_valid(body)
    assert isinstance(PARSER.parse(json.dumps(body).encode()), GenerateRequest)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything inside `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inside for found in places(item, (*path, key)))]


def mutated(draw: Callable[..., Any], body: dict[str, Any]) -> Any:
    """Return `body` with one thing in it replaced, taken out, doubled, renamed or added."""
    body = json.loads(json.dumps(body))
    path = draw(st.sampled_from(places(body)))
    if not path:
        return draw(values) if draw(st.booleans()) else body | {draw(names): draw(values)}
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    what = draw(st.sampled_from(["replace", "replace", "wrap", "remove", "rename", "add"]))
    if what == "replace":
        holder[key] = draw(values)
    elif what == "wrap":
        holder[key] = [holder[key]] * draw(st.integers(0, 5))
    elif what == "remove":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[draw(names)] = holder.pop(key)
    elif isinstance(holder[key], dict):
        holder[key][draw(names)] = draw(values)
    return body


def test_parser_accepts_what_the_published_schema_accepts_and_nothing_else() -> None:
    seen: Counter[str] = Counter()

    @settings(PROPERTY, max_examples=500)
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        body = data.draw(requests())
        for _ in range(data.draw(st.integers(1, 2))):
            body = mutated(data.draw, body) if isinstance(body, dict) else body
        text = json.dumps(body).encode()
        fits = PUBLISHED.is_valid(json.loads(text))
        message = refused(text)
        check(message)
        beyond = fits and message is not None and any(rule in message for rule in NOT_IN_A_SCHEMA)
        seen["beyond" if beyond else "refused" if message else "accepted"] += 1
        assert fits == (message is None or beyond), message

    agree()
    assert min(seen["accepted"], seen["refused"]) > 10, seen


@settings(PROPERTY, max_examples=60)
@given(requests(), st.data())
def test_body_that_was_cut_or_spoilt_is_refused_without_repeating_it(body: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(body, ensure_ascii=False).encode()
    at = data.draw(st.integers(1, len(text) - 1))
    spoilt = text[:at] + data.draw(st.sampled_from([b"", b"\xff", b"\x00", b"\\", b'"', b"}"])) + text[at + 1 :]
    for damaged in (text[:at], spoilt):
        check(refused(damaged))
