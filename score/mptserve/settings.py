"""Every environment variable of the package, read once into a frozen dataclass.

The table in docs/configuration.md is made from `FIELDS` below (tools/docs.py).
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mptserve import strict_json
from mptserve.errors import BadSetting


def _setting(
    env: str, default: Any, use: str, *, low: float = 0, high: float = 1e12, choices: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"env": env, "use": use, "low": low, "high": high, "choices": choices})


CHAT_TEMPLATES = ("chatml", "dolly", "dolly-30b", "dialogue", "human-bot", "own")
"""Those of templates.json, and the checkpoint's own."""


@dataclass(frozen=True)
class Settings:
    """What an operator can set. Numbers carry their unit in the name; 0 often means "decide for me"."""

    model_dir: str = _setting("AZUREML_MODEL_DIR", "", "folder with the checkpoint, at any usual depth below it")
    engine: str = _setting(
        "MPT_ENGINE",
        "mpt",
        "`transformers` is the reference engine, one request at a time",
        choices=("mpt", "transformers"),
    )
    device: str = _setting("MPT_DEVICE", "auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    dtype: str = _setting(
        "MPT_DTYPE",
        "auto",
        "auto: bfloat16 where the hardware computes it, else float16 (GPU) or float32 (CPU)",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quant: str = _setting(
        "MPT_QUANT",
        "auto",
        "weights of the linear layers; auto: as the checkpoint stores them; int8, int4: quantised while loading",
        choices=("auto", "int8", "int4"),
    )
    kv_dtype: str = _setting(
        "MPT_KV_DTYPE",
        "auto",
        "keys and values on a GPU; auto: the model's dtype; int8: half of the memory, error below 1 %",
        choices=("auto", "int8"),
    )
    max_seq_len: int = _setting(
        "MPT_MAX_SEQ_LEN",
        0,
        "context limit in tokens; 0: the checkpoint's; more is allowed, ALiBi extrapolates",
        high=1 << 20,
    )
    kv_cache_gb: float = _setting(
        "MPT_KV_CACHE_GB", 0.0, "memory for keys and values in GB; 0: from what is free after loading", high=1e4
    )
    max_rows: int = _setting("MPT_MAX_ROWS", 32, "sequences computed in one step", low=1, high=1024)
    prefill_tokens: int = _setting(
        "MPT_PREFILL_TOKENS", 512, "prompt tokens computed in one step, beside the rows that decode", low=32, high=65536
    )
    queue_limit: int = _setting(
        "MPT_QUEUE_LIMIT", 256, "sequences that may wait; one more is answered 429", low=1, high=1_000_000
    )
    cpu_threads: int = _setting("MPT_CPU_THREADS", 0, "threads of the CPU engine, at most; 0: one per core", high=1024)
    speculate_tokens: int = _setting(
        "MPT_SPECULATE_TOKENS",
        0,
        "CPU: most draft tokens of speculative decoding, up to 15, for a sequence that runs alone and repeats itself; "
        "answers stay the same; 0: off",
        high=15,
    )
    deadline_ms: int = _setting(
        "MPT_DEADLINE_MS", 170_000, "time a request may take; below Azure's request_timeout_ms", low=1, high=86_400_000
    )
    deadline_action: str = _setting(
        "MPT_DEADLINE_ACTION", "partial", "at the deadline: answer what there is, or 504", choices=("partial", "error")
    )
    output_format: str = _setting(
        "MPT_OUTPUT_FORMAT",
        "auto",
        "shape of the answer when a request does not name one; auto: by the request's form",
        choices=("auto", "records", "columns", "list"),
    )
    max_body_bytes: int = _setting(
        "MPT_MAX_BODY_BYTES", 16_000_000, "larger bodies are answered 413", low=1, high=100_000_000
    )
    max_prompts: int = _setting("MPT_MAX_PROMPTS", 128, "prompts in one request", low=1, high=100_000)
    max_new_tokens: int = _setting(
        "MPT_MAX_NEW_TOKENS", 4096, "largest `max_new_tokens` a request may ask for", low=1, high=1 << 20
    )
    max_sequences: int = _setting("MPT_MAX_SEQUENCES", 16, "largest `num_return_sequences`", low=1, high=1024)
    model_name: str = _setting(
        "MPT_MODEL_NAME", "", "the model's name in `/v1/models`; empty: the name of the checkpoint's folder"
    )
    chat_template: str = _setting(
        "MPT_CHAT_TEMPLATE",
        "auto",
        "how messages are written; auto: the checkpoint's own template, else `chatml` if it has those tokens, "
        "else `dialogue`",
        choices=("auto", *CHAT_TEMPLATES),
    )
    api_keys_file: str = _setting(
        "MPT_API_KEYS_FILE", "", "OpenAI server: a file with one API key per line, read again when it changes"
    )
    content_safety_endpoint: str = _setting(
        "MPT_CONTENT_SAFETY_ENDPOINT", "", "Azure AI Content Safety that judges prompts and answers; empty: none"
    )
    content_safety_key_file: str = _setting(
        "MPT_CONTENT_SAFETY_KEY_FILE", "", "file with its key; empty: the machine's managed identity"
    )
    content_safety_severity: int = _setting(
        "MPT_CONTENT_SAFETY_SEVERITY", 4, "lowest severity (0 to 6) in any category that is blocked", low=1, high=7
    )
    defaults: str = _setting(
        "MPT_DEFAULTS", "{}", 'JSON object of parameters used when a request omits them, e.g. `{"temperature": 0.7}`'
    )
    batch_output_dir: str = _setting(
        "AZUREML_BI_OUTPUT_PATH", "", "folder for the results of a batch job; Azure sets it"
    )
    batch_format: str = _setting(
        "MPT_BATCH_FORMAT",
        "jsonl",
        "what a batch job writes; csv: JSON lines, and predictions.csv as Azure's batch notebooks read it",
        choices=("jsonl", "parquet", "csv"),
    )
    batch_prompt_column: str = _setting(
        "MPT_BATCH_PROMPT_COLUMN", "", "column of a batch's prompts; empty: `input_string`, `prompt` or `text`"
    )
    batch_seed: int = _setting(
        "MPT_BATCH_SEED", 0, "rows without a seed get one made of this number and their place", high=(1 << 53) - 1
    )
    batch_error_share: float = _setting(
        "MPT_BATCH_ERROR_SHARE", 0.5, "a file with a larger share of failed rows counts as failed", high=1
    )
    log_level: str = _setting(
        "MPT_LOG_LEVEL", "INFO", "level of the JSON log", choices=("DEBUG", "INFO", "WARNING", "ERROR")
    )

    @property
    def default_parameters(self) -> dict[str, Any]:
        """Return `defaults` as a dict; its keys and values are checked against the request schema at start."""
        value: dict[str, Any] = json.loads(self.defaults)
        return value


FIELDS = dataclasses.fields(Settings)


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of this process.

    Raises BadSetting naming the variable, the rule and the value; also for an `MPT_…` variable that does not
    exist, so that a typo cannot silently become a default.
    """
    env = os.environ if environ is None else environ
    known = {f.metadata["env"] for f in FIELDS}
    for name in env:
        if name.startswith("MPT_") and name not in known:
            raise BadSetting(f"{name} is not a setting; the settings are {', '.join(sorted(known))}")
    values = {f.name: _parse(f, env[f.metadata["env"]]) for f in FIELDS if env.get(f.metadata["env"], "") != ""}
    settings = Settings(**values)
    try:
        defaults = strict_json.loads(settings.defaults)
    except strict_json.NotJson as exc:
        raise BadSetting(f"MPT_DEFAULTS must be a JSON object, got {settings.defaults!r}") from exc
    if not isinstance(defaults, dict):
        raise BadSetting(f"MPT_DEFAULTS must be a JSON object, got {type(defaults).__name__}")
    return settings


def _parse(f: "dataclasses.Field[Any]", text: str) -> Any:
    rule = f.metadata
    if f.type is str:
        value = str(Path(text).expanduser()) if rule["env"] == "AZUREML_MODEL_DIR" else text
        if rule["choices"] and value not in rule["choices"]:
            raise BadSetting(f"{rule['env']} must be one of {', '.join(rule['choices'])}, got {text!r}")
        return value
    kind = int if f.type is int else float
    try:
        number = kind(text)
    except ValueError as exc:
        raise BadSetting(f"{rule['env']} must be a number ({kind.__name__}), got {text!r}") from exc
    if not rule["low"] <= number <= rule["high"]:
        raise BadSetting(f"{rule['env']} must be between {rule['low']:.0f} and {rule['high']:.0f}, got {text}")
    return number
