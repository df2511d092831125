"""A quantised model by the setting alone: every server gives the text that `mptserve generate --quant` gives."""

import re
from pathlib import Path
from typing import Any

import pytest

from batches import results, settings_of, write
from engines import needs_kernels
from mptserve.cli import main
from openai_process import OpenAIServer
from serving import MODEL_DIR, LoggedServer, eventually, post, request

PROMPTS = [
    "Once upon a time",
    # Longer than a block, so that it is shared.
    "The king said to his daughter that nobody in the whole country, neither the rich nor the poor, neither the old "
    "nor the young, should ever again be seen without a hat on the day of the great feast, and the daughter said:",
]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
N_NEW = 24


def generated(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Return what `mptserve generate` continues each prompt with."""
    texts = []
    for prompt in PROMPTS:
        asked = ["--model", str(MODEL_DIR), "--prompt", prompt, "--n-predict", str(N_NEW), *options]
        asked += [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLED.items()]
        assert main(["generate", *asked]) == 0
        printed = capsys.readouterr().out
        texts.append(re.split(r"-{20} text -{22}\n", printed)[1].split("\n" + "-" * 48)[0])
    return texts


@pytest.mark.long
@needs_kernels
@pytest.mark.parametrize("quant", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_setting_alone_gives_the_same_text_at_every_server(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in settings_of(tmp_path).items():
        monkeypatch.setenv(name, value)
    expected = generated(capsys, "--quant", quant)
    assert generated(capsys) != expected  # so that a setting that is lost shows
    monkeypatch.setenv("MPT_QUANT", quant)
    assert generated(capsys) == expected

    rows = [{"prompt": p, "max_new_tokens": N_NEW} | SAMPLED for p in PROMPTS]
    assert main(["batch", write(tmp_path / "rows.jsonl", rows), str(tmp_path / "out")]) == 0
    found = [row["output"] for row in results(tmp_path / "out", "rows.jsonl.jsonl")]
    assert found == [p + text for p, text in zip(PROMPTS, expected, strict=True)]

    asked = request(*PROMPTS, **SAMPLED | {"seed": [7, 7]}, max_new_tokens=N_NEW, return_full_text=False)
    with LoggedServer() as server:
        server.wait_until_healthy()
        assert [record["0"] for record in post(server.port, asked).json] == expected
        ready = eventually(lambda: [r for r in server.records() if r["message"] == "engine ready"], "engine ready")
        assert (ready[0]["quant"], ready[0]["rounding"]) == (quant, "nearest")
    with OpenAIServer() as openai_server:
        assert [record["0"] for record in post(openai_server.port, asked).json] == expected
        bodies: list[dict[str, Any]] = [{"prompt": p, "max_tokens": N_NEW} | SAMPLED for p in PROMPTS]
        answers = [post(openai_server.port, body, path="/v1/completions").json for body in bodies]
        assert [answer["choices"][0]["text"] for answer in answers] == expected
