"""MPT_MAX_SEQ_LEN alone takes a checkpoint beyond its own context, on every server; beyond the setting, it is refused.

The embedded model was trained for 2,048 tokens; MPT-7B-8k-chat at 16,384 and StoryWriter at 84k are the same setting.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from batches import job, results, write
from openai_process import OpenAIServer
from serving import MODEL_DIR, get, post, request

pytestmark = pytest.mark.long

SETTING = {"MPT_MAX_SEQ_LEN": "4096"}
STORY = "Once upon a time there was a cat. " * 300
"""2,700 tokens and a little, which TOKENS says exactly: above the checkpoint's context and below the setting."""

TOKENS = len(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).encode(STORY).ids)
ROOM = 4096 - TOKENS
GREEDY = {"do_sample": False, "ignore_eos": True, "return_full_text": False}


def too_long(field: str, limit: str = "max_new_tokens") -> str:
    return (
        f"`{field}` has {TOKENS} tokens and asks for {ROOM + 1} more, 4097 together; the context is 4096. "
        f"Shorten it, lower `{limit}` or set `truncate`"
    )


def test_batch_takes_rows_beyond_the_checkpoints_context_by_the_setting_alone(tmp_path: Path) -> None:
    assert 2048 < TOKENS < 4096
    rows = [
        {"prompt": STORY, "max_new_tokens": 3, "do_sample": False, "ignore_eos": True},
        {"prompt": STORY, "max_new_tokens": ROOM + 1},
    ]
    write(tmp_path / "in" / "long.jsonl", rows)
    for name, environ in (("set", SETTING), ("not set", {})):
        with job(tmp_path / "in", tmp_path / name, **environ) as running:
            running.run([str(tmp_path / "in" / "long.jsonl")])
    first, second = results(tmp_path / "set", "long.jsonl.jsonl")
    assert (first["error"], first["prompt_tokens"], first["generated_tokens"]) == (None, TOKENS, 3)
    assert (second["error"]["code"], second["error"]["message"]) == ("context_length_exceeded", too_long("/prompt"))
    [refused, _] = results(tmp_path / "not set", "long.jsonl.jsonl")
    assert refused["error"]["message"].startswith(f"`/prompt` has {TOKENS} tokens and asks for 3 more")
    assert "the context is 2048." in refused["error"]["message"]


@pytest.fixture(scope="module")
def long_context_server() -> Iterator[OpenAIServer]:
    with OpenAIServer(SETTING) as running:
        yield running


@pytest.mark.long
def test_score_and_v1_take_prompts_beyond_the_checkpoints_context_by_the_setting_alone(
    long_context_server: OpenAIServer,
) -> None:
    port = long_context_server.port
    scored = post(port, request(STORY, max_new_tokens=8, **GREEDY))
    body = {"model": "m", "prompt": STORY, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    completed = post(port, body, path="/v1/completions")
    assert (scored.status, completed.status) == (200, 200)
    assert scored.headers["x-mpt-prompt-tokens"] == str(TOKENS)
    assert completed.json["usage"]["prompt_tokens"] == TOKENS
    assert scored.json == [{"0": completed.json["choices"][0]["text"]}]
    assert get(port, "/v1/models").json["data"][0]["max_model_len"] == 4096


@pytest.mark.long
def test_score_and_v1_say_the_counts_beyond_the_setting(long_context_server: OpenAIServer) -> None:
    port = long_context_server.port
    whole = post(port, request(STORY, max_new_tokens=ROOM + 1))
    body = {"model": "m", "prompt": STORY, "max_tokens": ROOM + 1}
    completed = post(port, body, path="/v1/completions")
    found = [(r.status, r.json["error"]["code"], r.json["error"]["message"]) for r in (whole, completed)]
    assert found == [
        (400, "context_length_exceeded", too_long("/input_data/input_string/0")),
        (400, "context_length_exceeded", too_long("prompt", "max_tokens")),
    ]
