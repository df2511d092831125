"""Input files: format by name, name in the results, and reading in bounded memory."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, cast

from mptserve.errors import BadFile

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class InputFile:
    """A file to score. `name`: its path below the input folder, with slashes; the results use this name."""

    path: Path
    name: str

    @property
    def format(self) -> str:
        """Return the suffix that selects the reader; raises BadFile for an unknown one."""
        suffixes = [s.lower() for s in PurePosixPath(self.name).suffixes]
        if suffixes[-1:] == [".gz"] and suffixes[-2:] != [".parquet", ".gz"]:
            suffixes.pop()
        if suffixes and suffixes[-1] in FORMATS:
            return suffixes[-1]
        raise BadFile(
            f"the name must end in one of {', '.join(FORMATS)}, text formats also with .gz", code="unknown_format"
        )


def input_file(path: str | Path, root: Path | None = None) -> InputFile:
    """Return the file, named by its path below `root`.

    root None: Azure passes absolute paths below the mounted input, a folder called INPUT_… whose parent differs in
    every job; the name is the path below that folder. For other paths a digest of the folder is part of the name, which
    keeps files of the same name in different folders apart.
    """
    path = Path(path).absolute()
    if root is not None and path.is_relative_to(root.absolute()) and path != root.absolute():
        return InputFile(path, _writable(path.relative_to(root.absolute()).as_posix()))
    mounts = [i for i, part in enumerate(path.parts[:-1]) if part.startswith("INPUT_")]
    if root is None and mounts:
        return InputFile(path, _writable("/".join(path.parts[mounts[-1] + 1 :])))
    digest = hashlib.blake2b(str(path.parent).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return InputFile(path, _writable(f"{digest}/{path.name}"))


def _writable(name: str) -> str:
    """Return the name as valid UTF-8 with escapes: names on disk are bytes, and results are UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def digest(path: Path) -> str:
    """Return a digest of the content. Earlier results are kept only while it is the same."""
    content_hash = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            content_hash.update(piece)
    return content_hash.hexdigest()


class Source:
    """An open input file; a context manager. `line`: number, from 1, of the last line read."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises BadFile when that fails."""
        self.path, self.line = path, 0
        try:
            self.size = path.stat().st_size
            self._raw = path.open("rb")
        except OSError as exc:
            raise BadFile(f"the file cannot be opened: {exc.strerror}", code="unreadable_file") from exc
        self.stream: IO[bytes] = self._raw
        if path.suffix.lower() == ".gz":
            unzipped = gzip.GzipFile(fileobj=self._raw)
            self.stream = cast(IO[bytes], io.BufferedReader(unzipped, 1 << 16))

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @property
    def position(self) -> int:
        """Return how many bytes of the file were read; for gzip, compressed bytes."""
        return self.size if self._raw.closed else min(self._raw.tell(), self.size)

    def lines(self, limit: int) -> Iterator[bytes | None]:
        """Yield lines without line ends; None for a line longer than `limit` bytes, which is skipped.

        Raises BadFile for UTF-16 and for truncated or damaged gzip data.
        """
        first = True
        while line := self.read(limit + 2, whole_line=True):
            self.line += 1
            if first:
                refuse_utf16(line)
                line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            if line.endswith(b"\n") or len(line) <= limit:
                yield line.removesuffix(b"\n").removesuffix(b"\r")
                continue
            while line and not line.endswith(b"\n"):
                line = self.read(limit + 2, whole_line=True)
            yield None

    def read(self, n: int, whole_line: bool = False) -> bytes:
        """Return up to `n` bytes; whole_line: up to the end of the line. Empty at the end of the file."""
        try:
            return self.stream.readline(n) if whole_line else self.stream.read(n)
        except BROKEN_GZIP as exc:
            raise BadFile(
                f"the gzip data is truncated or damaged after line {self.line}", code="truncated_file", line=self.line
            ) from exc
        except OSError as exc:
            raise BadFile(f"reading failed: {exc.strerror}", code="unreadable_file", line=self.line) from exc


def import_pyarrow() -> Any:
    """Return pyarrow with `pyarrow.parquet` imported; raises BadFile when it is not installed.

    Imported on first use: only parquet needs it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise BadFile("parquet needs pyarrow: pip install 'mptserve[batch]'", code="missing_package") from exc
    return pyarrow


def refuse_utf16(start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadFile(
            "the file must be UTF-8; it starts with a UTF-16 byte order mark", code="invalid_encoding", line=1
        )
