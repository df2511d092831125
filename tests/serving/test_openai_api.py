"""OpenAI's API, asked by OpenAI's own client, LangChain and LangChain's Azure ML classes on a real server."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from batches import job, results, write
from mptserve.service import Service
from openai_process import OpenAIServer
from serving import eventually, metrics, post, request

pytestmark = pytest.mark.long

STORY = "Once upon a time"
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def client(openai_server: OpenAIServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{openai_server.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def scored(openai_server: OpenAIServer, prompt: Any, **parameters: Any) -> Any:
    reply = post(openai_server.port, {"input_data": {"input_string": prompt, "parameters": parameters}})
    assert reply.status == 200, reply
    return reply.json


# Completions ---------------------------------------------------------------------------------------------------------


def test_a_completion_says_what_it_cost_and_why_it_ended(client: openai.OpenAI) -> None:
    found = client.completions.create(model="mpt-8m", prompt=STORY, max_tokens=12, **SAMPLED)
    assert (found.object, found.model, len(found.choices)) == ("text_completion", "mpt-8m", 1)
    choice, usage = found.choices[0], found.usage
    assert (choice.index, choice.finish_reason, choice.stop_reason, choice.logprobs) == (0, "length", "length", None)
    assert choice.details["seed"] == 7
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)
    assert client.completions.create(model="m", prompt=STORY, **SAMPLED).usage.completion_tokens == 16


def test_every_door_gives_the_same_text_for_the_same_seed(
    client: openai.OpenAI, openai_server: OpenAIServer, service: Service, tmp_path: Path
) -> None:
    v1 = client.completions.create(model="m", prompt=STORY, max_tokens=40, **SAMPLED).choices[0].text
    body = request(STORY, max_new_tokens=40, return_full_text=False, **SAMPLED)
    assert post(openai_server.port, body).json == [{"0": v1}]
    assert json.loads(service.generate(json.dumps(body).encode(), "id").body) == [{"0": v1}]

    row = {"prompt": STORY, "parameters": body["input_data"]["parameters"]}
    with job(tmp_path / "in", tmp_path / "out") as batch:
        batch.run([write(tmp_path / "in" / "a.jsonl", [row])])
    assert [r["output"] for r in results(tmp_path / "out", "a.jsonl.jsonl")] == [v1]

    messages = [{"role": "user", "content": "Hi, I'd like a latte."}]
    chat = client.chat.completions.create(model="m", messages=messages, max_tokens=40, **SAMPLED)
    text = chat.choices[0].message.content
    assert scored(openai_server, messages, max_new_tokens=40, **SAMPLED) == {"output": text}
    plain = "Customer: Hi, I'd like a latte.\nBarista:"
    raw = scored(openai_server, plain, max_new_tokens=40, stop=["\nCustomer:"], return_full_text=False, **SAMPLED)
    assert raw[0]["0"].lstrip() == text


def test_a_stream_joined_is_the_whole(client: openai.OpenAI) -> None:
    for extra in ({}, {"n": 3}, {"stop": [" the", "."]}, {"logprobs": 2, "n": 2}):
        asked: dict[str, Any] = {"model": "m", "prompt": [STORY, "The king"], "max_tokens": 24} | SAMPLED | extra
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert [c for c in chunks[:-1] if c.usage] == []
        assert (chunks[-1].usage, chunks[-1].choices) == (whole.usage, [])
        for choice in whole.choices:
            own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
            assert "".join(c.text for c in own) == choice.text
            assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice.finish_reason]
            if choice.logprobs is not None:
                parts = [c.logprobs for c in own if c.logprobs]
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    joined = [x for part in parts for x in getattr(part, name)]
                    assert joined == getattr(choice.logprobs, name)


def test_several_prompts_answers_and_ids_come_in_order(client: openai.OpenAI) -> None:
    found = client.completions.create(model="m", prompt=[STORY, "The king"], n=2, max_tokens=8, seed=1)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 4 + 2
    alone = client.completions.create(model="m", prompt="The king", n=2, max_tokens=8, seed=1)
    assert [c.text for c in found.choices[2:]] == [c.text for c in alone.choices]


def test_a_prompt_may_be_token_ids(client: openai.OpenAI, openai_server: OpenAIServer) -> None:
    ids = post(openai_server.port, {"prompt": STORY}, path="/tokenize").json
    assert (ids["count"], ids["max_model_len"]) == (len(ids["tokens"]), 2048)
    assert post(openai_server.port, {"tokens": ids["tokens"]}, path="/detokenize").json == {"prompt": STORY}
    of_text = client.completions.create(model="m", prompt=STORY, max_tokens=8, seed=1).choices[0].text
    for prompt in (ids["tokens"], [ids["tokens"]]):
        assert client.completions.create(model="m", prompt=prompt, max_tokens=8, seed=1).choices[0].text == of_text
    with pytest.raises(openai.BadRequestError, match="has the token id 9999; the largest is 8191"):
        client.completions.create(model="m", prompt=[1, 9999])
    refused = post(openai_server.port, {"tokens": [1, 9999]}, path="/detokenize")
    assert (refused.status, refused.json["error"]["param"]) == (400, "tokens")
    assert post(openai_server.port, {"tokens": []}, path="/detokenize").json == {"prompt": ""}


def test_our_name_of_a_parameter_of_openais_is_refused_with_theirs(openai_server: OpenAIServer) -> None:
    refused = post(openai_server.port, {"prompt": STORY, "max_new_tokens": 5}, path="/v1/completions")
    assert refused.json["error"]["message"] == "`max_new_tokens` is not known; did you mean `max_tokens`?"


def test_echo_gives_the_prompt_back(client: openai.OpenAI) -> None:
    asked = {"model": "m", "prompt": STORY, "max_tokens": 8, "seed": 1}
    assert client.completions.create(**asked, echo=True).choices[0].text == (
        STORY + client.completions.create(**asked).choices[0].text
    )


def test_stop_strings_end_an_answer_and_are_not_in_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="m", prompt=STORY, max_tokens=40, temperature=0).choices[0].text
    stop = free[10:15]
    cut = client.completions.create(model="m", prompt=STORY, max_tokens=40, temperature=0, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (free[: free.index(stop)], "stop", "stop")


def test_log_probabilities_are_those_of_score(client: openai.OpenAI, openai_server: OpenAIServer) -> None:
    theirs = client.completions.create(model="m", prompt=STORY, max_tokens=6, logprobs=3, **SAMPLED).choices[0].logprobs
    parameters = {"max_new_tokens": 6, "logprobs": 3, "details": True} | SAMPLED
    ours = scored(openai_server, STORY, **parameters)[0]["details"]["0"]["logprobs"]
    assert theirs.tokens == [t["token"] for t in ours]
    assert theirs.token_logprobs == [t["logprob"] for t in ours]
    assert theirs.text_offset == [sum(len(t) for t in theirs.tokens[:i]) for i in range(6)]
    for found, own in zip(theirs.top_logprobs, ours, strict=True):
        assert {own["token"]: own["logprob"]} | {t["token"]: t["logprob"] for t in own["top"]} == found


def test_a_logit_bias_forces_and_forbids(client: openai.OpenAI, openai_server: OpenAIServer) -> None:
    (king,) = post(openai_server.port, {"prompt": " king"}, path="/tokenize").json["tokens"]
    asked = {"model": "m", "prompt": "The", "max_tokens": 5, "temperature": 0}
    assert client.completions.create(**asked, logit_bias={str(king): 100}).choices[0].text == " king" * 5
    free = client.completions.create(**asked, logprobs=0).choices[0]
    (first,) = post(openai_server.port, {"prompt": free.logprobs.tokens[0]}, path="/tokenize").json["tokens"]
    without = client.completions.create(**asked, logit_bias={str(first): -100}).choices[0].text
    assert not without.startswith(free.logprobs.tokens[0])


# Chat ----------------------------------------------------------------------------------------------------------------


def test_a_chat_streams_its_role_then_its_words(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 20} | SAMPLED
    whole = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2, stream=True))
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant"] * 2
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason
        tokens = [t for c in own if c.logprobs for t in c.logprobs.content]
        assert tokens == choice.logprobs.content
        assert [len(t.top_logprobs) for t in tokens] == [2] * len(tokens)


def test_the_answer_ends_where_the_other_side_would_speak(client: openai.OpenAI) -> None:
    """A base model goes on with both sides; the template's stop strings are its guard."""
    found = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Hi, I'd like a latte."}], seed=1, temperature=0.5
    )
    assert found.choices[0].finish_reason == "stop"
    assert "Customer:" not in found.choices[0].message.content


