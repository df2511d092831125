"""Checkpoint folder to loaded model: where it runs, in which dtype, whether it fits, and the tensors themselves."""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.checkpoint.reading import WeightReader
from mptserve.engine.cpu.kernels import CompiledLinear, why_no_cpu_kernels
from mptserve.engine.cpu.threads import apart
from mptserve.engine.gpu.capability import why_no_kernels
from mptserve.engine.memory import available_bytes, give_back_freed
from mptserve.engine.model import MPT, Block, Linear, Norm, PackedLinear, PlainLinear
from mptserve.engine.quantization.codes import Quantized, check_quantizable, is_quantized, quantize, weight_bytes
from mptserve.errors import BadSetting, DoesNotFit

log = logging.getLogger(__name__)

MIN_KV_TOKENS = 2048
"""A server that cannot hold this many tokens (or one full context, if shorter) is not worth starting."""


@dataclass(frozen=True)
class Placement:
    """Where a model runs. kv_dtype: of the keys and values, float32 on a CPU (see kv_cache.py), the model's own or
    int8 on a GPU.  kernels: whether our own run there, Triton's on a GPU, those in C on a CPU.  quant: None, or how
    linear weights are held.  bf16_weights: whether the kernels in C compute with bfloat16 weights, for a float32 model
    whose checkpoint is bfloat16, or a bfloat16 model on a processor without bfloat16 instructions."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype = torch.float32
    kernels: bool = False
    quant: str | None = None
    bf16_weights: bool = False

    @property
    def weights(self) -> str:
        """What the linear layers' weights are held in, in words."""
        return self.quant or str(torch.bfloat16 if self.bf16_weights else self.dtype)

    def weight_bytes(self, config: MPTConfig) -> int:
        """Return the bytes that the loaded weights take, which is also about what a decode step reads."""
        n_bytes = weight_bytes(config, self.quant, 2 if self.bf16_weights else self.dtype.itemsize)
        if self.bf16_weights and config.tie_word_embeddings:
            n_bytes += config.vocab_size * config.d_model * 2  # the head is a copy
        return n_bytes

    def kv_bytes_per_token(self, config: MPTConfig) -> int:
        """Return the bytes that one token's keys and values take over all layers, 8-bit ones with their scales."""
        scales = 2 * config.n_layers * config.n_heads * 4 if self.kv_dtype == torch.int8 else 0
        return config.kv_bytes_per_token(self.kv_dtype.itemsize) + scales


def chosen_quant(setting: str, config: MPTConfig) -> str | None:
    """Return "int8", "int4" or None for the setting MPT_QUANT; raises BadSetting against what the checkpoint holds."""
    quant = config.quant if setting == "auto" else setting
    if config.quant not in (None, quant):
        raise BadSetting(f"MPT_QUANT is {setting}, but the checkpoint holds {config.quant} weights; leave it at auto")
    check_quantizable(config, quant)
    return quant


def choose_placement(
    device: str,
    dtype: str,
    kv_dtype: str = "auto",
    quant: str | None = None,
    stored: torch.dtype = torch.float32,
) -> Placement:
    """Return device and dtype for the settings' words; raises BadSetting when the hardware lacks what they ask for.

    stored: the dtype of the checkpoint.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BadSetting("MPT_DEVICE is cuda, but PyTorch finds no usable GPU")
    where = torch.device(device)
    if dtype == "auto":
        dtype = _best_dtype(where)
    chosen: torch.dtype = getattr(torch, dtype)
    if where.type == "cpu" and chosen == torch.float16:
        raise BadSetting("MPT_DTYPE float16 is for GPUs; use bfloat16 or float32 on a CPU")
    if kv_dtype == "int8" and where.type == "cpu":
        raise BadSetting("MPT_KV_DTYPE int8 is for GPUs; a CPU reads float32 keys and values faster")
    if where.type == "cpu":
        return _on_cpu(where, chosen, quant, stored)
    missing = why_no_kernels(where)
    if missing and quant is not None:
        raise BadSetting(f"MPT_QUANT {quant} needs the Triton kernels, which do not run on this GPU: {missing}")
    if missing:
        log.warning("no Triton kernels, plain PyTorch instead, which is much slower: %s", missing)
    return Placement(where, chosen, torch.int8 if kv_dtype == "int8" else chosen, kernels=not missing, quant=quant)


def _on_cpu(where: torch.device, dtype: torch.dtype, quant: str | None, stored: torch.dtype) -> Placement:
    """Return the placement on a CPU.

    Which product computes with bfloat16 weights is a table, not a measurement, so that a restart gives the same bits:
    oneDNN's where the processor multiplies bfloat16 itself (AVX512-BF16, AMX), at twice the rate of float32; ours
    everywhere else, since oneDNN emulates it there, or has no such product at all (AVX2).
    """
    missing = why_no_cpu_kernels()
    if not missing:
        ours = stored == torch.bfloat16 if dtype == torch.float32 else not _has_bf16_product()
        return Placement(where, dtype, kernels=True, quant=quant, bf16_weights=ours and quant is None)
    if quant is not None:
        raise BadSetting(
            f"MPT_QUANT {quant} needs the kernels in C, which cannot run here: {missing}. "
            "Unquantized weights in float32 can"
        )
    if dtype != torch.float32 and not can_pack(dtype):
        raise BadSetting(
            f"MPT_DTYPE {str(dtype).removeprefix('torch.')} needs the kernels in C, which cannot run here ({missing}), "
            "or a processor with AVX-512. float32 can run"
        )
    log.warning("no compiled kernels, PyTorch's operations instead, which are slower: %s", missing)
    return Placement(where, dtype)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed linears for `dtype` on this processor; tried once, by computing one."""

    def tried() -> bool:
        return bool(PackedLinear(torch.eye(32, dtype=dtype))(torch.ones(2, 32, dtype=dtype)).eq(1).all())

    try:
        return apart(tried)
    except (RuntimeError, AttributeError):
        return False


