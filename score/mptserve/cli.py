"""The `mptserve` command: serve a model, generate, quantize, score files, benchmark, check Azure ML YAML."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from mptserve.azure_server.launch import SCORE_DIR, Server, ServerDied, progress_line
from mptserve.commands import generate as generate_command
from mptserve.commands import quantize as quantize_command
from mptserve.commands.batch import add_commands as add_batch_commands

SAMPLES = SCORE_DIR.parent / "samples"
ROLLOUT = SCORE_DIR.parent / "endpoint" / "rollout.sh"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe, as in `mptserve check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: list[str] | None) -> int:
    first, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if first == "check":  # `check` and `rollout` parse their own arguments
        from mptserve.commands.check import main as check  # imports PyTorch, which other commands do not need

        return check(rest)
    if first == "rollout":
        return subprocess.run(["bash", str(ROLLOUT), *rest], check=False).returncode
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    """Return the parser. `args.run(args)` runs the selected command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="mptserve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run azmlinfsrv with the model until Ctrl-C")
    demo = commands.add_parser("demo", help="start azmlinfsrv, post one request, print the answer, stop")
    for command in (serve, demo):
        command.add_argument("--model-dir", default=default_model_dir(), help="checkpoint folder")
        command.add_argument("--port", type=int, default=5001)
        command.add_argument(
            "--request",
            type=Path,
            default=SAMPLES / "online" / "basic.json",
            help="file of the request to post (demo) or to show as an example (serve)",
        )
        command.set_defaults(run=_run_server)
    generate = commands.add_parser("generate", help="continue one prompt; print text, speed and memory")
    generate_command.add_arguments(generate, default_model_dir())
    generate.set_defaults(run=generate_command.run)
    quantize = commands.add_parser("quantize", help="write a checkpoint with 8-bit or 4-bit weights")
    quantize_command.add_arguments(quantize)
    quantize.set_defaults(run=quantize_command.run)
    measure = commands.add_parser("bench", help="measure speed with the model, and compare it with the machine's limit")
    measure.add_argument("--model-dir", default=default_model_dir(), help="checkpoint folder")
    measure.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8, 32], help="numbers of concurrent sequences to measure"
    )
    measure.add_argument("--prompt", type=int, default=128, help="tokens per prompt")
    measure.add_argument("--new", type=int, default=32, help="tokens to generate per prompt")
    measure.add_argument("--rounds", type=int, default=3, help="runs to take the median of")
    measure.set_defaults(run=_run_bench)
    add_batch_commands(commands, default_model_dir())
    commands.add_parser("check", help="find mistakes in Azure ML YAML offline, or show which machines a model fits")
    commands.add_parser("rollout", help="replace a deployment on Azure step by step (endpoint/rollout.sh)")
    return parser


def _run_bench(args: argparse.Namespace) -> int:
    from mptserve.commands import bench  # imports PyTorch, which other commands do not need

    return bench.run(Path(args.model_dir), args.rows, args.prompt, args.new, args.rounds)


def _run_server(args: argparse.Namespace) -> int:
    """Start the server; `demo`: post a request, `serve`: wait for its end. Return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the server ends too
    try:
        with Server(args.port, args.model_dir, echo=_Echo(args.command == "serve")) as server:
            print(f"starting azmlinfsrv on port {args.port} with {args.model_dir}", flush=True)
            print(f"healthy after {server.wait_until_healthy():.1f} s", flush=True)
            return _demo(server, args.request) if args.command == "demo" else _serve(server, args.request)
    except ServerDied as exc:
        print(exc, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def default_model_dir() -> str:
    """Return AZUREML_MODEL_DIR, or the folder of the embedded model."""
    return os.environ.get("AZUREML_MODEL_DIR") or str(SAMPLES / "mpt-8m")


class _Echo:
    """Prints the server's start-up progress; with `everything`, its whole log after that."""

    def __init__(self, everything: bool) -> None:
        self.everything, self.ready = everything, False

    def __call__(self, line: str) -> None:
        progress = progress_line(line)
        if progress:
            print(f"  {progress}", flush=True)
            self.ready = self.ready or progress.startswith("engine ready")
        elif self.everything and self.ready:
            print(line, flush=True)


def _demo(server: Server, request: Path) -> int:
    """Post the request once and print request, answer, finish reason and speed."""
    body = request.read_bytes()
    print(f"\nPOST {server.url}/score\n{body.decode().strip()}\n")
    started = time.monotonic()
    posted = urllib.request.Request(server.url + "/score", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(posted) as response:
            status, headers, answer = response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            print(f"{refused.read().decode()}\n\nstatus {refused.code}")
        return 1
    seconds = time.monotonic() - started
    if headers.get_content_type() != "application/json":  # a stream, whose last event has the finish reason
        print(answer)
        return 0
    print(json.dumps(json.loads(answer), indent=2, ensure_ascii=False))
    tokens, reason = sum(_counts(headers["x-mpt-generated-tokens"])), headers["x-mpt-finish-reason"]
    speed = f"{tokens} tokens in {seconds * 1000:.0f} ms, {tokens / seconds:.0f} tokens/s"
    print(f"\nstatus {status}, finished by {reason}, {speed}")
    return 0


def _counts(header: str) -> list[int]:
    """Return the numbers of a header such as `10 12*3` (three sequences of 12)."""
    counts: list[int] = []
    for part in header.split():
        value, _, times = part.partition("*")
        counts += [int(value)] * int(times or 1)
    return counts


def _serve(server: Server, request: Path) -> int:
    """Print how to call the server, then wait for it to end or for Ctrl-C."""
    data = shlex.quote(json.dumps(json.loads(request.read_text(encoding="utf-8"))))
    print(f"\n  curl -H 'Content-Type: application/json' -d {data} {server.url}/score\n\nCtrl-C stops it.", flush=True)
    return server.process.wait()


if __name__ == "__main__":
    sys.exit(main())
