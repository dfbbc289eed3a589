"""`--push_to_hub`: checked before the training, done after everything is on the disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorafuse_common.errors import ConfigError, HubError
from lorafuse_train.console import is_main, say
from lorafuse_train.options.config import TrainConfig


def check_hub(config: TrainConfig) -> None:
    """Make sure, before the training, that there is a hub and a token that it knows.

    Raises:
        ConfigError: there is not.
    """
    if not (config.push_to_hub and is_main()):
        return
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise ConfigError("--push_to_hub: HF_HUB_OFFLINE=1 forbids it; unset that, or leave --push_to_hub out")
    if get_token() is None:
        raise ConfigError("--push_to_hub: there is no token; set HF_TOKEN or log in with `hf auth login`")
    try:
        with _explained("--push_to_hub"):
            HfApi().whoami()
    except HubError as error:
        raise ConfigError(str(error)) from error


def push(config: TrainConfig, files: Sequence[str]) -> None:
    """Upload files of the output folder, in one commit where the hub allows it.

    Raises:
        HubError: they are not, or not all, on the hub; on the disk they are complete.
    """
    from huggingface_hub import HfApi

    out, name = config.output_path, str(config.hub_model_id)
    command = ["hf", "upload", name, str(out), *(word for file in files for word in ("--include", file))]
    again = f"Everything is complete in {out}; to try again: {shlex.join(command)}"
    with _explained(f"--push_to_hub: {name} was not updated", again):
        api = HfApi()
        repository = api.create_repo(name, private=config.hub_private or None, exist_ok=True)
        commit = f"Upload {Path(files[0]).name} trained with lorafuse"
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=out, allow_patterns=list(files), commit_message=commit
        )
    say(f"pushed {len(files)} files to {repository}")


@contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn what huggingface_hub and the libraries under it raise into HubError."""
    from huggingface_hub import constants, errors

    kinds: tuple[type[Exception], ...] = (
        errors.HfHubHTTPError.__mro__[1],  # the base class of all that its httpx raises, whichever httpx that is
        OSError,
        RuntimeError,  # what hf_xet raises
        ValueError, AssertionError, KeyError, TypeError,  # what comes of an answer that no hub would give
    )  # fmt: skip
    try:
        yield
    except kinds as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status in (401, 403):
            why = f"the hub refuses your token ({status}); it needs the right to write: `hf auth login` or HF_TOKEN"
        elif isinstance(error, errors.HFValidationError):
            why = f"is no name of a repository ({_first_line(error)})"
        elif status:
            why = f"the hub answers {status} ({_first_line(error)})"
        else:
            why = f"{constants.ENDPOINT} cannot be reached, or does not answer as a hub does ({_first_line(error)})"
        raise HubError(f"{what}: {why}{'. ' if advice else ''}{advice}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else ''}{lines[0].rstrip('.') if lines else ''}"
