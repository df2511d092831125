"""Decides what the next step computes: which sequences are admitted, which decode, and which prompts continue.

Continuous batching (Orca, OSDI 2022): sequences join and leave between steps. Admission is first come, first served,
as soon as the cache has room for the prompt, so no sequence starves. Prompts are computed in chunks next to the
decoding rows, so that a long one does not stall the others. When memory runs out, the youngest sequence is preempted:
it releases its memory and returns to the head of the queue. Its generated tokens are kept; only their keys and values
are computed again, in the same way as the first time, so its answer is the same.
"""

import time
from collections import deque

from mptserve.engine.cache import Cache, reusable_keys
from mptserve.engine.prompt_lookup import PromptLookup
from mptserve.engine.sequence import BLOCK, Sequence
from mptserve.engine.step import Chunk


class Scheduler:
    """Queues and cache of one engine. Only the engine's thread calls it.

    exact_resume: after a preemption, compute generated tokens one by one as the first time, instead of as one prompt;
    slower, but bit for bit the same (where the kernels in C run, whose rows do not depend on their neighbours).
    speculate_tokens: the most draft tokens for a sequence that runs alone (prompt_lookup.py); 0 is off.
    """

    def __init__(
        self, cache: Cache, max_rows: int, prefill_tokens: int, exact_resume: bool, speculate_tokens: int = 0
    ) -> None:
        self.cache, self.max_rows, self.exact_resume = cache, max_rows, exact_resume
        self.speculate_tokens = speculate_tokens
        self.prefill_tokens = max(prefill_tokens // BLOCK, 1) * BLOCK
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.n_preemptions = 0
        self._lookup: tuple[Sequence, PromptLookup] | None = None

    @property
    def may_preempt(self) -> bool:
        """Whether the next step might have to: only sequences with no pending token can be preempted."""
        return self.cache.n_free_blocks < len(self.running)

    @property
    def may_draft(self) -> bool:
        """Whether the next step might have drafts: they follow the last token, which must not be pending."""
        return self.speculate_tokens > 0 and len(self.running) == 1

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def next_step(self) -> tuple[list[Sequence], list[Chunk]]:
        """Return (decoding rows, prompt chunks) of the next step; both empty when there is nothing to do."""
        self._admit()
        for seq in [s for s in self.running if s.wants_more]:  # the oldest first: the youngest are preempted
            while seq in self.running and not self.cache.extend(seq, seq.n_computed + 1):
                self._preempt(self.running[-1])
        budget = self.prefill_tokens
        decodes: list[Sequence] = []
        chunks: list[Chunk] = []
        for seq in self.running:
            n_left = self._n_prefill(seq) - seq.n_computed
            if not seq.wants_more:
                continue
            if n_left <= 0:
                decodes.append(seq)
            elif budget >= BLOCK:
                n = min(n_left, budget // BLOCK * BLOCK)
                if not self.cache.extend(seq, seq.n_computed + n):
                    n = min(n_left, BLOCK)  # the block of the next token is there already
                chunks.append(Chunk(seq, seq.n_computed, n))
                budget -= n
        return decodes, chunks

    def draft(self, decodes: list[Sequence], chunks: list[Chunk]) -> list[int]:
        """Return tokens that may follow in this step, with room for them in the cache: none unless one row decodes."""
        if not self.may_draft or chunks or len(decodes) != 1:
            return []
        seq = decodes[0]
        most = seq.params.max_new_tokens - len(seq.out) - 1  # the step samples one token more than it has drafts
        if most < 1 or not seq.may_draft or seq.n_computed + 1 != seq.n_tokens:
            return []
        drafts = self._lookup_of(seq).draft(seq, min(most, self.speculate_tokens))
        return drafts if self.cache.extend(seq, seq.n_tokens + len(drafts)) else []

    def accept(self, seq: Sequence, n_drafted: int, n_accepted: int) -> None:
        """Count the accepted drafts as computed: they are in the cache like any token. The others are overwritten."""
        seq.n_computed += n_accepted
        seq.n_drafted += n_drafted
        seq.n_accepted += n_accepted
        self._lookup_of(seq).accepted(n_accepted)

    def recompute(self, seq: Sequence) -> None:
        """Forget all that is computed of a sequence and compute it again, without drafts from now on."""
        seq.may_draft = False
        self.cache.zero(seq)
        self._preempt(seq)

    def _lookup_of(self, seq: Sequence) -> PromptLookup:
        """Return the index of the sequence that runs alone; the last one's makes room for it."""
        if self._lookup is None or self._lookup[0] is not seq:
            self._lookup = seq, PromptLookup(self.speculate_tokens)
        return self._lookup[1]

    def advance(self, decodes: list[Sequence], chunks: list[Chunk]) -> None:
        """Note that the step was computed."""
        for seq in decodes:
            seq.n_computed += 1
        for chunk in chunks:
            chunk.seq.n_computed += chunk.n
            self.cache.register(chunk.seq)

    def remove_finished(self) -> None:
        """Drop sequences that finished, were cancelled or passed their deadline, and free their memory."""
        ended = [seq for seq in (*self.running, *self.waiting) if seq.expire()]
        if not ended:
            return
        for seq in self.running:
            if seq.finish_reason is not None:
                self.cache.release(seq)
        self.running = [seq for seq in self.running if seq.finish_reason is None]
        self.waiting = deque(seq for seq in self.waiting if seq.finish_reason is None)
        if self._lookup is not None and self._lookup[0].finish_reason is not None:
            self._lookup = None

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_rows:
            seq = self.waiting[0]
            if self._prefix_is_coming(seq) or not self.cache.acquire(seq):
                return
            self.waiting.popleft()
            seq.timings.admitted = seq.timings.admitted or time.monotonic()
            self.running.append(seq)

    def _prefix_is_coming(self, seq: Sequence) -> bool:
        """Whether a running prompt will compute blocks that `seq` can then reuse (the same prompt several times)."""
        keys = reusable_keys(seq)
        if not keys:
            return False
        n_now = self.cache.matched(seq)
        for other in self.running:
            if other.n_computed < other.n_prompt and len(keys) > n_now and keys[n_now] in other.block_keys:
                return True
        return False

    def _n_prefill(self, seq: Sequence) -> int:
        """Return how many tokens are computed in chunks: the prompt, and after a preemption what was generated too."""
        return seq.n_prompt if self.exact_resume or not seq.out else max(seq.n_prompt, seq.n_tokens - 1)

    def _preempt(self, seq: Sequence) -> None:
        self.n_preemptions += 1
        seq.n_preempted += 1
        self.running.remove(seq)
        self.cache.release(seq)
        seq.n_computed = 0
        self.waiting.appendleft(seq)
