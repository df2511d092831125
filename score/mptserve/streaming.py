"""A submitted request on its way to text: its sequences, and the text of them that a reader may see.

What is here does not wait: service.py waits in threads, async_service.py in an event loop.
"""

from dataclasses import dataclass, field, replace

from mptserve.engine import Generation, Sequence, Token, TokenSink
from mptserve.prompt import ChatPrompt
from mptserve.request import GenerateRequest
from mptserve.safety import Verdict
from mptserve.tokenizer import TextStream, Tokenizer

PORTION_CHARS = 240
"""How much of a stream waits for one verdict of content safety: a few sentences, so that it has something to judge."""
CONTEXT_CHARS = 1000
"""Text that was sent before is judged again together with the new."""


@dataclass(frozen=True)
class RunningSequence:
    """Sequence `number` of prompt `prompt` of a request, in the engine.

    stop: its stop strings, the template's too.  chat: whether the prompt is a conversation.  verdict: content safety's
    of its prompt.
    """

    prompt: int
    number: int
    generation: Generation
    stop: tuple[str, ...]
    chat: bool
    verdict: Verdict | None = None

    @property
    def sequence(self) -> Sequence:
        return self.generation.sequence


@dataclass(frozen=True)
class Submission:
    """A request that the engine has taken. tokens: where the tokens of its sequences go, if anywhere."""

    request: GenerateRequest
    running: list[RunningSequence]
    tokens: TokenSink | None = None

    def cancel(self) -> None:
        """End every sequence that has not ended within one step; harmless at any time, from any thread."""
        for r in self.running:
            if r.sequence.finish_reason is None:
                r.generation.cancel()


@dataclass(frozen=True)
class TextDelta:
    """Text that a streamed sequence continues with, and the tokens it came from.

    Whole characters, nothing of a stop string. Tokens whose text is held back come with a later delta.
    """

    running: RunningSequence
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass
class _SequenceState:
    """One sequence of a stream: what is held back of it, and what was sent."""

    running: RunningSequence
    text: TextStream
    held: str = ""
    tokens: list[Token] = field(default_factory=list)
    sent: str = ""
    verdict: Verdict | None = None


class StreamState:
    """Tokens of a streamed request in, text out. For one thread, or one event loop."""

    def __init__(self, submission: Submission, tokenizer: Tokenizer) -> None:
        self._request = submission.request
        self._states = {r.sequence: _SequenceState(r, text_stream(r, tokenizer)) for r in submission.running}
        self.n_left = len(self._states)

    def prompts(self) -> list[TextDelta]:
        """Return the text that comes before any token: the prompts, where the caller wants them back."""
        if not self._request.return_full_text:
            return []
        texts = [self._request.prompts[s.running.prompt].prompt for s in self._states.values()]
        pairs = zip(self._states.values(), texts, strict=True)
        return [TextDelta(s.running, text) for s, text in pairs if isinstance(text, str)]

    def take(self, seq: Sequence, token: Token | None) -> TextDelta | None:
        """Take what the engine says next of one sequence; return the text that this made certain, if any.

        Raises the ScoringError that ended the sequence, if one did.
        """
        state = self._states[seq]
        if token is None:
            self.n_left -= 1
            if seq.error is not None:
                raise seq.error
            text = state.text.finish()
        else:
            state.tokens.append(token)
            text = "" if token.id in seq.eos_ids else state.text.push(token.id)
        if not text and not (token is None and (state.tokens or state.held)):
            return None
        delta = TextDelta(state.running, text, tuple(state.tokens))
        state.tokens = []
        return delta

    def portion(self, delta: TextDelta) -> TextDelta | None:
        """Hold text back until there is enough of its sequence to judge; return all of that."""
        state = self._states[delta.running.sequence]
        if state.verdict is not None and state.verdict.blocked:
            return None
        state.held += delta.text
        state.tokens[:0] = delta.tokens
        if len(state.held) < PORTION_CHARS and delta.running.sequence.finish_reason is None:
            return None
        whole = replace(delta, text=state.held, tokens=tuple(state.tokens))
        state.held, state.tokens = "", []
        return whole

    def context(self, portion: TextDelta) -> str:
        """Return what is to be judged of a portion: with the end of what was sent before it."""
        return self._states[portion.running.sequence].sent[-CONTEXT_CHARS:] + portion.text

    def judged(self, portion: TextDelta, verdict: Verdict) -> TextDelta | None:
        """Note the verdict on a portion and return it, or end its sequence and return nothing."""
        state = self._states[portion.running.sequence]
        worst = {} if state.verdict is None else state.verdict.severities
        severities = {k: max(worst.get(k, 0), verdict.severities.get(k, 0)) for k in worst | verdict.severities}
        state.verdict = Verdict(verdict.blocked, severities)
        if verdict.blocked:
            portion.running.generation.cancel()
            return None
        state.sent += portion.text
        return portion

    def verdict(self, running: RunningSequence) -> Verdict | None:
        """Return content safety's verdict on what was generated so far, where it was asked."""
        return self._states[running.sequence].verdict


def text_stream(running: RunningSequence, tokenizer: Tokenizer) -> TextStream:
    """Return what turns the tokens of a sequence into its text."""
    return TextStream(tokenizer, running.stop, trim=running.chat)


def prompt_texts(prompt: "str | ChatPrompt | tuple[int, ...]", tokenizer: Tokenizer) -> str:
    """Return what people wrote of a prompt, for content safety to judge."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, ChatPrompt):
        return "\n".join(m.content for m in prompt.messages)
    return tokenizer.decode(list(prompt))
