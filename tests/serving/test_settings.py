"""Environment variables to settings: each by its name, its type and its range, and a message for everything else."""

import dataclasses
from pathlib import Path

import pytest

from mptserve.errors import BadSetting
from mptserve.settings import FIELDS, Settings, read_settings

GOOD = {
    "AZUREML_MODEL_DIR": ("/models/mpt-7b", "/models/mpt-7b"),
    "MPT_ENGINE": ("transformers", "transformers"),
    "MPT_DEVICE": ("cuda", "cuda"),
    "MPT_DTYPE": ("float16", "float16"),
    "MPT_MAX_SEQ_LEN": ("65536", 65536),
    "MPT_KV_CACHE_GB": ("1.5", 1.5),
    "MPT_MAX_ROWS": ("1024", 1024),
    "MPT_PREFILL_TOKENS": ("2048", 2048),
    "MPT_QUEUE_LIMIT": ("1", 1),
    "MPT_CPU_THREADS": ("3", 3),
    "MPT_SPECULATE_TOKENS": ("15", 15),
    "MPT_DEADLINE_MS": ("86400000", 86_400_000),
    "MPT_DEADLINE_ACTION": ("error", "error"),
    "MPT_OUTPUT_FORMAT": ("list", "list"),
    "MPT_QUANT": ("int4", "int4"),
    "MPT_KV_DTYPE": ("int8", "int8"),
    "MPT_MAX_BODY_BYTES": ("1000", 1000),
    "MPT_MAX_PROMPTS": ("1000", 1000),
    "MPT_MAX_NEW_TOKENS": ("128", 128),
    "MPT_MAX_SEQUENCES": ("1", 1),
    "MPT_MODEL_NAME": ("mine", "mine"),
    "MPT_CHAT_TEMPLATE": ("dolly-30b", "dolly-30b"),
    "MPT_API_KEYS_FILE": ("/keys", "/keys"),
    "MPT_CONTENT_SAFETY_ENDPOINT": ("https://x", "https://x"),
    "MPT_CONTENT_SAFETY_KEY_FILE": ("/key", "/key"),
    "MPT_CONTENT_SAFETY_SEVERITY": ("2", 2),
    "MPT_DEFAULTS": ('{"temperature": 0.7}', '{"temperature": 0.7}'),
    "AZUREML_BI_OUTPUT_PATH": ("/results", "/results"),
    "MPT_BATCH_FORMAT": ("parquet", "parquet"),
    "MPT_BATCH_PROMPT_COLUMN": ("question", "question"),
    "MPT_BATCH_SEED": ("7", 7),
    "MPT_BATCH_ERROR_SHARE": ("0.25", 0.25),
    "MPT_LOG_LEVEL": ("DEBUG", "DEBUG"),
}


def refusal(**environ: str) -> str:
    with pytest.raises(BadSetting) as caught:
        read_settings(environ)
    return str(caught.value)


def test_nothing_set_gives_the_defaults() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"PATH": "/bin", "AZUREML_OTHER": "x", "mpt_device": "cuda"}) == Settings()


def test_defaults() -> None:
    assert dataclasses.asdict(Settings()) == {
        "model_dir": "",
        "engine": "mpt",
        "device": "auto",
        "dtype": "auto",
        "quant": "auto",
        "kv_dtype": "auto",
        "max_seq_len": 0,
        "kv_cache_gb": 0.0,
        "max_rows": 32,
        "prefill_tokens": 512,
        "queue_limit": 256,
        "cpu_threads": 0,
        "speculate_tokens": 0,
        "deadline_ms": 170_000,
        "deadline_action": "partial",
        "output_format": "auto",
        "max_body_bytes": 16_000_000,
        "max_prompts": 128,
        "max_new_tokens": 4096,
        "max_sequences": 16,
        "model_name": "",
        "chat_template": "auto",
        "api_keys_file": "",
        "content_safety_endpoint": "",
        "content_safety_key_file": "",
        "content_safety_severity": 4,
        "defaults": "{}",
        "batch_output_dir": "",
        "batch_format": "jsonl",
        "batch_prompt_column": "",
        "batch_seed": 0,
        "batch_error_share": 0.5,
        "log_level": "INFO",
    }


