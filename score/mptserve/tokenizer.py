"""Text to token ids and back: whole, and piece by piece while tokens come, with stop strings."""

import codecs
import json
import re
from collections.abc import Iterable
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
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_ids = {t.content: id for id, t in added.items() if t.special or _CONTROL.fullmatch(t.content)}
        self._plain = _without_control_tokens(self._tokenizer)
        self._split = re.compile("|".join(map(re.escape, sorted(self.control_ids, key=len, reverse=True))) or r"(?!)")
        control = set(self.control_ids.values())
        self._bytes = [b"" if id in control else self._token_bytes(id) for id in range(self.n_tokens)]
        self.longest_token = max(len(b) for b in self._bytes)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; control tokens written out in it are read as such."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Return the token ids of joined (text, ours) parts; control tokens are read as such only in parts of ours.

        Text between two control tokens is encoded in one piece, whoever wrote it, as it was in training.
        """
        ids: list[int] = []
        run = ""
        for text, ours in parts:
            start = 0
            for found in self._split.finditer(text) if ours else ():
                ids += self._encode_plain(run + text[start : found.start()])
                ids.append(self.control_ids[found.group()])
                run, start = "", found.end()
            run += text[start:]
        return ids + self._encode_plain(run)

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids) if text else []

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, control tokens left out, bytes that are no UTF-8 as U+FFFD."""
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return what one token adds to the text; nothing for control tokens and ids that no token has."""
        return self._bytes[id] if id < self.n_tokens else b""

    def _token_bytes(self, id: int) -> bytes:
        """Byte-level BPE spells bytes as printable characters; added tokens are spelled as they are."""
        token = self._tokenizer.id_to_token(id)
        if token is None:  # a hole in the vocabulary
            return b""
        values = [_BYTE_OF.get(c) for c in token]
        known = [v for v in values if v is not None]
        return bytes(known) if len(known) == len(token) else token.encode("utf-8")


def _without_control_tokens(tokenizer: _Tokenizer) -> _Tokenizer:
    """Return a copy that reads control tokens as the characters they are spelled with.

    Some checkpoints forgot to call theirs special, and only special ones can be switched off.
    """
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or _CONTROL.fullmatch(token["content"]) is not None
    plain = _Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    return plain


_CONTROL = re.compile(r"<\|[^|]*\|>")
"""How the family spells tokens that are no text. GPT-NeoX has added tokens that are: runs of spaces."""


class TextStream:
    """Turns tokens into text pieces that are safe to show: joined, they are the whole text.

    Never half a UTF-8 character, never anything that may be the beginning of a stop string, nothing from a stop
    string on. `stopped` becomes true when a stop string was found; of several, the one that was complete first.
    trim: leave out white space that the text begins with.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, trim: bool = False) -> None:
        self._tokenizer, self._stop, self._trim = tokenizer, stop, trim
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, *token_ids: int) -> str:
        """Return the text that these tokens made certain; empty while it may still be a stop string."""
        if self.stopped:
            return ""
        added = b"".join(map(self._tokenizer.token_bytes, token_ids))
        return self._trimmed(self._take(self._decoder.decode(added)))

    def finish(self) -> str:
        """Return the text held back so far: no more tokens come."""
        if self.stopped:
            return ""
        piece = self._take(self._decoder.decode(b"", final=True))
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return self._trimmed(piece)

    def _trimmed(self, piece: str) -> str:
        if self._trim:
            piece = piece.lstrip()
            self._trim = piece == ""
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
