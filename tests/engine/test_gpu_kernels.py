"""The Triton kernels, run by Triton's interpreter where there is no GPU, against float64 and against sampling.py."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mptserve.engine.model import Norm, alibi_slopes
from mptserve.engine.sequence import BLOCK

pytest.importorskip("triton", reason="Triton has no build for this platform")


from mptserve.engine.gpu import attention_kernels, linear_kernels
from races import ORDERS, ordered

pytestmark = pytest.mark.long

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to outputs of size about one: float32 sums, inputs and outputs rounded to the dtype."""


class Store:
    """A filled paged cache of one layer, and the same keys and values in float64."""

    def __init__(
        self,
        lengths: list[int],
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        room: int = 160,
        int8: bool = False,
        bias_max: float = 8,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.heads, self.head_dim, self.dtype = lengths, heads, head_dim, dtype
        n_blocks = [-(-(n + room) // BLOCK) for n in lengths]
        order = (torch.randperm(sum(n_blocks), generator=generator) + 1).tolist()
        table = torch.zeros(len(lengths) + 1, max(n_blocks), dtype=torch.int32)
        for slot, n in enumerate(n_blocks):
            table[slot, :n] = torch.tensor([order.pop() for _ in range(n)])
        blocks = sum(n_blocks) + 1
        self.cache = attention_kernels.LayerCache(
            torch.zeros(2, blocks, heads, BLOCK, head_dim, dtype=torch.int8 if int8 else dtype, device=DEVICE),
            torch.zeros(2, blocks, heads, BLOCK if int8 else 0, device=DEVICE),
            torch.zeros(heads, dtype=torch.int32, device=DEVICE),
            table.to(DEVICE),
            alibi_slopes(heads, bias_max).to(DEVICE),
            1 / math.sqrt(head_dim),
        )
        self.generator = generator
        self.history = [self.random(n, 2) for n in lengths]  # [n, 2, H, D]
        for slot, kv in enumerate(self.history):
            if len(kv):
                self.write(slot, kv, 0)

    def random(self, n: int, parts: int) -> torch.Tensor:
        x = torch.randn(n, parts, self.heads, self.head_dim, generator=self.generator)
        return x.to(DEVICE, self.dtype)

    def write(self, slot: int, kv: torch.Tensor, start: int) -> None:
        n = len(kv)
        slots = torch.full((n,), slot, dtype=torch.int32, device=DEVICE)
        positions = torch.arange(start, start + n, dtype=torch.int32, device=DEVICE)
        self.cache.write(kv, slots, positions)

    def fill(self, slot: int, kv: torch.Tensor) -> None:
        """Make kv [n, 2, H, D] the slot's history, as `write` would: a program for each token takes the interpreter
        minutes."""
        blocks = self.cache.table[slot, : -(-len(kv) // BLOCK)].long()
        padded = F.pad(kv, (0, 0, 0, 0, 0, 0, 0, len(blocks) * BLOCK - len(kv)))
        self.cache.kv[:, blocks] = padded.unflatten(0, (-1, BLOCK)).permute(2, 0, 3, 1, 4)
        longest = kv[:, 0].float().square().sum(-1).amax(0)
        self.cache.kmax.copy_(torch.maximum(self.cache.kmax, longest.view(torch.int32)))
        self.lengths[slot], self.history[slot] = len(kv), kv

    def expected(self, q: torch.Tensor, kv: torch.Tensor, position: int) -> torch.Tensor:
        """Attention [T, H * D] in float64 of queries [T, H, D] from `position` on, over kv [S, 2, H, D]."""
        q, kv = q.double(), kv.double()
        u = torch.arange(len(kv), device=DEVICE)[None] - (torch.arange(len(q), device=DEVICE) + position)[:, None]
        bias = self.cache.slopes.double()[:, None, None] * u
        scores = torch.einsum("thd,shd->hts", q, kv[:, 0]) * self.cache.scale + bias
        scores = scores.masked_fill(u > 0, -torch.inf)
        return torch.einsum("hts,shd->thd", scores.softmax(-1), kv[:, 1]).flatten(1)

    def decode(self, n_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from one new token in every slot, slots backwards; return (what came, what should)."""
        n = len(self.lengths)
        qkv = self.random(n, 3)
        rows = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=DEVICE)
        positions = torch.tensor([*self.lengths, 0], device=DEVICE)
        parts = attention_kernels.new_split_k_buffers(n * self.heads * n_splits, self.head_dim, DEVICE, n_splits)
        got = torch.empty(n, self.heads * self.head_dim, dtype=self.dtype, device=DEVICE)
        self.cache.decode(qkv[:, 0], qkv[:, 1:], rows, positions, parts, got)
        want = [
            self.expected(qkv[i : i + 1, 0], torch.cat((self.history[slot], qkv[i : i + 1, 1:])), self.lengths[slot])
            for i, slot in enumerate(rows.tolist())
        ]
        return got.double(), torch.cat(want)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert (got.double() - want).abs().max().item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "lengths", "n_splits"),
    [(2, 64, [1, 32, 100], 4), (3, 112, [64, 7], 1), (1, 16, [150], 8), (2, 128, [0, 65], 2)],
)
def test_decode_attention(dtype: torch.dtype, heads: int, head_dim: int, lengths: list[int], n_splits: int) -> None:
    got, want = Store(lengths, heads, head_dim, dtype).decode(n_splits)
    close(got, want, TOLERANCE[dtype])


def test_decode_attention_stores_the_new_key_and_value() -> None:
    store = Store([40, 63], 3, 32, torch.float32)
    qkv = store.random(2, 3)
    rows, positions = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([40, 63, 0])
    parts = attention_kernels.new_split_k_buffers(2 * 3 * 2, 32, DEVICE, 2)
    out = torch.empty(2, 96, device=DEVICE)
    store.cache.decode(qkv[:, 0], qkv[:, 1:], rows.to(DEVICE), positions.to(DEVICE), parts, out)
    for slot, position in ((0, 40), (1, 63)):
        block = int(store.cache.table[slot, position // BLOCK])
        stored = store.cache.kv[:, block, :, position % BLOCK]
        assert torch.equal(stored, qkv[slot, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_prefill_attention_of_ragged_chunks(dtype: torch.dtype, int8: bool) -> None:
    """Three slots in one step: a whole prompt, a chunk behind a prefix, and a tile that is not full."""
    befores, chunks = [0, 96, 32], [150, 64, 3]
    store = Store(befores, 2, 48, dtype, int8=int8)
    new = [store.random(n, 3) for n in chunks]
    qkv = torch.cat(new)
    tiles, first = [], 0
    for slot, (before, n) in enumerate(zip(befores, chunks, strict=True)):
        store.write(slot, new[slot][:, 1:], before)
        tiles += [
            [first + t, before + t, min(attention_kernels.TILE, n - t), slot]
            for t in range(0, n, attention_kernels.TILE)
        ]
        first += n
    out = torch.full((len(qkv), 2 * 48), torch.nan, dtype=dtype, device=DEVICE)
    store.cache.prefill(qkv[:, 0], qkv[:, 1:], torch.tensor(tiles, dtype=torch.int32, device=DEVICE), out)
    want = torch.cat(
        [
            store.expected(piece[:, 0], torch.cat((store.history[slot], piece[:, 1:])), befores[slot])
            for slot, piece in enumerate(new)
        ]
    )
    close(out, want, 2.5e-2 if int8 else TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_attention_over_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randrange(0, 260) for _ in range(rng.randrange(1, 5))]
    heads, head_dim = rng.choice([1, 2, 3, 6, 12]), rng.choice([16, 32, 48, 80, 112, 128])
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    int8 = rng.random() < 0.5
    store = Store(lengths, heads, head_dim, dtype, int8=int8, bias_max=rng.choice([8, 16]), seed=seed)
    got, want = store.decode(rng.choice([1, 2, 4, 16]))
    close(got, want, 2.5e-2 if int8 else TOLERANCE[dtype])


def test_the_error_of_an_8_bit_cache_is_under_one_percent() -> None:
    store = Store([100], 2, 64, torch.float32, int8=True)
    got, want = store.decode(4)
    error = ((got - want).norm() / want.norm()).item()
    assert 1e-3 < error < 1e-2


def test_no_key_of_an_8_bit_cache_is_longer_than_its_head_knows() -> None:
    """All numbers of these keys but the largest are rounded up, by half a step: 2.2 percent more of a norm."""
    store = Store([0, 0], 2, 128, torch.float32, int8=True)
    k = torch.full((1, 1, 2, 128), 11.501)
    k[..., 5] = 127
    kv = k.expand(2, 2, 2, 128).contiguous().to(DEVICE)
    norms = []
    store.write(0, kv[:1], 0)
    norms.append(store.cache.kmax.view(torch.float32).sqrt())
    store.cache.kmax.zero_()
    rows, positions = torch.tensor([1], dtype=torch.int32, device=DEVICE), torch.tensor([0, 0, 0], device=DEVICE)
    out = torch.empty(1, 256, device=DEVICE)
    store.cache.decode(kv[:1, 0], kv[:1], rows, positions, attention_kernels.new_split_k_buffers(2, 128, DEVICE), out)
    norms.append(store.cache.kmax.view(torch.float32).sqrt())
    for slot, norm in enumerate(norms):
        block = int(store.cache.table[slot, 0])
        stored = store.cache.kv[0, block, :, 0].double().norm(dim=-1) * store.cache.scales[0, block, :, 0]
        assert ((norm >= stored * (1 - 1e-6)) & (norm <= stored * (1 + 1e-6))).all()


@pytest.mark.parametrize("n_splits", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_keys_that_cannot_matter_are_not_read_and_do_not_matter(n_splits: int) -> None:
    """The far past is poisoned: a head that read it would answer NaN. Its bound says that it need not."""
    store = Store([1200], 2, 64, torch.float32, bias_max=4)  # slopes 1/4 and 1/16
    poisoned = 300
    for block in store.cache.table[0, : poisoned // BLOCK].tolist():
        store.cache.kv[:, block] = torch.nan
    got, want = store.decode(n_splits)
    close(got, want, TOLERANCE[torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="orders programs of Triton's interpreter")
@pytest.mark.parametrize("n_splits", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_a_key_longer_than_all_before_does_not_move_the_window_of_its_own_step(order: str, n_splits: int) -> None:
    """Splits that see different windows count keys twice or not at all.

    The newest 60 keys and a row's own weigh alike, more than e^10 times as much as all others. One of the new keys is
    ten times as long as any before: with its norm the windows would reach over all keys, without it over some 110.
    """
    n, store = 1000, Store([0, 0], 2, 16, torch.float32, room=1001)
    store.cache.slopes.fill_(0.5)
    for slot in range(2):
        kv = store.random(n, 2)
        kv[:, 0] *= 0.1
        score = torch.arange(n, 0, -1.0) / 2 - 3  # the bias taken back
        kv[:, 0, :, 0] = torch.where(score <= 27, score, -15.0)[:, None].to(DEVICE) / 2.5
        store.fill(slot, kv)
    qkv = store.random(2, 3)
    qkv[:, 0] = 0
    qkv[:, 0, :, 0] = 10.0
    qkv[:, 1, :, 0] = -3 / 2.5
    qkv[1, 1, :, 1] = 100.0  # row 1, slot 1
    rows, positions = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), torch.tensor([n, n, 0], device=DEVICE)
    parts = attention_kernels.new_split_k_buffers(2 * 2 * n_splits, 16, DEVICE, n_splits)
    got = torch.empty(2, 32, device=DEVICE)
    with ordered(order):
        store.cache.decode(qkv[:, 0], qkv[:, 1:], rows, positions, parts, got)
    want = [store.expected(qkv[i : i + 1, 0], torch.cat((store.history[i], qkv[i : i + 1, 1:])), n) for i in range(2)]
    close(got, torch.cat(want), TOLERANCE[torch.float32])
    longest = store.cache.kmax.view(torch.float32).sqrt()
    close(longest, qkv[1, 1].double().norm(dim=-1), 1e-4)  # in the next step it counts


@pytest.mark.slow
def test_a_head_that_sees_everything_reads_everything() -> None:
    """Slopes of 2^-16 put no bound on 700 tokens."""
    store = Store([700], 2, 64, torch.float32, bias_max=32)  # slopes 2^-16, 2^-32
    got, want = store.decode(8)
    close(got, want, TOLERANCE[torch.float32])
    store.cache.kv[:, int(store.cache.table[0, 0])] = torch.nan
    assert store.decode(8)[0].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize(("bias_max", "poisoned"), [(8, 32_768), (16, 0)], ids=["bias_max 8", "StoryWriter"])
def test_decode_attention_at_65536_tokens(bias_max: float, poisoned: int) -> None:
    """Half of it is poisoned for slopes of 2^-4 and 2^-8, whose windows end after some 12,000 keys; 2^-16 sees all."""
    n = 65_535
    store = Store([0], 2, 32, torch.float32, room=n + 1, bias_max=bias_max)
    store.fill(0, store.random(n, 2))
    store.cache.kv[:, store.cache.table[0, : poisoned // BLOCK].long()] = torch.nan
    got, want = store.decode(8)
    close(got, want, TOLERANCE[torch.float32])


@pytest.mark.slow
def test_a_tile_of_queries_skips_what_none_of_them_can_see() -> None:
    position = 1200
    store = Store([position], 2, 64, torch.float32, bias_max=4)
    piece = store.random(20, 3)
    store.write(0, piece[:, 1:], position)
    kv = torch.cat((store.history[0], piece[:, 1:]))
    for block in store.cache.table[0, : 300 // BLOCK].tolist():
        store.cache.kv[:, block] = torch.nan
    out = torch.empty(20, 128, device=DEVICE)
    tiles = torch.tensor([[0, position, 20, 0]], dtype=torch.int32, device=DEVICE)
    store.cache.prefill(piece[:, 0], piece[:, 1:], tiles, out)
    close(out, store.expected(piece[:, 0], kv, position), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_linear_equals_float64(dtype: torch.dtype, n_rows: int, normed: bool) -> None:
    torch.manual_seed(n_rows)
    k, n_out = 200, 35
    x, residual = torch.randn(n_rows, k), torch.randn(n_rows, n_out)
    weight, bias, gamma, beta = torch.randn(n_out, k) / 14, torch.randn(n_out), torch.rand(k) + 0.5, torch.randn(k)
    x, weight, bias, gamma, beta, residual = (t.to(DEVICE, dtype) for t in (x, weight, bias, gamma, beta, residual))
    norm = Norm(gamma, beta, 1e-5) if normed else None

    def expected(gelu: bool, added: bool) -> torch.Tensor:
        y = x.double()
        if normed:
            y = F.layer_norm(y, (k,), gamma.double(), beta.double(), 1e-5)
        y = y @ weight.double().T + bias.double()
        y = F.gelu(y) if gelu else y
        return y + residual.double() if added else y

    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    close(linear_kernels.linear(x, weight, bias, norm=norm), expected(False, False), tolerance)
    close(linear_kernels.linear(x, weight, bias, norm=norm, gelu=True), expected(True, False), tolerance)
    close(linear_kernels.linear(x, weight, bias, norm=norm, residual=residual), expected(False, True), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(80, 166_912), (90, 232_448)], ids=["A100", "H100 and H200"])
def test_kernels_compile_for_cards_that_are_not_here(capability: int, shared: int) -> None:
    """Next to nothing spills, all fits into shared memory, long reads are asynchronous, products use tensor cores."""
    tests = Path(__file__).parents[1]
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(tests.parent / "score")
    }
    command = [sys.executable, str(tests / "support" / "compile_kernels.py"), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {f["kernel"] for f in found} == {
        "_write_kv",
        "_decode_attention",
        "_combine",
        "_prefill_attention",
        "_linear",
        "_quantized_linear",
        "_unpack",
        "_sample",
    }
    for f in found:
        assert f["spilled"] <= 64, f  # bytes; the 8-bit prefill kernel on an A100
        assert f["shared"] <= shared, f
        pipelined = ("_decode_attention", "_prefill_attention", "_linear", "_quantized_linear")
        assert f["asynchronous copies"] == (f["kernel"] in pipelined), f
        many = f["constants"].get("ROWS") == 16 or f["kernel"] == "_prefill_attention"
        assert f["tensor cores"] == many, f
