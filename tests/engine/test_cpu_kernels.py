"""The kernels in C: against float64 and the plain formulas, for every instruction set that this processor has."""

import logging
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mptserve.engine.cpu import kernels as cpu_kernels
from mptserve.engine.cpu import library
from mptserve.engine.cpu.kernels import attend, attend_tiles, linear, pack, store, why_no_cpu_kernels
from mptserve.engine.cpu.linear import CompiledLinear
from mptserve.engine.devices import choose_placement
from mptserve.engine.model import Norm, alibi_slopes
from mptserve.engine.quantization.codes import GROUP, Quantized, dequantize, quantize
from mptserve.engine.quantization.codes import pack as pack_4_bits
from mptserve.errors import BadSetting

pytestmark = pytest.mark.skipif(bool(why_no_cpu_kernels()), reason=why_no_cpu_kernels())

SHAPES = [(64, 64), (100, 96), (33, 32), (1, 64), (256, 1024)]


PROCESSORS = {
    "native": ("-march=native",),
    "AVX2": ("-march=x86-64-v3",),
    "AVX2, products of bytes by plain C": ("-march=x86-64-v3", "-DPORTABLE_VNNI"),
    "AVX2 with VNNI": ("-march=x86-64-v3", "-mavxvnni"),
    "AVX-512 without VNNI": ("-march=x86-64-v4",),
    "AVX-512 with VNNI": ("-march=cascadelake",),
}
NEEDED = {"-mavxvnni": "avx_vnni", "-march=x86-64-v4": "avx512bw", "-march=cascadelake": "avx512_vnni"}
"""The flag in /proc/cpuinfo of a processor that can run what is compiled so."""


def missing(flags: tuple[str, ...]) -> str:
    """Return what this processor lacks to run code compiled with `flags`, or ""."""
    here = Path("/proc/cpuinfo").read_text().split()
    return next((NEEDED[flag] for flag in flags if flag in NEEDED and NEEDED[flag] not in here), "")


@pytest.fixture(params=[kind for kind, flags in PROCESSORS.items() if not missing(flags)], scope="module", autouse=True)
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile for this processor, and for every kind that it can pretend to be."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FLAGS", with_march(PROCESSORS[request.param]))
        assert why_no_cpu_kernels() == ""
        yield
    forget()


def with_march(flags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f for f in library.FLAGS if not f.startswith("-march")) + flags


