"""What goes wrong with the hub, as one line that says what was asked for and what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lorafuse_common.errors import HubError, LorafuseError

from .names import HubName


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub and the libraries under it raise into HubError."""
    from huggingface_hub import errors

    kinds: tuple[type[Exception], ...] = (
        errors.HfHubHTTPError.__mro__[1],  # the base class of all that its httpx raises, whichever httpx that is
        errors.EntryNotFoundError,
        errors.RevisionResolutionError,
        errors.SafetensorsParsingError,
        OSError,
        RuntimeError,  # what hf_xet raises
        ValueError, AssertionError, KeyError, TypeError,  # what comes of an answer that no hub would give
    )  # fmt: skip
    try:
        yield
    except LorafuseError:
        raise
    except kinds as error:
        lost = " (and there is no such path on disk)" if name.is_bare else ""
        raise HubError(f"{name}{lost}: {explain(error, name)}") from error


def explain(error: BaseException, name: HubName) -> str:
    """What the error means, and what to do about it."""
    from huggingface_hub import constants, errors, is_offline_mode

    if isinstance(error, errors.LocalEntryNotFoundError | errors.RevisionResolutionError):
        if is_offline_mode():
            return not_cached()
        if error.__cause__:
            return explain(error.__cause__, name)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return not_cached()
    if isinstance(error, errors.HFValidationError):
        return f"is no name of a repository: {_first_line(error)}"
    if isinstance(error, errors.SafetensorsParsingError):
        return f"holds a .safetensors file that is none ({_first_line(error)})"
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, name)
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_disk(error)
    if isinstance(error, AssertionError | KeyError | TypeError | ValueError | errors.FileMetadataError):
        return (
            f"{constants.ENDPOINT} does not answer as a hub does ({_first_line(error)}); "
            "check HF_ENDPOINT, and whether a proxy or a login page answers instead"
        )
    if "No space left" in str(error):  # as hf_xet says it
        return _explain_disk(OSError(errno.ENOSPC, "No space left on device"))
    return (
        f"{constants.ENDPOINT} cannot be reached, or broke off ({_first_line(error)}), and the cache does not have it; "
        "check the network, the proxy and HF_ENDPOINT and try again: what has arrived is kept"
    )


def not_cached(what: str = "it") -> str:
    """For offline mode: the cache does not have what was asked for."""
    from huggingface_hub import constants

    return (
        f"the hub's cache ({constants.HF_HUB_CACHE}) does not have {what}, and HF_HUB_OFFLINE=1 forbids downloads; "
        "unset that, or fill the cache where there is a network"
    )


def _explain_answer(error: Exception, name: HubName) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name.repo}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError):
        if status == 403:
            return f"is gated, and the account of your token has no access yet; ask for it at {page}"
        return f"is gated; ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {name.repo} at {constants.ENDPOINT}, or it is private; check the name, "
            "or log in with `hf auth login` (or HF_TOKEN) as somebody who may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f" (a component stands behind the strength: :1@{name.revision})" if name.path else ""
        return f"it has no revision {name.revision or 'main'!r}{hint}; its branches and tags are at {page}/tree/main"
    if isinstance(error, errors.EntryNotFoundError):
        return f"it has no such file; its files are at {page}/tree/{name.revision or 'main'}"
    if isinstance(error, errors.DisabledRepoError):
        return f"the hub has disabled this repository; see {page}"
    if status in (401, 403):
        return f"the hub refuses your token ({status}); log in again with `hf auth login` or set another HF_TOKEN"
    if status == 429:
        return "the hub answers that you have asked too often (429); wait a few minutes, or log in with `hf auth login`"
    if status >= 500:
        return f"{constants.ENDPOINT} is out of order ({status}), and the cache does not have it; try again later"
    return f"the hub answers {status}: {_first_line(error)}"


def _explain_disk(error: OSError) -> str:
    from huggingface_hub import constants

    where = error.filename or constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "make room (`hf cache ls`, `hf cache rm`), or set HF_HOME to a folder on a larger disk"
        return f"the disk of the hub's cache is full ({where}); {advice}"
    return f"the hub's cache cannot be used ({where}: {error.strerror}); set HF_HOME to a folder that can be written"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else ''}{lines[0].rstrip('.') if lines else ''}"
