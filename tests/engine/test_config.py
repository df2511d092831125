"""config.json in its dialects: the published members and their sizes, and a name for all that we do not compute."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mptserve.engine.checkpoint.config import MPTConfig, parse_config, read_config
from mptserve.errors import ModelNotFound, UnsupportedModel
from tiny import tiny_config

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
SEVEN_B = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048}

MEMBERS = {
    "mpt-7b": (MPTConfig(**SEVEN_B), 6_649_286_656, 128, 16384),
    "mpt-7b-storywriter": (
        MPTConfig(**SEVEN_B | {"max_seq_len": 65536}, alibi_bias_max=16.0, clip_qkv=6.0),
        6_649_286_656,
        128,
        16384,
    ),
    "mpt-7b-8k": (MPTConfig(**SEVEN_B | {"max_seq_len": 8192}, clip_qkv=6.0), 6_649_286_656, 128, 16384),
    "mpt-30b": (
        MPTConfig(d_model=7168, n_heads=64, n_layers=48, vocab_size=50432, max_seq_len=8192),
        29_957_200_896,
        112,
        28672,
    ),
    "mpt-1b-redpajama-200b": (
        MPTConfig(2048, 16, 24, 50432, 2048, qk_ln=True, model_type="mosaic_gpt"),
        1_311_442_944,
        128,
        8192,
    ),
    "fine-tune-by-llm-foundry": (
        MPTConfig(**SEVEN_B | {"vocab_size": 50368, "max_seq_len": 4096}, clip_qkv=6.0),
        6_649_286_656 - 64 * 4096,
        128,
        16384,
    ),
    "fine-tune-by-transformers": (
        MPTConfig(**SEVEN_B, torch_dtype="float16", eos_token_ids=(0, 50278)),
        6_649_286_656,
        128,
        16384,
    ),
}
MEMBERS |= {
    tuned: MEMBERS[base]
    for base, fine_tunes in {
        "mpt-7b": ("mpt-7b-instruct", "mpt-7b-chat"),
        "mpt-7b-8k": ("mpt-7b-8k-instruct", "mpt-7b-8k-chat"),
        "mpt-30b": ("mpt-30b-instruct", "mpt-30b-chat"),
        "mpt-1b-redpajama-200b": ("mpt-1b-redpajama-200b-dolly",),
    }.items()
    for tuned in fine_tunes
}
"""The published shapes; fine-tunes have their base model's."""


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        parse_config(raw)
    return str(caught.value)


