"""A moving average of the LoRA's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """One averaged tensor for each parameter, in fp32 and where the parameter is."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, update_after_step: int) -> None:
        self._decay = decay
        self._update_after_step = update_after_step
        self._parameters = dict(parameters)
        self._averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def decay(self, step: int) -> float:
        """min(decay, (1 + n) / (10 + n)) at step `step`, counted from 1, where n steps were averaged before it."""
        n = step - self._update_after_step - 1
        return 0.0 if n <= 0 else min(self._decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay average + (1 - decay) weight, after step `step`."""
        decay = self.decay(step)
        for name, average in self._averages.items():
            average.sub_((1 - decay) * (average - self._parameters[name]))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the parameters are the averages; afterwards they are, bit for bit, what they were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            parameter.data, self._averages[name] = average, parameter.data

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """By the name of the parameter."""
        return self._averages

    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from what `averages` gave."""
        for name, average in self._averages.items():
            average.copy_(averages[name])


@contextmanager
def averaged(ema: Ema | None) -> Iterator[None]:
    """`ema.in_use()`, or nothing where there is no average."""
    if ema is None:
        yield
    else:
        with ema.in_use():
            yield
