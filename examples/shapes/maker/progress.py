"""Prints how a training loop is doing, one line now and then."""

from __future__ import annotations

import time


class Progress:
    """Running mean of the loss with the time since the start."""

    def __init__(self, name: str, steps: int, every: int, done: int = 0) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.first, self.done, self.loss = done, done, 0.0
        self.started = time.perf_counter()

    def step(self, loss: float) -> None:
        self.done += 1
        here = self.done - self.first
        self.loss += (loss - self.loss) * max(0.02, 1 / here)
        if self.done % self.every == 0 or self.done == self.steps:
            seconds = time.perf_counter() - self.started
            speed = f"{seconds:.0f}s {1000 * seconds / here:.0f}ms/step"
            print(f"{self.name} {self.done}/{self.steps} loss {self.loss:.4f} {speed}", flush=True)
