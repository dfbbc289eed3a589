"""Judges pictures with a small classifier: right shape, colour, background plus a Frechet distance."""

from __future__ import annotations

from typing import NamedTuple

import drawing
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maker.pictures import drawn
from maker.progress import Progress

FEATURES = 64
BATCH = 64


def _convolution(channels: int, filters: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(filters), nn.ReLU())


class Verdict(NamedTuple):
    """Features with the logits of each question."""

    features: Tensor
    shape: Tensor
    colour: Tensor
    background: Tensor


class Judge(nn.Module):
    """A small convolutional classifier of plain pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(3, 16, 2),
            _convolution(16, 32, 2),
            _convolution(32, 32, 1),
            _convolution(32, 64, 2),
            _convolution(64, FEATURES, 1),
        )
        # Maximum and mean: a background is seen everywhere, a corner of a star in one place.
        self.join = nn.Linear(2 * FEATURES, FEATURES)
        self.shape = nn.Linear(FEATURES, len(drawing.SHAPES))
        self.colour = nn.Linear(FEATURES, len(drawing.COLOURS))
        self.background = nn.Linear(FEATURES, len(drawing.BACKGROUNDS))

    def forward(self, pictures: Tensor) -> Verdict:
        maps = self.body(pictures)
        features = F.relu(self.join(torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)))
        return Verdict(features, self.shape(features), self.colour(features), self.background(features))


class Truth(NamedTuple):
    shape: Tensor
    colour: Tensor
    background: Tensor


def truth(scenes: drawing.Scenes) -> Truth:
    return Truth(*(torch.from_numpy(part) for part in (scenes.shape, scenes.colour, scenes.background)))


def train_judge(steps: int) -> Judge:
    torch.manual_seed(0)
    judge, rng = Judge(), np.random.default_rng(5)
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    progress = Progress("judge", steps, every=200)
    for step in range(steps):
        pictures, scenes = drawn(BATCH, rng)
        # Noise, or a blur in every other step: generated pictures are never as clean as drawn ones.
        pictures += torch.rand(BATCH, 1, 1, 1) * 0.15 * torch.randn_like(pictures)
        verdict = judge(F.avg_pool2d(pictures, 3, 1, 1) if step % 2 else pictures)
        loss = torch.stack(
            [F.cross_entropy(answer, right) for answer, right in zip(verdict[1:], truth(scenes), strict=True)]
        ).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.step(loss.item())
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, pictures: Tensor) -> Verdict:
    return Verdict(*(torch.cat(parts) for parts in zip(*map(judge, torch.split(pictures, 128)), strict=True)))


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features, each seen as one Gaussian."""
    a, b = first.double(), second.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # Tr sqrt(A B) from the eigenvalues, which are real and >= 0 up to rounding.
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


class Score(NamedTuple):
    """Shares of right answers in 0..1, higher is better; then smear with the distance, lower is better."""

    shape: float
    colour: float
    background: float
    all_right: float
    smear: float
    frechet: float


def smear(pictures: Tensor, scenes: drawing.Scenes) -> float:
    """Share of pixels that are neither the shape's colour nor the background's; edges always have some."""
    flat = [torch.from_numpy(rgb)[:, :, None, None] * 2 - 1 for rgb in drawing.flat_colours(scenes)]
    nearest = torch.stack([(pictures - rgb).abs().amax(1) for rgb in flat]).amin(0)
    return float((nearest > 0.2).float().mean())


class Referee:
    """A judge with the features of 4096 drawn pictures to compare against."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.reference = judged(judge, drawn(4096, np.random.default_rng(777))[0]).features

    def score(self, pictures: Tensor, scenes: drawing.Scenes) -> Score:
        verdict = judged(self.judge, pictures)
        pairs = zip(verdict[1:], truth(scenes), strict=True)
        right = torch.stack([answer.argmax(1) == wanted for answer, wanted in pairs])
        shares = [
            *right.float().mean(1).tolist(),
            right.all(0).float().mean().item(),
            smear(pictures, scenes),
        ]
        return Score(*(round(x, 4) for x in [*shares, frechet(verdict.features, self.reference)]))
