"""The few-step health: the formulas, against numbers worked out by hand and against PEFT, and the plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lorafuse_train.experts import Expert
from lorafuse_train.precision import Precision
from lorafuse_train.samples.health import (
    Agreement,
    Health,
    Pictures,
    describe,
    fine_energy,
    read_health,
    sharpness,
)
from lorafuse_train.samples.health_plot import BAD, GOOD, draw_health
from lorafuse_train.samples.sample import Schedule, starting_noise

CPU = Precision(torch.device("cpu"), autocast=False, reason="")


def wave(frequency: float, amplitude: float, size: int = 32) -> Tensor:
    """A latent (1, h, w) that is one cosine across."""
    return amplitude * torch.cos(2 * math.pi * frequency * torch.arange(size)).expand(1, size, size)


def test_energy_is_the_mean_square_of_what_lies_above_half_nyquist() -> None:
    fine, coarse = wave(12 / 32, 3.0), wave(2 / 32, 5.0)
    assert fine_energy(fine) == pytest.approx(4.5)  # a^2 / 2
    assert fine_energy(coarse + 7) == pytest.approx(0, abs=1e-9)
    assert fine_energy(fine + coarse) == pytest.approx(4.5)
    assert fine_energy(torch.stack([fine[0], coarse[0]])) == pytest.approx(2.25)  # the mean of the channels
    assert fine_energy(fine[:, None].expand(1, 5, 32, 32)) == pytest.approx(4.5)  # and of a video's frames
    # against another way to take the low frequencies out: subtract their projection on cosines and sines
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    k = torch.arange(16)
    basis = torch.exp(2j * math.pi * torch.outer(k, k) / 16)
    frequency = torch.minimum(k, 16 - k) / 16
    low = torch.hypot(frequency[:, None], frequency[None]) <= 0.25
    coefficients = basis.conj() @ noise[0].to(basis.dtype) @ basis.conj().T / 256
    rest = noise[0] - (basis @ (coefficients * low) @ basis.T).real
    assert fine_energy(noise) == pytest.approx(rest.square().mean().item())


def test_sharpness_is_the_ratio_of_ratios() -> None:
    off = Pictures([wave(12 / 32, 2.0), wave(12 / 32, 1.0)], [wave(12 / 32, 4.0)] * 2)
    assert sharpness(off, off) == 1
    softer = Pictures([wave(12 / 32, 1.0), wave(12 / 32, 1.0)], [wave(12 / 32, 4.0)] * 2)
    assert sharpness(softer, off) == pytest.approx(math.sqrt(1 / 4))  # geometric mean of 1/4 and 1
    # a style that is finer at both schedules is no drift
    finer = Pictures([3 * few for few in off.few], [3 * long for long in off.long])
    assert sharpness(finer, off) == pytest.approx(1)


class Line:
    """v = g (x - a): a linear model of which everything is known; the LoRA adds `extra` to v."""

    def __init__(self) -> None:
        self.extra, self.on = 0.0, True

    def disable_adapters(self) -> None:
        self.on = False

    def enable_adapters(self) -> None:
        self.on = True

    def named_parameters(self) -> list[Any]:
        return []


class LineRecipe:
    """Enough of a recipe to predict with `Line`."""

    def collate(self, captions: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return {"a": torch.stack([caption["a"] for caption in captions])}

    def predict(self, transformer: Line, x: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        a = condition["a"].view(-1, 1, 1, 1)
        return (x - a) / sigma.view(-1, 1, 1, 1) + (transformer.extra if transformer.on else 0)


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_agreement_is_one_minus_the_relative_difference(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With v = (x - a) / sigma + e, x0 without LoRA is a everywhere on the trajectory, and a - sigma e with it."""
    monkeypatch.setattr("lorafuse_train.samples.sample.TOKENS_AT_ONCE", at_once)
    prompts = tuple({"a": torch.tensor(value)} for value in (3.0, 4.0))
    schedule = Schedule((1.0, 0.5), 1.0)
    recipe: Any = LineRecipe()
    agreement = Agreement(recipe, prompts, prompts, schedule, (1, 2, 2), 0, CPU)
    model = Line()
    assert agreement.measure(model) == 1
    model.extra = 2.0
    rms = math.sqrt((9 + 16) / 2)
    assert agreement.measure(model) == pytest.approx(1 - (2 / rms + 1 / rms) / 2)
    assert model.on


