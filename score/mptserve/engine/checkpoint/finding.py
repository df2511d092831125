"""Finds a checkpoint below a folder, and the files of its weights.

Layouts: a plain checkpoint folder, a registered Azure model (one directory level more), an MLflow model folder
(`…/data/model`, tokenizer beside it).
"""

import json
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mptserve.errors import BadWeights, ModelNotFound

_DEPTH = 5
"""Levels of folders below the given one that are searched."""


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
