"""`--schedule` as it is given: noise levels, or a JSON file that holds or implies them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import Schedule

from .sigmas import SCHEDULER, depends_on_size, scheduler_sigmas

_ENTRIES = {"sigmas", "steps", "guidance_scale", "scheduler", "source"}
_MOST_STEPS = 1000


def read_schedule(asked: str) -> Schedule:
    """`--schedule` as it was given: noise levels, a file, or a file with the number of steps.

    Raises:
        ConfigError: it is none of them, or the file is no schedule.
    """
    path, colon, steps = asked.rpartition(":")
    if Path(asked).is_file():
        return _from_file(Path(asked), None)
    if colon and steps.isdecimal() and Path(path).is_file():
        return _from_file(Path(path), int(steps))
    if asked.endswith(".json"):
        raise ConfigError(f"--schedule {asked}: no such file")
    return checked_schedule(asked.split(","), 1.0, "--schedule")


def _from_file(path: Path, steps: int | None) -> Schedule:
    """JSON with `sigmas`, or with `steps` and `scheduler`; or a diffusers scheduler_config.json and the steps."""
    where = f"--schedule {path}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(found).__name__}")
    if "_class_name" in found:
        found = {"scheduler": found}
    if unknown := sorted(set(found) - _ENTRIES):
        expected = "sigmas, or steps and scheduler; guidance_scale"
        raise ConfigError(f"{where}: unknown entries {unknown}; expected {expected}")
    scheduler, guidance = found.get("scheduler"), found.get("guidance_scale", 1.0)
    if scheduler is not None and not isinstance(scheduler, dict):
        raise ConfigError(f"{where}: scheduler is no JSON object; expected a diffusers scheduler's config")
    if isinstance(guidance, bool) or not isinstance(guidance, int | float):
        raise ConfigError(f"{where}: guidance_scale is {guidance!r}; expected a number, 1 for none")
    levels = _levels_of(where, found, scheduler, steps)
    source = f"--schedule {path.name}{f':{steps}' if steps else ''}"
    return replace(checked_schedule(levels, float(guidance), where), source=source, scheduler=scheduler)


def _levels_of(
    where: str, found: Mapping[str, Any], scheduler: Mapping[str, object] | None, steps: int | None
) -> Sequence[object]:
    if "sigmas" in found:
        if not isinstance(found["sigmas"], list):
            raise ConfigError(f"{where}: sigmas is no list of noise levels")
        if steps not in (None, len(found["sigmas"])):
            raise ConfigError(f"{where}:{steps}: it has {len(found['sigmas'])} noise levels, not {steps}")
        return found["sigmas"]
    count = steps or found.get("steps")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_STEPS:
        raise ConfigError(
            f"{where}: says nothing of the number of steps, or no sensible one; add it behind a colon "
            "(--schedule FILE:4), or as steps"
        )
    if scheduler is None:
        raise ConfigError(f"{where}: has steps but neither sigmas nor scheduler, a {SCHEDULER}'s config")
    if depends_on_size(scheduler):
        raise ConfigError(
            f"{where}: its noise levels depend on the size of the picture (base_shift is not max_shift); "
            "state them as sigmas"
        )
    try:
        return scheduler_sigmas(scheduler, count)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def checked_schedule(values: Sequence[object], guidance_scale: float, source: str) -> Schedule:
    """A schedule of these noise levels.

    Raises:
        ConfigError: they are no numbers, or do not fall between 1 and 0; or the guidance is no finite number.
    """
    if not math.isfinite(guidance_scale):
        raise ConfigError(f"{source}: guidance_scale is {guidance_scale}; expected a number, 1 for none")
    try:
        sigmas = tuple(float(str(value)) for value in values)
    except ValueError:
        sigmas = ()
    falls = all(a > b for a, b in itertools.pairwise(sigmas))
    if not sigmas or not falls or not all(math.isfinite(s) and 0 < s <= 1 for s in sigmas):
        raise ConfigError(
            f"{source}: {','.join(map(str, values))!r} is no schedule; expected falling noise levels "
            'between 1 and 0 such as "1,0.9,0.75,0.5", a JSON file, auto or none'
        )
    return Schedule(sigmas, guidance_scale, source)
