"""Every member of the family at full size, on PyTorch's meta device: shapes and names, no memory.

The forward pass runs too: operations on meta tensors check that shapes fit and compute nothing.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MptConfig, MptForCausalLM

from mptserve.engine.checkpoint.config import MPTConfig, parse_config
from mptserve.engine.devices import load_model
from mptserve.engine.model import MPT
from mptserve.engine.placement import Placement
from mptserve.engine.quantization.codes import stored_shapes, weight_bytes
from tiny import tiny_config

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
META = torch.device("meta")
NAMES = sorted(path.stem for path in CONFIGS.glob("mpt-*.json"))


class MetaReader:
    """Stands in for a checkpoint of full size; notes what was read."""

    n_bytes = 1

    def __init__(self, config: MPTConfig) -> None:
        self.shapes, self.read_names = stored_shapes(config), list[str]()
        self.names = list(self.shapes)

    def read(self, name: str) -> Tensor:
        self.read_names.append(name)
        return torch.empty(self.shapes[name], dtype=torch.bfloat16, device=META)


def raw_config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def skeleton(config: MPTConfig) -> tuple[MPT, MetaReader]:
    reader = MetaReader(config)
    return load_model(reader, config, Placement(META, torch.bfloat16, torch.bfloat16), 50_279), reader  # type: ignore[arg-type]


def parameters(model: MPT) -> list[Tensor]:
    """Return every tensor that the model holds, the tied head's view left out."""
    found = [model.wte, model.norm_f.weight]
    for block in model.blocks:
        norms = (block.norm_1, block.q_ln, block.k_ln, block.norm_2)
        linears: Any = (block.Wqkv, block.out_proj, block.up_proj, block.down_proj)
        found += [part.weight for part in (*norms, *linears) if part is not None]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_skeleton_builds_with_every_parameter_and_computes_logits(name: str) -> None:
    config = parse_config(raw_config(name))
    model, reader = skeleton(config)
    assert sorted(reader.read_names) == sorted(reader.names)
    n_parameters = {"mpt-7b": 6_649_286_656, "mpt-30": 29_957_200_896, "mpt-1b": 1_311_442_944}[name[:6]]
    assert sum(math.prod(t.shape) for t in parameters(model)) == n_parameters == config.n_parameters

    def attend(_: int, q: Tensor, kv: Tensor) -> Tensor:
        assert q.shape == (5, config.n_heads, config.head_dim)
        assert kv.shape == (5, 2, config.n_heads, config.head_dim)
        return q.reshape(5, -1)

    logits = model.logits(model.hidden(torch.zeros(5, dtype=torch.long, device=META), attend))
    assert (logits.shape, logits.dtype) == ((5, 50_279), torch.float32)


@pytest.mark.parametrize("name", [n for n in NAMES if raw_config(n)["model_type"] == "mpt"])
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    """Which takes numbers only in the type it expects, so the config is written anew for it."""
    config = parse_config(raw_config(name))
    sizes = {key: getattr(config, key) for key in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")}
    with torch.device("meta"):
        theirs = MptForCausalLM(MptConfig(**sizes, tie_word_embeddings=True)).state_dict()
    found = {key: tuple(tensor.shape) for key, tensor in theirs.items() if key != "lm_head.weight"}
    assert found == config.tensor_shapes()


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("mpt-7b", [13.30, 7.06, 4.65]), ("mpt-30b", [59.91, 30.68, 19.58])],
)
def test_weights_take_the_memory_that_the_card_needs(name: str, gigabytes: list[float]) -> None:
    """In bfloat16, int8 and int4, the latter with a head of their own. MPT-30B: bfloat16 on 80 GB, int8 on 40 GB."""
    config = parse_config(raw_config(name))
    found = [weight_bytes(config, method, 2) / 1e9 for method in (None, "int8", "int4")]
    assert found == pytest.approx(gigabytes, abs=0.01)


def test_quantised_checkpoints_of_every_size_have_codes_and_scales() -> None:
    raw = tiny_config(d_model=4096, n_heads=32, n_layers=1)
    common = {"quant_method": "mptserve", "version": 1}
    four = stored_shapes(parse_config(raw | {"quantization_config": common | {"bits": 4, "group_size": 32}}))
    eight = stored_shapes(parse_config(raw | {"quantization_config": common | {"bits": 8}}))
    at = "transformer.blocks.0.ffn.up_proj.weight"
    assert {k: v for k, v in four.items() if k.startswith(at)} == {
        at: (16384, 2048),
        f"{at}_scale": (16384, 128),
        f"{at}_zero": (16384, 128),
    }
    assert {k: v for k, v in eight.items() if k.startswith(at)} == {at: (16384, 4096), f"{at}_scale": (16384,)}
