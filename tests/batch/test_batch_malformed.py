"""Every way in which a batch's input was seen, or can be thought, to be wrong: the place is named, the rest is done."""

import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from batches import job, places, results, write

pytestmark = pytest.mark.long

PARAMETERS = '{"max_new_tokens": 1}'
GOOD = b'{"prompt": "Once", "max_new_tokens": 1}\n'
OK = None


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def line(bad: bytes, code: str, field: str | None = None) -> tuple[str, bytes, list[Any]]:
    """A case of JSON lines: a bad one between two good ones."""
    return ".jsonl", GOOD + bad + b"\n" + GOOD, [(0, 1, OK), (1, 2, (code, field)), (2, 3, OK)]


def cell(header: str, bad: str, code: str, field: str | None) -> tuple[str, bytes, list[Any]]:
    """A case of CSV: a bad record in the second row."""
    text = f"prompt,max_new_tokens{header}\nOnce,1{',' * header.count(',')}\n{bad}\nOnce,1{',' * header.count(',')}\n"
    return ".csv", text.encode("utf-8", "surrogateescape"), [(0, 2, OK), (1, 3, (code, field)), (2, 4, OK)]


def whole(suffix: str, content: bytes, code: str, at: int | None = 1) -> tuple[str, bytes, list[Any]]:
    """A case of a file of which nothing can be read."""
    return suffix, content, [(None, at, (code, None))]


ZIPPED = gzip.compress(GOOD * 2000)
TABLE = {"prompt": ["Once"] * 3, "max_new_tokens": [1, 1, 1]}

