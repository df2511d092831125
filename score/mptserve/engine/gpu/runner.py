"""Runs steps with the Triton kernels: decode steps replayed as CUDA graphs, each launched before the last is read.

A step's results stay on the GPU: the kernel that samples a row's token also moves its state on, so the next step needs
nothing from the CPU but the list of slots. While a step runs, the CPU reads the tokens of the one before, passes them
to their readers, and schedules the one after; a sequence that turns out to have ended costs one row of one step, thrown
away. What is launched later runs later (one stream), so blocks and slots can change hands while a step is in flight.

A decode step is one graph per number of rows (`bucket_sizes`) and length of context (`_LONG`); a step with prompt
chunks is launched kernel by kernel, which its longer work hides.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mptserve.engine.cache import n_blocks_for
from mptserve.engine.gpu.attention_kernels import TILE, LayerCache, new_split_k_buffers
from mptserve.engine.gpu.block_table import BlockTable
from mptserve.engine.gpu.row_state import RowUpdate, new_row_states, set_row_states
from mptserve.engine.gpu.sampling_kernel import sample_rows
from mptserve.engine.gpu.transfer import download_results, upload
from mptserve.engine.model import MPT, alibi_slopes
from mptserve.engine.paged_cache import PagedCache
from mptserve.engine.sequence import SamplingParams, Sequence
from mptserve.engine.step import Chunk, InFlightStep

log = logging.getLogger(__name__)

_LONG = 4096
"""Tokens of context from which a decode step splits its keys among the whole card."""


@dataclass
class _Graph:
    """A captured decode step. slots: [bucket] int32, its input.  logits, sampled: its outputs."""

    slots: Tensor
    logits: Tensor
    sampled: Tensor
    replay: Callable[[], None]


class GpuRunner:
    """Turns scheduled steps into kernels on one GPU (or, for tests, in Triton's interpreter).

    max_tokens: the most of one sequence.
    """

    overlaps = True

    def __init__(self, model: MPT, cache: PagedCache, max_rows: int, max_tokens: int) -> None:
        config, device = model.config, model.device
        self.model, self.max_rows, self.max_tokens, self.device = model, max_rows, max_tokens, device
        self._padding = max_rows  # the slot of no sequence
        self.states = new_row_states(max_rows + 1, model.n_tokens, device)
        self.table = BlockTable(max_rows + 1, n_blocks_for(max_tokens + 1), device)
        self.eos_ids = torch.tensor(config.eos_token_ids, device=device)
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max).to(device)
        self.layers = [
            LayerCache(cache.kv[i], cache.scales[i], cache.kmax[i], self.table.table, slopes, config.scale)
            for i in range(config.n_layers)
        ]
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if self._on_gpu else 4
        # One memory for every step's partial sums: graphs keep its address, so it is never replaced.
        most = max(n * self._n_splits(n, long) for n in range(1, max_rows + 1) for long in (False, True))
        self._split_k = new_split_k_buffers(most * config.n_heads, config.head_dim, device)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self.buckets = bucket_sizes(max_rows)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[int] = ()) -> InFlightStep:
        """Launch the step; the states of its rows must be where the steps before left them. Takes no drafts."""
        assert not drafts, "speculative decoding is for CPUs"
        self.table.update([*decodes, *(c.seq for c in chunks)])
        ready, logits, sampled = self._mixed_step(decodes, chunks) if chunks else self._decode_step(decodes)
        return InFlightStep(ready, download_results(ready, logits, sampled))

    def _decode_step(self, decodes: Seq[Sequence]) -> tuple[list[Sequence], Tensor, Tensor]:
        n = len(decodes)
        long = max(s.n_computed for s in decodes) >= _LONG
        bucket = next((b for b in self.buckets if b >= n), n)
        slots = self._upload([s.slot for s in decodes] + [self._padding] * (bucket - n), torch.int32)
        graph = self._graphs.get((bucket, long))
        if graph is None:
            return [*decodes], *self._decode(slots, long)
        graph.slots.copy_(slots)
        graph.replay()
        return [*decodes], graph.logits, graph.sampled

    def _decode(self, slots: Tensor, long: bool) -> tuple[Tensor, Tensor]:
        """Do the work of a decode step, as a graph captures it; return (logits [M, V], sampled [M, 2])."""
        split_k = replace(self._split_k, n_splits=self._n_splits(len(slots), long))

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            self.layers[layer].decode(q, kv, slots, self.states.position, split_k, out)
            return out

        hidden = self.model.hidden(self.states.token.index_select(0, slots), attend)
        return self._sample(hidden, slots)

    def _mixed_step(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> tuple[list[Sequence], Tensor, Tensor]:
        n = len(decodes)
        ids: list[int] = []
        token_slots: list[int] = []
        positions: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        updates: list[RowUpdate] = []
        ready, last_tokens = list(decodes), list(range(n))
        for chunk in chunks:
            first, seq, end = n + len(ids), chunk.seq, chunk.start + chunk.n
            ids += [seq.token(p) for p in range(chunk.start, end)]
            token_slots += [seq.slot] * chunk.n
            positions += range(chunk.start, end)
            tiles += [(first + t, chunk.start + t, min(TILE, chunk.n - t), seq.slot) for t in range(0, chunk.n, TILE)]
            if end == seq.n_tokens:
                ready.append(seq)
                last_tokens.append(n + len(ids) - 1)
                updates.append(RowUpdate(seq, end - 1))  # sampling its token moves it on
            else:
                updates.append(RowUpdate(seq, end))
        set_row_states(self.states, updates)
        slots = self._upload([s.slot for s in ready], torch.int32)
        tokens = torch.cat((self.states.token.index_select(0, slots[:n]), self._upload(ids, torch.int64)))
        slot, position = self._upload(token_slots, torch.int32), self._upload(positions, torch.int32)
        tile = self._upload(tiles, torch.int32)
        long = any(s.n_computed >= _LONG for s in decodes)
        split_k = replace(self._split_k, n_splits=self._n_splits(max(n, 1), long))

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            cache = self.layers[layer]
            cache.write(kv[n:], slot, position)
            cache.prefill(q, kv, tile, out)
            if n:
                cache.decode(q[:n], kv[:n], slots[:n], self.states.position, split_k, out)
            return out

        hidden = self.model.hidden(tokens, attend)
        if not ready:
            return [], hidden, hidden[:0]
        return ready, *self._sample(hidden.index_select(0, self._upload(last_tokens, torch.int64)), slots)

    def _sample(self, hidden: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(hidden)
        sampled = torch.empty(len(slots), 2, dtype=torch.int32, device=self.device)
        sample_rows(logits, self.states, slots, self.eos_ids, sampled)
        return logits, sampled

    def _upload(self, numbers: Seq[int] | Seq[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        return upload(torch.tensor(numbers, dtype=dtype), self.device)

    @torch.inference_mode()
    def capture(self) -> None:
        """Compile every kernel, then capture every graph, the largest first into one memory pool.

        Takes seconds, and logs its progress. What it computes goes to block 0 and the padding slot.
        """
        if not self._on_gpu:
            return
        prompt = Sequence([0] * 64, SamplingParams(1), (0,), None, None, lambda _: None, None)
        prompt.slot = self._padding
        self._mixed_step([], [Chunk(prompt, 0, 64)])
        self.states.integers.zero_()
        started = time.monotonic()
        lengths = (True, False) if self.max_tokens > _LONG else (False,)
        wanted = [(bucket, long) for bucket in reversed(self.buckets) for long in lengths]
        pool = torch.cuda.graph_pool_handle()
        for i, (bucket, long) in enumerate(wanted):
            slots = torch.full((bucket,), self._padding, dtype=torch.int32, device=self.device)
            self._decode(slots, long)  # compiles kernels and lets cuBLAS choose, neither of which a capture may do
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits, sampled = self._decode(slots, long)
            self._graphs[bucket, long] = _Graph(slots, logits, sampled, graph.replay)
            if i % 8 == 7 or i + 1 == len(wanted):
                numbers = {"done": i + 1, "of": len(wanted), "seconds": time.monotonic() - started}
                log.info("capturing graphs", extra={"numbers": numbers})

    def _n_splits(self, n_rows: int, long: bool) -> int:
        """Return into how many splits, a power of two, a head's keys are divided: enough to keep the whole card busy.

        Short contexts get two programs for every multiprocessor, long ones eight, since their rows may differ more.
        """
        wanted = self._processors * (8 if long else 2) // (n_rows * self.model.config.n_heads)
        n_splits, most = (4, 64) if long else (1, 16)
        while n_splits < min(wanted, most):
            n_splits *= 2
        return n_splits


def bucket_sizes(max_rows: int) -> list[int]:
    """Return the batch sizes that have graphs: few enough to capture in seconds, close enough to waste little."""
    sizes = [1, 2, 4, 8, 12, 16, *range(24, 65, 8), *range(80, 129, 16), *range(160, 1025, 32)]
    return sorted({*(b for b in sizes if b < max_rows), max_rows})
