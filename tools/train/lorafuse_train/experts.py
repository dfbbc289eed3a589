"""Wan 2.2's two experts: which one is trained, on which noise levels, and both together when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorafuse_common.checkpoint import DEFAULT_COMPONENT, read_json
from lorafuse_common.errors import CheckpointError

SECOND = "transformer_2"
STEPS = 1000
"""Timesteps of sigma 1."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One of two transformers that share the noise levels of a pipeline."""

    component: str
    """Its folder in the pipeline."""
    other: Path
    """The other one's folder."""
    boundary: float
    """Sigma from which on `transformer` predicts; below it `transformer_2`."""

    @property
    def is_high(self) -> bool:
        """Whether it is the one for the high noise levels."""
        return self.component == DEFAULT_COMPONENT

    @property
    def range(self) -> tuple[float, float]:
        """Its noise levels."""
        return (self.boundary, 1.0) if self.is_high else (0.0, self.boundary)

    def __contains__(self, sigma: float) -> bool:
        """Whether it is the one that predicts at a noise level."""
        return is_above(sigma, self.boundary) == self.is_high

    def __str__(self) -> str:
        noise, sign = ("high", "from") if self.is_high else ("low", "below")
        return f"{self.component}, the {noise}-noise expert ({sign} timestep {STEPS * self.boundary:g})"


def find_expert(pipeline: Path, component: str) -> Expert | None:
    """What `component` is in a pipeline of two experts; None where the pipeline has but one transformer.

    Raises:
        CheckpointError: the pipeline names two, and one of them is not there.
    """
    index = read_json(pipeline / "model_index.json") or {}
    boundary, second = index.get("boundary_ratio"), index.get(SECOND, [None, None])
    if boundary is None or second in (None, [None, None]):
        return None
    other = pipeline / (SECOND if component == DEFAULT_COMPONENT else DEFAULT_COMPONENT)
    if not (other / "config.json").is_file():
        raise CheckpointError(f"{other}: no config.json; this pipeline needs both of its transformers to draw samples")
    return Expert(component, other, float(boundary))


def is_above(sigma: float, boundary: float) -> bool:
    """Whether the pipelines ask the expert for high noise levels; in fp32, as their schedulers count timesteps."""
    return bool(torch.tensor(sigma, dtype=torch.float32) * STEPS >= boundary * STEPS)


@dataclass
class Experts:
    """Both transformers, of which one at a time is on the device: what a sampler asks for a model of a noise level.

    The one that is not trained is loaded when it is first needed, and then kept in the host's memory.
    """

    trained: Any
    trains_high: bool
    boundary: float
    load: Callable[[], Any]
    """Gives the other one, anywhere."""
    device: torch.device
    _other: Any = field(default=None, repr=False)
    _trained_is_on: bool = True

    def at(self, sigma: float) -> Any:
        """The transformer of a noise level, on the device."""
        self._switch(is_above(sigma, self.boundary) == self.trains_high)
        return self.trained if self._trained_is_on else self._other

    def rest(self) -> None:
        """Put the trained one back on the device."""
        self._switch(True)

    def _switch(self, to_trained: bool) -> None:
        if to_trained == self._trained_is_on:
            return
        if self._other is None:
            self._other = self.load()
        leaves, comes = (self._other, self.trained) if to_trained else (self.trained, self._other)
        if self.device.type != "cpu":
            leaves.to("cpu")
        comes.to(self.device)
        self._trained_is_on = to_trained


def model_at(transformer: Any, sigma: float) -> Any:
    """The model that predicts at a noise level, where `transformer` may be `Experts`."""
    return transformer.at(sigma) if isinstance(transformer, Experts) else transformer


@contextmanager
def both(expert: Expert | None, transformer: Any, device: torch.device, load: Callable[[], Any]) -> Iterator[Any]:
    """What to draw with: `transformer`, and where it is an `expert` the other one too; afterwards it alone is there."""
    if expert is None:
        yield transformer
        return
    experts = Experts(transformer, expert.is_high, expert.boundary, load, device)
    try:
        yield experts
    finally:
        experts.rest()
