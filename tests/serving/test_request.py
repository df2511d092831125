"""Bodies to requests: every rule, and the exact words for a body that breaks it."""

import json
import sys
from collections.abc import Callable, Collection
from typing import Any

import pytest

from mptserve.engine import SamplingParams
from mptserve.errors import BadSetting, InvalidRequest, TooLarge
from mptserve.prompt import ChatPrompt, Message
from mptserve.request import GenerateRequest, PromptRequest, RequestParser, request_schema
from mptserve.settings import Settings, read_settings

PARSER = RequestParser(Settings())
KNOWN = ", ".join(n for n, r in PARSER.rules.items() if not {"x-alias-of", "x-no-effect"} & r.keys())
AT = "/input_data/parameters"


def card(prompts: Any = ("a", "b"), **parameters: Any) -> dict[str, Any]:
    """Return a body in the model card's form."""
    prompts = list(prompts) if isinstance(prompts, tuple) else prompts
    return {"input_data": {"input_string": prompts, "parameters": parameters}}


def parse(body: Any, parser: RequestParser = PARSER) -> GenerateRequest:
    return parser.parse(body if isinstance(body, bytes) else json.dumps(body).encode())


def refusal(body: Any, parser: RequestParser = PARSER) -> tuple[str, str | None, str]:
    """Return (code, field, message) of the error that `body` must give."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body, parser)
    error = caught.value
    assert (error.status, str(error)) == (400, error.message)
    return error.code, error.field, error.message


def sampling(body: Any, parser: RequestParser = PARSER) -> list[SamplingParams]:
    return [prompt.sampling for prompt in parse(body, parser).prompts]


# The whole request ---------------------------------------------------------------------------------------------------


def test_request_that_sets_nothing_gets_the_defaults() -> None:
    request = parse({"input_data": {"input_string": "once"}})
    seed = request.prompts[0].sampling.seed
    assert 0 <= seed < 2**32
    assert request == GenerateRequest(
        prompts=[
            PromptRequest(
                prompt="once",
                pointer="/input_data/input_string",
                sampling=SamplingParams(
                    max_new_tokens=64,
                    min_new_tokens=0,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    min_p=0.0,
                    repetition_penalty=1.0,
                    presence_penalty=0.0,
                    frequency_penalty=0.0,
                    seed=seed,
                    ignore_eos=False,
                    logprobs=None,
                ),
                truncate=None,
            )
        ],
        stop=(),
        num_return_sequences=1,
        return_full_text=True,
        stream=False,
        details=False,
        output_format="records",
    )


def test_request_that_sets_everything_gets_all_of_it() -> None:
    body = card(
        ("one", "two"),
        max_new_tokens=[10, 20],
        min_new_tokens=[3, 4],
        do_sample=[True, False],
        temperature=[0.5, 2],
        top_p=[0.25, 0.5],
        top_k=[5, 6],
        min_p=[0.125, 0.75],
        repetition_penalty=[1.5, 2],
        presence_penalty=[0.5, -1],
        frequency_penalty=[-0.5, 3],
        stop=["\n\n", "###"],
        seed=[7, 8],
        num_return_sequences=2,
        return_full_text=False,
        ignore_eos=[True, False],
        logprobs=4,
        truncate=[100, 200],
        stream=True,
        details=True,
        output_format="list",
    )
    assert parse(body) == GenerateRequest(
        prompts=[
            PromptRequest(
                "one",
                "/input_data/input_string/0",
                SamplingParams(10, 3, 0.5, 0.25, 5, 0.125, 1.5, 0.5, -0.5, 7, True, 4),
                100,
            ),
            PromptRequest(
                "two",
                "/input_data/input_string/1",
                SamplingParams(20, 4, 0.0, 0.5, 6, 0.75, 2.0, -1.0, 3.0, 8, False, 4),
                200,
            ),
        ],
        stop=("\n\n", "###"),
        num_return_sequences=2,
        return_full_text=False,
        stream=True,
        details=True,
        output_format="list",
    )


def test_null_is_the_same_as_leaving_out() -> None:
    assert sampling(card("x", seed=1) | {}) == sampling(
        card("x", seed=1, **dict.fromkeys(set(PARSER.rules) - {"seed"}))
    )
    for parameters in (None, {}):
        assert parse({"input_data": {"input_string": "x", "parameters": parameters}}).prompts[0].prompt == "x"
        assert parse({"input_data": "x", "params": parameters}).prompts[0].prompt == "x"


# Dialects ------------------------------------------------------------------------------------------------------------

DIALECTS = {
    "the model card's": (
        {"input_data": {"input_string": ["a"], "parameters": {"top_k": 7}}},
        "/input_data/input_string/0",
        "/input_data/parameters",
    ),
    "the model card's with one string": (
        {"input_data": {"input_string": "a", "parameters": {"top_k": 7}}},
        "/input_data/input_string",
        "/input_data/parameters",
    ),
    "Dolly's, LangChain's": (
        {"input_data": {"input_string": ["a"]}, "parameters": {"top_k": 7}},
        "/input_data/input_string/0",
        "/parameters",
    ),
    "MLflow's": ({"input_data": ["a"], "params": {"top_k": 7}}, "/input_data/0", "/params"),
    "MLflow's with one string": ({"input_data": "a", "params": {"top_k": 7}}, "/input_data", "/params"),
    "LangChain's for GPT-2 and OSS": (
        {"inputs": {"input_string": ["a"]}, "parameters": {"top_k": 7}},
        "/inputs/input_string/0",
        "/parameters",
    ),
    "Hugging Face's": ({"inputs": ["a"], "parameters": {"top_k": 7}}, "/inputs/0", "/parameters"),
    "Hugging Face's with one string": ({"inputs": "a", "parameters": {"top_k": 7}}, "/inputs", "/parameters"),
}


def with_parameters(dialect: str, parameters: Any) -> dict[str, Any]:
    """Return the dialect's body with other parameters."""
    body, _, at = DIALECTS[dialect]
    body = json.loads(json.dumps(body))
    inside = body["input_data"] if at.startswith("/input_data") else body
    inside[at.rsplit("/", 1)[1]] = parameters
    return body


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialect_is_understood(dialect: str) -> None:
    body, prompt_at, _ = DIALECTS[dialect]
    (prompt,) = parse(body).prompts
    assert (prompt.prompt, prompt.pointer, prompt.sampling.top_k) == ("a", prompt_at, 7)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_error_points_into_the_callers_own_dialect(dialect: str) -> None:
    at = DIALECTS[dialect][2]
    assert refusal(with_parameters(dialect, {"top_k": "x"})) == (
        "wrong_type",
        f"{at}/top_k",
        "`top_k` must be a whole number, got a string of 1 character",
    )
    assert refusal(with_parameters(dialect, [])) == ("wrong_type", at, f"`{at}` must be an object, got a list of 0")


