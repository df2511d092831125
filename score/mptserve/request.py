"""Bytes of a request to a GenerateRequest: every rule is checked here, and nowhere after.

The rules are in `request.schema.json`, limits that an operator sets are laid over them. The body's dialect is found
first, so that each message can point at the caller's own field instead of saying that no form matched.

A new parameter: its rule in request.schema.json, its use in `build` and `_prompt` here and in `SamplingParams`; for
OpenAI's API also openai_server/schemas.py and requests.py; for sampling also sampling.py and gpu/sampling_kernel.py.
"""

import difflib
import json
import secrets
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from mptserve import strict_json
from mptserve.engine import SamplingParams
from mptserve.errors import BadSetting, InvalidRequest, TooLarge
from mptserve.prompt import ChatPrompt, Message
from mptserve.settings import CHAT_TEMPLATES, Settings

CHAT_REPETITIONS = 4
"""The default `repetition_guard` of conversations: a base model may repeat itself without end."""
PARAMETERS = ("parameters", "params")
TASKS = ("text-generation", "chat-completion", "completion", "conversational")
OPENAI = {"messages", "prompt", "model"}
"""Fields of OpenAI's requests."""
BOOLEANS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)
"""Strings that are taken as booleans, as Azure's own servers (pydantic) take them."""
GREEDY_BELOW = 0.01
"""Temperatures below this are greedy: dividing logits by less overflows."""


@dataclass(frozen=True)
class PromptRequest:
    """One prompt and the parameters that may differ from prompt to prompt. `pointer`: where the prompt stands.

    prompt: text, a conversation, or token ids (of the model's vocabulary).  fit: whether fewer new tokens will do
    where the context has no room for `max_new_tokens`.
    """

    prompt: str | ChatPrompt | tuple[int, ...]
    pointer: str
    sampling: SamplingParams
    truncate: int | None
    fit: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """A checked request in the one form that the service knows."""

    prompts: list[PromptRequest]
    stop: tuple[str, ...]
    num_return_sequences: int
    return_full_text: bool
    stream: bool
    details: bool
    output_format: str
    repetition_guard: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @property
    def chat(self) -> bool:
        """Whether the request is one conversation, whose answer has a shape of its own."""
        return any(isinstance(p.prompt, ChatPrompt) for p in self.prompts)


@dataclass(frozen=True)
class Located:
    """A part of the body and the JSON pointer to it."""

    value: Any
    pointer: str


