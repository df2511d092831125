"""Runs steps with the Triton kernels: decode steps replayed as CUDA graphs, each launched before the last is read.

A step's results stay on the GPU: the kernel that draws a row's token also moves its lane on, so the next step needs
nothing from the CPU but the list of lanes. While a step runs, the CPU reads the tokens of the one before, tells their
readers, and schedules the one after; a sequence that turns out to have ended costs one row of one step, thrown away.
What is launched later runs later (one stream), so blocks and lanes can change hands while a step is in flight.

A decode step is one graph per number of rows (`buckets`) and length of context (`_LONG`); a step with prompt chunks is
launched kernel by kernel, which its longer work hides.

A step with drafts is a decode step over lanes that are forks of its sequence's, each one draft further, on the same
blocks. It differs in one thing: all keys and values are stored before any are read. The fork behind the last right
draft is then what the sequence's own lane ought to be, and is copied there before that is used again.
"""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mptserve.engine.cache import PagedCache, n_blocks_for
from mptserve.engine.cpu.attention import Chunk
from mptserve.engine.gpu.kernels import TILE, KernelCache, new_parts, sample_rows
from mptserve.engine.gpu.row_state import LaneState, copy_lane, fork_lane, new_lanes, set_lanes, upload
from mptserve.engine.model import MPT, alibi_slopes
from mptserve.engine.runner import Launched
from mptserve.engine.sampling import Sampled
from mptserve.engine.sequence import SamplingParams, Sequence, Token

log = logging.getLogger(__name__)

_LONG = 4096
"""Tokens of context from which a decode step splits its keys among the whole card."""


@dataclass
class _Graph:
    """A captured decode step. rows: [bucket] int32, its input.  logits, sampled: its outputs."""

    rows: Tensor
    logits: Tensor
    sampled: Tensor
    replay: Callable[[], None]