def test_parameters_may_be_left_out_where_the_dialect_has_them() -> None:
    for body in ({"input_data": {"input_string": ["a"]}}, {"input_data": ["a"]}, {"inputs": "a"}):
        assert [p.prompt for p in parse(body).prompts] == ["a"]


def test_quoted_prompt_of_langchain_is_taken_as_it_is() -> None:
    assert parse({"inputs": {"input_string": ['"say hi"']}, "parameters": {}}).prompts[0].prompt == '"say hi"'


NO_DIALECT = [
    ([], ("wrong_type", "", "the body must be a JSON object, got a list of 0")),
    ("x", ("wrong_type", "", "the body must be a JSON object, got a string of 1 character")),
    (None, ("wrong_type", "", "the body must be a JSON object, got null")),
    (5, ("wrong_type", "", "the body must be a JSON object, got 5")),
    ({}, ("missing_field", "", "`input_data` is missing: the prompts go there, as `input_data.input_string`")),
    (
        {"prompt": "x"},
        (
            "missing_field",
            "",
            "`input_data` is missing: the prompts go there, as `input_data.input_string`; "
            "OpenAI's requests go to /v1/chat/completions or /v1/completions",
        ),
    ),
    (
        {"input_data": {}},
        ("missing_field", "/input_data", "`/input_data/input_string` is missing: the prompts go there"),
    ),
    ({"inputs": {}}, ("missing_field", "/inputs", "`/inputs/input_string` is missing: the prompts go there")),
    (
        {"input_data": {"input_strings": ["x"]}},
        ("unknown_field", "/input_data/input_strings", "`input_strings` is not known; did you mean `input_string`?"),
    ),
    (
        {"input_data": {"input_string": "x"}, "params": {}},
        ("unknown_field", "/params", "`params` is not known; did you mean `parameters`?"),
    ),
    (
        {"inputs": "x", "input_data": "x"},
        ("unknown_field", "/inputs", "`inputs` is not known; did you mean `input_data`?"),
    ),
    (
        {"input_data": {"input_string": "x", "parameters": {}}, "parameters": {}},
        ("invalid_request", "/parameters", "parameters are given twice; give them once"),
    ),
    (
        {"input_data": "x", "a/b~c": 1},
        (
            "unknown_field",
            "/a~1b~0c",
            "a name of 5 characters is not known; known are input_data, parameters, params, task_type",
        ),
    ),
]


