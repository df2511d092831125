"""Tiny random MPT checkpoints for tests: written in milliseconds, with every option of the family."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mptserve.engine.checkpoint.config import parse_config


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return a config.json, as a dict, that `transformers` can read too.

    changes: top-level keys (`n_heads=3, d_model=48`), or keys of attn_config (`clip_qkv=0.5`), which go where they
    belong; `attn_config={...}` is merged, not replaced. Numbers stay as given: `transformers` wants `clip_qkv` a float
    and `alibi_bias_max` an int.
    """
    attn_config = {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    }
    config = {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "vocab_size": 128,
        "max_seq_len": 256,
        "expansion_ratio": 4,
        "no_bias": True,
        "layer_norm_epsilon": 1e-5,
        "logit_scale": None,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    attn_config |= {key: value for key, value in changes.items() if key in attn_config}
    attn_config |= changes.get("attn_config", {})
    config |= {key: value for key, value in changes.items() if key not in attn_config and key != "attn_config"}
    return config | {"attn_config": attn_config}


MPT_7B = tiny_config(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432, max_seq_len=2048)
"""A config of the published size, for arithmetic only."""


def random_tensors(raw_config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a tensor for every published name.

    Linear layers preserve the scale of their input and logits have a standard deviation of about 2, so that greedy
    tokens are not ties and attention is neither uniform nor one-hot.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parse_config(raw_config).tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            noise *= 0.1
        elif len(shape) == 1:  # a norm's weight
            noise = 1 + 0.1 * noise
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            noise *= 2 / shape[1] ** 0.5
        else:
            noise /= shape[1] ** 0.5
        tensors[name] = noise.to(dtype)
    return tensors


def write_checkpoint(
    folder: Path,
    raw_config: dict[str, Any],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    format: str = "safetensors",
) -> dict[str, Tensor]:
    """Write config.json and random weights into `folder`, made if needed; return the tensors by their published names.

    raw_config: as written to config.json; a `mosaic_gpt` one gets the tensor names of its time in the files.
    shards: above 1, that many files and an index.  format: "safetensors" or "bin".
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw_config), encoding="utf-8")
    tensors = random_tensors(raw_config, seed, dtype)
    stored = {_stored_name(name, raw_config): tensor for name, tensor in tensors.items()}
    write_weights(folder, stored, shards, format)
    return tensors


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int = 1, format: str = "safetensors") -> None:
    """Write `tensors` under the names that `save_pretrained` gives its files."""
    stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[format]
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"{stem}.{suffix}"]
    if shards > 1:
        files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file, part in zip(files, parts, strict=True):
        content = {name: tensors[name] for name in part}
        if format == "safetensors":
            save_file(content, folder / file, metadata={"format": "pt"})
        else:
            torch.save(content, folder / file)


def _stored_name(published: str, raw_config: dict[str, Any]) -> str:
    if raw_config.get("model_type") != "mosaic_gpt":
        return published
    name = published.replace(".norm_", ".ln_").replace(".ffn.up_proj.", ".mlp.mlp_up.")
    return name.replace(".ffn.down_proj.", ".mlp.mlp_down.")
