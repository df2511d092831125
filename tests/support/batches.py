"""Support for batch tests: jobs on the embedded model, input files, reading of results."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mptserve.batch.job import BatchJob
from mptserve.settings import read_settings
from serving import MODEL_DIR


def settings_of(out: Path, **environ: str) -> dict[str, str]:
    """Return the environment of a job: the embedded model, little memory, one thread."""
    return {
        "AZUREML_MODEL_DIR": str(MODEL_DIR),
        "AZUREML_BI_OUTPUT_PATH": str(out),
        "MPT_KV_CACHE_GB": "0.2",
        "MPT_CPU_THREADS": "1",
        "MPT_DTYPE": "float32",
    } | environ


@contextmanager
def job(root: Path, out: Path, **environ: str) -> Iterator[BatchJob]:
    """A job in this process whose files are named relative to `root`."""
    running = BatchJob(read_settings(settings_of(out, **environ)), root, terminal=False)
    try:
        yield running
    finally:
        running.close()


def write(path: Path, content: Any) -> str:
    """Write a file of bytes, text, or rows as JSON lines; gzip where the name says so. Return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" and not data.startswith(b"\x1f\x8b") else data)
    return str(path)


def results(out: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of one file of results."""
    path = out / name
    if path.suffix == ".parquet":
        import pyarrow.parquet

        records: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return records
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def places(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return (row, line, error) of each record; error: (code, field), or None."""
    return [
        (r["row"], r["line"], None if r["error"] is None else (r["error"]["code"], r["error"]["field"]))
        for r in records
    ]
