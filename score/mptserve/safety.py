"""Content safety: a classifier of prompts and answers that an operator can enable.

Every verdict is reported: a blocked answer says so, and a judged one carries the severities. When the classifier cannot
be reached, nothing passes: an unjudged answer would look like a harmless one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mptserve.errors import BadSetting, Unavailable
from mptserve.settings import Settings

MAX_CHARS = 10_000
"""Most characters of one call to Azure AI Content Safety."""
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Verdict:
    """The severity of each category in a text, and whether the text is blocked."""

    blocked: bool
    severities: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return {"blocked": self.blocked, "severities": self.severities}


class ContentSafety(Protocol):
    """A classifier. Called from several threads; raises Unavailable when it cannot be reached."""

    def judge(self, text: str) -> Verdict: ...


class AzureContentSafety:
    """Azure AI Content Safety's text analysis: hate, self-harm, sexual content, violence; severities 0, 2, 4, 6."""

    def __init__(self, endpoint: str, key_file: str, severity: int) -> None:
        """Raises BadSetting when the client's package, or the key, is not there."""
        try:
            from azure.ai.contentsafety import ContentSafetyClient
            from azure.core.exceptions import AzureError
        except ImportError as exc:
            raise BadSetting(
                "MPT_CONTENT_SAFETY_ENDPOINT needs the package azure-ai-contentsafety: install mptserve[safety]"
            ) from exc
        self._severity, self._failures = severity, AzureError
        self._client = ContentSafetyClient(
            endpoint,
            _credential(key_file),
            connection_timeout=TIMEOUT_S,
            read_timeout=TIMEOUT_S,
            retry_total=2,
            retry_backoff_factor=0.2,
            logging_enable=False,
        )

    def judge(self, text: str) -> Verdict:
        from azure.ai.contentsafety.models import AnalyzeTextOptions

        worst: dict[str, int] = {}
        for start in range(0, len(text), MAX_CHARS):
            try:
                found = self._client.analyze_text(AnalyzeTextOptions(text=text[start : start + MAX_CHARS]))
            except self._failures as exc:
                raise Unavailable(
                    f"content safety could not be asked ({type(exc).__name__}), so nothing passes",
                    code="content_safety_unavailable",
                ) from exc
            for part in found.categories_analysis:
                worst[str(part.category)] = max(worst.get(str(part.category), 0), part.severity or 0)
        return Verdict(any(s >= self._severity for s in worst.values()), worst)


def _credential(key_file: str) -> Any:
    if not key_file:
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential()
    from azure.core.credentials import AzureKeyCredential

    try:
        key = Path(key_file).read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise BadSetting(f"MPT_CONTENT_SAFETY_KEY_FILE cannot be read: {exc.strerror}") from exc
    if not key:
        raise BadSetting("MPT_CONTENT_SAFETY_KEY_FILE is empty")
    return AzureKeyCredential(key)


def content_safety(settings: Settings) -> ContentSafety | None:
    """Return the classifier that the operator configured, or None."""
    if not settings.content_safety_endpoint:
        return None
    return AzureContentSafety(
        settings.content_safety_endpoint, settings.content_safety_key_file, settings.content_safety_severity
    )