@pytest.mark.parametrize(("body", "expected"), NO_DIALECT)
def test_body_of_no_dialect_is_told_what_is_wrong(body: object, expected: tuple[str, str, str]) -> None:
    assert refusal(body) == expected


# Bytes ---------------------------------------------------------------------------------------------------------------

NOT_JSON = [
    (b"", "the body is empty; it must be a JSON object"),
    (b" ", "the body must be JSON; column 2: Expecting value"),
    (b'{"input_data":\n"x" 5}', "the body must be JSON; line 2, column 5: Expecting ',' delimiter"),
    (b'{"input_data": "x"} x', "the body must be JSON; column 21: Extra data"),
    (b'{"input_data": "\xff"}', "the body must be UTF-8; byte 16 is not"),
    ('{"input_data": "x"}'.encode("utf-16"), "the body must be UTF-8; byte 0 is not"),
    (b'{"input_data": NaN}', "the body must be JSON, which has no NaN"),
    (b'{"input_data": -Infinity}', "the body must be JSON, which has no -Infinity"),
    (b"[" * 100_000, "the body is nested too deeply"),
    (b'{"a":' * 100_000, "the body is nested too deeply"),
    (b'{"input_data": "x", "params": {"seed": 1' + b"0" * 5000 + b"}}", "the body holds a number that is too long"),
]


@pytest.mark.parametrize(("body", "message"), NOT_JSON, ids=[message[:40] for _, message in NOT_JSON])
def test_bytes_that_are_no_json(body: bytes, message: str) -> None:
    assert refusal(body) == ("invalid_json", "", message)


def test_byte_order_mark_of_windows_tools_is_skipped() -> None:
    assert parse(b'\xef\xbb\xbf{"input_data": "x"}').prompts[0].prompt == "x"


def test_body_may_be_as_large_as_the_limit_and_no_larger() -> None:
    parser = RequestParser(Settings(max_body_bytes=100))
    assert parser.parse(b'{"input_data": "x"}'.ljust(100)).prompts[0].prompt == "x"
    with pytest.raises(TooLarge) as caught:
        parser.parse(b'{"input_data": "x"}'.ljust(101))
    error = caught.value
    assert (error.status, error.code, error.field) == (413, "body_too_large", None)
    assert error.message == "the body must be at most 100 bytes, got 101"


def count_calls(function: Callable[[], object]) -> int:
    """Return how many Python functions are called on the way."""
    n_calls = 0

    def count(_frame: object, event: str, _arg: object) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n_calls


@pytest.mark.parametrize("item", [b"1", b'""'])
@pytest.mark.parametrize(
    ("before", "field", "message"),
    [
        (b'{"input_data":', "/input_data", "`/input_data` must have at most 128 items, got a list of 100000"),
        (
            b'{"input_data":"x","params":{"stop":',
            "/params/stop",
            "`stop` must have at most 16 items, got a list of 100000",
        ),
        (
            b'{"input_data":"x","params":{"seed":',
            "/params/seed",
            "`seed` as a list needs one value per prompt (1), got 100000",
        ),
    ],
)
def test_list_of_very_many_items_is_refused_without_looking_at_each(
    item: bytes, before: bytes, field: str, message: str
) -> None:
    """A body has room for millions; each look takes 10 to 30 µs of a process that must also answer the health probe."""
    body = before + b"[" + b",".join([item] * 100_000) + b"]" + b"}" * before.count(b"{")
    assert refusal(body) == ("wrong_length", field, message)
    assert count_calls(lambda: refusal(body)) < 2000


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 128])
def test_any_number_of_prompts_up_to_the_limit(n: int) -> None:
    texts = [f"prompt {i}" for i in range(n)]
    assert [(p.prompt, p.pointer) for p in parse(card(texts)).prompts] == [
        (text, f"/input_data/input_string/{i}") for i, text in enumerate(texts)
    ]


def test_empty_prompt_is_a_prompt() -> None:
    assert [p.prompt for p in parse(card(("", "x"))).prompts] == ["", "x"]


BAD_PROMPTS = [
    ([], "wrong_length", "", "must have at least 1 item, got a list of 0"),
    (["x"] * 129, "wrong_length", "", "must have at most 128 items, got a list of 129"),
    (None, "wrong_type", "", "must be a string or a list of strings, got null"),
    (5, "wrong_type", "", "must be a string or a list of strings, got 5"),
    (1e400, "wrong_type", "", "must be a string or a list of strings, got inf"),
    (True, "wrong_type", "", "must be a string or a list of strings, got a boolean"),
    ({}, "wrong_type", "", "must be a string or a list of strings, got an object of 0"),
    (["x", 5], "wrong_type", "/1", "must be a string, got 5"),
    (["x", None], "wrong_type", "/1", "must be a string, got null"),
    ([["x"]], "wrong_type", "/0", "must be a string, got a list of 1"),
    (["x", {"role": "user", "content": "x"}], "wrong_type", "/1", "must be a string, got an object of 2"),
    ("\ud800x", "invalid_text", "", "must be Unicode text; character 0 is half of a surrogate pair"),
    (["x", "xy\udfff"], "invalid_text", "/1", "must be Unicode text; character 2 is half of a surrogate pair"),
]