class GpuRunner:
    """Turns scheduled steps into kernels on one GPU (or, for tests, in Triton's interpreter).

    max_tokens: the most of one sequence.  speculate_tokens: the most drafts of a step.
    """

    overlaps = True

    def __init__(
        self, model: MPT, cache: PagedCache, max_rows: int, max_tokens: int, speculate_tokens: int = 0
    ) -> None:
        config, device = model.config, model.device
        self.model, self.max_rows, self.max_tokens, self.device = model, max_rows, max_tokens, device
        # Lanes: one for every slot, then the forks that drafts are drawn in, then nobody's.
        self._n_forks = speculate_tokens + 1 if speculate_tokens else 0
        self._nobody = max_rows + self._n_forks
        self.lanes = new_lanes(self._nobody + 1, model.n_tokens, device)
        self.table = torch.zeros(self._nobody + 1, n_blocks_for(max_tokens + 1), dtype=torch.int32, device=device)
        self._forked: tuple[Sequence, int] | None = None  # whose lane is behind, and its tokens when it was forked
        self.eos_ids = torch.tensor(config.eos_token_ids, device=device)
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max).to(device)
        self.layers = [
            KernelCache(cache.kv[i], cache.scales[i], cache.kmax[i], self.table, slopes, config.scale)
            for i in range(config.n_layers)
        ]
        # Whose blocks a lane's line holds, since which preemption, and how many.
        self._in_table: list[tuple[Sequence | None, int, int]] = [(None, 0, 0)] * max_rows
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if self._on_gpu else 4
        # One memory for every step's partial sums: graphs keep its address, so it is never replaced.
        rows = range(1, max(max_rows, self._n_forks) + 1)
        most = max(n * self._n_splits(n, long) for n in rows for long in (False, True))
        self._parts = new_parts(most * config.n_heads, config.head_dim, device)
        self._graphs: dict[tuple[int, bool, bool], _Graph] = {}
        self.buckets = buckets(max_rows)
        # Rows of steps with drafts that have graphs.
        self.draft_buckets = sorted({*(b for b in (2, 4, 8) if b < self._n_forks), self._n_forks} - {0})

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    # Steps

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Seq[int] = ()) -> Launched:
        """Launch the step; its sequences' lanes must be where the steps before left them.

        drafts: tokens that may follow the last one of a lone decoding sequence, none of whose tokens is pending.
        """
        self._update_table([*decodes, *(c.seq for c in chunks)])
        self._join_fork(decodes, chunks)
        ready = list(decodes)
        if chunks:
            ready, logits, sampled = self._mixed_step(decodes, chunks)
        elif drafts:
            ready *= len(drafts) + 1
            logits, sampled = self._draft_step(decodes[0], drafts)
        else:
            logits, sampled = self._decode_step([s.slot for s in decodes], decodes)
        collect = self._collector(ready, logits, sampled)
        if drafts:
            self._forked = decodes[0], decodes[0].n_tokens
        return Launched(ready, collect, drafts)

    def _draft_step(self, seq: Sequence, drafts: Seq[int]) -> tuple[Tensor, Tensor]:
        forks = range(self.max_rows, self.max_rows + len(drafts) + 1)
        fork_lane(self.lanes, seq.slot, forks.start, self._upload(drafts, torch.int64))
        self.table[forks.start : forks.stop] = self.table[seq.slot]
        return self._decode_step([*forks], [seq], forked=True)

    def _join_fork(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> None:
        """Bring the lane of a sequence that had drafts up to its tokens, when it goes on."""
        if self._forked is None:
            return
        seq, n_tokens = self._forked
        if seq in decodes:
            copy_lane(self.lanes, self.max_rows + seq.n_tokens - n_tokens - 1, seq.slot)
        if seq in decodes or any(chunk.seq is seq for chunk in chunks):  # chunks set their lane anew
            self._forked = None

    def _decode_step(self, lanes: list[int], sequences: Seq[Sequence], forked: bool = False) -> tuple[Tensor, Tensor]:
        n = len(lanes)
        long = max(s.n_computed for s in sequences) >= _LONG
        bucket = next((b for b in (self.draft_buckets if forked else self.buckets) if b >= n), n)
        rows = self._upload(lanes + [self._nobody] * (bucket - n), torch.int32)
        graph = self._graphs.get((bucket, long, forked))
        if graph is None:
            return self._decode(rows, long, forked)
        graph.rows.copy_(rows)
        graph.replay()
        return graph.logits, graph.sampled

    def _decode(self, rows: Tensor, long: bool, forked: bool) -> tuple[Tensor, Tensor]:
        """The work of a decode step, as a graph captures it. Returns (logits [M, V], sampled [M, 2]).

        forked: rows read each other's keys and values.
        """
        parts = replace(self._parts, n_splits=self._n_splits(len(rows), long))
        positions = self.lanes.position
        places = positions.index_select(0, rows).to(torch.int32) if forked else None

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            if places is not None:
                self.layers[layer].write(kv, rows, places)
            self.layers[layer].decode(q, kv, rows, positions, parts, out)
            return out

        hidden = self.model.hidden(self.lanes.token.index_select(0, rows), attend)
        return self._sample(hidden, rows)

    def _mixed_step(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> tuple[list[Sequence], Tensor, Tensor]:
        n = len(decodes)
        ids: list[int] = []
        lanes: list[int] = []
        positions: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        states: list[LaneState] = []
        ready, last = list(decodes), list(range(n))
        for chunk in chunks:
            first, seq, end = n + len(ids), chunk.seq, chunk.start + chunk.n
            ids += [seq.token(p) for p in range(chunk.start, end)]
            lanes += [seq.slot] * chunk.n
            positions += range(chunk.start, end)
            tiles += [(first + t, chunk.start + t, min(TILE, chunk.n - t), seq.slot) for t in range(0, chunk.n, TILE)]
            if end == seq.n_tokens:
                ready.append(seq)
                last.append(n + len(ids) - 1)
                states.append(LaneState(seq.slot, seq, end - 1))  # drawing its token moves it on
            else:
                states.append(LaneState(seq.slot, seq, end))
        set_lanes(self.lanes, states)
        rows = self._upload([s.slot for s in ready], torch.int32)
        tokens = torch.cat((self.lanes.token.index_select(0, rows[:n]), self._upload(ids, torch.int64)))
        lane, position = self._upload(lanes, torch.int32), self._upload(positions, torch.int32)
        tile = self._upload(tiles, torch.int32)
        long = any(s.n_computed >= _LONG for s in decodes)
        parts = replace(self._parts, n_splits=self._n_splits(max(n, 1), long))

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            cache = self.layers[layer]
            cache.write(kv[n:], lane, position)
            cache.prefill(q, kv, tile, out)
            if n:
                cache.decode(q[:n], kv[:n], rows[:n], self.lanes.position, parts, out)
            return out

        hidden = self.model.hidden(tokens, attend)
        if not ready:
            return [], hidden, hidden[:0]
        logits, sampled = self._sample(hidden.index_select(0, self._upload(last, torch.int64)), rows)
        return ready, logits, sampled

    def _sample(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(hidden)
        sampled = torch.empty(len(rows), 2, dtype=torch.int32, device=self.device)
        sample_rows(logits, self.lanes, rows, self.eos_ids, sampled)
        return logits, sampled

    def _collector(self, ready: list[Sequence], logits: Tensor, sampled: Tensor) -> Callable[[], Sampled]:
        """Start the results' way to the CPU; return what waits for them."""
        tensors = {"sampled": self._download(sampled[: len(ready)])}
        for i, seq in enumerate(ready):
            if seq.params.logprobs is not None:  # the model's own, before penalties
                log_p = logits[i].log_softmax(-1)
                top = log_p.topk(min(seq.params.logprobs, len(log_p)))
                tensors[f"{i} own"] = self._download(log_p[sampled[i, :1].long()])
                tensors[f"{i} ids"], tensors[f"{i} values"] = self._download(top.indices), self._download(top.values)
        done: torch.cuda.Event | None = None
        if self._on_gpu:
            done = torch.cuda.Event()
            done.record()

        def collect() -> Sampled:
            if done is not None:
                done.synchronize()
            tokens = []
            for i, id in enumerate(tensors["sampled"][:, 0].tolist()):
                if f"{i} own" not in tensors:
                    tokens.append(Token(id))
                    continue
                pairs = zip(tensors[f"{i} ids"].tolist(), tensors[f"{i} values"].tolist(), strict=True)
                tokens.append(Token(id, max(tensors[f"{i} own"].item(), -1e30), tuple(pairs)))
            return Sampled(tokens, [bool(f) for f in tensors["sampled"][:, 1].tolist()])

        return collect

    def _update_table(self, sequences: list[Sequence]) -> None:
        """Write the blocks that sequences got since they were last seen into the table."""
        lanes: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for seq in sequences:
            owner, since, n = self._in_table[seq.slot]
            known = n if owner is seq and since == seq.n_preempted else 0
            new = seq.blocks[known:]
            lanes += [seq.slot] * len(new)
            columns += range(known, known + len(new))
            blocks += new
            self._in_table[seq.slot] = (seq, seq.n_preempted, len(seq.blocks))
        if blocks:
            values = self._upload([lanes, columns, blocks], torch.int64)
            self.table[values[0], values[1]] = values[2].to(torch.int32)

    def _upload(self, numbers: Seq[Any], dtype: torch.dtype) -> Tensor:
        return upload(torch.tensor(numbers, dtype=dtype), self.device)

    def _download(self, tensor: Tensor) -> Tensor:
        if not self._on_gpu:
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    # Graphs

    @torch.inference_mode()
    def capture(self) -> None:
        """Compile every kernel, then capture every graph, the largest first into one memory pool.

        Takes seconds, and says how far it is. What it computes goes to block 0 and the last lane, which are nobody's.
        """
        if not self._on_gpu:
            return
        prompt = Sequence([0] * 64, SamplingParams(1), (0,), None, None, lambda _: None, None)
        prompt.slot = self._nobody
        self._mixed_step([], [Chunk(prompt, 0, 64)])
        self.lanes.integers.zero_()
        started = time.monotonic()
        wanted = list(self._wanted())
        pool = torch.cuda.graph_pool_handle()
        for i, (bucket, long, forked) in enumerate(wanted):
            rows = torch.full((bucket,), self._nobody, dtype=torch.int32, device=self.device)
            self._decode(
                rows, long, forked
            )  # compiles kernels and lets cuBLAS choose, neither of which a capture may do
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits, sampled = self._decode(rows, long, forked)
            self._graphs[bucket, long, forked] = _Graph(rows, logits, sampled, graph.replay)
            if i % 8 == 7 or i + 1 == len(wanted):
                numbers = {"done": i + 1, "of": len(wanted), "seconds": time.monotonic() - started}
                log.info("capturing graphs", extra={"numbers": numbers})

    def _wanted(self) -> Iterator[tuple[int, bool, bool]]:
        """Yield (rows, long, forked) of every graph."""
        for forked, sizes in ((False, self.buckets), (True, self.draft_buckets)):
            for bucket in reversed(sizes):
                if self.max_tokens > _LONG:
                    yield bucket, True, forked
                yield bucket, False, forked

    def _n_splits(self, n_rows: int, long: bool) -> int:
        """Return into how many parts, a power of two, a head's keys are split: as many as keep the whole card busy.

        Short contexts get two programs for every multiprocessor, long ones eight, since their rows may differ more.
        """
        wanted = self._processors * (8 if long else 2) // (n_rows * self.model.config.n_heads)
        n_splits, most = (4, 64) if long else (1, 16)
        while n_splits < min(wanted, most):
            n_splits *= 2
        return n_splits


def buckets(max_rows: int) -> list[int]:
    """Return the batch sizes that have graphs: few enough to capture in seconds, close enough to waste little."""
    sizes = [1, 2, 4, 8, 12, 16, *range(24, 65, 8), *range(80, 129, 16), *range(160, 1025, 32)]
    return sorted({*(b for b in sizes if b < max_rows), max_rows})
