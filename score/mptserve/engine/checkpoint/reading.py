"""Reads the tensors of a checkpoint, safely: never executes anything that it holds.

Files: one or several `.safetensors`, or `.bin` read with `weights_only=True`.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.checkpoint.finding import weight_files
from mptserve.engine.quantization.codes import stored_shapes
from mptserve.errors import BadWeights

_LFS_POINTER = b"version https://git-lfs"


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
