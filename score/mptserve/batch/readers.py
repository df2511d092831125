"""Reads rows of files: one reader per format. Each uses bounded memory and continues after a bad row where it can."""

import codecs
import csv
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from mptserve import strict_json
from mptserve.batch.files import InputFile, Source, import_pyarrow, refuse_utf16
from mptserve.errors import BadFile, InvalidRequest, ScoringError, TooLarge

PIECE_CHARS = 1 << 16
PARQUET_ROWS = 256
"""Rows of a parquet file in memory at a time, beside the pages that hold them."""


@dataclass(frozen=True)
class InputRow:
    """One row of a file. `value` is a prompt, or an object: columns, or a request of the online server.

    number: of the row, from 0.  line: where it begins in the file, from 1; None in parquet.  error: why there is no
    value.  text_cells: the values are untyped text (CSV, TSV).
    """

    number: int
    line: int | None
    value: Any = None
    error: ScoringError | None = None
    text_cells: bool = False


Columns = Callable[[list[str]], list[str]]
"""Takes a table's column names and returns those to read; raises BadFile when no column can be the prompt."""
Expand = Callable[[dict[str, Any]], list[Any]]
"""Takes a request of the online server and returns one row value per prompt."""


def read_rows(
    file: InputFile, source: Source, limit: int, columns: Columns, expand: Expand
) -> Generator[InputRow, None, None]:
    """Yield the rows of a file; raises BadFile where no further row can be read.

    limit: of one row, in bytes.
    """
    match file.format:
        case ".jsonl" | ".ndjson":
            yield from _text_lines(source, limit, _json)
        case ".json":
            yield from _json_document(source, limit, expand)
        case ".csv":
            yield from _table(source, ",", limit, columns)
        case ".tsv":
            yield from _table(source, "\t", limit, columns)
        case ".txt":
            yield from _text_lines(source, limit, str)
        case _:
            yield from _parquet(source, columns)


def too_long(limit: int) -> TooLarge:
    return TooLarge(f"a row must have at most {limit} bytes", code="row_too_large")


# Lines ---------------------------------------------------------------------------------------------------------------


def _text_lines(source: Source, limit: int, parse: Callable[[str], Any]) -> Iterator[InputRow]:
    """Yield one row per line; empty lines are skipped. parse: turns a line into the row's value."""
    number = 0
    for line in source.lines(limit):
        if line is not None and not line.strip():
            continue
        try:
            yield InputRow(number, source.line, parse(_decoded(line, limit)))
        except ScoringError as exc:
            yield InputRow(number, source.line, error=exc)
        number += 1


def _decoded(line: bytes | None, limit: int) -> str:
    if line is None:
        raise too_long(limit)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"the row must be UTF-8; byte {exc.start} is not", code="invalid_encoding") from exc


def _json(text: str) -> Any:
    try:
        return strict_json.loads(text)
    except strict_json.NotJson as exc:
        raise InvalidRequest(f"the row {exc}", code="invalid_json") from exc


# A JSON document -----------------------------------------------------------------------------------------------------


class _Text:
    """A window of a document's text. `at`: offset where the next value is expected; `line`: its line number."""

    def __init__(self, source: Source) -> None:
        self._source, self.text, self.at, self.line, self.ended = source, "", 0, 1, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="strict")

    def more(self, n: int = PIECE_CHARS) -> None:
        """Read more text, and drop what was parsed."""
        self.text, self.at = self.text[self.at :], 0
        piece = self._source.read(n)
        if not self.text and self.line == 1:
            refuse_utf16(piece)
        self.ended = not piece
        try:
            self.text += self._decoder.decode(piece, final=self.ended)
        except UnicodeDecodeError as exc:
            line = self.line + self.text.count("\n")
            raise BadFile(
                f"the file must be UTF-8; it has invalid bytes near line {line}", code="invalid_encoding", line=line
            ) from exc

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self, limit: int) -> Any:
        """Return the JSON value at `at` and move past it; raises BadFile if there is none."""
        decoder = json.JSONDecoder(
            parse_constant=str
        )  # NaN and Infinity become strings, which request validation rejects
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # otherwise the value may be a number that continues
                    break
            except RecursionError:
                raise self.bad("a row is nested too deeply") from None
            except ValueError as exc:
                if self.ended:
                    raise self.bad("the row that begins here is incomplete or not valid JSON") from exc
            if len(self.text) - self.at > limit:
                raise self.bad(f"the row that begins here is invalid or longer than {limit} bytes")
            self.more(max(len(self.text) - self.at, PIECE_CHARS))
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def bad(self, why: str) -> BadFile:
        return BadFile(f"line {self.line}: {why}", code="invalid_json", line=self.line)


