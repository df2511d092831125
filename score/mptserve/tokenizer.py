"""Text to token ids and back: whole, and piece by piece while tokens come, with stop strings."""

import codecs
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from mptserve.errors import ModelNotFound


class Tokenizer:
    """The checkpoint's byte-level BPE, from its tokenizer.json; adds no tokens of its own."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as exc:  # the Rust library raises plain Exception
            raise ModelNotFound(f"{path} is not a tokenizer.json: {exc}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.n_tokens = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes
        special = {id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes = [b"" if id in special else self._token_bytes(id) for id in range(self.n_tokens)]
        self.longest_token = max(len(b) for b in self._bytes)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; special tokens written out in it are read as such."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out, bytes that are no UTF-8 as U+FFFD."""
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return what one token adds to the text; nothing for special tokens and ids that no token has."""
        return self._bytes[id] if id < self.n_tokens else b""

    def _token_bytes(self, id: int) -> bytes:
        """Byte-level BPE spells bytes as printable characters; added tokens are spelled as they are."""
        token = self._tokenizer.id_to_token(id)
        if token is None:  # a hole in the vocabulary
            return b""
        values = [_BYTE_OF.get(c) for c in token]
        known = [v for v in values if v is not None]
        return bytes(known) if len(known) == len(token) else token.encode("utf-8")


class TextStream:
    """Turns tokens into text pieces that are safe to show: joined, they are the whole text.

    Never half a UTF-8 character, never anything that may be the beginning of a stop string, nothing from a stop
    string on. `stopped` becomes true when a stop string was found; of several, the one that was complete first.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Return the text that this token made certain; empty while it may still be a stop string."""
        if self.stopped:
            return ""
        return self._take(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """Return the text held back so far: no more tokens come."""
        if self.stopped:
            return ""
        piece = self._take(self._decoder.decode(b"", final=True))
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _take(self, text: str) -> str:
        if not self._stop:
            return text
        self._held += text
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)[1]], ""
            return piece
        keep = max(_overlap(self._held, s) for s in self._stop)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0


def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of byte-level BPE (GPT-2's scheme).

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
