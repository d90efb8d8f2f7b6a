"""What the Hub, its client or the network refused, in words: what it means and what to do.

One table by the name of the exception, one by the status of the answer. Names, because the client and its HTTP
library are imported only where something is asked of the Hub. A token is in no message.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from awq2marlin.errors import HubError, Problem

#: Exceptions of ``huggingface_hub`` and of the HTTP libraries beneath it: code and advice; the most special one counts.
BY_NAME = {
    "GatedRepoError": (
        "hub-gated",
        "the repository is gated: ask for access at {url}, then log in with 'hf auth login' or set HF_TOKEN",
    ),
    "DisabledRepoError": ("hub-disabled", "the Hub has disabled this repository; nobody can read or write it"),
    "RepositoryNotFoundError": (
        "hub-not-found",
        "no such model on {host}, or it is private and {token} may not see it: check the name, and log in "
        "with 'hf auth login' or set HF_TOKEN",
    ),
    "RevisionNotFoundError": ("hub-no-revision", "no such branch, tag or commit; see {url}/tree/main"),
    "EntryNotFoundError": ("hub-no-file", "a file is missing or was removed; run the command again"),
    "HFValidationError": ("hub-bad-name", "not a valid repository name; expected org/name"),
    "LocalTokenNotFoundError": ("hub-unauthorized", "log in with 'hf auth login', or set HF_TOKEN"),
    "OfflineModeIsEnabled": (
        "hub-offline",
        "HF_HUB_OFFLINE is set, but the cache lacks what is needed; unset it",
    ),
    "TimeoutException": ("hub-unreachable", "{host} did not answer in time; {network}"),
    "TransportError": ("hub-unreachable", "the connection to {host} failed; {network}"),
    "RequestException": ("hub-unreachable", "the connection to {host} failed; {network}"),
    "ConnectionError": ("hub-unreachable", "the connection to {host} failed; {network}"),
}

#: Answers of the Hub without an exception of their own: code and advice.
BY_STATUS = {
    400: ("hub-refused", "the Hub refused the request{said}"),
    401: (
        "hub-unauthorized",
        "the Hub rejected {token}: log in with 'hf auth login' or set HF_TOKEN{said}",
    ),
    402: ("hub-quota", "payment required: storage quota or plan exceeded{said}"),
    403: (
        "hub-forbidden",
        "{token} may not do this: create one that may read or write this repository at {settings}{said}",
    ),
    409: ("hub-conflict", "somebody else is changing the repository right now; run the command again{said}"),
    412: ("hub-conflict", "somebody else committed to the repository in the meantime; run the command again{said}"),
    413: ("hub-quota", "the Hub does not accept files this large{said}"),
    429: ("hub-rate-limit", "too many requests; wait {wait} and run the command again{said}"),
    507: ("hub-quota", "the storage of the account is full{said}"),
}
#: Answers from 500 on.
SERVER_FAILED = (
    "hub-unavailable",
    "the Hub failed (status {status}); wait and run the command again{said}",
)
#: What the Hub says of a model card.
BAD_CARD = ("hub-bad-card", "the Hub refused the front matter of README.md; correct it there{said}")
_NETWORK = "check the network, HTTPS_PROXY and HF_ENDPOINT, then run the command again"
_TOKEN = re.compile(r"hf_[A-Za-z0-9_]{6,}")
_CLIENT_ERRORS = (OSError, RuntimeError, ValueError)

#: What the client raises when an answer has not the form that it counts on.
_MALFORMED = (LookupError, TypeError, AttributeError)
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.EMFILE}


@contextmanager
def as_hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the client raises into a `HubError`; wrap calls of the client with it, and nothing else.

    Args:
        repo_id: whom it is about.
        revision: the branch, tag or commit that was asked for, if any.

    Raises:
        HubError: in words, with no token in them.
        OSError: as it came, if it is the local disk's.
    """
    from huggingface_hub.errors import HfHubHTTPError

    library_errors: type[Exception] = HfHubHTTPError.__mro__[1]  # the base of the HTTP library's errors
    try:
        yield
    except _MALFORMED:
        message = f"{hub_url()} is not a Hugging Face Hub; check HF_ENDPOINT"
        raise HubError(Problem(repo_id, "", "hub-failed", message)) from None
    except (library_errors, *_CLIENT_ERRORS) as error:
        problem = hub_problem(error, repo_id, revision)
        if problem is None:
            raise
        raise HubError(problem) from None


def hub_problem(error: BaseException, repo_id: str, revision: str | None = None) -> Problem | None:
    """Returns what an exception of the client means, or None if it is an error of the local disk.

    Args:
        error: as raised by a call of the client; its causes are looked at, the first one first.
        repo_id: whom it is about.
        revision: the branch, tag or commit that was asked for, if any.
    """
    place = f"{repo_id}@{revision}" if revision else repo_id
    for each in _causes(error):
        if isinstance(each, OSError) and (each.filename is not None or each.errno in _LOCAL):
            return None
        code, advice = _advice(each)
        if code == "hub-refused" and "metadata in README.md" in str(error):
            code, advice = BAD_CARD
        if code:
            return Problem(place, "", code, without_token(advice.format_map(_words(each, repo_id))))
    told = str(error).strip().partition("\n")[0] or type(error).__name__
    return Problem(place, "", "hub-failed", without_token(f"the Hub client failed: {told}"))


def without_token(text: str) -> str:
    """Returns ``text`` with everything that is or looks like a token of the Hub taken out."""
    from huggingface_hub import get_token

    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)


def hub_url() -> str:
    """Returns the Hub's address, without the credentials that ``HF_ENDPOINT`` may hold."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    if not parts.hostname:  # it is no address
        return constants.ENDPOINT.rpartition("@")[2]
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception's causes, the first one first, and at last itself."""
    chain, seen = [error], {id(error)}
    while (cause := chain[-1].__cause__) is not None and id(cause) not in seen:
        chain.append(cause)
        seen.add(id(cause))
    return reversed(chain)


def _advice(error: BaseException) -> tuple[str, str]:
    """Returns code and advice for one exception; empty if the tables do not know it."""
    response = getattr(error, "response", None)
    if response is not None and not hasattr(error, "server_message"):
        return "", ""  # HTTP's own error, of which the client made one that knows more
    known = next((BY_NAME[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in BY_NAME), ("", ""))
    if response is None:
        return known
    status = response.status_code
    if status == 429 or status >= 500 or known[0] in ("", "hub-unreachable"):  # an answer is no broken connection
        return BY_STATUS.get(status, SERVER_FAILED if status >= 500 else BY_STATUS[400])
    return known


def _words(error: BaseException, repo_id: str) -> dict[str, str]:
    """Returns what the places in an advice are filled with."""
    from huggingface_hub import get_token

    response = getattr(error, "response", None)
    told = (getattr(error, "server_message", None) or "").strip().partition("\n")[0].rstrip(".")
    wait = response.headers.get("Retry-After", "") if response is not None else ""
    return {
        "host": hub_url().rpartition("://")[2],
        "url": f"{hub_url()}/{repo_id}",
        "settings": f"{hub_url()}/settings/tokens",
        "network": _NETWORK,
        "token": "your token" if get_token() else "a caller without a token",
        "status": str(getattr(response, "status_code", "")),
        "wait": f"{wait} s" if wait.isascii() and wait.isdigit() else "a few minutes",
        "said": f". It says: {told}" if told else "",
    }
