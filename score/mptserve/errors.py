"""The one family of errors: each class carries its HTTP status and a stable code."""

from typing import Any


class ScoringError(Exception):
    """A request could not be answered; an entry script turns it into a response.

    `field` is a JSON pointer (RFC 6901) into the request body, or None when no single field is at fault.
    Messages name the field, the rule and the value's type or size, never the caller's text.
    """

    status = 500
    code = "internal_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code

    def as_json(self, request_id: str) -> dict[str, Any]:
        """Return the body of the error response."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "request_id": request_id}
        if self.field is not None:
            error["field"] = self.field
        return {"error": error}


class InvalidRequest(ScoringError):
    """The body is not a request we can serve; `code` says which rule it breaks."""

    status = 400
    code = "invalid_request"


class ContextTooLong(InvalidRequest):
    """Prompt plus new tokens do not fit the model's context (or the memory for it)."""

    code = "context_length_exceeded"


class ContentBlocked(InvalidRequest):
    """Content safety judged the prompt to be too severe."""

    code = "content_filter"


class TooLarge(ScoringError):
    """The body or a prompt is larger than this deployment accepts."""

    status = 413
    code = "too_large"


class BadFile(ScoringError):
    """A file of a batch, or the rest of it, cannot be read as what its name says."""

    status = 400
    code = "invalid_file"

    def __init__(self, message: str, *, code: str | None = None, line: int | None = None) -> None:
        super().__init__(message, code=code)
        self.line = line


class QueueFull(ScoringError):
    """Too many sequences wait already; the caller should come back later."""

    status = 429
    code = "queue_full"
    retry_after_s = 1


class Unavailable(ScoringError):
    """The server is starting, draining or broken."""

    status = 503
    code = "unavailable"


class DeadlineExceeded(ScoringError):
    """The deadline passed before the answer was whole, and partial answers are switched off."""

    status = 504
    code = "deadline_exceeded"


class GenerationFailed(ScoringError):
    """A step of the engine failed for this sequence: our fault, the log has the trace under the request's id."""

    code = "generation_failed"


class StartupError(Exception):
    """The server cannot start; the message says what to change."""


class BadSetting(StartupError):
    """An environment variable has a value outside its rule."""


class ModelNotFound(StartupError):
    """No checkpoint where AZUREML_MODEL_DIR points."""


class UnsupportedModel(StartupError):
    """The checkpoint's config asks for something this engine does not compute."""


class BadWeights(StartupError):
    """Tensors are missing, unexpected, of another shape, or a file is cut short."""


class BadCalibration(StartupError):
    """Text to calibrate weights on cannot be read, or is too short."""


class DoesNotFit(StartupError):
    """Weights and a minimum of KV cache are larger than the memory that is free."""
