"""API keys of the OpenAI server: read from a file, again whenever it changes, and compared in constant time.

middleware.py takes the key from the request, and says which routes need none.
"""

import hashlib
import hmac
import logging
from pathlib import Path

from mptserve.errors import BadSetting, ScoringError

log = logging.getLogger(__name__)


class Unauthorized(ScoringError):
    """No API key, or one that is not valid."""

    status = 401
    code = "invalid_api_key"


class ApiKeys:
    """The keys of one file, one per line; blank lines and lines that begin with # are ignored.

    To rotate a key, add the new one, move the callers, remove the old one. While the file cannot be read, the last keys
    stay valid; an emptied file refuses every caller.
    """

    def __init__(self, path: Path) -> None:
        """Raises BadSetting when there is no key to begin with."""
        self._path = path
        try:
            self._read_at, self._digests = self._mark(), self._read()
        except (OSError, UnicodeDecodeError) as exc:
            raise BadSetting(f"MPT_API_KEYS_FILE cannot be read: {type(exc).__name__}") from exc
        if not self._digests:
            raise BadSetting("MPT_API_KEYS_FILE has no key in it")

    def check(self, given: str) -> None:
        """Raise Unauthorized unless `given` is one of the keys; takes as long for any key, right or wrong."""
        self._refresh()
        digest, found = _digest(given), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        if not found:
            what = "is not known" if given else "is missing: send it as `Authorization: Bearer …`"
            raise Unauthorized(f"the API key {what}")

    def _refresh(self) -> None:
        try:
            mark = self._mark()
            if mark != self._read_at:
                self._read_at, self._digests = mark, self._read()
                log.info("API keys read", extra={"numbers": {"keys": len(self._digests)}})
        except (OSError, UnicodeDecodeError) as exc:
            log.error("MPT_API_KEYS_FILE cannot be read, the keys stay as they were (%s)", type(exc).__name__)

    def _mark(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino  # a mounted secret changes by having its link replaced

    def _read(self) -> list[bytes]:
        lines = [line.strip() for line in self._path.read_text(encoding="utf-8").splitlines()]
        return [_digest(line) for line in lines if line and not line.startswith("#")]


def _digest(key: str) -> bytes:
    """Keys of any length compare in the same time once they are digests."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