@pytest.mark.parametrize(("prompts", "code", "below", "rule"), BAD_PROMPTS)
def test_bad_prompts_are_refused(prompts: object, code: str, below: str, rule: str) -> None:
    at = f"/input_data/input_string{below}"
    body = json.dumps(card(prompts)).replace("Infinity", "1e400").encode()
    assert refusal(body) == (code, at, f"`{at}` {rule}")


def test_messages_are_one_prompt_without_its_text_in_the_answer() -> None:
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    found = parse(card(talk, return_full_text=True, chat_template="dolly"))
    prompt = ChatPrompt((Message("system", "Be kind."), Message("user", "Hi")), "dolly")
    assert ([p.prompt for p in found.prompts], found.chat, found.return_full_text) == ([prompt], True, False)
    assert (found.repetition_guard, parse(card("Hi")).repetition_guard) == (4, 0)
    assert refusal(card("Hi", chat_template="dolly")) == (
        "invalid_request",
        f"{AT}/chat_template",
        "`chat_template` is for messages",
    )
    assert refusal(card([{"role": "user", "content": "\ud800"}]))[:2] == (
        "invalid_text",
        "/input_data/input_string/0/content",
    )


def test_surrogate_pair_is_one_character() -> None:
    assert parse(b'{"input_data": "\\ud83e\\udd8a"}').prompts[0].prompt == "🦊"


# Parameters ----------------------------------------------------------------------------------------------------------

