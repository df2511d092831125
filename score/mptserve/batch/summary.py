"""Summaries of files and of the whole job: counts, tokens, seconds, errors by code; and which files are done.

A file's summary is in `_summary/` of the output folder and is written after its results. A file is done when its
summary exists and matches the file's content, the job and the results. `summary.json` has the sums over all files.
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
"""Error codes that may not occur in another run; files with them are scored again. An invalid row stays invalid."""


@dataclass
class Tally:
    """The counts of one file, or of all files."""

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
    """Return the tally that a summary holds."""
    result = Tally()
    for name in vars(result):
        value = summary[name]
        setattr(result, name, Counter(value) if isinstance(value, dict) else value)
    return result


class Summaries:
    """The summaries of one output folder. `job`: settings and model; summaries with other values are stale."""

    def __init__(self, output_dir: Path, job: dict[str, Any]) -> None:
        self.output_dir, self.job = output_dir, job
        self._folder = output_dir / FOLDER

    def of(self, file: InputFile, results: Path, digest: str) -> dict[str, Any] | None:
        """Return the file's summary if its results are complete, match content and job, and have no retried error."""
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
        """Write the sum of all files' summaries to `summary.json` and return it.

        Several workers may do this at once. Each lists the summaries again after writing, so the last one counts all.
        """
        while True:
            files = read_summaries(self.output_dir)
            summary = whole(files)
            _write(self.output_dir / WHOLE_JOB, summary)
            if len(read_summaries(self.output_dir)) == len(files):
                return summary

    def _path(self, file: InputFile) -> Path:
        return self._folder / f"{file.name}.json"


def read_summaries(output_dir: Path) -> list[dict[str, Any]]:
    """Return the summaries of all finished files in an output folder, in the order of their names."""
    paths = sorted((output_dir / FOLDER).rglob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def whole(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of files' summaries. `seconds`: from the first file's start to the last file's end."""
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
    """Return the seconds since 1970: unlike the monotonic clock, comparable between machines."""
    return round(time.time(), 3)
