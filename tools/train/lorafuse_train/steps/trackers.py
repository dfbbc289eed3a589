"""TensorBoard, Weights & Biases and Trackio, through accelerate; each is optional, and asked for by --report_to."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorafuse_common.errors import ConfigError
from lorafuse_train.atomic import write_atomically
from lorafuse_train.options.config import NO_TRACKER, TrainConfig
from lorafuse_train.options.options import OPTIONS, dump_config, plain_value

TENSORBOARD, WANDB, TRACKIO = "tensorboard", "wandb", "trackio"
FOLDER, RUN_ID = "logs", "run_id"
OFFLINE = ("offline", "disabled", "dryrun")


def check_trackers(config: TrainConfig) -> None:
    """Make sure, before anything is loaded, that every tracker can begin.

    Raises:
        ConfigError: a package is missing, or it is not known who is tracking.
    """
    for name in _asked(config):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report_to {name}: the package is not here: pip install {name}")
    if WANDB in _asked(config) and os.environ.get("WANDB_MODE") not in OFFLINE and not _wandb_key():
        raise ConfigError("--report_to wandb: nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")


def _asked(config: TrainConfig) -> tuple[str, ...]:
    return tuple(name for name in config.report_to if name != NO_TRACKER)


def _wandb_key() -> bool:
    # Only looked for, never read into a message.
    return bool(os.environ.get("WANDB_API_KEY") or importlib.import_module(WANDB).api.api_key)


@dataclass(frozen=True, slots=True)
class Trackers:
    """All that were asked for."""

    running: Mapping[str, Any]
    """accelerate's `GeneralTracker`s by name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, in every tracker."""
        for tracker in self.running.values():
            tracker.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def validation(self, values: Mapping[str, float], step: int) -> None:
        """What was measured after a step, in every tracker."""
        for tracker in self.running.values():
            tracker.log(dict(values), step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        """A picture, in every tracker."""
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        for kind, tracker in self.running.items():
            if kind == TRACKIO:  # which accelerate gives no `log_images`
                tracker.log({name: importlib.import_module(TRACKIO).Image(pixels)}, step=step)
            elif kind == WANDB:
                tracker.log_images({name: [pixels]}, step=step)
            else:
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")


@contextmanager
def open_trackers(config: TrainConfig, done: int) -> Iterator[Trackers]:
    """Start every tracker, at step `done`; a resumed run goes on in its own record.

    Raises:
        ConfigError: one does not start.
    """
    folder = config.output_path / FOLDER
    run_id = _run_id(folder, done) if _asked(config) else ""
    running = {}
    with contextlib.ExitStack() as stack:
        for name in _asked(config):
            try:
                running[name] = _start(name, config, folder, run_id, done)
            except Exception as error:  # whatever a service may raise
                raise ConfigError(f"--report_to {name}: does not start: {' '.join(str(error).split())}") from error
            stack.callback(running[name].finish)
        yield Trackers(running)


def _run_id(folder: Path, done: int) -> str:
    file = folder / RUN_ID
    if done and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    made = uuid.uuid4().hex[:12]
    write_atomically(file, lambda path: path.write_text(made, encoding="utf-8"))
    return made


def _start(name: str, config: TrainConfig, folder: Path, run_id: str, done: int) -> Any:
    from accelerate import tracking

    project, title = config.tracker_project_name, config.output_path.resolve().name
    if name == TENSORBOARD:
        tracker = tracking.TensorBoardTracker("", folder, purge_step=done)
        tracker.start()
        tracker.log({"config": f"```\n{dump_config(config)}```"}, step=done)
        return tracker
    values = {option: plain_value(config, option) for option in OPTIONS}
    if name == WANDB:
        tracker = tracking.WandBTracker(project, name=title, id=run_id, resume="allow", dir=str(folder))
    else:
        tracker = tracking.TrackioTracker(project, name=f"{title}-{run_id}", resume="allow")
    tracker.start()
    tracker.store_init_configuration(values)
    return tracker