def _has_bf16_product() -> bool:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(native) and can_pack(torch.bfloat16)


def _best_dtype(device: torch.device) -> str:
    """bfloat16 where there are instructions for it: half the bytes to read, and decoding is reading."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return "bfloat16" if _has_bf16_product() else "float32"


def check_fit(config: MPTConfig, place: Placement, max_seq_len: int) -> None:
    """Raise DoesNotFit, with the numbers, unless weights and a minimum of KV cache fit in free memory."""
    weights = place.weight_bytes(config)
    tokens = min(MIN_KV_TOKENS, max_seq_len)
    kv = tokens * place.kv_bytes_per_token(config)
    free = available_bytes(place.device)
    log.info(
        "preflight",
        extra={"numbers": {"weights_gb": weights / 1e9, "min_kv_gb": kv / 1e9, "free_gb": free / 1e9}},
    )
    if weights + kv > free:
        raise DoesNotFit(
            f"{config.n_parameters / 1e9:.2f} B parameters in {place.weights} take {weights / 1e9:.1f} GB "
            f"and the keys and values of {tokens} tokens {kv / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on "
            f"{place.device}"
        )


def load_model(reader: WeightReader, config: MPTConfig, place: Placement, n_tokens: int) -> MPT:
    """Return the model on its device.

    n_tokens: how many ids the tokenizer has; vocabulary rows beyond are padding and are cut off the output head.
    On a CPU tensors go one by one from the file to their place, so the peak is the model and one tensor; a GPU gets
    them from several readers at once.
    """
    make = _linear_maker(place)
    stored = None if place.device.type == "cpu" else place.dtype  # there, layers choose by what they are given
    make_quantized = _quantized_maker(place)
    progress = _Progress(reader.n_bytes)
    on_gpu: dict[str, Tensor] = {}
    codes_on_gpu: dict[str, Quantized] = {}

    def arrived(name: str, stored: Tensor) -> None:
        """Keep a tensor that has come to the GPU, in no more bits than it will need there."""
        if name not in config.tensor_shapes() or not stored.is_floating_point():
            on_gpu[name] = stored  # codes and their scales
        elif place.quant is not None and is_quantized(name):
            codes_on_gpu[name] = quantize(stored, place.quant)
        else:
            on_gpu[name] = stored.to(place.dtype)

    if place.device.type == "cuda":
        _load_to_gpu(reader, place, progress, arrived)

    def tensor(name: str, dtype: torch.dtype | None = place.dtype) -> Tensor:
        """Return a tensor on the device; dtype None leaves it as it is stored."""
        found = on_gpu.pop(name) if name in on_gpu else reader.read(name)
        if place.device.type == "cpu":
            progress.add(found.nbytes)
        return found if dtype is None else found.to(dtype)

    def bias(name: str) -> Tensor | None:
        return None if config.no_bias else tensor(f"{name}.bias")

    def norm(name: str) -> Norm:
        return Norm(tensor(f"{name}.weight"), bias(name), config.layer_norm_epsilon)

    def linear(name: str) -> Linear:
        if place.quant is None:
            return make(tensor(f"{name}.weight", stored), bias(name))
        return make_quantized(weight_codes(f"{name}.weight"), bias(name))

    def weight_codes(name: str) -> Quantized:
        if name in codes_on_gpu:
            return codes_on_gpu.pop(name)
        if config.quant is None:
            assert place.quant is not None
            return quantize(tensor(name, None), place.quant)
        parts = (name, f"{name}_scale", f"{name}_zero")
        return Quantized(*(tensor(part, None) for part in parts if part in reader.names))

    def head_linear(weight: Tensor) -> Linear:
        return make(weight, None) if place.quant is None else make_quantized(quantize(weight, "int8"), None)

    def block(i: int) -> Block:
        give_back_freed()  # by the block before
        return build_block(config, i, norm, linear)

    with torch.inference_mode():
        on_cpu = place.device.type == "cpu"
        # A step reads few rows of the embedding: on a CPU there is no need to have it in more bits than it came in.
        wte = tensor("transformer.wte.weight", torch.bfloat16 if place.quant and on_cpu else stored)
        blocks = [block(i) for i in range(config.n_layers)]
        n_tokens = min(n_tokens, config.vocab_size)
        head = wte if config.tie_word_embeddings else tensor("lm_head.weight", stored)
        model = MPT(config, wte, blocks, norm("transformer.norm_f"), head_linear(head[:n_tokens]), n_tokens)
    give_back_freed()
    progress.done()
    return model


def build_block(config: MPTConfig, i: int, norm: Callable[[str], Norm], linear: Callable[[str], Linear]) -> Block:
    """Return the block number `i`; norm, linear: make a layer of a tensor's published name less its ".weight"."""
    at = f"transformer.blocks.{i}"
    return Block(
        norm_1=norm(f"{at}.norm_1"),
        Wqkv=linear(f"{at}.attn.Wqkv"),
        q_ln=norm(f"{at}.attn.q_ln") if config.qk_ln else None,
        k_ln=norm(f"{at}.attn.k_ln") if config.qk_ln else None,
        out_proj=linear(f"{at}.attn.out_proj"),
        norm_2=norm(f"{at}.norm_2"),
        up_proj=linear(f"{at}.ffn.up_proj"),
        down_proj=linear(f"{at}.ffn.down_proj"),
    )


