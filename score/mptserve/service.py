"""The way of a request, on one screen: bytes, request, token ids, engine, text, answer.

Servers turn HTTP into `Service.generate` and its Answer back into HTTP; nothing else. `Service` waits in the caller's
thread, `AsyncService` (async_service.py) in an event loop; `BaseService` is what they share.
"""

import json
import logging
import queue
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mptserve.engine import Engine, Job, SamplingParams, Sequence, TokenQueue, TokenSink
from mptserve.engine.checkpoint.config import read_config
from mptserve.engine.checkpoint.finding import find_checkpoint
from mptserve.engine.sampling import derived_seed
from mptserve.engine.start import EngineOptions, start_engine
from mptserve.errors import (
    ContentBlocked,
    ContextTooLong,
    DeadlineExceeded,
    GenerationFailed,
    ScoringError,
    TooLarge,
    UnsupportedModel,
)
from mptserve.metrics import Metrics
from mptserve.prompt import ChatPrompt, PromptWriter
from mptserve.repetition import RepetitionGuard
from mptserve.request import GenerateRequest, PromptRequest, RequestParser
from mptserve.response import KEEP_ALIVE, Result, answer, details, event, headers, timings_ms
from mptserve.safety import Verdict, content_safety
from mptserve.settings import Settings
from mptserve.streaming import RunningSequence, StreamState, Submission, TextDelta, prompt_texts, text_stream
from mptserve.tokenizer import TextStream, Tokenizer

log = logging.getLogger(__name__)

StreamItem = TextDelta | list[Result] | None
"""What a stream yields: text; None after KEEP_ALIVE_S of silence; last the results, without texts."""

KEEP_ALIVE_S = 1.0
"""Silence in a stream after which a comment is sent."""


@dataclass(frozen=True)
class Answer:
    """What a server sends back: a whole body, or server-sent events as they come.

    cancel: call it when the reader is gone, whether or not `events` was read.
    """

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: Iterator[str] | AsyncGenerator[str, None] | None = None
    cancel: Callable[[], None] = lambda: None


