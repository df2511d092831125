"""`mptserve bench` and the load benchmark: that they measure, and that limits are what bytes and operations say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mptserve.cli import main
from mptserve.commands.bench import Ceilings, limit
from mptserve.engine.checkpoint.config import parse_config
from mptserve.engine.placement import Placement
from serving import LoggedServer
from tiny import MPT_7B

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
H200 = Ceilings(read_gbs=4320, matmul_tflops=769)


def test_limits_of_mpt_7b_on_an_h200() -> None:
    """The figures that a hand calculation gives: 13.30 GB of weights, 524,288 bytes of keys and values per token."""
    config, place = parse_config(MPT_7B), Placement(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    one = limit(config, place, H200, 1, 160, 1)
    assert 1 / one == pytest.approx(323, abs=1)
    many = limit(config, place, H200, 64, 64 * 160, 64)
    assert 64 / many == pytest.approx(14_800, rel=0.01)
    prompt = limit(config, place, H200, 8192, 8192, 1, 8192 * 8192 // 2)
    assert prompt * 1e3 == pytest.approx(159, abs=2)


def test_bench_prints_a_table_and_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rows", "1", "3", "--prompt", "16", "--new", "4", "--rounds", "1"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert "0.008 B parameters" in table[0]
    found = json.loads(line)
    assert [case["rows"] for case in found["cases"]] == [1, 3]
    assert all(case["decode_tok_s"] > 0 and case["first_token_ms"] > 0 for case in found["cases"])


@pytest.mark.slow
def test_peers_take_turns_and_agree(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "peers.py"),
        "--model",
        "embedded",
        "--rounds",
        "1",
        "--new-tokens",
        "4",
        "--rows",
        "1",
        "8",
        "--json",
        str(tmp_path / "results" / "peers.json"),
    ]
    command += ["--engines", "transformers float32", "mptserve float32", "mptserve int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "results" / "peers.json").read_text()) == said
    assert list(said["results"]) == [f"embedded, {name}" for name in command[-3:]]
    for found in said["results"].values():
        assert list(found) == ["decode 1", "decode 8", "prefill 512", "memory_gb", "bandwidth_gb_s", "versions"]
        for figure in [found["decode 1"], found["decode 8"], found["prefill 512"]]:
            [speed] = figure["rounds"]
            assert speed > 0
            # a busy machine reads memory so slowly that a figure may be left out
            assert (figure["low"], figure["high"], figure["median"]) == (
                speed,
                speed,
                speed if not figure["why_none"] else None,
            )
        assert (found["memory_gb"] > 0, len(found["bandwidth_gb_s"])) == (True, 1)
        assert found["versions"]["torch"].startswith("2.")


def test_the_load_benchmark_counts_every_request(server: LoggedServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / "server.py"), "--url", server.url, "--rates", "6"]
    command += ["--seconds", "1.5", "--new", "8", "--png", str(tmp_path / "load.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [load] = json.loads(done.stdout.splitlines()[-1])
    assert (load["refused"], load["failed"]) == (0, 0)
    assert load["tokens_s"] == pytest.approx(8 * load["requests_s"])
    assert (tmp_path / "load.png").stat().st_size > 5000
