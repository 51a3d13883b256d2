"""Push files to the Hugging Face Hub in one commit, with retries and one-line error messages.

The token is the one of `hf auth login` or of HF_TOKEN; no function takes it, and none writes it.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import logging

logger = logging.get_logger(__name__)
_HTTPError = cast("type[Exception]", HfHubHTTPError.__bases__[0])
_http: Any = sys.modules[_HTTPError.__module__.partition(".")[0]]  # httpx, and httpx2 from huggingface_hub 2 on
_Answer = TypeVar("_Answer")

_WAITS = (1, 2, 4, 8)  # seconds before the second, third, ... attempt
_LONGEST_WAIT = 310  # seconds; the Hub counts requests in windows of five minutes
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_RETRIED_BY_THE_CLIENT = ("/preupload/", "/info/lfs/")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
_AGAIN = "Push again: what has arrived is not sent twice."


class PushError(RuntimeError):
    """Raised when a push fails, with one line on what happened and what to do; `__cause__` is the client's error."""


@dataclass(frozen=True)
class PushResult:
    """Result of a push.

    Attributes:
        repo_id: `<namespace>/<name>`.
        url: Address of the repository, at the revision if one was given.
        revision: The branch that was pushed to.
        commit: Hash of its latest commit.
        new_commit: False if the repository already held every file as it is, so that there was nothing to commit.
        files: Paths in the repository of the files that were pushed.
        removed: Weights of an earlier push that were deleted because these files replace them.
        left_out: Files of the folder that were not pushed, each with the reason.
    """

    repo_id: str
    url: str
    revision: str
    commit: str
    new_commit: bool
    files: tuple[str, ...]
    removed: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def push_files(
    files: Mapping[str, Path | bytes] | Callable[[str], Mapping[str, Path | bytes]],
    repo_id: str,
    *,
    message: str,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    space_sdk: str | None = None,
    replaces: Callable[[str], bool] = lambda _path: False,
) -> PushResult:
    """Push files in one commit, into a repository that is created if there is none.

    Requests that the client does not repeat itself are repeated here: after 1, 2, 4 and 8 seconds, or after as long
    as the Hub asks for.

    Args:
        files: For each path in the repository the file on disk, or its content; or a function that returns these for
            the full id of the repository, `<namespace>/<name>`.
        repo_id: As `push_run`.
        message: First line of the commit message.
        repo_type: "model" or "space".
        private: As `push_run`.
        revision: As `push_run`.
        space_sdk: Kind of a new Space, "gradio" or "static".
        replaces: Whether a file that is in the repository, but not among `files`, is to be deleted, by its path.

    Raises:
        PushError: As `push_run`.
    """
    checked_token()
    api = HfApi(token=True)  # looks the token up for each request and keeps none
    with _in_one_line(repo_id):
        validate_repo_id(repo_id)
        created = _with_retries(
            lambda: api.create_repo(
                repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=space_sdk
            )
        )
        repo_id = created.repo_id
        target = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
        before = _with_retries(lambda: _state_of(api, target))
        if private and not before.private:
            raise PushError(
                f"{repo_id} is there already and public, but private=True. Make it private in its settings on the "
                "Hub, or push to a repository of another name."
            )
        content = files(repo_id) if callable(files) else files
        commit, removed = _with_retries(lambda: _commit(api, target, content, message, replaces))
    return PushResult(
        repo_id=repo_id,
        url=str(created) + (f"/tree/{revision}" if revision else ""),
        revision=revision or constants.DEFAULT_REVISION,
        commit=commit,
        new_commit=commit != before.sha,
        files=tuple(content),
        removed=removed,
    )


def _state_of(api: HfApi, target: dict[str, Any]) -> Any:
    """Fetch the repository's state at a revision; create the branch if it is missing."""
    try:
        return api.repo_info(**target)
    except RevisionNotFoundError:
        api.create_branch(target["repo_id"], repo_type=target["repo_type"], branch=target["revision"], exist_ok=True)
        return api.repo_info(**target)


def _commit(
    api: HfApi,
    target: dict[str, Any],
    files: Mapping[str, Path | bytes],
    message: str,
    replaces: Callable[[str], bool],
) -> tuple[str, tuple[str, ...]]:
    """Commit the files; return the hash of the branch's commit after the push, and what was deleted.

    Each attempt reads the state of the repository again, because the last commit may have succeeded although its
    answer was lost, and builds new operations, because the client modifies them.
    """
    there = {file.rfilename for file in _state_of(api, target).siblings}
    stale = tuple(sorted(path for path in there - set(files) if replaces(path)))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(path_in_repo=path) for path in stale),
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=source) for path, source in files.items()),
    ]
    return api.create_commit(operations=operations, commit_message=message, **target).oid, stale


