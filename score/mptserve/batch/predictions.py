"""Writes predictions.csv: the results of a whole job as Azure's batch notebooks read them."""

import csv
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mptserve.batch.summary import read_summaries

NAME = "predictions.csv"


def write_predictions(output_dir: Path) -> Path:
    """Write the file from the results of all finished files, and return its path.

    Columns: the row's number in its file, the answer, the file's name; no header, as Azure's MLflow batch deployments
    write it. A failed row has an empty answer; its error is in the JSON lines. Several workers may do this at once:
    each lists the results again after writing, so the last one has all.
    """
    path = output_dir / NAME
    while True:
        files = read_summaries(output_dir)
        temporary = path.with_name(f".{NAME}.{uuid.uuid4().hex[:12]}.tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            for record in _records(output_dir, files):
                writer.writerow((record["row"], record["output"] or "", Path(record["file"]).name))
        temporary.replace(path)
        if len(read_summaries(output_dir)) == len(files):
            return path


def _records(output_dir: Path, files: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for summary in files:
        with (output_dir / summary["results"]).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
