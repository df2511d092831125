"""`mptserve generate`: continues one prompt on this machine, and prints speed and memory."""

import argparse
import dataclasses
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptserve.commands.hub import fetch, is_hub_name
from mptserve.errors import ScoringError, StartupError
from mptserve.settings import Settings, read_settings

if TYPE_CHECKING:  # imports PyTorch, which other commands do not need
    from mptserve.service import Service
    from mptserve.streaming import RunningSequence

_DAY_MS = 86_400_000
"""The deadline of the prompt, out of the way: a slow machine may take long."""


def add_arguments(command: argparse.ArgumentParser, model_dir: str) -> None:
    """Add this subcommand's options to `command`; `run` reads them. model_dir: the default checkpoint."""
    command.add_argument(
        "--model",
        "--repo-id-or-model-path",  # the name in older INT4 examples
        default=model_dir,
        help="checkpoint folder, or OWNER/NAME on the hub; default: AZUREML_MODEL_DIR, or the embedded model",
    )
    command.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    command.add_argument("--prompt", help="text to continue; default, or `-`: read standard input")
    command.add_argument("--n-predict", type=int, default=32, help="tokens to generate at most")
    command.add_argument("--quant", choices=("int8", "int4"), help="quantize the weights while loading (MPT_QUANT)")
    command.add_argument(
        "--speculate",
        type=int,
        choices=range(16),
        metavar="TOKENS",
        help="speculative decoding: draft tokens per step at most; 0: off (MPT_SPECULATE_TOKENS)",
    )
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) selects the most likely token")
    command.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens with this total probability"
    )
    command.add_argument("--seed", type=int, help="the same seed gives the same text")
    command.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    command.add_argument("--stream", action="store_true", help="print the text as it is generated")


def run(args: argparse.Namespace) -> int:
    """Generate and print; return the exit status. An error is one line on standard error."""
    from mptserve.service import Service

    prompt = args.prompt if args.prompt not in (None, "-") else sys.stdin.read().removesuffix("\n")
    try:
        service = Service(_settings(args))
    except StartupError as exc:
        print(f"mptserve: {exc}", file=sys.stderr)
        return 1
    try:
        return _generate(service, args, prompt)
    except ScoringError as exc:
        print(f"mptserve: {exc.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    finally:
        service.engine.close()


def _settings(args: argparse.Namespace) -> Settings:
    """Return the environment's settings with those of the command line, for one sequence of any length."""
    settings = read_settings()
    folder = fetch(args.model, args.revision) if is_hub_name(args.model) else Path(args.model).expanduser()
    changes: dict[str, Any] = {"model_dir": str(folder), "deadline_ms": _DAY_MS}
    changes |= {"max_rows": 1, "max_new_tokens": max(args.n_predict, settings.max_new_tokens)}
    if args.quant:
        changes["quant"] = args.quant
    if args.speculate is not None:
        changes["speculate_tokens"] = args.speculate
    return dataclasses.replace(settings, **changes)


def _generate(service: "Service", args: argparse.Namespace, prompt: str) -> int:
    """Send the prompt through the same path as a request, so that rules and text are those of the server."""
    from mptserve.prompt import ChatPrompt, Message
    from mptserve.streaming import TextDelta

    parameters: dict[str, Any] = {"max_new_tokens": args.n_predict, "return_full_text": False, "stream": True}
    parameters |= {"temperature": args.temperature, "top_p": args.top_p}
    parameters |= {} if args.seed is None else {"seed": args.seed}
    body = json.dumps({"input_data": {"input_string": [prompt], "parameters": parameters}})
    request = service.parser.parse(body.encode())
    if args.chat:
        chat = dataclasses.replace(request.prompts[0], prompt=ChatPrompt((Message("user", prompt),)))
        request = dataclasses.replace(request, prompts=[chat])
    submission = service.submit(request, time.monotonic())
    print(f"{'-' * 20} prompt {'-' * 20}\n{prompt}\n{'-' * 20} text {'-' * 22}", flush=True)
    pieces = []
    for item in service.stream(submission):
        if isinstance(item, TextDelta):
            pieces.append(item.text)
            if args.stream:
                print(item.text, end="", flush=True)
    print("" if args.stream else "".join(pieces))
    print(f"{'-' * 48}\n{_figures(service, submission.running[0])}", flush=True)
    return 0


def _figures(service: "Service", running: "RunningSequence") -> str:
    """Return token counts, times and memory as text."""
    seq = running.sequence
    times, n = seq.timings, len(seq.out)
    first = times.first_token - times.submitted
    rest = times.finished - times.first_token
    speed = f", then {(n - 1) / rest:.1f} tokens/s" if n > 1 and rest > 0 else ""
    drafts = f"\n{seq.n_drafted} draft tokens, {seq.n_accepted} of them accepted" if seq.n_drafted else ""
    return (
        f"{seq.n_prompt} prompt tokens, {n} new, ended by {seq.finish_reason}{drafts}\n"
        f"first token after {first * 1e3:.0f} ms{speed}\n{_memory(service)}"
    )


def _memory(service: "Service") -> str:
    """Return the peak memory of this process, and of the GPU if it used one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"memory: {peak / 1e9:.2f} GB at most"
    if service.settings.device != "cpu":
        import torch

        if torch.cuda.is_available():
            text += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU"
    return text
