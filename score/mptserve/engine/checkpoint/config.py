"""The architecture of one MPT checkpoint, read leniently from its config.json.

`transformers` 5 rejects configs that MosaicML published (`clip_qkv: 6` as an int, `attn_pdrop: 0.0` as a float), so
numbers are taken as int or float here, and three dialects of key names are read: llm-foundry's (`norm_eps`, nested
`attn_config`), `transformers`' (`layer_norm_epsilon`) and the older `mosaic_gpt` (flat `attn_qk_ln`, `mlp_ratio`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptserve.errors import ModelNotFound, UnsupportedModel

QUANT_METHOD = "mptserve"
"""Our name in config.json's quantization_config."""


@dataclass(frozen=True)
class MPTConfig:
    """What the forward pass needs to know. Field names are the checkpoint's own.

    quant: "int8" or "int4" when the checkpoint's linear layers are stored so (quantization/codes.py), else None.
    calibration_tokens: of the text that GPTQ rounded them for (gptq.py); 0: they were rounded to the nearest code.
    """

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    max_seq_len: int
    expansion_ratio: float = 4
    alibi_bias_max: float = 8
    clip_qkv: float | None = None
    qk_ln: bool = False
    softmax_scale: float | None = None
    logit_scale: float | None = None
    layer_norm_epsilon: float = 1e-5
    no_bias: bool = True
    tie_word_embeddings: bool = True
    eos_token_ids: tuple[int, ...] = (0,)
    model_type: str = "mpt"
    torch_dtype: str = "bfloat16"
    quant: str | None = None
    calibration_tokens: int = 0

    @property
    def rounding(self) -> str:
        """How weights were rounded to codes."""
        return "gptq" if self.calibration_tokens else "nearest"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def d_ff(self) -> int:
        """Width of the feed-forward layer."""
        return int(self.expansion_ratio * self.d_model)

    @property
    def scale(self) -> float:
        """Factor of q·k before the softmax."""
        return self.softmax_scale or 1 / math.sqrt(self.head_dim)

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Return the bytes that one token's keys and values take over all layers."""
        return 2 * self.n_layers * self.d_model * bytes_per_number

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the checkpoint by its published name, with its shape."""
        d, ff, bias = self.d_model, self.d_ff, not self.no_bias
        shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (self.vocab_size, d)}

        def layer(name: str, n_out: int, n_in: int | None) -> None:
            shapes[f"{name}.weight"] = (n_out,) if n_in is None else (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)

        for i in range(self.n_layers):
            block = f"transformer.blocks.{i}"
            layer(f"{block}.norm_1", d, None)
            layer(f"{block}.attn.Wqkv", 3 * d, d)
            if self.qk_ln:
                layer(f"{block}.attn.q_ln", d, None)
                layer(f"{block}.attn.k_ln", d, None)
            layer(f"{block}.attn.out_proj", d, d)
            layer(f"{block}.norm_2", d, None)
            layer(f"{block}.ffn.up_proj", ff, d)
            layer(f"{block}.ffn.down_proj", d, ff)
        layer("transformer.norm_f", d, None)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes


def read_config(folder: Path) -> MPTConfig:
    """Return the config of the checkpoint in `folder`.

    Raises ModelNotFound where there is no readable config.json and UnsupportedModel, naming the key, where it asks
    for something that this engine does not compute.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelNotFound(f"no config.json in {folder}; is AZUREML_MODEL_DIR set to the model's folder?") from exc
    except ValueError as exc:
        raise ModelNotFound(f"{path} is not JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise ModelNotFound(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> MPTConfig:
    """Return the config written in `raw`, any of the three dialects; raises UnsupportedModel."""
    model_type = raw.get("model_type", "mpt")
    if model_type not in ("mpt", "mosaic_gpt"):
        raise UnsupportedModel(f"model_type must be mpt or mosaic_gpt, got {model_type!r}")
    attn = _flat_attention(raw) if model_type == "mosaic_gpt" else _object(raw, "attn_config")
    if "MptForCausalLM" in (raw.get("architectures") or ()):
        attn.setdefault("alibi", True)  # transformers' default, which it may leave out when saving
    _refuse_unsupported(raw, attn)

    d_model, n_heads = _int(raw, "d_model"), _int(raw, "n_heads")
    if d_model % n_heads:
        raise UnsupportedModel(f"d_model ({d_model}) must be a multiple of n_heads ({n_heads})")
    quant, calibration_tokens = _quant(raw)
    by_width = raw.get("logit_scale") == "inv_sqrt_d_model"
    return MPTConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=_int(raw, "n_layers"),
        vocab_size=_int(raw, "vocab_size"),
        max_seq_len=_int(raw, "max_seq_len"),
        expansion_ratio=_float(raw, "expansion_ratio") or _float(raw, "mlp_ratio") or 4,
        alibi_bias_max=_float(attn, "alibi_bias_max") or 8,
        clip_qkv=_float(attn, "clip_qkv"),
        qk_ln=bool(attn.get("qk_ln")),
        softmax_scale=_float(attn, "softmax_scale"),
        logit_scale=1 / math.sqrt(d_model) if by_width else _float(raw, "logit_scale"),
        layer_norm_epsilon=_float(raw, "norm_eps") or _float(raw, "layer_norm_epsilon") or 1e-5,
        no_bias=bool(raw.get("no_bias", True)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", True)),
        eos_token_ids=_eos(raw.get("eos_token_id")),
        model_type=model_type,
        quant=quant,
        calibration_tokens=calibration_tokens,
        torch_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16").removeprefix("torch."),
    )


def _flat_attention(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the attention settings of a `mosaic_gpt` config in today's nested names."""
    return {
        "alibi": raw.get("alibi"),
        "alibi_bias_max": raw.get("alibi_bias_max"),
        "clip_qkv": raw.get("attn_clip_qkv"),
        "qk_ln": raw.get("attn_qk_ln"),
        "softmax_scale": raw.get("softmax_scale"),
        "prefix_lm": raw.get("prefix_lm"),
    }


def _refuse_unsupported(raw: dict[str, Any], attn: dict[str, Any]) -> None:
    """Raise UnsupportedModel for the first llm-foundry option that would change the maths."""
    n_heads, ffn = raw.get("n_heads"), _object(raw, "ffn_config")
    rules: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("attn_config.alibi", attn.get("alibi", False), (True,)),
        ("attn_config.attn_type", attn.get("attn_type"), (None, "multihead_attention")),
        ("attn_config.kv_n_heads", attn.get("kv_n_heads"), (None, n_heads)),
        ("attn_config.rope", attn.get("rope"), (None, False)),
        ("attn_config.qk_gn", attn.get("qk_gn"), (None, False)),
        ("attn_config.prefix_lm", attn.get("prefix_lm"), (None, False)),
        ("attn_config.fused_qkv", attn.get("fused_qkv"), (None, True)),
        ("attn_config.sliding_window_size", attn.get("sliding_window_size"), (None, -1)),
        ("attn_config.attn_logit_softcapping", attn.get("attn_logit_softcapping"), (None, 0)),
        ("final_logit_softcapping", raw.get("final_logit_softcapping"), (None, 0)),
        ("block_overrides", raw.get("block_overrides"), (None, {})),
        ("ffn_config.ffn_type", ffn.get("ffn_type"), (None, "mptmlp")),
        (
            "ffn_config.ffn_act_fn",
            ffn.get("ffn_act_fn"),
            (None, {"name": "gelu", "approximate": "none"}, {"name": "gelu"}),
        ),
        ("ffn_config.ffn_hidden_size", ffn.get("ffn_hidden_size"), (None,)),
        ("norm_type", raw.get("norm_type"), (None, "low_precision_layernorm", "layernorm")),
    ]
    for name, value, allowed in rules:
        if value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed if a is not None) or "None"
            raise UnsupportedModel(f"config.json: {name} is {value!r}; this engine computes only {wanted}")


