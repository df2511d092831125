"""One line of the log: JSON whatever was said, and one handler however often it is set up."""

import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mptserve.log import JsonFormatter, set_up_logging


def record(message: str, *args: object, created: float = 0.0, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "mptserve.x", "levelno": 20, "levelname": "INFO", "msg": message, "args": args}
    )
    made.created, made.msecs = created, 7.9
    made.__dict__.update(extra)
    return made


@pytest.fixture
def package_logger() -> Iterator[logging.Logger]:
    """The package's logger, put back as it was afterwards."""
    logger = logging.getLogger("mptserve")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


def test_line_has_time_level_message_and_the_calls_numbers() -> None:
    line = JsonFormatter().format(
        record("%d of %s", 3, "four", numbers={"seconds": 0.123456, "tokens": 5, "where": "cpu"})
    )
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.007Z",
        "level": "INFO",
        "message": "3 of four",
        "seconds": 0.123,
        "tokens": 5,
        "where": "cpu",
    }


def test_trace_and_line_breaks_stay_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = JsonFormatter().format(record("failed\nbadly", exc_info=sys.exc_info()))
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == "failed\nbadly"
    assert found["trace"].startswith("Traceback (most recent call last):\n")
    assert found["trace"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("\ud800", "\ud800"), ("é🦊", "é🦊"), (Path("/models"), "/models"), ({"eos": 2}, {"eos": 2}), (None, None)],
)
def test_line_can_be_written_whatever_the_value(value: object, expected: object) -> None:
    line = JsonFormatter().format(record("x", numbers={"value": value}))
    line.encode("ascii")  # what standard output takes depends on the machine
    assert json.loads(line)["value"] == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_json_lacks_is_written_as_text(value: float) -> None:
    line = JsonFormatter().format(record("x", numbers={"value": value}))
    assert json.loads(line, parse_constant=pytest.fail)["value"] == str(value)


def test_package_logs_from_its_level_on_and_once(
    package_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    for _ in range(2):
        set_up_logging("INFO")
    logging.getLogger("mptserve.engine.start").debug("not this")
    logging.getLogger("mptserve.engine.start").info("this", extra={"numbers": {"n": 1}})
    logging.getLogger("mptserve").error("and this")
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [(line["level"], line["message"], line.get("n")) for line in lines] == [
        ("INFO", "this", 1),
        ("ERROR", "and this", None),
    ]
    assert (len(package_logger.handlers), package_logger.propagate) == (1, False)


def test_other_loggers_are_left_alone(package_logger: logging.Logger) -> None:
    root_before = logging.getLogger().handlers[:]
    set_up_logging("DEBUG")
    assert logging.getLogger().handlers == root_before
    assert package_logger.level == logging.DEBUG
