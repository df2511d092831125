"""`mptserve generate`, as its users call it."""

import io
import re
from pathlib import Path

import pytest

from mptserve.cli import main

EMBEDDED = Path(__file__).parents[2] / "samples" / "mpt-8m"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPT_CPU_THREADS", "1")
    monkeypatch.setenv("MPT_KV_CACHE_GB", "0.05")
    monkeypatch.delenv("AZUREML_MODEL_DIR", raising=False)


def text_of(printed: str) -> str:
    return re.split(r"-{20} text -{22}\n", printed)[1].split("\n" + "-" * 48)[0]


def test_prompt_text_speed_and_memory_are_printed_streamed_or_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", "--model", str(EMBEDDED), "--prompt", "Once upon a time", "--n-predict", "12"]) == 0
    whole = capsys.readouterr().out
    assert "- prompt -" in whole
    assert "\nOnce upon a time\n" in whole
    assert re.search(r"4 prompt tokens, 12 new, ended by length\nfirst token after \d+ ms, then [\d.]+ tokens/s", whole)
    assert re.search(r"memory: [\d.]+ GB at most", whole)
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n"))
    assert main(["generate", "--repo-id-or-model-path", str(EMBEDDED), "--n-predict", "12", "--stream"]) == 0
    streamed = capsys.readouterr().out
    assert text_of(streamed) == text_of(whole) != ""


def test_drafts_print_the_same_text_and_how_many_were_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--model", str(EMBEDDED), "--n-predict", "16"]
    asked += ["--prompt", "One apple, two apples, three apples, one apple, two apples, three apples, one"]
    assert main(asked) == 0
    plain = capsys.readouterr().out
    assert main([*asked, "--speculate", "7"]) == 0
    drafted = capsys.readouterr().out
    assert text_of(drafted) == text_of(plain)
    assert re.search(r"16 new, ended by length\n\d+ draft tokens, \d+ of them accepted\nfirst token", drafted)
    assert "drafted" not in plain


def test_chat_takes_the_models_template(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--model", str(EMBEDDED), "--prompt", "Tell me a story", "--n-predict", "4", "--chat"]
    assert main(asked) == 0
    counted = re.search(r"(\d+) prompt tokens, \d+ new", capsys.readouterr().out)
    assert counted is not None
    assert int(counted[1]) > 4  # the story's words, and the template around them


def test_mistakes_are_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "/models/mpt-7b", "--prompt", "x"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "mptserve: the model's folder '/models/mpt-7b' is not there, or is no folder\n"
    assert captured.out == ""
    assert main(["generate", "--model", str(EMBEDDED), "--prompt", "x", "--n-predict", "0"]) == 1
    assert "must be" in capsys.readouterr().err