def _quant(raw: dict[str, Any]) -> tuple[str | None, int]:
    """Return `quant` and `calibration_tokens` of MPTConfig; None and 0 for a checkpoint not of `mptserve quantize`."""
    config = raw.get("quantization_config")
    if config is None:
        return None, 0
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method != QUANT_METHOD:
        raise UnsupportedModel(
            f"config.json: quantization_config.quant_method is {method!r}; this engine reads checkpoints of "
            f"`mptserve quantize` ({QUANT_METHOD!r}) and plain ones"
        )
    n_tokens = config.get("calibration_tokens", 0)
    for quant in ("int8", "int4"):
        if config == quantization_config(quant, n_tokens):
            return quant, n_tokens
    raise UnsupportedModel(
        f"config.json: quantization_config {config!r} is not one that this version of mptserve writes"
    )


def quantization_config(quant: str, calibration_tokens: int = 0) -> dict[str, Any]:
    """Return what `mptserve quantize` writes into config.json for codes of `quant`, as in MPTConfig."""
    found = {"quant_method": QUANT_METHOD, "version": 1} | {
        "int8": {"bits": 8},
        "int4": {"bits": 4, "group_size": 32},
    }[quant]
    return found | ({"rounding": "gptq", "calibration_tokens": calibration_tokens} if calibration_tokens else {})


def _int(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value <= 0:
        raise UnsupportedModel(f"config.json: {name} must be a positive whole number, got {value!r}")
    return int(value)


def _float(where: dict[str, Any], name: str) -> float | None:
    """Return a number as a float; null and 0 both mean "off" in published configs."""
    value = where.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UnsupportedModel(f"config.json: {name} must be a number, got {value!r}")
    return float(value)


def _object(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
        raise UnsupportedModel(f"config.json: {name} must be an object, got {value!r}")
    return dict(value or {})


def _eos(value: Any) -> tuple[int, ...]:
    """Return the tokens that end a text, one or several; a checkpoint that names none means token 0, as all MPT do."""
    ids = value if isinstance(value, list) else [value]
    for id in ids:
        if id is not None and (isinstance(id, bool) or not isinstance(id, int) or id < 0):
            raise UnsupportedModel(f"config.json: eos_token_id must be a whole number or a list of them, got {value!r}")
    return tuple(id for id in ids if id is not None) or (0,)
