"""How far pictures are from what was drawn: a Frechet distance in the features of a classifier of all styles.

The classifier of `maker/scoring.py` has seen plain pictures only, and would judge a new style by features that mean
nothing there. This one is trained on drawn pictures of every style, to tell shape, colour and style, so that its
features separate what the experiment asks about: is it the right picture, in the right style, and crisp?
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import drawing
import numpy as np
import torch
import torch.nn.functional as F
from maker.pictures import drawn
from maker.progress import Progress
from maker.scoring import BATCH, FEATURES, Judge, Truth, Verdict, frechet, judged, truth
from torch import Tensor, nn

STYLES = tuple(drawing.CAPTIONS)
REFERENCE = 4096
JUDGE_STEPS = 1500


class StyleJudge(Judge):
    """The classifier of shape, colour and style."""

    def __init__(self) -> None:
        super().__init__()
        self.background = nn.Linear(FEATURES, len(STYLES))  # in the place of the background: styles change that


def mixed(rng: np.random.Generator) -> tuple[Tensor, Truth]:
    """A batch of all styles, as many of each."""
    parts = [(*drawn(BATCH // len(STYLES), rng, style), number) for number, style in enumerate(STYLES)]
    wanted = [
        truth(scenes)._replace(background=torch.full((len(pictures),), number)) for pictures, scenes, number in parts
    ]
    return torch.cat([pictures for pictures, _, _ in parts]), Truth(*map(torch.cat, zip(*wanted, strict=True)))


def train_style_judge(steps: int = JUDGE_STEPS) -> StyleJudge:
    """From fixed seeds, on pictures with noise, or blurred in every other step: no sample is as clean as a drawing."""
    torch.manual_seed(0)
    judge, rng = StyleJudge(), np.random.default_rng(15)
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    progress = Progress("judge", steps, every=250)
    for step in range(steps):
        pictures, right = mixed(rng)
        pictures = pictures + torch.rand(len(pictures), 1, 1, 1) * 0.15 * torch.randn_like(pictures)
        verdict: Verdict = judge(F.avg_pool2d(pictures, 3, 1, 1) if step % 2 else pictures)
        answers = zip(verdict[1:], right, strict=True)
        loss = torch.stack([F.cross_entropy(answer, wanted) for answer, wanted in answers]).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.step(loss.item())
    return judge.eval()


def load_judge(path: Path) -> StyleJudge:
    """The classifier that was saved there."""
    judge = StyleJudge()
    judge.load_state_dict(torch.load(path))
    return judge.eval()


@dataclass(frozen=True, slots=True)
class Score:
    """Of some pictures of one style."""

    distance: float
    """Frechet distance to drawn pictures of the style."""
    right: float
    """Share with the right shape, colour and style."""
    edges: float
    """Mean step between neighbouring pixels, as a share of the drawn pictures'; below 1: softer."""


def edges(pictures: Tensor) -> float:
    """Mean |difference| of neighbouring pixels of (n, 3, h, w)."""
    return float((pictures.diff(dim=-1).abs().mean() + pictures.diff(dim=-2).abs().mean()) / 2)


class Measure:
    """Scores pictures against drawn ones of the same style."""

    def __init__(self, judge: StyleJudge) -> None:
        self._judge = judge
        self._references: dict[str, tuple[Tensor, float]] = {}

    def score(self, pictures: Tensor, scenes: drawing.Scenes, style: str) -> Score:
        """`pictures` (n, 3, h, w) in -1..1 were asked to show `scenes` in `style`."""
        features, crisp = self._reference(style)
        verdict = judged(self._judge, pictures)
        wanted = truth(scenes)._replace(background=torch.full((len(pictures),), STYLES.index(style)))
        right = torch.stack([a.argmax(1) == b for a, b in zip(verdict[1:], wanted, strict=True)]).all(0)
        distance = frechet(verdict.features, features)
        return Score(round(distance, 3), round(right.float().mean().item(), 4), round(edges(pictures) / crisp, 4))

    def _reference(self, style: str) -> tuple[Tensor, float]:
        if style not in self._references:
            pictures, _ = drawn(REFERENCE, np.random.default_rng(777), style)
            self._references[style] = judged(self._judge, pictures).features, edges(pictures)
        return self._references[style]
