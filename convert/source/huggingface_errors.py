"""What the errors of huggingface_hub mean: whether they pass, and what the user can do."""

from __future__ import annotations

from huggingface_hub import errors as hub_errors

from qwen3_ascend.convert.source.transfer import reason
from qwen3_ascend.errors import SourceError

# The base error of the HTTP library, whichever one this huggingface_hub is built on.
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *hub_errors.HfHubHTTPError.__bases__)

# hf_xet raises bare RuntimeErrors; huggingface_hub a ValueError for a file that it will not fetch.
TRANSFER_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, RuntimeError, ValueError)

PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers of a server that is overloaded or restarted; any other will be the same tomorrow."""


def judge(error: Exception) -> float | None:
    """Seconds to wait before trying again, or None if that would not help."""
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        return judge(error.__cause__) if isinstance(error.__cause__, Exception) else None
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return None
    if isinstance(error, hub_errors.HfHubHTTPError):
        passing = error.response.status_code in PASSING_STATUS
        return _retry_after(error.response.headers.get("Retry-After")) if passing else None
    if isinstance(error, OSError) and error.errno is not None:
        # A full disk stays full; what the network does to a socket passes.
        return 0.0 if isinstance(error, (ConnectionError, TimeoutError)) else None
    return 0.0 if isinstance(error, (*NETWORK_ERRORS, RuntimeError)) else None


def explain(
    repo: str, revision: str | None, error: Exception, file: str = ""
) -> SourceError | None:
    """One line that says what to do about an error of huggingface_hub; None if it is not one."""
    if isinstance(error, hub_errors.GatedRepoError):
        return SourceError(f"{repo} is gated: accept its terms on the Hub and set HF_TOKEN")
    if _is_refused_token(error):
        return SourceError(
            f"the Hub does not accept the token that is sent with the request for {repo}: it has "
            f"expired or is misspelt; renew HF_TOKEN (or `hf auth login`), or unset it"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return SourceError(f"the Hub has no model {repo} (or it is private: set HF_TOKEN)")
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return SourceError(f"{repo} has no revision {revision!r}")
    if isinstance(error, hub_errors.HFValidationError):
        return SourceError(f"{repo} is not a valid Hub id: {error}")
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return SourceError(f"{error.filename}: {error.strerror}")
    if isinstance(error, TRANSFER_ERRORS):
        what = f"{repo}/{file}" if file else repo
        later = "; try again later" if judge(error) is not None else ""
        return SourceError(f"cannot fetch {what} from the Hub: {reason(error)}{later}")
    return None


def _is_refused_token(error: Exception) -> bool:
    """Whether the Hub has refused the token itself, which it does for public models as well."""
    if not isinstance(error, hub_errors.HfHubHTTPError) or error.response.status_code != 401:
        return False
    stated = error.response.headers.get("X-Error-Message") or str(error)
    return "invalid" in stated.lower() or not isinstance(error, hub_errors.RepositoryNotFoundError)


def _retry_after(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 0.0
