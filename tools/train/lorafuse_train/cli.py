"""`lorafuse-train train --fused_model models/fused --dataset_base_path data/mine --output_path models/my-lora`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lorafuse_common.errors import LorafuseError
from lorafuse_train.console import is_main, only_errors
from lorafuse_train.options.option import Option
from lorafuse_train.options.options import OPTIONS, resolve_config
from lorafuse_train.samples.sample_options import SAMPLE_OPTIONS, resolve_sample

NOT_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "check": ("fused_model", "output_path"),
    "cache": ("output_path",),
    "make_dedistill": ("dataset_base_path",),
}
"""The required options that a command does without."""

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


def _parameter(option: Option, required: bool) -> inspect.Parameter:
    """The typer parameter of one option; None stands for "not given", so that YAML and defaults can speak."""
    entry = option.entry
    text = entry.help + (f" One of: {', '.join(entry.choices)}." if len(entry.choices) > 1 else "")
    if required:
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
    """Give a command one parameter for every field of `TrainConfig` that it takes."""
    name = command.__name__
    parameters = [
        _parameter(option, option.required and option.name not in NOT_REQUIRED.get(name, ()))
        for option in OPTIONS.values()
        if not option.entry.commands or name in option.entry.commands
    ]
    return _with_parameters(command, parameters)


def _with_own(options: Mapping[str, Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one parameter for each of its own options."""
    parameters = [_parameter(option, option.required) for option in options.values()]
    return lambda command: _with_parameters(command, parameters)


def _with_parameters(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
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
        from lorafuse_train.train import Stopped, run  # imports torch and diffusers, which `--help` should not wait for

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
        from lorafuse_train.steps.histogram import show_timesteps as show

    show(config)


@app.command()
@_with_options
def check(**given: Any) -> None:
    """Check every row, picture and caption of a data set, list all faults, and say what is in it. Changes nothing.

    Takes the options of a training. --fused_model tells which sizes, columns and caption lengths its family takes.
    Ends with status 1 where there are faults.
    """
    config = resolve_config(given, NOT_REQUIRED["check"])
    from lorafuse_train.dataset.check import run_check

    run_check(config)


@app.command()
@_with_options
def cache(**given: Any) -> None:
    """Compute what a training needs of the VAE and the text encoder, and nothing else; what is there is not done again.

    Several processes may work on one cache, started by accelerate launch or by hand.
    """
    config = resolve_config(given, NOT_REQUIRED["cache"])
    with only_errors():
        from lorafuse_train.encoding.cache_command import run_cache

    try:
        run_cache(config)
    except KeyboardInterrupt:
        _complain("lorafuse-train: stopped by Ctrl-C; what was computed before is kept")
        raise typer.Exit(130) from None


@app.command()
@_with_own(SAMPLE_OPTIONS)
def sample(**given: Any) -> None:
    """Draw prompts with a fused base, without and with LoRAs: a grid, and a PNG for each picture.

    In few steps where lorafuse.json says how. A LoRA that was trained on another base is refused.
    """
    config = resolve_sample(given)
    with only_errors():
        from lorafuse_train.samples.sample_command import run_sample

    run_sample(config)


@app.command("make-dedistill")
@_with_options
def make_dedistill(**given: Any) -> None:
    """Make an adapter that turns a few-step base into an ordinary one again, to train on (`fuse --role scaffold`).

    The base draws pictures in its few steps, and a LoRA is trained on them by plain flow matching at a low rate.
    Takes the options of a training but the data set's. The pictures stay in --output_path.
    """
    with only_errors():
        from lorafuse_train.few_step.dedistill import make_dedistill as make

    make(given)


def main() -> None:
    """The console script: one message and status 1 for a user's fault, a traceback for ours."""
    try:
        app()
    except LorafuseError as error:
        _complain(f"lorafuse-train: {error}")
        sys.exit(1)


def _complain(message: str) -> None:
    """Say it once: under `accelerate launch` only the main process does."""
    if is_main():
        typer.echo(message, err=True)
