"""`lorafuse-train train --fused_model models/fused --dataset_base_path data/mine --output_path models/my-lora`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lorafuse_common.errors import LorafuseError

from .console import only_errors
from .option import Option
from .options import OPTIONS, resolve_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Applied to option names only, so `--lora-rank` works and values keep their dashes.
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
)


@app.callback()
def lorafuse_train() -> None:
    """Train a new LoRA on a checkpoint that `lorafuse fuse` wrote."""


def _parameter(option: Option) -> inspect.Parameter:
    """The typer parameter of one option; None stands for "not given", so that YAML and defaults can speak."""
    entry = option.entry
    text = entry.help + (f" One of: {', '.join(entry.choices)}." if len(entry.choices) > 1 else "")
    if option.required:
        text += " Required."
    elif option.default not in (None, "", " ") and option.kind is not bool and not option.many:
        text += f" Default: {option.default}."
    names = [f"--{option.name}"] if option.kind is not bool else [f"--{option.name}/--no_{option.name}"]
    metavar = None if option.kind is bool else option.metavar
    info = typer.Option(*names, help=text, rich_help_panel=entry.panel, show_default=False, metavar=metavar)
    plain: Any = bool if option.kind is bool else list[str] if option.many else str
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, info]
    )


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one parameter for every field of `TrainConfig`."""
    parameters = [_parameter(option) for option in OPTIONS.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_with_options
def train(**given: Any) -> None:
    """Train a LoRA, check that diffusers loads it, and draw samples.

    Every option can also stand in the YAML file given by --config. Names may be written with dashes.
    """
    config = resolve_config(given)
    with only_errors():  # transformers warns of classes for which it would like torchvision
        from .train import Stopped, run  # imports torch and diffusers, which `--help` should not wait for

    try:
        run(config)
    except KeyboardInterrupt:  # typer would end with 130 too, but without a word
        _complain("lorafuse-train: stopped by Ctrl-C; what was saved before is complete")
        raise typer.Exit(130) from None
    except Stopped as stopped:
        _complain(f"lorafuse-train: {stopped}")
        raise typer.Exit(stopped.status) from None


@app.command("show-timesteps")
@_with_options
def show_timesteps(**given: Any) -> None:
    """Draw the noise levels that a training with these options would draw, without loading any weights.

    Writes timesteps.png to --output_path, with the few-step schedule of the base marked.
    """
    config = resolve_config(given)
    with only_errors():
        from .histogram import show_timesteps as show

    show(config)


def main() -> None:
    """The console script: one message and status 1 for a user's fault, a traceback for ours."""
    try:
        app()
    except LorafuseError as error:
        _complain(f"lorafuse-train: {error}")
        sys.exit(1)


def _complain(message: str) -> None:
    """Say it once: under `accelerate launch` only the main process does."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(message, err=True)
