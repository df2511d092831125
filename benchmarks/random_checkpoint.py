"""Writes a checkpoint with MPT-7B's shapes and random 4-bit or 8-bit weights: for speed and memory, not for text.

python benchmarks/random_checkpoint.py OUT [--quant int4] [--layers 32] [--tokenizer FILE]

Layer by layer, straight in codes, so that it needs neither the 13 GB of the 16-bit weights nor the time to round them.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig, parse_config, quantization_config
from mptserve.engine.checkpoint.writing import SHARD_BYTES, write_shards
from mptserve.engine.quantization.codes import stored_shapes

SAMPLE = Path(__file__).parent.parent / "samples" / "mpt-8m" / "tokenizer.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--quant", choices=("int8", "int4"), default="int4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=SAMPLE,
        help="tokenizer.json; the output head has a row for each of its tokens",
    )
    args = parser.parse_args()
    raw: dict[str, Any] = {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": args.layers,
        "vocab_size": 50432,
        "max_seq_len": 2048,
        "no_bias": True,
        "attn_config": {"alibi": True},
        "quantization_config": quantization_config(args.quant),
    }
    args.out.mkdir(parents=True)
    write_shards(args.out, tensors(parse_config(raw)), SHARD_BYTES)
    shutil.copyfile(args.tokenizer, args.out / "tokenizer.json")
    (args.out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def tensors(config: MPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every stored tensor. Linears keep the size of what passes through them, as trained ones roughly do."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: shape[-1] for name, shape in config.tensor_shapes().items()}
    shapes = stored_shapes(config)
    for name, shape in shapes.items():
        if name.endswith("_scale"):
            # Codes are uniform; theirs is the spread (4.6 of 16 levels, 73 of 255) that has to become 1 / sqrt(n_in).
            spread = 73.3 if config.quant == "int8" else 4.61
            step = inputs[name.removesuffix("_scale")] ** -0.5 / spread
            yield name, torch.full(shape, step, dtype=torch.float32 if config.quant == "int8" else torch.bfloat16)
        elif name.endswith("_zero"):
            yield name, torch.full(shape, inputs[name.removesuffix("_zero")] ** -0.5 / 4.61 / 2, dtype=torch.bfloat16)
        elif f"{name}_scale" in shapes:
            low, dtype = (-127, torch.int8) if config.quant == "int8" else (0, torch.uint8)
            high = 128 if config.quant == "int8" else 256
            yield name, torch.randint(low, high, shape, dtype=dtype, generator=generator)
        elif len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(shape, generator=generator) * 2 / shape[1] ** 0.5).to(torch.bfloat16)


if __name__ == "__main__":
    main()