class BaseService:
    """A tokenizer and an engine, and all that a request needs of them which does not wait."""

    def __init__(self, settings: Settings, on_failure: Callable[[str], None] = lambda _: None) -> None:
        """Load the model. Raises StartupError's children, saying what to change."""
        self.settings, self.metrics = settings, Metrics()
        self.parser = RequestParser(settings)
        checkpoint = find_checkpoint(Path(settings.model_dir))
        self.tokenizer = Tokenizer(checkpoint.tokenizer)
        self.started_at = int(time.time())
        self.model_name = settings.model_name or checkpoint.folder.name
        config = read_config(checkpoint.folder)
        if self.tokenizer.n_tokens > config.vocab_size:
            raise UnsupportedModel(
                f"{checkpoint.tokenizer} has {self.tokenizer.n_tokens} tokens, but the model's vocab_size is "
                f"{config.vocab_size}: they do not belong together"
            )
        self.end_of_text = config.eos_token_ids[0]
        folders = list(dict.fromkeys([checkpoint.folder, checkpoint.tokenizer.parent]))
        self.prompts = PromptWriter(folders, self.tokenizer, settings.chat_template)
        self.safety = content_safety(settings)
        start: Callable[..., Engine] = start_engine
        if settings.engine == "transformers":
            from mptserve.engine.transformers_engine import start_transformers_engine as start
        self.engine = start(
            checkpoint.folder,
            config,
            self.tokenizer.n_tokens,
            engine_options(settings),
            on_finish=self.metrics.sequence,
            on_failure=on_failure,
        )
        self.metrics.watch(self.engine.stats)

    @property
    def problem(self) -> str | None:
        """Return why new requests should go elsewhere, or None."""
        if self.engine.failure is not None:
            return f"engine failed: {self.engine.failure}"
        return "draining" if self.engine.draining else None

    def answer(self, request: GenerateRequest, results: list[Result]) -> Answer:
        """Return the answer made of finished sequences."""
        payload = json.dumps(answer(request, results, self.tokenizer), ensure_ascii=False).encode("utf-8")
        return Answer(200, headers(results), payload)

    def failure(self, request_id: str) -> GenerationFailed:
        """Log the exception that is being handled, a mistake of ours, and return what its caller may know of it."""
        log.exception("request failed", extra={"numbers": {"request_id": request_id}})
        return GenerationFailed("unexpected; the log has the reason")

    def refuse(self, exc: ScoringError, request_id: str, started: float) -> Answer:
        """Return the answer for an error, counted and logged. started: on the monotonic clock."""
        self.log_error(exc, request_id, started)
        extra = {} if exc.retry_after_s is None else {"Retry-After": str(exc.retry_after_s)}
        return Answer(exc.status, extra, json.dumps(exc.as_json(request_id)).encode())

    def _submit(self, request: GenerateRequest, started: float, tokens: TokenSink | None) -> Submission:
        """Encode every prompt and hand all sequences to the engine, or none; raises ScoringError's children.

        started: on the monotonic clock; the deadline counts from it.  tokens: where the tokens go.
        """
        deadline = started + self.settings.deadline_ms / 1000
        jobs: list[Job] = []
        places: list[tuple[int, int, tuple[str, ...], bool, Verdict | None]] = []
        for i, prompt in enumerate(request.prompts):
            ids, params = self._encode(prompt)
            verdict = self._judge_prompt(prompt)
            template = self.prompts.template(prompt.prompt) if isinstance(prompt.prompt, ChatPrompt) else None
            stop = tuple(dict.fromkeys(request.stop + (template.stop if template else ())))
            for number in range(request.num_return_sequences):
                sampling = replace(params, seed=derived_seed(params.seed, number))
                stop_ids = template.stop_ids if template else ()
                check = self._stop_check(stop, stop_ids, request)
                jobs.append(Job(ids, sampling, deadline, check, tokens))
                places.append((i, number, stop, template is not None, verdict))
        generations = self.engine.submit_all(jobs)
        running = [
            RunningSequence(i, number, generation, stop, chat, verdict)
            for (i, number, stop, chat, verdict), generation in zip(places, generations, strict=True)
        ]
        return Submission(request, running, tokens)

    def encode(self, prompt: "str | ChatPrompt | tuple[int, ...]") -> list[int]:
        """Return a prompt's token ids. Control tokens count in a plain prompt, and never in what a message says."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.prompts.encode(prompt) if isinstance(prompt, ChatPrompt) else list(prompt)

    def _encode(self, prompt: PromptRequest) -> tuple[list[int], SamplingParams]:
        """Return the prompt's token ids, cut from the left when asked, and its parameters, cut to what fits when
        asked; an empty prompt becomes the end-of-text token, which separates documents in training."""
        limit, params = self.engine.max_tokens, prompt.sampling
        n_chars = len(prompt_texts(prompt.prompt, self.tokenizer))
        if prompt.truncate is None and n_chars > limit * self.tokenizer.longest_token:
            raise TooLarge(
                f"`{prompt.pointer}` must fit the context of {limit} tokens, got {n_chars} characters",
                field=prompt.pointer,
                code="prompt_too_large",
            )
        ids = self.encode(prompt.prompt) or [self.end_of_text]
        if prompt.truncate is not None:
            ids = ids[-prompt.truncate :]
        n_new = params.max_new_tokens
        if prompt.fit:
            n_new = max(min(n_new, limit - len(ids)), 1)
        if len(ids) + n_new > limit:
            raise ContextTooLong(
                f"`{prompt.pointer}` has {len(ids)} tokens and asks for {n_new} more, {len(ids) + n_new} together; "
                f"the context is {limit}. Shorten it, lower `max_new_tokens` or set `truncate`",
                field=prompt.pointer,
            )
        return ids, replace(params, max_new_tokens=n_new, min_new_tokens=min(params.min_new_tokens, n_new))

    def _judge_prompt(self, prompt: PromptRequest) -> Verdict | None:
        if self.safety is None:
            return None
        verdict = self.safety.judge(prompt_texts(prompt.prompt, self.tokenizer))
        if verdict.blocked:
            found = ", ".join(f"{name} {severity}" for name, severity in verdict.severities.items() if severity)
            raise ContentBlocked(
                f"`{prompt.pointer}` was blocked by content safety (severities: {found})", field=prompt.pointer
            )
        return verdict

    def _stop_check(
        self, stop: tuple[str, ...], end_ids: tuple[int, ...], request: GenerateRequest
    ) -> Callable[[int], str | None] | None:
        """Return a function that tells the engine, token by token, whether a sequence ends, and why.

        end_ids: tokens that end a turn in the chat template.
        """
        stop_ids, repetitions = request.stop_token_ids, request.repetition_guard
        if not stop and not end_ids and not stop_ids and not repetitions:
            return None
        text = TextStream(self.tokenizer, stop) if stop else None
        guard = RepetitionGuard(repetitions) if repetitions else None

        def stopped(token_id: int) -> str | None:
            if token_id in end_ids:
                return "eos"
            if token_id in stop_ids:
                return "stop"
            if text is not None:
                text.push(token_id)
                if text.stopped:
                    return "stop"
            return "repetition" if guard is not None and guard.repeats(token_id) else None

        return stopped

    def _results(self, submission: Submission) -> list[Result]:
        """Return every sequence's result in order, all of them finished. Raises DeadlineExceeded."""
        results = [self._result(submission.request, r) for r in submission.running]
        self._check_deadline(results)
        return results

    def _result(self, request: GenerateRequest, running: RunningSequence) -> Result:
        text = text_stream(running, self.tokenizer)
        seq = running.sequence
        generated = text.push(*(t.id for t in seq.out if t.id not in seq.eos_ids)) + text.finish()
        prompt = request.prompts[running.prompt].prompt if request.return_full_text else ""
        result = self._without_text(running, None if self.safety is None else self.safety.judge(generated))
        if result.finish_reason == "content_filter":
            generated = ""
        return replace(result, text=(prompt if isinstance(prompt, str) else "") + generated)

    def _streamed_results(self, submission: Submission, state: StreamState) -> list[Result]:
        """Return the results of a finished stream, without texts. Raises DeadlineExceeded where that is an error."""
        results = [self._without_text(r, state.verdict(r)) for r in submission.running]
        self._check_deadline(results)
        return results

    def _without_text(self, running: RunningSequence, verdict: Verdict | None) -> Result:
        """Return the result of a finished sequence, without its text. verdict: on what was generated."""
        verdicts = {"prompt": running.verdict, "answer": verdict}
        known = {what: v for what, v in verdicts.items() if v is not None}
        return Result(running.prompt, running.number, "", running.sequence, known)

    def _check_deadline(self, results: list[Result]) -> None:
        late = [r for r in results if r.sequence.finish_reason == "deadline"]
        if late and self.settings.deadline_action == "error":
            raise DeadlineExceeded(
                f"{len(late)} of {len(results)} sequences were not done after {self.settings.deadline_ms} ms"
            )

    def log_error(self, exc: ScoringError, request_id: str, started: float) -> None:
        """Count and log a request that was refused, or failed in the middle of its stream."""
        self._log_request(exc.status, exc.code, request_id, started, [])

    def log_results(self, results: list[Result], request_id: str, started: float) -> None:
        """Count and log a request whose sequences have ended; the caller may have been gone before."""
        sequences = [r.sequence for r in results]
        gone = any(r.finish_reason == "cancelled" for r in results)
        self._log_request(499 if gone else 200, "client_gone" if gone else "", request_id, started, sequences)

    def log_gone(self, submission: Submission, request_id: str, started: float) -> None:
        """Count and log a request whose caller went away."""
        self._log_request(499, "client_gone", request_id, started, [r.sequence for r in submission.running])

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


