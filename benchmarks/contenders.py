"""Ways to run MPT on a CPU, to take turns in one run, and the models and the bandwidth to measure them with.

Peers other than `transformers` are no dependencies of the project. Two of them live beside it (llama.cpp is compiled
for this processor, which takes a quarter of an hour on two cores):

    .venv/bin/pip install ctranslate2 llama-cpp-python gguf

OpenVINO's converter wants an older `transformers`, so it gets an environment of its own, in which none of this project
is installed; see contender_openvino.py:

    python -m venv /tmp/openvino && /tmp/openvino/bin/pip install "optimum-intel[openvino]"
    python benchmarks/peers.py --python openvino=/tmp/openvino/bin/python

torchvision, which comes with it, is not needed: uninstall it where it is of another build than torch.
"""

import ctypes
import json
import os
import platform
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from contender_process import Generate, OnToken, run_on_new_thread
from safetensors.torch import load_file
from torch import Tensor

from mptserve.commands.bench import read_gbs
from mptserve.engine import Job, SamplingParams, Sequence, Token
from mptserve.engine.checkpoint.config import parse_config, read_config
from mptserve.engine.checkpoint.writing import SHARD_BYTES, write_shards
from mptserve.engine.memory import available_cores
from mptserve.engine.start import EngineOptions, start_engine

