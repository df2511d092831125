"""Finds a checkpoint below a folder and reads its tensors, safely: never executes anything that it holds.

Layouts: a plain checkpoint folder, a registered Azure model (one directory level more), an MLflow model folder
(`…/data/model`, tokenizer beside it). Files: one or several `.safetensors`, or `.bin` read with `weights_only=True`.
"""

import json
import pickle
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.quantization.codes import stored_shapes
from mptserve.errors import BadWeights, ModelNotFound

_DEPTH = 5
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of one model lie."""

    folder: Path
    tokenizer: Path


def find_checkpoint(root: Path) -> Checkpoint:
    """Return the one MPT checkpoint at or below `root`.

    Raises ModelNotFound when there is none, several, or no tokenizer.json with it.
    """
    if not root.is_dir():
        raise ModelNotFound(f"the model's folder {str(root)!r} is not there, or is no folder")
    configs = [path for path in _walk(root, "config.json") if _is_mpt(path)]
    found = {path.parent.resolve(): path.parent for path in configs if weight_files(path.parent)}
    folders = list(found.values())  # a link such as `latest` is no second checkpoint
    if not folders:
        where = f"; {configs[0].parent} has a config but no weights" if configs else ""
        raise ModelNotFound(
            f"no MPT checkpoint (config.json of model_type mpt with *.safetensors or *.bin) in {root} "
            f"or {_DEPTH} levels below{where}"
        )
    if len(folders) > 1:
        raise ModelNotFound(
            f"several MPT checkpoints below {root}: {', '.join(map(str, folders))}; point to one of them"
        )
    tokenizers = [p for p in [folders[0] / "tokenizer.json"] if p.is_file()] or list(_walk(root, "tokenizer.json"))
    if not tokenizers:
        raise ModelNotFound(
            f"no tokenizer.json in {folders[0]} or below {root}; save it with `tokenizer.save_pretrained`"
        )
    return Checkpoint(folders[0], tokenizers[0])


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights, safetensors preferred; empty when there are none.

    Raises BadWeights when an index names files that are not there.
    """
    for index, single, pattern in (
        ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            names = _indexed_files(folder / index)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise BadWeights(f"{index} in {folder} names files that are not there: {', '.join(missing)}")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _indexed_files(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadWeights(f"{index} is no index of weight files: {exc!r}") from exc


class WeightReader:
    """The tensors of a checkpoint under today's published names, checked against the config before any is read."""

    def __init__(self, folder: Path, config: MPTConfig) -> None:
        self.files = weight_files(folder)
        self._where: dict[str, tuple[Path | dict[str, Tensor], str]] = {}  # file or its content, the name there
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            for name, shape, where in _open(path):
                published = _modern_name(name) if config.model_type == "mosaic_gpt" else name
                shapes[published], self._where[published] = shape, (where, name)
        expected = stored_shapes(config)
        _compare(shapes, expected, folder)
        self.names = list(expected)
        self.n_bytes = sum(path.stat().st_size for path in self.files)

    @property
    def dtype(self) -> torch.dtype:
        """What the checkpoint is stored in, by its last norm: nothing in it has more bits."""
        return self.read("transformer.norm_f.weight").dtype

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, mapped from the file where possible: no copy until it is used.

        A safetensors file is opened anew for each. What has been read of a file counts as this process's memory for as
        long as it is open, so that a model laid out anew in memory would count twice; so it goes with its tensor.
        """
        where, stored = self._where[name]
        if isinstance(where, dict):
            return where[stored]
        with safe_open(where, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor


def _compare(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise BadWeights with everything that is wrong. A tied `lm_head.weight` may be there, and is not used."""
    missing = [f"missing {name}" for name in expected if name not in found]
    unknown = [f"unexpected {name}" for name in found if name not in expected and name != "lm_head.weight"]
    shapes = [
        f"{name} is {list(found[name])}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = missing + unknown + shapes
    if problems:
        listed = "\n  ".join(problems[:40]) + (f"\n  … and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise BadWeights(f"{len(problems)} tensors in {folder} do not fit its config.json:\n  {listed}")


def _open(path: Path) -> Iterator[tuple[str, tuple[int, ...], Path | dict[str, Tensor]]]:
    """Yield name and shape of each tensor, and what to read it from."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise BadWeights(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            handle: Any = safe_open(path, framework="pt")  # checks the header against the file's size
        except SafetensorError as exc:
            raise BadWeights(f"{path} is damaged or only partly downloaded: {exc}") from exc
        for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
            yield name, tuple(handle.get_slice(name).get_shape()), path
    else:
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as exc:  # its message advises to run the pickle's code
            raise BadWeights(
                f"{path} holds more than tensors, which could run code; have `save_pretrained` write safetensors"
            ) from exc
        except Exception as exc:  # a damaged file can fail in many ways
            raise BadWeights(f"{path} is damaged, only partly downloaded or older than PyTorch 1.6: {exc}") from exc
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise BadWeights(f"{path} must hold a dict of tensors and nothing else")
        for name, tensor in tensors.items():
            yield name, tuple(tensor.shape), tensors


def _modern_name(name: str) -> str:
    """Return the name that a `mosaic_gpt` tensor has in later MPT checkpoints (llm-foundry, convert_examples_ckpt)."""
    name = name.replace(".ln_", ".norm_").replace(".mlp.mlp_up.", ".ffn.up_proj.")
    return name.replace(".mlp.mlp_down.", ".ffn.down_proj.")


def _walk(root: Path, name: str) -> Iterator[Path]:
    """Yield files called `name`, nearest first."""
    queue = deque([(root, 0)])
    while queue:
        folder, depth = queue.popleft()
        if (folder / name).is_file():
            yield folder / name
        if depth < _DEPTH:
            with suppress(PermissionError):  # lost+found of a mounted disk, for one
                queue += [(child, depth + 1) for child in sorted(folder.iterdir()) if child.is_dir()]


def _is_mpt(path: Path) -> bool:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(raw, dict) and raw.get("model_type") in ("mpt", "mosaic_gpt")
