"""Conversations to prompts: the chat template of each model of the family, and what ends its answers.

Templates are data: `templates.json`, or the checkpoint's own, which is rendered in Jinja's sandbox. A message can
never contain a control token: before rendering, a mark follows each character that could begin one; after rendering,
only the template's own control tokens are found, and the marks are removed.
"""

import functools
import json
import secrets
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mptserve.errors import BadSetting, InvalidRequest, UnsupportedModel
from mptserve.tokenizer import Tokenizer

OWN = "own"
"""The name of the template that came with the checkpoint."""


@dataclass(frozen=True)
class Message:
    """One turn. role: system, user or assistant; the first may be any of them."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to be answered. template: one of CHAT_TEMPLATES, or None for the deployment's own choice."""

    messages: tuple[Message, ...]
    template: str | None = None


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written for a model. stop: strings, and stop_ids: tokens, that end an answer."""

    name: str
    source: str
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]


class PromptWriter:
    """Writes conversations for one checkpoint."""

    def __init__(self, folders: list[Path], tokenizer: Tokenizer, choice: str) -> None:
        """Read the templates.

        folders: where the checkpoint's `chat_template.jinja` or `.json`, `tokenizer_config.json` and
        `generation_config.json` may be.  choice: `auto`, or a name.  Raises BadSetting for a choice that is not there
        and UnsupportedModel for an own template that is not valid.
        """
        self._tokenizer = tokenizer
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True
        )
        self._environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._environment.globals["raise_exception"] = _refused_by_template
        self._markers = {token[0] for token in tokenizer.control_ids}
        self._tokens = _special_tokens(folders)
        self.templates = {
            name: self._template(name, spec["template"], tuple(spec["stop"])) for name, spec in published().items()
        }
        if (own := _own_template(folders)) is not None:
            self.templates[OWN] = self._template(OWN, own, _own_stop(folders))
        self._compiled = {name: self._compile(template) for name, template in self.templates.items()}
        self.default = self._choose(choice)

    def template(self, chat: ChatPrompt) -> ChatTemplate:
        """Return the template that a conversation asks for. Raises InvalidRequest when this model has none."""
        name = chat.template or self.default
        if name not in self.templates:
            raise InvalidRequest(
                f"`chat_template` must be one of {', '.join(self.templates)}: this model has none of its own",
                code="out_of_range",
            )
        return self.templates[name]

    def encode(self, chat: ChatPrompt) -> list[int]:
        """Return the prompt's token ids. Raises InvalidRequest when the model's own template refuses the messages."""
        return self._tokenizer.encode_parts(self._parts(chat))

    def _parts(self, chat: ChatPrompt) -> list[tuple[str, bool]]:
        """Return the prompt as (text, whether control tokens in it count).

        A mark of random digits follows each character of a message that could begin a control token, so that none is
        found there. The marks are removed after rendering.
        """
        mark = f"{secrets.randbits(96):030}"
        messages = [{"role": m.role, "content": self._marked(m.content, mark)} for m in chat.messages]
        try:
            text = self._compiled[self.template(chat).name].render(
                messages=messages, add_generation_prompt=True, **self._tokens
            )
        except InvalidRequest:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as exc:
            raise InvalidRequest(
                f"the model's chat template cannot write these messages ({type(exc).__name__})", code="invalid_messages"
            ) from exc
        pieces = text.split(mark)
        parts: list[tuple[str, bool]] = []
        for i, piece in enumerate(pieces):
            if i < len(pieces) - 1:  # its last character is the one that was marked
                parts += [(piece[:-1], True), (piece[-1:], False)]
            else:
                parts.append((piece, True))
        return parts

    def _marked(self, text: str, mark: str) -> str:
        for character in self._markers:
            text = text.replace(character, character + mark)
        return text

    def _template(self, name: str, source: str, stop: tuple[str, ...]) -> ChatTemplate:
        """A template written with ChatML's tokens ends its turns with them, whatever the config calls end of text."""
        ids = self._tokenizer.control_ids
        ends = tuple(ids[token] for token in ("<|im_end|>", "<|im_start|>") if token in source and token in ids)
        return ChatTemplate(name, source, stop, ends)

    def _compile(self, template: ChatTemplate) -> Any:
        try:
            return self._environment.from_string(template.source)
        except TemplateError as exc:
            raise UnsupportedModel(f"the checkpoint's chat template is not valid: {exc.message}") from exc

    def _choose(self, choice: str) -> str:
        if choice != "auto":
            if choice not in self.templates:
                raise BadSetting(f"MPT_CHAT_TEMPLATE is {choice}, but the checkpoint has no chat template of its own")
            return choice
        if OWN in self.templates:
            return OWN
        return "chatml" if {"<|im_start|>", "<|im_end|>"} <= self._tokenizer.control_ids.keys() else "dialogue"


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Return the published templates by name: `template` (Jinja), `stop` strings, and the members that `use` it."""
    found: dict[str, dict[str, Any]] = json.loads(
        files("mptserve").joinpath("templates.json").read_text(encoding="utf-8")
    )
    return found


def _own_template(folders: list[Path]) -> str | None:
    """Return the chat template that came with the checkpoint, from any of the places where it may be."""
    for folder in folders:
        if (path := folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = _json_file(folder / name).get("chat_template")
            if isinstance(found, list):  # several, by name
                found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
            if isinstance(found, str):
                return found
    return None


def _own_stop(folders: list[Path]) -> tuple[str, ...]:
    """Return `stop_strings`, of the template's file or of generation_config.json, where `transformers` keeps them."""
    for folder in folders:
        for name in ("chat_template.json", "generation_config.json"):
            found = _json_file(folder / name).get("stop_strings")
            strings = [found] if isinstance(found, str) else found
            if isinstance(strings, list) and all(isinstance(s, str) and s for s in strings):
                return tuple(strings)
    return ()


def _special_tokens(folders: list[Path]) -> dict[str, str]:
    """Return bos_token and its like for templates that name them; as tokenizer_config.json has them, or empty."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = dict.fromkeys(names, "")
    for folder in folders:
        raw = _json_file(folder / "tokenizer_config.json")
        for name in names:
            value = raw.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
    return found


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UnsupportedModel(f"{path} is not JSON: {exc}") from exc
    return value if isinstance(value, dict) else {}


def _refused_by_template(reason: Any) -> NoReturn:
    raise InvalidRequest(
        f"the model's chat template refuses the messages: {str(reason)[:200]}", code="invalid_messages"
    )