def _items(validator: Any, rule: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """Check `items` only where `maxItems` holds: a body can hold millions of items, at 10 µs each."""
    if not isinstance(value, list) or len(value) <= schema.get("maxItems", len(value)):
        yield from Draft202012Validator.VALIDATORS["items"](validator, rule, value, schema)


_Validator = extend(Draft202012Validator, {"items": _items})  # type: ignore[no-untyped-call]


class RequestParser:
    """The request rules of one deployment: the schema under the operator's limits and defaults."""

    def __init__(self, settings: Settings) -> None:
        self.max_body_bytes = settings.max_body_bytes
        self.schema = request_schema(settings)
        defs = self.schema["$defs"]
        self.rules: dict[str, dict[str, Any]] = defs["parameters"]["properties"]
        self._validators = {name: _Validator(rule | {"$defs": defs}) for name, rule in self.rules.items()}
        self._prompts = _Validator(defs["prompts"] | {"$defs": defs})
        self._messages = _Validator(defs["messages"] | {"$defs": defs})
        self.defaults = {name: rule["default"] for name, rule in self.rules.items() if "default" in rule}
        try:
            self.defaults |= self._checked(Located(settings.default_parameters, "MPT_DEFAULTS"), n_prompts=None)
            _combine(self.defaults, self.defaults, "MPT_DEFAULTS")
        except InvalidRequest as exc:
            raise BadSetting(f"MPT_DEFAULTS: {exc.message}") from exc

    def parse(self, body: bytes) -> GenerateRequest:
        """Return the request in `body`.

        Raises TooLarge for a body over the limit and InvalidRequest, with a code and a JSON pointer, for everything
        else that is wrong with it.
        """
        if len(body) > self.max_body_bytes:
            raise body_too_large(len(body), self.max_body_bytes)
        return self.read(dialect(_json(body)))

    def read(self, body: "Body") -> GenerateRequest:
        """Return the request of prompts and parameters, wherever they stood; raises InvalidRequest."""
        prompts, parameters = body.prompts, body.parameters
        chat = looks_like_messages(prompts.value)
        if chat:
            prompts = _with_joined_parts(prompts)
        self._check(self._messages if chat else self._prompts, prompts.value, prompts.pointer)
        found = [_chat(prompts)] if chat else _texts(prompts)
        given = self._checked(parameters, n_prompts=len(found))
        if not chat and "chat_template" in given:
            _refuse("`chat_template` is for messages", f"{parameters.pointer}/chat_template")
        if body.as_list and given.get("output_format", self.defaults["output_format"]) == "auto":
            given["output_format"] = "list"
        return self.build(found, given, parameters.pointer)

    def build(
        self, prompts: list[Located], given: dict[str, Any], pointer: str, *, fit: bool = False
    ) -> GenerateRequest:
        """Return the request of checked prompts and checked parameters, the deployment's defaults filled in."""
        chat = isinstance(prompts[0].value, ChatPrompt)
        values = {"repetition_guard": CHAT_REPETITIONS if chat else 0} | self.defaults | given
        own_values = [_of_prompt(values, i) for i in range(len(prompts))]
        for own in own_values:
            _combine(own, given, pointer)
        if chat and "chat_template" in values:
            prompts = [
                Located(replace(p.value, template=own["chat_template"]), p.pointer)
                for p, own in zip(prompts, own_values, strict=True)
            ]
        return GenerateRequest(
            prompts=[_prompt(prompt, own, fit) for prompt, own in zip(prompts, own_values, strict=True)],
            stop=tuple(values["stop"]),
            num_return_sequences=int(values["num_return_sequences"]),
            return_full_text=values["return_full_text"] and not chat,
            stream=values["stream"],
            details=values["details"],
            output_format="records" if values["output_format"] == "auto" else values["output_format"],
            repetition_guard=int(values["repetition_guard"]),
            stop_token_ids=tuple(int(id) for id in values["stop_token_ids"]),
        )

    def _checked(self, parameters: Located, n_prompts: int | None) -> dict[str, Any]:
        """Return the given parameters, each checked, under their first names; nulls are left out.

        n_prompts None: no lists per prompt.
        """
        if not isinstance(parameters.value, dict):
            _refuse(
                f"`{parameters.pointer}` must be an object, got {kind_of(parameters.value)}",
                parameters.pointer,
                code="wrong_type",
            )
        given: dict[str, Any] = {}
        names: dict[str, str] = {}  # by which name a parameter was given
        for name, value in parameters.value.items():
            pointer = f"{parameters.pointer}/{_escape(name)}"
            if name not in self.rules:
                _refuse(self.unknown(name), pointer, code="unknown_parameter")
            if value is None:
                continue
            rule = self.rules[name]
            if isinstance(value, list) and rule.get("x-per-prompt") and n_prompts is not None:
                if len(value) != n_prompts:
                    _refuse(
                        f"`{name}` as a list needs one value per prompt ({n_prompts}), got {len(value)}",
                        pointer,
                        code="wrong_length",
                    )
                value = [_with_booleans(rule, item) for item in value]
                for i, item in enumerate(value):
                    self._check(self._validators[name], item, f"{pointer}/{i}", name=name)
            else:
                value = _with_booleans(rule, value)
                self._check(self._validators[name], value, pointer, name=name)
            first_name = str(rule.get("x-alias-of", name))
            if first_name in given:
                _refuse(f"`{names[first_name]}` and `{name}` are the same; give one", pointer)
            names[first_name] = name
            if not rule.get("x-no-effect"):
                given[first_name] = value
        if "stop" in given:
            pointer = f"{parameters.pointer}/{names['stop']}"
            given["stop"] = [text.value for text in _texts(Located(given["stop"], pointer))]
        if isinstance(given.get("stop_token_ids"), int | float):
            given["stop_token_ids"] = [given["stop_token_ids"]]
        return given

    def unknown(self, name: str) -> str:
        """Say that a parameter is not known, and which is the nearest; other names of a parameter lead to its first."""
        names = {n: rule.get("x-alias-of", n) for n, rule in self.rules.items() if not rule.get("x-no-effect")}
        return unknown(name, names)

    def _check(self, validator: "Draft202012Validator", value: Any, pointer: str, name: str = "") -> None:
        error = best_match(validator.iter_errors(value))
        if error is not None:
            path = "".join(f"/{_escape(str(part))}" for part in error.absolute_path)
            code, rule = _rule(error)
            subject = f"`{name}`" if name and not path else f"`{pointer}{path}`"
            _refuse(f"{subject} must {rule}, got {kind_of(error.instance)}", pointer + path, code=code)


def request_schema(settings: Settings) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a request under the operator's limits."""
    schema: dict[str, Any] = json.loads(files("mptserve").joinpath("request.schema.json").read_text(encoding="utf-8"))
    rules = schema["$defs"]["parameters"]["properties"]
    for rule in rules.values():
        if "x-no-effect" in rule:
            rule["description"] = "Accepted without effect, for clients of other servers."
    rules["max_new_tokens"]["maximum"] = rules["min_new_tokens"]["maximum"] = settings.max_new_tokens
    rules["max_new_tokens"]["default"] = min(rules["max_new_tokens"]["default"], settings.max_new_tokens)
    rules["num_return_sequences"]["maximum"] = settings.max_sequences
    rules["output_format"]["default"] = settings.output_format
    rules["chat_template"]["enum"] = list(CHAT_TEMPLATES)
    schema["$defs"]["prompt_list"]["maxItems"] = settings.max_prompts
    for name, value in settings.default_parameters.items():
        if name in rules and value is not None and not rules[name].get("x-no-effect"):
            rules[rules[name].get("x-alias-of", name)]["default"] = value
    for name, rule in rules.items():
        if "x-alias-of" in rule:
            first = {key: value for key, value in rules[rule["x-alias-of"]].items() if key != "default"}
            rules[name] = first | rule | {"description": f"Another name of `{rule['x-alias-of']}`; give one of them."}
    return schema


def openapi_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` in plain JSON Schema: with lists per prompt, strings for booleans, and null."""
    schema = deepcopy(schema)
    for name, rule in schema["$defs"]["parameters"]["properties"].items():
        notes = {key: rule.pop(key) for key in ("description", "default") if key in rule}
        per_prompt = rule.pop("x-per-prompt", False)
        forms = list(rule.get("anyOf", [rule]))
        if words := _boolean_words(rule):
            forms.append({"type": "string", "pattern": _in_any_case(words)})
        if per_prompt:
            each = forms[0] if len(forms) == 1 else {"anyOf": forms}
            forms.insert(1, {"type": "array", "items": deepcopy(each)})
        schema["$defs"]["parameters"]["properties"][name] = notes | {"anyOf": [*forms, {"type": "null"}]}
    spelled = {"type": "string", "pattern": _in_any_case(list(BOOLEANS))}
    schema["$defs"]["switch"] = {"anyOf": [{"type": "boolean"}, spelled, {"type": "null"}]}
    return schema


def _boolean_words(rule: dict[str, Any]) -> list[str]:
    """Return the strings that a boolean parameter takes for true and false; none for other parameters."""
    taken = (True, False) if rule.get("type") == "boolean" else rule.get("enum", ())
    return [word for word, value in BOOLEANS.items() if any(choice is value for choice in taken)]


def _in_any_case(words: list[str]) -> str:
    """Return a regular expression for the words in upper and lower case; JSON Schema knows no flags."""
    spelled = ["".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in word) for word in words]
    return f"^({'|'.join(spelled)})$"


def body_too_large(n_bytes: int, limit: int) -> TooLarge:
    return TooLarge(f"the body must be at most {limit} bytes, got {n_bytes}", code="body_too_large")


def _json(body: bytes) -> Any:
    if not body:
        _refuse("the body is empty; it must be a JSON object", "", code="invalid_json")
    try:
        return strict_json.loads(body.decode("utf-8-sig"))  # PowerShell writes the mark
    except UnicodeDecodeError as exc:
        _refuse(f"the body must be UTF-8; byte {exc.start} is not", "", code="invalid_json")
    except strict_json.NotJson as exc:
        _refuse(f"the body {exc}", "", code="invalid_json")


@dataclass(frozen=True)
class Body:
    """The parts of a body, unchecked. as_list: whether clients that send this form read a list of texts."""

    prompts: Located
    parameters: Located
    as_list: bool = False


def dialect(body: Any) -> Body:
    """Return prompts and parameters from any of the forms that clients send; see request.schema.json."""
    if not isinstance(body, dict):
        _refuse(f"the body must be a JSON object, got {kind_of(body)}", "", code="wrong_type")
    key = "inputs" if "inputs" in body and "input_data" not in body else "input_data"
    if key not in body:
        hint = "; OpenAI's requests go to /v1/chat/completions or /v1/completions" if body.keys() & OPENAI else ""
        _refuse(
            f"`input_data` is missing: the prompts go there, as `input_data.input_string`{hint}",
            "",
            code="missing_field",
        )
    inner, beside = body[key], ["parameters"]
    nested = isinstance(inner, dict)
    if nested:
        if inner.keys() & {"columns", "data"}:
            _refuse(f"`/{key}` is a table; send the prompts as `input_string`", f"/{key}", code="unknown_field")
        _only(inner, {"input_string", "task_type", *PARAMETERS}, f"/{key}")
        if "input_string" not in inner:
            _refuse(f"`/{key}/input_string` is missing: the prompts go there", f"/{key}", code="missing_field")
        prompts = Located(inner["input_string"], f"/{key}/input_string")
    else:
        prompts = Located(inner, f"/{key}")
        beside = ["params", "parameters"] if key == "input_data" else ["parameters"]
    _only(body, {key, "task_type", *beside, *(("stream",) if key == "inputs" else ())}, "")
    for place, at in ((body, ""), (inner, f"/{key}")):
        if isinstance(place, dict) and "task_type" in place and place["task_type"] not in TASKS:
            _refuse(
                f"`task_type` must be one of {', '.join(f'`{t}`' for t in TASKS)}: this server generates text",
                f"{at}/task_type",
                code="unsupported_task",
            )
    places = [(inner, f"/{key}", name) for name in PARAMETERS if nested and name in inner]
    places += [(body, "", name) for name in beside if name in body]
    if len(places) > 1:
        _refuse("parameters are given twice; give them once", f"/{places[-1][2]}", code="invalid_request")
    as_list = key == "input_data" and (not nested or any(place is body for place, _, _ in places))
    if not places:
        parameters = Located({}, f"/{beside[0]}")
    else:
        place, at, name = places[0]
        parameters = Located({} if place[name] is None else place[name], f"{at}/{name}")
    if "stream" in body and isinstance(parameters.value, dict):
        parameters = Located({"stream": body["stream"]} | parameters.value, parameters.pointer)
    return Body(prompts, parameters, as_list)


def _only(value: dict[str, Any], allowed: set[str], pointer: str) -> None:
    for name in value:
        if name not in allowed:
            known = {field: field for field in sorted(allowed)}
            _refuse(unknown(name, known), f"{pointer}/{_escape(name)}", code="unknown_field")


def unknown(name: str, known: Mapping[str, str]) -> str:
    """Name the nearest known field; the unknown one is shortened, as it may hold anything.

    known: the names that are compared, each with the name to suggest.
    """
    near = difflib.get_close_matches(name[:64].lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean `{known[near[0]]}`?" if near else f"known are {', '.join(dict.fromkeys(known.values()))}"
    shown = name if len(name) <= 40 and name.isidentifier() else f"a name of {len(name)} characters"
    return f"{'`' + shown + '`' if shown == name else shown} is not known; {hint}"


def _with_booleans(rule: dict[str, Any], value: Any) -> Any:
    """Return a value of a boolean parameter as a boolean where it is a string that means one."""
    boolean = rule.get("type") == "boolean" or any(isinstance(choice, bool) for choice in rule.get("enum", ()))
    return BOOLEANS.get(value.lower(), value) if boolean and isinstance(value, str) else value


def _with_joined_parts(messages: Located) -> Located:
    """Return messages whose contents are strings: lists of text parts are joined."""

    def joined(message: Any, pointer: str) -> Any:
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str):
            return message
        if not isinstance(content, list) or not content:
            at = f"{pointer}/content"
            _refuse(f"`{at}` must be a string or a list of text parts, got {kind_of(content)}", at, code="wrong_type")
        for i, part in enumerate(content):
            at = f"{pointer}/content/{i}"
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind in ("image_url", "image", "input_image", "input_audio", "video_url"):
                _refuse(
                    f"`{at}` must be text: images, sound and video are not supported", at, code="unsupported_content"
                )
            if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
                _refuse(
                    f'`{at}` must be {{"type": "text", "text": a string}}, got {kind_of(part)}', at, code="wrong_type"
                )
        return message | {"content": "".join(part["text"] for part in content)}

    found = [joined(message, f"{messages.pointer}/{i}") for i, message in enumerate(messages.value)]
    return Located(found, messages.pointer)


def _texts(found: Located) -> list[Located]:
    """Return each string of a string or a list of strings."""
    texts = [found]
    if isinstance(found.value, list):
        texts = [Located(text, f"{found.pointer}/{i}") for i, text in enumerate(found.value)]
    for text in texts:
        _well_formed(text)
    return texts


def looks_like_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict)


def _chat(found: Located) -> Located:
    """Return checked messages as one conversation."""
    messages: list[Message] = []
    for i, message in enumerate(found.value):
        _well_formed(Located(message["content"], f"{found.pointer}/{i}/content"))
        messages.append(Message(message["role"], message["content"]))
    return Located(ChatPrompt(tuple(messages)), found.pointer)


def _well_formed(text: Located) -> None:
    """Refuse text that JSON can represent and UTF-8 cannot: halves of surrogate pairs."""
    try:
        text.value.encode("utf-8")
    except UnicodeEncodeError as exc:
        _refuse(
            f"`{text.pointer}` must be Unicode text; character {exc.start} is half of a surrogate pair",
            text.pointer,
            code="invalid_text",
        )


def _of_prompt(values: dict[str, Any], i: int) -> dict[str, Any]:
    """Return the parameters of the i-th prompt; lists but those of `stop` and `stop_token_ids` are per prompt."""
    whole = ("stop", "stop_token_ids")
    return {k: v[i] if isinstance(v, list) and k not in whole else v for k, v in values.items()}


def _combine(values: dict[str, Any], given: Collection[str], pointer: str) -> None:
    """Refuse the values of one prompt where they do not go together, pointing at one of those `given`."""
    max_new, min_new = int(values["max_new_tokens"]), int(values["min_new_tokens"])
    if min_new > max_new:
        _refuse(
            f"`min_new_tokens` must be at most `max_new_tokens` ({max_new}), got {min_new}",
            f"{pointer}/{'min_new_tokens' if 'min_new_tokens' in given else 'max_new_tokens'}",
            code="out_of_range",
        )
    if values.get("logprobs") is not None and not values["details"]:
        _refuse(
            "`logprobs` are part of the details; ask for `details` too",
            f"{pointer}/{'logprobs' if 'logprobs' in given else 'details'}",
        )


def _prompt(prompt: Located, values: dict[str, Any], fit: bool) -> PromptRequest:
    greedy = not values["do_sample"] or values["temperature"] < GREEDY_BELOW
    sampling = SamplingParams(
        max_new_tokens=int(values["max_new_tokens"]),
        min_new_tokens=int(values["min_new_tokens"]),
        temperature=0.0 if greedy else float(values["temperature"]),
        top_p=float(values["top_p"]),
        top_k=int(values["top_k"]),
        min_p=float(values["min_p"]),
        repetition_penalty=float(values["repetition_penalty"]),
        presence_penalty=float(values["presence_penalty"]),
        frequency_penalty=float(values["frequency_penalty"]),
        seed=int(values["seed"]) if "seed" in values else secrets.randbits(32),
        ignore_eos=values["ignore_eos"],
        logprobs=_optional_int(values.get("logprobs")),
        logit_bias=values.get("logit_bias", ()),
    )
    return PromptRequest(prompt.value, prompt.pointer, sampling, _optional_int(values.get("truncate")), fit)


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def _rule(error: ValidationError) -> tuple[str, str]:
    """Return the stable code and the words for a broken JSON Schema rule."""
    limit: Any = error.validator_value
    value: Any = error.instance
    schema: Any = error.schema
    if schema.get("x-no-effect") and error.validator == "enum":
        return "unsupported_parameter", f"be left out or {json.dumps(limit[0])}: this server does not support it"
    match error.validator:
        case "type":
            names = {"integer": "a whole number", "object": "an object", "array": "a list"}
            return "wrong_type", f"be {names.get(limit, f'a {limit}')}"
        case "required":
            missing = next(name for name in limit if name not in value)
            return "missing_field", f"have `{missing}`"
        case "additionalProperties":
            return "unknown_field", "have only the fields " + ", ".join(f"`{name}`" for name in schema["properties"])
        case "minimum":
            return "out_of_range", f"be at least {limit}"
        case "maximum":
            return "out_of_range", f"be at most {limit}"
        case "exclusiveMinimum":
            return "out_of_range", f"be above {limit}"
        case "minItems":
            return "wrong_length", f"have at least {count(limit, 'item')}"
        case "maxItems":
            return "wrong_length", f"have at most {count(limit, 'item')}"
        case "minLength":
            return "wrong_length", "not be empty"
        case "maxLength":
            return "wrong_length", f"have at most {limit} characters"
        case "enum":
            return "out_of_range", "be one of " + ", ".join(f"`{v}`" for v in limit)
        case _:
            return "wrong_type", "be a string or a list of strings"


def kind_of(value: Any) -> str:
    """Return the type and size of a value; its content only where it is a number."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            text = str(value)
            return text if len(text) <= 24 else f"a number of {len(text.lstrip('-'))} digits"
        case str():
            return f"a string of {count(len(value), 'character')}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object of {len(value)}"
        case _:  # only tables can hold it
            return f"a value of type {type(value).__name__}"


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _escape(part: str) -> str:
    """Escape one step of a JSON pointer (RFC 6901), shortened: pointers go into logs and names can be anything."""
    return part[:64].replace("~", "~0").replace("/", "~1")


def _refuse(message: str, pointer: str, code: str = "invalid_request") -> NoReturn:
    raise InvalidRequest(message, field=pointer, code=code)