def test_every_fixture_is_a_member() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
def test_published_config_is_read(name: str) -> None:
    expected, n_parameters, head_dim, d_ff = MEMBERS[name]
    config = parse_config(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
    assert config == expected
    assert (config.n_parameters, config.head_dim, config.d_ff) == (n_parameters, head_dim, d_ff)
    assert config.scale == pytest.approx(head_dim**-0.5)


def test_memory_of_one_tokens_keys_and_values() -> None:
    found = {name: config.kv_bytes_per_token(2) for name, (config, *_) in MEMBERS.items()}
    assert (found["mpt-7b"], found["mpt-30b"], found["mpt-1b-redpajama-200b"]) == (524_288, 1_376_256, 196_608)


def test_tensors_of_a_checkpoint() -> None:
    assert parse_config(tiny_config(n_layers=1)).tensor_shapes() == {
        "transformer.wte.weight": (128, 64),
        "transformer.blocks.0.norm_1.weight": (64,),
        "transformer.blocks.0.attn.Wqkv.weight": (192, 64),
        "transformer.blocks.0.attn.out_proj.weight": (64, 64),
        "transformer.blocks.0.norm_2.weight": (64,),
        "transformer.blocks.0.ffn.up_proj.weight": (256, 64),
        "transformer.blocks.0.ffn.down_proj.weight": (64, 256),
        "transformer.norm_f.weight": (64,),
    }


def test_options_that_add_tensors() -> None:
    plain = parse_config(tiny_config(n_layers=1)).tensor_shapes()
    config = parse_config(
        tiny_config(n_layers=1, qk_ln=True, no_bias=False, tie_word_embeddings=False, expansion_ratio=2)
    )
    shapes = config.tensor_shapes()
    block = "transformer.blocks.0"
    assert shapes.keys() - plain.keys() == {
        f"{block}.attn.q_ln.weight",
        f"{block}.attn.k_ln.weight",
        f"{block}.attn.q_ln.bias",
        f"{block}.attn.k_ln.bias",
        *(f"{name.removesuffix('weight')}bias" for name in plain if "wte" not in name),
        "lm_head.weight",
    }
    new = {name: shape for name, shape in shapes.items() if plain.get(name) != shape and len(shape) == 2}
    assert new == {
        "lm_head.weight": (128, 64),
        f"{block}.ffn.up_proj.weight": (128, 64),
        f"{block}.ffn.down_proj.weight": (64, 128),
    }
    assert (shapes[f"{block}.attn.Wqkv.bias"], shapes[f"{block}.ffn.up_proj.bias"]) == ((192,), (128,))
    assert shapes[f"{block}.attn.k_ln.weight"] == (64,)
    assert config.n_parameters == sum(math.prod(shape) for shape in shapes.values())


# Lenient numbers and dialects ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"d_model": 64.0, "n_heads": 4.0, "max_seq_len": 256.0}, {}),
        ({"clip_qkv": 6}, {"clip_qkv": 6.0}),
        ({"clip_qkv": 6.5}, {"clip_qkv": 6.5}),
        ({"clip_qkv": 0}, {}),
        ({"clip_qkv": False}, {}),
        ({"alibi_bias_max": 16}, {"alibi_bias_max": 16.0}),
        ({"alibi_bias_max": 16.0}, {"alibi_bias_max": 16.0}),
        ({"alibi_bias_max": None}, {}),
        ({"attn_config": {"attn_pdrop": 0.0}}, {}),
        ({"emb_pdrop": 0.1, "resid_pdrop": 0.0}, {}),
        ({"softmax_scale": 1}, {"softmax_scale": 1.0}),
        ({"softmax_scale": 0}, {}),
        ({"expansion_ratio": 2.5}, {"expansion_ratio": 2.5}),
        ({"expansion_ratio": None}, {}),
        ({"logit_scale": 2}, {"logit_scale": 2.0}),
        ({"logit_scale": "inv_sqrt_d_model"}, {"logit_scale": 0.125}),
        ({"norm_eps": 1e-6}, {"layer_norm_epsilon": 1e-6}),
        ({"layer_norm_epsilon": 1e-6}, {"layer_norm_epsilon": 1e-6}),
        ({"eos_token_id": None}, {}),
        ({"eos_token_id": []}, {}),
        ({"eos_token_id": 5}, {"eos_token_ids": (5,)}),
        ({"eos_token_id": [5, 7]}, {"eos_token_ids": (5, 7)}),
        ({"dtype": None, "torch_dtype": "torch.float16"}, {"torch_dtype": "float16"}),
        ({"dtype": None}, {"torch_dtype": "bfloat16"}),
        ({"learned_pos_emb": True}, {}),
        ({"no_bias": False, "qk_ln": True}, {"no_bias": False, "qk_ln": True}),
        (
            {
                "attn_config": {
                    "kv_n_heads": 4,
                    "rope": False,
                    "sliding_window_size": -1,
                    "attn_logit_softcapping": None,
                }
            },
            {},
        ),
        ({"norm_type": "layernorm", "ffn_config": {"ffn_type": "mptmlp"}, "block_overrides": {}}, {}),
        ({"ffn_config": None, "unknown_key_of_the_future": 5}, {}),
    ],
    ids=str,
)
def test_value_is_taken_as_it_is_meant(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    plain = parse_config(tiny_config())
    found = parse_config(tiny_config(**changes))
    assert found == MPTConfig(**vars(plain) | expected)
    assert [type(v) for v in (found.d_model, found.n_heads, found.max_seq_len)] == [int, int, int]


def test_alibi_must_be_said_except_to_transformers_where_it_is_the_default() -> None:
    raw = tiny_config()
    del raw["attn_config"], raw["model_type"]
    assert parse_config(raw) == parse_config(tiny_config())
    raw["architectures"] = ["MPTForCausalLM"]
    assert refusal(raw) == "config.json: attn_config.alibi is False; this engine computes only True"


def test_flat_config_of_mosaic_gpt_has_all_its_own_names() -> None:
    raw = json.loads((CONFIGS / "mpt-1b-redpajama-200b.json").read_text(encoding="utf-8"))
    raw |= {"mlp_ratio": 3, "attn_clip_qkv": 5, "alibi_bias_max": 16, "softmax_scale": 0.5, "attn_qk_ln": False}
    assert parse_config(raw) == MPTConfig(
        2048,
        16,
        24,
        50432,
        2048,
        expansion_ratio=3.0,
        alibi_bias_max=16.0,
        clip_qkv=5.0,
        softmax_scale=0.5,
        model_type="mosaic_gpt",
    )
    assert refusal(raw | {"alibi": False}) == "config.json: attn_config.alibi is False; this engine computes only True"
    assert refusal(raw | {"prefix_lm": True}).startswith("config.json: attn_config.prefix_lm is True; ")


# Refusals ------------------------------------------------------------------------------------------------------------

GELU = {"name": "gelu", "approximate": "none"}
UNSUPPORTED = [
    ({"alibi": False}, "attn_config.alibi is False", "True"),
    (
        {"attn_type": "grouped_query_attention"},
        "attn_config.attn_type is 'grouped_query_attention'",
        "'multihead_attention'",
    ),
    ({"attn_type": "multiquery_attention"}, "attn_config.attn_type is 'multiquery_attention'", "'multihead_attention'"),
    ({"attn_config": {"kv_n_heads": 2}}, "attn_config.kv_n_heads is 2", "4"),
    ({"attn_config": {"rope": True}}, "attn_config.rope is True", "False"),
    ({"attn_config": {"qk_gn": True}}, "attn_config.qk_gn is True", "False"),
    ({"prefix_lm": True}, "attn_config.prefix_lm is True", "False"),
    ({"attn_config": {"fused_qkv": False}}, "attn_config.fused_qkv is False", "True"),
    ({"attn_config": {"sliding_window_size": 512}}, "attn_config.sliding_window_size is 512", "-1"),
    ({"attn_config": {"attn_logit_softcapping": 50.0}}, "attn_config.attn_logit_softcapping is 50.0", "0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0", "0"),
    ({"block_overrides": {"order": []}}, "block_overrides is {'order': []}", "{}"),
    ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type is 'mptglu'", "'mptmlp'"),
    ({"ffn_config": {"ffn_hidden_size": 100}}, "ffn_config.ffn_hidden_size is 100", "None"),
    (
        {"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}},
        "ffn_config.ffn_act_fn is {'name': 'gelu', 'approximate': 'tanh'}",
        f"{GELU!r} or {{'name': 'gelu'}}",
    ),
    ({"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm'", "'low_precision_layernorm' or 'layernorm'"),
]


@pytest.mark.parametrize(("changes", "what", "wanted"), UNSUPPORTED, ids=[what for _, what, _ in UNSUPPORTED])
def test_option_that_we_do_not_compute_is_refused_by_name(changes: dict[str, Any], what: str, wanted: str) -> None:
    assert refusal(tiny_config(**changes)) == f"config.json: {what}; this engine computes only {wanted}"


@pytest.mark.parametrize("name", ["d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -4, 2.5, math.nan, math.inf, True, "64", None, [64]])
def test_size_must_be_a_positive_whole_number(name: str, value: object) -> None:
    message = f"config.json: {name} must be a positive whole number, got {value!r}"
    assert refusal(tiny_config(**{name: value})) == message
    raw = tiny_config()
    del raw[name]
    assert refusal(raw) == f"config.json: {name} must be a positive whole number, got None"


@pytest.mark.parametrize(
    "name", ["alibi_bias_max", "clip_qkv", "softmax_scale", "expansion_ratio", "logit_scale", "norm_eps"]
)
@pytest.mark.parametrize("value", ["6", True, math.nan, math.inf, [6]])
def test_number_must_be_one(name: str, value: object) -> None:
    assert refusal(tiny_config(**{name: value})) == f"config.json: {name} must be a number, got {value!r}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be mpt or mosaic_gpt, got 'llama'"),
        ({"d_model": 66}, "d_model (66) must be a multiple of n_heads (4)"),
        ({"ffn_config": "mptmlp"}, "config.json: ffn_config must be an object, got 'mptmlp'"),
        ({"eos_token_id": "0"}, "config.json: eos_token_id must be a whole number or a list of them, got '0'"),
        ({"eos_token_id": ["0"]}, "config.json: eos_token_id must be a whole number or a list of them, got ['0']"),
        ({"eos_token_id": True}, "config.json: eos_token_id must be a whole number or a list of them, got True"),
    ],
    ids=str,
)
def test_config_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    assert refusal(tiny_config(**changes)) == message


def test_attn_config_must_be_an_object() -> None:
    assert (
        refusal(tiny_config() | {"attn_config": ["alibi"]})
        == "config.json: attn_config must be an object, got ['alibi']"
    )


# The file ------------------------------------------------------------------------------------------------------------


def test_config_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    assert read_config(tmp_path) == parse_config(tiny_config())


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        read_config(tmp_path)
    assert str(caught.value) == f"no config.json in {tmp_path}; is AZUREML_MODEL_DIR set to the model's folder?"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"[]", "must hold a JSON object, got list"),
        (b"\xff", "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_config_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFound) as caught:
        read_config(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'} {problem}"
