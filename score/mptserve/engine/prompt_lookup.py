"""Prompt lookup: draft tokens for a sequence from its own text, what followed its last tokens when they came before.

Prompt-lookup decoding (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding): text that copies, such as edited
code, quotations, lists and summaries, repeats runs of its own tokens. A draft costs a dictionary look-up; the model
computes all draft tokens in one step and keeps those that it would have generated anyway (runner.py).
"""

from mptserve.engine.sequence import Sequence

_SIZES = (3, 2)
"""Tokens that must match, the longer run first. After a single token, what follows is mostly something else."""


class PromptLookup:
    """Finds drafts for one sequence; keeps an index of its tokens, which grows with them.

    most: tokens in a draft at most.  A draft has at most one token more than twice those accepted of the last one: text
    that does not repeat pays little overhead, and text that does has long drafts after a few steps.
    """

    def __init__(self, most: int) -> None:
        self._most, self._wanted = most, 1
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where the token behind its last occurrence is

    def draft(self, seq: Sequence, most: int) -> list[int]:
        """Return up to `most` tokens that may follow those of `seq`, perhaps none."""
        self._read(seq)
        tokens, n = self._tokens, min(most, self._wanted)
        for size in _SIZES:
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                period = len(tokens) - start  # beyond the end, assume that the run repeats
                return [tokens[start + i % period] for i in range(n)]
        return []

    def accepted(self, n_accepted: int) -> None:
        """Note how many tokens of a draft were accepted."""
        self._wanted = min(2 * n_accepted + 1, self._most)

    def _read(self, seq: Sequence) -> None:
        """Take up the tokens that came since. An n-gram is indexed once something follows it, so never the last one."""
        tokens, known = self._tokens, len(self._tokens)
        tokens += seq.prompt[known:]
        tokens += [token.id for token in seq.out[len(tokens) - seq.n_prompt :]]
        for end in range(max(known, 1), len(tokens)):
            for size in _SIZES:
                if end >= size:
                    self._after[tuple(tokens[end - size : end])] = end
