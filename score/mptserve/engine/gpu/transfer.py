"""Copies between the CPU and a GPU that do not make the CPU wait for the steps in flight."""

from collections.abc import Callable

import torch
from torch import Tensor

from mptserve.engine.sampling import Sampled
from mptserve.engine.sequence import Sequence, Token


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return `host` on `device`."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def download(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, which is there once the stream has come so far."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def download_results(ready: list[Sequence], logits: Tensor, sampled: Tensor) -> Callable[[], Sampled]:
    """Start copying a step's results to the CPU; return what waits for them.

    logits: [M, V] or more rows, the model's own.  sampled: [M, 2] or more, token id and whether logits were numbers.
    """
    tokens = download(sampled[: len(ready)])
    logprobs = {
        i: _download_logprobs(logits[i], sampled[i, :1].long(), seq.params.logprobs)
        for i, seq in enumerate(ready)
        if seq.params.logprobs is not None
    }
    done: torch.cuda.Event | None = None
    if sampled.device.type == "cuda":
        done = torch.cuda.Event()
        done.record()

    def collect() -> Sampled:
        if done is not None:
            done.synchronize()
        ids = tokens[:, 0].tolist()
        found = [_token(id, *logprobs[i]) if i in logprobs else Token(id) for i, id in enumerate(ids)]
        return Sampled(found, [bool(finite) for finite in tokens[:, 1].tolist()])

    return collect


def _download_logprobs(logits: Tensor, id: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token's own log probability [1], and the ids and log probabilities of the most likely tokens."""
    log_p = logits.log_softmax(-1)
    top = log_p.topk(min(n_top, len(log_p)))
    return download(log_p[id]), download(top.indices), download(top.values)


def _token(id: int, own: Tensor, ids: Tensor, values: Tensor) -> Token:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return Token(id, max(own.item(), -1e30), tuple(pairs))
