"""Notices that a sequence goes round in circles: base models are bad at knowing when to stop."""

LONGEST_PERIOD = 64
"""Tokens in the longest circle that is noticed: about a paragraph."""
LEAST_TOKENS = 16
"""So much must have been said again before it counts: `......` and `ha ha ha ha` are no circles yet."""


class RepetitionGuard:
    """Watches the tokens of one sequence; about 5 µs for each."""

    def __init__(self, times: int) -> None:
        """times: how often the same must be said in a row, at least 2."""
        self._times = max(times, 2)
        self._last: list[int] = []
        self._same = [0] * (LONGEST_PERIOD + 1)  # by period: how many tokens in a row equal the one a period before

    def circling(self, token_id: int) -> bool:
        """Take the next token; return whether the last tokens are the same ones `times` times over."""
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
