"""Detects that a sequence repeats itself: base models often do not stop by themselves."""

LONGEST_PERIOD = 64
"""Tokens of the longest repeated run that is detected: about a paragraph."""
LEAST_TOKENS = 16
"""Repeated tokens from which a repetition counts: `......` and `ha ha ha ha` do not yet."""


class RepetitionGuard:
    """Watches the tokens of one sequence; about 5 µs per token."""

    def __init__(self, times: int) -> None:
        """times: how often a run must occur in a row, at least 2."""
        self._times = max(times, 2)
        self._last: list[int] = []
        self._same = [0] * (LONGEST_PERIOD + 1)  # by period: how many tokens in a row equal the one a period before

    def repeats(self, token_id: int) -> bool:
        """Take the next token; return whether the last tokens are one run, `times` times in a row."""
        last, same, found = self._last, self._same, False
        for period in range(1, len(last) + 1):
            if last[-period] == token_id:
                same[period] += 1
                found = found or same[period] >= max(period * (self._times - 1), LEAST_TOKENS)
            else:
                same[period] = 0
        last.append(token_id)
        del last[:-LONGEST_PERIOD]
        return found