def _linear_maker(place: Placement) -> Callable[[Tensor, Tensor | None], Linear]:
    if place.device.type != "cpu":
        if not place.kernels:
            return PlainLinear
        from mptserve.engine.gpu.linear import KernelLinear  # needs Triton

        return KernelLinear

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        # In a float32 model, tensors that the checkpoint has in float32 stay so.
        if place.bf16_weights and torch.bfloat16 in (weight.dtype, place.dtype):
            return CompiledLinear(weight.to(torch.bfloat16), bias)
        return (PackedLinear if can_pack(place.dtype) else PlainLinear)(weight.to(place.dtype), bias)

    return make


def _quantized_maker(place: Placement) -> Callable[[Quantized, Tensor | None], Linear]:
    """Return what makes a layer of codes. The output head's are 8-bit in either method."""
    if place.device.type == "cpu":
        return CompiledLinear
    from mptserve.engine.gpu.linear import KernelLinear  # needs Triton

    return KernelLinear


_READERS = 8
"""Threads that read weights: one alone copies from the page cache slower than the bus carries on."""


def _load_to_gpu(
    reader: WeightReader, place: Placement, progress: "_Progress", arrived: Callable[[str, Tensor], None]
) -> None:
    """Bring every tensor to the GPU. Threads read them into pinned memory, a few ahead of the copies to the GPU."""

    def pinned(name: str) -> Tensor:
        return reader.read(name).contiguous().pin_memory()

    names = deque(reader.names)
    with ThreadPoolExecutor(_READERS) as readers:
        ahead: deque[tuple[str, Future[Tensor]]] = deque()
        while names or ahead:
            while names and len(ahead) < _READERS:
                name = names.popleft()
                ahead.append((name, readers.submit(pinned, name)))
            name, read = ahead.popleft()
            tensor = read.result().to(place.device, non_blocking=True)  # PyTorch keeps pinned memory until it is copied
            arrived(name, tensor)
            progress.add(tensor.numel() * tensor.itemsize)
    torch.cuda.synchronize(place.device)


class _Progress:
    """Logs how far the loading is, about every two seconds."""

    def __init__(self, total_bytes: int) -> None:
        self.total, self.read = total_bytes, 0
        self.started = self.logged = time.monotonic()

    def add(self, n_bytes: int) -> None:
        self.read += n_bytes
        if time.monotonic() - self.logged > 2:
            self.logged = time.monotonic()
            self._log("loading weights")

    def done(self) -> None:
        self.total = max(self.read, 1)  # files hold headers too, perhaps a head that is tied
        self._log("weights loaded")

    def _log(self, message: str) -> None:
        seconds = time.monotonic() - self.started
        numbers = {
            "percent": round(100 * self.read / self.total),
            "gb": self.read / 1e9,
            "seconds": seconds,
            "gb_per_s": self.read / 1e9 / max(seconds, 1e-9),
        }
        log.info(message, extra={"numbers": numbers})
