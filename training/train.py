"""Train a small MPT on packed tokens and save it as a checkpoint folder.

    python training/train.py --tokens tokens --out my-mpt

Reads the folder that prepare.py wrote. Writes config.json, model.safetensors (bfloat16) and tokenizer.json: a
folder that this repository and `transformers` load as it is.

The defaults are those of samples/mpt-8m. The learning rate follows the clock, so two runs give sister models,
not the same bytes. One device, no checkpoints on the way, no dropout: right for minutes, not for days.

Shapes: B rows, T tokens, H heads, D head size, V vocabulary.
The maths is MPT's as in llm-foundry (Apache-2.0) and the parameters have its checkpoints' names: pre-norm
blocks, ALiBi (arXiv 2108.12409), no biases, output tied to the embedding.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

EXPANSION_RATIO = 4
LAYER_NORM_EPSILON = 1e-5
ALIBI_BIAS_MAX = 8
MAX_SEQ_LEN = 2048  # what config.json promises; ALiBi reaches past the training context
INIT_STD = 0.02
WARMUP_STEPS = 200
DECAY_START = 0.6  # share of the run at full learning rate; the rest falls in a straight line to zero
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
REPORT_EVERY = 500  # steps


@dataclass(frozen=True)
class Shape:
    """The sizes that make one MPT differ from another here."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int


def alibi_slopes(n_heads: int, device: torch.device) -> Tensor:
    """Return each head's slope, [H] float32, in MPT's order.

    For a number of heads that is no power of two, MPT takes the slopes of the next power: every second one
    first, then those left over.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (ALIBI_BIAS_MAX / power)
    slopes = 1.0 / 2.0**exponents
    return slopes if power == n_heads else torch.cat([slopes[1::2], slopes[::2]])[:n_heads]


def alibi_mask(n_heads: int, n_tokens: int, device: torch.device) -> Tensor:
    """Return what is added to the scores, [H, T, T] float32: minus slope times distance, -inf ahead."""
    position = torch.arange(n_tokens, device=device)
    distance = position[:, None] - position[None, :]  # query minus key; below 0 ahead of the query
    mask = -alibi_slopes(n_heads, device)[:, None, None] * distance
    return mask.masked_fill(distance < 0, -math.inf)


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, None, LAYER_NORM_EPSILON)


class Attention(nn.Module):
    """Causal self-attention with ALiBi; queries, keys and values in one matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.Wqkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
        self.out_proj = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.Wqkv(x).unflatten(-1, (3, self.n_heads, -1))  # [B, T, 3, H, D]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two matrices with an exact (erf) GELU between them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up_proj = nn.Linear(shape.d_model, EXPANSION_RATIO * shape.d_model, bias=False)
        self.down_proj = nn.Linear(EXPANSION_RATIO * shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
        return out


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normed before and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(shape.d_model)
        self.attn = Attention(shape)
        self.norm_2 = LayerNorm(shape.d_model)
        self.ffn = FeedForward(shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x), mask)
        x = x + self.ffn(self.norm_2(x))
        return x


class Transformer(nn.Module):
    """Everything below the output matrix; a module of its own because checkpoints name it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm_f = LayerNorm(shape.d_model)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.wte(token_ids)
        for block in self.blocks:
            x = block(x, mask)
        out: Tensor = self.norm_f(x)
        return out


class MPT(nn.Module):
    """A whole MPT, its fresh weights drawn from torch's global generator."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.transformer = Transformer(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Matrices that write into the residual stream start smaller: 2 * n_layers of them add up.
                ends_branch = name.endswith(("out_proj.weight", "down_proj.weight"))
                std = INIT_STD / math.sqrt(2 * shape.n_layers) if ends_branch else INIT_STD
                nn.init.normal_(parameter, mean=0.0, std=std)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return logits [B, T, V] for token_ids [B, T] int64."""
        mask = alibi_mask(self.n_heads, token_ids.shape[1], token_ids.device)
        return functional.linear(self.transformer(token_ids, mask), self.transformer.wte.weight)


def mean_loss(model: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy, a scalar in nats per token.

    windows: [B, T + 1] int64; the model sees the first T of each row and is asked for the last T.
    On a GPU the model runs in bfloat16 under autocast and the loss in float32; on a CPU all is float32.
    """
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def random_windows(token_ids: Tensor, context: int, batch_size: int) -> Tensor:
    """Return batch_size stretches of context + 1 tokens, [B, T + 1] int64, from any place in the tokens."""
    first = torch.randint(len(token_ids) - context, (batch_size, 1), device=token_ids.device)
    return token_ids[first + torch.arange(context + 1, device=token_ids.device)].long()


@torch.no_grad()
def validation_loss(model: MPT, token_ids: Tensor, context: int, batch_size: int) -> float:
    """Return the mean loss over all whole windows of token_ids in order, in nats per token."""
    windows = token_ids.unfold(0, context + 1, context)  # [windows, T + 1]; neighbours share one token
    total = 0.0
    for batch in torch.split(windows, batch_size):
        total += mean_loss(model, batch.long()).item() * len(batch)
    return total / len(windows)


