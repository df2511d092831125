"""The service without a host: what the servers rely on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mptserve.errors import UnsupportedModel
from mptserve.service import Service
from mptserve.settings import read_settings

EMBEDDED = Path(__file__).resolve().parents[2] / "samples" / "mpt-8m"


def service(folder: Path, **environ: str) -> Service:
    return Service(read_settings({"AZUREML_MODEL_DIR": str(folder), "MPT_KV_CACHE_GB": "0.1"} | environ))


def ask(service: Service, prompt: Any, **parameters: Any) -> Any:
    body = {"input_data": {"input_string": prompt, "parameters": parameters}}
    return json.loads(service.generate(json.dumps(body).encode(), "id").body)


@pytest.fixture(scope="module")
def embedded() -> Service:
    return service(EMBEDDED)


def test_an_empty_prompt_starts_a_text(embedded: Service) -> None:
    """Models have seen texts begin only after the end-of-text token."""
    empty = ask(embedded, "", seed=1, max_new_tokens=8, details=True)
    spelled = ask(embedded, "<|endoftext|>", seed=1, max_new_tokens=8, return_full_text=False)
    assert empty[0]["0"] == spelled[0]["0"]
    assert empty[0]["details"]["0"]["prompt_tokens"] == 1


def test_truncate_keeps_the_end_of_a_prompt(embedded: Service) -> None:
    long = "word " * 3000 + "Once upon a time"
    refused = ask(embedded, long, max_new_tokens=8)["error"]
    assert (refused["code"], refused["field"]) == ("context_length_exceeded", "/input_data/input_string")
    kept = ask(embedded, long, max_new_tokens=8, do_sample=False, truncate=4, return_full_text=False, details=True)
    short = ask(embedded, "Once upon a time", max_new_tokens=8, do_sample=False, return_full_text=False)
    # " Once" after a space and "Once" at the start are different tokens, so only the counts can be compared
    assert kept[0]["details"]["0"]["prompt_tokens"] == 4
    assert len(kept[0]["0"]) > 0
    assert len(short[0]["0"]) > 0


def test_a_prompt_that_no_context_could_hold_is_refused_unread(embedded: Service) -> None:
    body = {"input_data": {"input_string": ["x" * 1_000_000]}}
    answer = embedded.generate(json.dumps(body).encode(), "id")
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (413, "prompt_too_large")


def test_sequences_of_a_prompt_have_seeds_that_give_them_again(embedded: Service) -> None:
    several = ask(embedded, "Once", seed=5, num_return_sequences=3, max_new_tokens=12, details=True)
    seeds = [several[0]["details"][str(i)]["seed"] for i in range(3)]
    assert seeds[0] == 5
    again = [ask(embedded, "Once", seed=seed, max_new_tokens=12)[0]["0"] for seed in seeds]
    assert again == [several[0][str(i)] for i in range(3)]


def test_identical_prompts_without_a_seed_get_different_answers(embedded: Service) -> None:
    texts = [record["0"] for record in ask(embedded, ["Once"] * 8, max_new_tokens=20)]
    assert len(set(texts)) == 8


def test_the_transformers_engine_answers_alike() -> None:
    theirs = service(EMBEDDED, MPT_ENGINE="transformers", MPT_DTYPE="float32", MPT_CPU_THREADS="1")
    ours = service(EMBEDDED, MPT_DTYPE="float32", MPT_CPU_THREADS="1")
    parameters = {"seed": 3, "max_new_tokens": 24, "temperature": 0.8, "top_p": 0.9, "stop": ["."]}
    assert ask(theirs, ["Once upon a time", "The"], **parameters) == ask(
        ours, ["Once upon a time", "The"], **parameters
    )


def test_a_tokenizer_of_another_model_stops_the_start(tmp_path: Path) -> None:
    for file in EMBEDDED.iterdir():
        shutil.copy(file, tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 9000, "content": "<|extra|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="vocab_size is 8192: they do not belong together"):
        service(tmp_path)