def test_a_request_may_choose_its_template(client: openai.OpenAI, openai_server: OpenAIServer) -> None:
    def ids(**more: str) -> list[int]:
        return post(openai_server.port, {"messages": [{"role": "user", "content": "x"}]} | more, path="/tokenize").json[
            "tokens"
        ]

    for template in ("chatml", "dolly", "human-bot", "own"):
        found = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=4,
            extra_body={"chat_template": template},
        )
        assert found.usage.prompt_tokens == len(ids(chat_template=template))
    assert ids() == ids(chat_template="own")


def test_messages_may_come_in_parts_and_from_developers(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "there"}]
    asked = {"model": "m", "max_completion_tokens": 8, "seed": 1}
    first = client.chat.completions.create(
        messages=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}], **asked
    )
    second = client.chat.completions.create(
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, there"}], **asked
    )
    assert first.choices[0].message.content == second.choices[0].message.content


@pytest.mark.slow
def test_a_chat_without_a_limit_gets_what_there_is_room_for(client: openai.OpenAI) -> None:
    long = "word " * 1900
    found = client.chat.completions.create(model="m", messages=[{"role": "user", "content": long}], seed=1)
    assert found.usage.total_tokens <= 2048
    with pytest.raises(openai.BadRequestError, match="the context is 2048") as refused:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": long * 2}])
    assert refused.value.code == "context_length_exceeded"


