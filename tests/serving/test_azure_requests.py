"""Request bodies in the shapes that Azure's examples, model cards and clients send, and what becomes of each.

Shapes are those of azureml-examples (085cd6ea), Azure's model cards and LangChain's formatters; the texts are ours.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mptserve.service import Service
from mptserve.settings import read_settings

EMBEDDED = Path(__file__).resolve().parents[2] / "samples" / "mpt-8m"
SHORT: dict[str, Any] = {"max_new_tokens": 2, "seed": 1}
USER = {"role": "user", "content": "Hello"}
TEXT_PARTS = {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}]}


def card(*prompts: str, **parameters: Any) -> dict[str, Any]:
    return {"input_data": {"input_string": list(prompts), "parameters": SHORT | parameters}}


RECORDS: dict[str, Any] = {
    "the model card": card("a", temperature=0.5, top_p=0.5, do_sample=True),
    "two prompts": card("a", "b"),
    "two prompts without parameters": {"input_data": {"input_string": ["a", "b"]}},
    "one prompt as a string": {"input_data": {"input_string": "a"}},
    "no full text": card("a", return_full_text=False, temperature=0.8, top_p=0.8),
    "Llama's name of max_new_tokens": card("a", max_gen_len=2) | {},
    "OpenAI's name of max_new_tokens": {"input_data": {"input_string": ["a"], "parameters": {"max_tokens": 2}}},
    "booleans as strings": card("a", do_sample="True", stream="False", return_full_text="false"),
    "beam search switched off": card("a", use_beam_search=False, num_beams=1, early_stopping=False, length_penalty=1.0),
    "special tokens skipped": card("a", skip_special_tokens=True, ignore_eos=False),
    "stop token": card("a", stop_token_ids=[0]),
    "end token": card("a", eos_token_id=0, pad_token_id=0),
    "a batch size": card("a", "b", _batch_size=2),
    "Mistral's switch": card("a", safe_prompt=False),
    "n answers": card("a", n=2),
    "best of one": card("a", best_of=1),
    "params in the input": {"input_data": {"input_string": ["a"], "params": SHORT}},
    "a task type in the input": {
        "input_data": {"input_string": ["a"], "parameters": SHORT, "task_type": "text-generation"}
    },
    "a task type in the parameters": card("a", task_type="text-generation"),
    "GPT-2's sample": {"inputs": {"input_string": ["a"]}},
    "LangChain's GPT-2 formatter": {"inputs": {"input_string": ['"a"']}, "parameters": SHORT},
    "parameters inside inputs": {"inputs": {"input_string": ["a"], "parameters": SHORT}},
    "LangChain's Hugging Face formatter": {"inputs": ["a"], "parameters": SHORT},
    "TGI": {"inputs": "a", "parameters": SHORT, "stream": False},
    "TGI without parameters": {"inputs": "a"},
    "a null parameter": card("a", stop=None, top_k=None),
}
for body in (RECORDS["Llama's name of max_new_tokens"],):
    body["input_data"]["parameters"].pop("max_new_tokens")
LISTS: dict[str, Any] = {
    "MLflow": {"input_data": ["a"], "params": SHORT},
    "MLflow, two prompts": {"input_data": ["a", "b"], "params": SHORT},
    "MLflow without params": {"input_data": ["a"]},
    "MLflow with empty params": {"input_data": ["a"], "params": {}},
    "LangChain's Dolly formatter": {"input_data": {"input_string": ['"a"']}, "parameters": SHORT},
}
CHATS: dict[str, Any] = {
    "a system and a user": {
        "input_data": {"input_string": [{"role": "system", "content": "Be kind."}, USER], "parameters": SHORT}
    },
    "keys in the other order": {"input_data": {"input_string": [{"content": "Hello", "role": "user"}]}},
    "a conversation": {
        "input_data": {"input_string": [USER, {"role": "assistant", "content": "Hi"}, USER], "parameters": SHORT}
    },
    "text parts": {"input_data": {"input_string": [TEXT_PARTS], "parameters": SHORT}},
    "a chat task": {"input_data": {"input_string": [USER], "parameters": SHORT, "task_type": "chat-completion"}},
    "a generation prompt": {
        "input_data": {"input_string": [USER], "parameters": SHORT | {"add_generation_prompt": True}}
    },
    "params of a chat": {"input_data": {"input_string": [USER], "params": SHORT}},
}
REFUSED: dict[str, tuple[Any, str, str]] = {
    "a table": (
        {"input_data": {"columns": ["input_string"], "data": ["a"], "index": [0]}},
        "unknown_field",
        "/input_data",
    ),
    "numbers": ({"input_data": [[1, 2], [3, 4]]}, "wrong_type", "/input_data/0"),
    "an image": (
        {"input_data": {"input_string": [IMAGE]}},
        "unsupported_content",
        "/input_data/input_string/0/content/0",
    ),
    "audio": (
        {"inputs": {"audio": ["https://example.com/a.mp3"], "language": ["en"]}},
        "unknown_field",
        "/inputs/audio",
    ),
    "a question and its context": (
        {"inputs": {"question": ["a"], "context": ["b"]}},
        "unknown_field",
        "/inputs/question",
    ),
    "a translation": (
        {"inputs": {"input_string": ["a"]}, "parameters": {"task_type": "translation_en_to_ro"}},
        "out_of_range",
        "/parameters/task_type",
    ),
    "a summary": ({"inputs": {"input_string": ["a"]}, "task_type": "summarization"}, "unsupported_task", "/task_type"),
    "beam search": (card("a", use_beam_search=True), "unsupported_parameter", "/input_data/parameters/use_beam_search"),
    "Mistral's prompt": (card("a", safe_prompt=True), "unsupported_parameter", "/input_data/parameters/safe_prompt"),
    "two names of one parameter": (
        card("a", max_tokens=3),
        "invalid_request",
        "/input_data/parameters/max_tokens",
    ),
    "an image model's parameter": (
        card("a", guidance_scale=7.5),
        "unknown_parameter",
        "/input_data/parameters/guidance_scale",
    ),
    "OpenAI's chat": ({"messages": [USER], "model": "mpt"}, "missing_field", ""),
    "OpenAI's completion": ({"prompt": "a", "max_tokens": 2}, "missing_field", ""),
    "a role of tools": (
        {"input_data": {"input_string": [{"role": "tool", "content": "a"}]}},
        "out_of_range",
        "/input_data/input_string/0/role",
    ),
    "parameters twice": (
        {"input_data": {"input_string": ["a"], "parameters": {}}, "parameters": {}},
        "invalid_request",
        "/parameters",
    ),
    "a boolean that is none": (card("a", stream="perhaps"), "wrong_type", "/input_data/parameters/stream"),
}


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(
        read_settings({"AZUREML_MODEL_DIR": str(EMBEDDED), "MPT_KV_CACHE_GB": "0.1", "MPT_CPU_THREADS": "1"})
    )


def answer(service: Service, body: Any) -> tuple[int, Any]:
    found = service.generate(json.dumps(body).encode(), "id")
    return found.status, json.loads(found.body)


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_answered_where_clients_read_them(service: Service, name: str) -> None:
    status, answered = answer(service, RECORDS[name])
    assert status == 200, answered
    given = RECORDS[name].get("input_data", RECORDS[name].get("inputs"))
    prompts = given["input_string"] if isinstance(given, dict) else given
    assert len(answered) == (1 if isinstance(prompts, str) else len(prompts))
    assert all(isinstance(record["0"], str) for record in answered)


@pytest.mark.parametrize("name", LISTS)
def test_texts_are_answered_where_clients_read_those(service: Service, name: str) -> None:
    status, answered = answer(service, LISTS[name])
    assert (status, [type(text) for text in answered]) == (200, [str] * len(answered))


@pytest.mark.parametrize("name", CHATS)
def test_conversations_are_answered_as_the_chat_task(service: Service, name: str) -> None:
    status, answered = answer(service, CHATS[name])
    assert (status, list(answered), type(answered["output"])) == (200, ["output"], str)


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_server_cannot_do_is_refused_at_its_place(service: Service, name: str) -> None:
    body, code, field = REFUSED[name]
    status, answered = answer(service, body)
    assert (status, answered["error"]["code"], answered["error"].get("field", "")) == (400, code, field)


def test_text_parts_are_one_message(service: Service) -> None:
    joined = {"input_data": {"input_string": [{"role": "user", "content": "Hello there"}], "parameters": SHORT}}
    assert answer(service, CHATS["text parts"]) == answer(service, joined)


def test_a_stream_asked_for_with_a_string_or_beside_the_inputs_is_one(service: Service) -> None:
    for body in (card("a", stream="True"), {"inputs": "a", "parameters": SHORT, "stream": True}):
        found = service.generate(json.dumps(body).encode(), "id")
        assert found.events is not None
        assert any(event.startswith("event: done") for event in found.events)


def test_a_deployments_own_format_stands_above_the_forms(service: Service) -> None:
    body = {"input_data": ["a"], "params": SHORT | {"output_format": "records"}}
    assert answer(service, body)[1][0].keys() == {"0"}


def test_a_stop_token_ends_the_answer(service: Service) -> None:
    body = card("Once upon a time", max_new_tokens=12, do_sample=False, details=True, logprobs=0)
    first = answer(service, body)[1][0]["details"]["0"]["logprobs"]
    third = first[2]["id"]
    ended = answer(
        service, card("Once upon a time", max_new_tokens=12, do_sample=False, details=True, stop_token_ids=[third])
    )
    at = [token["id"] for token in first].index(third) + 1
    assert ended[1][0]["details"]["0"]["generated_tokens"] == at
    assert ended[1][0]["details"]["0"]["finish_reason"] == "stop"
