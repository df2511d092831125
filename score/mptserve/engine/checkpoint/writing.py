"""Writes a checkpoint with 8-bit or 4-bit weights that loads directly: `mptserve quantize IN OUT`."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mptserve.engine.checkpoint.config import quantization_config, read_config
from mptserve.engine.checkpoint.finding import Checkpoint, weight_files
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.quantization.calibration import calibrated_weights
from mptserve.engine.quantization.codes import Quantized, check_quantizable, is_quantized, quantize
from mptserve.errors import UnsupportedModel

SHARD_BYTES = 2_000_000_000
"""A file is written when it has this much: about what is held in memory beside the tensor at hand."""

_CPU = torch.device("cpu")
_COMPANIONS = ("*.json", "*.txt", "*.md", "*.jinja", "LICENSE*", "NOTICE*")
_OF_THE_WEIGHTS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def write_quantized(
    checkpoint: Checkpoint,
    out: Path,
    method: str,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    calibration: Tensor | None = None,
    device: torch.device = _CPU,
) -> None:
    """Write `checkpoint` in `method` ("int8", "int4") into the folder `out`, which must be empty or absent.

    progress: called with tensors done and in all.  calibration: [n, T] token ids, n texts for which "int4" is rounded
    by GPTQ, on `device` (calibration.py); without it weights are rounded to the nearest code. The config is written
    last: an interrupted folder is no checkpoint.
    Raises UnsupportedModel for a checkpoint that is quantised already, BadWeights for one that is damaged.
    """
    assert calibration is None or method == "int4"
    config = read_config(checkpoint.folder)
    if config.quant is not None:
        raise UnsupportedModel(f"{checkpoint.folder} holds {config.quant} weights already; start from the original")
    if out.is_dir() and any(out.iterdir()):
        raise UnsupportedModel(f"{out} must be an empty folder or none, it has files in it")
    check_quantizable(config, method)
    reader = WeightReader(checkpoint.folder, config)
    out.mkdir(parents=True, exist_ok=True)

    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(reader.names))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        rounded = None if calibration is None else calibrated_weights(reader, config, calibration, device, one_more)
        for name in reader.names:
            if rounded is not None and is_quantized(name):
                found, codes = next(rounded)
                assert found == name
                yield from _named(name, codes)
            else:
                yield from _stored(name, reader.read(name), method)
                one_more()

    with torch.inference_mode():
        write_shards(out, tensors(), shard_bytes)
    for path in weight_files(out):
        shutil.copymode(checkpoint.folder / "config.json", path)  # safetensors lets nobody but the owner read
    for pattern in _COMPANIONS:
        for path in checkpoint.folder.glob(pattern):
            if path.name not in _OF_THE_WEIGHTS:
                shutil.copyfile(path, out / path.name)
    shutil.copyfile(checkpoint.tokenizer, out / "tokenizer.json")
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = quantization_config(method, 0 if calibration is None else calibration.numel())
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _stored(name: str, tensor: Tensor, method: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what is written for one tensor. The embedding gets 16 bits, as it has in memory; norms stay as they are."""
    if not is_quantized(name):
        wide = len(tensor.shape) == 2 and tensor.dtype == torch.float32
        yield name, (tensor.to(torch.bfloat16) if wide else tensor).contiguous()
        return
    yield from _named(name, quantize(tensor, method))


def _named(name: str, codes: Quantized) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one weight under their names in the file."""
    yield name, codes.codes
    yield f"{name}_scale", codes.scale
    if codes.zero is not None:
        yield f"{name}_zero", codes.zero


def write_shards(out: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors to files of about shard_bytes, and an index if there are several."""
    files: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        files.append(out / f"{len(files)}.partial")
        save_file(held, files[-1], metadata={"format": "pt"})
        where.update(dict.fromkeys(held, len(files) - 1))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    n = len(files)
    names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for path, name in zip(files, names, strict=True):
        path.rename(out / name)
    if n > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {t: names[i] for t, i in where.items()}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
