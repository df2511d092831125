"""Errors of the resource manager."""

from starlette.responses import JSONResponse


class Refused(Exception):
    """An error answer with a status and a code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> JSONResponse:
        """Return the answer as azure.core.exceptions.ODataV4Format reads it: {"error": {"code", "message"}}."""
        return JSONResponse({"error": {"code": self.code, "message": str(self)}}, self.status)
