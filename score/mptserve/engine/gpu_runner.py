"""Runs steps with the Triton kernels: decode steps replayed as CUDA graphs, each launched before the last is read.

A step's results stay on the GPU: the kernel that draws a row's token also moves its lane on, so the next step needs
nothing from the CPU but the list of lanes. While a step runs, the CPU reads the tokens of the one before, tells their
readers, and schedules the one after; a sequence that turns out to have ended costs one row of one step, thrown away.
What is launched later runs later (one stream), so blocks and lanes can change hands while a step is in flight.

A decode step is one graph per number of rows (`buckets`) and length of context (`_LONG`); a step with prompt chunks is
launched kernel by kernel, which its longer work hides.
"""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mptserve.engine.attention import Chunk
from mptserve.engine.kernels import TILE, KernelCache, Parts, new_parts, sample_rows
from mptserve.engine.kv_cache import PagedCache, n_blocks_for
from mptserve.engine.lanes import LaneState, new_lanes, set_lanes
from mptserve.engine.model import MPT, alibi_slopes
from mptserve.engine.runner import Launched
from mptserve.engine.sampling import Sampled
from mptserve.engine.sequence import Sequence, Token

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

    max_tokens: the most of one sequence.
    """

    overlaps = True

    def __init__(self, model: MPT, cache: PagedCache, max_rows: int, max_tokens: int) -> None:
        config, device = model.config, model.device
        self.model, self.max_rows, self.max_tokens, self.device = model, max_rows, max_tokens, device
        self.lanes = new_lanes(max_rows + 1, model.n_tokens, device)
        self.table = torch.zeros(max_rows + 1, n_blocks_for(max_tokens + 1), dtype=torch.int32, device=device)
        self.eos_ids = torch.tensor(config.eos_token_ids, device=device)
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max).to(device)
        self.layers = [
            KernelCache(cache.kv[i], cache.scales[i], cache.kmax[i], self.table, slopes, config.scale)
            for i in range(config.n_layers)
        ]
        self._in_table: list[tuple[Sequence | None, int]] = [(None, 0)] * max_rows  # whose blocks, how many
        self._parts: dict[int, Parts] = {}
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    # Steps

    def launch(self, decodes: Seq[Sequence], chunks: Seq[Chunk]) -> Launched:
        """Launch the step; its sequences' lanes must be where the steps before left them."""
        self._update_table([*decodes, *(c.seq for c in chunks)])
        if chunks:
            ready, logits, sampled = self._mixed_step(decodes, chunks)
        else:
            ready = list(decodes)
            logits, sampled = self._decode_step(decodes)
        return Launched(ready, self._collector(ready, logits, sampled)) if ready else Launched([], _nothing)

    def _decode_step(self, decodes: Seq[Sequence]) -> tuple[Tensor, Tensor]:
        n = len(decodes)
        long = max(s.n_computed for s in decodes) >= _LONG
        bucket = next((b for b in self.buckets() if b >= n), n)
        rows = self._upload([s.slot for s in decodes] + [self.max_rows] * (bucket - n), torch.int32)
        graph = self._graphs.get((bucket, long))
        if graph is None:
            return self._decode(rows, long)
        graph.rows.copy_(rows)
        graph.replay()
        return graph.logits, graph.sampled

    def _decode(self, rows: Tensor, long: bool) -> tuple[Tensor, Tensor]:
        """The work of a decode step, as a graph captures it. Returns (logits [M, V], sampled [M, 2])."""
        parts = self._splits(len(rows), long)
        positions = self.lanes.position

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
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
        parts = self._splits(max(n, 1), any(s.n_computed >= _LONG for s in decodes))

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
            return [], hidden, hidden
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
        if self.device.type == "cuda":
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
            owner, n = self._in_table[seq.slot]
            known = n if owner is seq and seq.n_computed > 0 else 0  # after a preemption it starts anew
            new = seq.blocks[known:]
            lanes += [seq.slot] * len(new)
            columns += range(known, known + len(new))
            blocks += new
            self._in_table[seq.slot] = (seq, len(seq.blocks))
        if blocks:
            values = self._upload([lanes, columns, blocks], torch.int64)
            self.table[values[0], values[1]] = values[2].to(torch.int32)

    def _upload(self, numbers: Seq[Any], dtype: torch.dtype) -> Tensor:
        host = torch.tensor(numbers, dtype=dtype)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _download(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    # Graphs

    def buckets(self) -> list[int]:
        """Return the batch sizes that have graphs: few enough to capture in seconds, close enough to waste little."""
        sizes = [1, 2, 4, 8, 12, 16, *range(24, 65, 8), *range(80, 129, 16), *range(160, 1025, 32)]
        return sorted({*(b for b in sizes if b < self.max_rows), self.max_rows})

    def capture(self) -> None:
        """Capture every graph, the largest first into one memory pool; takes seconds, and says how far it is."""
        if self.device.type != "cuda":
            return
        started = time.monotonic()
        wanted = list(self._wanted())
        pool = torch.cuda.graph_pool_handle()
        for i, (bucket, long) in enumerate(wanted):
            rows = torch.full((bucket,), self.max_rows, dtype=torch.int32, device=self.device)
            self._decode(rows, long)  # compiles kernels and lets cuBLAS choose, neither of which a capture may do
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits, sampled = self._decode(rows, long)
            self._graphs[bucket, long] = _Graph(rows, logits, sampled, graph.replay)
            if i % 8 == 7 or i + 1 == len(wanted):
                numbers = {"done": i + 1, "of": len(wanted), "seconds": time.monotonic() - started}
                log.info("capturing graphs", extra={"numbers": numbers})

    def _wanted(self) -> Iterator[tuple[int, bool]]:
        for bucket in reversed(self.buckets()):
            if self.max_tokens > _LONG:
                yield bucket, True
            yield bucket, False

    def _splits(self, n_rows: int, long: bool) -> Parts:
        """Return room for as many splits as give every multiprocessor some programs: short contexts two, long eight."""
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        else:
            processors = 4
        wanted = processors * (8 if long else 2) // (n_rows * self.model.config.n_heads)
        n_splits = 4 if long else 1
        while n_splits < min(wanted, 64 if long else 16):
            n_splits *= 2
        found = self._parts.get(n_splits)
        needed = n_rows * self.model.config.n_heads * n_splits
        if found is None or len(found.best) < needed:
            found = new_parts(n_rows, self.model.config.n_heads, self.model.config.head_dim, n_splits, self.device)
            self._parts[n_splits] = found
        return found


def _nothing() -> Sampled:
    return Sampled([], [])