def test_every_variable_reaches_its_field() -> None:
    by_env = {f.metadata["env"]: f.name for f in FIELDS}
    assert set(by_env) == set(GOOD)
    found = dataclasses.asdict(read_settings({env: text for env, (text, _) in GOOD.items()}))
    assert found == {by_env[env]: value for env, (_, value) in GOOD.items()}
    for env, (text, value) in GOOD.items():
        alone = getattr(read_settings({env: text}), by_env[env])
        assert (alone, type(alone)) == (value, type(value))
        assert value != getattr(Settings(), by_env[env])


@pytest.mark.parametrize("env", GOOD)
def test_empty_variable_is_a_variable_that_is_not_set(env: str) -> None:
    assert read_settings({env: ""}) == Settings()


def test_settings_come_from_the_process_when_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for env in GOOD:
        monkeypatch.delenv(env, raising=False)
    monkeypatch.setenv("MPT_MAX_ROWS", "7")
    assert read_settings() == Settings(max_rows=7)


def test_home_is_written_out_in_the_model_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert read_settings({"AZUREML_MODEL_DIR": "~/mpt"}).model_dir == str(Path("/home/ada/mpt"))


def test_unknown_setting_is_refused() -> None:
    known = ", ".join(sorted(GOOD))
    assert refusal(MPT_MAX_ROW="7") == f"MPT_MAX_ROW is not a setting; the settings are {known}"
    assert refusal(MPT_="") == f"MPT_ is not a setting; the settings are {known}"


OUT_OF_RANGE = [
    ("MPT_MAX_SEQ_LEN", "-1", "between 0 and 1048576"),
    ("MPT_MAX_SEQ_LEN", "1048577", "between 0 and 1048576"),
    ("MPT_KV_CACHE_GB", "-0.5", "between 0 and 10000"),
    ("MPT_KV_CACHE_GB", "nan", "between 0 and 10000"),
    ("MPT_KV_CACHE_GB", "inf", "between 0 and 10000"),
    ("MPT_MAX_ROWS", "0", "between 1 and 1024"),
    ("MPT_MAX_ROWS", "1025", "between 1 and 1024"),
    ("MPT_PREFILL_TOKENS", "31", "between 32 and 65536"),
    ("MPT_PREFILL_TOKENS", "65537", "between 32 and 65536"),
    ("MPT_QUEUE_LIMIT", "0", "between 1 and 1000000"),
    ("MPT_QUEUE_LIMIT", "1000001", "between 1 and 1000000"),
    ("MPT_CPU_THREADS", "-1", "between 0 and 1024"),
    ("MPT_CPU_THREADS", "1025", "between 0 and 1024"),
    ("MPT_SPECULATE_TOKENS", "16", "between 0 and 15"),
    ("MPT_DEADLINE_MS", "0", "between 1 and 86400000"),
    ("MPT_DEADLINE_MS", "86400001", "between 1 and 86400000"),
    ("MPT_MAX_BODY_BYTES", "0", "between 1 and 100000000"),
    ("MPT_MAX_BODY_BYTES", "100000001", "between 1 and 100000000"),
    ("MPT_MAX_PROMPTS", "0", "between 1 and 100000"),
    ("MPT_MAX_PROMPTS", "100001", "between 1 and 100000"),
    ("MPT_MAX_NEW_TOKENS", "0", "between 1 and 1048576"),
    ("MPT_MAX_NEW_TOKENS", "1048577", "between 1 and 1048576"),
    ("MPT_MAX_SEQUENCES", "0", "between 1 and 1024"),
    ("MPT_MAX_SEQUENCES", "1025", "between 1 and 1024"),
    ("MPT_CONTENT_SAFETY_SEVERITY", "0", "between 1 and 7"),
    ("MPT_CONTENT_SAFETY_SEVERITY", "8", "between 1 and 7"),
    ("MPT_BATCH_SEED", "-1", "between 0 and 9007199254740991"),
    ("MPT_BATCH_SEED", "9007199254740992", "between 0 and 9007199254740991"),
    ("MPT_BATCH_ERROR_SHARE", "-0.1", "between 0 and 1"),
    ("MPT_BATCH_ERROR_SHARE", "1.1", "between 0 and 1"),
]