def _json_document(source: Source, limit: int, expand: Expand) -> Iterator[InputRow]:
    """Yield the items of an array, or a row for each prompt of one online request.

    Reading stops at a broken row: unlike lines, an array has no mark at which to resume.
    """
    text = _Text(source)
    opening = text.peek()
    if opening == "{":
        line, value = text.line, text.value(limit)
        if text.peek():
            raise text.bad("there is text after the object; name a file with one object per line .jsonl")
        try:
            rows = expand(value)
        except InvalidRequest as exc:
            raise BadFile(exc.message, code=exc.code, line=1) from exc
        for number, row in enumerate(rows):
            yield InputRow(number, line, row)
        return
    if opening != "[":
        raise text.bad("a .json file must hold an array of rows, or one request")
    text.at += 1
    number = 0
    while (separator := text.peek()) != "]":
        if number:
            if separator != ",":
                raise text.bad("expected a comma or the end of the array")
            text.at += 1
            text.peek()
        line = text.line
        yield InputRow(number, line, text.value(limit))
        number += 1
    text.at += 1
    if text.peek():
        raise text.bad("there is text after the array")


# Tables --------------------------------------------------------------------------------------------------------------


class _TableLines:
    """The line iterator of a csv.reader. `record`: (number, text) of the lines of the current record."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, limit
        self._lines = source.lines(limit)
        self._lines_to_repeat: list[tuple[int, str]] = []
        self.record: list[tuple[int, str]] = []
        self._chars = 0

    def __iter__(self) -> "_TableLines":
        return self

    def __next__(self) -> str:
        if self._lines_to_repeat:
            number, text = self._lines_to_repeat.pop()
        else:
            line = next(self._lines)
            number = self._source.line
            # invalid UTF-8 becomes surrogates, so that only its own row fails
            text = "\0" if line is None else line.decode("utf-8", "surrogateescape") + "\n"
        self.record.append((number, text))
        self._chars += len(text)
        if text == "\0" or self._chars > self._limit:
            raise too_long(self._limit)
        return text

    def begin(self) -> None:
        """Start a new record."""
        self.record, self._chars = [], 0

    def rewind(self) -> None:
        """Yield the record's lines after the first again: a stray quote must fail one row, not the rest of the file."""
        self._lines_to_repeat += reversed(self.record[1:])


def _table(source: Source, delimiter: str, limit: int, columns: Columns) -> Iterator[InputRow]:
    """Yield the rows of a table with a header, quoted as in RFC 4180; empty lines are skipped."""
    csv.field_size_limit(limit)  # for the whole process; the default is shorter than a long prompt
    lines = _TableLines(source, limit)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _header(reader, lines)
    wanted = set(columns(header))
    number = 0
    while True:
        lines.begin()
        try:
            cells = next(reader)
            if not cells:
                continue
            value = _cells(header, cells, wanted)
        except StopIteration:
            return
        except (csv.Error, ScoringError) as exc:
            error = InvalidRequest(f"the row is not valid CSV: {exc}", code="invalid_csv")
            lines.rewind()
            yield InputRow(number, lines.record[0][0], error=exc if isinstance(exc, ScoringError) else error)
        else:
            yield InputRow(number, lines.record[0][0], value, text_cells=True)
        number += 1


def _header(reader: Iterator[list[str]], lines: _TableLines) -> list[str]:
    header: list[str] = []
    try:
        while not header:
            lines.begin()
            header = next(reader)
    except StopIteration:
        raise BadFile(
            "the file is empty; its first line must name the columns", code="missing_column", line=1
        ) from None
    except (csv.Error, TooLarge) as exc:
        raise BadFile(f"the header cannot be read: {exc}", code="invalid_csv", line=1) from exc
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise BadFile("the header has a column name twice", code="invalid_csv", line=1)
    return names


def _cells(header: list[str], cells: list[str], wanted: set[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise InvalidRequest(f"the row must have {len(header)} cells, got {len(cells)}", code="wrong_length")
    value = {name: cell for name, cell in zip(header, cells, strict=True) if name in wanted}
    for name, cell in value.items():
        if not cell.isascii() and any(0xDC80 <= ord(c) <= 0xDCFF for c in cell):
            raise InvalidRequest(f"`/{name}` must be UTF-8", field=f"/{name}", code="invalid_encoding")
    return value


def _parquet(source: Source, columns: Columns) -> Iterator[InputRow]:
    pyarrow = import_pyarrow()
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.stream, pre_buffer=False) as file:
            wanted = columns(file.schema_arrow.names)
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted, use_threads=False):
                for row in _batch_rows(batch, number):
                    yield row
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise BadFile(
            f"not a valid parquet file, or truncated; row {number} cannot be read", code="invalid_parquet"
        ) from exc


def _batch_rows(batch: Any, number: int) -> Iterator[InputRow]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # one cell is invalid, and the error does not say which
        yield from (_single_row(batch.slice(i, 1), number + i) for i in range(batch.num_rows))
    else:
        yield from (InputRow(number + i, None, value) for i, value in enumerate(values))


def _single_row(batch: Any, number: int) -> InputRow:
    try:
        (value,) = batch.to_pylist()
        return InputRow(number, None, value)
    except UnicodeDecodeError:
        error = InvalidRequest("the row has a string that is not UTF-8", code="invalid_encoding")
        return InputRow(number, None, error=error)
