"""What the server does not do, as the error object of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Mapping

KINDS = {
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""The `type` of an error by its HTTP status; for all others the client's request is to blame."""


class Refusal(Exception):
    """A request that is not answered; `str` is one line that says what is wrong and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Takes the HTTP status, the parameter that it is about, a word for programs, and further
        headers of the response."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, object]:
        """The body of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": said}
