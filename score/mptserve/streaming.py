"""Sequences on their way to text: what belongs to each, and the pieces that a reader may see of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mptserve.engine import Generation, Sequence, Token
from mptserve.prompt import ChatPrompt
from mptserve.request import GenerateRequest
from mptserve.safety import Verdict
from mptserve.tokenizer import TextStream, Tokenizer

PORTION_CHARS = 240
"""How much of a stream waits for one verdict of content safety: a few sentences, so that it has something to judge."""
CONTEXT_CHARS = 1000
"""What was shown before is judged again together with the new."""


@dataclass(frozen=True)
class Running:
    """One sequence on its way: sequence `number` of prompt `prompt` of its request.

    stop: its stop strings, the template's too.  verdict: content safety's of its prompt.
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
class Piece:
    """Text that a streamed sequence goes on with, and the tokens it came from.

    Whole characters, nothing of a stop string. Tokens whose text is held back come with a later piece.
    """

    running: Running
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass
class _Stream:
    """One sequence of a flow: what is held back of it, and what was shown."""

    running: Running
    text: TextStream
    held: str = ""
    tokens: list[Token] = field(default_factory=list)
    shown: str = ""
    verdict: Verdict | None = None


class Flow:
    """Tokens of a streamed request in, pieces of text out. For one thread, or one event loop."""

    def __init__(self, request: GenerateRequest, running: Iterable[Running], tokenizer: Tokenizer) -> None:
        self._request = request
        self._streams = {r.sequence: _Stream(r, text_stream(r, tokenizer)) for r in running}
        self.left = len(self._streams)

    def prompts(self) -> list[Piece]:
        """Return the pieces that come before any token: the prompts, where the caller wants them back."""
        if not self._request.return_full_text:
            return []
        texts = [self._request.prompts[s.running.prompt].prompt for s in self._streams.values()]
        pieces = zip(self._streams.values(), texts, strict=True)
        return [Piece(s.running, text) for s, text in pieces if isinstance(text, str)]

    def take(self, seq: Sequence, token: Token | None) -> Piece | None:
        """Take what the engine says next of one sequence; return the text that this made certain, if any.

        Raises the ScoringError that ended the sequence, if one did.
        """
        stream = self._streams[seq]
        if token is None:
            self.left -= 1
            if seq.error is not None:
                raise seq.error
            text = stream.text.finish()
        else:
            stream.tokens.append(token)
            text = "" if token.id in seq.eos_ids else stream.text.push(token.id)
        if not text and not (token is None and (stream.tokens or stream.held)):
            return None
        piece = Piece(stream.running, text, tuple(stream.tokens))
        stream.tokens = []
        return piece

    def portion(self, piece: Piece) -> Piece | None:
        """Hold a piece back until there is enough of its sequence to judge; return all of that."""
        stream = self._streams[piece.running.sequence]
        if stream.verdict is not None and stream.verdict.blocked:
            return None
        stream.held += piece.text
        stream.tokens[:0] = piece.tokens
        if len(stream.held) < PORTION_CHARS and piece.running.sequence.finish_reason is None:
            return None
        whole = replace(piece, text=stream.held, tokens=tuple(stream.tokens))
        stream.held, stream.tokens = "", []
        return whole

    def context(self, piece: Piece) -> str:
        """Return what is to be judged of a portion: with the end of what was shown before it."""
        return self._streams[piece.running.sequence].shown[-CONTEXT_CHARS:] + piece.text

    def judged(self, piece: Piece, verdict: Verdict) -> Piece | None:
        """Note the verdict on a portion and return it, or end its sequence and return nothing."""
        stream = self._streams[piece.running.sequence]
        worst = {} if stream.verdict is None else stream.verdict.severities
        severities = {k: max(worst.get(k, 0), verdict.severities.get(k, 0)) for k in worst | verdict.severities}
        stream.verdict = Verdict(verdict.blocked, severities)
        if verdict.blocked:
            piece.running.generation.cancel()
            return None
        stream.shown += piece.text
        return piece

    def verdict(self, running: Running) -> Verdict | None:
        """Return content safety's verdict on what was generated so far, where it was asked."""
        return self._streams[running.sequence].verdict


def text_stream(running: Running, tokenizer: Tokenizer) -> TextStream:
    """Return what turns the tokens of a sequence into its text."""
    return TextStream(tokenizer, running.stop, trim=running.chat)


def prompt_texts(prompt: "str | ChatPrompt | tuple[int, ...]", tokenizer: Tokenizer) -> str:
    """Return what people wrote of a prompt, for content safety to judge."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, ChatPrompt):
        return "\n".join(m.content for m in prompt.messages)
    return tokenizer.decode(list(prompt))
