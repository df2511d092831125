"""The benchmarks' contenders: their processes, what token times say, and which figures are left out."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from counting_contender import by_counting

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last: some of its modules have common names

import peers  # noqa: E402 - found there
from contender_process import Contender, Run  # noqa: E402 - found there


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 90}))
    return tmp_path


def test_a_contender_in_an_interpreter_without_our_packages_answers(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
    contender = Contender(by_counting, folder, "plain", python=python)
    assert contender.ask([[1, 2], [1, 7]], 3).tokens == [[3, 4, 5], [8, 9, 10]]
    run = contender.run(2, 5, 4)
    assert [len(row) for row in run.moments] == [4, 4]
    assert 0 < run.first_s < run.moments[0][-1] < run.seconds
    assert contender.versions == {}
    assert 0.001 < contender.close() < 1


def test_what_a_contender_prints_does_not_get_between_its_answers(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    contender = Contender(by_counting, folder, "noisy", greedy=True)
    assert contender.ask([[5]], 2).tokens == [[6, 7]]
    contender.close()
    assert capfd.readouterr() == ("", "loading True True\n{}\n")


def test_a_contender_that_ends_says_so(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a contender ended with code 1; its output says why"):
        Contender(by_counting, folder, "broken")
    assert "ValueError: cannot load" in capfd.readouterr().err
    contender = Contender(by_counting, folder, "short")
    with pytest.raises(RuntimeError, match="a contender ended with code 1"):
        contender.ask([[5]], 2)
    assert "asked for 2 tokens a row, got [1]" in capfd.readouterr().err


def test_decoding_is_counted_while_all_rows_decode() -> None:
    """The second row begins at 2 s, when the first has two tokens, and the first ends at 4 s: four tokens in 2 s."""
    run = Run(5.0, [[1] * 4] * 2, [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    assert (run.first_s, run.decode_tok_s) == (2.0, 2.0)
    apart = Run(4.0, [[1] * 2] * 2, [[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match="some rows ended before all had begun"):
        assert apart.decode_tok_s


def test_figures_are_left_out_where_rounds_differ_or_outrun_memory() -> None:
    figure = peers.figure
    assert figure([10.0, 11.0, 40.0], [20.0] * 3, 1, 1e9) == peers.Figure(11.0, 10.0, 40.0, [10.0, 11.0, 40.0])
    busy = figure([10.0, 20.0, 40.0], [20.0] * 3, 1, 1e9)
    assert (busy.median, busy.why_none) == (None, "rounds from 10.0 to 40.0 tokens/s: the machine was not its own")
    assert str(busy) == "–"
    assert figure([10.0, 30.0], [20.0] * 2, 1, 0).median is None
    # 8 rows a step: 80 tokens/s read 1 GB ten times a second
    assert figure([80.0], [10.0], 8, 1e9).median == 80
    fast = figure([80.0, 84.0], [7.0, 7.5], 8, 1e9)
    assert (fast.median, fast.why_none) == (None, "weights read at 10 GB/s, but memory at 8")
    assert figure([80.0, 84.0], [7.0, 7.5], 8, 0).median == 82  # from the cache


def test_engines_are_held_in_memory_together_as_far_as_they_fit() -> None:
    weights = {"a": 4e9, "b": 4e9, "c": 2e9, "d": 30e9, "e": 1e9}
    assert peers.groups(weights, 14e9) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert peers.groups(weights, 1e12) == [["a", "b", "c", "d", "e"]]


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--engines", "vllm int8", "--python", "openvino=python"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "no such engine: vllm" in capsys.readouterr().err
