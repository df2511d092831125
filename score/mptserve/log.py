"""JSON lines on standard output: what happened, to which request, in numbers. Never a prompt, never an answer."""

import json
import logging
import math
import sys
import time


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `extra={"numbers": {...}}` of a call becomes its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
        }
        for name, value in getattr(record, "numbers", {}).items():
            line[name] = _shortened(value) if isinstance(value, float) else value
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: standard output may take no more


def _shortened(value: float) -> float | str:
    return round(value, 3) if math.isfinite(value) else str(value)  # JSON has no NaN


def set_up_logging(level: str, *others: str) -> None:
    """Give the package's loggers a handler: azmlinfsrv drops what other loggers than its own say below WARNING.

    others: loggers of another server, which get the same handler.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    for name in ("mptserve", *others):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
