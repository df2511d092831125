"""Turns rows into requests: finds the prompt and the parameters, and makes a seed where a row has none."""

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from mptserve.batch.readers import InputRow
from mptserve.errors import BadFile, InvalidRequest
from mptserve.request import GenerateRequest, Located, RequestParser, dialect, looks_like_messages

PROMPT_COLUMNS = ("input_string", "prompt", "text")
NOT_IN_A_BATCH = {"stream": "a batch job does not stream", "output_format": "a batch job has its own format"}
MAX_ID_CHARS = 512
MAX_SEED = (1 << 53) - 1


@dataclass(frozen=True)
class Shape:
    """The column of the prompt, and the columns that are parameters."""

    prompt: str
    parameters: tuple[str, ...]


class RowRequests:
    """Makes requests of rows, by the online server's rules."""

    def __init__(self, parser: RequestParser, prompt_column: str, seed: int) -> None:
        self._parser, self._prompt_column, self._seed = parser, prompt_column, seed
        self._shapes: dict[tuple[str, ...], Shape] = {}

    def columns(self, names: list[str]) -> list[str]:
        """Return the columns to read; raises BadFile when none can be the prompt."""
        try:
            shape = self._shape(tuple(names))
        except InvalidRequest as exc:
            raise BadFile(exc.message, code=exc.code, line=1) from exc
        return [n for n in names if n in (shape.prompt, "id", "parameters", *shape.parameters)]

    def expand(self, value: dict[str, Any]) -> list[Any]:
        """Return one row value per prompt of an online request; raises InvalidRequest."""
        if "input_string" in value and "input_data" not in value:
            value = {"input_data": value}
        prompts, parameters = dialect(value)
        if not isinstance(prompts.value, list) or not isinstance(parameters.value, dict):
            return [value]
        n = len(prompts.value)
        return [
            {"input_data": {"input_string": prompt, "parameters": self._of_prompt(parameters.value, i, n)}}
            for i, prompt in enumerate(prompts.value)
        ]

    def _of_prompt(self, parameters: dict[str, Any], i: int, n: int) -> dict[str, Any]:
        """Return the parameters of prompt i: of a per-prompt list of n values, the i-th."""
        rules = self._parser.rules
        return {
            name: value[i]
            if isinstance(value, list) and len(value) == n and rules.get(name, {}).get("x-per-prompt")
            else value
            for name, value in parameters.items()
        }

    def request(self, file: str, row: InputRow, id: str | int | float | None) -> GenerateRequest:
        """Return the row's request; raises InvalidRequest whose `field` is the column."""
        if row.error is not None:
            raise row.error
        prompts, parameters = self._parts(row)
        if not isinstance(parameters.value, dict):
            return self._parser.read(prompts, parameters)  # raises with the reason
        for name, why in NOT_IN_A_BATCH.items():
            if parameters.value.get(name) is not None:
                raise InvalidRequest(f"`{name}`: {why}", field=f"{parameters.pointer}/{name}", code="not_in_a_batch")
        if isinstance(prompts.value, list) and len(prompts.value) != 1 and not looks_like_messages(prompts.value):
            raise InvalidRequest(
                f"a row must have one prompt, got {len(prompts.value)}", field=prompts.pointer, code="wrong_length"
            )
        if parameters.value.get("seed") is None and "seed" not in self._parser.defaults:
            parameters = Located(parameters.value | {"seed": self.seed(file, row.number, id)}, parameters.pointer)
        return replace(self._parser.read(prompts, parameters), stream=False)

    def seed(self, file: str, number: int, id: str | int | float | None) -> int:
        """Return the seed for a row without one: different for each row, the same in every run.

        A hash of the job's seed and the row's id, which stays the same when a file is split; without an id, of the
        job's seed, the file name and the row number.
        """
        seed_key: list[Any] = [self._seed, id] if id is not None else [self._seed, file, number]
        return int.from_bytes(hashlib.blake2b(json.dumps(seed_key).encode(), digest_size=8).digest(), "big") & MAX_SEED

    def id(self, row: InputRow) -> str | int | float | None:
        """Return the row's id, None when it has none; raises InvalidRequest for an invalid one."""
        if not isinstance(row.value, dict):
            return None
        row_id = row.value.get("id")
        if row_id is None or (row.text_cells and not row_id):
            return None
        if isinstance(row_id, bool) or not isinstance(row_id, (str, int, float)):
            raise InvalidRequest("`/id` must be a string or a number", field="/id", code="wrong_type")
        if isinstance(row_id, str):
            if len(row_id) > MAX_ID_CHARS:
                raise InvalidRequest(
                    f"`/id` must have at most {MAX_ID_CHARS} characters, got {len(row_id)}",
                    field="/id",
                    code="wrong_length",
                )
            if any(0xD800 <= ord(c) <= 0xDFFF for c in row_id):
                raise InvalidRequest("`/id` must be Unicode text", field="/id", code="invalid_text")
        elif not abs(row_id) < 1 << 63:  # also rejects NaN
            raise InvalidRequest("`/id` must be a number of at most 63 bits", field="/id", code="out_of_range")
        return row_id

    def _parts(self, row: InputRow) -> tuple[Located, Located]:
        value = row.value
        if isinstance(value, str):
            return Located(value, "/input_string"), Located({}, "/parameters")
        if not isinstance(value, dict):
            raise InvalidRequest(
                f"a row must be a string or an object, got {type(value).__name__}", field="", code="wrong_type"
            )
        if not row.text_cells and ("input_data" in value or "inputs" in value) and self._prompt_column not in value:
            return dialect({name: v for name, v in value.items() if name != "id"})
        shape = self._shape(tuple(value))
        if value[shape.prompt] is None:
            raise InvalidRequest(f"`/{shape.prompt}` is null", field=f"/{shape.prompt}", code="missing_field")
        return Located(value[shape.prompt], f"/{shape.prompt}"), self._parameters(row, shape)

    def _parameters(self, row: InputRow, shape: Shape) -> Located:
        """Return a row's parameters: the fields of `parameters`, and the parameters in columns of their own."""
        inner = row.value.get("parameters")
        if row.text_cells and inner is not None:
            inner = _json_cell(inner)
        if inner is not None and not isinstance(inner, dict):
            return Located(inner, "/parameters")
        parameters: dict[str, Any] = dict(inner or {})
        for name in shape.parameters:
            value = row.value[name]
            if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
                continue  # how tables express a missing value
            if parameters.get(name) is not None:
                raise InvalidRequest(
                    f"`{name}` is both a column and a field of `parameters`", field=f"/{name}", code="invalid_request"
                )
            parameters[name] = _typed(value, self._parser.rules[name]) if row.text_cells else value
        return Located(parameters, "/parameters" if inner else "")

    def _shape(self, names: tuple[str, ...]) -> Shape:
        """Return the roles of the columns; cached, since the rows of a file have the same columns."""
        shape = self._shapes.get(names)
        if shape is None:
            shape = self._find_shape(names)
            if len(self._shapes) < 1000:
                self._shapes[names] = shape
        return shape

    def _find_shape(self, names: tuple[str, ...]) -> Shape:
        prompt = self._prompt(names)
        rules = self._parser.rules
        for name in names:
            if name in rules or name in (prompt, "id", "parameters"):
                continue
            similar = difflib.get_close_matches(name[:64].lower(), list(rules), n=1, cutoff=0.8)
            if similar:  # other columns are ignored, but a misspelt parameter must not become a default
                raise InvalidRequest(
                    f"a column name is close to the parameter `{similar[0]}`; correct it or rename the column",
                    field=f"/{similar[0]}",
                    code="unknown_parameter",
                )
        return Shape(prompt, tuple(n for n in names if n in rules and n != prompt))

    def _prompt(self, names: Iterable[str]) -> str:
        candidates = (self._prompt_column,) if self._prompt_column else PROMPT_COLUMNS
        matches = [name for name in candidates if name in names]
        if len(matches) > 1 and matches[0] != PROMPT_COLUMNS[0]:
            raise InvalidRequest(
                f"both {' and '.join(f'`{n}`' for n in matches)} could be the prompt; set MPT_BATCH_PROMPT_COLUMN",
                code="ambiguous_column",
            )
        if not matches:
            raise InvalidRequest(
                f"no column {' or '.join(f'`{n}`' for n in candidates)} for the prompt; "
                "set MPT_BATCH_PROMPT_COLUMN to use another one",
                code="missing_column",
            )
        return matches[0]


def _typed(cell: str, rule: dict[str, Any]) -> Any:
    """Return a cell converted to its parameter's type; unchanged where that fails, so that the parser rejects it."""
    kind: Callable[[str], Any] | None = {"integer": int, "number": float}.get(rule.get("type", ""))
    if kind is not None:
        try:
            number = kind(cell)
        except ValueError:
            return cell
        return cell if isinstance(number, float) and not math.isfinite(number) else number
    if rule.get("type") == "boolean":
        return {"true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)
    if cell.startswith("["):  # stop strings
        return _json_cell(cell)
    return cell


def _json_cell(cell: str) -> Any:
    """Return the value of a cell's JSON; None for an empty cell, the text itself when it is not JSON."""
    try:
        return json.loads(cell, parse_constant=str) if cell.strip() else None
    except (ValueError, RecursionError):
        return cell