def test_the_list_of_models_has_the_one(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len, model.chat_template) == ("mpt-8m", 2048, "own")
    assert client.models.retrieve("mpt-8m") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


# Errors, and callers that go away ------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body", "message", "param", "code"),
    [
        ("completions", {"prompt": 5}, "`prompt` must be a string or a list, got 5", "prompt", "wrong_type"),
        (
            "completions",
            {"prompt": "secret", "max_tokens": 0},
            "`max_tokens` must be at least 1, got 0",
            "max_tokens",
            "out_of_range",
        ),
        (
            "completions",
            {"prompt": "x", "max_tokens": 5000},
            "`max_tokens` must be at most 4096, got 5000",
            "max_tokens",
            "out_of_range",
        ),
        ("completions", {"prompt": "x", "n": 17}, "`n` must be at most 16, got 17", "n", "out_of_range"),
        (
            "completions",
            {"prompt": "x", "tempratur": 1},
            "`tempratur` is not known; did you mean `temperature`?",
            "tempratur",
            "unknown_parameter",
        ),
        (
            "completions",
            {"prompt": "x", "temperature": "secret"},
            "`temperature` must be a number, got a string of 6 characters",
            "temperature",
            "wrong_type",
        ),
        (
            "completions",
            {"prompt": "x", "echo": True, "logprobs": 1},
            "`echo` with `logprobs` is not offered: prompts have no log probabilities",
            "echo",
            "invalid_request",
        ),
        (
            "completions",
            {"prompt": "\ud800"},
            "`prompt` must be Unicode text, without halves of surrogate pairs, got a string of 1 character",
            "prompt",
            "invalid_text",
        ),
        ("chat/completions", {}, "`messages` is missing", "messages", "missing_field"),
        (
            "chat/completions",
            {"messages": []},
            "`messages` must not be empty, got a list of 0",
            "messages",
            "wrong_length",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": "secret"}]},
            "`messages[0].role` must be 'system', 'developer', 'user' or 'assistant', got a string of 4 characters",
            "messages[0].role",
            "out_of_range",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x", "sekret": 1}]},
            "`messages[0].sekret` is not known",
            "messages[0].sekret",
            "unknown_parameter",
        ),
        (
            "chat/completions",
            CHAT | {"tools": [{"type": "function"}]},
            "`tools` must have at most 0 items, got a list of 1",
            "tools",
            "wrong_length",
        ),
        (
            "chat/completions",
            CHAT | {"top_logprobs": 2},
            "`top_logprobs` needs `logprobs`",
            "top_logprobs",
            "invalid_request",
        ),
    ],
)
def test_what_is_wrong_is_named_and_never_repeated(
    openai_server: OpenAIServer, path: str, body: dict[str, Any], message: str, param: str | None, code: str
) -> None:
    reply = post(openai_server.port, body, path=f"/v1/{path}")
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    assert (reply.status, reply.json) == (400, {"error": error})
    assert "secret" not in reply.body.decode()


def test_a_client_that_times_out_stops_its_generation(openai_server: OpenAIServer) -> None:
    with openai.OpenAI(base_url=f"{openai_server.url}/v1", api_key="x", max_retries=0, timeout=0.5) as hurried:
        before = metrics(openai_server.port).get("mpt_sequences_total{reason=cancelled}", 0)
        with pytest.raises(openai.APITimeoutError):
            hurried.completions.create(model="m", prompt=STORY, max_tokens=2000, n=4, extra_body={"ignore_eos": True})
    gone = "mpt_sequences_total{reason=cancelled}"
    eventually(lambda: metrics(openai_server.port).get(gone, 0) == before + 4, "four cancelled sequences")
    assert metrics(openai_server.port)["mpt_running"] == 0