def test_an_expert_that_no_step_asks_agrees_with_itself() -> None:
    prompts = ({"a": torch.tensor(3.0)},)
    recipe: Any = LineRecipe()
    model = Line()
    model.extra = 2.0
    for component, expected in (("transformer_2", 1), ("transformer", 1 - (2 / 3 + 1 / 3) / 2)):
        expert = Expert(component, Path("other"), boundary=0.5)
        agreement = Agreement(recipe, prompts, prompts, Schedule((1.0, 0.5), 1.0), (1, 2, 2), 0, CPU, expert=expert)
        assert agreement.measure(model) == pytest.approx(expected)


def test_agreement_of_a_real_lora_equals_that_of_a_peft_one_by_hand() -> None:
    """States and predictions computed with diffusers and PEFT alone."""
    from train import tiny

    from lorafuse_train.recipes.qwen_image import QwenImage

    transformer = tiny.pipeline().transformer.requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    encoded = tuple({"embeds": torch.randn(5, 16)} for _ in range(3))
    schedule, latent = Schedule((1.0, 0.7, 0.4), 1.0), (4, 4, 4)
    measured = Agreement(QwenImage(), encoded, encoded, schedule, latent, 5, CPU).measure(transformer)

    def velocity(x: Tensor, sigma: float, caption: Tensor) -> Tensor:
        with torch.no_grad():
            packed = x.view(4, 2, 2, 2, 2).permute(1, 3, 0, 2, 4).reshape(1, 4, 16)
            out = transformer(
                hidden_states=packed, encoder_hidden_states=caption[None], timestep=torch.tensor([sigma]),
                img_shapes=[[(1, 2, 2)]], return_dict=False,
            )[0]  # fmt: skip
            unpacked: Tensor = out.view(2, 2, 4, 2, 2).permute(2, 0, 3, 1, 4).reshape(4, 4, 4)
            return unpacked

    apart, size = torch.zeros(3), torch.zeros(3)
    for number, caption in enumerate(encoded):
        x = starting_noise(5, number, latent)
        for step, (sigma, after) in enumerate(((1.0, 0.7), (0.7, 0.4), (0.4, 0.0))):
            transformer.disable_adapters()
            off = velocity(x, sigma, caption["embeds"])
            transformer.enable_adapters()
            on = velocity(x, sigma, caption["embeds"])
            apart[step] += (sigma * (on - off)).square().sum()
            size[step] += (x - sigma * off).square().sum()
            x = x + (after - sigma) * off
    expected = (1 - (apart / size).sqrt()).mean().item()
    assert expected < 0.99
    assert measured == pytest.approx(expected, abs=1e-4)


def test_drift_is_said_in_words() -> None:
    assert Health(5, 0.95, 1.1).drift == ()
    assert "no longer draw" in Health(5, 0.5, 1.0).drift[0]
    assert "softer" in Health(5, 0.9, 0.5).drift[0]
    assert not Health(5, 0.9, 1.5).drift
    assert len(Health(5, math.nan, math.nan).drift) == 2
    assert describe(Health(5, 0.95, 1.0)).count("\n") == 0
    assert "--learning_rate" in describe(Health(5, 0.5, 0.5))


def test_figures_are_read_back_from_the_metrics(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "validation_loss": 0.5, "health_agreement": 1.0, "health_sharpness": 1.0},
        {"step": 1, "loss": 0.4},
        {"step": 1, "validation_loss": 0.4},
        {"step": 2, "health_agreement": 0.9, "health_sharpness": 0.8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_health(tmp_path) == (Health(0, 1.0, 1.0), Health(2, 0.9, 0.8))
    assert read_health(tmp_path / "gone") == ()


def test_the_plot_shows_drift_in_another_colour() -> None:
    def colours(*points: Health) -> set[Any]:
        sheet = draw_health(points)
        return {colour for _, colour in sheet.getcolors(1 << 20) or ()}

    rgb = {name: tuple(bytes.fromhex(name[1:])) for name in (GOOD, BAD)}
    assert rgb[GOOD] in colours(Health(0, 1, 1))
    healthy, ill = (draw_health([Health(0, 1, 1), Health(9, last, 1)]) for last in (0.95, 0.4))

    def count(sheet: Any) -> int:
        return sum(number for number, colour in sheet.getcolors(1 << 20) if colour == rgb[BAD])

    assert count(ill) > count(healthy) + 20  # besides the dashes
    for nothing in (math.nan, -math.inf):
        assert count(draw_health([Health(0, 1, 1), Health(9, nothing, 1)])) > count(healthy) + 20
