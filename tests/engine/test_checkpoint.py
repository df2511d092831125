"""Finding a checkpoint and reading its tensors: every layout and format, every kind of damage, and nothing executed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mptserve.engine.checkpoint.config import parse_config, read_config
from mptserve.engine.checkpoint.finding import Checkpoint, find_checkpoint, weight_files
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.errors import BadWeights, ModelNotFound
from tiny import random_tensors, tiny_config, write_checkpoint, write_weights

FORMATS = [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)]


def write_model(folder: Path, tokenizer: Path | None = None, **options: Any) -> dict[str, Tensor]:
    """Write a checkpoint, and an empty tokenizer.json beside it or in the folder `tokenizer`."""
    tensors = write_checkpoint(folder, tiny_config(), **options)
    where = tokenizer or folder
    where.mkdir(parents=True, exist_ok=True)
    (where / "tokenizer.json").write_text("{}", encoding="utf-8")
    return tensors


def read_all(folder: Path) -> dict[str, Tensor]:
    config = read_config(folder)
    reader = WeightReader(folder, config)
    return {name: reader.read(name) for name in config.tensor_shapes()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def not_found(root: Path) -> str:
    with pytest.raises(ModelNotFound) as caught:
        find_checkpoint(root)
    return str(caught.value)


def bad(folder: Path, raw: dict[str, Any] | None = None) -> str:
    with pytest.raises(BadWeights) as caught:
        WeightReader(folder, parse_config(raw or tiny_config()))
    return str(caught.value)


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "mpt-7b", "a/b/c/d/e", "INPUT_model/mlflow_model_folder/data/model"])
def test_checkpoint_is_found_at_any_usual_depth(tmp_path: Path, below: str) -> None:
    write_model(tmp_path / below)
    found = find_checkpoint(tmp_path)
    assert found == Checkpoint(tmp_path / below, tmp_path / below / "tokenizer.json")


def test_mlflow_model_has_its_config_twice_and_its_tokenizer_elsewhere(tmp_path: Path) -> None:
    data = tmp_path / "mlflow_model_folder" / "data"
    write_model(data / "model", tokenizer=data / "tokenizer")
    (data / "config").mkdir()
    shutil.copy(data / "model" / "config.json", data / "config")
    (tmp_path / "mlflow_model_folder" / "MLmodel").write_text("flavors: {}", encoding="utf-8")
    assert find_checkpoint(tmp_path) == Checkpoint(data / "model", data / "tokenizer" / "tokenizer.json")


def test_tokenizer_beside_the_weights_comes_before_one_that_is_nearer_the_root(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert find_checkpoint(tmp_path).tokenizer == tmp_path / "model" / "tokenizer.json"


def test_other_models_beside_it_do_not_matter(tmp_path: Path) -> None:
    write_model(tmp_path / "mpt")
    for name, content in (("llama", '{"model_type": "llama"}'), ("broken", "{"), ("list", "[]"), ("none", "{}")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(content, encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"")
    assert find_checkpoint(tmp_path).folder == tmp_path / "mpt"


def test_folder_that_is_none_is_named(tmp_path: Path) -> None:
    assert not_found(tmp_path / "x") == f"the model's folder '{tmp_path / 'x'}' is not there, or is no folder"
    write_model(tmp_path)
    file = tmp_path / "config.json"
    assert not_found(file) == f"the model's folder '{file}' is not there, or is no folder"


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    looked = (
        f"no MPT checkpoint (config.json of model_type mpt with *.safetensors or *.bin) in {tmp_path} or 5 levels below"
    )
    assert not_found(tmp_path) == looked
    write_model(tmp_path / "1/2/3/4/5/6")
    assert not_found(tmp_path) == looked
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    assert not_found(tmp_path) == f"{looked}; {tmp_path} has a config but no weights"


def test_several_are_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_model(tmp_path / name)
    assert not_found(tmp_path) == (
        f"several MPT checkpoints below {tmp_path}: {tmp_path / 'a'}, {tmp_path / 'b'}; point to one of them"
    )


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mpt", tiny_config())
    assert not_found(tmp_path) == (
        f"no tokenizer.json in {tmp_path / 'mpt'} or below {tmp_path}; save it with `tokenizer.save_pretrained`"
    )


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "shards"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format_gives_the_tensors_that_were_written(
    tmp_path: Path, format: str, shards: int, dtype: torch.dtype
) -> None:
    expected = write_checkpoint(tmp_path, tiny_config(), dtype=dtype, shards=shards, format=format)
    assert len(weight_files(tmp_path)) == shards
    assert equal(read_all(tmp_path), expected)


def test_safetensors_come_before_a_bin_and_an_index_before_a_single_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), seed=1, format="bin")
    expected = write_checkpoint(tmp_path, tiny_config(), seed=2, shards=2)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert equal(read_all(tmp_path), expected)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shards_without_an_index_are_found_by_their_names(tmp_path: Path, format: str) -> None:
    expected = write_checkpoint(tmp_path, tiny_config(), shards=2, format=format)
    for index in tmp_path.glob("*.index.json"):
        index.unlink()
    assert equal(read_all(tmp_path), expected)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_file_of_the_usual_name_comes_before_others_beside_it(tmp_path: Path, format: str) -> None:
    expected = write_checkpoint(tmp_path, tiny_config(), format=format)
    (file,) = weight_files(tmp_path)
    shutil.copy(file, tmp_path / file.name.replace("model", "model_old"))
    assert weight_files(tmp_path) == [file]
    assert equal(read_all(tmp_path), expected)


def test_other_bin_files_are_no_weights(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path, tiny_config(), format="bin")
    torch.save({"learning_rate": 0.1}, tmp_path / "training_args.bin")
    assert equal(read_all(tmp_path), expected)


def test_embedded_model_is_read() -> None:
    folder = Path(__file__).resolve().parents[2] / "samples" / "mpt-8m"
    assert find_checkpoint(folder) == Checkpoint(folder, folder / "tokenizer.json")
    assert equal(read_all(folder), load_file(folder / "model.safetensors"))


MOSAIC_GPT = {
    "model_type": "mosaic_gpt",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 128,
    "max_seq_len": 256,
    "mlp_ratio": 4,
    "alibi": True,
    "attn_qk_ln": True,
    "no_bias": True,
}


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_mosaic_gpt_tensors_are_read_under_todays_names(tmp_path: Path, format: str) -> None:
    expected = write_checkpoint(tmp_path, MOSAIC_GPT, format=format)
    (file,) = weight_files(tmp_path)
    stored = load_file(file) if format == "safetensors" else torch.load(file)
    block = "transformer.blocks.1"
    assert sorted(name for name in stored if name.startswith(block) or "blocks" not in name) == [
        f"{block}.attn.Wqkv.weight",
        f"{block}.attn.k_ln.weight",
        f"{block}.attn.out_proj.weight",
        f"{block}.attn.q_ln.weight",
        f"{block}.ln_1.weight",
        f"{block}.ln_2.weight",
        f"{block}.mlp.mlp_down.weight",
        f"{block}.mlp.mlp_up.weight",
        "transformer.ln_f.weight",
        "transformer.wte.weight",
    ]
    assert equal(read_all(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_saved_by_transformers_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import MptConfig, MptForCausalLM  # here, because it takes seconds

    torch.manual_seed(0)
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=128, max_seq_len=64)
    model = MptForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(weight_files(tmp_path)) > 1
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = read_all(find_checkpoint(tmp_path).folder)
    expected = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert equal(found, expected)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_tied_output_head_may_be_there_and_is_not_used(tmp_path: Path, format: str) -> None:
    tensors = write_checkpoint(tmp_path, tiny_config(), format=format)
    write_weights(tmp_path, tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, format=format)
    assert equal(read_all(tmp_path), tensors)


def test_untied_output_head_is_read(tmp_path: Path) -> None:
    raw = tiny_config(tie_word_embeddings=False)
    tensors = write_checkpoint(tmp_path, raw)
    assert not torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    assert equal(read_all(tmp_path), tensors)
    del tensors["lm_head.weight"]
    write_weights(tmp_path, tensors)
    assert bad(tmp_path, raw) == f"1 tensors in {tmp_path} do not fit its config.json:\n  missing lm_head.weight"


# Nothing is executed -------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a folder when a pickle of it is loaded without protection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_bin_file_is_not_run(tmp_path: Path) -> None:
    folder, proof = tmp_path / "model", tmp_path / "proof"
    tensors = write_checkpoint(folder, tiny_config(), format="bin")
    file = folder / "pytorch_model.bin"
    torch.save(tensors | {"x": Malicious(proof)}, file)
    assert bad(folder) == (
        f"{file} holds more than tensors, which could run code; have `save_pretrained` write safetensors"
    )
    assert not proof.exists()
    torch.load(file, weights_only=False)
    assert proof.exists(), "the file would have done it"


@pytest.mark.parametrize("content", [[torch.zeros(3)], {"epoch": 3}, {"state_dict": {"x": torch.zeros(3)}}], ids=str)
def test_bin_file_must_hold_tensors_and_nothing_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert bad(tmp_path) == f"{tmp_path / 'pytorch_model.bin'} must hold a dict of tensors and nothing else"


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "shards"), FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_file_that_was_cut_short_is_named(tmp_path: Path, format: str, shards: int, kept: float) -> None:
    write_checkpoint(tmp_path, tiny_config(), shards=shards, format=format)
    file = weight_files(tmp_path)[-1]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    start = f"{file} is damaged or only partly downloaded: "
    if format == "bin":
        start = f"{file} is damaged, only partly downloaded or older than PyTorch 1.6: "
    assert bad(tmp_path).startswith(start)


def test_bin_file_of_an_ancient_pytorch_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save(random_tensors(tiny_config()), file, _use_new_zipfile_serialization=False)
    assert bad(tmp_path).startswith(f"{file} is damaged, only partly downloaded or older than PyTorch 1.6: ")


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_git_lfs_pointer_is_recognised(tmp_path: Path, format: str) -> None:
    write_checkpoint(tmp_path, tiny_config(), format=format)
    (file,) = weight_files(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 13298573312\n")
    assert bad(tmp_path) == f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_missing_shard_is_named(tmp_path: Path, format: str) -> None:
    write_checkpoint(tmp_path, tiny_config(), shards=4, format=format)
    files = weight_files(tmp_path)
    for file in files[1:3]:
        file.unlink()
    index = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[format]
    names = f"{files[1].name}, {files[2].name}"
    assert bad(tmp_path) == f"{index} in {tmp_path} names files that are not there: {names}"


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"x": 5, "y": "z"}}'])
def test_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    assert bad(tmp_path).startswith(f"{tmp_path / 'model.safetensors.index.json'} is no index of weight files: ")


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, tiny_config())
    del tensors["transformer.blocks.1.norm_1.weight"]
    tensors["transformer.blocks.0.attn.Wqkv.bias"] = torch.zeros(192)
    tensors["transformer.blocks.2.ffn.up_proj.weight"] = torch.zeros(128, 64)
    write_weights(tmp_path, tensors)
    assert bad(tmp_path) == (
        f"3 tensors in {tmp_path} do not fit its config.json:\n"
        "  missing transformer.blocks.1.norm_1.weight\n"
        "  unexpected transformer.blocks.0.attn.Wqkv.bias\n"
        "  transformer.blocks.2.ffn.up_proj.weight is [128, 64], config.json says [256, 64]"
    )


def test_long_list_of_what_does_not_fit_is_cut(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    lines = bad(tmp_path, tiny_config(n_layers=12)).split("\n")
    assert lines[0] == f"54 tensors in {tmp_path} do not fit its config.json:"
    assert (len(lines), lines[1], lines[-1]) == (
        42,
        "  missing transformer.blocks.3.norm_1.weight",
        "  … and 14 more",
    )


def test_no_weights_at_all_are_all_missing(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    assert bad(tmp_path).startswith(
        f"20 tensors in {tmp_path} do not fit its config.json:\n  missing transformer.wte.weight"
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_file_counts_as_memory_only_while_a_tensor_of_it_is_in_use(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config())
    reader = WeightReader(tmp_path, read_config(tmp_path))

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    assert not mapped()
    tensor = reader.read("transformer.wte.weight")
    assert mapped()
    del tensor
    assert not mapped()