INTEGERS = {
    "max_new_tokens": (1, 4096),
    "min_new_tokens": (0, 64),  # up to max_new_tokens' default here
    "top_k": (0, 1_000_000),
    "seed": (0, 2**53 - 1),
    "num_return_sequences": (1, 16),
    "logprobs": (0, 20),
    "truncate": (1, 1 << 20),
    "repetition_guard": (0, 100),
}
NUMBERS = {
    "temperature": (0, 100),
    "top_p": (5e-324, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
BOOLEANS = ["do_sample", "return_full_text", "ignore_eos", "stream", "details"]
ONE_FOR_ALL = [
    "num_return_sequences",
    "logprobs",
    "repetition_guard",
    "stop",
    "stop_sequences",
    *(set(BOOLEANS) - {"do_sample", "ignore_eos"}),
]
WHERE = {"num_return_sequences", "return_full_text", "stream", "details", "output_format", "repetition_guard"}


def value_of(request: GenerateRequest, name: str) -> Any:
    """Return the parsed value of a parameter, of the first prompt where each has one."""
    if name in WHERE:
        return getattr(request, name)
    return request.prompts[0].truncate if name == "truncate" else getattr(request.prompts[0].sampling, name)


def parsed(name: str, value: Any) -> Any:
    more = {"details": True} if name == "logprobs" else {}
    return value_of(parse(card("x", **{name: value}, **more)), name)


def test_tables_here_name_every_parameter() -> None:
    tables = {*INTEGERS, *NUMBERS, *BOOLEANS, "stop", "stop_token_ids", "output_format", "chat_template"}
    other_names = {name for name, rule in PARSER.rules.items() if "x-alias-of" in rule}
    without_effect = {name for name, rule in PARSER.rules.items() if "x-no-effect" in rule}
    assert tables | other_names | without_effect == set(PARSER.rules)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_may_be_anything_in_its_range_and_may_be_written_as_a_float(name: str) -> None:
    low, high = INTEGERS[name]
    for value in (low, high, (low + high) // 2):
        found = [parsed(name, value), parsed(name, float(value))]
        assert (found, [type(f) for f in found]) == ([value, value], [int, int])


@pytest.mark.parametrize("name", NUMBERS)
def test_number_may_be_anything_in_its_range(name: str) -> None:
    low, high = NUMBERS[name]
    for value in (low, high, (low + high) / 2):
        found = parsed(name, value)
        assert (found, type(found)) == (value, float)


@pytest.mark.parametrize("name", BOOLEANS)
def test_boolean_may_be_either(name: str) -> None:
    if name == "do_sample":  # becomes a temperature
        assert [parsed_temperature(do_sample=v) for v in (True, False)] == [1.0, 0.0]
    else:
        assert [parsed(name, v) for v in (True, False)] == [True, False]


@pytest.mark.parametrize("value", ["records", "columns", "list"])
def test_output_format_may_be_any_of_three(value: str) -> None:
    assert parsed("output_format", value) == value


OUT_OF_RANGE = [
    ("max_new_tokens", 0, "must be at least 1, got 0"),
    ("max_new_tokens", 4097, "must be at most 4096, got 4097"),
    ("min_new_tokens", -1, "must be at least 0, got -1"),
    ("min_new_tokens", 4097, "must be at most 4096, got 4097"),
    ("temperature", -1e-9, "must be at least 0, got -1e-09"),
    ("temperature", 100.5, "must be at most 100, got 100.5"),
    ("top_p", 0, "must be above 0, got 0"),
    ("top_p", -0.5, "must be above 0, got -0.5"),
    ("top_p", 1.0001, "must be at most 1, got 1.0001"),
    ("top_k", -1, "must be at least 0, got -1"),
    ("top_k", 1_000_001, "must be at most 1000000, got 1000001"),
    ("min_p", -0.1, "must be at least 0, got -0.1"),
    ("min_p", 1.1, "must be at most 1, got 1.1"),
    ("repetition_penalty", 0.001, "must be at least 0.01, got 0.001"),
    ("repetition_penalty", 101, "must be at most 100, got 101"),
    ("presence_penalty", -100.5, "must be at least -100, got -100.5"),
    ("presence_penalty", 101, "must be at most 100, got 101"),
    ("frequency_penalty", -101, "must be at least -100, got -101"),
    ("frequency_penalty", 100.5, "must be at most 100, got 100.5"),
    ("seed", -1, "must be at least 0, got -1"),
    ("seed", 2**53, "must be at most 9007199254740991, got 9007199254740992"),
    ("seed", 10**400, "must be at most 9007199254740991, got a number of 401 digits"),
    ("seed", -(10**400), "must be at least 0, got a number of 401 digits"),
    ("num_return_sequences", 0, "must be at least 1, got 0"),
    ("num_return_sequences", 17, "must be at most 16, got 17"),
    ("logprobs", -1, "must be at least 0, got -1"),
    ("logprobs", 21, "must be at most 20, got 21"),
    ("truncate", 0, "must be at least 1, got 0"),
    ("truncate", 1048577, "must be at most 1048576, got 1048577"),
    ("output_format", "csv", "must be one of `auto`, `records`, `columns`, `list`, got a string of 3 characters"),
]


@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE)
def test_value_out_of_range_is_refused(name: str, value: object, rule: str) -> None:
    assert refusal(card("x", **{name: value})) == ("out_of_range", f"{AT}/{name}", f"`{name}` {rule}")


WRONG_TYPES = [
    ("a whole number", INTEGERS, {"10.5": "10.5", "-0.5": "-0.5", '"5"': "a string of 1 character"}),
    ("a number", NUMBERS, {'"0.5"': "a string of 3 characters", '""': "a string of 0 characters"}),
    ("a boolean", BOOLEANS, {"0": "0", "1": "1", "1.0": "1.0", '"perhaps"': "a string of 7 characters"}),
    ("a string", ["output_format"], {"0": "0", "[]": "a list of 0"}),
    ("a string or a list of strings", ["stop", "stop_sequences"], {"0": "0", "0.5": "0.5"}),
]


@pytest.mark.parametrize(("wanted", "names", "values"), WRONG_TYPES, ids=[wanted for wanted, *_ in WRONG_TYPES])
def test_value_of_the_wrong_type_is_refused(wanted: str, names: Collection[str], values: dict[str, str]) -> None:
    values = values | {"{}": "an object of 0", '{"a": 1, "b": 2}': "an object of 2"}
    if wanted != "a boolean":
        values |= {"true": "a boolean", "false": "a boolean"}
    expected, found = {}, {}
    for name in names:
        for text, shown in values.items():
            expected[name, text] = ("wrong_type", f"{AT}/{name}", f"`{name}` must be {wanted}, got {shown}")
            found[name, text] = refusal(card("x", **{name: json.loads(text)}))
    assert found == expected


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
@pytest.mark.parametrize("text", ["1e400", "-1e400"])
def test_number_that_overflows_is_refused(name: str, text: str) -> None:
    body = json.dumps(card("x", **{name: 0})).replace(": 0", f": {text}").encode()
    shown = "inf" if text[0] == "1" else "-inf"
    code, field, message = refusal(body)
    if name in INTEGERS:
        assert (code, message) == ("wrong_type", f"`{name}` must be a whole number, got {shown}")
    else:
        limit = (
            PARSER.rules[name]["maximum" if text[0] == "1" else "minimum"] if (name, shown) != ("top_p", "-inf") else 0
        )
        rule = "at most" if text[0] == "1" else "above" if name == "top_p" else "at least"
        assert (code, message) == ("out_of_range", f"`{name}` must be {rule} {limit}, got {shown}")
    assert field == f"{AT}/{name}"


def parsed_temperature(**parameters: Any) -> float:
    return sampling(card("x", **parameters))[0].temperature


def test_greedy_is_temperature_zero_however_it_is_asked_for() -> None:
    assert parsed_temperature(do_sample=False, temperature=0.7) == 0.0
    assert parsed_temperature(temperature=0) == 0.0
    assert parsed_temperature(temperature=0.00999) == 0.0
    assert parsed_temperature(temperature=0.01) == 0.01
    assert parsed_temperature(do_sample=True, temperature=0.7) == 0.7


# Lists per prompt ----------------------------------------------------------------------------------------------------

PER_PROMPT = {n: r for n, r in PARSER.rules.items() if r.get("x-per-prompt") and "x-alias-of" not in r}


def test_parameters_that_may_differ_from_prompt_to_prompt() -> None:
    assert set(PER_PROMPT) == {*INTEGERS, *NUMBERS, *BOOLEANS} - set(ONE_FOR_ALL)


@pytest.mark.parametrize("name", PER_PROMPT)
def test_list_per_prompt_needs_one_good_value_for_each(name: str) -> None:
    good = PARSER.rules[name].get("minimum", 0.5 if name == "top_p" else False)
    assert len(parse(card(("a", "b"), **{name: [good, good]})).prompts) == 2
    for values in ([], [good], [good] * 3):
        assert refusal(card(("a", "b"), **{name: values})) == (
            "wrong_length",
            f"{AT}/{name}",
            f"`{name}` as a list needs one value per prompt (2), got {len(values)}",
        )
    kind = {"integer": "whole number"}.get(PARSER.rules[name]["type"], PARSER.rules[name]["type"])
    assert refusal(card(("a", "b"), **{name: [good, None]})) == (
        "wrong_type",
        f"{AT}/{name}/1",
        f"`{name}` must be a {kind}, got null",
    )


def test_list_of_one_goes_with_a_prompt_that_stands_alone() -> None:
    assert sampling(card("x", temperature=[0.5]))[0].temperature == 0.5


@pytest.mark.parametrize("name", ["num_return_sequences", "logprobs", "return_full_text", "stream", "details"])
def test_parameter_of_the_whole_request_takes_no_list(name: str) -> None:
    value = 1 if name in INTEGERS else True
    wanted = "a whole number" if name in INTEGERS else "a boolean"
    assert refusal(card(("a", "b"), **{name: [value, value]})) == (
        "wrong_type",
        f"{AT}/{name}",
        f"`{name}` must be {wanted}, got a list of 2",
    )


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_seed_that_is_given_is_every_prompts_seed() -> None:
    assert [s.seed for s in sampling(card(("a", "b", "c"), seed=5))] == [5, 5, 5]
    assert [s.seed for s in sampling(card(("a", "b"), seed=[5, 6]))] == [5, 6]


def test_seed_that_is_left_out_is_drawn_for_each_prompt() -> None:
    seeds = [s.seed for s in sampling(card(["x"] * 100))]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) > 95
    assert seeds != [s.seed for s in sampling(card(["x"] * 100))]


# Stop strings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stop", "stop_sequences"])
def test_stop_may_be_a_string_or_a_list_and_has_two_names(name: str) -> None:
    for value, expected in (("x", ("x",)), ([], ()), (["x", "yz"], ("x", "yz")), (["é"] * 16, ("é",) * 16)):
        assert parse(card(("a", "b"), **{name: value})).stop == expected
    assert parse(card("a", **{name: "x" * 256})).stop == ("x" * 256,)


@pytest.mark.parametrize("name", ["stop", "stop_sequences"])
@pytest.mark.parametrize(
    ("value", "code", "below", "rule"),
    [
        ("", "wrong_length", "", "not be empty, got a string of 0 characters"),
        ("x" * 257, "wrong_length", "", "have at most 256 characters, got a string of 257 characters"),
        (["x"] * 17, "wrong_length", "", "have at most 16 items, got a list of 17"),
        (["x", ""], "wrong_length", "/1", "not be empty, got a string of 0 characters"),
        (["x" * 257], "wrong_length", "/0", "have at most 256 characters, got a string of 257 characters"),
        (["x", 5], "wrong_type", "/1", "be a string, got 5"),
        ([None], "wrong_type", "/0", "be a string, got null"),
        ([["x"]], "wrong_type", "/0", "be a string, got a list of 1"),
        ("\udc00", "invalid_text", "", "be Unicode text; character 0 is half of a surrogate pair"),
        (["x", "y\udc00"], "invalid_text", "/1", "be Unicode text; character 1 is half of a surrogate pair"),
    ],
)
def test_bad_stop_is_refused(name: str, value: object, code: str, below: str, rule: str) -> None:
    at = f"{AT}/{name}{below}"
    subject = f"`{at}`" if below or code == "invalid_text" else f"`{name}`"
    assert refusal(card("a", **{name: value})) == (code, at, f"{subject} must {rule}")


def test_stop_under_both_names_is_refused() -> None:
    assert refusal(card("a", stop="x", stop_sequences="x")) == (
        "invalid_request",
        f"{AT}/stop_sequences",
        "`stop` and `stop_sequences` are the same; give one",
    )
    assert parse(card("a", stop=None, stop_sequences="x")).stop == ("x",)


# Rules between parameters --------------------------------------------------------------------------------------------


def test_min_new_tokens_above_max_new_tokens_is_refused() -> None:
    at = (f"{AT}/min_new_tokens", "`min_new_tokens` must be at most `max_new_tokens` (9), got 10")
    assert refusal(card("a", max_new_tokens=9, min_new_tokens=10)) == ("out_of_range", *at)
    assert refusal(card(("a", "b"), max_new_tokens=[10, 9], min_new_tokens=10.0)) == ("out_of_range", *at)
    assert refusal(card("a", min_new_tokens=65)) == (
        "out_of_range",
        f"{AT}/min_new_tokens",
        "`min_new_tokens` must be at most `max_new_tokens` (64), got 65",
    )
    assert sampling(card("a", max_new_tokens=10, min_new_tokens=10))[0].min_new_tokens == 10


def test_logprobs_need_details() -> None:
    expected = ("invalid_request", f"{AT}/logprobs", "`logprobs` are part of the details; ask for `details` too")
    assert refusal(card("a", logprobs=0)) == expected
    assert refusal(card("a", logprobs=3, details=False)) == expected
    assert sampling(card("a", logprobs=3, details=True))[0].logprobs == 3


# Unknown names -------------------------------------------------------------------------------------------------------

HINTS = {
    "temprature": "temperature",
    "Temperature": "temperature",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "topk": "top_k",
    "topP": "top_p",
    "repeat_penalty": "repetition_penalty",
    "stop_sequence": "stop",
    "return_text": "return_full_text",
    "num_sequences": "num_return_sequences",
    "streaming": "stream",
    "maxNewTokens": "max_new_tokens",
    "random_seed": "seed",
    "x-per-prompt": None,
}


@pytest.mark.parametrize("name", HINTS)
def test_unknown_parameter_is_refused_with_the_nearest_known_one(name: str) -> None:
    hint = f"did you mean `{HINTS[name]}`?" if HINTS[name] else f"known are {KNOWN}"
    shown = f"`{name}`" if name.isidentifier() else f"a name of {len(name)} characters"
    assert refusal(card("a", **{name: 1})) == ("unknown_parameter", f"{AT}/{name}", f"{shown} is not known; {hint}")


def test_long_or_strange_name_is_not_repeated() -> None:
    name = "my secret / prompt ~ " * 10
    code, field, message = refusal(card("a", **{name: 1}))
    assert (code, message) == ("unknown_parameter", f"a name of {len(name)} characters is not known; known are {KNOWN}")
    assert field == f"{AT}/{name[:64].replace('~', '~0').replace('/', '~1')}"


def test_unknown_name_is_refused_even_with_null() -> None:
    assert refusal(card("a", temprature=None))[2] == "`temprature` is not known; did you mean `temperature`?"


# Operators' limits and defaults --------------------------------------------------------------------------------------


def with_defaults(**defaults: Any) -> RequestParser:
    return RequestParser(read_settings({"MPT_DEFAULTS": json.dumps(defaults)}))


def test_operators_limits_are_laid_over_the_schema() -> None:
    parser = RequestParser(Settings(max_prompts=1, max_new_tokens=32, max_sequences=2, output_format="columns"))
    at = "/input_data/input_string"
    assert refusal(card(("a", "b")), parser) == (
        "wrong_length",
        at,
        f"`{at}` must have at most 1 item, got a list of 2",
    )
    assert [refusal(card("a", **{name: value}), parser)[2] for name, value in (
        ("max_new_tokens", 33),
        ("min_new_tokens", 33),
        ("num_return_sequences", 3),
    )] == [
        "`max_new_tokens` must be at most 32, got 33",
        "`min_new_tokens` must be at most 32, got 33",
        "`num_return_sequences` must be at most 2, got 3",
    ]  # fmt: skip
    request = parse(card("a"), parser)
    assert (request.prompts[0].sampling.max_new_tokens, request.output_format) == (32, "columns")
    assert parse(card("a", output_format="list"), parser).output_format == "list"


def test_operators_may_allow_more_than_the_schema_does() -> None:
    parser = RequestParser(Settings(max_prompts=300, max_new_tokens=65536, max_sequences=20))
    request = parse(card(["x"] * 300, max_new_tokens=65536, num_return_sequences=20), parser)
    assert (len(request.prompts), request.prompts[0].sampling.max_new_tokens, request.num_return_sequences) == (
        300,
        65536,
        20,
    )


def test_defaults_hold_where_a_request_says_nothing() -> None:
    parser = with_defaults(temperature=0.7, max_new_tokens=200, stop="\n", details=True, logprobs=2, top_k=None)
    request = parse(card("a", seed=1), parser)
    assert request.prompts[0].sampling == SamplingParams(max_new_tokens=200, temperature=0.7, seed=1, logprobs=2)
    assert (request.stop, request.details) == (("\n",), True)
    request = parse(card("a", temperature=0.5, stop=[], max_new_tokens=5), parser)
    assert (request.prompts[0].sampling.temperature, request.stop) == (0.5, ())


def test_default_stop_may_have_its_other_name() -> None:
    parser = with_defaults(stop_sequences=["\n"])
    assert parse(card("a"), parser).stop == ("\n",)
    assert parse(card("a", stop="x"), parser).stop == parse(card("a", stop_sequences="x"), parser).stop == ("x",)


def test_default_of_null_is_no_default() -> None:
    parser = with_defaults(**dict.fromkeys(PARSER.rules))
    assert parse(card("a", seed=1), parser) == parse(card("a", seed=1))


def test_defaults_are_written_into_the_schema() -> None:
    rules = request_schema(Settings(defaults='{"temperature": 0.7, "stop_sequences": ["x"], "top_k": null}'))
    rules = rules["$defs"]["parameters"]["properties"]
    found = {name: rules[name].get("default") for name in ("temperature", "stop", "stop_sequences", "top_k")}
    assert found == {"temperature": 0.7, "stop": ["x"], "stop_sequences": None, "top_k": 0}


BAD_DEFAULTS = [
    ('{"temprature": 1}', "`temprature` is not known; did you mean `temperature`?"),
    ('{"temperature": "hot"}', "`temperature` must be a number, got a string of 3 characters"),
    ('{"temperature": 101}', "`temperature` must be at most 100, got 101"),
    ('{"temperature": 1e400}', "`temperature` must be at most 100, got inf"),
    ('{"temperature": [0.5]}', "`temperature` must be a number, got a list of 1"),
    ('{"max_new_tokens": 4097}', "`max_new_tokens` must be at most 4096, got 4097"),
    ('{"stop": "x", "stop_sequences": "x"}', "`stop` and `stop_sequences` are the same; give one"),
    ('{"stop": ["x", ""]}', "`MPT_DEFAULTS/stop/1` must not be empty, got a string of 0 characters"),
    ('{"stop": "\\ud800"}', "`MPT_DEFAULTS/stop` must be Unicode text; character 0 is half of a surrogate pair"),
    ('{"min_new_tokens": 65}', "`min_new_tokens` must be at most `max_new_tokens` (64), got 65"),
    ('{"logprobs": 1}', "`logprobs` are part of the details; ask for `details` too"),
]


@pytest.mark.parametrize(("defaults", "message"), BAD_DEFAULTS)
def test_bad_default_stops_the_start(defaults: str, message: str) -> None:
    with pytest.raises(BadSetting) as caught:
        RequestParser(read_settings({"MPT_DEFAULTS": defaults}))
    assert str(caught.value) == f"MPT_DEFAULTS: {message}"


def test_conflict_with_a_default_points_at_what_the_caller_gave() -> None:
    parser = with_defaults(min_new_tokens=10, details=True, logprobs=1)
    assert refusal(card("a", max_new_tokens=5), parser) == (
        "out_of_range",
        f"{AT}/max_new_tokens",
        "`min_new_tokens` must be at most `max_new_tokens` (5), got 10",
    )
    assert refusal(card("a", details=False), parser) == (
        "invalid_request",
        f"{AT}/details",
        "`logprobs` are part of the details; ask for `details` too",
    )
