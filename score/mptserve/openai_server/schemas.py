"""The requests of OpenAI's API as this server takes them: known fields are checked, unknown ones are refused.

Unsupported fields that clients always send are accepted, but only at their no-op value.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mptserve.settings import CHAT_TEMPLATES

MAX_ID = (1 << 31) - 1
Text = Annotated[str, Field(max_length=16_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_ID)]], Field(min_length=1, max_length=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class GenerationFields(Model):
    """What both kinds of request share. Fields from `top_k` on are ours: `extra_body` in OpenAI's client."""

    model: str | None = Field(None, max_length=1000, description="Ignored: a deployment has one model.")
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, le=9007199254740991)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = Field(
        None, description="Token id to what is added to its logit."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=1000, description="Accepted and ignored.")
    metadata: dict[str, str] | None = Field(None, description="Accepted and ignored.")
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, le=1 << 20)
    ignore_eos: bool | None = None
    repetition_guard: int | None = Field(None, ge=0, le=100)
    truncate: Count | None = None


class CompletionRequest(GenerationFields):
    """`/v1/completions`: text to go on with. Control tokens such as `<|im_end|>` count in it."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
        | None
    ) = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=1024, description="Only the value of `n`.")
    suffix: Literal[""] | None = None


class TextPart(Model):
    type: Literal["text"]
    text: Text


class ChatMessage(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(None, max_length=1000, description="Accepted and ignored.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class ResponseFormat(Model):
    type: Literal["text"]


class ChatRequest(GenerationFields):
    """`/v1/chat/completions`: a conversation to answer. What messages say is never read as control tokens."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template: Literal[CHAT_TEMPLATES] | None = None  # type: ignore[valid-type]
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    prompt_cache_key: str | None = Field(None, max_length=1000, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Accepted and ignored.")


class TokenizeRequest(Model):
    """`/tokenize`: the ids of a text, or of the prompt that messages become."""

    model: str | None = Field(None, max_length=1000)
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)] | None = None
    chat_template: Literal[CHAT_TEMPLATES] | None = None  # type: ignore[valid-type]


class DetokenizeRequest(Model):
    """`/detokenize`: the text of token ids, control tokens left out."""

    model: str | None = Field(None, max_length=1000)
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MAX_ID)]], Field(max_length=1 << 20)]
