"""One sequence on its way through the engine: what was asked, what is computed, what came out."""

import hashlib
import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mptserve.errors import ScoringError

BLOCK = 32
"""Tokens in one block of the KV cache; also the rows of one prefill tile (see attention.py)."""


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled. Ranges are checked in request.py, not here.

    temperature: 0 picks the most likely token and ignores the filters and the seed.
    top_k: 0 is off.  top_p: 1 is off.  min_p: 0 is off.
    repetition_penalty: 1 is off; over prompt and generated tokens (CTRL, arXiv 1909.05858), like `transformers`.
    presence_penalty, frequency_penalty: 0 is off; over generated tokens only, like OpenAI's API.
    logprobs: None, or how many of the most likely tokens to report beside the chosen one.
    logit_bias: (token id, what is added to its logit), before temperature; ids below the vocabulary's size.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `logprob` and `top` (id, logprob) come only when asked for.

    They are of the model's own distribution, before penalties, temperature and filters.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Timings:
    """Moments of a sequence on the monotonic clock, in seconds; 0 where not reached."""

    submitted: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(eq=False)
class Sequence:
    """The engine's record of one sequence. Owned by the engine's thread once submitted.

    n_computed: tokens whose keys and values are in the cache.  n_pending: tokens that a step has sampled, but that have
    not been read back from the device yet.  n_drafted, n_accepted: draft tokens of prompt lookup, and those accepted.
    may_draft: whether it may have drafts.  block_keys: chained digests of the prompt's full blocks.  events: where
    tokens go as they come, then None; several sequences may share one queue.
    """

    prompt: list[int]
    params: SamplingParams
    eos_ids: tuple[int, ...]
    stop_check: Callable[[int], str | None] | None
    deadline: float | None
    on_finish: Callable[["Sequence"], None]
    events: "TokenSink | None"
    out: list[Token] = field(default_factory=list)
    n_computed: int = 0
    n_pending: int = 0
    n_reused: int = 0
    n_preempted: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    may_draft: bool = True
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    cancelled: bool = False
    finish_reason: str | None = None
    error: ScoringError | None = None
    timings: Timings = field(default_factory=Timings)
    done: threading.Event = field(default_factory=threading.Event)
    seen: Tensor | None = None
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        self.timings.submitted = time.monotonic()
        self.block_keys = block_keys(self.prompt)

    @property
    def n_prompt(self) -> int:
        return len(self.prompt)

    @property
    def n_tokens(self) -> int:
        """Prompt and generated tokens together."""
        return len(self.prompt) + len(self.out)

    @property
    def wants_more(self) -> bool:
        """Whether another token may follow those drawn so far."""
        return self.finish_reason is None and len(self.out) + self.n_pending < self.params.max_new_tokens

    def token(self, position: int) -> int:
        n = len(self.prompt)
        return self.prompt[position] if position < n else self.out[position - n].id

    def append(self, token: Token) -> None:
        """Take one generated token, pass it to the reader, and finish where it ends the sequence."""
        self.out.append(token)
        if self.seen is not None and self.counts is not None:
            self.seen[token.id] = True
            self.counts[token.id] += 1
        if len(self.out) == 1:
            self.timings.first_token = time.monotonic()
        if self.events is not None:
            self.events.put((self, token))
        if token.id in self.eos_ids and not self.params.ignore_eos:
            self.finish("eos")
        elif self.stop_check is not None and (reason := self.stop_check(token.id)) is not None:
            self.finish(reason)
        elif len(self.out) >= self.params.max_new_tokens:
            self.finish("length")

    def expire(self) -> bool:
        """Finish the sequence if it was cancelled or is past its deadline; return whether it has finished."""
        if self.finish_reason is None and self.cancelled:
            self.finish("cancelled")
        elif self.finish_reason is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.finish("deadline")
        return self.finish_reason is not None

    def finish(self, reason: str, error: ScoringError | None = None) -> None:
        """End the sequence once; later calls do nothing."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.timings.finished = time.monotonic()
            self.seen = self.counts = None
            self.on_finish(self)
            self.done.set()
            if self.events is not None:
                self.events.put((self, None))


class TokenSink(Protocol):
    """Where the engine's thread puts tokens as they come, and None after the last; it must not block or raise."""

    def put(self, item: tuple[Sequence, Token | None], /) -> None: ...


TokenQueue = queue.SimpleQueue[tuple[Sequence, Token | None]]
"""The sink of a reader that is a thread."""


class Generation:
    """A caller's handle on a submitted sequence: iterate it for tokens, or wait for the whole."""

    def __init__(self, sequence: Sequence, wake: Callable[[], None]) -> None:
        self.sequence, self._wake = sequence, wake

    def __iter__(self) -> Iterator[Token]:
        """Yield tokens as they come, for a sequence that was given a queue of its own. Raises like `result`."""
        events = self.sequence.events
        assert isinstance(events, queue.SimpleQueue), "submitted without a queue"
        while (token := events.get()[1]) is not None:
            yield token
        self._raise()

    def result(self, alive: Callable[[], bool] | None = None, poll_s: float = 0.5) -> Sequence:
        """Return the finished sequence.

        alive: asked every `poll_s` seconds; once it says False the sequence is cancelled.
        Raises the ScoringError that ended the sequence, if one did.
        """
        while not self.sequence.done.wait(None if alive is None else poll_s):
            if alive is not None and not alive():
                self.cancel()
                alive = None
        self._raise()
        return self.sequence

    def cancel(self) -> None:
        """End the sequence within one step; harmless when it has ended."""
        self.sequence.cancelled = True
        self._wake()

    def _raise(self) -> None:
        if self.sequence.error is not None:
            raise self.sequence.error


def block_keys(prompt: Seq[int]) -> list[bytes]:
    """Return a digest for each full block of `prompt` that names the block and everything before it.

    blake2b rather than a fast hash: equal digests mean shared keys and values, so nobody may be able to forge one.
    """
    keys: list[bytes] = []
    ids = array("I", prompt).tobytes()
    size = BLOCK * array("I").itemsize
    for start in range(0, len(ids) - size + 1, size):
        previous = keys[-1] if keys else b""
        keys.append(hashlib.blake2b(previous + ids[start : start + size], digest_size=16).digest())
    return keys


def penalty_state(seq: Sequence, n_vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (seen [V] bool: in prompt or output, counts [V] float32: times generated), made on first use."""
    if seq.seen is None or seq.counts is None:
        seq.seen = torch.zeros(n_vocab, dtype=torch.bool, device=device)
        seq.counts = torch.zeros(n_vocab, dtype=torch.float32, device=device)
        ids = [t for t in (*seq.prompt, *(t.id for t in seq.out)) if t < n_vocab]
        seq.seen[torch.tensor(ids, dtype=torch.long, device=device)] = True
        for token in seq.out:
            seq.counts[token.id] += 1
    return seq.seen, seq.counts
