"""What the resource manager answers when it refuses."""

from starlette.responses import JSONResponse


class Refused(Exception):
    """A call that ends with a status and a code, in the resource manager's own form."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> JSONResponse:
        """Return it as azure.core.exceptions.ODataV4Format reads it: {"error": {"code", "message"}}."""
        return JSONResponse({"error": {"code": self.code, "message": str(self)}}, self.status)
