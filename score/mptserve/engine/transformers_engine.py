"""The same engine interface on `transformers`' MPT, for comparison: one sequence at a time, with its KV cache on.

It refuses the checkpoints that `transformers` 5 computes wrongly without saying so.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.devices import choose_placement
from mptserve.engine.engine import EngineStats, Job
from mptserve.engine.memory import available_cores
from mptserve.engine.placement import chosen_quant
from mptserve.engine.sampling import sample
from mptserve.engine.sequence import Generation, Sequence
from mptserve.engine.start import EngineOptions
from mptserve.errors import (
    BadSetting,
    ContextTooLong,
    GenerationFailed,
    QueueFull,
    ScoringError,
    Unavailable,
    UnsupportedModel,
)

log = logging.getLogger(__name__)


def start_transformers_engine(
    folder: Path,
    config: MPTConfig,
    n_tokens: int,
    options: EngineOptions,
    *,
    on_finish: Callable[[Sequence], None] = lambda _: None,
    on_failure: Callable[[str], None] = lambda _: None,  # noqa: ARG001 - the interface of start_engine
) -> "TransformersEngine":
    """Return a running engine; raises UnsupportedModel for what `transformers` gets wrong.

    on_failure: never called, as there is no state between sequences that could break.
    """
    from transformers import MptConfig, MptForCausalLM

    refuse_what_it_gets_wrong(config)
    place = choose_placement(options.device, options.dtype)
    if chosen_quant(options.quant, config) is not None:
        raise BadSetting("MPT_ENGINE transformers computes with plain weights only; leave MPT_QUANT at auto")
    if options.speculate_tokens:
        raise BadSetting("MPT_ENGINE transformers does not speculate; leave MPT_SPECULATE_TOKENS at 0")
    if place.device.type == "cpu":
        torch.set_num_threads(options.cpu_threads or available_cores())
    max_tokens = options.max_seq_len or config.max_seq_len
    # Built from our reading of the config, because transformers rejects published ones; max_seq_len sizes its ALiBi.
    hf_config = MptConfig(
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_layers=config.n_layers,
        vocab_size=config.vocab_size,
        max_seq_len=max_tokens,
        layer_norm_epsilon=config.layer_norm_epsilon,
        attn_config={"clip_qkv": config.clip_qkv, "softmax_scale": config.softmax_scale},
        tie_word_embeddings=config.tie_word_embeddings,
    )
    model = MptForCausalLM.from_pretrained(
        folder, config=hf_config, dtype=place.dtype, device_map=device_map(place.device)
    )
    return TransformersEngine(
        model.eval(), config, min(n_tokens, config.vocab_size), max_tokens, options.queue_limit, on_finish
    )


def device_map(device: torch.device) -> torch.device | str:
    """Return where `transformers` puts the layers: where there are several GPUs, accelerate spreads them over all."""
    return "auto" if device.type == "cuda" and torch.cuda.device_count() > 1 else device


def refuse_what_it_gets_wrong(config: MPTConfig) -> None:
    """Raise UnsupportedModel, naming the key, for options that `transformers` 5.23 reads and then ignores."""
    for name, value, computed in (
        ("attn_config.alibi_bias_max", config.alibi_bias_max, 8),
        ("attn_config.qk_ln", config.qk_ln, False),
        ("expansion_ratio", config.expansion_ratio, 4),
        ("logit_scale", config.logit_scale, None),
        ("no_bias", config.no_bias, True),
        ("model_type", config.model_type, "mpt"),
    ):
        if value != computed:
            raise UnsupportedModel(
                f"config.json: {name} is {value!r}, which transformers ignores and computes as {computed!r}; "
                "its answers would be wrong. Use MPT_ENGINE=mpt"
            )


class TransformersEngine:
    """Sequences one after another through `transformers`' forward pass and our sampling."""

    def __init__(
        self,
        model: Any,
        config: MPTConfig,
        n_tokens: int,
        max_tokens: int,
        queue_limit: int,
        on_finish: Callable[[Sequence], None],
    ) -> None:
        self.model, self.n_tokens, self.max_tokens, self.queue_limit = model, n_tokens, max_tokens, queue_limit
        self.failure: str | None = None
        self.draining = False
        self._eos_ids = torch.tensor(config.eos_token_ids, device=model.device)
        self._on_finish, self._stats = on_finish, EngineStats()
        self._queue: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="reference-engine", daemon=True)
        self._thread.start()

    def submit_all(self, jobs: Iterable[Job]) -> list[Generation]:
        """As MPTEngine.submit_all."""
        sequences = [
            Sequence(
                j.prompt, j.params, tuple(self._eos_ids.tolist()), j.stop_check, j.deadline, self._finished, j.events
            )
            for j in jobs
        ]
        if self.draining:
            raise Unavailable("the server is shutting down; ask another instance", code="draining")
        if (waiting := self._queue.qsize()) and waiting >= self.queue_limit:
            raise QueueFull(f"{waiting} sequences wait already (limit {self.queue_limit}); try again later")
        for seq in sequences:
            if seq.n_prompt + seq.params.max_new_tokens > self.max_tokens:
                raise ContextTooLong(f"{seq.n_prompt} + {seq.params.max_new_tokens} tokens > {self.max_tokens}")
        for seq in sequences:
            self._queue.put(seq)
        return [Generation(seq, lambda: None) for seq in sequences]

    def stats(self) -> EngineStats:
        self._stats.waiting = self._queue.qsize()
        return self._stats

    def drain(self) -> None:
        self.draining = True

    def close(self) -> None:
        """End the thread after the sequences that were taken."""
        self.draining = True
        self._queue.put(None)
        self._thread.join()

    def _finished(self, seq: Sequence) -> None:
        self._stats.finished = self._stats.finished + Counter([seq.finish_reason or ""])
        self._on_finish(seq)

    @torch.inference_mode()
    def _loop(self) -> None:
        while (seq := self._queue.get()) is not None:
            self._stats.running = 1
            try:
                self._generate(seq)
            except ScoringError as exc:
                seq.finish("error", exc)
            except Exception:
                log.exception("generating one sequence failed")
                seq.finish("error", GenerationFailed("computing this sequence failed; the log has the reason"))
            self._stats.running = 0

    def _generate(self, seq: Sequence) -> None:
        ids, past = torch.tensor([seq.prompt], device=self.model.device), None
        seq.timings.admitted = seq.timings.submitted
        self._stats.prompt_tokens += seq.n_prompt
        while not seq.expire():
            output = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            sampled = sample(output.logits[:, -1, : self.n_tokens].float(), [seq], self._eos_ids)
            if not sampled.finite[0]:
                raise GenerationFailed("the model computed logits that are not numbers")
            seq.append(sampled.tokens[0])
            self._stats.generated_tokens += 1
            ids = torch.tensor([[sampled.tokens[0].id]], device=self.model.device)
