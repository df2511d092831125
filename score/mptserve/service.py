"""The way of a request, on one screen: bytes, request, token ids, engine, text, answer.

Doors (score.py and its siblings) turn HTTP into `Service.generate` and its Answer back into HTTP; nothing else.
"""

import json
import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mptserve.engine import Engine, Generation, Job, Sequence, TokenQueue
from mptserve.engine.checkpoint import find_checkpoint
from mptserve.engine.config import read_config
from mptserve.engine.sampling import derived_seed
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.errors import (
    ContextTooLong,
    DeadlineExceeded,
    GenerationFailed,
    ScoringError,
    TooLarge,
    UnsupportedModel,
)
from mptserve.metrics import Metrics
from mptserve.request import GenerateRequest, PromptRequest, RequestParser
from mptserve.response import KEEP_ALIVE, Result, answer, details, event, headers, timings_ms
from mptserve.settings import Settings
from mptserve.tokenizer import TextStream, Tokenizer

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 1.0
"""Silence in a stream after which a comment is sent."""


@dataclass(frozen=True)
class Answer:
    """What a door sends back: a whole body, or events while they come. Close `events` when the reader is gone."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: Iterator[str] | None = None


@dataclass(frozen=True)
class Running:
    """One sequence on its way: sequence `number` of prompt `prompt` of its request."""

    prompt: int
    number: int
    generation: Generation


@dataclass(frozen=True)
class Piece:
    """Text that a streamed sequence goes on with: whole characters, nothing of a stop string."""

    running: Running
    text: str


class Service:
    """A tokenizer and an engine that answer requests, from any number of threads."""

    def __init__(self, settings: Settings, on_failure: Callable[[str], None] = lambda _: None) -> None:
        """Load the model. Raises StartupError's children, saying what to change."""
        self.settings, self.metrics = settings, Metrics()
        self.parser = RequestParser(settings)
        checkpoint = find_checkpoint(Path(settings.model_dir))
        self.tokenizer = Tokenizer(checkpoint.tokenizer)
        config = read_config(checkpoint.folder)
        if self.tokenizer.n_tokens > config.vocab_size:
            raise UnsupportedModel(
                f"{checkpoint.tokenizer} has {self.tokenizer.n_tokens} tokens, but the model's vocab_size is "
                f"{config.vocab_size}: they do not belong together"
            )
        self.end_of_text = config.eos_token_ids[0]
        options = EngineOptions(
            settings.device,
            settings.dtype,
            settings.max_seq_len,
            settings.kv_cache_gb,
            settings.max_rows,
            settings.prefill_tokens,
            settings.queue_limit,
            settings.cpu_threads,
        )
        start: Callable[..., Engine] = start_engine
        if settings.engine == "transformers":
            from mptserve.engine.reference import start_reference_engine as start
        self.engine = start(
            checkpoint.folder,
            config,
            self.tokenizer.n_tokens,
            options,
            on_finish=self.metrics.sequence,
            on_failure=on_failure,
        )
        self.metrics.watch(self.engine.stats)

    def generate(self, body: bytes, request_id: str, alive: Callable[[], bool] | None = None) -> Answer:
        """Answer one request; never raises for what a caller sends.

        request_id: goes into errors and the log.  alive: asked now and then whether the caller still listens.
        """
        started = time.monotonic()
        try:
            request = self.parser.parse(body)
            running = self.submit(request, started)
            if request.stream:
                return Answer(200, {}, events=self._events(request, running, request_id, started))
            results = self.results(request, running, alive)
            payload = json.dumps(answer(request, results, self.tokenizer), ensure_ascii=False).encode("utf-8")
        except ScoringError as exc:
            return self.refuse(exc, request_id, started)
        except Exception:
            log.exception("request failed", extra={"numbers": {"request_id": request_id}})
            return self.refuse(GenerationFailed("unexpected; the log has the reason"), request_id, started)
        sequences = [r.sequence for r in results]
        gone = any(seq.finish_reason == "cancelled" for seq in sequences)
        self._log_request(499 if gone else 200, "client_gone" if gone else "", request_id, started, sequences)
        return Answer(200, headers(results), payload)

    def refuse(self, exc: ScoringError, request_id: str, started: float) -> Answer:
        """Return the answer that an error is, counted and logged; started: on the monotonic clock."""
        self._log_request(exc.status, exc.code, request_id, started, [])
        extra = {} if exc.retry_after_s is None else {"Retry-After": str(exc.retry_after_s)}
        return Answer(exc.status, extra, json.dumps(exc.as_json(request_id)).encode())

    def submit(self, request: GenerateRequest, started: float, events: TokenQueue | None = None) -> list[Running]:
        """Encode every prompt and hand all sequences to the engine, or none; raises ScoringError's children.

        started: on the monotonic clock; the deadline counts from it.  events: where tokens go as they come, for who
        waits for many requests at once.  Go on with `results`, or `stream` when the request asks for one.
        """
        deadline = started + self.settings.deadline_ms / 1000
        if request.stream:
            events = queue.SimpleQueue()
        jobs: list[Job] = []
        places: list[tuple[int, int]] = []
        for i, prompt in enumerate(request.prompts):
            ids = self._encode(prompt)
            for number in range(request.num_return_sequences):
                sampling = replace(prompt.sampling, seed=derived_seed(prompt.sampling.seed, number))
                jobs.append(Job(ids, sampling, deadline, self._stop_check(request.stop), events))
                places.append((i, number))
        generations = self.engine.submit_all(jobs)
        return [Running(i, number, g) for (i, number), g in zip(places, generations, strict=True)]

    def _encode(self, prompt: PromptRequest) -> list[int]:
        """Return the prompt's token ids, cut from the left when asked; an empty prompt becomes the end-of-text token,
        which separates documents in training."""
        limit, n_new = self.engine.max_tokens, prompt.sampling.max_new_tokens
        if prompt.truncate is None and len(prompt.prompt) > limit * self.tokenizer.longest_token:
            raise TooLarge(
                f"`{prompt.pointer}` must fit the context of {limit} tokens, got {len(prompt.prompt)} characters",
                field=prompt.pointer,
                code="prompt_too_large",
            )
        ids = self.tokenizer.encode(prompt.prompt) or [self.end_of_text]
        if prompt.truncate is not None:
            ids = ids[-prompt.truncate :]
        if len(ids) + n_new > limit:
            raise ContextTooLong(
                f"`{prompt.pointer}` has {len(ids)} tokens and asks for {n_new} more, {len(ids) + n_new} together; "
                f"the context is {limit}. Shorten it, lower `max_new_tokens` or set `truncate`",
                field=prompt.pointer,
            )
        return ids

    def _stop_check(self, stop: tuple[str, ...]) -> Callable[[int], bool] | None:
        """Return what tells the engine, token by token, that a stop string is complete."""
        if not stop:
            return None
        text = TextStream(self.tokenizer, stop)

        def stopped(token_id: int) -> bool:
            text.push(token_id)
            return text.stopped

        return stopped

    def results(
        self, request: GenerateRequest, running: list[Running], alive: Callable[[], bool] | None = None
    ) -> list[Result]:
        """Return every sequence's result in order; if one fails, or the deadline is an error, the others end too."""

        def still_alive() -> bool:
            if alive is None or alive():
                return True
            for r in running:
                r.generation.cancel()
            return False

        try:
            results = [self._result(request, r, r.generation.result(still_alive if alive else None)) for r in running]
        except ScoringError:
            for r in running:
                r.generation.cancel()
            raise
        self._check_deadline(results)
        return results

    def _result(self, request: GenerateRequest, running: Running, seq: Sequence) -> Result:
        text = TextStream(self.tokenizer, request.stop)
        generated = "".join([*(text.push(t.id) for t in seq.out if t.id not in seq.eos_ids), text.finish()])
        prompt = request.prompts[running.prompt].prompt if request.return_full_text else ""
        return Result(running.prompt, running.number, prompt + generated, seq)

    def _check_deadline(self, results: list[Result]) -> None:
        late = [r for r in results if r.sequence.finish_reason == "deadline"]
        if late and self.settings.deadline_action == "error":
            raise DeadlineExceeded(
                f"{len(late)} of {len(results)} sequences were not done after {self.settings.deadline_ms} ms"
            )

    def stream(
        self, request: GenerateRequest, running: list[Running]
    ) -> Generator[Piece | list[Result] | None, None, None]:
        """Yield pieces of text as they come, None after KEEP_ALIVE_S of silence, and last the results, without texts.

        Raises as `results` does. Closing it, as a server does when the reader is gone, cancels every sequence.
        """
        texts = {r.generation.sequence: (r, TextStream(self.tokenizer, request.stop)) for r in running}
        events = running[0].generation.sequence.events
        assert events is not None
        try:
            if request.return_full_text:
                for r in running:
                    yield Piece(r, request.prompts[r.prompt].prompt)
            left = len(running)
            while left:
                try:
                    seq, token = events.get(timeout=KEEP_ALIVE_S)
                except queue.Empty:
                    yield None
                    continue
                r, text = texts[seq]
                if token is None:
                    left -= 1
                    if seq.error is not None:
                        raise seq.error
                if token is not None and token.id in seq.eos_ids:
                    continue
                if piece := text.finish() if token is None else text.push(token.id):
                    yield Piece(r, piece)
            results = [Result(r.prompt, r.number, "", r.generation.sequence) for r in running]
            self._check_deadline(results)
            yield results
        finally:
            for r in running:
                r.generation.cancel()

    def _events(
        self, request: GenerateRequest, running: list[Running], request_id: str, started: float
    ) -> Iterator[str]:
        """Yield the stream as server-sent events: `text` pieces, then `done` with the details, or `error`."""
        stream = self.stream(request, running)
        try:
            for item in stream:
                if item is None:
                    yield KEEP_ALIVE
                elif isinstance(item, Piece):
                    place = {"prompt": item.running.prompt, "sequence": item.running.number}
                    yield event("text", place | {"text": item.text})
                else:
                    self._log_request(200, "", request_id, started, [r.sequence for r in item])
                    ended = [{"prompt": r.prompt, "sequence": r.number} | details(r, self.tokenizer) for r in item]
                    yield event("done", {"results": ended})
        except ScoringError as exc:
            self._log_request(exc.status, exc.code, request_id, started, [])
            yield event("error", exc.as_json(request_id))
        except GeneratorExit:
            self._log_request(499, "client_gone", request_id, started, [r.generation.sequence for r in running])
            raise
        finally:
            stream.close()

    def _log_request(self, status: int, code: str, request_id: str, started: float, sequences: list[Sequence]) -> None:
        seconds = time.monotonic() - started
        self.metrics.request(status, code, seconds)
        numbers: dict[str, object] = {"request_id": request_id, "status": status, "code": code, "seconds": seconds}
        if sequences:
            numbers |= {
                "sequences": len(sequences),
                "prompt_tokens": sum(s.n_prompt for s in sequences),
                "generated_tokens": sum(len(s.out) for s in sequences),
                "reused_tokens": sum(s.n_reused for s in sequences),
                "finish_reasons": dict(Counter(s.finish_reason for s in sequences)),
                "first_token_ms": min(timings_ms(s).get("first_token", 0.0) for s in sequences),
            }
        log.info("request", extra={"numbers": numbers})
