"""Writes records to a result file, which gets its final name only when it is complete."""

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from mptserve.batch.files import import_pyarrow
from mptserve.errors import BadFile, BadSetting, ScoringError
from mptserve.response import Result, details
from mptserve.tokenizer import Tokenizer

FIELDS = (
    *("file", "row", "line", "id", "sequence", "output", "finish_reason", "prompt_tokens", "generated_tokens", "seed"),
    *("error", "details"),
)
PARQUET_ROWS = 4096
"""Rows in a row group, which is in memory until it is written."""


def record(file: str, row: int | None, line: int | None, id: Any, **fields: Any) -> dict[str, Any]:
    """Return one record of the results. Missing fields are None; `details` is present only when requested."""
    values = {"file": file, "row": row, "line": line, "id": id} | fields
    return {name: values.get(name) for name in FIELDS if name != "details" or "details" in values}


def answer_fields(result: Result, tokenizer: Tokenizer, with_details: bool) -> dict[str, Any]:
    """Return the fields of a record that come from its finished sequence."""
    seq = result.sequence
    fields: dict[str, Any] = {
        "sequence": result.number,
        "output": result.text,
        "finish_reason": seq.finish_reason,
        "prompt_tokens": seq.n_prompt,
        "generated_tokens": len(seq.out),
        "seed": seq.params.seed,
    }
    return fields | ({"details": details(result, tokenizer)} if with_details else {})


def error_field(exc: ScoringError) -> dict[str, Any]:
    """Return the error field of a record: the online server's error, without a request id."""
    return {"error": {"code": exc.code, "message": exc.message, "field": exc.field}}


class Writer(Protocol):
    """Writes records in one format."""

    def write(self, records: list[dict[str, Any]]) -> None: ...
    def close(self) -> None: ...


class ResultFile:
    """A result file in progress: written under a temporary name beside `path` and renamed to it by `finish`.

    A killed process therefore leaves no incomplete results at `path`, and two attempts at a file do not collide.
    """

    def __init__(self, path: Path, format: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        self._file = self._temporary.open("wb")
        self._writer: Writer = JsonLines(self._file) if format == "jsonl" else Parquet(self._file)

    def write(self, records: list[dict[str, Any]]) -> None:
        self._writer.write(records)

    def finish(self) -> int:
        """Rename the file to its final name, delete temporary files of failed attempts, return the size in bytes."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        try:
            self._temporary.replace(self.path)
        except FileNotFoundError:  # a parallel attempt finished first and deleted this file; its results are the same
            if not self.path.is_file():
                raise
        for leftover in self.path.parent.glob(f".{_glob_escape(self.path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)
        return size

    def abandon(self) -> None:
        """Delete the temporary file; does nothing after `finish`."""
        with suppress(Exception):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


class JsonLines:
    """One JSON object per line, UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, records: list[dict[str, Any]]) -> None:
        for fields in records:
            self._file.write(json.dumps(fields, ensure_ascii=False).encode("utf-8") + b"\n")

    def close(self) -> None:
        pass


class Parquet:
    """Parquet with the columns FIELDS. A column has one type, so ids are text and details are JSON text."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            pyarrow = import_pyarrow()
        except BadFile as exc:
            raise BadSetting("MPT_BATCH_FORMAT is parquet, which needs pyarrow: pip install 'mptserve[batch]'") from exc
        self._pyarrow = pyarrow
        text, whole = pyarrow.string(), pyarrow.int64()
        error = pyarrow.struct([("code", text), ("message", text), ("field", text)])
        kinds = dict.fromkeys(("row", "line", "sequence", "prompt_tokens", "generated_tokens", "seed"), whole)
        kinds |= {"error": error}
        self._schema = pyarrow.schema([(name, kinds.get(name, text)) for name in FIELDS])
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, records: list[dict[str, Any]]) -> None:
        for fields in records:
            id, row_details = fields["id"], fields.get("details")
            self._rows.append(
                fields
                | {
                    "id": None if id is None else str(id),
                    "details": None if row_details is None else json.dumps(row_details),
                }
            )
        if len(self._rows) >= PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()
