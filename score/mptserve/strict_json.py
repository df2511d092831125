"""JSON by its standard: Python's reader also takes NaN and Infinity, which JSON has not."""

import json
from typing import Any, NoReturn


class NotJson(ValueError):
    """Why a text is not JSON, to follow a subject: "must be JSON; …", "is nested too deeply", …"""


def loads(text: str) -> Any:
    """Return the value; raises NotJson. A position names the line only where the text has several."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except NotJson:
        raise
    except RecursionError:
        raise NotJson("is nested too deeply") from None
    except json.JSONDecodeError as exc:
        line = f"line {exc.lineno}, " if "\n" in text else ""
        raise NotJson(f"must be JSON; {line}column {exc.colno}: {exc.msg}") from exc
    except ValueError:  # an integer of thousands of digits
        raise NotJson("holds a number that is too long") from None


def _refuse_constant(name: str) -> NoReturn:
    raise NotJson(f"must be JSON, which has no {name}")
