"""Measures a batch job beside the engine alone: what reading rows, checking them and writing results cost.

    python benchmarks/batch.py [--rows 2000] [--new-tokens 64] [--rounds 3]

The same prompts, parameters and seeds go through the engine (all submitted at once, so that its batch is always
full) and through a job over files of 500 rows, taking turns in one process; figures are medians of generated tokens per
second. The job's memory is what the process gained after its first round. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mptserve.batch.job import BatchJob
from mptserve.engine import Job, SamplingParams
from mptserve.settings import read_settings

EMBEDDED = Path(__file__).resolve().parent.parent / "samples" / "mpt-8m"
ROWS_PER_FILE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prompts = [f"Number {i}, once upon a time" for i in range(args.rows)]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_rows(Path(folder) / "in", prompts, args.new_tokens)
        job = start_job(Path(folder))
        tokens = args.rows * args.new_tokens
        engine_speeds: list[float] = []
        job_speeds: list[float] = []
        memory_kb: list[int] = []
        for n in range(args.rounds):
            engine_speeds.append(tokens / seconds_of_engine(job, prompts, args.new_tokens))
            job_speeds.append(tokens / seconds_of_job(job, paths, n))
            memory_kb.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            print(f"round {n + 1}: engine {engine_speeds[-1]:8.0f} tok/s, job {job_speeds[-1]:8.0f} tok/s", flush=True)
        job.close()
    engine, whole = statistics.median(engine_speeds), statistics.median(job_speeds)
    print(f"\n{args.rows} rows, {args.new_tokens} new tokens each: engine {engine:.0f} tok/s, job {whole:.0f} tok/s")
    print(f"the job reaches {100 * whole / engine:.1f} % of the engine, {whole / args.new_tokens:.1f} rows/s")
    grown = (memory_kb[-1] - memory_kb[0]) / 1024
    found = {"engine_tokens_per_s": engine, "job_tokens_per_s": whole, "share": whole / engine, "grown_mb": grown}
    print(json.dumps({"rows": args.rows, "new_tokens": args.new_tokens} | found))


def write_rows(folder: Path, prompts: list[str], n_new: int) -> list[str]:
    """Write the prompts as files of JSON lines; return their paths."""
    folder.mkdir()
    paths = []
    for at in range(0, len(prompts), ROWS_PER_FILE):
        path = folder / f"{at:07}.jsonl"
        rows = [
            {"id": at + i, "prompt": prompt, "seed": at + i, "max_new_tokens": n_new, "ignore_eos": True}
            for i, prompt in enumerate(prompts[at : at + ROWS_PER_FILE])
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(path))
    return paths


def start_job(folder: Path) -> BatchJob:
    environ = {"AZUREML_MODEL_DIR": str(EMBEDDED)} | dict(os.environ) | {"AZUREML_BI_OUTPUT_PATH": str(folder / "out")}
    return BatchJob(read_settings(environ), folder / "in", terminal=False)


def seconds_of_engine(job: BatchJob, prompts: list[str], n_new: int) -> float:
    """Return how long the engine alone takes: token ids in, token ids out."""
    encode = job.service.tokenizer.encode
    jobs = [
        Job(encode(prompt), SamplingParams(max_new_tokens=n_new, seed=i, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    started = time.perf_counter()
    for generation in job.service.engine.submit_all(jobs):
        generation.result()
    return time.perf_counter() - started


def seconds_of_job(job: BatchJob, paths: list[str], n: int) -> float:
    """Return how long the job takes, results on disk; every round's results are its own."""
    for path in paths:  # another content, or the results of the last round would do
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("\n" * (n + 1))
    started = time.perf_counter()
    found = job.run(paths)
    seconds = time.perf_counter() - started
    if any(f["failed_rows"] for f in found):
        raise RuntimeError("rows failed")
    return seconds


if __name__ == "__main__":
    main()
