"""Ends the process when its engine cannot continue: gunicorn, the container or the driver starts another."""

import logging
import os
import threading

log = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 70
"""The exit status; EX_SOFTWARE of sysexits.h."""


def exit_soon(reason: str, delay_s: float = 1.0) -> None:
    """Log the reason, and end the process after a moment in which waiting requests get their answer."""
    log.critical("cannot go on; exiting", extra={"numbers": {"reason": reason}})
    threading.Timer(delay_s, os._exit, (EXIT_ENGINE_FAILED,)).start()
