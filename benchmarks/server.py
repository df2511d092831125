"""The whole server under open load: python benchmarks/server.py [--url http://host:port] [--png FILE]

Requests arrive at random moments (a Poisson process) at each of the given rates, whether or not earlier ones have been
answered, as they do in production; each is streamed. Printed per rate: requests and tokens per second, time to first
token and time per token at the median and the 99th percentile, and what was refused. --png draws them. Without --url
it starts Azure's server on the embedded model. The last line is one JSON object.
"""

import argparse
import contextlib
import http.client
import json
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mptserve.azure_server.launch import SCORE_DIR, Server


@dataclass
class Load:
    """What one rate gave. Times in ms."""

    rate: float
    requests_s: float = 0.0
    tokens_s: float = 0.0
    first_p50: float = 0.0
    first_p99: float = 0.0
    token_p50: float = 0.0
    token_p99: float = 0.0
    refused: int = 0
    failed: int = 0


@dataclass
class _Sample:
    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server's, up to the port")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8, 12], help="requests per second")
    parser.add_argument("--seconds", type=float, default=15.0, help="for how long requests arrive at each rate")
    parser.add_argument("--new", type=int, default=64, help="tokens that each asks for")
    parser.add_argument("--prompt", default="the meaning of life is")
    parser.add_argument("--png", type=Path, help="draw the figures into this file")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.url is None:
            server = stack.enter_context(Server(port=5098, model_dir=SCORE_DIR.parent / "samples" / "mpt-8m"))
            server.wait_until_healthy()
            args.url = server.url
        print("rate/s  answered/s   tok/s   first token p50/p99 ms   per token p50/p99 ms   refused   failed")
        loads = []
        for rate in args.rates:
            load = measure(args.url, rate, args.seconds, args.prompt, args.new)
            loads.append(load)
            first = f"{load.first_p50:13.0f} /{load.first_p99:6.0f}"
            token = f"{load.token_p50:16.1f} /{load.token_p99:6.1f}"
            answered = f"{load.requests_s:11.1f} {load.tokens_s:7.0f}"
            print(f"{rate:6.1f} {answered} {first} {token} {load.refused:9} {load.failed:8}", flush=True)
    if args.png:
        draw(loads, args.png)
    print(json.dumps([asdict(load) for load in loads]))


def measure(url: str, rate: float, seconds: float, prompt: str, n_new: int) -> Load:
    """Return what `seconds` of requests at `rate` per second gave; waits until all are answered."""
    sample, lock, rng = _Sample(), threading.Lock(), random.Random(rate)
    body = json.dumps(
        {
            "input_data": {
                "input_string": [prompt],
                "parameters": {"max_new_tokens": n_new, "ignore_eos": True, "stream": True, "return_full_text": False},
            }
        }
    )
    threads = []
    started = time.perf_counter()
    due = started
    while due < started + seconds:
        time.sleep(max(due - time.perf_counter(), 0))
        threads.append(threading.Thread(target=request, args=(url, body, n_new, sample, lock)))
        threads[-1].start()
        due += rng.expovariate(rate)
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    answered = len(sample.first)
    load = Load(rate, answered / took, answered * n_new / took, refused=sample.refused, failed=sample.failed)
    if answered > 1:
        load.first_p50, load.first_p99 = percentiles(sample.first)
        load.token_p50, load.token_p99 = percentiles(sample.token)
    return load


def request(url: str, body: str, n_new: int, sample: _Sample, lock: threading.Lock) -> None:
    """Post one streamed request and note when its text came."""
    started = time.perf_counter()
    times: list[float] = []
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    ended = False
    try:
        connection.request("POST", "/score", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status = response.status
        while status == 200 and (line := response.readline()):
            if line.startswith(b"event: text"):
                times.append(time.perf_counter())
            ended = ended or line.startswith(b"event: done")
    except OSError:
        status = 0
    finally:
        connection.close()
    with lock:
        if status in (429, 503):
            sample.refused += 1
        elif not ended or not times:
            sample.failed += 1
        else:
            sample.first.append((times[0] - started) * 1e3)
            sample.token.append((times[-1] - times[0]) * 1e3 / max(n_new - 1, 1))


def percentiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def draw(loads: list[Load], png: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    rates = [load.rate for load in loads]
    left.plot(rates, [load.tokens_s for load in loads], marker="o")
    left.set(xlabel="requests per second", ylabel="tokens per second", title="Throughput", ylim=0)
    right.plot(rates, [load.first_p50 for load in loads], marker="o", label="first token, median")
    right.plot(rates, [load.first_p99 for load in loads], marker="o", linestyle="--", label="first token, 99 %")
    right.plot(rates, [load.token_p50 for load in loads], marker="s", label="per token, median")
    right.plot(rates, [load.token_p99 for load in loads], marker="s", linestyle="--", label="per token, 99 %")
    right.set(xlabel="requests per second", ylabel="ms", title="Latency", yscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig(png, dpi=110)


if __name__ == "__main__":
    main()