@pytest.mark.parametrize("kind", [kind for kind, flags in PROCESSORS.items() if missing(flags)])
def test_what_this_processor_cannot_run_is_compiled_without_a_warning(kind: str, tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    assert gcc
    command = [gcc, *with_march(PROCESSORS[kind]), "-Wall", "-Wno-maybe-uninitialized", "-Werror"]
    subprocess.run([*command, "-c", str(library.SOURCE), "-o", str(tmp_path / "kernels.o")], check=True)


def forget() -> None:
    library.library.cache_clear()
    cpu_kernels.layout.cache_clear()
    why_no_cpu_kernels.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(bits: int, n_out: int, n_in: int) -> tuple[Tensor | Quantized, Tensor]:
    """Return a weight in so many bits, and its values in float64."""
    w = random(n_out, n_in) / n_in**0.5
    if bits == 16:
        return w.bfloat16(), w.bfloat16().double()
    codes = quantize(w, f"int{bits}")
    return codes, dequantize(codes, torch.float64)


def bound(bits: int, x: Tensor, values: Tensor) -> Tensor:
    """Return how far the product of x with `values` may be off: half a step for each activation, and float32's sums."""
    sums = 2e-6 * x.abs() @ values.abs().T
    if bits == 16:
        return sums
    groups = x.unflatten(1, (-1, GROUP if bits == 4 else x.shape[1]))
    half_steps = (groups.abs().amax(-1, keepdim=True) / 127 / 2).expand_as(groups).flatten(1)
    return sums + half_steps @ values.abs().T


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 13, 40])
def test_a_layer_computes_what_its_weights_say(bits: int, n_out: int, n_in: int, rows: int) -> None:
    weight, values = weights(bits, n_out, n_in)
    x, bias, residual = random(rows, n_in), random(n_out), random(rows, n_out)
    norm = Norm(random(n_in, seed=1), random(n_in, seed=2), 1e-5)
    layer, normed = CompiledLinear(weight, bias), F.layer_norm(x, (n_in,), norm.weight, norm.bias, norm.eps).double()
    x_exact = x.double()
    for found, exact, product_of in (
        (CompiledLinear(weight)(x), x_exact @ values.T, x_exact),
        (layer(x, norm), normed @ values.T + bias, normed),
        (layer.gelu(x, norm), F.gelu(normed @ values.T + bias), normed),
        (layer.add(x, residual), x_exact @ values.T + bias + residual, x_exact),
    ):
        assert found.shape == (rows, n_out)
        far = (found.double() - exact).abs()
        assert (far <= 1.13 * bound(bits, product_of, values) + 1e-5).all()  # 1.13: GELU's steepest slope
        if n_out > 1:  # half steps do not all add up
            assert far.norm() < {16: 1e-6, 8: 0.02, 4: 0.01}[bits] * exact.norm()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_row_has_the_same_bits_in_every_company_and_on_any_threads(bits: int) -> None:
    packed = pack(weights(bits, 200, 128)[0])
    x, norm = random(45, 128), Norm(random(128), None, 1e-5)
    alone = torch.cat([linear(row[None], packed, norm, gelu=True) for row in x])
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            for first, last in ((0, 45), (3, 5), (7, 19), (20, 27)):
                assert torch.equal(linear(x[first:last], packed, norm, gelu=True), alone[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_codes_are_exact_integers(bits: int) -> None:
    """With scales of one, codes as inputs and zeros of zero, everything that a layer adds up is an integer."""
    n_in, generator = 4096, torch.Generator().manual_seed(0)
    lowest, highest = (-127, 127) if bits == 8 else (-8, 7)
    codes = torch.randint(lowest, highest + 1, (40, n_in), generator=generator)
    codes[0], codes[1] = lowest, highest
    x = torch.randint(-127, 128, (7, n_in), generator=generator)
    x[:, ::GROUP] = 127  # so that a step is one
    x[0], x[1] = 127, -127
    ones, zeros = torch.ones(40, n_in // GROUP).bfloat16(), torch.zeros(40, n_in // GROUP).bfloat16()
    weight = (
        Quantized(codes.to(torch.int8), torch.ones(40)) if bits == 8 else Quantized(pack_4_bits(codes + 8), ones, zeros)
    )
    found = linear(x.float(), pack(weight))
    exact = (x @ codes.T).float() if bits == 8 else group_sums_in_float32(x, codes)
    assert torch.equal(found, exact)


def group_sums_in_float32(x: Tensor, codes: Tensor) -> Tensor:
    """Return x @ codes.T with the exact sums of the groups added in float32, as 4-bit layers do."""
    total = torch.zeros(len(x), len(codes))
    for a, b in zip(x.split(GROUP, 1), codes.split(GROUP, 1), strict=True):
        total += (a @ b.T).float()
    return total


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_nothing_and_too_much_stay_what_they_are(bits: int) -> None:
    packed = pack(weights(bits, 32, 64)[0])
    x = random(4, 64)
    usual = linear(x, packed)
    x[0] = 0
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    found = linear(x, packed)
    assert (found[0] == 0).all()
    assert not found[1:3].isfinite().all(1).any(), "a row that is not a number must not look like one"
    assert torch.equal(found[3], usual[3])
    assert linear(x[:0], packed).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_either_dtype_gets_its_own_back(dtype: torch.dtype) -> None:
    layer, x = CompiledLinear(weights(8, 64, 64)[0], random(64).to(dtype)), random(3, 64).to(dtype)
    norm = Norm(torch.ones(64, dtype=dtype), None, 1e-5)
    assert layer(x, norm).dtype == layer.gelu(x).dtype == layer.add(x, x).dtype == dtype


def test_gelu_is_the_exact_one_far_into_its_tails() -> None:
    x = torch.linspace(-12, 12, 40 * 32).view(40, 32)
    found = linear(x, pack(torch.eye(32).bfloat16()), gelu=True)
    assert (found - F.gelu(x.double())).abs().max() < 1e-6


@pytest.mark.parametrize(("heads", "head_dim", "bias_max"), [(4, 16, 8), (3, 64, 8), (2, 128, 16), (2, 112, 8)])
def test_attention_equals_its_formula(heads: int, head_dim: int, bias_max: int) -> None:
    n_slots, n_tokens, rows = 5, 96, 7
    cache, q = random(2, n_slots, heads, n_tokens, head_dim), random(rows, 3, heads, head_dim)[:, 0]
    slots, positions = torch.tensor([0, 0, 1, 2, 3, 4, 4]), torch.tensor([0, 1, 15, 16, 63, 90, 95])
    first = torch.zeros(rows, heads, dtype=torch.int64)
    first[4:, 1:] = 32
    slopes, scale = alibi_slopes(heads, bias_max), head_dim**-0.5
    for start in (None, first):
        found = torch.empty(rows, heads, head_dim)
        attend(q, cache, slots, positions, start, slopes, scale, found)
        for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            for h in range(heads):
                begin = int(start[i, h]) if start is not None else 0
                keys, values = cache[:, slot, h, begin : position + 1].double()
                distance = torch.arange(begin, position + 1) - position
                weight = (keys @ q[i, h].double() * scale + slopes[h].double() * distance).softmax(0)
                torch.testing.assert_close(found[i, h].double(), weight @ values, atol=2e-6, rtol=1e-5)
            one = slice(i, i + 1)
            alone, first_key = torch.empty(1, heads, head_dim), None if start is None else start[one]
            attend(q[one], cache, slots[one], positions[one], first_key, slopes, scale, alone)
            assert torch.equal(alone[0], found[i])


@pytest.mark.parametrize(("heads", "head_dim", "bias_max"), [(4, 16, 8), (3, 64, 8), (2, 128, 16), (2, 112, 8)])
def test_attention_of_prompts_equals_its_formula(heads: int, head_dim: int, bias_max: int) -> None:
    n_tokens = 160
    cache, q = random(2, 3, heads, n_tokens, head_dim), random(200, 3, heads, head_dim)[:, 0]
    cache[:, 1, :, 116:] = torch.nan  # behind the prompt of the third tile
    tiles = torch.tensor([[0, 0, 0, 32], [0, 32, 32, 32], [1, 96, 64, 20], [2, 128, 90, 32], [1, 0, 130, 1]])
    first = torch.zeros(len(tiles), heads, dtype=torch.int64)
    first[3, 1:] = 96
    slopes, scale = alibi_slopes(heads, bias_max), head_dim**-0.5
    for start in (None, first):
        found, untouched = torch.full((200, heads, head_dim), 7.0), torch.ones(200, dtype=torch.bool)
        attend_tiles(q, cache, tiles, start, slopes, scale, found)
        for i, (slot, at, token, n) in enumerate(tiles.tolist()):
            untouched[token : token + n] = False
            for h in range(heads):
                begin = int(start[i, h]) if start is not None else 0
                keys, values = cache[:, slot, h, begin : at + n].double()
                distance = torch.arange(begin, at + n) - torch.arange(at, at + n)[:, None]
                scores = q[token : token + n, h].double() @ keys.T * scale + slopes[h].double() * distance
                want = scores.masked_fill(distance > 0, -torch.inf).softmax(1) @ values
                torch.testing.assert_close(found[token : token + n, h].double(), want, atol=2e-6, rtol=1e-5)
        assert (found[untouched] == 7).all()


def test_a_query_of_a_prompt_has_the_same_bits_alone_and_wherever_the_prompt_ends() -> None:
    cache, q = random(2, 2, 3, 96, 64), random(64, 3, 64)
    slopes = alibi_slopes(3, 8)

    def found(*tiles: list[int]) -> Tensor:
        out = torch.zeros_like(q)
        attend_tiles(q, cache, torch.tensor(tiles), None, slopes, 0.125, out)
        return out

    together = found([1, 32, 0, 32], [0, 64, 32, 32])
    assert torch.equal(found([0, 64, 32, 32])[32:], together[32:])
    for n in (1, 7, 31):
        assert torch.equal(found([0, 64, 32, n])[32 : 32 + n], together[32 : 32 + n])


def test_keys_and_values_go_where_they_belong_and_nowhere_else() -> None:
    for n in (3, 70):  # by one thread, and by several
        kv, cache = random(n, 3, 4, 16)[:, 1:], torch.zeros(2, 3, 4, 32, 16)
        places = torch.randperm(96)[:n]
        slots, positions = places // 32, places % 32
        want = cache.clone()
        want[:, slots, :, positions] = kv
        store(kv, slots, positions, cache)
        assert torch.equal(cache, want)


def test_the_library_is_compiled_once_and_kept_where_only_its_owner_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    forget()
    assert why_no_cpu_kernels() == ""
    folder = tmp_path / ".cache" / "mptserve"
    (kept,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    forget()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert why_no_cpu_kernels() == ""
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    kept.unlink()
    os.chmod(folder, 0o777)
    forget()
    assert why_no_cpu_kernels() == ""
    assert list(folder.iterdir()) == [], "left where others could put another library"


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("gcc", "there is no gcc"),
        ("processor", "they are for x86 processors, not for aarch64"),
        ("instructions", "gcc failed: "),
        ("sense", "a kernel computed nonsense"),
    ],
)
def test_without_them_float32_computes_and_the_log_says_why(
    lacking: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget()
    if lacking == "gcc":
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    elif lacking == "processor":
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    elif lacking == "instructions":
        monkeypatch.setattr(library, "FLAGS", with_march(("-march=x86-64",)))
    else:
        monkeypatch.setattr(cpu_kernels, "linear", lambda x, weight: torch.full((len(x), weight.n_out), torch.nan))
    with caplog.at_level(logging.WARNING):
        place = choose_placement("cpu", "float32")
    assert not place.kernels
    (record,) = caplog.records
    assert record.getMessage().startswith("no compiled kernels")
    assert reason in record.getMessage()
    with pytest.raises(BadSetting, match="MPT_QUANT int8 needs the kernels in C, which cannot run here: " + reason):
        choose_placement("cpu", "float32", quant="int8")
    forget()


def test_groups_are_those_of_the_checkpoint() -> None:
    """The kernel has the number in its own words."""
    source = library.SOURCE.read_text(encoding="utf-8")
    assert f"#define GROUP {GROUP} " in source
