"""A way to generate in a process of its own, perhaps of another Python interpreter, and what its token times say.

The standard library alone, so that an interpreter without this project's packages can run the process: peers whose
requirements exclude ours need one. Requests and answers are lines of JSON on the process's standard input and output:

    <- {"versions": {...}}                                once the model is loaded
    -> {"prompts": [[…]], "n_new": …, "use_cache": …}     any number of times
    <- {"seconds": …, "tokens": [[…]], "moments": [[…]]}  see Run
    -> null
    <- {"memory_gb": …}                                   at its end
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OnToken = Callable[[int], None]
"""Called with a row's number whenever its next token is known."""
Generate = Callable[[list[list[int]], int, bool, OnToken], list[list[int]]]
"""(prompts, all of one length; new tokens of each, no fewer; with a KV cache; what to call) -> the new tokens."""
Make = Callable[[Path, str, bool], Generate]
"""(checkpoint folder; dtype or kind of quantised weights; greedy, or with temperature 0.5 and top_p 0.5)."""

PACKAGES = ("torch", "transformers", "ctranslate2", "llama-cpp-python", "openvino", "optimum-intel", "nncf")


@dataclass(frozen=True)
class Run:
    """What one request came to.

    seconds: until everything was generated.  tokens: new ones, per row.  moments: seconds from the request until each
    of them was known, per row.
    """

    seconds: float
    tokens: list[list[int]]
    moments: list[list[float]]

    @property
    def first_s(self) -> float:
        """Seconds until every row had its first token."""
        return max(row[0] for row in self.moments)

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second, counted while all rows decoded: from the last first token to the first last token.

        An engine that reads many prompts one after another decodes some rows before it has read the others: these
        tokens are not counted. Raises ValueError where no token came in between.
        """
        begin, end = self.first_s, min(row[-1] for row in self.moments)
        n_tokens = sum(begin < moment <= end for row in self.moments for moment in row)
        if not n_tokens:
            raise ValueError("some rows ended before all had begun: ask for more new tokens")
        return n_tokens / (end - begin)


class Contender:
    """Somebody who generates, in a process of its own.

    In one process they would slow each other down even while they wait: OpenMP keeps a pool of threads for each, and
    lets them sleep between operations once the pools together outnumber the cores.
    versions: of the packages that count here and that its interpreter has.
    """

    def __init__(
        self, make: Make, folder: Path, dtype: str, *, greedy: bool = False, python: str = sys.executable
    ) -> None:
        """Start `python` on a function of a module that it can import too; return when the model is loaded."""
        self._n_vocab: int = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        how = "greedy" if greedy else "sampled"
        command = [python, __file__, inspect.getfile(make), make.__name__, str(folder), dtype, how]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self._receive()["versions"]

    def run(self, rows: int, n_prompt: int, n_new: int, use_cache: bool = True) -> Run:
        """Generate n_new tokens for each of `rows` prompts of fresh random ids, so that no prefix cache helps."""
        prompts = [[random.randrange(2, self._n_vocab) for _ in range(n_prompt)] for _ in range(rows)]
        return self.ask(prompts, n_new, use_cache)

    def ask(self, prompts: list[list[int]], n_new: int, use_cache: bool = True) -> Run:
        self._send({"prompts": prompts, "n_new": n_new, "use_cache": use_cache})
        return Run(**self._receive())

    def close(self) -> float:
        """End the process; return the memory that it held at the end, in GB."""
        self._send(None)
        gigabytes: float = self._receive()["memory_gb"]
        self._process.communicate()
        return gigabytes

    def _send(self, what: dict[str, Any] | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(f"a contender ended with code {self._process.returncode}; its output says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def contend(make: Make, folder: Path, dtype: str, greedy: bool) -> None:
    """Load, then answer requests until null comes, or the end of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers

    def send(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    generate = make(folder, dtype, greedy)
    send({"versions": versions()})
    for line in sys.stdin:
        if (job := json.loads(line)) is None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            send({"memory_gb": pages * resource.getpagesize() / 1e9})
            return
        send(asdict(timed(generate, **job)))


def timed(generate: Generate, prompts: list[list[int]], n_new: int, use_cache: bool) -> Run:
    """Return the answer to one request and its times."""
    moments: list[list[float]] = [[] for _ in prompts]
    started = time.perf_counter()
    tokens = generate(prompts, n_new, use_cache, lambda row: moments[row].append(time.perf_counter() - started))
    seconds = time.perf_counter() - started
    if {*map(len, tokens), *map(len, moments)} != {n_new}:
        raise RuntimeError(f"asked for {n_new} tokens a row, got {[len(row) for row in tokens]}")
    return Run(seconds, tokens, moments)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def run_on_new_thread(work: Callable[..., object], *args: object) -> None:
    """Run `work` in a process that ends with it: what a conversion leaves behind is no memory of the contender's."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} ended with code {process.exitcode}")


def main() -> None:
    file, name, folder, dtype, how = sys.argv[1:]
    sys.path.insert(0, str(Path(file).parent))
    contend(getattr(importlib.import_module(Path(file).stem), name), Path(folder), dtype, how == "greedy")


if __name__ == "__main__":
    main()