@pytest.mark.parametrize(("env", "text", "rule"), OUT_OF_RANGE)
def test_number_out_of_range_is_refused(env: str, text: str, rule: str) -> None:
    assert refusal(**{env: text}) == f"{env} must be {rule}, got {text}"


NUMBERS = sorted({env for env, _, _ in OUT_OF_RANGE})


def test_table_above_names_every_number() -> None:
    assert {f.metadata["env"] for f in FIELDS if f.type is not str} == set(NUMBERS)


@pytest.mark.parametrize("env", NUMBERS)
def test_text_where_a_number_belongs_is_refused(env: str) -> None:
    kind = "float" if env in ("MPT_KV_CACHE_GB", "MPT_BATCH_ERROR_SHARE") else "int"
    for text in ("many", "1e", "0x10", "1,000", "true"):
        assert refusal(**{env: text}) == f"{env} must be a number ({kind}), got {text!r}"


@pytest.mark.parametrize("text", ["1.0", "1e3", "9" * 5000])
def test_whole_number_is_written_as_one(text: str) -> None:
    assert refusal(MPT_MAX_ROWS=text) == f"MPT_MAX_ROWS must be a number (int), got {text!r}"


CHOICES = {
    "MPT_ENGINE": ("mpt", "transformers"),
    "MPT_DEVICE": ("auto", "cpu", "cuda"),
    "MPT_DTYPE": ("auto", "bfloat16", "float16", "float32"),
    "MPT_DEADLINE_ACTION": ("partial", "error"),
    "MPT_OUTPUT_FORMAT": ("auto", "records", "columns", "list"),
    "MPT_CHAT_TEMPLATE": ("auto", "chatml", "dolly", "dolly-30b", "dialogue", "human-bot", "own"),
    "MPT_LOG_LEVEL": ("DEBUG", "INFO", "WARNING", "ERROR"),
}


@pytest.mark.parametrize("env", CHOICES)
def test_choice_takes_its_words_and_no_others(env: str) -> None:
    for word in CHOICES[env]:
        read_settings({env: word})
    for word in ("other", CHOICES[env][0].swapcase(), f" {CHOICES[env][0]}"):
        assert refusal(**{env: word}) == f"{env} must be one of {', '.join(CHOICES[env])}, got {word!r}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "MPT_DEFAULTS must be a JSON object, got '{'"),
        ("temperature=0.7", "MPT_DEFAULTS must be a JSON object, got 'temperature=0.7'"),
        ('{"temperature": NaN}', "MPT_DEFAULTS must be a JSON object, got '{\"temperature\": NaN}'"),
        ("[]", "MPT_DEFAULTS must be a JSON object, got list"),
        ("null", "MPT_DEFAULTS must be a JSON object, got NoneType"),
        ("[" * 10_000, f"MPT_DEFAULTS must be a JSON object, got {'[' * 10_000!r}"),
    ],
    ids=["half", "no JSON", "NaN", "list", "null", "deep"],
)
def test_defaults_that_are_no_json_object_are_refused(text: str, message: str) -> None:
    assert refusal(MPT_DEFAULTS=text) == message


def test_defaults_are_read_as_json() -> None:
    assert read_settings({"MPT_DEFAULTS": '{"stop": ["é"]}'}).default_parameters == {"stop": ["é"]}
    assert Settings().default_parameters == {}


BY_AZURE = {"model_dir": "AZUREML_MODEL_DIR", "batch_output_dir": "AZUREML_BI_OUTPUT_PATH"}


def test_every_setting_says_what_it_is_for() -> None:
    for f in FIELDS:
        assert f.metadata["use"]
        assert f.metadata["env"] == BY_AZURE.get(f.name, f"MPT_{f.name.upper()}")
