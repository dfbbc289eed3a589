"""What a run tells whoever watches it: lines, and progress as a bar on a terminal or as lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

import typer
from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


def is_main() -> bool:
    """Whether this process speaks for all (`accelerate launch` and `torchrun` set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """One line on stdout, from the main process only, above a progress bar where one is drawn."""
    if is_main():
        with tqdm.external_write_mode(file=sys.stdout):
            typer.echo(line)
            sys.stdout.flush()


def quiet_libraries() -> None:
    """Switch off the progress bars of diffusers and transformers, which would break up ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def only_errors() -> Iterator[None]:
    """Within it, diffusers and transformers do not warn: of a long caption they repeat all that is cut off."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def progress(items: Iterable[Item], total: int, what: str) -> Generator[Item, None, None]:
    """Pass `items` through, showing how far they are."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, disable=not is_main())
        return
    told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done < total and time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{what}: {done}/{total}")


@contextmanager
def ticking(total: int, what: str) -> Iterator[Callable[[], object]]:
    """Within it, what it gives is called after each of so many small steps, to show how far they are."""
    with closing(progress(range(total), total, what)) as steps:
        yield lambda: next(steps, None)