def test_a_stream_that_is_closed_stops_its_generation(client: openai.OpenAI, openai_server: OpenAIServer) -> None:
    gone = "mpt_sequences_total{reason=cancelled}"
    before = metrics(openai_server.port).get(gone, 0)
    stream = client.completions.create(
        model="m", prompt=STORY, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    eventually(lambda: metrics(openai_server.port).get(gone, 0) == before + 1, "a cancelled sequence")


def test_asynchronous_clients_share_the_engine(openai_server: OpenAIServer) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{openai_server.url}/v1", api_key="x") as client:
            asked = [
                client.completions.create(model="m", prompt=STORY, max_tokens=16, temperature=0) for _ in range(12)
            ]
            return [found.choices[0].text for found in await asyncio.gather(*asked)]

    assert len(set(asyncio.run(ask()))) == 1


@pytest.mark.slow
def test_a_busy_server_says_when_to_come_back() -> None:
    with OpenAIServer({"MPT_QUEUE_LIMIT": "1", "MPT_MAX_ROWS": "1"}) as busy:
        long = {"prompt": STORY, "max_tokens": 1500, "n": 4, "ignore_eos": True, "stream": True}
        with openai.OpenAI(base_url=f"{busy.url}/v1", api_key="x", max_retries=0) as client:
            extra = {"ignore_eos": True}
            stream = client.completions.create(
                model="m", prompt=STORY, max_tokens=long["max_tokens"], n=4, stream=True, extra_body=extra
            )
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(model="m", prompt=STORY)
            stream.close()
        assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("queue_full", "1")


# LangChain -----------------------------------------------------------------------------------------------------------


def test_langchains_chat_model_answers_with_any_key_and_the_library_chosen_model_name(
    openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an on-premise service of this model told its users to type, with today's imports."""
    from langchain_core.messages import HumanMessage
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate
    from langchain_openai import ChatOpenAI

    monkeypatch.setenv("OPENAI_API_KEY", "random-string")
    chat = ChatOpenAI(openai_api_base=f"{openai_server.url}/v1", max_tokens=128)
    answer = chat.invoke([HumanMessage(content="Why do I need to run machine learning models on-premise?")])
    assert answer.content
    assert answer.response_metadata["model_name"] == "mpt-8m"
    assert answer.usage_metadata["output_tokens"] <= 128

    template = "You are an assistant in a conversation. Answer what a user asks.\n\nUser: {user_message}\nAssistant:"
    chain = PromptTemplate(input_variables=["user_message"], template=template) | chat | StrOutputParser()
    assert chain.invoke({"user_message": "Why do I need to run machine learning models on-premise?"})
    assert "".join(chain.stream({"user_message": "What is a harbour?"}))


def test_langchains_completion_model_answers(openai_server: OpenAIServer) -> None:
    from langchain_openai import OpenAI

    llm = OpenAI(base_url=f"{openai_server.url}/v1", api_key="x", model="mpt-8m", max_tokens=20, temperature=0)
    whole = llm.invoke(STORY)
    assert len(whole) > 10
    assert "".join(llm.stream(STORY)) == whole
    assert llm.batch([STORY, STORY]) == [whole] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_langchains_azure_ml_classes_read_score(openai_server: OpenAIServer) -> None:
    from langchain_community.chat_models.azureml_endpoint import (
        AzureMLChatOnlineEndpoint,
        CustomOpenAIChatContentFormatter,
    )
    from langchain_community.llms.azureml_endpoint import (
        AzureMLOnlineEndpoint,
        CustomOpenAIContentFormatter,
        GPT2ContentFormatter,
    )
    from langchain_core.messages import HumanMessage, SystemMessage

    options: dict[str, Any] = {
        "endpoint_url": f"{openai_server.url}/score",
        "endpoint_api_type": "dedicated",
        "endpoint_api_key": "any",
        "model_kwargs": {"max_new_tokens": 12, "temperature": 0.5, "seed": 3},
    }
    for formatter in (CustomOpenAIContentFormatter(), GPT2ContentFormatter()):
        found = AzureMLOnlineEndpoint(content_formatter=formatter, **options).invoke(STORY)
        assert found == scored(openai_server, f'"{STORY}"', **options["model_kwargs"])[0]["0"]
    chat = AzureMLChatOnlineEndpoint(content_formatter=CustomOpenAIChatContentFormatter(), **options)
    answer = chat.invoke([SystemMessage(content="Be kind."), HumanMessage(content="Hi!")])
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}]
    assert answer.content == scored(openai_server, messages, **options["model_kwargs"])["output"].strip()