EMBEDDED = Path(__file__).resolve().parent.parent / "samples" / "mpt-8m"
SHAPES = {
    "small": {"d_model": 1024, "n_heads": 8, "n_layers": 16, "vocab_size": 50432},
    "wide": {"d_model": 4096, "n_heads": 32, "n_layers": 4, "vocab_size": 50432},
    "7b": {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
}
"""small: 253 M parameters.  wide: MPT-7B's exact layer shapes, but four layers: 1.01 B parameters.  7b: all of it."""


def by_engine(folder: Path, dtype: str, greedy: bool) -> Generate:
    """Return our engine. dtype: also int8 and int4."""
    config = read_config(folder)
    options = EngineOptions(quant=dtype) if dtype in ("int8", "int4") else EngineOptions(dtype=dtype)
    engine = start_engine(folder, config, config.vocab_size, replace(options, kv_cache_gb=2))

    def generate(prompts: list[list[int]], n_new: int, _: bool, on_token: OnToken) -> list[list[int]]:
        how = SamplingParams(n_new, temperature=0.0 if greedy else 0.5, top_p=0.5, ignore_eos=True)
        running = engine.submit_all(
            Job(prompt, replace(how, seed=row), events=_Row(row, on_token)) for row, prompt in enumerate(prompts)
        )
        return [[token.id for token in generation.result().out] for generation in running]

    return generate


class _Row:
    """Where our engine's thread puts the tokens of one row."""

    def __init__(self, row: int, on_token: OnToken) -> None:
        self._row, self._on_token = row, on_token

    def put(self, item: tuple[Sequence, Token | None]) -> None:
        if item[1] is not None:
            self._on_token(self._row)


def by_transformers(folder: Path, dtype: str, greedy: bool, device: str = "cpu") -> Generate:
    """Return `transformers`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.MptForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = loaded.to(device).eval()
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.5, "top_p": 0.5}

    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        """Is given the prompts, then the tokens of every step."""

        def __init__(self, on_token: OnToken) -> None:
            self._on_token, self._begun = on_token, False

        def put(self, value: Tensor) -> None:
            if self._begun:
                for row in range(len(value)):
                    self._on_token(row)
            self._begun = True

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], n_new: int, use_cache: bool, on_token: OnToken) -> list[list[int]]:
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=device)
            found = model.generate(
                ids,
                streamer=Streamer(on_token),
                attention_mask=torch.ones_like(ids),
                min_new_tokens=n_new,
                max_new_tokens=n_new,
                use_cache=use_cache,
                pad_token_id=0,
                **how,
            )
        tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return tokens

    return generate


def by_ctranslate2(folder: Path, dtype: str, greedy: bool) -> Generate:
    """Return CTranslate2. dtype: one of its compute types."""
    import ctranslate2

    del greedy  # it always is: its sampler has no nucleus to compare with
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "model"
        run_on_new_thread(convert_for_ctranslate2, folder, converted, dtype)
        vocabulary: list[str] = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
        generator = ctranslate2.Generator(
            str(converted), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=available_cores()
        )

    def generate(prompts: list[list[int]], n_new: int, _: bool, on_token: OnToken) -> list[list[int]]:
        def callback(step: Any) -> bool:
            on_token(step.batch_id)
            return False  # go on

        found = generator.generate_batch(
            [[vocabulary[id] for id in prompt] for prompt in prompts],
            max_length=n_new,
            min_length=n_new,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=callback,
        )
        return [result.sequences_ids[0] for result in found]

    return generate


def convert_for_ctranslate2(folder: Path, converted: Path, dtype: str) -> None:
    import transformers
    from ctranslate2.converters import transformers as loaders

    transformers.utils.logging.disable_progress_bar()
    # Its loader is registered under the name that MosaicML's own code had; that of `transformers` is spelled otherwise.
    loaders._MODEL_LOADERS["MptConfig"] = loaders._MODEL_LOADERS["MPTConfig"]
    loaders.TransformersConverter(str(folder)).convert(str(converted), quantization=dtype)


def by_llama_cpp(folder: Path, dtype: str, greedy: bool) -> Generate:
    """Return llama.cpp. dtype: F32, F16, BF16, Q8_0 or Q4_0."""
    import llama_cpp as lib

    del greedy  # it always is, so that no sampler of ours is measured
    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as scratch:
        plain, wanted = Path(scratch) / "f32.gguf", Path(scratch) / "wanted.gguf"
        run_on_new_thread(write_gguf, folder, plain)
        how = lib.llama_model_quantize_default_params()
        how.ftype = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}[dtype]
        if lib.llama_model_quantize(str(plain).encode(), str(wanted).encode(), ctypes.byref(how)):
            raise RuntimeError("llama.cpp could not write the model")
        loading = lib.llama_model_default_params()
        loading.use_mmap = False  # or the file could not be deleted with its memory in use
        model = lib.llama_model_load_from_file(str(wanted).encode(), loading)
    if not model:
        raise RuntimeError("llama.cpp could not load the model")
    n_vocab = read_config(folder).vocab_size
    how = lib.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max, how.kv_unified = 16_384, 8192, 512, 32, True
    how.n_threads = how.n_threads_batch = available_cores()
    context = lib.llama_init_from_model(model, how)
    batch = lib.llama_batch_init(8192, 0, 1)

    def step(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether the next is wanted); return the likeliest next tokens."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not compute a step")
        rows = [i for i, (*_, wanted) in enumerate(tokens) if wanted]
        logits = [(ctypes.c_float * n_vocab).from_address(_address(lib.llama_get_logits_ith(context, i))) for i in rows]
        return [int(torch.frombuffer(row, dtype=torch.float32).argmax()) for row in logits]

    def generate(prompts: list[list[int]], n_new: int, _: bool, on_token: OnToken) -> list[list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        n_prompt = len(prompts[0])
        tokens = [(t, i, s, i + 1 == n_prompt) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        found: list[list[int]] = [[] for _ in prompts]
        for n in range(n_prompt, n_prompt + n_new):
            last = step(tokens)
            for row, token in enumerate(last):
                found[row].append(token)
                on_token(row)
            tokens = [(t, n, s, True) for s, t in enumerate(last)]
        return found

    return generate


def _address(pointer: Any) -> int:
    address = ctypes.cast(pointer, ctypes.c_void_p).value
    if address is None:
        raise RuntimeError("llama.cpp has no logits")
    return address


def write_gguf(folder: Path, path: Path) -> None:
    """Write a checkpoint as llama.cpp's file, in float32 and without a tokenizer: it is given ids."""
    import gguf

    config = read_config(folder)
    writer = gguf.GGUFWriter(path, "mpt")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(float(config.alibi_bias_max))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    names = {"transformer.wte": "token_embd", "transformer.norm_f": "output_norm"}
    parts = {
        "norm_1": "attn_norm",
        "attn.Wqkv": "attn_qkv",
        "attn.out_proj": "attn_output",
        "norm_2": "ffn_norm",
        "ffn.up_proj": "ffn_up",
        "ffn.down_proj": "ffn_down",
    }
    for i in range(config.n_layers):
        names |= {f"transformer.blocks.{i}.{theirs}": f"blk.{i}.{own}" for theirs, own in parts.items()}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_random_model(folder: Path, name: str) -> Path:
    """Write a checkpoint of random bfloat16 weights with the shapes of `name`; return its folder."""
    raw = json.loads((EMBEDDED / "config.json").read_text()) | SHAPES[name]
    (folder / "config.json").write_text(json.dumps(raw))
    for path in EMBEDDED.glob("*token*"):
        shutil.copy(path, folder)
    random = torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=random).mul_(0.02).to(torch.bfloat16)

    shapes = parse_config(raw).tensor_shapes()
    write_shards(folder, ((name, tensor(shape)) for name, shape in shapes.items()), SHARD_BYTES)
    return folder


def cpu_name() -> str:
    """Return the processor's name and the instructions that decide, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    about = {key.strip(): value.strip() for key, value in about.items()}
    decide = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    flags = [f for f in decide if f in about.get("flags", "").split()]
    return f"{about.get('model name', platform.processor())} ({', '.join(flags)})"


def bandwidth() -> float:
    """Return the GB/s at which all cores together read memory now."""
    return read_gbs(torch.device("cpu"))


def cache_bytes() -> int:
    """Return the size of the last cache before memory, as far as Linux tells; 0 otherwise."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes), default=0)