class Service(BaseService):
    """Answers requests from any number of threads, each of which waits for its own."""

    def generate(self, body: bytes, request_id: str, alive: Callable[[], bool] | None = None) -> Answer:
        """Answer one request to /score; never raises for what a caller sends.

        request_id: goes into errors and the log.  alive: asked now and then whether the caller still listens.
        """
        started = time.monotonic()
        try:
            submission = self.submit(self.parser.parse(body), started)
            if submission.request.stream:
                events = self._events(submission, request_id, started)
                return Answer(200, {}, events=events, cancel=submission.cancel)
            results = self.results(submission, alive)
            self.log_results(results, request_id, started)
            return self.answer(submission.request, results)
        except ScoringError as exc:
            return self.refuse(exc, request_id, started)
        except Exception:
            return self.refuse(self.failure(request_id), request_id, started)

    def submit(self, request: GenerateRequest, started: float, tokens: TokenSink | None = None) -> Submission:
        """Hand a request to the engine, all of its sequences or none; raises ScoringError's children.

        started: on the monotonic clock; the deadline counts from it.  tokens: where tokens go; without, those of a
        streamed request go to a queue that `stream` reads. Continue with `results`, or with `stream`.
        """
        if tokens is None and request.stream:
            tokens = TokenQueue()
        return self._submit(request, started, tokens)

    def results(self, submission: Submission, alive: Callable[[], bool] | None = None) -> list[Result]:
        """Wait for every sequence and return the results in order. If one fails, the others end too.

        alive: as in `generate`; once it says no, all sequences are cancelled. Raises the error that ended a sequence,
        and DeadlineExceeded.
        """

        def still_alive() -> bool:
            if alive is None or alive():
                return True
            submission.cancel()
            return False

        try:
            for r in submission.running:
                r.generation.result(still_alive if alive else None)
        except ScoringError:
            submission.cancel()
            raise
        return self._results(submission)

    def stream(self, submission: Submission) -> Generator[StreamItem, None, None]:
        """Yield the text of a streamed request as it comes, and last the results; raises as `results` does.

        Closing it, as a server does when the reader is gone, cancels every sequence.
        """
        tokens = submission.tokens
        assert isinstance(tokens, queue.SimpleQueue)
        state = StreamState(submission, self.tokenizer)
        try:
            yield from state.prompts()
            while state.n_left:
                try:
                    item = tokens.get(timeout=KEEP_ALIVE_S)
                except queue.Empty:
                    yield None
                    continue
                delta = state.take(*item)
                if delta is not None and self.safety is not None and (delta := state.portion(delta)) is not None:
                    delta = state.judged(delta, self.safety.judge(state.context(delta)))
                if delta is not None:
                    yield delta
            yield self._streamed_results(submission, state)
        finally:
            submission.cancel()

    def _events(self, submission: Submission, request_id: str, started: float) -> Iterator[str]:
        """Yield the stream as server-sent events, counted and logged."""
        logged = False
        try:
            for item in self.stream(submission):
                if isinstance(item, list):
                    self.log_results(item, request_id, started)
                    logged = True
                yield score_event(item, self.tokenizer)
        except ScoringError as exc:
            self.log_error(exc, request_id, started)
            logged = True
            yield event("error", exc.as_json(request_id))
        except Exception:
            failure = self.failure(request_id)
            self.log_error(failure, request_id, started)
            logged = True
            yield event("error", failure.as_json(request_id))
        finally:
            submission.cancel()
            if not logged:
                self.log_gone(submission, request_id, started)


def score_event(item: StreamItem, tokenizer: Tokenizer) -> str:
    """Return one item of a stream as /score sends it: a comment, an event `text`, or last `done` with the details."""
    if item is None:
        return KEEP_ALIVE
    if isinstance(item, TextDelta):
        return event("text", {"prompt": item.running.prompt, "sequence": item.running.number, "text": item.text})
    return event(
        "done", {"results": [{"prompt": r.prompt, "sequence": r.number} | details(r, tokenizer) for r in item]}
    )


def engine_options(settings: Settings) -> EngineOptions:
    """Return the settings that concern the engine."""
    return EngineOptions(
        settings.device,
        settings.dtype,
        settings.quant,
        settings.kv_dtype,
        settings.max_seq_len,
        settings.kv_cache_gb,
        settings.max_rows,
        settings.prefill_tokens,
        settings.queue_limit,
        settings.cpu_threads,
        settings.speculate_tokens,
    )
