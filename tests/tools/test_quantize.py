"""`mptserve quantize` writes what loads as if it had been quantised at load time."""

import json
from pathlib import Path

import pytest
import torch

from engines import CPU, all_logits, needs_kernels, random_ids
from mptserve.cli import main
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.finding import Checkpoint, weight_files
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.checkpoint.writing import write_quantized
from mptserve.engine.devices import load_model
from mptserve.engine.placement import Placement
from mptserve.errors import BadWeights, UnsupportedModel
from tiny import tiny_config, write_checkpoint

EMBEDDED = Path(__file__).parents[2] / "samples" / "mpt-8m"
pytestmark = [
    pytest.mark.long,
    needs_kernels,
]


def logits(folder: Path, method: str) -> torch.Tensor:
    config = read_config(folder)
    model = load_model(
        WeightReader(folder, config), config, Placement(CPU, torch.float32, kernels=True, quant=method), 10**9
    )
    return all_logits(model, random_ids(50, seed=2))


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"no_bias": False, "tie_word_embeddings": False}], ids=["plain", "all"])
def test_a_written_checkpoint_equals_quantising_at_load_time(
    method: str, changes: dict[str, bool], tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source, tiny_config(**changes), dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    write_quantized(Checkpoint(source, source / "tokenizer.json"), target, method, shard_bytes=100_000)
    assert len(weight_files(target)) > 1
    assert not list(target.glob("*.partial"))
    assert {path.stat().st_mode for path in weight_files(target)} == {(source / "config.json").stat().st_mode}
    assert read_config(target).quant == method
    assert torch.equal(logits(target, method), logits(source, method))


def test_the_command_line_quantises_and_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert main(["quantize", str(EMBEDDED), str(target), "--quant", "int4"]) == 0
    assert "GB of int4 weights from" in capsys.readouterr().out
    generate = ["--prompt", "Once upon a time", "--n-predict", "8"]
    assert main(["generate", "--model", str(target), *generate]) == 0
    stored = capsys.readouterr().out
    assert "8 new, ended by length" in stored
    assert main(["quantize", str(target), str(tmp_path / "again")]) == 1
    assert "holds int4 weights already" in capsys.readouterr().err
    assert main(["quantize", str(EMBEDDED), str(target)]) == 1
    assert "must be an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'; this engine reads checkpoints of"),
        ({"quant_method": "mptserve", "bits": 3, "version": 1}, "is not one that this version"),
    ],
)
def test_other_quantisations_are_refused_by_name(config: dict[str, object], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(quantization_config=config)))
    with pytest.raises(UnsupportedModel, match=message):
        read_config(tmp_path)


def test_codes_without_scales_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    raw = tiny_config(quantization_config={"quant_method": "mptserve", "bits": 8, "version": 1})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadWeights, match=r"missing transformer\.blocks\.0\.attn\.Wqkv\.weight_scale"):
        WeightReader(tmp_path, read_config(tmp_path))
