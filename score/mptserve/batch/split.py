"""Splits a big file into shards, so that several nodes have work: Azure and Ray distribute files, not rows.

Rows are copied unchanged, invalid ones too: scoring the shards gives the same results and errors as scoring the file.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from mptserve.batch.files import InputFile, Source, import_pyarrow
from mptserve.batch.readers import read_rows
from mptserve.errors import BadFile

ROW_BYTES = 100_000_000
"""Limit of one row, which is in memory as a whole."""


def split(path: Path, output_dir: Path, rows_per_shard: int) -> list[Path]:
    """Write shards of `path` and return their paths. Raises BadFile.

    A shard gets its name when it is complete. Each shard of a table repeats the header, parquet shards keep the schema,
    gzip input gives gzip shards, and an array (.json) becomes .jsonl.
    """
    file = InputFile(path, path.name)
    output_dir.mkdir(parents=True, exist_ok=True)
    if file.format == ".parquet":
        return _split_parquet(path, output_dir, rows_per_shard)
    with Source(path) as source:
        suffix, header, rows = _raw_rows(file, source)
        zipped = path.suffix.lower() == ".gz"
        name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
        namer = _Namer(output_dir, name, suffix + (".gz" if zipped else ""))
        return _write_shards(rows, header, rows_per_shard, namer, gzip.open if zipped else open)


class _Namer:
    """Makes the paths of shards: numbered with leading zeros, so that they sort."""

    def __init__(self, folder: Path, name: str, suffix: str) -> None:
        self._folder, self._name, self._suffix, self.n = folder, name, suffix, 0

    def next(self) -> Path:
        self.n += 1
        return self._folder / f"{self._name}-{self.n:05}{self._suffix}"


def _raw_rows(file: InputFile, source: Source) -> tuple[str, bytes, Iterator[bytes]]:
    """Return (suffix of the shards, header of each shard, rows as bytes)."""
    if file.format == ".json":
        rows = read_rows(file, source, ROW_BYTES, lambda names: names, lambda value: [value])
        return ".jsonl", b"", (json.dumps(row.value, ensure_ascii=False).encode() + b"\n" for row in rows)
    if file.format in (".csv", ".tsv"):
        records = _records(source, "," if file.format == ".csv" else "\t")
        return file.format, next(records, b""), records
    return file.format, b"", (_whole(line) + b"\n" for line in source.lines(ROW_BYTES) if line is None or line.strip())


def _whole(line: bytes | None) -> bytes:
    if line is None:
        raise BadFile(f"a row must have at most {ROW_BYTES} bytes", code="row_too_large")
    return line


def _records(source: Source, delimiter: str) -> Iterator[bytes]:
    """Yield a table's records as unchanged bytes, including quoted line breaks."""
    record_lines: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in source.lines(ROW_BYTES):
            record_lines.append(_whole(line) + b"\n")
            yield record_lines[-1].decode("utf-8", "surrogateescape")

    csv.field_size_limit(ROW_BYTES)
    for cells in csv.reader(lines(), delimiter=delimiter):  # not strict: scoring reports errors
        if cells:
            yield b"".join(record_lines)
        record_lines.clear()


def _write_shards(
    rows: Iterable[bytes], header: bytes, rows_per_shard: int, namer: _Namer, opener: Callable[..., Any]
) -> list[Path]:
    shards: list[Path] = []
    n = rows_per_shard
    with ExitStack() as shard:
        file: IO[bytes] | None = None
        for row in rows:
            if n == rows_per_shard:
                shard.close()
                path, n = namer.next(), 0
                temporary = path.with_name(f".{path.name}.tmp")
                shard.callback(_publish, temporary, path, shards)
                file = shard.enter_context(opener(temporary, "wb"))
                file.write(header)
            assert file is not None
            file.write(row)
            n += 1
    return shards


def _publish(temporary: Path, path: Path, shards: list[Path]) -> None:
    temporary.replace(path)
    shards.append(path)


def _split_parquet(path: Path, output_dir: Path, rows_per_shard: int) -> list[Path]:
    pyarrow = import_pyarrow()
    namer, shards = _Namer(output_dir, path.stem, ".parquet"), list[Path]()
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            # batches end at row groups, so a shard may have fewer rows than requested, never more
            for batch in file.iter_batches(rows_per_shard, use_threads=False):
                shard = namer.next()
                temporary = shard.with_name(f".{shard.name}.tmp")
                pyarrow.parquet.write_table(pyarrow.Table.from_batches([batch]), temporary)
                _publish(temporary, shard, shards)
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise BadFile("not a valid parquet file, or truncated", code="invalid_parquet") from exc
    return shards
