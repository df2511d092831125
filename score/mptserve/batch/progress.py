"""Progress of a job: a log line every 30 s, and a progress bar on a terminal."""

import logging
import sys
import time
from typing import Any

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Progress:
    """Counts files, rows and tokens; a context manager."""

    def __init__(self, n_files: int, n_bytes: int, terminal: bool | None = None) -> None:
        """terminal: whether to draw a bar on standard error; None: if standard error is a terminal."""
        self.files = self.rows = self.failed_rows = self.tokens = 0
        self.n_files, self.n_bytes = n_files, n_bytes
        self._bytes = 0
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() if terminal is None else terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                total=n_bytes,
                unit="B",
                unit_scale=True,
                bar_format="{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}",
                mininterval=0.2,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.show(self._bytes, last=True)
        if self._bar is not None:
            self._bar.close()

    def show(self, n_bytes: int, last: bool = False) -> None:
        """Update the bar and, every LOG_EVERY_S, the log. n_bytes: input bytes read so far."""
        self._bytes = n_bytes
        moment = time.monotonic()
        if self._bar is not None and (last or moment - self._bar.last_print_t >= 0):
            self._bar.set_postfix_str(self._speed(), refresh=False)
            self._bar.update(n_bytes - self._bar.n)
        if last or moment - self._logged >= LOG_EVERY_S:
            self._logged = moment
            log.info("progress", extra={"numbers": self.numbers()})

    def numbers(self) -> dict[str, Any]:
        """Return the progress as numbers. `left_s`: estimated from the share of bytes read; None at the start."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        share = min(self._bytes / self.n_bytes, 1.0) if self.n_bytes else 1.0
        return {
            "files": self.files,
            "of_files": self.n_files,
            "rows": self.rows,
            "failed_rows": self.failed_rows,
            "generated_tokens": self.tokens,
            "rows_per_s": self.rows / seconds,
            "tokens_per_s": self.tokens / seconds,
            "percent": 100 * share,
            "seconds": seconds,
            "left_s": seconds * (1 - share) / share if share else None,
        }

    def _speed(self) -> str:
        numbers = self.numbers()
        failed = f", {self.failed_rows} failed" if self.failed_rows else ""
        speed = f"{numbers['rows_per_s']:.1f} rows/s, {numbers['tokens_per_s']:.0f} tok/s"
        return f"{self.files}/{self.n_files} files, {self.rows} rows{failed}, {speed}"