# What the Hub says -----------------------------------------------------------------------------------------------


def checked_token() -> str:
    """Return the user's token, checked.

    Raises:
        PushError: If there is none, it cannot be one, or the libraries are told to stay offline.
    """
    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and push again.")
    token = get_token()
    if not token:
        raise PushError(f"No Hugging Face token was found. {_LOG_IN}")
    if not (token.isascii() and token.isprintable()) or " " in token:  # the client would quote it in its error
        raise PushError(f"The Hugging Face token holds characters that no token has. {_LOG_IN}")
    return token


def _with_retries(ask: Callable[[], _Answer]) -> _Answer:
    """Send a request, and retry it after a pause if the error is transient."""
    for attempt, wait in enumerate(_WAITS, start=1):
        try:
            return ask()
        except (_HTTPError, json.JSONDecodeError) as error:
            wait = max(wait, _retry_after(error))
            if not _may_pass(error) or wait > _LONGEST_WAIT:
                raise
            logger.warning(f"The Hub did not answer ({_what(error)}); attempt {attempt + 1} follows in {wait} s.")
        time.sleep(wait)
    return ask()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, json.JSONDecodeError):  # an error page where the client reads JSON before the status
        return True
    request = error.response.request if isinstance(error, HfHubHTTPError) else getattr(error, "request")  # noqa: B009 (of httpx)
    if any(part in request.url.path for part in _RETRIED_BY_THE_CLIENT):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    passing = (_http.TimeoutException, _http.NetworkError, _http.RemoteProtocolError)
    return isinstance(error, passing) and not isinstance(error, _http.ConnectError)


def _retry_after(error: Exception) -> int:
    """Return how many seconds the Hub's response asks to wait before a retry; 0 if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    headers = error.response.headers
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    seconds = limit[1] if limit else headers.get("retry-after", "").strip()
    return int(seconds) if seconds.isdigit() else 0


def _what(error: Exception) -> str:
    return str(error.response.status_code) if isinstance(error, HfHubHTTPError) else type(error).__name__


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    try:
        yield
    except PushError:
        raise
    except (_HTTPError, OSError, ValueError, RuntimeError) as error:
        message = " ".join(_advice(_unwrapped(error), repo_id).split())
        raise PushError(message.replace(get_token() or "\n", "[token]")) from error


def _unwrapped(error: Exception) -> Exception:
    """Return the HTTP error that the client wrapped in a `RuntimeError`; other errors as they are."""
    cause = error.__cause__
    wrapped = type(error) is RuntimeError and isinstance(cause, Exception)
    return cause if wrapped and isinstance(cause, (_HTTPError, OSError, ValueError)) else error


def _advice(error: Exception, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and push again."
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not the id of a repository; expected <namespace>/<name>. {error}"
    if isinstance(error, HfHubHTTPError):
        return _advice_on_status(error, error.response.status_code, repo_id)
    if isinstance(error, _http.TransportError):
        return f"The connection to {constants.ENDPOINT} failed: {error or _what(error)}. Check the network. {_AGAIN}"
    if isinstance(error, json.JSONDecodeError):
        return f"{constants.ENDPOINT} did not answer as the Hub does. Check the network and HF_ENDPOINT. {_AGAIN}"
    return f"The push to {repo_id} failed: {error}"


def _advice_on_status(error: HfHubHTTPError, status: int, repo_id: str) -> str:
    said = f"{status}: {error.server_message}" if error.server_message else str(status)
    if isinstance(error, RevisionNotFoundError):
        return f"The revision was not found in {repo_id} ({said}). Push to the name of a branch."
    if status == 401:
        return f"The Hub does not accept the token ({said}). {_LOG_IN}"
    if status == 402:
        return f'The Hub asks for payment ({said}). A Space with sdk="static" is free, and its metric loads as well.'
    if status == 403:
        return (
            f"The token may not write to {repo_id} ({said}). Use a token with write access to that namespace, or push "
            "to another one."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} was not found, or the token may not see it ({said}). Check the id and the token."
    if status in (409, 412):
        return f"{repo_id} changed during the push ({said}). {_AGAIN}"
    if status == 429:
        seconds = _retry_after(error)
        return f"The Hub asks to wait{f' {seconds} s' if seconds else ''} ({said}). Wait, then push. {_AGAIN}"
    if status in _TRANSIENT:
        return f"The Hub fails at the moment ({said}). Wait. {_AGAIN}"
    return f"The Hub refused the push to {repo_id} ({said})."
