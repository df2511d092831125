"""What became of each file and of the whole job: counts, tokens, seconds, errors by kind; and what need not run again.

Each file's summary stands in `_summary/` of the output folder, written after its results: the file is done when it is
there and still fits. `summary.json` adds them up.
"""

import json
import os
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mptserve.batch.files import InputFile

FOLDER = "_summary"
WHOLE_JOB = "summary.json"
RETRIED_ERRORS = {"generation_failed", "engine_failed", "unreadable_file", "missing_package", "unavailable"}
"""Errors that another run may not meet; a row that breaks a rule will break it again."""


@dataclass
class Tally:
    """The numbers of one file, or of all."""

    rows: int = 0
    failed_rows: int = 0
    sequences: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        self.rows += other.rows
        self.failed_rows += other.failed_rows
        self.sequences += other.sequences
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.finish_reasons += other.finish_reasons
        self.errors += other.errors

    def as_json(self) -> dict[str, Any]:
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(self).items()}


def tally(summary: dict[str, Any]) -> Tally:
    """Return the tally in a summary that was read."""
    result = Tally()
    for name in vars(result):
        value = summary[name]
        setattr(result, name, Counter(value) if isinstance(value, dict) else value)
    return result


class Summaries:
    """The summaries in one output folder. `job`: what else results depend on; other values make them stale."""

    def __init__(self, output_dir: Path, job: dict[str, Any]) -> None:
        self.output_dir, self.job = output_dir, job
        self._folder = output_dir / FOLDER

    def of(self, file: InputFile, results: Path, digest: str) -> dict[str, Any] | None:
        """Return the file's summary if its results are whole, belong to this content and job, and need no other try."""
        try:
            summary: dict[str, Any] = json.loads(self._path(file).read_text(encoding="utf-8"))
            size = results.stat().st_size
        except (OSError, ValueError):
            return None
        fits = (summary.get("digest"), summary.get("job"), summary.get("bytes")) == (digest, self.job, size)
        return summary if fits and not RETRIED_ERRORS & summary["errors"].keys() else None

    def write(
        self, file: InputFile, results: Path, digest: str, n_bytes: int, outcome: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the file's summary and return it."""
        summary = {
            "file": file.name,
            "results": results.relative_to(self.output_dir).as_posix(),
            **outcome,
            "bytes": n_bytes,
            "digest": digest,
            "job": self.job,
        }
        _write(self._path(file), summary)
        return summary

    def write_whole(self) -> dict[str, Any]:
        """Add up all files' summaries into `summary.json` and return it.

        Several workers may do so at once: each looks again after writing, so the last one has seen everything.
        """
        while True:
            paths = sorted(self._folder.rglob("*.json")) if self._folder.is_dir() else []
            summary = whole([json.loads(path.read_text(encoding="utf-8")) for path in paths])
            _write(self.output_dir / WHOLE_JOB, summary)
            if len(list(self._folder.rglob("*.json"))) == len(paths):
                return summary

    def _path(self, file: InputFile) -> Path:
        return self._folder / f"{file.name}.json"


def whole(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of files' summaries; `seconds`: from the first file's begin to the last one's end."""
    total = Tally()
    for summary in files:
        total.add(tally(summary))
    begin = min((f["started"] for f in files), default=0.0)
    seconds = max((f["ended"] for f in files), default=0.0) - begin
    return {
        "files": len(files),
        "failed_files": sorted(f["file"] for f in files if f["failed"]),
        **total.as_json(),
        "seconds": round(seconds, 3),
        "rows_per_s": round(total.rows / seconds, 3) if seconds else None,
        "tokens_per_s": round(total.generated_tokens / seconds, 3) if seconds else None,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def now() -> float:
    """Return the time of day in seconds since 1970, which several machines share, unlike the monotonic clock."""
    return round(time.time(), 3)
