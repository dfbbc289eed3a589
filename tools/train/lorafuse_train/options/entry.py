"""What an option has besides its type and default: its place in `--help`, and the values it may take."""

from __future__ import annotations

from dataclasses import dataclass

BASE, DATA, LORA, TRAINING, OPTIMIZER, NOISE, FEW_STEP, MEMORY, SAMPLES, CACHE, OUTPUT = (
    "Base",
    "Dataset",
    "LoRA",
    "Training",
    "Optimizer",
    "Noise levels and loss",
    "Few-step base",
    "Precision and memory",
    "Samples",
    "Check and cache",
    "Output",
)
RESULT = "Finished LoRA"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values a number may take: `low` itself only where it is not `open`, `high` where it is not `below`."""

    low: float
    high: float = float("inf")
    open: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open else value >= self.low
        return above and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open else f"at least {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


POSITIVE, NOT_NEGATIVE, SHARE = Bounds(0, open=True), Bounds(0), Bounds(0, 1)
NOT_WHOLE = Bounds(0, 1, below=True)
ONE_OR_MORE = Bounds(1)
SEED = Bounds(0, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """What an option has besides its type and default."""

    panel: str
    """Its heading in `--help`."""
    help: str
    choices: tuple[str, ...] = ()
    """The values it may take; any where empty."""
    bounds: Bounds | None = None
    form: str = ""
    """A regular expression that its text matches; any text where empty."""
    expected: str = ""
    """What `form` means, in words."""
    commands: tuple[str, ...] = ()
    """The commands that take it on the command line; all where empty."""