def learning_rate_factor(step: int, fraction_done: float) -> float:
    """Return the share of the peak learning rate for a step: linear warm-up, plateau, linear fall to zero.

    step counts from 0 and drives the warm-up; fraction_done, in [0, 1], drives the fall.
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = min(1.0, (1.0 - fraction_done) / (1.0 - DECAY_START))
    return warmup * fall


def make_optimizer(model: MPT) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, not on the norms' weights."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, fused=matrices[0].is_cuda)


def train(model: MPT, train_ids: Tensor, val_ids: Tensor, arguments: argparse.Namespace) -> tuple[float, float]:
    """Train the model in place; return its validation loss before and after, in nats per token.

    train_ids, val_ids: [tokens] int32 on the model's device.
    The run ends after arguments.minutes or arguments.max_steps, whichever comes first, with the learning rate
    at zero by then. The clock starts after the first step, which spends its time compiling.
    """
    context, batch_size = arguments.context, arguments.batch_size
    compiled: Callable[[Tensor], Tensor] = torch.compile(model) if train_ids.is_cuda else model
    optimizer = make_optimizer(model)
    seconds = arguments.minutes * 60
    first_val_loss = validation_loss(model, val_ids, context, batch_size)
    print(f"step 0: validation {first_val_loss:.3f}", flush=True)

    step, elapsed_s, fraction_done = 0, 0.0, 0.0
    started = time.perf_counter()
    while fraction_done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * learning_rate_factor(step, fraction_done)
        loss = mean_loss(compiled, random_windows(train_ids, context, batch_size))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()

        step += 1
        if step == 1:
            started = time.perf_counter()
        elapsed_s = time.perf_counter() - started
        steps_fraction = step / arguments.max_steps if arguments.max_steps else 0.0
        fraction_done = min(1.0, max(elapsed_s / seconds, steps_fraction))
        if step == 10 or step % REPORT_EVERY == 0 or fraction_done == 1.0:
            val_loss = validation_loss(model, val_ids, context, batch_size)
            n_tokens = step * batch_size * context
            print(
                f"step {step}: {elapsed_s:.0f} s, {n_tokens / 1e6:.1f} M tokens, "
                f"{n_tokens / len(train_ids):.1f} passes, train {loss.item():.3f}, validation {val_loss:.3f}",
                flush=True,
            )
    return first_val_loss, val_loss


def config_json(shape: Shape) -> dict[str, Any]:
    """Return what config.json holds: the keys of MPT's hub checkpoints, so that any MPT loader takes it."""
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "expansion_ratio": EXPANSION_RATIO,
        "max_seq_len": MAX_SEQ_LEN,
        "vocab_size": shape.vocab_size,
        "no_bias": True,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "learned_pos_emb": True,  # as MPT's checkpoints have it; alibi overrules it
        "emb_pdrop": 0,
        "resid_pdrop": 0,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": ALIBI_BIAS_MAX,
            "attn_pdrop": 0,  # an int: transformers 5.23 rejects 0.0 here
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "embedding_fraction": 1.0,
        "logit_scale": None,
        "norm_type": "low_precision_layernorm",
        "init_device": "cpu",
        "use_cache": True,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }


def save_checkpoint(model: MPT, shape: Shape, tokenizer_file: Path, out: Path) -> None:
    """Write config.json, model.safetensors in bfloat16 and a copy of the tokenizer into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_json(shape), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer_file, out / "tokenizer.json")


def load_tokens(path: Path, context: int, device: str) -> Tensor:
    """Return a packed token file as [tokens] int32 on the device; uint16 has too few operations in torch."""
    token_ids = np.load(path)
    if len(token_ids) <= context:
        raise SystemExit(f"{path} holds {len(token_ids)} tokens; one window needs `--context` + 1 = {context + 1}")
    return torch.from_numpy(token_ids.astype(np.int32)).to(device)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line; a bad value ends the program with its name and rule."""
    parser = argparse.ArgumentParser(
        description="Train a small MPT on packed tokens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--d-model", type=int, default=256, help="width")
    parser.add_argument("--n-layers", type=int, default=8, help="blocks")
    parser.add_argument("--n-heads", type=int, default=4, help="attention heads; must divide --d-model")
    parser.add_argument("--context", type=int, default=512, help="tokens in a training window")
    parser.add_argument("--batch-size", type=int, default=128, help="windows in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, for AdamW")
    parser.add_argument("--minutes", type=float, default=3.3, help="training time on the clock")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps if the minutes are not over")
    parser.add_argument("--seed", type=int, default=1234, help="for the first weights and the choice of windows")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu",
        choices=("cuda", "cpu"),
    )
    arguments = parser.parse_args(argv)
    for name in (
        "d_model",
        "n_layers",
        "n_heads",
        "context",
        "batch_size",
        "learning_rate",
        "minutes",
        "max_steps",
    ):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"`--{name.replace('_', '-')}` must be above 0, got {value}")
    if arguments.d_model % arguments.n_heads:
        parser.error(f"`--n-heads` must divide `--d-model` {arguments.d_model}, got {arguments.n_heads}")
    return arguments


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train and save; return the validation loss before and after, in nats per token."""
    arguments = parse_arguments(argv)
    tokenizer_file = arguments.tokens / "tokenizer.json"
    shape = Shape(
        vocab_size=Tokenizer.from_file(str(tokenizer_file)).get_vocab_size(),
        d_model=arguments.d_model,
        n_layers=arguments.n_layers,
        n_heads=arguments.n_heads,
    )
    train_ids = load_tokens(arguments.tokens / "train.npy", arguments.context, arguments.device)
    val_ids = load_tokens(arguments.tokens / "val.npy", arguments.context, arguments.device)

    if arguments.device == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    model = MPT(shape).to(arguments.device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters, {len(train_ids) / 1e6:.2f} M training tokens", flush=True)

    losses = train(model, train_ids, val_ids, arguments)
    save_checkpoint(model, shape, tokenizer_file, arguments.out)
    print(f"saved {arguments.out}", flush=True)
    return losses


if __name__ == "__main__":
    main()