CASES: dict[str, tuple[str, bytes, list[Any]]] = {
    # JSON lines
    "half an object": line(b'{"prompt": "On', "invalid_json"),
    "no JSON at all": line(b"Once upon a time", "invalid_json"),
    "two objects in a line": line(GOOD.strip() + GOOD.strip(), "invalid_json"),
    "a trailing comma": line(b'{"prompt": "Once",}', "invalid_json"),
    "single quotes": line(b"{'prompt': 'Once'}", "invalid_json"),
    "NaN": line(b'{"prompt": "Once", "temperature": NaN}', "invalid_json"),
    "a number of 5,000 digits": line(b'{"prompt": "Once", "seed": ' + b"1" * 5000 + b"}", "invalid_json"),
    "nested too deeply": line(b"[" * 60_000, "invalid_json"),
    "no UTF-8": line(b'{"prompt": "caf\xe9"}', "invalid_encoding"),
    "NUL bytes": line(b"\0\0\0\0", "invalid_json"),
    "a row over the limit": line(b'{"prompt": "' + b"x" * 70_000 + b'"}', "row_too_large"),
    "a number as row": line(b"7", "wrong_type", ""),
    "null as row": line(b"null", "wrong_type", ""),
    "a list as row": line(b'["Once"]', "wrong_type", ""),
    "no prompt": line(b'{"id": 1, "max_new_tokens": 1}', "missing_column"),
    "an empty object": line(b"{}", "missing_column"),
    "two columns that could be the prompt": line(b'{"prompt": "a", "text": "b"}', "ambiguous_column"),
    "a prompt that is null": line(b'{"prompt": null}', "missing_field", "/prompt"),
    "a prompt that is a number": line(b'{"prompt": 7}', "wrong_type", "/prompt"),
    "a prompt that is an object": line(b'{"prompt": {"text": "Once"}}', "wrong_type", "/prompt"),
    "several prompts in a row": line(b'{"prompt": ["a", "b"]}', "wrong_length", "/prompt"),
    "half a surrogate pair in the prompt": line(b'{"prompt": "\\ud800"}', "invalid_text", "/prompt"),
    "half a surrogate pair in the id": line(b'{"prompt": "a", "id": "\\ud800"}', "invalid_text", "/id"),
    "an id that is an object": line(b'{"prompt": "a", "id": {}}', "wrong_type", "/id"),
    "an id that is too long": line(b'{"prompt": "a", "id": "' + b"x" * 600 + b'"}', "wrong_length", "/id"),
    "an id of too many bits": line(b'{"prompt": "a", "id": ' + b"9" * 400 + b"}", "out_of_range", "/id"),
    "a misspelt parameter as column": line(b'{"prompt": "a", "temprature": 1}', "unknown_parameter", "/temperature"),
    "a misspelt parameter among the parameters": line(
        b'{"prompt": "a", "parameters": {"temprature": 1}}', "unknown_parameter", "/parameters/temprature"
    ),
    "parameters that are a list": line(b'{"prompt": "a", "parameters": []}', "wrong_type", "/parameters"),
    "a parameter twice": line(b'{"prompt": "a", "seed": 1, "parameters": {"seed": 2}}', "invalid_request", "/seed"),
    "a parameter of the wrong type": line(b'{"prompt": "a", "top_p": "high"}', "wrong_type", "/top_p"),
    "a parameter out of range": line(b'{"prompt": "a", "top_p": 2}', "out_of_range", "/top_p"),
    "parameters that contradict each other": line(
        b'{"prompt": "a", "parameters": {"min_new_tokens": 9, "max_new_tokens": 2}}',
        "out_of_range",
        "/parameters/min_new_tokens",
    ),
    "a stream": line(b'{"prompt": "a", "stream": true}', "not_in_a_batch", "/stream"),
    "an output format": line(b'{"prompt": "a", "output_format": "list"}', "not_in_a_batch", "/output_format"),
    "a prompt over the context": line(b'{"prompt": "' + b"word " * 3000 + b'"}', "context_length_exceeded", "/prompt"),
    "a prompt over any context": line(b'{"prompt": "' + b"x" * 60_000 + b'"}', "prompt_too_large", "/prompt"),
    "a request with several prompts": line(
        b'{"input_data": {"input_string": ["a", "b"]}}', "wrong_length", "/input_data/input_string"
    ),
    "a request with an unknown field": line(b'{"input_data": "a", "temperature": 1}', "unknown_field", "/temperature"),
    "a last line that was cut off": (".jsonl", GOOD + GOOD[:20], [(0, 1, OK), (1, 2, ("invalid_json", None))]),
    "UTF-16": whole(".jsonl", GOOD.decode().encode("utf-16"), "invalid_encoding"),
    # compressed
    "gzip that is none": whole(".jsonl.gz", b"\x1f\x8bnothing of the kind", "truncated_file", 0),
    "gzip cut short": whole(".jsonl.gz", ZIPPED[:30], "truncated_file", 0),
    # plain text
    "a line of text that is no UTF-8": (
        ".txt",
        b"caf\xe9\n",
        [(0, 1, ("invalid_encoding", None))],
    ),
    # a JSON document
    "an empty document": whole(".json", b"", "invalid_json"),
    "a document that is a string": whole(".json", b'"Once"', "invalid_json"),
    "an array that is cut short": (
        ".json",
        b'[{"prompt": "Once", "max_new_tokens": 1},\n {"prompt": "On',
        [(0, 1, OK), (None, 2, ("invalid_json", None))],
    ),
    "an array without a comma": (
        ".json",
        b'["Once"\n {"prompt": "Once"}]',
        [(0, 1, OK), (None, 2, ("invalid_json", None))],
    ),
    "something behind the array": (".json", b'["Once"]\n["Once"]', [(0, 1, OK), (None, 2, ("invalid_json", None))]),
    "a bad row in an array": (
        ".json",
        b'[{"prompt": 7},\n {"prompt": "Once"}]',
        [(0, 1, ("wrong_type", "/prompt")), (1, 2, OK)],
    ),
    "lines in a .json file": whole(".json", GOOD * 2, "invalid_json", 2),
    "a document that is no UTF-8": whole(".json", b'["caf\xe9"]', "invalid_encoding"),
    "a document that is a bad request": whole(".json", b'{"prompts": ["a"]}', "missing_field"),
    # tables
    "a table without a line": whole(".csv", b"", "missing_column"),
    "a table without a prompt": whole(".csv", b"a,b\n1,2\n", "missing_column"),
    "a table without a header": whole(".tsv", b"Once upon a time\tyes\n", "missing_column"),
    "a column twice": whole(".csv", b"prompt,prompt\na,b\n", "invalid_csv"),
    "a column that is almost a parameter": whole(".csv", b"prompt,max_new_token\na,1\n", "unknown_parameter"),
    "a cell too many": cell("", "Once,1,2", "wrong_length", None),
    "a cell too few": cell("", "Once", "wrong_length", None),
    "text after a quote": cell("", '"Once"upon,1', "invalid_csv", None),
    "a quote that is never closed": cell("", '"Once,1', "invalid_csv", None),
    "a cell that is no number": cell("", "Once,one", "wrong_type", "/max_new_tokens"),
    "a cell that is not a number": cell(",top_p", "Once,1,nan", "wrong_type", "/top_p"),
    "a cell that is no boolean": cell(",do_sample", "Once,1,perhaps", "wrong_type", "/do_sample"),
    "a cell of parameters that is no JSON": cell(",parameters", "Once,1,{top_p: 1}", "wrong_type", "/parameters"),
    "a cell that is no UTF-8": cell("", "caf\udce9,1", "invalid_encoding", "/prompt"),
    # parquet
    "parquet that is none": whole(".parquet", GOOD, "invalid_parquet", None),
    "parquet cut short": whole(".parquet", parquet(TABLE)[:-20], "invalid_parquet", None),
    "parquet damaged in the middle": (
        ".parquet",
        parquet(TABLE, compression="NONE", use_dictionary=False, write_statistics=False).replace(
            b"Once", b"\xff\xff\xff\xff", 2
        ),
        [(0, None, ("invalid_encoding", None)), (1, None, ("invalid_encoding", None)), (2, None, OK)],
    ),
    "parquet without a prompt": whole(".parquet", parquet({"a": ["b"]}), "missing_column"),
    "parquet with nulls": (
        ".parquet",
        parquet({"prompt": [None, "Once"], "max_new_tokens": [1, None]}),
        [(0, None, ("missing_field", "/prompt")), (1, None, OK)],
    ),
    "parquet with bytes for a prompt": (
        ".parquet",
        parquet({"prompt": [b"Once"]}),
        [(0, None, ("wrong_type", "/prompt"))],
    ),
    # names
    "a suffix that nobody reads": whole(".xlsx", b"PK", "unknown_format", None),
    "no suffix": whole("", GOOD, "unknown_format", None),
    "gzip around parquet": whole(".parquet.gz", parquet(TABLE), "unknown_format", None),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The results of all cases, scored in one job beside a good file."""
    folder = tmp_path_factory.mktemp("malformed")
    names = {case: f"{number:02}{suffix}" for number, (case, (suffix, _, _)) in enumerate(CASES.items())}
    paths = [write_raw(folder / "in" / names[case], content) for case, (_, content, _) in CASES.items()]
    write_raw(folder / "in" / "half.jsonl.gz", ZIPPED[:-9])
    paths.append(str(folder / "in" / "half.jsonl.gz"))
    paths.append(write_raw(folder / "in" / "empty.jsonl", b""))
    paths.append(str(folder / "in" / "missing.jsonl"))
    paths.append(write(folder / "in" / "good.jsonl", [{"prompt": "Once", "seed": 1, "max_new_tokens": 4}] * 5))
    limits = {"MPT_MAX_BODY_BYTES": "65536", "MPT_DEFAULTS": PARAMETERS}
    with job(folder / "in", folder / "out", **limits) as running:
        running.run(paths)
    names |= {name: f"{name}.jsonl" for name in ("good", "empty", "missing")} | {"half": "half.jsonl.gz"}
    return {case: results(folder / "out", f"{name}.jsonl") for case, name in names.items()}


def write_raw(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_input_ends_as_an_error_with_its_place(case: str, found: dict[str, list[dict[str, Any]]]) -> None:
    assert places(found[case]) == CASES[case][2]


@pytest.mark.parametrize("case", CASES)
def test_an_error_says_why_and_nothing_of_the_text(case: str, found: dict[str, list[dict[str, Any]]]) -> None:
    for record in found[case]:
        if record["error"] is not None:
            assert len(record["error"]["message"]) > 10
            assert "caf" not in record["error"]["message"]
            assert "upon" not in record["error"]["message"]


def test_the_good_file_among_them_is_done(found: dict[str, list[dict[str, Any]]]) -> None:
    assert places(found["good"]) == [(i, i + 1, None) for i in range(5)]
    assert len({record["output"] for record in found["good"]}) == 1


def test_what_can_be_read_of_a_gzip_file_cut_short_is_done(found: dict[str, list[dict[str, Any]]]) -> None:
    *rows, error = places(found["half"])
    assert len(rows) > 1000
    assert rows == [(i, i + 1, None) for i in range(len(rows))]
    assert error == (None, len(rows), ("truncated_file", None))


def test_an_empty_file_has_no_rows_and_a_missing_one_an_error(found: dict[str, list[dict[str, Any]]]) -> None:
    assert found["empty"] == []
    assert places(found["missing"]) == [(None, None, ("unreadable_file", None))]
